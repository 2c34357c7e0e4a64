"""Virtual transfer agents: they move the bytes of blocks between pools, late, torn, corrupted or not at all.

They keep what real agents promise, and nothing more: a source's blocks are read at some time before FrameAcked; a
target's blocks are written at some time before FrameLanded, and only between ExpectFrames and TransferQuiet; what
landed has been checked. Whoever frees, reuses or reads a block earlier than that meets other bytes. Which frames may
land, and when an attempt is quiet, is decided by what decides it in a real agent (kv_transfer/agent_attempts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from engine.blocks import BlockLedger, BlockState
from engine.fake_runner import FakeRunner
from kv_transfer.agent_attempts import AttemptKey, Attempts, Verdict
from kv_transfer.messages import (
    AgentCommand,
    AgentEvent,
    EndTransfer,
    ExpectFrames,
    FrameAcked,
    FrameFailed,
    FrameHeader,
    FrameLanded,
    SendFrame,
    TransferQuiet,
)
from simulator.checks import Violation
from simulator.choices import Choices
from simulator.network import Schedule

ANSWER_MS = 500
GRANT_WAIT_MS = 200  # how long a frame waits to become expected
WAIT_MS = 20  # until a frame that waits is looked at again
WRITE_SLOW = 4  # a write may take so much longer than a message

_Answer = Callable[[int | None, str], None]


@dataclass(slots=True, kw_only=True)
class AgentFaults:
    """How bad the data path is. Rates are in a thousand frames."""

    loss: int = 0
    corruption: int = 0
    delay_max_ms: int = 5
    num_lost: int = 0  # that happened so far
    num_corrupted: int = 0


@dataclass(frozen=True, slots=True)
class _Try:
    """A frame that reads the source's blocks, from its announcement to its answer."""

    header: FrameHeader
    number: int


class VirtualAgent:
    """The agent of one worker incarnation. `tell` hands an event to its worker; `find` knows the agents by endpoint.

    `parts(name, other)` says whether the network lets nothing pass from the one worker to the other now.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        choices: Choices,
        faults: AgentFaults,
        name: str,
        endpoint: str,
        runner: FakeRunner,
        ledger: BlockLedger,
        tell: Callable[[AgentEvent], None],
        find: Callable[[str], VirtualAgent | None],
        parts: Callable[[str, str], bool],
    ) -> None:
        self.name = name
        self.endpoint = endpoint
        self._schedule = schedule
        self._choices = choices
        self._faults = faults
        self._runner = runner
        self._ledger = ledger
        self._tell = tell
        self._find = find
        self._parts = parts
        self._attempts = Attempts()
        self._known: set[AttemptKey] = set()  # that commands have named and that are not quiet
        self._reading: dict[tuple[AttemptKey, int], _Try] = {}  # by frame sequence
        self._num_tries = 0
        self.alive = True

    def kill(self) -> None:
        """The process is gone: nothing is under way any more."""
        self.alive = False

    def bury(self) -> None:
        """The dead process is reaped: all that it knew is failed, and quiet."""
        for transfer_id, epoch in sorted(self._known):
            name = {"transfer_id": transfer_id, "epoch": epoch}
            self._tell(FrameFailed(**name, sequence=None, reason="the transfer agent died"))  # type: ignore[arg-type]
            self._tell(TransferQuiet(**name))  # type: ignore[arg-type]

    def handle(self, command: AgentCommand, *, endpoint: str) -> None:
        """What its worker wants of the agent at `endpoint`. When that is dead the command is answered all the same,
        and never reaches the next agent, as in kv_transfer/agent_client.py.
        """
        if not self.alive or endpoint != self.endpoint:
            self._answer_for_nobody(command)
            return
        match command:
            case ExpectFrames(transfer_id=transfer_id, epoch=epoch):
                self._known.add((transfer_id, epoch))
                reason = self._attempts.expect(command, source_agent=_number(command.endpoint))
                if reason is not None:
                    self._tell(FrameFailed(transfer_id=transfer_id, epoch=epoch, sequence=None, reason=reason))
            case SendFrame(header=header, endpoint=endpoint):
                self._known.add((header.transfer_id, header.epoch))
                self._later(lambda: self._read(header, endpoint))
            case EndTransfer():
                self._known.add((command.transfer_id, command.epoch))
                self._end(command)

    def _answer_for_nobody(self, command: AgentCommand) -> None:
        if isinstance(command, SendFrame):
            name = {"transfer_id": command.header.transfer_id, "epoch": command.header.epoch}
            sequence: int | None = command.header.sequence
        else:
            name, sequence = {"transfer_id": command.transfer_id, "epoch": command.epoch}, None
        if isinstance(command, EndTransfer):
            self._tell(TransferQuiet(**name))  # type: ignore[arg-type]
        else:
            self._tell(FrameFailed(**name, sequence=sequence, reason="no transfer agent runs"))  # type: ignore[arg-type]

    # ---- the source's end ------------------------------------------------------------------------------------------

    def _read(self, header: FrameHeader, endpoint: str) -> None:
        """Only now are the source's blocks read: what was put there meanwhile is what travels."""
        if not self._attempts.send(header):
            return
        self._num_tries += 1
        this = self._reading[_key(header), header.sequence] = _Try(header, self._num_tries)
        # No answer at all, since the other agent died: the frame failed.
        self._schedule.after(ANSWER_MS, lambda: self._outcome(this, None, "no answer in time"))
        for block in header.source_blocks:
            if self._ledger.state(block) is not BlockState.EXPORTED:
                raise Violation(f"{header.transfer_id} reads block {block} of {self.name}, which is not pinned")
        payload = b"".join(self._runner.read_block(block) for block in header.source_blocks)
        checksum = xxhash.xxh3_64_intdigest(payload)
        if self._choices.chance(self._faults.loss):
            self._faults.num_lost += 1
            self._later(lambda: self._outcome(this, None, "lost on the way"), slow=20)
            return
        if self._choices.chance(self._faults.corruption):
            self._faults.num_corrupted += 1
            payload = bytes([payload[0] ^ 1]) + payload[1:]
        self._later(lambda: self._hand_over(this, endpoint, payload, checksum))

    def _hand_over(self, this: _Try, endpoint: str, payload: bytes, checksum: int) -> None:
        peer = self._find(endpoint)
        if not self.alive:
            return
        if peer is None:
            self._outcome(this, None, "the peer's agent is gone")
            return
        if self._parts(self.name, peer.name):
            return  # it gets no answer in time
        theirs = peer.name

        def answer(landed: int | None, reason: str) -> None:
            if not self._parts(theirs, self.name):
                self._later(lambda: self._outcome(this, landed, reason))

        peer._receive(this.header, payload, checksum, _number(self.endpoint), answer)

    def _outcome(self, this: _Try, checksum: int | None, reason: str) -> None:
        """The target's agent has the frame, or has not."""
        header = this.header
        place = _key(header), header.sequence
        if not self.alive or self._reading.get(place) != this:
            return
        del self._reading[place]
        name = {"transfer_id": header.transfer_id, "epoch": header.epoch, "sequence": header.sequence}
        if not self._attempts.sent(header):
            pass  # the attempt ended meanwhile
        elif checksum is None:
            self._tell(FrameFailed(**name, reason=reason))  # type: ignore[arg-type]
        else:
            self._tell(FrameAcked(**name, checksum=checksum))  # type: ignore[arg-type]
        self._settle(header)

    # ---- the target's end ------------------------------------------------------------------------------------------

    def _receive(
        self, header: FrameHeader, payload: bytes, checksum: int, source_agent: int, answer: _Answer, waited_ms: int = 0
    ) -> None:
        """A frame is announced: it lands, is refused, or waits for what it needs, as in kv_transfer/agent_context.py.

        Only then are its blocks written, torn: some are there long before the others.
        """
        if not self.alive:
            return
        found = self._attempts.take(header, checksum, source_agent=source_agent)
        limit_ms = {Verdict.UNKNOWN: GRANT_WAIT_MS, Verdict.BUSY: ANSWER_MS}.get(found.verdict, 0)
        if found.verdict is Verdict.AGAIN:
            answer(checksum, "")
        elif waited_ms < limit_ms:
            self._schedule.after(
                WAIT_MS,
                lambda: self._receive(header, payload, checksum, source_agent, answer, waited_ms + WAIT_MS),
            )
        elif found.verdict is not Verdict.TAKE:
            answer(None, found.reason)
        else:
            self._write(header, payload, checksum, answer)

    def _write(self, header: FrameHeader, payload: bytes, checksum: int, answer: _Answer) -> None:
        self._may_write(header)
        size = len(payload) // len(header.target_blocks)
        pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
        for block, piece in list(zip(header.target_blocks, pieces, strict=True))[:-1]:
            self._runner.write_block(block, piece)

        def finish() -> None:
            self._may_write(header)
            self._runner.write_block(header.target_blocks[-1], pieces[-1])
            if not self._is_whole(payload, checksum):
                self._attempts.dropped(header)
                answer(None, "the checksum differs")
            elif self._attempts.landed(header, checksum):
                landed = FrameLanded(
                    transfer_id=header.transfer_id,
                    epoch=header.epoch,
                    sequence=header.sequence,
                    target_blocks=header.target_blocks,
                    num_bytes=len(payload),
                    checksum=checksum,
                )
                self._tell(landed)
                answer(checksum, "")
            else:
                answer(None, "the target ended the transfer")
            self._settle(header)

        self._later(finish, slow=WRITE_SLOW)

    def _may_write(self, header: FrameHeader) -> None:
        for block, generation in zip(header.target_blocks, header.target_generations, strict=True):
            state = self._ledger.state(block)
            granted = state in (BlockState.GRANTED, BlockState.QUARANTINED)
            if not granted or self._ledger.generation(block) != generation:
                raise Violation(f"{header.transfer_id} writes block {block} of {self.name}, which is {state.value}")

    def _is_whole(self, payload: bytes, checksum: int) -> bool:
        return xxhash.xxh3_64_intdigest(payload) == checksum

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _end(self, command: EndTransfer) -> None:
        key = (command.transfer_id, command.epoch)
        if self._attempts.end(*key, self._schedule.now_ms / 1000):
            self._quiet(key)
        else:
            # Answers that are not here yet are given up after a while.
            self._later(lambda: self._give_up(key), slow=10)

    def _give_up(self, key: AttemptKey) -> None:
        for this in [each for (attempt, _), each in self._reading.items() if attempt == key]:
            self._outcome(this, None, "given up")

    def _settle(self, header: FrameHeader) -> None:
        if self._attempts.settle(header.transfer_id, header.epoch, self._schedule.now_ms / 1000):
            self._quiet(_key(header))

    def _quiet(self, key: AttemptKey) -> None:
        self._known.discard(key)
        self._tell(TransferQuiet(transfer_id=key[0], epoch=key[1]))

    def _later(self, do: Callable[[], None], slow: int = 1) -> None:
        delay_ms = slow * self._choices.between(0, self._faults.delay_max_ms)
        self._schedule.after(delay_ms, lambda: do() if self.alive else None)


def _key(header: FrameHeader) -> AttemptKey:
    return header.transfer_id, header.epoch


def _number(endpoint: str) -> int:
    """What stands for the agent's own incarnation, which is a part of a real endpoint."""
    return xxhash.xxh3_64_intdigest(endpoint.encode())
