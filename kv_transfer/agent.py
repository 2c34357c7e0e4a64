"""The transfer agent: a process beside each worker that moves its KV blocks, so that a hung transfer hangs no engine.

Started by its worker as `python -m kv_transfer.agent`; it dies with it. It has no policy: the worker says which frames
leave and which may land, the agent says what became of them. One thread reads the worker's commands, one writes
events, one accepts peers, and each link to or from a peer has its own.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time

from kv_transfer.agent_context import AgentContext
from kv_transfer.agent_incoming import IncomingLink
from kv_transfer.agent_outgoing import OutgoingLink
from kv_transfer.agent_settings import from_arguments
from kv_transfer.agent_wire import AgentReady, Disturb, Ping
from kv_transfer.endpoint import Endpoint, format_endpoint, parse_endpoint
from kv_transfer.framed_socket import FramedSocket, LinkLost, address_family
from kv_transfer.messages import EndTransfer, ExpectFrames, SendFrame
from kv_transfer.seal import SECRET_BYTES
from tandem.log_lines import log_by

logger = logging.getLogger(__name__)

EVENT_TIMEOUT_S = 60.0  # a worker that takes no event for so long is stuck
LINGER_S = 60.0  # of a link that leads nowhere; far longer than a frame may take
PR_SET_PDEATHSIG = 1


class Agent:
    """Listens, obeys its worker's commands, and routes frames to links."""

    def __init__(self, context: AgentContext, control: FramedSocket) -> None:
        self._context = context
        self._control = control
        self._links: dict[Endpoint, OutgoingLink] = {}
        self._incoming: list[IncomingLink] = []
        self._looked_s = 0.0
        settings = context.settings
        self._tcp = socket.create_server((settings.bind_host, 0), family=address_family(settings.bind_host), backlog=64)
        self._local_name = f"tandem-agent-{context.incarnation:016x}"
        self._local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._local.bind("\0" + self._local_name)
        self._local.listen(64)

    @property
    def endpoint(self) -> Endpoint:
        """Where peers reach it."""
        return Endpoint(
            host=self._context.settings.reachable_host,
            port=self._tcp.getsockname()[1],
            uds=self._local_name,
            incarnation=self._context.incarnation,
            token=self._context.token.hex(),
        )

    def run(self) -> None:
        """Until the worker closes the control socket."""
        for target, name in ((self._accept, "accept"), (self._tell, "tell")):
            threading.Thread(target=target, name=name, daemon=True).start()
        if self._context.settings.transport is self._context.pool.far:
            threading.Thread(target=self._context.pool.load_far, name="torch", daemon=True).start()
        self._control.send(AgentReady(endpoint=format_endpoint(self.endpoint), pid=os.getpid()))
        while True:
            command = self._control.receive(timeout_s=LINGER_S)
            self.let_go(time.monotonic())
            if isinstance(command, SendFrame):
                self._send_frame(command)
            elif isinstance(command, ExpectFrames):
                self._expect(command)
            elif isinstance(command, EndTransfer):
                self._context.end(command)
            elif isinstance(command, Ping):
                self._context.events.put(Ping(number=command.number, answer=True))
            elif isinstance(command, Disturb):
                self._context.disturb(command)
            elif command is not None:
                raise LinkLost(f"an unexpected {type(command).__name__}")

    # ---- commands ----

    def _send_frame(self, command: SendFrame) -> None:
        header = command.header
        try:
            peer = parse_endpoint(command.endpoint)
        except ValueError as error:
            self._context.refused(header, str(error))
            return
        link = self._links.get(peer)
        if link is None:
            if not self._make_room():
                self._context.refused(header, f"links to {len(self._links)} other peers are in use, which is the limit")
                return
            link = self._links[peer] = OutgoingLink(self._context, peer)
            link.start()
        if not link.submit(header, command.priority):
            self._context.refused(header, "the queue to the peer's agent is full")

    def _expect(self, command: ExpectFrames) -> None:
        try:
            source = parse_endpoint(command.endpoint)
        except ValueError as error:
            self._context.link_failed({(command.transfer_id, command.epoch)}, str(error))
            return
        self._context.expect(command, source)

    def let_go(self, now_s: float) -> None:
        """Ends links that have no connection and had nothing to send for long: to agents that are gone, mostly.

        A peer that is started again is another endpoint. Looks once in LINGER_S.
        """
        if now_s < self._looked_s + LINGER_S:
            return
        self._looked_s = now_s
        for peer, link in list(self._links.items()):
            if link.is_idle and not link.is_connected and now_s > link.used_s + LINGER_S:
                self._links.pop(peer).close()

    def _make_room(self) -> bool:
        """Closes the link that was idle for longest when there are too many. False: all are in use."""
        if len(self._links) < self._context.settings.max_links:
            return True
        idle = [peer for peer, link in self._links.items() if link.is_idle]
        if idle:
            self._links.pop(min(idle, key=lambda peer: self._links[peer].used_s)).close()
        return bool(idle)

    # ---- the other threads ----

    def _accept(self) -> None:
        poller = select.poll()
        listeners = {listener.fileno(): listener for listener in (self._tcp, self._local)}
        for listener in listeners.values():
            listener.setblocking(False)
            poller.register(listener, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                try:
                    connection, _ = listeners[fd].accept()
                except OSError as error:  # gone again, or no descriptor is free
                    logger.warning("a peer was not accepted: %s", error)
                    time.sleep(0.01)
                    continue
                self._welcome(connection)

    def _welcome(self, connection: socket.socket) -> None:
        self._incoming = [link for link in self._incoming if link.is_alive()]
        if len(self._incoming) >= self._context.settings.max_links and not self._hang_up_idle():
            connection.close()
            return
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = IncomingLink(self._context, connection)
        self._incoming.append(link)
        link.start()

    def _hang_up_idle(self) -> bool:
        """Ends the link over which no frame came for longest; its source makes it anew. False: all are in use.

        Who has not proved to be a member goes first: strangers may come as they like, and push out none.
        """
        idle = (link for link in self._incoming if link.is_idle)
        oldest = min(idle, key=lambda link: (link.is_greeted, link.used_s), default=None)
        if oldest is None:
            return False
        oldest.hang_up()
        self._incoming.remove(oldest)
        return True

    def _tell(self) -> None:
        while True:
            event = self._context.events.get()
            try:
                self._control.send(event)
            except LinkLost:
                os._exit(0)  # the worker is gone, or stuck: either way this agent is of no use


def main(arguments: list[str]) -> int:
    """Runs one agent until its worker goes. No clean-up is needed: what it holds is gone with the process."""
    start = from_arguments(arguments)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != start.parent_pid:
        return 1  # the worker died before the line above
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a gloo pair takes five, a link two
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c is for the worker; this process goes with it
    log_by(logging.StreamHandler(sys.stderr), "warning", start.settings.log_format)
    secret = sys.stdin.buffer.read(SECRET_BYTES)  # not a flag: others may read those
    control = FramedSocket(socket.socket(fileno=start.control_fd), send_timeout_s=EVENT_TIMEOUT_S)
    try:
        Agent(AgentContext(start, secret), control).run()
    except LinkLost as error:
        logger.info("the worker is gone: %s", error)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"kv_transfer.agent: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    # Not through the interpreter's own end: torch's threads may be in the middle of something.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
