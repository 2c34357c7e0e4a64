"""What router and workers say to one another, as plain data; tandem/wire.py turns it into protobuf and back.

Times are relative milliseconds from receipt. Each message about a request carries the epoch of its owner record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from tandem.request import RequestId, Sampling, Token, TransferId, WorkerId


class Role(StrEnum):
    """What a worker is used for."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class AssignMode(StrEnum):
    """What one worker is to do with one request."""

    PREFILL = "prefill"  # prefill, stream the first token, hand over to the peer
    DECODE = "decode"  # expect a handoff from the peer, then decode
    LOCAL = "local"  # prefill and decode here, no transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAddress:
    """Where a worker incarnation is reached. `endpoint` is its agent's, opaque to all but agents."""

    worker_id: WorkerId
    incarnation: int
    control: str  # host:port of the gRPC services Worker and Transfer
    endpoint: str


# ---- router to worker --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """Take part in a request. `tokens` is the prompt and what was already delivered of the answer."""

    request_id: RequestId
    epoch: int
    mode: AssignMode
    tokens: tuple[int, ...]
    num_prompt_tokens: int
    sampling: Sampling
    transfer_id: TransferId  # empty with LOCAL
    peer: WorkerAddress | None  # None with LOCAL
    deadline_ms: int  # until the handoff or migration is committed
    move: bool = False  # DECODE: the peer decodes it already, and goes on until it is fenced
    cache_salt: bytes = b""  # of its block hashes: empty, or 16 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAssigned:
    """This epoch of the request, and all before it, are over: stop, free, send no more tokens."""

    request_id: RequestId
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrate:
    """Move this running request to the peer, which expects it with its first `num_tokens` tokens; run it until then."""

    request_id: RequestId
    epoch: int
    transfer_id: TransferId
    peer: WorkerAddress
    num_tokens: int  # prompt and answer tokens that the peer has been told
    deadline_ms: int  # until the migration is committed
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMove:
    """The migration is over and cannot be committed any more: go on with the request here."""

    request_id: RequestId
    epoch: int
    transfer_id: TransferId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerIs:
    """What the owner record says. Answers CommitAsk (target) and OwnerQuery (source); told unasked to the source.

    `worker_id` None: the request is over. `refused` says why a CommitAsk was refused; empty when it was accepted.
    `over`: no commit of this transfer can succeed any more; unless the record names its target, it has failed.
    """

    request_id: RequestId
    transfer_id: TransferId
    epoch: int
    worker_id: WorkerId | None
    incarnation: int
    refused: str = ""
    over: bool = False


RouterMessage = Assign | CancelAssigned | Migrate | StopMove | OwnerIs


# ---- worker to router --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed:
    """The worker gives this epoch of the request up. `retryable`: another placement may succeed."""

    request_id: RequestId
    epoch: int
    transfer_id: TransferId = field(default=TransferId(""))  # of the attempt to bring it here; empty: it ran here
    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitAsk:
    """The target has all blocks, checked: make it the owner. The one commit point of a handoff or migration.

    `tokens` are those the source produced, in case the router has not seen them yet; `next_index` is the index that
    the target will produce first.
    """

    request_id: RequestId
    transfer_id: TransferId
    from_epoch: int
    next_index: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerQuery:
    """The source asks the owner record, since it may not guess how a commit ended.

    `revoke`: a migration that is not committed yet shall be over, so that the source may run the request again.
    """

    request_id: RequestId
    transfer_id: TransferId
    epoch: int
    revoke: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveFailed:
    """The source gives a migration up. The request is unharmed and runs on where it was."""

    request_id: RequestId
    transfer_id: TransferId
    epoch: int
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStats:
    """What a transfer did, told by its target (at the commit, after its first step) and by its source (its times)."""

    request_id: RequestId
    transfer_id: TransferId
    blocks_granted: int = 0
    blocks_moved: int = 0
    blocks_reused: int = 0
    bytes: int = 0
    frames: int = 0
    tokens_recomputed: int = 0  # prompt or delivered tokens that the target had to run itself
    first_frame_ms: int = 0  # source: since the assignment
    last_chunk_start_ms: int = 0  # source: since the assignment
    committed_ms: int = 0  # target: since the assignment
    tokens_cached: int = 0  # source: found in its prefix cache
    first_step_ms: float = 0.0  # target: how long the first step with the request took
    rounds: int = 0  # source of a migration: of copying while the request ran
    precopy_ms: int = 0  # source of a migration: from the grant to the fence
    fence_ms: int = 0  # source of a migration: from the fence to the word that the target owns the request
    first: FirstTokenTimes | None = None  # with the first token of an attempt, from who read the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokenTimes:
    """What went on at the worker that read a prompt, until its first token left. `heard_s`, its own clock: no message.

    `hold_ms` is all that the worker had of it: waiting, prefill, and what its threads needed to hear and to answer.
    """

    queue_ms: float  # from the assignment until its first step began
    prefill_ms: float  # from there until the first token was drawn; steps of others in between included
    heard_s: float = 0.0  # when the assignment was read off the stream
    hold_ms: float = 0.0  # from then until the first token was written to the stream


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEvents:
    """Which prefix hashes a worker now holds or has dropped; `sequence` counts reports, so a gap is seen."""

    sequence: int
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    cleared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCounts:
    """Blocks by state; the six always sum to `total`."""

    total: int
    free: int
    cached: int = 0
    owned: int = 0
    exported: int = 0
    granted: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapCounts:
    """Blocks of host memory that KV is swapped out to, requests there, and what became of requests that lost blocks."""

    total: int = 0
    used: int = 0
    requests: int = 0
    swapped_out: int = 0  # since the worker began
    brought_back: int = 0
    recomputed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """What a worker has to do, and what it has done since it began: canaries are no tokens."""

    running: int
    waiting: int
    blocks: BlockCounts
    prefill_backlog_tokens: int
    steps: int
    last_step_ms: float
    audit: tuple[str, ...] = ()
    swap: SwapCounts = field(default_factory=SwapCounts)
    tokens_read: int = 0  # of prompts, and of what was begun elsewhere: run without a draw
    tokens_written: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """Everything a worker tells one router after one step (or when something happened between steps)."""

    worker_id: WorkerId
    incarnation: int
    sequence: int
    tokens: tuple[Token, ...] = ()
    failed: tuple[RequestFailed, ...] = ()
    commit_asks: tuple[CommitAsk, ...] = ()
    owner_queries: tuple[OwnerQuery, ...] = ()
    moves_failed: tuple[MoveFailed, ...] = ()
    transfers: tuple[TransferStats, ...] = ()
    blocks: BlockEvents | None = None
    load: WorkerLoad | None = None


# ---- worker to registry ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """What a worker says of itself when it registers."""

    worker_id: WorkerId
    role: Role
    control: str
    endpoint: str
    pid: int
    agent_pid: int
    model: str
    namespace: str
    fingerprint: str
    exact: bool
    dtype: str
    block_size: int
    total_blocks: int
    context_tokens: int
    block_bytes: int
    labels: tuple[tuple[str, str], ...] = field(default=())
