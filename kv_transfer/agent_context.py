"""What all threads of one agent share: pool, identity, the attempts under one lock, and the way to the worker."""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time

from kv_transfer.agent_attempts import Answer, Attempts, Verdict
from kv_transfer.agent_pool import open_pool
from kv_transfer.agent_settings import AgentStart
from kv_transfer.agent_wire import Disturb, FramesDamaged, Ping, StrangersRefused
from kv_transfer.endpoint import Endpoint
from kv_transfer.gate import Gate
from kv_transfer.messages import (
    AgentEvent,
    EndTransfer,
    ExpectFrames,
    FrameAcked,
    FrameFailed,
    FrameHeader,
    FrameLanded,
    TransferQuiet,
)
from kv_transfer.transports import shm
from tandem.request import TransferId

# A worker's expectation and its peer's first frame come by different ways: how long a frame waits to become expected.
GRANT_WAIT_S = 0.2
MAX_EVENTS = 1 << 16
REFUSALS_TOLD_S = 1.0


class AgentContext:
    """Thread-safe. Events leave in the order in which the lock was taken, so that quiet is always the last word."""

    def __init__(self, start: AgentStart, secret: bytes = b"") -> None:
        self.start = start
        self.secret = secret  # of the cluster: who has it may speak with this agent
        self.settings = start.settings
        self.pool = open_pool(start)
        self.gate = Gate()  # on links to and from peers
        self.nonce = secrets.token_bytes(shm.NONCE_BYTES)
        self.nonce_fd = shm.nonce_memory(self.nonce)
        # Beside the rest: mapping a pool takes a moment, and the kernels may have to be built first.
        threading.Thread(target=self.pool.warm_up, name="warm-up", daemon=True).start()
        self.incarnation = secrets.randbits(63)
        self.token = secrets.token_bytes(16)
        self.events: queue.SimpleQueue[AgentEvent | Ping | StrangersRefused | FramesDamaged] = queue.SimpleQueue()
        self._num_refused = 0  # strangers that the worker has not been told of
        self._refused_s = float("-inf")
        self._num_urgent = 0
        self._counting = threading.Lock()
        self._attempts = Attempts()
        self._changed = threading.Condition()

    @property
    def operation_timeout_s(self) -> float:
        """How long one frame may take from its announcement to its answer."""
        return self.settings.operation_timeout_s

    @property
    def connect_timeout_s(self) -> float:
        """How long a peer may take to say hello."""
        return self.settings.connect_timeout_ms / 1000

    # ---- what the worker says ----

    def expect(self, command: ExpectFrames, source: Endpoint) -> None:
        """The worker grants blocks to an attempt."""
        with self._changed:
            reason = self._attempts.expect(command, source_agent=source.incarnation)
            if reason is not None:
                self._emit(
                    FrameFailed(transfer_id=command.transfer_id, epoch=command.epoch, sequence=None, reason=reason)
                )
            self._changed.notify_all()

    def end(self, command: EndTransfer) -> None:
        """The worker takes no more part: quiet is said at once, or when the last operation is over."""
        with self._changed:
            if self._attempts.end(command.transfer_id, command.epoch, time.monotonic()):
                self._emit(TransferQuiet(transfer_id=command.transfer_id, epoch=command.epoch))
            self._changed.notify_all()

    def disturb(self, command: Disturb) -> None:
        """The worker wants a fault."""
        now_s, for_s = time.monotonic(), command.for_ms / 1000
        if command.corrupt_every:
            self.pool.damage.arm(now_s, every=command.corrupt_every, for_s=for_s)
        else:
            self.gate.shut(now_s, for_s=for_s, period_s=command.period_ms / 1000)

    # ---- frames that arrive ----

    def take(self, header: FrameHeader, checksum: int, *, source_agent: int) -> Answer:
        """Whether an announced frame may land. Waits, bounded, for an expectation that is on its way."""
        known_by = time.monotonic() + GRANT_WAIT_S
        free_by = time.monotonic() + self.operation_timeout_s
        with self._changed:
            while True:
                answer = self._attempts.take(header, checksum, source_agent=source_agent)
                ends = {Verdict.UNKNOWN: known_by, Verdict.BUSY: free_by}.get(answer.verdict)
                if ends is None or not self._changed.wait(ends - time.monotonic()):
                    return answer

    def landed(self, header: FrameHeader, checksum: int) -> bool:
        """The frame is in its blocks and checks. False: its attempt has ended, so the source gets no ack."""
        with self._changed:
            wanted = self._attempts.landed(header, checksum)
            if wanted:
                self._emit(
                    FrameLanded(
                        transfer_id=header.transfer_id,
                        epoch=header.epoch,
                        sequence=header.sequence,
                        target_blocks=header.target_blocks,
                        num_bytes=header.num_bytes,
                        checksum=checksum,
                    )
                )
            self._settle(header.transfer_id, header.epoch)
            return wanted

    def dropped(self, header: FrameHeader) -> None:
        """The frame did not arrive whole. The source's agent tells its worker."""
        with self._changed:
            self._attempts.dropped(header)
            self._settle(header.transfer_id, header.epoch)

    def refuse_stranger(self) -> bool:
        """Counts a peer, or what one said, as forged, replayed or a stranger's. False: no need to log it, too.

        Strangers may come as fast as they like: the worker is told once a second at most.
        """
        with self._counting:
            self._num_refused += 1
            now_s = time.monotonic()
            if now_s - self._refused_s < REFUSALS_TOLD_S:
                return False
            self._refused_s = now_s
            num, self._num_refused = self._num_refused, 0
        self.events.put(StrangersRefused(num=num))
        return True

    def damaged(self) -> None:
        """Counts a frame that arrived and did not check. As many come as were granted, so each is told."""
        self.events.put(FramesDamaged(num=1))

    # ---- frames that leave ----

    def count_urgent(self, change: int) -> None:
        """So many more urgent frames wait, or fewer, at all links together."""
        with self._counting:
            self._num_urgent += change

    @property
    def urgent_wait(self) -> bool:
        """Whether an urgent frame waits at any link."""
        return self._num_urgent > 0

    def begin_sending(self, header: FrameHeader) -> bool:
        """Whether the frame may be read; then exactly one of the next three follows."""
        with self._changed:
            return self._attempts.send(header)

    def acked(self, header: FrameHeader, checksum: int) -> None:
        """The target has the frame, checked."""
        self._sent(
            header,
            FrameAcked(transfer_id=header.transfer_id, epoch=header.epoch, sequence=header.sequence, checksum=checksum),
        )

    def failed(self, header: FrameHeader, reason: str) -> None:
        """The target did not take the frame, or it was damaged."""
        self._sent(
            header,
            FrameFailed(transfer_id=header.transfer_id, epoch=header.epoch, sequence=header.sequence, reason=reason),
        )

    def set_back(self, header: FrameHeader) -> None:
        """The frame is not read any more, and may be sent again."""
        self._sent(header, None)

    def link_failed(self, keys: set[tuple[TransferId, int]], reason: str) -> None:
        """No frame of these attempts gets through to the peer."""
        with self._changed:
            for transfer_id, epoch in sorted(keys):
                if not self._attempts.is_ended(transfer_id, epoch):
                    self._emit(FrameFailed(transfer_id=transfer_id, epoch=epoch, sequence=None, reason=reason))

    def refused(self, header: FrameHeader, reason: str) -> None:
        """The frame was never started."""
        with self._changed:
            if not self._attempts.is_ended(header.transfer_id, header.epoch):
                self._emit(
                    FrameFailed(
                        transfer_id=header.transfer_id, epoch=header.epoch, sequence=header.sequence, reason=reason
                    )
                )

    def _sent(self, header: FrameHeader, event: AgentEvent | None) -> None:
        with self._changed:
            if self._attempts.sent(header) and event is not None:
                self._emit(event)
            self._settle(header.transfer_id, header.epoch)

    def _settle(self, transfer_id: TransferId, epoch: int) -> None:
        if self._attempts.settle(transfer_id, epoch, time.monotonic()):
            self._emit(TransferQuiet(transfer_id=transfer_id, epoch=epoch))
        self._changed.notify_all()

    def _emit(self, event: AgentEvent) -> None:
        self.events.put(event)
        if self.events.qsize() > MAX_EVENTS:
            os._exit(3)  # the worker has stopped reading: it is better off with a new agent than with a full one
