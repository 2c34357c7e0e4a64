"""A worker's side of its transfer agent: starts it, talks with it, and starts another when it dies or hangs."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kv_transfer.agent_settings import AgentSettings, AgentStart, check_transport, to_arguments
from kv_transfer.agent_wire import AgentReady, Disturb, FramesDamaged, Ping, StrangersRefused, validate
from kv_transfer.framed_socket import FramedSocket, LinkLost
from kv_transfer.messages import (
    AgentCommand,
    AgentEvent,
    EndTransfer,
    FrameAcked,
    FrameFailed,
    FrameLanded,
    SendFrame,
    TransferQuiet,
)
from kv_transfer.transports.cuda_pool import CudaPool
from tandem.errors import Unavailable
from tandem.request import TransferId

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0  # a loaded machine starts a Python slowly
STOP_TIMEOUT_S = 5.0
KILL_TIMEOUT_S = 30.0  # until a killed agent is reaped: it may have to give gigabytes back
MAX_COMMANDS = 1 << 16  # not yet taken by the agent: with more it is stuck, and is killed
MAX_RESTARTS = 5
RESTART_WINDOW_S = 60.0
PINGS = 5  # to a silent agent until it counts as stuck


@dataclass(frozen=True, slots=True, kw_only=True)
class _Addressed:
    command: AgentCommand
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentInfo:
    """The agent that runs now: what peers are told, and its process."""

    endpoint: str
    pid: int


class AgentClient:
    """One worker's agent over all its lives. `pool` is a descriptor of host memory, or where the pool is on a GPU; it
    stays the caller's, and open until `close` has returned. `secret` is what all agents of the cluster share.

    `on_event` is called on threads of this object, one call at a time, and must not block. An agent that gives no sign
    of life for `settings.stuck_timeout_ms` is killed: what it holds would stay in quarantine. When an agent dies, every
    transfer that it knew gets FrameFailed(sequence=None) and, once its process is reaped, TransferQuiet; then a new
    agent is started and told by `on_restart`. After MAX_RESTARTS deaths within a minute, or when a killed agent cannot
    be reaped, none is started any more, and `on_restart` gets None. Raises ValueError when the settings choose a
    transport that does not reach such a pool.
    """

    program: ClassVar[Sequence[str]] = (sys.executable, "-m", "kv_transfer.agent")

    def __init__(
        self,
        *,
        pool: int | CudaPool,
        num_blocks: int,
        block_bytes: int,
        layout_digest: bytes,
        settings: AgentSettings,
        on_event: Callable[[AgentEvent], None],
        on_restart: Callable[[AgentInfo | None], None],
        secret: bytes = b"",
        log_file: Path | None = None,
    ) -> None:
        check_transport(settings, pool)
        self._pool = pool
        self._num_blocks = num_blocks
        self._block_bytes = block_bytes
        self._layout_digest = layout_digest
        self._settings = settings
        self._on_event = on_event
        self._on_restart = on_restart
        self._secret = secret
        self.num_refused = 0  # strangers at the agent, and what was forged or replayed
        self.num_damaged = 0  # frames that arrived and did not check
        self._log_file = log_file  # of what agents print; None: where this process prints
        self._telling = threading.Lock()  # one event at a time
        self._changed = threading.Condition()  # guards what follows
        self._commands: deque[_Addressed | Ping | Disturb] = deque()
        self._known: set[tuple[TransferId, int]] = set()
        self._sock: FramedSocket | None = None  # None: no agent runs
        self._process: subprocess.Popen[bytes] | None = None
        self._info: AgentInfo | None = None
        self._error: Exception | None = None
        self._burying = False  # an agent has died and may not be reaped yet: nobody may answer for it
        self._closing = False
        self._reader = threading.Thread(target=self._run, name="agent-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="agent-writer", daemon=True)

    # ---- for the worker ----

    def start(self) -> AgentInfo:
        """Starts the first agent. Raises Unavailable when it does not get ready in time, with its reason."""
        self._reader.start()
        self._writer.start()
        with self._changed:
            self._changed.wait_for(lambda: self._info is not None or self._error is not None, START_TIMEOUT_S + 1)
            info, error = self._info, self._error
        if info is None:
            self.close()
            raise Unavailable(f"the transfer agent did not start: {error or 'no answer'}")
        return info

    @property
    def info(self) -> AgentInfo | None:
        """The agent that runs now, or None between two."""
        with self._changed:
            return self._info

    def send(self, command: AgentCommand, *, endpoint: str) -> None:
        """Queues a command for the agent at `endpoint`; never blocks. Every command is answered by events.

        `endpoint` is that of the agent which the worker knew when it decided. When it has died since, the command is
        answered here once it is reaped, and never reaches the next agent: what it is about has ended with the old one.
        """
        with self._changed:
            self._commands.append(_Addressed(command=command, endpoint=endpoint))
            if len(self._commands) > MAX_COMMANDS and self._process is not None:
                logger.error("the transfer agent takes no commands: it is killed")
                self._process.kill()
            self._changed.notify_all()

    def disturb(self, fault: Disturb) -> None:
        """Has the agent that runs now, if one does, suffer a fault; never blocks."""
        with self._changed:
            self._commands.append(fault)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the agent and the threads, bounded. Events of what was under way still come, the last is quiet."""
        with self._changed:
            self._closing = True
            sock = self._sock
            self._changed.notify_all()
        if sock is not None:
            sock.hang_up()
        for thread in (self._reader, self._writer):
            if thread.is_alive():
                thread.join(STOP_TIMEOUT_S * 2)

    # ---- the reader: one agent after another. It starts them too: an agent dies with the thread that started it ----

    def _run(self) -> None:
        deaths: deque[float] = deque(maxlen=MAX_RESTARTS)
        first = True
        while not self._closing:
            try:
                info = self._spawn()
            except (OSError, LinkLost) as error:
                if not self._closing:
                    logger.error("the transfer agent did not start: %s", error)
                self._reap()
                info = None
                if first:
                    self._fail_start(error)
                    return
            if info is not None:
                if not first:
                    self._restarted(info)
                self._read()
                if not self._bury():
                    self._restarted(None)
                    return
            first = False
            now_s = time.monotonic()
            if len(deaths) == MAX_RESTARTS and now_s - deaths[0] < RESTART_WINDOW_S:
                logger.error("the transfer agent died %d times within %g s", MAX_RESTARTS + 1, now_s - deaths[0])
                if not self._closing:
                    self._restarted(None)
                return
            deaths.append(now_s)

    def _spawn(self) -> AgentInfo:
        own, theirs = socket.socketpair()
        start = AgentStart(
            pool=self._pool,
            control_fd=theirs.fileno(),
            parent_pid=os.getpid(),
            num_blocks=self._num_blocks,
            block_bytes=self._block_bytes,
            layout_digest=self._layout_digest,
            settings=self._settings,
        )
        passed = (theirs.fileno(),) if isinstance(self._pool, CudaPool) else (theirs.fileno(), self._pool)
        with theirs:
            try:
                with ExitStack() as opened:
                    log = None if self._log_file is None else opened.enter_context(self._log_file.open("ab"))
                    process = subprocess.Popen(
                        [*self.program, *to_arguments(start)],
                        pass_fds=passed,
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                    )
            except OSError:
                own.close()
                raise
        _hand_over(process, self._secret)
        sock = FramedSocket(own, send_timeout_s=START_TIMEOUT_S)
        with self._changed:
            self._process = process
            self._sock = sock
            if self._closing:  # `close` came too early to hang up
                raise LinkLost("the worker closes it")
        ready = sock.receive(START_TIMEOUT_S)
        if not isinstance(ready, AgentReady):
            raise LinkLost(f"not ready within {START_TIMEOUT_S:g} s")
        info = AgentInfo(endpoint=ready.endpoint, pid=ready.pid)
        with self._changed:
            self._info = info
            self._changed.notify_all()
        return info

    def _fail_start(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _read(self) -> None:
        sock = self._sock
        assert sock is not None
        stuck_s = self._settings.stuck_timeout_ms / 1000
        num_silent = 0  # waits in a row, not seconds: this process may have been stopped itself
        while num_silent < PINGS:
            try:
                event = sock.receive(timeout_s=stuck_s / PINGS)
            except LinkLost:
                return
            if event is None:
                num_silent += 1
                self._ping()
                continue
            num_silent = 0
            if isinstance(event, Ping):
                continue
            if isinstance(event, StrangersRefused):
                self.num_refused += event.num
                continue
            if isinstance(event, FramesDamaged):
                self.num_damaged += event.num
                continue
            if not isinstance(event, (FrameLanded, FrameAcked, FrameFailed, TransferQuiet)):
                logger.error("the transfer agent sent an unexpected %s", type(event).__name__)
                return
            if isinstance(event, TransferQuiet):
                with self._changed:
                    self._known.discard((event.transfer_id, event.epoch))
            self._tell(event)
        logger.error("the transfer agent gave no sign of life for %g s: it is killed", stuck_s)

    def _ping(self) -> None:
        """Lets the writer ask for a sign of life: only it may block on a socket that nobody reads."""
        with self._changed:
            if not any(isinstance(each, Ping) for each in self._commands) and not self._closing:
                self._commands.append(Ping(number=0, answer=False))
                self._changed.notify_all()

    def _bury(self) -> bool:
        """Reaps an agent that died, then ends all that it knew. False: it cannot be reaped, so nothing has ended."""
        with self._changed:
            self._info = None
            self._burying = True
        if not self._reap():
            return False
        with self._changed:
            known = sorted(self._known)
            self._known.clear()
        for transfer_id, epoch in known:
            self._tell(
                FrameFailed(transfer_id=transfer_id, epoch=epoch, sequence=None, reason="the transfer agent died")
            )
            self._tell(TransferQuiet(transfer_id=transfer_id, epoch=epoch))
        with self._changed:
            self._burying = False
            self._changed.notify_all()
        return True

    def _reap(self) -> bool:
        """Ends the agent's process. False: the kernel does not let go of it."""
        with self._changed:
            process, sock = self._process, self._sock
            self._process, self._sock, self._info = None, None, None
        if sock is not None:
            sock.close()
        if process is None:
            return True
        if self._closing:
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)  # it ends by itself when the socket closes
        process.kill()
        try:
            process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.critical("the killed transfer agent %d has not ended within %g s", process.pid, KILL_TIMEOUT_S)
            return False
        return True

    # ---- the writer ----

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._burying and (self._commands or self._closing))
                if not self._commands:
                    return
                addressed = self._commands.popleft()
                sock = self._sock if self._info is not None else None
                if isinstance(addressed, _Addressed):
                    command = addressed.command
                    if self._info is None or self._info.endpoint != addressed.endpoint:
                        sock = None
                    else:
                        self._known.add(_key(command))
            if isinstance(addressed, (Ping, Disturb)):
                if sock is not None:
                    _pass_on(sock, addressed)
            elif sock is None:
                self._answer_for_agent(command, "the transfer agent that it was meant for has died")
            else:
                try:
                    validate(command)
                    _pass_on(sock, command)
                except ValueError as error:  # a mistake of the worker's own: the agent never sees it
                    logger.error("a malformed %s: %s", type(command).__name__, error)
                    self._answer_for_agent(command, str(error))

    def _answer_for_agent(self, command: AgentCommand, reason: str) -> None:
        transfer_id, epoch = _key(command)
        if isinstance(command, EndTransfer):
            self._tell(TransferQuiet(transfer_id=transfer_id, epoch=epoch))
            return
        sequence = command.header.sequence if isinstance(command, SendFrame) else None
        self._tell(FrameFailed(transfer_id=transfer_id, epoch=epoch, sequence=sequence, reason=reason))

    def _tell(self, event: AgentEvent) -> None:
        with self._telling:
            try:
                self._on_event(event)
            except Exception:  # the worker's own mistake must not end the thread that reaps its agent
                logger.exception("on_event(%s)", type(event).__name__)

    def _restarted(self, info: AgentInfo | None) -> None:
        try:
            self._on_restart(info)
        except Exception:  # as above
            logger.exception("on_restart")


def _key(command: AgentCommand) -> tuple[TransferId, int]:
    if isinstance(command, SendFrame):
        return command.header.transfer_id, command.header.epoch
    return command.transfer_id, command.epoch


def _hand_over(process: subprocess.Popen[bytes], secret: bytes) -> None:
    """Gives the agent its secret. One that died already is noticed elsewhere."""
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(secret)


def _pass_on(sock: FramedSocket, message: AgentCommand | Ping | Disturb) -> None:
    try:
        sock.send(message)
    except LinkLost:
        sock.hang_up()  # it hangs: the reader buries it, and so ends this command's transfer too
