"""What a live migration costs: the added gap of the moved request, its neighbours' pace, and what rebalancing wins.

The ways of moving are asked in turn, each on a fresh cluster (A/B/A/B): live (pre-copy, tail of at most one block), as
Llumnix's three stages (a last stage of up to 16 blocks), a blocking copy (fenced before the first block), and, for
scale, recomputing: the time to the first token of the same prompt, which no worker keeps. Every moved
answer is compared with the answer that stayed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import grpc

from benchmarks import report
from benchmarks.figures import Outcome, percentile
from benchmarks.load import generate, migrate
from benchmarks.local_cluster import LocalCluster
from benchmarks.workload import Offered, random_prompts
from tandem.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

VOCAB_SIZE = 49152
# Without a prefix cache a request that comes back finds none of its blocks: each move copies all of them.
COMMON = ["--dtype", "float32", "--exact", "--threads", "1", "--no-rebalance", "--no-prefix-cache"]
COMMON += ["--prefill", "1", "--decode", "2"]
WAYS = {
    "live": [],
    "three stages, last of <= 16 blocks": ["--fence-blocks", "16"],
    "blocking copy": ["--fence-blocks", "1000000"],
}
OUTPUT_TOKENS = 112
MOVES = 8  # a request, at random tokens among these
MOVE_AT = range(6, 104, 6)


@dataclass(slots=True)
class Moved:
    """One way's figures at one context length."""

    added_ms: list[float] = field(default_factory=list)  # gap over the request's own median gap, one a move
    step_ms: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    recomputed_ms: list[float] = field(default_factory=list)
    wrong: int = 0
    failed: list[str] = field(default_factory=list)


class Bench:
    """Speaks with one running cluster."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.inference = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        self.admin = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]

    async def where(self, request_id: str) -> tuple[str, int]:
        """The worker that decodes the request and its tokens so far; empty when it is not known."""
        status = await self.admin.Status(admin_pb2.StatusRequest(), timeout=10)
        for request in status.requests:
            if request.id == request_id:
                return request.decode_worker, request.tokens
        return "", 0

    async def move(self, request_id: str, to: str) -> Any:
        """Moves it and returns the record; a refusal is an error."""
        return await migrate(self.admin, request_id, to)

    async def halves(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Waits until all decode, and sees that half of them do so on each decode worker."""
        while True:
            places = {name: await self.where(name) for name in names}
            if all(tokens > 4 for _, tokens in places.values()):
                break
            await asyncio.sleep(0.2)
        left, right = ([n for n in names if places[n][0] == worker] for worker in ("decode-0", "decode-1"))
        while len(left) > len(names) // 2:
            await self.move(left[-1], "decode-1")
            right.append(left.pop())
        while len(right) > len(names) // 2:
            await self.move(right[-1], "decode-0")
            left.append(right.pop())
        return left, right

    async def moved_answer(
        self, prompt: Sequence[int], *, name: str, output_tokens: int, moves: Sequence[int], found: Moved
    ) -> Outcome:
        """One request that is moved when it has written each of `moves` tokens, forth and back."""
        asked = asyncio.create_task(generate(self.inference, prompt, output_tokens=output_tokens, request_id=name))
        records = []
        for at in moves:
            place, tokens = await self.where(name)
            while tokens < at and not asked.done():
                await asyncio.sleep(0.01)
                place, tokens = await self.where(name)
            if asked.done():
                break
            try:
                records.append(await self.move(name, "decode-1" if place == "decode-0" else "decode-0"))
            except grpc.aio.AioRpcError as error:
                found.failed.append(str(error.details()))
                print(f"{name}: {error.details()}", file=sys.stderr)
        outcome = await asked
        if outcome.error:
            found.failed.append(outcome.error)
            return outcome
        step_ms = median(outcome.itls_ms)
        for record in records:
            if record.outcome != "moved":
                found.failed.append(f"{record.outcome}: {record.error}")
                print(f"{name}: {record.outcome}: {record.error}", file=sys.stderr)
                continue
            found.added_ms.append(record.pause_ms - step_ms)
            found.blocks.append(record.blocks)
        found.step_ms.append(step_ms)
        return outcome


async def gaps(
    cluster: LocalCluster,
    lengths: Sequence[int],
    *,
    requests: int,
    seed: int,
    found: dict[int, Moved],
    unmoved: dict[tuple[int, ...], Sequence[int]],
) -> None:
    """Per length: requests that are moved MOVES times each; before, those that stay, where not in `unmoved` yet."""
    draw = random.Random(seed)
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        bench = Bench(channel)
        for length in lengths:
            offered = [Offered(arrival_s=0, prompt_tokens=length, output_tokens=0)] * requests
            for number, prompt in enumerate(random_prompts(offered, vocab_size=VOCAB_SIZE, seed=seed + length)):
                if tuple(prompt) not in unmoved:
                    stays = await generate(bench.inference, prompt, output_tokens=OUTPUT_TOKENS)
                    unmoved[tuple(prompt)] = stays.token_ids
                goes = await bench.moved_answer(
                    prompt,
                    name=f"moved-{seed}-{length}-{number}",
                    output_tokens=OUTPUT_TOKENS,
                    moves=sorted(draw.sample(MOVE_AT, MOVES)),
                    found=found[length],
                )
                found[length].recomputed_ms.append(goes.ttft_ms)
                found[length].wrong += goes.token_ids != unmoved[tuple(prompt)]


async def pace(cluster: LocalCluster, *, seconds: float, every_s: float, seed: int) -> tuple[float, int]:
    """Median gap (ms) between tokens of two batches of four, two of which change places every `every_s`; and the moves.

    `every_s` 0: none does.
    """
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        bench = Bench(channel)
        offered = [Offered(arrival_s=0, prompt_tokens=256, output_tokens=0)] * 8
        names = [f"pace-{seed}-{every_s}-{index}" for index in range(8)]
        asked = [
            asyncio.create_task(generate(bench.inference, prompt, output_tokens=6000, request_id=name))
            for name, prompt in zip(names, random_prompts(offered, vocab_size=VOCAB_SIZE, seed=seed), strict=True)
        ]
        left, right = await bench.halves(names)
        begin = time.perf_counter()
        num_moves = 0
        while time.perf_counter() - begin < seconds:
            await asyncio.sleep(min(every_s or seconds, seconds))
            if every_s:
                going, coming = left.pop(0), right.pop(0)
                await asyncio.gather(bench.move(going, "decode-1"), bench.move(coming, "decode-0"))
                left.append(coming)
                right.append(going)
                num_moves += 2
        end = time.perf_counter()
        for name in names:
            await bench.inference.Cancel(inference_pb2.CancelRequest(request_id=name), timeout=10)
        outcomes = await asyncio.gather(*asked)
        gaps_ms = [
            (later - earlier) * 1000
            for outcome in outcomes
            for earlier, later in pairwise(outcome.token_times_s)
            if begin <= earlier and later <= end
        ]
        return fmean(gaps_ms), num_moves


def main() -> int:
    """Measures and writes benchmarks/results/migration.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 7680])
    parser.add_argument(
        "--requests", type=int, default=1, help=f"per length, way and repetition; each moves {MOVES} times"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pace-s", type=float, default=60, help="length of each run for the neighbours; 0: none")
    parser.add_argument("--pace-every-s", type=float, default=10)
    options = parser.parse_args()
    found = {way: {length: Moved() for length in options.lengths} for way in WAYS}
    unmoved: dict[tuple[int, ...], Sequence[int]] = {}
    slower: list[float] = []
    num_moves = 0
    for repeat in range(options.repeats):
        for way, arguments in WAYS.items():
            with LocalCluster([*COMMON, *arguments]) as cluster:
                seed = options.seed + repeat
                asyncio.run(
                    gaps(
                        cluster,
                        options.lengths,
                        requests=options.requests,
                        seed=seed,
                        found=found[way],
                        unmoved=unmoved,
                    )
                )
                if way == "live" and options.pace_s:
                    still, _ = asyncio.run(pace(cluster, seconds=options.pace_s, every_s=0, seed=seed))
                    moving, num = asyncio.run(
                        pace(cluster, seconds=options.pace_s, every_s=options.pace_every_s, seed=seed)
                    )
                    slower.append(moving / still - 1)
                    num_moves += num
    rows = []
    for way, lengths in found.items():
        for length, moved in lengths.items():
            rows.append(
                [
                    way, length, len(moved.added_ms), percentile(moved.step_ms, 0.5), percentile(moved.added_ms, 0.5),
                    percentile(moved.added_ms, 0.99), median(moved.blocks or [0]), moved.wrong, len(moved.failed),
                ]
            )  # fmt: skip
    for length in options.lengths:
        cold_ms = [each for lengths in found.values() for each in lengths[length].recomputed_ms]
        rows.append(["recompute", length, len(cold_ms), "", median(cold_ms), percentile(cold_ms, 0.99), 0, 0, 0])
    columns = ["way", "context tokens", "moves", "decode step ms", "added gap p50 ms", "added gap p99 ms"]
    body = report.table([*columns, "blocks moved", "wrong answers", "failed moves"], rows)
    body += (
        f"\n\n{options.repeats} repetitions in turn, each way on a fresh cluster of 1 prefill and 2 decode workers; "
        f"{MOVES} moves a request at random tokens, forth and back. Added gap: the router's pause between the last "
        "token before and the first after, less the request's own median gap. Recompute: time to the first token of as "
        "many tokens. float32, exact mode, greedy; wrong: answers that differ from the same prompt's unmoved answer.\n"
    )
    if slower:
        body += (
            f"\nNeighbours: with {num_moves} moves, two every {options.pace_every_s:.0f} s, the mean gap of tokens "
            f"of two batches of four changed by {median(slower):+.1%} (median of {len(slower)} pairs of "
            f"{options.pace_s:.0f} s; from {min(slower):+.1%} to {max(slower):+.1%}).\n"
        )
    report.write("migration", "Live migration", body, seed=options.seed, threads="1 a worker")
    return 0


if __name__ == "__main__":
    sys.exit(main())
