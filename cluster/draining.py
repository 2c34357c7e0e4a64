"""One drain from the moment it is asked for until its worker has left, is replaced, or takes work again, as a table.

A drain gives its worker nothing new. What decodes there is moved away (cluster/rebalancer.py plans that), what prefills
there is finished and handed over, and the worker leaves once nobody reads anything of it any more. A flip is a drain
whose worker does not leave: once it is empty it takes work again, in another role, with its weights and its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.membership import Member, Membership, MemberState
from router.request import ENDED, RequestSnapshot, RequestState, StatusSnapshot
from tandem.errors import DrainRefused, InvalidRequest
from tandem.messages import Role
from tandem.near_miss import did_you_mean
from tandem.request import WorkerId

PREFILLS = (Role.PREFILL, Role.MIXED)
DECODES = (Role.DECODE, Role.MIXED)
DUTIES = {"writes tokens": DECODES, "reads prompts": PREFILLS}
DEADLINE_MS = 120_000
DEADLINE_MS_MAX = 3_600_000


class DrainState(StrEnum):
    """Where a drain is."""

    EMPTYING = "emptying"  # the worker has something that is needed
    LEAVING = "leaving"  # it has nothing, and its process is being ended
    STARTING = "starting"  # a fresh incarnation is on its way
    FLIPPING = "flipping"  # it has nothing that its new role could not go on with, and the cluster is told of that role
    DONE = "done"
    FAILED = "failed"


OVER = (DrainState.DONE, DrainState.FAILED)


# ---- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What the worker still has, as the router and the worker's own report say."""

    num_requests: int
    num_blocks: int  # owned, exported, granted or in quarantine
    obstacle: str = ""  # why its requests do not move; empty while they do


@dataclass(frozen=True, slots=True)
class Gone:
    """The incarnation that drains is over: its process ended, or it is dead to the cluster."""

    reason: str


@dataclass(frozen=True, slots=True)
class Back:
    """A higher incarnation of the worker is ready."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class Flipped:
    """The supervisor says that the worker has its new role."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The drain may not go on: another router began first what only one may."""

    reason: str


Event = Looked | Gone | Back | Flipped | GiveUp

# ---- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leave:
    """The worker has left the cluster: end its process, and start another one in its place if that is wanted."""

    restart: bool


@dataclass(frozen=True, slots=True)
class Flip:
    """Give the worker this role, in the whole cluster; then it takes work again."""

    role: Role


@dataclass(frozen=True, slots=True)
class TakeBack:
    """The drain is given up: the worker takes work again."""

    reason: str


Action = Leave | Flip | TakeBack


@dataclass(slots=True, kw_only=True)
class Drain:
    """One drain. Times are milliseconds on the caller's clock; `deadline_ms` is for emptying.

    `becomes`: the role that the worker, now of `role`, gets instead of leaving.
    """

    worker_id: WorkerId
    incarnation: int
    role: Role
    restart: bool = False
    becomes: Role | None = None
    began_ms: int
    deadline_ms: int
    leave_ms: int  # bound of the process's end
    start_ms: int  # bound of the fresh one's start
    flip_ms: int = 5_000  # bound of the supervisor's answer
    settle_ms: int = 300  # so long nothing may be left: words on their way between router and worker have come by then
    state: DrainState = DrainState.EMPTYING
    reason: str = ""  # FAILED: why
    left: Looked = field(default_factory=lambda: Looked(num_requests=0, num_blocks=0))
    fresh_incarnation: int = 0  # once it is back
    _empty_since_ms: int | None = None
    _due_ms: int = 0

    def handle(self, now_ms: int, event: Event) -> list[Action]:
        """Takes one event and says what follows. A missing row has no effect."""
        row = TABLE.get((self.state, type(event)))
        return row(self, now_ms, event) if row is not None else []

    def elapsed_ms(self, now_ms: int) -> int:
        """How long it has taken."""
        return now_ms - self.began_ms

    def tick(self, now_ms: int) -> list[Action]:
        """Time has passed: each state but EMPTYING, which is looked at anyway, has a bound."""
        bounds = {
            DrainState.LEAVING: ("has not ended", self.leave_ms),
            DrainState.STARTING: ("has left, and no fresh one is ready", self.start_ms),
            DrainState.FLIPPING: ("was not given its new role", self.flip_ms),
        }
        if self.state not in bounds or now_ms < self._due_ms:
            return []
        what, bound_ms = bounds[self.state]
        flips = self.state is DrainState.FLIPPING
        self._over(DrainState.FAILED, f"{self.worker_id} {what} within {bound_ms} ms")
        return [TakeBack(self.reason)] if flips else []

    @property
    def loses_nothing(self) -> bool:
        """Whether the new role does all that the old one did, so that nothing has to be moved away."""
        return self.becomes is not None and not duties_lost(self.role, self.becomes)

    def _looked(self, now_ms: int, event: Event) -> list[Action]:
        assert isinstance(event, Looked)
        self.left = event
        if self.loses_nothing:
            return self._leave(now_ms)
        if event.num_requests or event.num_blocks:
            self._empty_since_ms = None
            if now_ms < self.deadline_ms:
                return []
            why = f": {event.obstacle}" if event.obstacle else ""
            reason = (
                f"{self.worker_id} still has {event.num_requests} requests and {event.num_blocks} blocks after "
                f"{self.elapsed_ms(now_ms)} ms{why}; it takes work again"
            )
            self._over(DrainState.FAILED, reason)
            return [TakeBack(reason)]
        if self._empty_since_ms is None:
            self._empty_since_ms = now_ms
        if now_ms - self._empty_since_ms < self.settle_ms:
            return []
        return self._leave(now_ms)

    def _leave(self, now_ms: int) -> list[Action]:
        if self.becomes is not None:
            self.state, self._due_ms = DrainState.FLIPPING, now_ms + self.flip_ms
            return [Flip(self.becomes)]
        self.state, self._due_ms = DrainState.LEAVING, now_ms + self.leave_ms
        return [Leave(self.restart)]

    def _died(self, now_ms: int, event: Event) -> list[Action]:
        assert isinstance(event, Gone)
        self._over(DrainState.FAILED, f"{self.worker_id} died while it drained: {event.reason}")
        return []

    def _given_up(self, now_ms: int, event: Event) -> list[Action]:
        assert isinstance(event, GiveUp)
        self._over(DrainState.FAILED, event.reason)
        return [TakeBack(event.reason)]

    def _left(self, now_ms: int, event: Event) -> list[Action]:
        if self.restart:
            self.state, self._due_ms = DrainState.STARTING, now_ms + self.start_ms
        else:
            self._over(DrainState.DONE, "")
        return []

    def _back(self, now_ms: int, event: Event) -> list[Action]:
        assert isinstance(event, Back)
        self.fresh_incarnation = event.incarnation
        self._over(DrainState.DONE, "")
        return []

    def _flipped(self, now_ms: int, event: Event) -> list[Action]:
        self._over(DrainState.DONE, "")
        return []

    def _over(self, state: DrainState, reason: str) -> None:
        self.state, self.reason = state, reason


_Row = Callable[[Drain, int, Event], list[Action]]

TABLE: dict[tuple[DrainState, type], _Row] = {
    (DrainState.EMPTYING, Looked): Drain._looked,
    (DrainState.EMPTYING, Gone): Drain._died,
    (DrainState.EMPTYING, GiveUp): Drain._given_up,
    (DrainState.LEAVING, Gone): Drain._left,
    (DrainState.STARTING, Back): Drain._back,
    (DrainState.FLIPPING, Flipped): Drain._flipped,
    (DrainState.FLIPPING, Gone): Drain._died,
}


# ---- what a drain stands on ------------------------------------------------------------------------------------------


def drainable(
    membership: Membership,
    worker: str,
    *,
    restart: bool = False,
    becomes: Role | None = None,
    draining: Iterable[WorkerId],
) -> Member:
    """The worker that may be drained, or flipped. Raises InvalidRequest or DrainRefused saying why it may not.

    The last ready worker that reads prompts, or that writes tokens, stays, unless a fresh one takes its place.
    `draining`: workers whose drain is not over.
    """
    if not worker:
        raise InvalidRequest("worker", "is missing; name one of `tandem status`")
    member = membership.members.get(WorkerId(worker))
    if member is None:
        known, hint = ", ".join(sorted(membership.members)) or "none", did_you_mean(worker, membership.members)
        raise InvalidRequest("worker", f"no worker of id {worker!r} is known; there are: {known}{hint}")
    if member.state is MemberState.DRAINING or member.info.worker_id in draining:
        raise DrainRefused(f"{worker} is draining already")
    if member.state is MemberState.LEFT:
        raise DrainRefused(f"{worker} was drained and has left")
    if member.state is MemberState.DEAD:
        raise DrainRefused(f"{worker} is dead: {member.reason}")
    if member.state is MemberState.JOINING:
        raise DrainRefused(f"{worker} is joining; wait until it is ready")
    if member.info.role is becomes:
        raise DrainRefused(f"{worker} is a {becomes} worker already")
    if restart:
        return member
    others = {
        each.info.role
        for each in membership.members.values()
        if each.state is MemberState.READY and each is not member
    }  # fmt: skip
    refusal = last_of_its_kind(member.info.worker_id, member.info.role, others, becomes)
    if refusal:
        raise DrainRefused(refusal)
    return member


def parse_role(name: str, field: str = "role") -> Role:
    """The role of that name. Raises InvalidRequest about the field."""
    if name not in list(Role):
        hint = did_you_mean(name, Role)
        raise InvalidRequest(field, f"there is no role {name!r}; there are {', '.join(Role)}{hint}")
    return Role(name)


def duties_lost(role: Role, becomes: Role | None) -> list[str]:
    """What a worker does in its role, and not in the one that it gets; None: it gets none."""
    return [does for does, roles in DUTIES.items() if role in roles and becomes not in roles]


def last_of_its_kind(worker_id: WorkerId, role: Role, others: Collection[Role], becomes: Role | None = None) -> str:
    """Why a worker of that role has to stay beside others of those roles; empty when it may go, or become that."""
    for does in duties_lost(role, becomes):
        if not any(each in DUTIES[does] for each in others):
            instead = "make it mixed, or leave it" if becomes else "drain it with --restart, or not at all"
            return f"{worker_id} is the last ready worker that {does}; {instead}"
    return ""


def requests_on(snapshot: StatusSnapshot, worker_id: WorkerId) -> int:
    """How many of this router's requests the worker has a part in."""
    return sum(_involves(each, worker_id) for each in snapshot.requests)


def left_on(
    snapshot: StatusSnapshot, worker_id: WorkerId, incarnation: int, obstacle: str, num_elsewhere: int = 0
) -> Looked:
    """What the worker still has: requests that involve it, and blocks that somebody reads or writes.

    `num_elsewhere`: requests of other routers.
    """
    num_requests = requests_on(snapshot, worker_id) + num_elsewhere
    for worker in snapshot.workers:
        if (worker.worker_id, worker.incarnation) == (worker_id, incarnation) and worker.load is not None:
            blocks = worker.load.blocks
            num_blocks = blocks.owned + blocks.exported + blocks.granted + blocks.quarantined
            num_requests = max(num_requests, worker.num_requests)
            return Looked(num_requests=num_requests, num_blocks=num_blocks, obstacle=obstacle)
    # Nothing is known of it: not taken for empty.
    return Looked(num_requests=max(1, num_requests), num_blocks=0, obstacle=obstacle or "it has not reported its load")


def _involves(request: RequestSnapshot, worker_id: WorkerId) -> bool:
    """Whether the worker has a part in the request, or is about to."""
    if request.state in ENDED or request.state is RequestState.ADMITTED:
        return False
    involved = {request.decode_worker, request.moving_to}
    if request.state in (RequestState.PREFILLING, RequestState.HANDING_OFF):
        involved.add(request.prefill_worker)
    return worker_id in involved
