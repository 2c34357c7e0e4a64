"""What the ends of handoffs and migrations share: the attempt, its settings, its actions, the digest, and tables.

A handoff moves a request that was prefilled, a migration one that runs. The tables are in handoff_source.py,
migration_source.py and, for both, handoff_target.py. The only commit point is the owner record at the router: the
target asks for it (AskCommit), the source may only ask about it (AskOwner), and nobody frees, resumes or activates on
a guess. States, messages and failure edges follow Llumnix's live migration (OSDI'24, 4.2)
with its lost-reply hole closed by that record.

A machine is handed events of `TransferMessage.body` and `AgentEvent` whose attempt has been checked (`is_current`).
An event from outside that the table has no row for is late or doubled: it has no effect and is counted. An event from
inside (from this worker's own core) without a row is a bug.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

import xxhash

from kv_transfer.messages import AgentEvent, Body, Header, Offer
from tandem.messages import WorkerAddress
from tandem.request import RequestId, Token, TransferId, WorkerId

STORY_ROWS_MAX = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffConfig:
    """Times and bounds of a handoff or migration. Times are milliseconds."""

    lease_ms: int = 30_000  # how long a target keeps a reservation without a sign of life
    renew_ms: int = 5_000  # how often a source gives one
    resend_ms: int = 1_000  # Offer, CommitRequest, CommitAsk and OwnerQuery go again after this
    offer_limit_ms: int = 10_000  # without a Grant for so long, the attempt fails
    quiet_limit_ms: int = 10_000  # a committed target whose agent is not quiet for so long gives the request up
    quarantine_warn_ms: int = 30_000  # after this a quarantine shows in the worker's audit
    credits: int = 4  # frames in flight that a target grants
    max_frame_bytes: int = 4 << 20
    resends_max: int = 2  # per frame
    move_margin_tokens: int = 64  # that a request may grow by while it is migrated
    rounds_max: int = 4  # of copying while the request runs
    fence_blocks: int = 0  # full blocks that may be left when a request is fenced, beside the one that fills
    fence_limit_ms: int = 500  # a request stands still for so long, then it resumes, or its commit is revoked
    fence_resend_ms: int = 100  # CommitRequest goes again after this while a request stands still

    def __post_init__(self) -> None:
        for name in self.__slots__:
            lowest = 0 if name in ("resends_max", "fence_blocks") else 1
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {lowest}")
        if self.renew_ms * 2 > self.lease_ms:
            raise ValueError(f"renew_ms is {self.renew_ms}, must be at most half of lease_ms, {self.lease_ms}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt to move one request, as one of its ends sees it. Any other epoch or incarnation is stale."""

    transfer_id: TransferId
    request_id: RequestId
    epoch: int  # of the owner record while the source has the request
    me: WorkerId
    peer: WorkerAddress
    source_incarnation: int
    target_incarnation: int

    def header(self) -> Header:
        """The header of what this end says."""
        return Header(
            transfer_id=self.transfer_id,
            request_id=self.request_id,
            epoch=self.epoch,
            sender=self.me,
            source_incarnation=self.source_incarnation,
            target_incarnation=self.target_incarnation,
        )

    def is_current(self, header: Header) -> bool:
        """Whether the peer of this very attempt speaks."""
        return (
            header.transfer_id == self.transfer_id
            and header.request_id == self.request_id
            and header.epoch == self.epoch
            and header.sender == self.peer.worker_id
            and header.source_incarnation == self.source_incarnation
            and header.target_incarnation == self.target_incarnation
        )

    def is_own(self, event: AgentEvent) -> bool:
        """Whether the agent speaks of this very attempt."""
        return event.transfer_id == self.transfer_id and event.epoch == self.epoch


# ---- what a machine asks of its role core ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Say:
    """Send this to the peer."""

    body: Body


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFrame:
    """Pin blocks [first, first + len(target_blocks)) of the request's block table and have the agent send them."""

    sequence: int
    priority: int = 0  # as in SendFrame
    first: int
    target_blocks: tuple[int, ...]
    target_generations: tuple[int, ...]
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndExport:
    """The agent reads this frame no more; `sequence` None: nor any other of the attempt."""

    sequence: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """Have the agent end the attempt; it answers TransferQuiet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskOwner:
    """Ask the owner record how the commit ended. `revoke`: if it has not happened, it shall never happen."""

    revoke: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Let the request stand still at the next step boundary; answer the machine with Fenced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Let the request run again; it knows no more of this attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Tell the router that the migration has failed. The request runs on here."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver:
    """The target owns the request: release it here, its blocks stay as prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """The owner record says that the request is not ours any more, nor the target's: release it without a word."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The attempt failed; the request is this end's to report on."""

    code: str
    reason: str
    retryable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Nothing of the attempt is held any more: forget it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """See whether there is room for this; answer the machine with Reserved, Postponed or Declined."""

    offer: Offer


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """Let the agent at `endpoint` write these blocks, generation for generation."""

    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AskCommit:
    """Everything is here and checked: ask the owner record for the request."""

    next_index: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptBlocks:
    """The request is this worker's under `epoch`: take its blocks over and run it."""

    epoch: int
    tokens: tuple[Token, ...]  # beyond those that the router told this worker
    num_computed: int  # tokens whose KV is in the blocks
    num_frames: int
    num_blocks: int  # that the frames wrote
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """Nobody may use the granted blocks; what was pinned of the prefix cache is released."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndQuarantine:
    """Nobody writes the blocks in quarantine any more.

    `whole`: of each that landed and is a full block of the offered prefix, its place in the block table and its id.
    """

    whole: tuple[tuple[int, int], ...] = ()


SourceAction = Say | ExportFrame | EndExport | Silence | AskOwner | HandedOver | Over | Failed | Closed
MigrationAction = (
    Say | ExportFrame | EndExport | Silence | AskOwner | Hold | Resume | HandedOver | Over | GiveUp | Closed
)
TargetAction = (
    Say | Reserve | Expect | Silence | AskCommit | AcceptBlocks | Quarantine | EndQuarantine | Failed | Closed
)


# ---- events from inside ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The request is over here: cancelled by the router, finished, failed, or its session gone.

    `spoiled`: it has failed, and what it read or wrote may be why.
    """

    reason: str
    spoiled: bool = False


# ---- digest, story, tables ---------------------------------------------------------------------------------------


def frame_digest(checksums: Mapping[int, int]) -> bytes:
    """The digest of all frames: xxh3-128 over (sequence, xxh3-64 checksum), little-endian, in sequence order."""
    digest = xxhash.xxh3_128()
    for sequence in sorted(checksums):
        digest.update(struct.pack("<QQ", sequence, checksums[sequence]))
    return digest.digest()


class Story:
    """The newest things that happened to one attempt, for errors and for people who ask why."""

    def __init__(self) -> None:
        self._rows: deque[str] = deque(maxlen=STORY_ROWS_MAX)

    def tell(self, now_ms: int, text: str) -> None:
        """Adds a row."""
        self._rows.append(f"{now_ms} {text}")

    def __str__(self) -> str:
        return " | ".join(self._rows)


S = TypeVar("S", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Row(Generic[S]):
    """What an event does in a state. `step(machine, now_ms, event)` returns the actions and sets the next state.

    `to` lists the states that it may lead to; the machine holds it to that, so that a printed table cannot lie.
    """

    step: Callable[[Any, int, Any], list[Any]]  # each row's function knows its own machine and event
    to: tuple[S, ...]


Table = Mapping[tuple[S, type], Row[S]]


def mermaid(table: Table[S], initial: S) -> str:
    """The table as a Mermaid state diagram."""
    edges: dict[tuple[S, S], list[str]] = {}
    for (state, event), row in table.items():
        for following in row.to:
            edges.setdefault((state, following), []).append(event.__name__)
    lines = ["stateDiagram-v2", f"    [*] --> {initial.name}"]
    lines += [f"    {a.name} --> {b.name}: {', '.join(dict.fromkeys(names))}" for (a, b), names in edges.items()]
    return "\n".join(lines)


class Machine(Generic[S]):
    """One end of one attempt: a state, a table, a story. Subclasses bring what the rows do.

    `inside` are the events of this worker's own core, for which a missing row is a bug.
    """

    def __init__(
        self,
        *,
        attempt: Attempt,
        config: HandoffConfig,
        deadline_ms: int,
        state: S,
        table: Table[S],
        inside: frozenset[type],
    ) -> None:
        self._table = table
        self._inside = inside
        self.attempt = attempt
        self.config = config
        self.deadline_ms = deadline_ms
        self.state = state
        self.story = Story()
        self.num_ignored = 0

    def handle(self, now_ms: int, event: object) -> list[Any]:
        """Takes one event in; returns what is to be done, in order."""
        kind = type(event)
        row = self._table.get((self.state, kind))
        if row is None:
            assert kind not in self._inside, (
                f"{kind.__name__} in {self.state}: {self.attempt.transfer_id}: {self.story}"
            )
            self.num_ignored += 1
            return []
        before = self.state
        actions = row.step(self, now_ms, event)
        assert self.state in row.to, f"{kind.__name__} led from {before} to {self.state}: {self.story}"
        if self.state is not before:
            self.story.tell(now_ms, f"{kind.__name__}: {before} -> {self.state}")
        return actions
