"""What the rebalancer is worth: long requests that all sit on one worker, with it and without it.

Each repetition runs both in turn on fresh clusters. One decode worker is exchanged (`tandem drain --restart`) while the
requests come, so that all of them decode on the other; they are watched from when it is back. With plenty of memory the
step grows with the batch; with little memory the worker runs out of blocks and has to preempt and recompute.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import grpc

from benchmarks import report
from benchmarks.figures import Outcome, percentile
from benchmarks.load import generate
from benchmarks.local_cluster import LocalCluster
from benchmarks.workload import Offered, random_prompts
from tandem.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc

VOCAB_SIZE = 49152
COMMON = ["--dtype", "float32", "--exact", "--threads", "1", "--prefill", "1", "--decode", "2"]
EXCHANGE_DEADLINE_S = 120.0
LEARN_TOKENS = 120  # of each request that lets the rebalancer see what batches cost
LEARN_EVERY_S = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Requests alike, and the KV memory of each worker."""

    name: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    kv_memory: str


CASES = (
    Case(name="plenty of memory", num_requests=8, prompt_tokens=500, output_tokens=1000, kv_memory="1GiB"),
    Case(name="little memory", num_requests=6, prompt_tokens=200, output_tokens=600, kv_memory="160MiB"),
)


@dataclass(slots=True)
class Side:
    """Figures of one case with or without the rebalancer; one entry a repetition."""

    itl_p50_ms: list[float] = field(default_factory=list)
    itl_p99_ms: list[float] = field(default_factory=list)
    itl_max_ms: list[float] = field(default_factory=list)
    span_s: list[float] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)  # tokens recomputed
    moves: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


async def learnt(inference: inference_pb2_grpc.InferenceStub, prompts: Sequence[Sequence[int]]) -> None:
    """Traffic of growing batches; afterwards all prompts are in the prefill worker's cache."""
    asked = []
    for number, prompt in enumerate(prompts):
        tokens = LEARN_TOKENS if number < 4 else 1
        asked.append(asyncio.create_task(generate(inference, prompt, output_tokens=tokens)))
        await asyncio.sleep(LEARN_EVERY_S)
    for outcome in await asyncio.gather(*asked):
        if outcome.error:
            raise RuntimeError(f"a request before the measurement failed: {outcome.error}")


async def watch(address: str, case: Case, prompts: Sequence[Sequence[int]]) -> tuple[float, list[Outcome]]:
    """When (s) the second worker was back with all requests on the first, and their outcomes."""
    async with grpc.aio.insecure_channel(address) as channel:
        inference = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        admin = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        await learnt(inference, prompts)
        exchange = asyncio.create_task(_exchange(admin, "decode-1"))
        while await _state(admin, "decode-1") == "ready":
            await asyncio.sleep(0.05)
        asked = [
            asyncio.create_task(
                generate(inference, prompt, output_tokens=case.output_tokens, request_id=f"long-{number}")
            )
            for number, prompt in enumerate(prompts)
        ]
        await exchange
        begin_s = time.perf_counter()
        status = await admin.Status(admin_pb2.StatusRequest(), timeout=10)
        places = [each.decode_worker for each in status.requests if each.id.startswith("long-")]
        if sorted(places) != ["decode-0"] * len(prompts):
            raise RuntimeError(f"the requests are not all on decode-0: {places}")
        return begin_s, await asyncio.gather(*asked)


async def _exchange(admin: admin_pb2_grpc.AdminStub, worker: str) -> None:
    """Returns when the worker is back."""
    drain = admin_pb2.DrainRequest(worker=worker, deadline_ms=60_000, restart=True)
    async for _ in admin.Drain(drain, timeout=EXCHANGE_DEADLINE_S):
        pass


async def _state(admin: admin_pb2_grpc.AdminStub, worker: str) -> str:
    status = await admin.Status(admin_pb2.StatusRequest(), timeout=10)
    return next((str(each.state) for each in status.workers if each.id == worker), "")


def one_run(case: Case, side: Side, *, rebalance: bool, seed: int) -> None:
    """One fresh cluster; the figures go to `side`."""
    offered = [Offered(arrival_s=0, prompt_tokens=case.prompt_tokens, output_tokens=0)] * case.num_requests
    prompts = random_prompts(offered, vocab_size=VOCAB_SIZE, seed=seed)
    arguments = [*COMMON, "--kv-memory", case.kv_memory, "--rebalance" if rebalance else "--no-rebalance"]
    with LocalCluster(arguments) as cluster:
        begin_s, outcomes = asyncio.run(watch(cluster.grpc_address, case, prompts))
        status = cluster.status()
    side.errors += [outcome.error for outcome in outcomes if outcome.error]
    gaps_ms = [
        (later - earlier) * 1000
        for outcome in outcomes
        for earlier, later in pairwise(outcome.token_times_s)
        if earlier >= begin_s
    ]
    side.itl_p50_ms.append(percentile(gaps_ms, 0.5))
    side.itl_p99_ms.append(percentile(gaps_ms, 0.99))
    side.itl_max_ms.append(max(gaps_ms))
    side.span_s.append(max(outcome.token_times_s[-1] for outcome in outcomes) - begin_s)
    watched = [request for request in status["requests"] if request["id"].startswith("long-")]
    side.preempted.append(sum(request["tokens_recomputed"] for request in watched))
    moved = [move for move in status["moves"] if move["request"].startswith("long-") and move["outcome"] == "moved"]
    side.moves.append(len(moved))
    side.reasons.update(move["reason"] for move in moved)


def main() -> int:
    """Measures and writes benchmarks/results/rebalance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rows = []
    for case in CASES:
        sides = {"off": Side(), "on": Side()}
        for repeat in range(options.repeats):
            for name, side in sides.items():
                one_run(case, side, rebalance=name == "on", seed=options.seed + repeat)
                print(f"{case.name}, {name}: p99 {side.itl_p99_ms[-1]:.0f} ms, {side.moves[-1]} moves", file=sys.stderr)
        for name, side in sides.items():
            rows.append(
                [
                    case.name, name, median(side.itl_p50_ms), median(side.itl_p99_ms), median(side.itl_max_ms),
                    median(side.span_s), median(side.preempted), median(side.moves),
                    ", ".join(f"{reason} {num}" for reason, num in side.reasons.most_common()), len(side.errors),
                ]
            )  # fmt: skip
        lower = 1 - median(sides["on"].itl_p99_ms) / median(sides["off"].itl_p99_ms)
        rows.append([case.name, "p99 lower by", "", f"{lower:.0%}", *[""] * 6])
    body = report.table(
        [
            "case", "rebalancer", "ITL p50 ms", "ITL p99 ms", "ITL max ms", "time to the last token s",
            "tokens recomputed", "moves", "of all repetitions", "errors",
        ],
        rows,
    )  # fmt: skip
    described = "; ".join(
        f"{case.name}: {case.num_requests} requests of {case.prompt_tokens} + {case.output_tokens} tokens, "
        f"{case.kv_memory} a worker"
        for case in CASES
    )
    body += (
        f"\n\n{options.repeats} repetitions in turn on fresh clusters of 1 prefill and 2 decode workers, medians. All "
        "requests decode on decode-0 while decode-1 is exchanged; gaps between tokens are taken from when it is back. "
        f"{described}. float32, exact mode.\n"
    )
    report.write("rebalance", "Rebalancer on and off", body, seed=options.seed, threads="1 a worker")
    return 0


if __name__ == "__main__":
    sys.exit(main())
