"""Moves and drains, begun and followed: the shell around the rebalancer and the drains, on the router's event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar, assert_never

from cluster.config import ClusterConfig
from cluster.drain_relay import DrainWord
from cluster.draining import (
    DEADLINE_MS,
    DEADLINE_MS_MAX,
    DECODES,
    OVER,
    Action,
    Back,
    Drain,
    DrainState,
    Event,
    Flip,
    Flipped,
    GiveUp,
    Gone,
    Leave,
    TakeBack,
    drainable,
    left_on,
    parse_role,
    requests_on,
)
from cluster.membership import OVER as MEMBER_OVER
from cluster.membership import MemberState, StateChanged
from cluster.observer import Observer
from cluster.rebalancer import Rebalancer
from cluster.registry import Registry
from cluster.turns import has_turn
from router.driver import Driver, WantedMove
from router.move import MoveOutcome, MoveReason, MoveRecord
from router.request import ENDED, StatusSnapshot
from tandem.errors import DrainRefused, InvalidRequest, UnknownRequest
from tandem.messages import Role
from tandem.near_miss import did_you_mean
from tandem.request import RequestId, WorkerId

log = logging.getLogger(__name__)

PERIOD_S = 0.2
FIGURES_S = 1.0  # the source may tell of a move a moment after the target's first token has ended it


class HasId(Protocol):
    """A request of some router."""

    @property
    def id(self) -> str: ...
    @property
    def state(self) -> str: ...


_HasId = TypeVar("_HasId", bound=HasId)


@dataclass(frozen=True, slots=True)
class Named:
    """A request by its id, and its state."""

    id: str
    state: str


def find_request(name: str, requests: Iterable[_HasId]) -> _HasId:
    """The request that is named by its id, or by how that ends: one that runs before those that ended.

    Raises InvalidRequest or UnknownRequest.
    """
    if not name:
        raise InvalidRequest("request_id", "is missing; name a request of `tandem status`")
    known = list(requests)
    named = [each for each in known if each.id.endswith(name)]
    exactly = [each for each in named if each.id == name]
    running = [each for each in exactly or named if each.state not in ENDED] or exactly or named
    if len(running) > 1 and not exactly:
        raise InvalidRequest("request_id", f"{len(running)} requests end in {name!r}; give the whole id")
    if not running:
        # As it was named: by the whole id, or by so much of its end. The newest are the last.
        like = did_you_mean(name, (part for each in reversed(known) for part in (each.id, each.id[-len(name) :])))
        raise UnknownRequest(f"no request of id {name!r} is known{like}")
    return running[0]


class Say(Protocol):
    """Tells the supervisor something."""

    def __call__(self, event: str, **fields: object) -> None: ...


@dataclass(slots=True)
class _Helped:
    """A drain that another router watches over, and how many requests that one was told of."""

    incarnation: int
    told: int | None = None


class Operations:
    """Looks at the cluster every PERIOD_S: router `number` of `num_routers`, which hear of its drains through `say`."""

    def __init__(
        self,
        *,
        driver: Driver,
        registry: Registry,
        config: ClusterConfig,
        say: Say,
        number: int = 0,
        num_routers: int = 1,
    ) -> None:
        self._driver = driver
        self._registry = registry
        self._config = config
        self._say = say
        self._number, self._num_routers = number, num_routers
        self._rebalancer = Rebalancer()
        self._observer = Observer(
            reserve_tokens=driver.config.decode_reserve_tokens,
            bytes_per_ms=driver.config.transfer_bytes_per_ms,
            alone=num_routers == 1,
        )
        self._drains: dict[WorkerId, Drain] = {}
        self._elsewhere: dict[WorkerId, int] = {}  # of these: how many requests other routers have there
        self._helped: dict[WorkerId, _Helped] = {}
        self._obstacles: dict[WorkerId, str] = {}  # of workers that drain: why their requests did not move, lately
        self._progress = asyncio.Condition()

    # ---- what operators ask ----------------------------------------------------------------------------------------

    async def migrate(self, request_id: str, to: str) -> MoveRecord:
        """Moves a running request, named by its id or by how that ends; returns when the move is over.

        Raises the TandemError that it is refused with.
        """
        snapshots = self._driver.status().requests
        named = [Named(each.request_id, each.state) for each in snapshots]
        found, target = RequestId(find_request(request_id, named).id), WorkerId(to) if to else None
        move = await self._driver.move(found, target, MoveReason.OPERATOR, "asked by an operator")
        until_s = time.monotonic() + FIGURES_S
        while move.outcome is MoveOutcome.MOVED and not move.rounds and time.monotonic() < until_s:
            await asyncio.sleep(FIGURES_S / 20)
            known = self._driver.status().moves
            same = [each for each in known if (each.request_id, each.at_ms) == (move.request_id, move.at_ms)]
            move = same[0] if same else move
        return move

    def flip(self, worker: str, role: str, *, deadline_ms: int) -> Drain:
        """Begins a drain after which the worker takes work again, in another role. Raises as `drain`."""
        drain = self.drain(worker, deadline_ms=deadline_ms, becomes=parse_role(role))
        if drain.loses_nothing:  # nor shall the rebalancer move anything away
            self._handle(drain, drain.left)
        return drain

    def drain(self, worker: str, *, deadline_ms: int, restart: bool = False, becomes: Role | None = None) -> Drain:
        """Begins a drain. Raises InvalidRequest or DrainRefused saying why there is none."""
        if deadline_ms > DEADLINE_MS_MAX:
            raise InvalidRequest("deadline_ms", f"is {deadline_ms}, at most {DEADLINE_MS_MAX}")
        membership = self._registry.membership
        open_drains = [name for name, drain in self._drains.items() if drain.state not in OVER]
        member = drainable(membership, worker, restart=restart, becomes=becomes, draining=open_drains)
        now_ms = _now_ms()
        drain = Drain(
            worker_id=member.info.worker_id,
            incarnation=member.incarnation,
            role=member.info.role,
            restart=restart,
            becomes=becomes,
            began_ms=now_ms,
            deadline_ms=now_ms + (deadline_ms or DEADLINE_MS),
            leave_ms=2_000 * self._config.stop_timeout_s,
            start_ms=1_000 * self._config.start_timeout_s,
        )
        self._drains[drain.worker_id] = drain
        self._elsewhere[drain.worker_id] = 0 if self._num_routers == 1 else 1  # until it is known
        self._obstacles.pop(drain.worker_id, None)
        self._registry.drain(member)
        role = becomes.value if becomes is not None else ""
        self._say(DrainWord.DRAINING, id=drain.worker_id, incarnation=drain.incarnation, restart=restart, role=role)
        drain.left = left_on(self._driver.status(), drain.worker_id, drain.incarnation, "")
        log.info(
            "worker=%s incarnation=%d drains, restart=%s, becomes=%s", drain.worker_id, drain.incarnation, restart, role
        )
        return drain

    async def follow(self, drain: Drain) -> AsyncGenerator[Drain, None]:
        """The drain, each time that something of it has changed; the last time when it is over.

        Raises DrainRefused when it was given up.
        """
        told: tuple[object, ...] = ()
        while True:
            if drain.state is DrainState.FAILED:
                raise DrainRefused(drain.reason)
            now = (drain.state, drain.left.num_requests, drain.left.num_blocks, drain.fresh_incarnation)
            if now != told:
                told = now
                yield drain
                continue  # it may have gone on meanwhile
            if drain.state in OVER:
                return
            async with self._progress:
                await self._progress.wait()  # each period at the latest

    @property
    def draining(self) -> list[WorkerId]:
        """Workers whose drain is not over, also those that another router drains."""
        return [name for name, drain in self._drains.items() if drain.state not in OVER] + list(self._helped)

    # ---- what happens ------------------------------------------------------------------------------------------------

    def ended(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        """The supervisor saw the worker's process end."""
        drain, helped = self._drains.get(worker_id), self._helped.get(worker_id)
        if drain is not None and incarnation == drain.incarnation:
            self._handle(drain, Gone(reason))
        if helped is not None and incarnation == helped.incarnation:
            del self._helped[worker_id]

    def told(
        self,
        word: DrainWord,
        worker_id: WorkerId,
        incarnation: int,
        *,
        requests: int,
        reason: str,
        role: Role | None = None,
    ) -> None:
        """The supervisor passes on what another router says of a drain, or says what has come of a flip."""
        drain = self._drains.get(worker_id)
        mine = drain is not None and drain.incarnation == incarnation
        match word:
            case DrainWord.DRAINING:
                self._helped[worker_id] = _Helped(incarnation)
                self._help(worker_id)
            case DrainWord.TAKEN_BACK | DrainWord.LEFT:
                if self._helped.pop(worker_id, None) is not None:
                    left = word is DrainWord.LEFT
                    self._registry.drained(worker_id, incarnation, left=left, reason=reason)
            case DrainWord.ELSEWHERE:
                if mine:
                    self._elsewhere[worker_id] = requests
            case DrainWord.GIVE_UP:
                if drain is not None and mine:
                    self._handle(drain, GiveUp(reason))
            case DrainWord.FLIPPED:
                assert role is not None, f"{worker_id} is flipped to no role"
                self._registry.flipped(worker_id, incarnation, role)
                if self._helped.pop(worker_id, None) is not None or mine:
                    self._registry.drained(worker_id, incarnation, left=False, reason=f"a {role} worker now")
                if drain is not None and mine:
                    self._handle(drain, Flipped())
            case DrainWord.PART | DrainWord.FLIP:
                raise AssertionError(f"{word} is for the supervisor")
            case _:
                assert_never(word)

    def _help(self, worker_id: WorkerId) -> None:
        """The worker gets nothing new from this router either; if it has not joined yet, as soon as it has."""
        member, helped = self._registry.membership.members.get(worker_id), self._helped[worker_id]
        if member is not None and member.incarnation == helped.incarnation:
            self._registry.drain(member)

    def changed(self, change: StateChanged) -> None:
        """Membership's view of a worker changed."""
        if change.state in MEMBER_OVER:
            self._rebalancer.gone(change.worker_id)
        drain, helped = self._drains.get(change.worker_id), self._helped.get(change.worker_id)
        if helped is not None and change.state is MemberState.READY and change.incarnation == helped.incarnation:
            self._help(change.worker_id)
        if drain is None:
            return
        if change.state is MemberState.DEAD and change.incarnation == drain.incarnation:
            self._handle(drain, Gone(change.reason))
        elif change.state is MemberState.READY and change.incarnation > drain.incarnation:
            self._handle(drain, Back(change.incarnation))

    # ---- the loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks, plans and begins, for ever: each PERIOD_S, and when a move has ended."""
        while True:
            with suppress(TimeoutError):  # a drain goes on with the next move as soon as one has ended
                await asyncio.wait_for(self._driver.move_ended.wait(), PERIOD_S)
            self._driver.move_ended.clear()
            self.tick()
            async with self._progress:
                self._progress.notify_all()

    def tick(self) -> None:
        """One look. Costs nothing where nothing could be moved."""
        self._drains = {name: drain for name, drain in self._drains.items() if drain.state not in OVER}
        decoding = [each for each in self._registry.membership.alive() if each.info.role in DECODES]
        draining = bool(self._drains or self._helped)
        if not draining and not (self._config.rebalance and len(decoding) > 1):
            return
        snapshot, now_ms = self._driver.status(), _now_ms()
        self._rebalance(snapshot, drains_only=not self._may_balance(now_ms))
        for drain in self._drains.values():
            obstacle, elsewhere = self._obstacles.get(drain.worker_id, ""), self._elsewhere[drain.worker_id]
            self._handle(drain, left_on(snapshot, drain.worker_id, drain.incarnation, obstacle, elsewhere))
            self._do(drain, drain.tick(now_ms))
        for worker_id, helped in self._helped.items():
            num_requests = requests_on(snapshot, worker_id)
            if num_requests != helped.told:
                helped.told = num_requests
                self._say(DrainWord.PART, id=worker_id, incarnation=helped.incarnation, requests=num_requests)

    def _may_balance(self, now_ms: int) -> bool:
        return self._config.rebalance and has_turn(now_ms, self._number, self._num_routers)

    def _rebalance(self, snapshot: StatusSnapshot, *, drains_only: bool) -> None:
        view, ended = self._observer.look(snapshot)
        for move in ended:
            if move.outcome is MoveOutcome.FAILED:
                self._rebalancer.failed(snapshot.now_ms, move.request_id, move.source, move.target)
                self._obstacles[move.source] = f"{move.request_id} did not move to {move.target}: {move.error}"
            else:
                self._obstacles.pop(move.source, None)
        planned = self._rebalancer.plan(snapshot.now_ms, view, drains_only=drains_only)
        sources = {move.request_id: move.source for move in planned}
        wanted = [
            WantedMove(request_id=each.request_id, to=each.target, reason=each.reason, why=each.why) for each in planned
        ]
        for refused in self._driver.request_moves(wanted):
            self._rebalancer.refused(snapshot.now_ms, refused.request_id)
            self._obstacles[sources[refused.request_id]] = str(refused.error)
        for name in self._drains:
            here = [each for each in view.running if each.worker_id == name]
            if here and name not in sources.values() and not any(each.moving_to for each in here):
                self._obstacles.setdefault(name, "no other worker that decodes is ready and has room")

    def _handle(self, drain: Drain, event: Event) -> None:
        before = drain.state
        self._do(drain, drain.handle(_now_ms(), event))
        if drain.state is not before:
            log.info("worker=%s drain: %s %s", drain.worker_id, drain.state.value, drain.reason)

    def _do(self, drain: Drain, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Leave(restart=restart):
                    self._registry.drained(drain.worker_id, drain.incarnation, left=True, reason="drained")
                    self._say(DrainWord.LEFT, id=drain.worker_id, incarnation=drain.incarnation, restart=restart)
                case Flip(role=role):
                    self._say(DrainWord.FLIP, id=drain.worker_id, incarnation=drain.incarnation, role=role.value)
                case TakeBack(reason=reason):
                    self._registry.drained(drain.worker_id, drain.incarnation, left=False, reason=reason)
                    self._say(DrainWord.TAKEN_BACK, id=drain.worker_id, incarnation=drain.incarnation, reason=reason)
                case _:
                    assert_never(action)


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
