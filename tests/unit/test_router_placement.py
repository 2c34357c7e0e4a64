"""Placement, the prefix index, the accounts and the cost models."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.config import RouterConfig
from router.cost import CostModel
from router.fleet import Fleet, Worker, WorkerState
from router.placement import Ask, NoPlacement, Part, Placement, Placer, Why
from router.prefix_index import PrefixIndex
from tandem.messages import AssignMode, BlockCounts, BlockEvents, Role, WorkerInfo, WorkerLoad
from tandem.request import RequestId, WorkerId

NOW_MS = 1_000


def hashes(name: str, num: int) -> list[bytes]:
    return [f"{name}{each}".encode().ljust(16) for each in range(num)]


class Pool:
    """A fleet, its index and a placer."""

    def __init__(self, config: RouterConfig | None = None) -> None:
        self.config = config or RouterConfig()
        self.fleet = Fleet(report_lag_ms=self.config.report_lag_ms)
        self.index = PrefixIndex()
        self.placer = Placer(self.fleet, self.index, self.config)

    def add(self, worker_id: str, role: Role, *, total_blocks: int = 1000) -> Worker:
        info = WorkerInfo(
            worker_id=WorkerId(worker_id),
            role=role,
            control="",
            endpoint="",
            pid=1,
            agent_pid=1,
            model="m",
            namespace="n",
            fingerprint="f",
            exact=True,
            dtype="float32",
            block_size=16,
            total_blocks=total_blocks,
            context_tokens=8192,
            block_bytes=700_000,
        )
        worker = self.fleet.join(info, 1)
        self.index.join(worker.slot, 1)
        self.fleet.linked(worker, True)
        return worker

    def hold(self, worker: Worker, blocks: list[bytes], sequence: int = 1) -> None:
        self.index.apply(worker.slot, 1, BlockEvents(sequence=sequence, stored=tuple(blocks)))

    def place(self, ask: Ask) -> Placement:
        found = self.placer.place(NOW_MS, ask)
        assert isinstance(found, Placement), found
        return found

    def charge(self, worker: Worker, name: str, predicted_ms: float) -> None:
        self.fleet.charge_prefill(
            worker, RequestId(name), now_ms=NOW_MS, predicted_ms=predicted_ms, num_uncached=1, num_tokens=1
        )


def ask(num_tokens: int = 320, name: str = "x", avoid: frozenset[tuple[WorkerId, int]] = frozenset()) -> Ask:
    return Ask(num_tokens=num_tokens, num_more=64, hashes=hashes(name, num_tokens // 16), avoid=avoid)


def load(free: int, *, backlog: int = 0, running: int = 0, total: int = 1000) -> WorkerLoad:
    blocks = BlockCounts(total=total, free=free, owned=total - free)
    return WorkerLoad(
        running=running, waiting=0, blocks=blocks, prefill_backlog_tokens=backlog, steps=1, last_step_ms=1.0
    )


# ---- the index -----------------------------------------------------------------------------------------------------


def test_the_index_finds_how_deep_each_worker_goes() -> None:
    index, chain = PrefixIndex(), hashes("a", 100)
    depths = {0: 100, 1: 1, 2: 0, 3: 57, 4: 57}
    for slot, depth in depths.items():
        index.join(slot, 1)
        index.apply(slot, 1, BlockEvents(sequence=1, stored=tuple(chain[:depth])))
    assert {slot: index.depth(slot, chain) for slot in depths} == depths
    assert index.deepest(chain, 0b11111, 3) == [0, 3, 4]
    assert index.deepest(chain, 0b10010, 3) == [4, 1]
    assert index.deepest([], 0b11111, 3) == []


def test_a_gap_an_old_batch_and_an_old_incarnation() -> None:
    index, chain = PrefixIndex(), hashes("a", 4)
    index.join(0, 1)
    index.apply(0, 1, BlockEvents(sequence=1, stored=tuple(chain[:2])))
    index.apply(0, 1, BlockEvents(sequence=1, removed=tuple(chain[:2])))  # doubled
    index.apply(0, 9, BlockEvents(sequence=2, cleared=True))
    assert index.num_blocks(0) == 2
    index.apply(0, 1, BlockEvents(sequence=3, stored=(chain[3],)))
    assert (index.num_blocks(0), index.num_gaps) == (1, 1)
    index.join(0, 2)
    assert (index.num_blocks(0), len(index)) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.booleans()), max_size=40))
def test_the_index_agrees_with_a_scan(changes: list[tuple[int, int, bool]]) -> None:
    """Against a naive model, with prefix-closed sets as workers have them."""
    index, chain, depth = PrefixIndex(), hashes("a", 12), [0, 0, 0, 0]
    sequences = [0, 0, 0, 0]
    for slot in range(4):
        index.join(slot, 1)
    for slot, target, leave in changes:
        if leave:
            index.join(slot, 1)
            depth[slot] = sequences[slot] = 0
        sequences[slot] += 1
        stored, removed = tuple(chain[depth[slot] : target]), tuple(chain[target : depth[slot]])
        index.apply(slot, 1, BlockEvents(sequence=sequences[slot], stored=stored, removed=removed))
        depth[slot] = target
        assert [index.depth(each, chain) for each in range(4)] == depth
        found = index.deepest(chain, 0b1111, 4)
        assert [depth[each] for each in found] == sorted((each for each in depth if each), reverse=True)
        assert index.audit() == []


# ---- placement -----------------------------------------------------------------------------------------------------


def test_without_workers_there_is_no_place() -> None:
    pool = Pool()
    worker = pool.add("p", Role.PREFILL)
    pool.fleet.linked(worker, False)
    assert worker.state is WorkerState.SUSPECT
    found = pool.placer.place(NOW_MS, ask())
    assert isinstance(found, NoPlacement)
    assert found.why is Why.NO_WORKERS


def test_the_warmest_prefill_worker_wins_until_its_queue_is_longer_than_the_saving() -> None:
    pool = Pool()
    cold, warm = pool.add("p0", Role.PREFILL), pool.add("p1", Role.PREFILL)
    pool.add("d0", Role.DECODE)
    request = ask(3200)
    pool.hold(warm, list(request.hashes[:100]))
    placed = pool.place(request)
    assert (placed.prefill_worker.worker_id, placed.num_cached_tokens, placed.mode) == ("p1", 1600, AssignMode.PREFILL)
    considered = {str(each.worker_id): each for each in placed.candidates}
    assert considered["p1"].score_ms < considered["p0"].score_ms
    assert {name: each.part for name, each in considered.items()} == {
        "p0": Part.PREFILL, "p1": Part.PREFILL, "d0": Part.DECODE
    }  # fmt: skip
    terms = dict(considered["p1"].terms)
    assert terms["cached_tokens"] == 1600
    assert considered["p1"].score_ms == pytest.approx(terms["queue_ms"] + terms["prefill_ms"])
    pool.charge(warm, "other", 60_000.0)
    assert pool.place(request).prefill_worker.worker_id == cold.worker_id


def test_own_dispatches_count_at_once() -> None:
    pool = Pool()
    workers = [pool.add(f"p{each}", Role.PREFILL) for each in range(3)]
    pool.add("d0", Role.DECODE)
    chosen = []
    for each in range(6):
        placed = pool.place(ask(name=str(each)))
        chosen.append(placed.prefill_worker.worker_id)
        worker = next(worker for worker in workers if worker.worker_id == chosen[-1])
        pool.charge(worker, str(each), placed.prefill_ms)
    assert sorted(chosen) == ["p0", "p0", "p1", "p1", "p2", "p2"]


def test_a_report_replaces_the_account_but_for_what_is_too_young_to_be_in_it() -> None:
    pool = Pool()
    worker = pool.add("p0", Role.PREFILL)
    pool.charge(worker, "a", 500.0)
    pool.fleet.report(worker, load(1000), NOW_MS + 5)
    assert worker.queue_ms(NOW_MS + 5) == pytest.approx(500.0)
    pool.fleet.report(worker, load(1000), NOW_MS + 400)
    assert worker.queue_ms(NOW_MS + 400) == 0.0


def test_decode_goes_where_there_is_memory_and_the_batch_is_small() -> None:
    pool = Pool()
    pool.add("p0", Role.PREFILL)
    full, busy, idle = (pool.add(f"d{each}", Role.DECODE) for each in range(3))
    pool.fleet.report(full, load(3), NOW_MS)
    pool.fleet.report(busy, load(900, running=4), NOW_MS)
    assert pool.place(ask()).decode_worker.worker_id == idle.worker_id
    pool.fleet.reserve(idle, RequestId("large"), 990)
    assert pool.place(ask()).decode_worker.worker_id == busy.worker_id
    pool.fleet.reserve(busy, RequestId("large"), 990)
    found = pool.placer.place(NOW_MS, ask())
    assert isinstance(found, NoPlacement)
    assert found.why is Why.NO_MEMORY


def test_a_step_during_which_its_worker_was_stopped_does_not_send_all_to_one() -> None:
    """Steps take as long for many as for few; one seemed to last for seconds."""
    pool = Pool()
    pool.add("p0", Role.PREFILL)
    workers = [pool.add(f"d{each}", Role.DECODE) for each in range(2)]
    for each in range(30):
        workers[0].cost.learn_step(1 + each % 3, 10.0 + each % 2)
    workers[0].cost.learn_step(1, 2700.0)
    for each in range(6):
        found = pool.place(ask(name=str(each)))
        (taken,) = [worker for worker in workers if worker.info.worker_id == found.decode_worker.worker_id]
        pool.fleet.reserve(taken, RequestId(str(each)), 21)
    assert [worker.num_requests for worker in workers] == [3, 3]


def test_others_keep_away_from_the_worker_of_a_high_priority_unless_theirs_is_as_high() -> None:
    pool = Pool()
    pool.add("p0", Role.PREFILL)
    quiet, crowded = (pool.add(f"d{each}", Role.DECODE) for each in range(2))
    pool.fleet.reserve(quiet, RequestId("high"), 10, priority=2)
    for number in range(4):
        pool.fleet.reserve(crowded, RequestId(f"r{number}"), 10)
    assert quiet.urgency == 15
    assert pool.place(ask()).decode_worker.worker_id == crowded.worker_id
    assert pool.place(replace(ask(), priority=2)).decode_worker.worker_id == quiet.worker_id
    pool.fleet.forget(quiet, RequestId("high"))
    assert quiet.urgency == 0
    assert pool.place(ask()).decode_worker.worker_id == quiet.worker_id


def test_a_decode_worker_that_holds_the_prefix_and_is_as_free_is_preferred() -> None:
    pool = Pool(RouterConfig(local_prefill_tokens=0, transfer_bytes_per_ms=1000))
    pool.add("p0", Role.PREFILL)
    pool.add("d0", Role.DECODE)
    warm = pool.add("d1", Role.DECODE)
    request = ask()
    pool.hold(warm, list(request.hashes))
    assert pool.place(request).decode_worker.worker_id == "d1"


@pytest.mark.parametrize(
    ("decode_blocks", "prefill_blocks", "limit", "mode"),
    [
        (10, 0, 256, AssignMode.LOCAL),
        (10, 9, 256, AssignMode.LOCAL),
        (10, 10, 256, AssignMode.PREFILL),  # not strictly warmer
        (3, 0, 256, AssignMode.PREFILL),  # 272 tokens are left
        (4, 0, 256, AssignMode.LOCAL),
        (10, 0, 0, AssignMode.PREFILL),  # switched off
    ],
)
def test_a_short_rest_is_prefilled_where_the_prefix_is(
    decode_blocks: int, prefill_blocks: int, limit: int, mode: AssignMode
) -> None:
    pool = Pool(RouterConfig(local_prefill_tokens=limit))
    prefill = pool.add("p0", Role.PREFILL)
    pool.add("d0", Role.DECODE)
    decode = pool.add("d1", Role.DECODE)
    request = ask(320)
    pool.hold(decode, list(request.hashes[:decode_blocks]))
    pool.hold(prefill, list(request.hashes[:prefill_blocks]))
    placed = pool.place(request)
    assert placed.mode is mode
    if mode is AssignMode.LOCAL:
        assert placed.prefill_worker.worker_id == placed.decode_worker.worker_id == "d1"


@pytest.mark.parametrize("when", ["ready", "draining"])
def test_a_worker_with_another_role_is_a_candidate_for_that_one_alone(when: str) -> None:
    rig = Pool()
    for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)):
        rig.add(name, role)
    worker = rig.fleet.current(WorkerId("d1"))
    assert worker is not None
    if when == "draining":
        rig.fleet.drain(worker)
    rig.fleet.flip(worker, Role.PREFILL)
    if when == "draining":
        assert list(rig.fleet.fewest_requests(Role.PREFILL)) != [worker]
        rig.fleet.drain(worker, False)
    names = {role: {each.worker_id for each in rig.fleet.fewest_requests(role)} for role in Role}
    assert names == {Role.PREFILL: {"p0", "d1"}, Role.DECODE: {"d0"}, Role.MIXED: set()}
    assert {each.worker_id for each in rig.fleet.soonest_free(Role.PREFILL)} == {"p0", "d1"}
    rig.fleet.leave(worker, "gone")
    assert [rig.fleet.ready[role].bit_count() for role in (Role.PREFILL, Role.DECODE)] == [1, 1]


def test_a_mixed_worker_works_alone() -> None:
    pool = Pool()
    pool.add("m0", Role.MIXED)
    placed = pool.place(ask())
    assert (placed.mode, placed.decode_worker.worker_id) == (AssignMode.LOCAL, "m0")


def test_mixed_and_separate_workers_compete_by_completion() -> None:
    pool = Pool()
    prefill = pool.add("p0", Role.PREFILL)
    pool.add("d0", Role.DECODE)
    mixed = pool.add("m0", Role.MIXED)
    pool.charge(mixed, "a", 900.0)
    assert pool.place(ask()).mode is AssignMode.PREFILL
    pool.charge(prefill, "b", 2000.0)
    assert pool.place(ask()).mode is AssignMode.LOCAL


def test_either_pool_serves_alone_when_the_other_is_gone() -> None:
    pool = Pool()
    prefill = pool.add("p0", Role.PREFILL)
    placed = pool.place(ask())
    assert (placed.mode, placed.decode_worker.worker_id) == (AssignMode.LOCAL, "p0")
    assert "no decode worker" in placed.reason
    pool.add("d0", Role.DECODE)
    assert pool.place(ask()).mode is AssignMode.PREFILL
    pool.fleet.drain(prefill)
    placed = pool.place(ask())
    assert (placed.mode, placed.decode_worker.worker_id) == (AssignMode.LOCAL, "d0")
    assert "no prefill worker" in placed.reason


def test_what_was_tried_in_vain_is_avoided_and_at_last_done_without_a_handoff() -> None:
    pool = Pool()
    pool.add("p0", Role.PREFILL)
    first, second = pool.add("d0", Role.DECODE), pool.add("d1", Role.DECODE)
    assert pool.place(ask(avoid=frozenset({first.key}))).decode_worker.worker_id == second.worker_id
    placed = pool.place(ask(avoid=frozenset({first.key, second.key})))
    assert placed.mode is AssignMode.LOCAL


def test_a_resting_pair_is_used_when_there_is_no_other() -> None:
    pool = Pool()
    first, second = pool.add("p0", Role.PREFILL), pool.add("p1", Role.PREFILL)
    target = pool.add("d0", Role.DECODE)
    resting = frozenset({(first.key, target.key)})
    placed = pool.place(replace(ask(), resting=resting))
    assert (placed.prefill_worker.worker_id, placed.decode_worker.worker_id) == ("p1", "d0")
    placed = pool.place(replace(ask(), resting=resting | {(second.key, target.key)}))
    assert (placed.mode, placed.decode_worker.worker_id) == (AssignMode.PREFILL, "d0")


def test_a_prompt_that_no_worker_can_hold() -> None:
    pool = Pool()
    pool.add("m0", Role.MIXED, total_blocks=10)
    assert isinstance(pool.placer.place(NOW_MS, ask(159)), Placement)
    found = pool.placer.place(NOW_MS, ask(160))
    assert isinstance(found, NoPlacement)
    assert found.why is Why.NEVER_FITS


def test_a_decision_among_a_thousand_workers_is_fast() -> None:
    """The claim of design.md 7 is 100 microseconds; the bound here leaves room for a loaded machine."""
    pool = Pool()
    shared = hashes("x", 64)
    for each in range(1000):
        worker = pool.add(f"w{each}", Role.PREFILL if each % 3 else Role.DECODE)
        pool.hold(worker, shared[: 1 + each % 60])
        pool.charge(worker, "warm-up", float(each % 97))
    request = Ask(num_tokens=1030, num_more=64, hashes=shared)
    times_us = []
    for _ in range(300):
        began = time.perf_counter()
        pool.place(request)
        times_us.append((time.perf_counter() - began) * 1e6)
    print(f"placement among 1000 workers: p50 {statistics.median(times_us):.0f} us, max {max(times_us):.0f} us")
    assert statistics.median(times_us) < 1000


# ---- cost, admission, settings -------------------------------------------------------------------------------------


def test_the_cost_model_learns_a_quadratic() -> None:
    cost = CostModel()
    for each in range(400):
        length = 100 + 97 * each % 4000
        uncached = max(1, length - 31 * each % length)
        cost.learn_prefill(uncached, length, 7.0 + 0.8 * uncached + 1e-4 * uncached * (2 * length - uncached) / 2)
    assert cost.prefill_ms(2000, 2000) == pytest.approx(7.0 + 1600.0 + 200.0, rel=0.02)
    assert cost.prefill_ms(16, 4000) == pytest.approx(7.0 + 12.8 + 6.4, rel=0.3)


def test_equal_samples_neither_explode_nor_go_negative() -> None:
    cost = CostModel()
    for _ in range(5000):
        cost.learn_prefill(100, 100, 50.0)
        cost.learn_step(1, 12.0)
    assert cost.prefill_ms(100, 100) == pytest.approx(50.0, rel=0.01)
    assert cost.step_ms(1) == pytest.approx(12.0, rel=0.01)
    assert cost.prefill_ms(1, 1) > 0


def test_one_sample_far_off_counts_for_little_and_a_change_is_learnt() -> None:
    cost = CostModel()
    for each in range(100):
        cost.learn_step(1 + each % 8, 10.0 + 0.5 * (each % 8))
    before_ms = cost.step_ms(4)
    cost.learn_step(4, 60_000.0)
    assert cost.step_ms(4) < 1.2 * before_ms
    for each in range(600):
        cost.learn_step(1 + each % 8, 200.0 + 10.0 * (each % 8))
    assert cost.step_ms(4) == pytest.approx(230.0, rel=0.1)
    first = CostModel()
    for each in range(8):
        first.learn_step(1 + each % 2, 0.4)
    assert first.step_ms(1) == pytest.approx(0.4, rel=0.5), "the first guess is off by thirty times"


def test_more_requests_never_make_a_step_shorter() -> None:
    cost = CostModel()
    for each in range(100):
        cost.learn_step(1 + each % 4, 12.0 - each % 4)
    assert cost.step_ms(1) <= cost.step_ms(4) <= cost.step_ms(400)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"requests_max": 0}, "requests_max"),
        ({"tick_ms": -5}, "tick_ms"),
        ({"local_prefill_tokens": -1}, "local_prefill_tokens"),
        ({"router_id": ""}, "router_id"),
        ({"redial_ms": 5_000}, "redial_max_ms"),
    ],
)
def test_settings_name_the_key_that_is_wrong(values: dict[str, int], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        RouterConfig(**values)  # type: ignore[arg-type]
