"""The table of metrics and those who export it: names that keep the rules, labels from closed sets, nothing twice."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families
from router_rig import Rig, info, request

from cluster.membership import Membership, MemberState, Registered
from cluster.prometheus import ClusterMetrics
from router.events import Cause, HandedOver, Note, Placed, Recovering, Submitted, WorkerLost
from router.metrics import VALUES, EdgeMetrics
from router.move import MoveOutcome, MoveReason, MoveRecord
from router.stages import FirstToken, Stage
from tandem.messages import AssignMode, BlockCounts, Role, SwapCounts, TransferStats, WorkerLoad
from tandem.metrics import CLUSTER_METRICS, LABEL_VALUES, METRICS, ROUTER_METRICS, MetricKind
from tandem.request import RequestId, Slo, SloClass, TransferId, WorkerId

R = RequestId("r")


def samples(page: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample by its name and its labels' values, in the order of the names."""
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for each in family.samples:
            labels = sorted((name, value) for name, value in each.labels.items() if name != "router")
            found[each.name, tuple(value for _, value in labels)] = each.value
    return found


def test_names_say_their_unit_and_labels_come_from_closed_sets() -> None:
    assert max(Counter(each.name for each in METRICS).values()) == 1
    for metric in METRICS:
        assert metric.name.startswith("tandem_")
        suffix = "_total" if metric.kind is MetricKind.COUNTER else ""
        assert metric.name.endswith(f"_{metric.unit}{suffix}"), metric.name
        assert set(metric.labels) <= set(LABEL_VALUES), metric.name
        assert metric.help.endswith(".")
        assert bool(metric.buckets) is (metric.kind is MetricKind.HISTOGRAM)
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_a_router_tells_every_metric_of_its_own() -> None:
    page = EdgeMetrics("router-7").page().decode()
    for metric in ROUTER_METRICS:
        assert f"# HELP {metric.name} " in page
    for metric in CLUSTER_METRICS:
        assert metric.name not in page


def test_everything_that_may_be_counted_is_there_from_the_start_as_zero() -> None:
    page = EdgeMetrics("router-7").page()
    found = Counter(name for name, _ in samples(page))
    labelled = [each for each in ROUTER_METRICS if each.labels]
    assert len(labelled) > 5
    for metric in labelled:
        num = math.prod(len(VALUES[label]) for label in metric.labels)
        name = f"{metric.name}_count" if metric.kind is MetricKind.HISTOGRAM else metric.name
        assert found[name] == num, name
    living = ("tandem_router_cpu_seconds_total", "tandem_router_resident_bytes")
    counts = {name: value for (name, _), value in samples(page).items() if name not in living}
    assert set(counts.values()) == {0.0}
    assert all(value > 0 for (name, _), value in samples(page).items() if name in living)


def test_how_long_the_store_is_away_and_how_late_the_loop_comes_is_told() -> None:
    metrics = EdgeMetrics()
    metrics.follow_store(lambda: 12.5)
    metrics.came_late(0.02)
    found = samples(metrics.page())
    assert found["tandem_router_store_away_seconds", ()] == 12.5
    assert found["tandem_router_loop_late_seconds_sum", ()] == 0.02


def test_what_the_core_tells_for_the_record_is_counted() -> None:
    metrics = EdgeMetrics()
    for note in (
        Placed(request_id=R, mode=AssignMode.PREFILL),
        Placed(request_id=R, mode=AssignMode.LOCAL),
        HandedOver(request_id=R, after_ms=12),
        Recovering(request_id=R, cause=Cause.WORKER_GONE),
    ):
        metrics.noted(note)
    metrics.transferred(
        TransferStats(
            request_id=R, transfer_id=TransferId("t"), bytes=4096, blocks_moved=3, blocks_reused=2, tokens_recomputed=5
        )
    )
    found = samples(metrics.page())
    assert found["tandem_router_placed_attempts_total", ("prefill",)] == 1
    assert found["tandem_router_placed_attempts_total", ("local",)] == 1
    assert found["tandem_router_lost_attempts_total", ("worker_gone",)] == 1
    assert found["tandem_router_handoff_seconds_sum", ()] == pytest.approx(0.012)
    assert found["tandem_router_transferred_bytes_total", ()] == 4096
    assert found["tandem_router_transferred_blocks_total", ("moved",)] == 3
    assert found["tandem_router_transferred_blocks_total", ("reused",)] == 2
    assert found["tandem_router_recomputed_tokens_total", ()] == 5


def test_a_move_is_counted_by_reason_and_result_and_timed_only_when_it_came_about() -> None:
    metrics = EdgeMetrics()
    moved = MoveRecord(
        request_id=R, source=WorkerId("a"), target=WorkerId("b"), reason=MoveReason.DRAIN, why="",
        outcome=MoveOutcome.MOVED, bytes_moved=700, precopy_ms=40, fence_ms=5, pause_ms=9, at_ms=0,
    )  # fmt: skip
    failed = MoveRecord(
        request_id=R, source=WorkerId("a"), target=WorkerId("b"), reason=MoveReason.BALANCE, why="",
        outcome=MoveOutcome.FAILED, bytes_moved=100, at_ms=0,
    )  # fmt: skip
    metrics.moved(moved)
    metrics.moved(failed)
    of_the_source = TransferStats(
        request_id=R, transfer_id=TransferId("r.1.m1"), rounds=2, precopy_ms=40, fence_ms=5
    )  # fmt: skip
    metrics.transferred(of_the_source)
    found = samples(metrics.page())
    assert found["tandem_router_migrations_total", ("drain", "moved")] == 1
    assert found["tandem_router_migrations_total", ("balance", "failed")] == 1
    assert found["tandem_router_migration_bytes_total", ("drain",)] == 700
    assert found["tandem_router_migration_bytes_total", ("balance",)] == 100
    for phase, seconds in (("precopy", 0.04), ("fence", 0.005), ("pause", 0.009)):
        assert found["tandem_router_migration_seconds_count", (phase,)] == 1
        assert found["tandem_router_migration_seconds_sum", (phase,)] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("slo", "ttft_s", "tpot_s", "whole", "told"),
    [
        (None, 9.0, 9.0, True, ("met", "none")),
        (Slo(slo_class=SloClass.BATCH), 9.0, 9.0, True, ("met", "batch")),
        (Slo(ttft_ms=500, tpot_ms=50), 0.5, 0.05, True, ("met", "interactive")),
        (Slo(ttft_ms=500, tpot_ms=50), 0.51, 0.05, True, ("ttft", "interactive")),
        (Slo(ttft_ms=500, tpot_ms=50), 0.5, 0.06, True, ("tpot", "interactive")),
        (Slo(ttft_ms=500, tpot_ms=50), 0.6, 0.06, True, ("both", "interactive")),
        (Slo(ttft_ms=500, tpot_ms=50), 0.1, 0.01, False, ("failed", "interactive")),
    ],
)
def test_targets_are_met_or_it_is_said_which_was_missed(
    slo: Slo | None, ttft_s: float, tpot_s: float, whole: bool, told: tuple[str, str]
) -> None:
    metrics = EdgeMetrics()
    metrics.judged(slo, ttft_s=ttft_s, tpot_s=tpot_s, whole=whole)
    assert samples(metrics.page())["tandem_router_slo_requests_total", told] == 1


def test_stages_and_prefix_cache_are_counted_as_pairs() -> None:
    metrics = EdgeMetrics()
    metrics.first_token(FirstToken(ttft_ms=50.0, stages=((Stage.QUEUE, 20.0), (Stage.OTHER, 30.0))))
    metrics.answered(num_prompt_tokens=64, num_cached_tokens=48, tpot_s=0.02)
    metrics.answered(num_prompt_tokens=10, num_cached_tokens=0, tpot_s=None)
    found = samples(metrics.page())
    assert found["tandem_router_ttft_seconds_sum", ()] == pytest.approx(0.05)
    assert found["tandem_router_ttft_stage_seconds_sum", ("queue",)] == pytest.approx(0.02)
    assert found["tandem_router_ttft_stage_seconds_sum", ("other",)] == pytest.approx(0.03)
    assert found["tandem_router_prefix_queried_tokens_total", ()] == 74
    assert found["tandem_router_prefix_hit_tokens_total", ()] == 48
    assert found["tandem_router_tpot_seconds_count", ()] == 1


def test_a_lost_worker_and_a_new_place_are_told_for_the_record() -> None:
    rig = Rig()
    for name in ("m0", "m1"):
        rig.up(name, Role.MIXED)
    told: list[Note] = []
    told += [each for each in rig.feed(Submitted(request=request("r"))) if isinstance(each, Note)]
    [placed] = told
    assert placed == Placed(request_id=R, mode=AssignMode.LOCAL)
    [first] = rig.core.status(rig.now_ms).requests
    gone = rig.feed(WorkerLost(worker_id=WorkerId(first.prefill_worker), incarnation=1, reason="killed"))
    notes = [each for each in gone if isinstance(each, Note)]
    assert notes[0] == Recovering(request_id=R, cause=Cause.WORKER_GONE)


def test_each_worker_is_told_once_with_blocks_that_sum_to_its_pool() -> None:
    rig = Rig()
    membership = Membership(heartbeat_ms=1000)
    for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE)):
        membership.handle(0, Registered(info=info(name, role), incarnation=1))
        rig.up(name, role)
    load = WorkerLoad(
        running=3, waiting=2, prefill_backlog_tokens=77, steps=9, last_step_ms=12.5, audit=("a block is nobody's",),
        blocks=BlockCounts(total=100, free=40, cached=20, owned=30, exported=5, granted=4, quarantined=1),
        swap=SwapCounts(total=10, used=6, requests=1, swapped_out=4, brought_back=3, recomputed=2),
    )  # fmt: skip
    rig.report(WorkerId("d0"), load=load)
    cluster = ClusterMetrics(
        membership,
        rig.core.fleet,
        ready_pairs=lambda: 1,
    )
    edge = EdgeMetrics()
    edge.cluster = cluster
    found = samples(asyncio.run(edge.whole_page()))
    for metric in CLUSTER_METRICS:
        assert any(name == metric.name for name, _ in found), metric.name
    blocks = {labels: value for (name, labels), value in found.items() if name == "tandem_worker_kv_blocks"}
    assert sum(value for (_, _, who), value in blocks.items() if who == "d0") == 100
    assert blocks["decode", "quarantined", "d0"] == 1
    assert found["tandem_worker_running_requests", ("decode", "d0")] == 3
    assert found["tandem_worker_steps_total", ("decode", "d0")] == 9
    assert found["tandem_worker_last_step_seconds", ("decode", "d0")] == 0.0125
    assert found["tandem_worker_preempted_requests_total", ("decode", "swapped_out", "d0")] == 4
    assert found["tandem_worker_audit_findings", ("decode", "d0")] == 1
    assert found["tandem_router_ready_pairs", ()] == 1
    workers = {labels: value for (name, labels), value in found.items() if name == "tandem_workers"}
    assert {labels for labels, value in workers.items() if value} == {("prefill", "joining"), ("decode", "joining")}
    assert set(workers) == {(role.value, state.value) for role in Role for state in MemberState}
    assert found["tandem_routers", ("answering",)] == 1
    assert found["tandem_routers", ("silent",)] == 0
