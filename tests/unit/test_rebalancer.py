"""The rebalancer: each reason alone, the bounds that hold for all, and a cluster that it settles."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.outlook import AnswerLengths, ClusterView, Outlook, RunningRequest, StepTime, WaitingRequest, WorkerView
from cluster.rebalancer import PlannedMove, Rebalancer, RebalancerConfig
from router.move import MoveReason
from tandem.request import RequestId, WorkerId

STEP = StepTime(fixed_ms=5.0, row_ms=1.0, token_ms=0.01)
BLOCK = 16


def worker(name: str, *, total: int = 1000, held: int = 0, ready: bool = True, **fields: int) -> WorkerView:
    return WorkerView(
        worker_id=WorkerId(name), ready=ready, draining=not ready, block_size=BLOCK, block_bytes=50_000,
        total_blocks=total, held_blocks=held, room_blocks=fields.pop("room", total - held), **fields,
    )  # fmt: skip


def request(name: str, at: str, tokens: int = 160, left: float = 1000.0, **more: object) -> RunningRequest:
    chosen = RunningRequest(
        request_id=RequestId(name), worker_id=WorkerId(at), num_tokens=tokens, left_tokens=left
    )  # fmt: skip
    return replace(chosen, **more)  # type: ignore[arg-type]


def view(workers: list[WorkerView], running: list[RunningRequest], *waiting: WaitingRequest) -> ClusterView:
    """Workers hold what their requests need, unless they say that they hold more."""
    held = {each.worker_id: 0 for each in workers}
    for each in running:
        held[each.worker_id] += each.num_tokens // BLOCK + 1
    filled = []
    for there in workers:
        blocks = max(there.held_blocks, held[there.worker_id])
        room = min(there.room_blocks, there.total_blocks - blocks)
        filled.append(replace(there, held_blocks=blocks, room_blocks=room))
    return ClusterView(workers=tuple(filled), running=tuple(running), waiting=waiting, step=STEP, bytes_per_ms=1e6)


def plan(seen: ClusterView, now_ms: int = 100_000, **more: bool) -> list[PlannedMove]:
    return Rebalancer().plan(now_ms, seen, **more)


def shown(moves: list[PlannedMove]) -> list[tuple[str, str, str, MoveReason]]:
    return [(each.request_id, each.source, each.target, each.reason) for each in moves]


# ---- what is foreseen ------------------------------------------------------------------------------------------------


def test_freeness_is_the_number_of_steps_until_memory_is_gone() -> None:
    here = worker("d0", total=100, held=40, incoming_blocks=10, num_incoming=1)
    requests = [request("a", "d0"), request("b", "d0"), request("c", "d0")]
    assert Outlook(here, STEP, requests).freeness == (100 - 50) * BLOCK / 4
    assert Outlook(worker("d0"), STEP).freeness == math.inf
    assert Outlook(worker("d0", ready=False), STEP, requests).freeness == -math.inf


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 300)), max_size=8),
    st.integers(1, 400),
)
def test_the_peak_is_that_of_a_walk_through_all_steps(loads: list[tuple[int, int]], steps: int) -> None:
    """The closed form against the naive one: after each step, what the requests that still run hold."""
    requests = [request(str(at), "d", tokens, float(left)) for at, (tokens, left) in enumerate(loads)]
    blocks = {each.request_id: each.num_tokens // BLOCK + 1 for each in requests}
    held = sum(blocks.values())
    naive = float(held)
    for step in range(1, steps + 1):
        left = [each for each in requests if each.left_tokens >= step]
        naive = max(naive, sum(blocks[each.request_id] for each in left) + len(left) * step / BLOCK)
    outlook = Outlook(worker("d", held=held), STEP, requests)
    assert outlook.peak_blocks(steps) == math.ceil(naive)


def test_answers_are_judged_by_those_that_were_longer() -> None:
    lengths = AnswerLengths(history_max=4)
    assert lengths.left(56, 1000) == 200.0, "nothing is known yet: 256 are expected"
    for length in (900, 10, 20, 100, 300):  # the first is forgotten
        lengths.ended(length)
    assert lengths.left(0, 1000) == (10 + 20 + 100 + 300) / 4
    assert lengths.left(20, 1000) == (80 + 280) / 2
    assert lengths.left(20, 7) == 7.0
    assert lengths.left(5000, 10_000) == 500.0
    assert lengths.left(300, 1000) == 30.0


# ---- drain -----------------------------------------------------------------------------------------------------------


def test_a_draining_worker_gives_to_the_freest_the_longest_first() -> None:
    running = [request("a", "d0", left=10), request("b", "d0", left=500), request("c", "d1", tokens=4000)]
    [move] = plan(view([worker("d0", ready=False), worker("d1"), worker("d2")], running))
    assert shown([move]) == [("b", "d0", "d2", MoveReason.DRAIN)]
    assert "d0 drains" in move.why
    assert move.gain_ms == math.inf


def test_a_drain_asks_for_no_gain_no_rest_and_no_length() -> None:
    running = [request("a", "d0", left=1, moved_ms=99_990)]
    workers = [worker("d0", ready=False), worker("d1")]
    assert shown(plan(view(workers, running), drains_only=True)) == [("a", "d0", "d1", MoveReason.DRAIN)]


def test_a_drain_waits_for_room() -> None:
    running = [request("a", "d0", tokens=1600), request("b", "d0", tokens=160)]
    workers = [worker("d0", ready=False), worker("d1", total=100, held=60)]
    assert [each.request_id for each in plan(view(workers, running))] == ["b"], "a needs 101 blocks, 40 are free"
    assert plan(view([workers[0], worker("d1", total=100, held=95)], running)) == []
    assert plan(view([workers[0]], running)) == []


def test_what_failed_comes_last_and_its_pair_rests() -> None:
    rebalancer = Rebalancer()
    running = [request("a", "d0", left=500), request("b", "d0", left=10)]
    seen = view([worker("d0", ready=False), worker("d1")], running)
    [move] = rebalancer.plan(0, seen)
    assert move.request_id == "a"
    rebalancer.failed(100, move.request_id, move.source, move.target)
    assert rebalancer.plan(200, seen) == []
    assert rebalancer.plan(5_099, seen) == []
    assert shown(rebalancer.plan(5_100, seen)) == shown([move])
    other = view([*seen.workers, worker("d2", held=900)], running)
    rebalancer.failed(6_000, move.request_id, move.source, move.target)
    assert shown(rebalancer.plan(6_001, other)) == [("b", "d0", "d2", MoveReason.DRAIN)]


def test_a_move_under_way_takes_both_of_its_workers() -> None:
    running = [request("a", "d0", moving_to=WorkerId("d1")), request("b", "d0"), request("c", "d2")]
    assert plan(view([worker("d0", ready=False), worker("d1"), worker("d3")], running[:2])) == []
    workers = [worker("d0"), worker("d1"), worker("d2", ready=False)]
    assert plan(view(workers, running)) == [] or shown(plan(view(workers, running)))[0][2] == "d0"


# ---- pressure --------------------------------------------------------------------------------------------------------


def test_a_worker_that_runs_out_gives_away_what_relieves_it() -> None:
    grows = [request(f"r{number}", "d0", tokens=1500, left=800) for number in range(5)]
    [move] = plan(view([worker("d0", total=480), worker("d1", total=480)], grows))
    assert (move.reason, move.target) == (MoveReason.PRESSURE, "d1")
    assert "blocks short within 5000 ms" in move.why
    assert move.gain_ms > move.cost_ms > 0


def test_the_longest_relief_for_the_bytes_is_chosen() -> None:
    running = [request("large", "d0", tokens=4000, left=150), request("small", "d0", tokens=3500, left=300)]
    [move] = plan(view([worker("d0", total=472), worker("d1", total=900)], running))
    assert (move.reason, move.request_id) == (MoveReason.PRESSURE, "small")


def test_no_move_into_pressure() -> None:
    grows = [request(f"r{number}", "d0", tokens=1500, left=800) for number in range(5)]
    full = worker("d1", total=480, held=400)
    assert plan(view([worker("d0", total=480), full], grows)) == []


def test_what_ends_soon_is_no_pressure() -> None:
    flat = StepTime(fixed_ms=20.0, row_ms=0.0, token_ms=0.0)  # nothing to balance
    running = [request(f"r{number}", "d0", tokens=1500, left=300) for number in range(5)]
    seen = replace(view([worker("d0", total=490), worker("d1", total=490)], running), step=flat)
    assert shown(plan(seen)) == [("r0", "d0", "d1", MoveReason.PRESSURE)]
    assert plan(replace(seen, running=tuple(replace(each, left_tokens=30) for each in running))) == []


def test_of_several_the_lowest_priority_gives_way_to_pressure() -> None:
    grows = [request(f"r{number}", "d0", tokens=1500, left=800, priority=number != 3) for number in range(5)]
    [move] = plan(view([worker("d0", total=480), worker("d1", total=480)], grows))
    assert (move.reason, move.request_id) == (MoveReason.PRESSURE, "r3")


# ---- priority --------------------------------------------------------------------------------------------------------


def settled(running: list[RunningRequest], num_workers: int = 2) -> tuple[dict[str, str], list[PlannedMove]]:
    """Where each request is when nothing is moved any more, every move done at once; and the moves."""
    workers = [worker(f"d{number}") for number in range(num_workers)]
    moves: list[PlannedMove] = []
    for _ in range(40):
        planned = plan(view(workers, running))
        if not planned:
            return {each.request_id: each.worker_id for each in running}, moves
        to = {each.request_id: each.target for each in planned}
        moves += planned
        running = [replace(each, worker_id=to.get(each.request_id, each.worker_id)) for each in running]
    raise AssertionError(f"it does not settle: {shown(moves)}")


@pytest.mark.parametrize("priority", [1, 2, 3])
def test_others_leave_the_worker_of_a_high_priority(priority: int) -> None:
    """Of eight long requests on two workers one is of a higher priority: it gets the more room the higher it is."""
    running = [request("high", "d0", tokens=1000, priority=priority)]
    running += [request(f"r{number}", f"d{number % 2}", tokens=1000) for number in range(7)]
    places, moves = settled(running)
    beside = sum(place == places["high"] for place in places.values()) - 1
    assert beside == {1: 2, 2: 0, 3: 0}[priority]
    assert {each.reason for each in moves} == {MoveReason.PRIORITY}
    assert places["high"] == "d0"
    assert f"1 requests of priority {priority} wait" in moves[0].why


def test_nobody_is_moved_when_all_are_of_one_priority_or_steps_cost_the_same() -> None:
    alike = [request(f"r{number}", f"d{number % 2}", tokens=1000, priority=3) for number in range(8)]
    assert settled(alike)[1] == []
    mixed = [replace(each, priority=number % 4) for number, each in enumerate(alike)]
    flat = replace(view([worker("d0"), worker("d1")], mixed), step=StepTime(fixed_ms=50.0, row_ms=0.0, token_ms=0.0))
    assert plan(flat) == []


def test_balance_does_not_fill_the_head_room_again() -> None:
    """A crowd beside a worker with one request of priority 3 stays a crowd; of priority 0 it is spread."""
    crowd = [request(f"r{number}", "d1", tokens=1000) for number in range(6)]
    assert settled([request("high", "d0", tokens=1000, priority=3), *crowd])[1] == []
    places, moves = settled([request("low", "d0", tokens=1000), *crowd])
    assert {each.reason for each in moves} == {MoveReason.BALANCE}
    assert sorted(places.values()).count("d0") == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(100, 3000)), min_size=1, max_size=12))
def test_priorities_and_balance_settle_together(loads: list[tuple[int, int, int]]) -> None:
    running = [
        request(f"r{number}", f"d{at}", tokens=tokens, priority=priority)
        for number, (at, priority, tokens) in enumerate(loads)
    ]
    settled(running, num_workers=3)


# ---- balance ---------------------------------------------------------------------------------------------------------


def test_all_long_requests_on_one_worker_are_spread() -> None:
    running = [request(f"r{number}", "d0", tokens=1000) for number in range(6)]
    [move] = plan(view([worker("d0"), worker("d1")], running))
    assert (move.reason, move.source, move.target) == (MoveReason.BALANCE, "d0", "d1")
    assert "a step takes 71.0 ms on d0 and 5.0 ms on d1; after this 60.0 and 16.0 ms" in move.why


def test_no_balance_for_less_than_a_tenth_or_less_than_it_costs() -> None:
    workers = [worker("d0"), worker("d1")]
    near = [request(f"r{number}", f"d{number % 2}", tokens=1000) for number in range(9)]
    assert plan(view(workers, near)) == [], "45 and 49 ms: as good as it gets"
    running = [request(f"r{number}", "d0", tokens=1000) for number in range(6)]
    seen = view(workers, running)
    assert plan(replace(seen, bytes_per_ms=10.0)) == [], "copying takes minutes"
    assert plan(replace(seen, step=StepTime(fixed_ms=50.0, row_ms=0.1, token_ms=0.0))) == [], "a batch costs nothing"
    assert plan(view(workers, [replace(each, left_tokens=0.2) for each in running])) == [], "all are about to end"


def test_a_request_that_moved_rests() -> None:
    running = [request(f"r{number}", "d0", tokens=1000, moved_ms=96_000) for number in range(6)]
    seen = view([worker("d0"), worker("d1")], running)
    assert plan(seen, 100_999) == []
    assert len(plan(seen, 101_000)) == 1


def test_a_request_does_not_come_back_soon() -> None:
    running = [
        request(f"r{number}", "d0", tokens=1000, moved_ms=80_000, homes=((WorkerId("d1"), 80_000),))
        for number in range(6)
    ]
    seen = view([worker("d0"), worker("d1")], running)
    assert plan(seen, 109_999) == []
    assert len(plan(seen, 110_000)) == 1
    assert shown(plan(view([*seen.workers, worker("d2")], running))) == [("r0", "d0", "d2", MoveReason.BALANCE)]


def test_nothing_is_moved_to_or_from_who_is_suspect_or_for_drains_only() -> None:
    running = [request(f"r{number}", "d0", tokens=1000) for number in range(6)]
    suspect = replace(worker("d1", ready=False), draining=False)
    assert plan(view([worker("d0"), suspect], running)) == []
    assert plan(view([replace(suspect, worker_id=WorkerId("d0")), worker("d1")], running)) == []
    assert plan(view([worker("d0"), worker("d1")], running), drains_only=True) == []


# ---- de-fragmentation ------------------------------------------------------------------------------------------------


def fragmented(**more: object) -> ClusterView:
    """Two workers with 40 of 100 blocks free each, and a request that waits for 60."""
    running = [request(f"d{at}-{tokens}", f"d{at}", tokens=tokens, left=4000) for at in (0, 1) for tokens in (400, 480)]
    head = WaitingRequest(request_id=RequestId("long"), num_blocks=60, since_ms=98_000)
    seen = view([worker("d0", total=100), worker("d1", total=100)], running, replace(head, **more))  # type: ignore[arg-type]
    return replace(seen, step=replace(STEP, token_ms=0.0))


def test_the_cheapest_set_makes_room_for_who_waits() -> None:
    config = RebalancerConfig(fill_share=0.99, pressure_ms=1)
    [move] = Rebalancer(config).plan(100_000, fragmented())
    assert (move.reason, move.request_id) == (MoveReason.DEFRAGMENT, "d0-400")
    assert "long waits for 60 blocks since 2000 ms" in move.why
    assert move.gain_ms > move.cost_ms


def test_no_one_moves_for_who_has_just_come_or_fits_anyhow() -> None:
    rebalancer = Rebalancer(RebalancerConfig(fill_share=0.99, pressure_ms=1))
    assert rebalancer.plan(100_000, fragmented(since_ms=99_500)) == []
    assert rebalancer.plan(100_000, fragmented(num_blocks=30)) == []
    assert rebalancer.plan(100_000, fragmented(num_blocks=99)) == [], "it would not fit what is free in all"


# ---- for all reasons -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [each.name for each in fields(RebalancerConfig)])
def test_a_setting_that_cannot_be_used_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: is 0, must be more than 0"):
        RebalancerConfig(**{name: 0})


@pytest.mark.parametrize(("name", "value"), [("fill_share", 1.5), ("improvement_least", 1), ("imbalance_least", 1.0)])
def test_shares_and_hysteresis_have_limits(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: is {value}"):
        RebalancerConfig(**{name: value})  # type: ignore[arg-type]


@st.composite
def views(draw: st.DrawFn) -> ClusterView:
    num = draw(st.integers(1, 5))
    states = draw(st.lists(st.sampled_from(["ready", "draining", "suspect"]), min_size=num, max_size=num))
    workers = [
        replace(
            worker(f"d{at}", total=draw(st.integers(10, 500)), held=draw(st.integers(0, 10))),
            ready=state == "ready",
            draining=state == "draining",
        )
        for at, state in enumerate(states)
    ]
    running = []
    for number in range(draw(st.integers(0, 12))):
        at = draw(st.integers(0, num - 1))
        to = draw(st.none() | st.integers(0, num - 1))
        running.append(
            request(
                f"r{number}", f"d{at}", draw(st.integers(1, 3000)), draw(st.floats(0, 5000)),
                moved_ms=draw(st.none() | st.integers(90_000, 100_000)),
                moving_to=None if to is None or to == at else WorkerId(f"d{to}"),
            )
        )  # fmt: skip
    waits = WaitingRequest(request_id=RequestId("w"), num_blocks=draw(st.integers(1, 400)), since_ms=0)
    return view(workers, running, *([waits] if draw(st.booleans()) else []))


@settings(max_examples=400, deadline=None)
@given(views())
def test_every_plan_keeps_the_bounds(seen: ClusterView) -> None:
    moves = plan(seen)
    workers = {each.worker_id: each for each in seen.workers}
    running = {each.request_id: each for each in seen.running}
    out = [each.worker_id for each in seen.running if each.moving_to] + [each.source for each in moves]
    into = [each.moving_to for each in seen.running if each.moving_to] + [each.target for each in moves]
    for move in moves:
        moved, source, target = running[move.request_id], workers[move.source], workers[move.target]
        assert move.source == moved.worker_id != move.target
        assert moved.moving_to is None
        assert out.count(move.source) == 1
        assert into.count(move.target) == 1
        assert target.ready
        assert source.draining if move.reason is MoveReason.DRAIN else source.ready
        assert target.held_blocks + moved.num_tokens // BLOCK < target.total_blocks
        assert move.gain_ms > move.cost_ms > 0
        assert move.why
        if move.reason is not MoveReason.DRAIN:
            assert moved.moved_ms is None or 100_000 - moved.moved_ms >= 5_000
    assert len({each.request_id for each in moves}) == len(moves)
    assert shown(plan(seen)) == shown(moves), "the same view, the same plan"


# ---- a cluster that settles ------------------------------------------------------------------------------------------


@dataclass
class _Live:
    """One request of the model cluster."""

    at: str
    tokens: float
    left: float
    moved_ms: int | None = None
    moving_to: str | None = None
    homes: tuple[tuple[WorkerId, int], ...] = ()
    arrives_ms: float = 0.0


@dataclass
class _Model:
    """A cluster in which steps take what STEP says, moves take their bytes, and time goes in ticks of 200 ms."""

    workers: dict[str, int]  # name -> blocks
    requests: dict[str, _Live] = field(default_factory=dict)
    rebalancer: Rebalancer = field(default_factory=Rebalancer)
    now_ms: int = 0
    moves: list[tuple[int, PlannedMove]] = field(default_factory=list)
    draining: set[str] = field(default_factory=set)
    noise: random.Random = field(default_factory=lambda: random.Random(7))

    def view(self) -> ClusterView:
        workers = [worker(name, total=total, ready=name not in self.draining) for name, total in self.workers.items()]
        running = [
            request(
                name, each.at, int(each.tokens), each.left * self.noise.uniform(0.7, 1.4), moved_ms=each.moved_ms,
                moving_to=each.moving_to, homes=each.homes,
            )
            for name, each in self.requests.items()
        ]  # fmt: skip
        return view(workers, running)

    def step_ms(self, name: str) -> float:
        here = [each.tokens for each in self.requests.values() if each.at == name]
        return STEP.of(len(here), sum(here))

    def skew(self) -> float:
        """The longest step over the shortest."""
        steps_ms = [self.step_ms(name) for name in self.workers]
        return max(steps_ms) / min(steps_ms)

    def tick(self, ms: int = 200) -> None:
        for move in self.rebalancer.plan(self.now_ms, self.view()):
            self.moves.append((self.now_ms, move))
            live = self.requests[move.request_id]
            live.moved_ms, live.moving_to = self.now_ms, move.target
            live.arrives_ms = self.now_ms + move.cost_ms * self.noise.uniform(0.5, 3)
        step_ms = {name: self.step_ms(name) for name in self.workers}
        self.now_ms += ms
        for name, live in list(self.requests.items()):
            live.tokens += ms / step_ms[live.at]
            live.left -= ms / step_ms[live.at]
            if live.left <= 0:
                del self.requests[name]
            elif live.moving_to is not None and self.now_ms >= live.arrives_ms:
                live.homes = (*live.homes, (WorkerId(live.at), self.now_ms))
                live.at, live.moving_to = live.moving_to, None


@pytest.mark.parametrize("seed", range(6))
def test_a_skewed_cluster_is_balanced_and_then_left_alone(seed: int) -> None:
    draw = random.Random(seed)
    model = _Model({f"d{number}": 20_000 for number in range(draw.randint(2, 5))})
    for number in range(draw.randint(8, 30)):
        at = "d0" if draw.random() < 0.8 else draw.choice(list(model.workers))
        model.requests[f"r{number}"] = _Live(at, draw.uniform(50, 4000), 1e6)
    skew = model.skew()
    for _ in range(5 * 60):
        model.tick()
    num_moves = len(model.moves)
    assert 0 < num_moves <= 2 * len(model.requests)
    assert model.skew() < min(1.6, 0.75 * skew)
    for _ in range(5 * 600):
        model.tick()
    late = model.moves[num_moves:]
    assert len(late) <= len(model.requests) / 4, "requests grow nearly alike: what was balanced stays so"
    times: dict[str, list[int]] = {}
    for at_ms, move in model.moves:
        times.setdefault(move.request_id, []).append(at_ms)
    for each in times.values():
        assert all(after - before >= 5_000 for before, after in itertools.pairwise(each))


@pytest.mark.parametrize("seed", range(4))
def test_under_a_changing_load_no_request_goes_to_and_fro(seed: int) -> None:
    draw = random.Random(100 + seed)
    model = _Model({f"d{number}": 3_000 for number in range(3)})
    num_sent = 0
    for tick in range(5 * 300):
        if tick < 5 * 240 and draw.random() < 0.12:
            model.requests[f"r{num_sent}"] = _Live(
                draw.choice(["d0", "d0", "d1", "d2"]), draw.uniform(20, 2000), draw.choice([30, 200, 2000])
            )
            num_sent += 1
        model.tick()
    assert len(model.moves) < num_sent, "less than one move a request"
    left: dict[tuple[str, str], int] = {}  # (request, worker) -> when it left
    for at_ms, move in model.moves:
        assert at_ms - left.get((move.request_id, move.target), -math.inf) >= 30_000
        left[move.request_id, move.source] = at_ms


def test_a_drain_ends_and_nothing_comes_back() -> None:
    model = _Model({"d0": 2_000, "d1": 2_000, "d2": 2_000})
    for number in range(12):
        model.requests[f"r{number}"] = _Live(f"d{number % 3}", 500, 1e5)
    model.draining.add("d1")
    for _ in range(5 * 60):
        model.tick()
    assert not any("d1" in (each.at, each.moving_to) for each in model.requests.values())
    assert {move.reason for _, move in model.moves[:4]} == {MoveReason.DRAIN}
    assert all(move.target != "d1" for _, move in model.moves)


def test_no_failure_outlives_the_worker_that_had_a_part_in_it() -> None:
    rebalancer = Rebalancer()
    seen = view([worker("d0", ready=False), worker("d1")], [request("a", "d0", left=500)])
    [move] = rebalancer.plan(0, seen)
    rebalancer.failed(100, move.request_id, move.source, move.target)
    assert rebalancer.plan(200, seen) == []
    rebalancer.gone(WorkerId("d7"))
    assert rebalancer.plan(300, seen) == []
    rebalancer.gone(move.target)  # and another one comes under its name
    assert shown(rebalancer.plan(400, seen)) == shown([move])
