"""The rebalancer's view of the router's status, and what is learnt from one look after another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.observer import Observer
from cluster.outlook import ClusterView, StepTime
from router.move import MoveOutcome, MoveReason, MoveRecord
from router.request import RequestSnapshot, RequestState, StatusSnapshot, Transferred, WorkerSnapshot
from tandem.messages import BlockCounts, Role, SwapCounts, WorkerInfo, WorkerLoad
from tandem.request import RequestId, WorkerId


def worker(name: str, *, role: Role = Role.DECODE, state: str = "ready", steps: int = 0, **load: int) -> WorkerSnapshot:
    counts = BlockCounts(total=100, free=50, cached=10, owned=30, granted=load.pop("granted", 0), exported=10)
    told = WorkerLoad(
        running=load.pop("running", 0), waiting=load.pop("waiting", 0), blocks=counts, steps=steps, last_step_ms=1.0,
        prefill_backlog_tokens=load.pop("backlog", 0),
    )  # fmt: skip
    info = WorkerInfo(
        worker_id=WorkerId(name), role=role, control="h:1", endpoint="e", pid=1, agent_pid=2, model="m", namespace="n",
        fingerprint="f", exact=True, dtype="float32", block_size=16, total_blocks=100, context_tokens=128,
        block_bytes=64,
    )  # fmt: skip
    return WorkerSnapshot(
        worker_id=info.worker_id, incarnation=1, state=state, info=info, load=told, num_requests=0, num_free_blocks=60,
        num_arriving=0, num_arriving_blocks=0, cached_hashes=0, reason="",
    )  # fmt: skip


def request(name: str, at: str, state: RequestState = RequestState.DECODING, **more: object) -> RequestSnapshot:
    chosen = RequestSnapshot(
        request_id=RequestId(name), state=state, mode="prefill", prefill_worker="p0", decode_worker=at, epoch=1,
        prompt_tokens=100, tokens=20, max_tokens=50, num_moves=0, moving_to="", transferred=Transferred(),
        num_replacements=0, ttft_ms=None, age_ms=700, error="", reason="", placements=(), story=(),
    )  # fmt: skip
    return replace(chosen, **more)  # type: ignore[arg-type]


def move(name: str = "a", *, at_ms: int = 900, outcome: MoveOutcome = MoveOutcome.MOVED, **more: int) -> MoveRecord:
    return MoveRecord(
        request_id=RequestId(name), source=WorkerId("d1"), target=WorkerId("d0"), reason=MoveReason.OPERATOR, why="",
        outcome=outcome, error="", at_ms=at_ms, **more,
    )  # fmt: skip


def status(
    now_ms: int, workers: list[WorkerSnapshot], requests: list[RequestSnapshot], *moves: MoveRecord
) -> StatusSnapshot:
    return StatusSnapshot(
        now_ms=now_ms, workers=tuple(workers), requests=tuple(requests), moves=moves, queued_tokens=0, waiting=0
    )


def observer() -> Observer:
    return Observer(reserve_tokens=256, bytes_per_ms=1000.0)


def view_of(snapshot: StatusSnapshot) -> ClusterView:
    return observer().look(snapshot)[0]


def test_a_view_has_what_decodes_and_who_waits() -> None:
    seen = view_of(
        status(
            1000,
            [worker("d0"), worker("p0", role=Role.PREFILL), worker("m0", role=Role.MIXED, state="draining"),
             worker("d1", state="suspect"), worker("d2", state="dead")],
            [request("a", "d0"), request("w", "", RequestState.ADMITTED), request("f", "d0", RequestState.FINISHED)],
        )
    )  # fmt: skip
    assert [(each.worker_id, each.ready, each.draining) for each in seen.workers] == [
        ("d0", True, False), ("m0", False, True), ("d1", False, False),
    ]  # fmt: skip
    assert (seen.workers[0].held_blocks, seen.workers[0].room_blocks) == (40, 60)
    [running] = seen.running
    assert (running.num_tokens, running.left_tokens, running.reserve_blocks) == (120, 16.0, 10)
    [waiting] = seen.waiting
    assert (waiting.num_blocks, waiting.since_ms) == (10, 300)


def test_a_prefill_worker_that_decodes_may_only_give_away() -> None:
    workers = [worker("d0"), worker("p0", role=Role.PREFILL), worker("p1", role=Role.PREFILL, state="draining")]
    seen = view_of(status(0, workers, [request("a", "p0"), request("b", "p1")]))
    assert [(each.worker_id, each.ready, each.draining) for each in seen.workers] == [
        ("d0", True, False), ("p0", False, False), ("p1", False, True),
    ]  # fmt: skip


def test_handoffs_on_their_way_count_until_they_have_blocks() -> None:
    coming = [request("a", "d0", RequestState.PREFILLING), request("b", "d0", RequestState.HANDING_OFF)]
    here = request("c", "d0", RequestState.PREFILLING, prefill_worker="d0")
    [seen] = view_of(status(0, [worker("d0", granted=5)], [*coming, here])).workers
    assert (seen.incoming_blocks, seen.num_incoming) == (2 * 8 - 5, 2)


def test_answers_that_ended_tell_of_those_that_run() -> None:
    watching = observer()
    ended = [request(f"f{tokens}", "d0", RequestState.FINISHED, tokens=tokens) for tokens in (10, 40, 60)]
    failed = request("x", "d0", RequestState.FAILED, tokens=5)
    running = request("a", "d0", max_tokens=1000)
    for _ in range(3):  # each is counted once
        view, _ = watching.look(status(0, [worker("d0")], [*ended, failed, running]))
    assert view.running[0].left_tokens == (20 + 40) / 2


def test_moves_are_remembered_for_dwell_and_return() -> None:
    watching = observer()
    moving = request("a", "d1", moving_to="d0")
    watching.look(status(1000, [worker("d0")], [moving]))
    view, ended = watching.look(status(1200, [worker("d0")], [request("a", "d0")], move()))
    assert [each.request_id for each in ended] == ["a"]
    assert view.running[0].moved_ms == 1000, "when it was last seen moving"
    assert view.running[0].homes == (("d1", 900),)
    view, ended = watching.look(status(1400, [worker("d0")], [request("a", "d0")], move()))
    assert ended == []
    failed = move(at_ms=1500, outcome=MoveOutcome.FAILED)
    under_way = move("b", at_ms=1550, outcome=MoveOutcome.MOVING)
    view, ended = watching.look(status(1600, [worker("d0")], [request("a", "d0")], move(), failed, under_way))
    assert ended == [failed]
    assert view.running[0].moved_ms == 1500
    assert view.running[0].homes == (("d1", 900),)


def test_bandwidth_is_the_median_of_large_moves() -> None:
    watching = observer()
    assert watching.bytes_per_ms() == 1000.0
    moves = [
        move(at_ms=number, bytes_moved=size, precopy_ms=ms)
        for number, (size, ms) in enumerate([(2 << 20, 100), (4 << 20, 100), (8 << 20, 100), (1000, 1), (8 << 20, 0)])
    ]
    watching.look(status(10, [], [], *moves))
    watching.look(status(20, [], [], *moves))
    assert watching.bytes_per_ms() == (4 << 20) / 100


def steps_of(watching: Observer, truth: StepTime, batches: list[tuple[int, int]], *, each_ms: int = 5_000) -> None:
    """Lets a worker run one batch after another, (requests, tokens of each), with looks every 200 ms."""
    now_ms, steps = 0.0, 0.0
    for number, (rows, tokens) in enumerate(batches):
        requests = [request(f"{number}.{row}", "d0", prompt_tokens=tokens, tokens=0) for row in range(rows)]
        step_ms = truth.of(rows, rows * tokens)
        for _ in range(each_ms // 200):
            watching.look(status(round(now_ms), [worker("d0", running=rows, steps=int(steps))], requests))
            now_ms, steps = now_ms + 200, steps + 200 / step_ms


def test_step_times_are_learnt_from_batches_that_differ() -> None:
    truth = StepTime(fixed_ms=8.0, row_ms=0.5, token_ms=0.002)
    watching = observer()
    steps_of(watching, truth, [(1, 100), (16, 200), (4, 3000), (30, 50), (8, 1000), (2, 4000)])
    for rows, tokens in ((1, 100), (20, 8000), (5, 15_000)):
        assert watching.step().of(rows, tokens) == pytest.approx(truth.of(rows, tokens), rel=0.15)


@pytest.mark.parametrize("step_ms", [2.0, 40.0])
def test_a_batch_of_which_nothing_else_is_known_is_not_taken_to_be_slow(step_ms: float) -> None:
    """One size of batch says nothing of another one: an empty worker looks no quicker, and nothing is moved."""
    watching = observer()
    steps_of(watching, StepTime(fixed_ms=step_ms, row_ms=0.0, token_ms=0.0), [(6, 300)])
    step = watching.step()
    assert step.of(6, 1800) < 1.25 * step.of(0, 0)


def test_a_disturbed_batch_is_no_sample() -> None:
    watching = observer()
    before = watching.step()
    alone = [request("a", "d0")]
    for now_ms, there, requests in (
        (0, worker("d0", running=1, steps=0), alone),
        (200, worker("d0", running=1, steps=9), alone),  # too few steps
        (400, worker("d0", running=2, steps=100), [*alone, request("b", "d0")]),
        (600, worker("d0", running=2, steps=200), alone),  # the worker and the router do not agree
        (800, worker("d0", running=1, steps=300, backlog=50), alone),
        (1000, worker("d0", running=1, steps=400, waiting=1), alone),
        (1200, worker("d0", running=1, steps=500), [request("a", "d0", moving_to="d1")]),
    ):
        watching.look(status(now_ms, [there], requests))
        assert watching.step() == before, now_ms
    watching.look(status(1400, [worker("d0", running=1, steps=510)], alone))
    watching.look(status(1600, [worker("d0", running=1, steps=520)], alone))
    assert watching.step() != before


def test_what_is_swapped_out_counts_as_held() -> None:
    """It wants its blocks back: a worker that swaps is fuller than it looks."""
    d0 = worker("d0")
    assert d0.load is not None
    swapping = replace(d0, load=replace(d0.load, swap=SwapCounts(total=50, used=7, requests=1)))
    assert [each.held_blocks for each in view_of(status(1000, [d0], [])).workers] == [40]
    assert [each.held_blocks for each in view_of(status(1000, [swapping], [])).workers] == [47]


# ---- several routers -------------------------------------------------------------------------------------------------


def test_requests_of_other_routers_are_what_the_worker_reports_beyond_ones_own() -> None:
    shared = Observer(reserve_tokens=256, bytes_per_ms=1000.0, alone=False)
    here = [request("a", "d0"), request("c", "d0", RequestState.HANDING_OFF), request("f", "d0", RequestState.FINISHED)]
    seen, _ = shared.look(status(1000, [worker("d0", running=5, waiting=1), worker("d1")], here))
    mixed, other = seen.workers
    assert (mixed.num_strangers, mixed.strange_tokens) == (4, (40 - 8) * 16), "a has 8 blocks of the 40"
    assert (other.num_strangers, other.strange_tokens) == (0, 0)
    alone = view_of(status(1000, [worker("d0", running=5, waiting=1)], here))
    assert (alone.workers[0].num_strangers, alone.workers[0].strange_tokens) == (0, 0), "it knows its own"


def test_what_a_step_costs_is_learnt_from_batches_with_requests_of_others() -> None:
    def learnt(*, alone: bool) -> StepTime:
        shared = Observer(reserve_tokens=256, bytes_per_ms=1000.0, alone=alone)
        for step, running in enumerate((1, 1, 9, 9, 1, 1, 9, 9)):
            at_ms = 20 * sum(5 + each for each in (1, 1, 9, 9, 1, 1, 9, 9)[: step + 1])
            batch = [worker("d0", steps=20 * (step + 1), running=running)]
            shared.look(status(at_ms, batch, [request("a", "d0")]))
        return shared.step()

    assert learnt(alone=False).of(9, 640) > learnt(alone=False).of(1, 640)
    assert learnt(alone=True).of(9, 640) == pytest.approx(learnt(alone=True).of(1, 640), rel=0.05)
