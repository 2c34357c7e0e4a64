"""Several routers rebalance the same workers, each its own requests: in turns, and without swinging to and fro."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.outlook import ClusterView, Outlook, RunningRequest, StepTime, WorkerView
from cluster.rebalancer import PlannedMove, Rebalancer
from cluster.turns import PLANNING_MS, TURN_MS, has_turn
from tandem.request import RequestId, WorkerId

BLOCK, TOTAL = 16, 4000
STEP = StepTime(fixed_ms=5.0, row_ms=3.0, token_ms=0.001)
LOOK_MS = 200
MOVE_MS = 150  # a move takes, and the workers' reports of it
TOKENS = 160
Turn = Callable[[int, int, int], bool]


def test_each_instant_is_one_routers_at_most_and_each_has_its_turn() -> None:
    for num in range(1, 17):
        for now_ms in range(0, num * TURN_MS):
            assert sum(has_turn(now_ms, number, num) for number in range(num)) <= 1
        for number in range(num):
            turns = [now_ms for now_ms in range(num * TURN_MS) if has_turn(now_ms, number, num)]
            assert len(turns) == (num * TURN_MS if num == 1 else PLANNING_MS)
    assert PLANNING_MS > LOOK_MS, "a router that looks each 200 ms does so in its turn"
    assert TURN_MS - PLANNING_MS >= MOVE_MS, "and its moves have ended when the next one looks"


class Machine:
    """Workers with requests of several routers. Each router sees its own, and of the others what the workers report."""

    def __init__(self, placed: list[tuple[int, int]], num_routers: int, num_workers: int, turn: Turn) -> None:
        self._turn = turn
        self._num_routers = num_routers
        self._workers = [WorkerId(f"d{number}") for number in range(num_workers)]
        self.home = {RequestId(f"r{at}"): self._workers[worker] for at, (_, worker) in enumerate(placed)}
        self._router = {RequestId(f"r{at}"): router for at, (router, _) in enumerate(placed)}
        self._moved_ms: dict[RequestId, int] = {}
        self._homes: dict[RequestId, list[tuple[WorkerId, int]]] = {}
        self._under_way: list[tuple[int, PlannedMove]] = []
        self._planners = [Rebalancer() for _ in range(num_routers)]
        self.moves: list[tuple[int, PlannedMove]] = []
        self._now_ms = 0

    def run(self, for_ms: int) -> None:
        began_ms, self._now_ms = self._now_ms, self._now_ms + for_ms
        for now_ms in range(began_ms, self._now_ms, 50):
            for due_ms, move in [each for each in self._under_way if each[0] <= now_ms]:
                self._under_way.remove((due_ms, move))
                self._homes.setdefault(move.request_id, []).append((move.source, now_ms))
                self.home[move.request_id] = move.target
            for router in range(self._num_routers):
                looks = (now_ms + 50 * router) % LOOK_MS == 0  # not all at the same time
                if looks and self._turn(now_ms, router, self._num_routers):
                    self._plan(now_ms, router)

    def _plan(self, now_ms: int, router: int) -> None:
        for move in self._planners[router].plan(now_ms, self._view(router)):
            self.moves.append((now_ms, move))
            self._moved_ms[move.request_id] = now_ms
            self._under_way.append((now_ms + MOVE_MS, move))

    def _view(self, router: int) -> ClusterView:
        load = Counter(self.home.values())
        own = [each for each in self.home if self._router[each] == router]
        targets = {move.request_id: move.target for _, move in self._under_way}
        running = tuple(
            RunningRequest(
                request_id=each, worker_id=self.home[each], num_tokens=TOKENS, left_tokens=50_000.0,
                moved_ms=self._moved_ms.get(each), moving_to=targets.get(each), homes=tuple(self._homes.get(each, [])),
            )
            for each in own
        )  # fmt: skip
        mine = Counter(self.home[each] for each in own)
        return ClusterView(
            workers=tuple(self._worker(each, load[each], mine[each]) for each in self._workers),
            running=running, waiting=(), step=STEP, bytes_per_ms=1e6,
        )  # fmt: skip

    def _worker(self, name: WorkerId, load: int, mine: int) -> WorkerView:
        held = load * (TOKENS // BLOCK + 1)
        return WorkerView(
            worker_id=name, ready=True, draining=False, block_size=BLOCK, block_bytes=50_000, total_blocks=TOTAL,
            held_blocks=held, room_blocks=TOTAL - held, num_strangers=load - mine,
            strange_tokens=(load - mine) * TOKENS,
        )  # fmt: skip

    def slowest_over_quickest(self) -> float:
        load = Counter(self.home.values())
        steps = [STEP.of(load[each], load[each] * TOKENS) for each in self._workers]
        return max(steps) / min(steps)


PLACED = st.integers(2, 4).flatmap(
    lambda num: st.tuples(
        st.just(num), st.lists(st.tuples(st.integers(0, num - 1), st.integers(0, 2)), min_size=4, max_size=24)
    )
)


@settings(deadline=None, max_examples=25)
@given(PLACED)
def test_they_settle_and_stay_so(given_: tuple[int, list[tuple[int, int]]]) -> None:
    num_routers, placed = given_
    machine = Machine(placed, num_routers, num_workers=3, turn=has_turn)
    machine.run(60_000)
    most = max(Counter(each.request_id for _, each in machine.moves).values(), default=0)
    assert most <= 1, "a request that was moved once is where it should be"
    assert len(machine.moves) <= len(placed)
    settled = len(machine.moves)
    machine.run(40_000)
    assert len(machine.moves) == settled, "nothing has changed, so nothing moves"


@pytest.mark.parametrize("num_routers", [2, 4, 8])
def test_what_no_router_sees_alone_is_balanced_by_all(num_routers: int) -> None:
    """Each has two requests on the first worker and none elsewhere: for each alone that would be no batch worth it."""
    placed = [(number % num_routers, 0) for number in range(2 * num_routers)]
    machine = Machine(placed, num_routers, num_workers=2, turn=has_turn)
    machine.run(60_000)
    assert machine.slowest_over_quickest() < 1.5


def test_without_turns_they_overshoot() -> None:
    """What the turns are for: eight routers that answer the same imbalance at the same time make its opposite."""

    def always(now_ms: int, number: int, num_routers: int) -> bool:
        return True

    placed = [(number, 0) for number in range(8)] + [(number, 1) for number in range(8) if number % 4 == 0]
    in_turns, all_at_once = (Machine(placed, 8, 2, turn) for turn in (has_turn, always))
    in_turns.run(30_000)
    all_at_once.run(30_000)
    assert len(in_turns.moves) < len(all_at_once.moves)


def test_requests_of_others_count_in_step_memory_and_freeness() -> None:
    alone = WorkerView(
        worker_id=WorkerId("d0"), ready=True, draining=False, block_size=BLOCK, block_bytes=1, total_blocks=100,
        held_blocks=50,
    )  # fmt: skip
    own = [RunningRequest(request_id=RequestId("a"), worker_id=alone.worker_id, num_tokens=160, left_tokens=40.0)]
    shared = WorkerView(**{**{name: getattr(alone, name) for name in alone.__slots__}, "num_strangers": 3,
                           "strange_tokens": 480})  # fmt: skip
    seen, unseen = Outlook(shared, STEP, own), Outlook(alone, STEP, own)
    assert seen.step_ms == STEP.of(4, 640)
    assert unseen.step_ms == STEP.of(1, 160)
    assert (seen.weight, unseen.weight) == (4, 1)
    assert seen.freeness == unseen.freeness / 4
    assert unseen.peak_blocks(80) == 50 + 3  # 40 tokens more, then it ends
    assert seen.peak_blocks(160) == 50 - 11 + 30  # the others go on for all 160
    assert seen.peak_blocks(40) == 50 + 10
