"""Who is in the cluster: one small state machine for each worker incarnation, fed by heartbeats and time.

A worker is dead after a few missed heartbeats, or when it has work but takes no step. A dead incarnation never comes
back, nor does one that was drained: whoever speaks in its name is told to register again, under a higher incarnation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

from tandem.messages import Role, WorkerInfo
from tandem.request import WorkerId


class MemberState(StrEnum):
    """Where a worker incarnation is in its life."""

    JOINING = "joining"  # registered, not yet heard again
    READY = "ready"
    SUSPECT = "suspect"  # silent or stuck for a while: keeps what it has, gets nothing new
    DRAINING = "draining"  # asked to leave: gets nothing new, and what it has is moved or finished
    LEFT = "left"  # it was drained, and its process ends
    DEAD = "dead"


OVER = frozenset({MemberState.LEFT, MemberState.DEAD})  # nothing leads out of these


class Observation(StrEnum):
    """What happens to one incarnation. The first six come from outside, the others are drawn from time."""

    HEARD = "heard"  # a heartbeat, with steps going forward or nothing to do
    DRAIN_ASKED = "drain_asked"
    DRAINED = "drained"  # nobody reads anything of it any more
    TAKEN_BACK = "taken_back"  # the drain did not end in time
    ENDED = "ended"  # its process is gone, or it said goodbye
    SUPERSEDED = "superseded"  # a higher incarnation of the same worker registered
    MISSED = "missed"  # all but one of the heartbeats that mean death are missing
    EXPIRED = "expired"
    STALLED = "stalled"  # it has work, and its progress has stood still for half of `stall_ms`
    STUCK = "stuck"  # and for all of it


S, O = MemberState, Observation  # noqa: E741

# A missing pair has no effect: such an observation is late, doubled or says nothing new.
TRANSITIONS: dict[tuple[MemberState, Observation], MemberState] = {
    (S.JOINING, O.HEARD): S.READY,
    (S.JOINING, O.ENDED): S.DEAD,
    (S.JOINING, O.SUPERSEDED): S.DEAD,
    (S.JOINING, O.EXPIRED): S.DEAD,
    (S.READY, O.DRAIN_ASKED): S.DRAINING,
    (S.READY, O.ENDED): S.DEAD,
    (S.READY, O.SUPERSEDED): S.DEAD,
    (S.READY, O.MISSED): S.SUSPECT,
    (S.READY, O.EXPIRED): S.DEAD,
    (S.READY, O.STALLED): S.SUSPECT,
    (S.READY, O.STUCK): S.DEAD,
    (S.SUSPECT, O.HEARD): S.READY,
    (S.SUSPECT, O.DRAIN_ASKED): S.DRAINING,
    (S.SUSPECT, O.ENDED): S.DEAD,
    (S.SUSPECT, O.SUPERSEDED): S.DEAD,
    (S.SUSPECT, O.EXPIRED): S.DEAD,
    (S.SUSPECT, O.STUCK): S.DEAD,
    (S.DRAINING, O.DRAINED): S.LEFT,
    (S.DRAINING, O.TAKEN_BACK): S.READY,
    (S.DRAINING, O.ENDED): S.DEAD,
    (S.DRAINING, O.SUPERSEDED): S.DEAD,
    (S.DRAINING, O.EXPIRED): S.DEAD,
    (S.DRAINING, O.STUCK): S.DEAD,
}


# ---- events --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A worker asks to join, or to be known by a router that is new. Its incarnation is its supervisor's count."""

    info: WorkerInfo
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A worker says that it lives. `runnable`: it has work that a step could advance."""

    worker_id: WorkerId
    incarnation: int
    steps: int
    runnable: bool
    agent_pid: int
    refused: int = 0  # strangers
    damaged: int = 0  # frames that did not check


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainAsked:
    """An operator wants the worker to leave."""

    worker_id: WorkerId
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainEnded:
    """Nothing is left on the worker that drains, or (`left` False) it takes work again."""

    worker_id: WorkerId
    incarnation: int
    left: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleGiven:
    """The incarnation has this role now, whatever it registered with; it may be yet to register here."""

    worker_id: WorkerId
    incarnation: int
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The worker's process is gone, or it said goodbye."""

    worker_id: WorkerId
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """Time has passed."""


Event = Registered | Heartbeat | DrainAsked | DrainEnded | RoleGiven | Ended | Passed


# ---- actions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The worker is in, under this incarnation: connect to it."""

    info: WorkerInfo
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationRefused:
    """The worker may not join, and why."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """The worker incarnation went into this state; with LEFT and DEAD it holds nothing any more."""

    worker_id: WorkerId
    incarnation: int
    state: MemberState
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChanged:
    """The worker incarnation has this role from now on."""

    worker_id: WorkerId
    incarnation: int
    role: Role


Action = Admitted | RegistrationRefused | StateChanged | RoleChanged


# ---- the machine ---------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Member:
    """One worker incarnation as the membership knows it."""

    info: WorkerInfo
    incarnation: int
    state: MemberState
    heard_ms: int
    steps: int = 0
    runnable: bool = False
    moved_ms: int = 0  # when its step counter last moved, or it last had nothing to do
    agent_pid: int = 0
    refused: int = 0
    damaged: int = 0
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class Membership:
    """All workers, the latest incarnation of each.

    Events are promised each `look_ms`. When they come much later, it was the observer that was away, on a machine that
    is too busy or was asleep: what workers said meanwhile is still to be read, and that time counts against nobody.
    """

    heartbeat_ms: int = 1000
    dead_after_misses: int = 3
    stall_ms: int = 3500  # with a heartbeat's wait for the news that is less than five seconds
    join_ms: int = 15_000  # from registration to the first heartbeat
    members_max: int = 1024  # names, those of the dead included
    look_ms: int | None = None  # None: nothing is promised
    looked_ms: int | None = None
    model: str = ""  # that every worker must run; empty: whichever the first one runs
    members: dict[WorkerId, Member] = field(default_factory=dict)
    given: dict[WorkerId, tuple[int, Role]] = field(default_factory=dict)  # of incarnations that have changed theirs

    def handle(self, now_ms: int, event: Event) -> list[Action]:
        """Takes one event at `now_ms` (monotonic milliseconds) and says what follows."""
        self._forgive(now_ms)
        match event:
            case Registered():
                return self._register(now_ms, event)
            case Heartbeat():
                return self._heard(now_ms, event)
            case DrainAsked():
                return self._observe(self.current(event), O.DRAIN_ASKED, "asked to drain")
            case DrainEnded():
                return self._observe(self.current(event), O.DRAINED if event.left else O.TAKEN_BACK, event.reason)
            case RoleGiven():
                return self._give_role(event)
            case Ended():
                return self._observe(self.current(event), O.ENDED, event.reason)
            case Passed():
                return [action for member in self.members.values() for action in self._passed(now_ms, member)]

    def current(self, named: Heartbeat | DrainAsked | DrainEnded | Ended) -> Member | None:
        """The member that is meant, or None when that incarnation is over or unknown."""
        member = self.members.get(named.worker_id)
        if member is None or member.incarnation != named.incarnation or member.state in OVER:
            return None
        return member

    def has_left(self, beat: Heartbeat) -> bool:
        """Whether that incarnation was drained, so that it shall end."""
        member = self.members.get(beat.worker_id)
        return member is not None and member.incarnation == beat.incarnation and member.state is S.LEFT

    def alive(self) -> Iterator[Member]:
        """Members that are not over."""
        return (member for member in self.members.values() if member.state not in OVER)

    def _forgive(self, now_ms: int) -> None:
        since_ms, self.looked_ms = self.looked_ms, now_ms
        if self.look_ms is None or since_ms is None:
            return
        away_ms = now_ms - since_ms - 2 * self.look_ms
        if away_ms > 0:
            for member in self.alive():
                member.heard_ms += away_ms
                member.moved_ms += away_ms

    def _register(self, now_ms: int, event: Registered) -> list[Action]:
        info, known = event.info, self.members.get(event.info.worker_id)
        incarnation, role = self.given.get(info.worker_id, (0, info.role))
        if incarnation == event.incarnation:
            info = replace(info, role=role)
        if known is not None and known.incarnation == event.incarnation and known.state not in OVER:
            if (known.info.pid, known.info.control) == (info.pid, info.control):
                return [Admitted(info=known.info, incarnation=known.incarnation)]  # the first answer was lost
        if known is not None and known.incarnation >= event.incarnation:
            reason = f"incarnation {event.incarnation} of {info.worker_id} is over; the latest is {known.incarnation}"
            return [RegistrationRefused(worker_id=info.worker_id, reason=reason)]
        if self.model and info.model != self.model:
            reason = f"{info.worker_id} runs the model {info.model!r}, this cluster serves {self.model!r}"
            return [RegistrationRefused(worker_id=info.worker_id, reason=reason)]
        stranger = next((member for member in self.alive() if member.info.namespace != info.namespace), None)
        if stranger is not None:
            reason = (
                f"{info.worker_id} runs {info.namespace!r}, but {stranger.info.worker_id} runs "
                f"{stranger.info.namespace!r}: one cluster serves one model"
            )
            return [RegistrationRefused(worker_id=info.worker_id, reason=reason)]
        differs = next((told for each in self.alive() if (told := _difference(info, each.info))), "")
        if differs:
            return [RegistrationRefused(worker_id=info.worker_id, reason=differs)]
        if known is None and not self._has_room():
            reason = f"{self.members_max} workers are in the cluster, no more may"
            return [RegistrationRefused(worker_id=info.worker_id, reason=reason)]
        actions = self._observe(known, O.SUPERSEDED, "a new incarnation registered")
        self.members[info.worker_id] = Member(
            info=info, incarnation=event.incarnation, state=S.JOINING, heard_ms=now_ms, moved_ms=now_ms,
            agent_pid=info.agent_pid,
        )  # fmt: skip
        return [*actions, Admitted(info=info, incarnation=event.incarnation)]

    def _give_role(self, event: RoleGiven) -> list[Action]:
        worker_id, incarnation, role = event.worker_id, event.incarnation, event.role
        self.given[worker_id] = incarnation, role
        while len(self.given) > self.members_max:
            del self.given[next(iter(self.given))]
        member = self.members.get(worker_id)
        if member is None or member.incarnation != incarnation or member.state in OVER or member.info.role is role:
            return []
        member.info = replace(member.info, role=role)
        return [RoleChanged(worker_id=worker_id, incarnation=incarnation, role=role)]

    def _has_room(self) -> bool:
        """Whether one more name may be remembered; the oldest that is over is forgotten for it."""
        if len(self.members) < self.members_max:
            return True
        over = next((name for name, member in self.members.items() if member.state in OVER), None)
        if over is None:
            return False
        del self.members[over]
        return True

    def _heard(self, now_ms: int, event: Heartbeat) -> list[Action]:
        member = self.current(event)
        if member is None:
            return []
        if event.steps != member.steps or not event.runnable or not member.runnable:
            member.moved_ms = now_ms
        member.heard_ms = now_ms
        member.steps, member.runnable, member.agent_pid = event.steps, event.runnable, event.agent_pid
        member.refused, member.damaged = event.refused, event.damaged
        if 2 * (now_ms - member.moved_ms) >= self.stall_ms:
            return self._stalled(now_ms, member)
        return self._observe(member, O.HEARD, "heartbeat")

    def _passed(self, now_ms: int, member: Member) -> list[Action]:
        silent_ms = now_ms - member.heard_ms
        if member.state is S.JOINING:
            expired = silent_ms >= self.join_ms
            return self._observe(member, O.EXPIRED, f"no heartbeat in {silent_ms} ms") if expired else []
        if silent_ms > self.heartbeat_ms * self.dead_after_misses:
            return self._observe(member, O.EXPIRED, f"no heartbeat for {silent_ms} ms")
        if silent_ms > self.heartbeat_ms * (self.dead_after_misses - 1):
            return self._observe(member, O.MISSED, f"no heartbeat for {silent_ms} ms")
        return self._stalled(now_ms, member) if member.runnable else []

    def _stalled(self, now_ms: int, member: Member) -> list[Action]:
        stalled_ms = now_ms - member.moved_ms
        if 2 * stalled_ms < self.stall_ms:
            return []
        observation = O.STUCK if stalled_ms >= self.stall_ms else O.STALLED
        return self._observe(member, observation, f"has work but took no step for {stalled_ms} ms")

    def _observe(self, member: Member | None, observation: Observation, reason: str) -> list[Action]:
        if member is None:
            return []
        state = TRANSITIONS.get((member.state, observation))
        if state is None:
            return []
        member.state, member.reason = state, reason
        return [
            StateChanged(
                worker_id=member.info.worker_id, incarnation=member.incarnation, state=state, reason=reason
            )
        ]  # fmt: skip


def _difference(new: WorkerInfo, old: WorkerInfo) -> str:
    """What of their blocks is not alike, in a sentence; empty when all is."""
    for name in ("dtype", "block_size", "block_bytes"):
        if getattr(new, name) != getattr(old, name):
            return (
                f"{new.worker_id} has {name} {getattr(new, name)!r}, but {old.worker_id} has "
                f"{getattr(old, name)!r}: one cluster has one layout of blocks"
            )
    return ""
