"""What happens to the router's core, and what it wants done: events in, actions out, both plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.move import MoveReason, MoveRecord
from tandem.errors import TandemError
from tandem.messages import (
    AssignMode,
    CommitAsk,
    MoveFailed,
    OwnerQuery,
    RequestFailed,
    Role,
    RouterMessage,
    WorkerInfo,
    WorkerReport,
)
from tandem.request import FinishReason, Pair, RequestId, Sampling, Slo, Token, WorkerId

# ---- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """A request that passed the edge's validation. `tokens` is the prompt; `deadline_ms` counts from now.

    `deadline_ms` 0: the router's own bound. `priority`: 0 to PRIORITY_MAX, the highest first. `model` is for status
    only. `owner` is the name of the API key that asked, empty when none is needed: nobody else hears of the request.
    `cache_salt`, empty or 16 bytes: prefixes are shared only among requests of the same. `canary`: the cluster asks
    itself; it goes to this pair at once, or fails, and status does not show it.
    """

    request_id: RequestId
    tokens: tuple[int, ...]
    sampling: Sampling
    deadline_ms: int = 0
    priority: int = 0
    model: str = ""
    owner: str = ""
    cache_salt: bytes = b""
    slo: Slo | None = None
    canary: Pair | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A client wants this request served.

    `first_epoch`: its epochs count from there; 0: from where those of all requests before it ended. `taken_over`:
    another router had it, and delivered `answer`; it goes on from there. It was admitted then, and is not refused for
    want of capacity now.
    """

    request: NewRequest
    answer: tuple[Token, ...] = ()
    first_epoch: int = 0
    taken_over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportArrived:
    """A worker said something on its stream."""

    report: WorkerReport


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    """A worker incarnation registered; it gets work once its link is up."""

    info: WorkerInfo
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDraining:
    """The worker gets nothing new, nor any request moved to it; `draining` False: it gets work again."""

    worker_id: WorkerId
    incarnation: int
    draining: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFlipped:
    """The worker has this role from now on. What it was given before goes on."""

    worker_id: WorkerId
    incarnation: int
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRequested:
    """An operator or the rebalancer wants a running request moved. Answered by MoveRefused or, in time, MoveEnded.

    `to` None: the router chooses. `ticket` names the answer; it is the asker's.
    """

    request_id: RequestId
    to: WorkerId | None
    reason: MoveReason
    why: str
    ticket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSuspected:
    """The worker misses heartbeats or stands still (or, `suspected` False, is well again): it gets nothing new."""

    worker_id: WorkerId
    incarnation: int
    suspected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """The worker incarnation is dead, or taken for dead for good."""

    worker_id: WorkerId
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUp:
    """The router's stream to the worker incarnation stands."""

    worker_id: WorkerId
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLost:
    """The router's stream to the worker incarnation broke: the worker cancels all that it was assigned on it."""

    worker_id: WorkerId
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientGone:
    """Nobody waits for the request any more."""

    request_id: RequestId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LetGo:
    """The request ends here with this error, and may go on elsewhere: another router has it, or this one ends."""

    request_id: RequestId
    error: TandemError


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceRaised:
    """The request goes on here under later epochs: those of before may be below what workers have heard since."""

    request_id: RequestId
    first_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """The answer ends at token `index` (kept, 0-based) by a stop string that the edge found."""

    request_id: RequestId
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed: deadlines, waits and retries are due."""


Event = (
    Submitted
    | ReportArrived
    | WorkerJoined
    | WorkerDraining
    | WorkerFlipped
    | WorkerSuspected
    | WorkerLost
    | LinkUp
    | LinkLost
    | ClientGone
    | LetGo
    | FenceRaised
    | StopRequested
    | MoveRequested
    | Tick
)

# ---- from inside: what the core tells one of its own requests ----------------------------------------------------


class Cause(StrEnum):
    """Why an attempt is lost, as it is counted."""

    WORKER_GONE = "worker_gone"  # a worker that had a part in it is out of reach
    HANDOFF_FAILED = "handoff_failed"
    REPORTED = "reported"  # by a worker, of something else that another one may do better
    OVERDUE = "overdue"  # nothing was heard in time
    BROKEN_WORD = "broken_word"  # a worker said what cannot be
    FENCE = "fence"  # it goes on under a later fence


@dataclass(frozen=True, slots=True)
class AttemptLost:
    """The attempt under way cannot succeed. `suspects` (worker, incarnation) are not chosen again where others are."""

    reason: str
    cause: Cause
    suspects: tuple[tuple[WorkerId, int], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker that has a part in the request is out of reach for good: it lets go of what it was told."""

    reason: str


@dataclass(frozen=True, slots=True)
class MoveLost:
    """The move under way cannot succeed."""

    reason: str


@dataclass(frozen=True, slots=True)
class StageDue:
    """The state's own deadline is over."""


@dataclass(frozen=True, slots=True)
class RequestDue:
    """The request's deadline is over."""


Internal = AttemptLost | WorkerGone | MoveLost | StageDue | RequestDue
INTERNAL = (AttemptLost, WorkerGone, MoveLost, StageDue, RequestDue)
RequestEvent = (
    Token
    | RequestFailed
    | CommitAsk
    | OwnerQuery
    | MoveFailed
    | ClientGone
    | LetGo
    | FenceRaised
    | StopRequested
    | Internal
)

# ---- actions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request that ended. `cached_tokens` of the prompt were found in a prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendToWorker:
    """Say this on the stream to the worker incarnation."""

    worker_id: WorkerId
    incarnation: int
    message: RouterMessage
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """The next tokens of the answer, in order, each for the first time."""

    request_id: RequestId
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The request ended well."""

    request_id: RequestId
    reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """The request ended badly, after `num_tokens` tokens."""

    request_id: RequestId
    error: TandemError
    num_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """The request is not taken at all; one of the same id that runs is not touched."""

    request_id: RequestId
    error: TandemError


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRefused:
    """Nothing was moved, nor will be: the request, if there is one, runs on."""

    request_id: RequestId
    ticket: int
    error: TandemError


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveEnded:
    """The move that this ticket asked for is over; its record says how."""

    ticket: int
    record: MoveRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Told for the record: a request was given to workers."""

    request_id: RequestId
    mode: AssignMode


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver:
    """Told for the record: a decode worker owns what a prefill worker began, so long after its first token came."""

    request_id: RequestId
    after_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovering:
    """Told for the record: an attempt was lost, and the request is placed anew."""

    request_id: RequestId
    cause: Cause


Note = Placed | HandedOver | Recovering
Action = SendToWorker | Deliver | Finish | Fail | Refuse | MoveRefused | MoveEnded | Note
