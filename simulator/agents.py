"""Virtual transfer agents: they move the bytes of blocks between pools, late, torn, corrupted or not at all.

They keep what real agents promise, and nothing more: a source's blocks are read at some time before FrameAcked; a
target's blocks are written at some time before FrameLanded, and only between ExpectFrames and TransferQuiet; what
landed has been checked. Whoever frees, reuses or reads a block earlier than that meets other bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import xxhash

from engine.blocks import BlockLedger, BlockState
from engine.fake_runner import FakeRunner
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
from tandem.request import TransferId

ANSWER_MS = 500
WRITE_SLOW = 4  # a write may take so much longer than a message

_Attempt = tuple[str, int]


@dataclass(slots=True, kw_only=True)
class AgentFaults:
    """How bad the data path is. Rates are in a thousand frames."""

    loss: int = 0
    corruption: int = 0
    delay_max_ms: int = 5
    num_lost: int = 0  # that happened so far
    num_corrupted: int = 0


@dataclass(slots=True)
class _Expected:
    """What may be written for one attempt, and how much of that is under way."""

    command: ExpectFrames
    num_writing: int = 0
    ended: bool = False


@dataclass(slots=True)
class _Sending:
    """The frames of one attempt that still read the source's blocks."""

    reading: dict[int, int] = field(default_factory=dict)  # frame sequence -> number of its try
    ended: bool = False


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
        self._expected: dict[_Attempt, _Expected] = {}
        self._sending: dict[_Attempt, _Sending] = {}
        self._num_tries = 0
        self.alive = True

    def kill(self) -> None:
        """The process is gone: nothing is under way any more."""
        self.alive = False

    def bury(self) -> None:
        """The dead process is reaped: all that it knew is failed, and quiet."""
        for transfer_id, epoch in sorted({*self._expected, *self._sending}):
            name = {"transfer_id": TransferId(transfer_id), "epoch": epoch}
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
            case ExpectFrames():
                self._expected[command.transfer_id, command.epoch] = _Expected(command)
            case SendFrame(header=header, endpoint=endpoint):
                self._send(header, endpoint)
            case EndTransfer():
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

    def _send(self, header: FrameHeader, endpoint: str) -> None:
        attempt = (header.transfer_id, header.epoch)
        sending = self._sending.setdefault(attempt, _Sending())
        if sending.ended:
            return
        self._num_tries += 1
        number = self._num_tries
        sending.reading[header.sequence] = number
        self._later(lambda: self._read(header, endpoint, number))
        # No answer at all, since the other agent died: the frame failed.
        self._schedule.after(ANSWER_MS, lambda: self._outcome(header, number, None, "no answer in time"))

    def _read(self, header: FrameHeader, endpoint: str, number: int) -> None:
        """Only now are the source's blocks read: what was put there meanwhile is what travels."""
        sending = self._sending.get((header.transfer_id, header.epoch))
        if sending is None or sending.reading.get(header.sequence) != number:
            return
        for block in header.source_blocks:
            if self._ledger.state(block) is not BlockState.EXPORTED:
                raise Violation(f"{header.transfer_id} reads block {block} of {self.name}, which is not pinned")
        payload = b"".join(self._runner.read_block(block) for block in header.source_blocks)
        checksum = xxhash.xxh3_64_intdigest(payload)
        if self._choices.chance(self._faults.loss):
            self._faults.num_lost += 1
            self._later(lambda: self._outcome(header, number, None, "lost on the way"), slow=20)
            return
        if self._choices.chance(self._faults.corruption):
            self._faults.num_corrupted += 1
            payload = bytes([payload[0] ^ 1]) + payload[1:]
        self._later(lambda: self._hand_over(header, endpoint, number, payload, checksum))

    def _hand_over(self, header: FrameHeader, endpoint: str, number: int, payload: bytes, checksum: int) -> None:
        peer = self._find(endpoint)
        if not self.alive:
            return
        if peer is None:
            self._outcome(header, number, None, "the peer's agent is gone")
            return
        if self._parts(self.name, peer.name):
            return  # it gets no answer in time
        theirs = peer.name

        def answer(landed: int | None, reason: str) -> None:
            if not self._parts(theirs, self.name):
                self._later(lambda: self._outcome(header, number, landed, reason))

        peer._receive(header, payload, checksum, answer)

    def _outcome(self, header: FrameHeader, number: int, checksum: int | None, reason: str) -> None:
        """The target's agent has the frame, or has not."""
        attempt = (header.transfer_id, header.epoch)
        sending = self._sending.get(attempt)
        if not self.alive or sending is None or sending.reading.get(header.sequence) != number:
            return
        del sending.reading[header.sequence]
        name = {"transfer_id": header.transfer_id, "epoch": header.epoch, "sequence": header.sequence}
        if checksum is None:
            self._tell(FrameFailed(**name, reason=reason))  # type: ignore[arg-type]
        else:
            self._tell(FrameAcked(**name, checksum=checksum))  # type: ignore[arg-type]
        self._quiet_if(attempt)

    # ---- the target's end ------------------------------------------------------------------------------------------

    def _receive(
        self, header: FrameHeader, payload: bytes, checksum: int, answer: Callable[[int | None, str], None]
    ) -> None:
        expected = self._expected.get((header.transfer_id, header.epoch))
        if not self.alive:
            return
        if expected is None or not self._expects(expected, header):
            answer(None, "the target expects no such frame")
            return
        self._may_write(header)
        expected.num_writing += 1
        size = len(payload) // len(header.target_blocks)
        pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
        # Torn: some blocks are there long before the others.
        for block, piece in list(zip(header.target_blocks, pieces, strict=True))[:-1]:
            self._runner.write_block(block, piece)

        def finish() -> None:
            if not self.alive:
                return
            self._may_write(header)
            self._runner.write_block(header.target_blocks[-1], pieces[-1])
            expected.num_writing -= 1
            whole = self._is_whole(payload, checksum)
            if whole and not expected.ended:
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
                answer(None, "the checksum differs" if not whole else "the target ended the transfer")
            self._quiet_if((header.transfer_id, header.epoch))

        self._later(finish, slow=WRITE_SLOW)

    def _expects(self, expected: _Expected, header: FrameHeader) -> bool:
        """Whether the frame is of an attempt that goes on, and only writes what was granted to it."""
        return not expected.ended and _allowed(expected.command, header)

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
        attempt = (command.transfer_id, command.epoch)
        self._sending.setdefault(attempt, _Sending()).ended = True
        self._expected.setdefault(attempt, _Expected(_nothing(command))).ended = True
        # Reads that have not begun, and answers that are not here yet, are given up after a while.
        self._later(lambda: self._give_up(attempt), slow=10)
        self._quiet_if(attempt)

    def _give_up(self, attempt: _Attempt) -> None:
        if attempt in self._sending:
            self._sending[attempt].reading.clear()
            self._quiet_if(attempt)

    def _quiet_if(self, attempt: _Attempt) -> None:
        sending, expected = self._sending.get(attempt), self._expected.get(attempt)
        if sending is None or expected is None or not (sending.ended and expected.ended):
            return
        if not sending.reading and not expected.num_writing:
            del self._sending[attempt], self._expected[attempt]
            self._tell(TransferQuiet(transfer_id=expected.command.transfer_id, epoch=attempt[1]))

    def _later(self, do: Callable[[], None], slow: int = 1) -> None:
        delay_ms = slow * self._choices.between(0, self._faults.delay_max_ms)
        self._schedule.after(delay_ms, lambda: do() if self.alive else None)


def _allowed(expect: ExpectFrames, header: FrameHeader) -> bool:
    granted = set(zip(expect.blocks, expect.generations, strict=True))
    wanted = set(zip(header.target_blocks, header.target_generations, strict=True))
    incarnations = (expect.source_incarnation, expect.target_incarnation)
    return wanted <= granted and incarnations == (header.source_incarnation, header.target_incarnation)


def _nothing(command: EndTransfer) -> ExpectFrames:
    return ExpectFrames(
        transfer_id=command.transfer_id,
        epoch=command.epoch,
        source_incarnation=0,
        target_incarnation=0,
        blocks=(),
        generations=(),
        endpoint="",
    )
