"""What TTFT is made of: the stages of many requests on SmolLM2, one at a time and several at once, and the residue.

Text prompts over HTTP, as clients send them. The client's own clock is beside: what it sees more than the router, which
is the way between them.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from dataclasses import dataclass

import grpc
import httpx

from benchmarks import report
from benchmarks.figures import percentile
from benchmarks.local_cluster import LocalCluster
from cluster.member_access import access_here
from tandem.v1 import admin_pb2, admin_pb2_grpc

WORDS = "the sea is a house of many rooms and no doors where old letters wait for someone to read them again".split()
ANSWER_TOKENS = 8
RESIDUE_SHARE_MAX = 0.05  # of TTFT, at p95


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its id, and how long its client waited for the first token."""

    request_id: str
    seen_ms: float


async def ask(client: httpx.AsyncClient, request_id: str, prompt: str) -> Asked:
    """Streams one answer to its end."""
    body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "stream": True, "ignore_eos": True}
    began_s, seen_ms = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/completions", json=body, headers={"x-request-id": request_id}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {") and not seen_ms:
                seen_ms = 1000 * (time.perf_counter() - began_s)
    return Asked(request_id, seen_ms)


async def measure(cluster: LocalCluster, *, num: int, at_once: int, draw: random.Random) -> list[Asked]:
    """`num` requests, `at_once` at a time, of 16 to 256 words."""
    prompts = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(16, 256))) for _ in range(num)]
    asked: list[Asked] = []
    waiting = iter(enumerate(prompts))

    async def client(own: httpx.AsyncClient) -> None:
        for number, prompt in waiting:
            asked.append(await ask(own, f"stages-{at_once}-{number}", prompt))

    async with httpx.AsyncClient(base_url=cluster.url, timeout=120) as own:
        await asyncio.gather(*(client(own) for _ in range(at_once)))
    return asked


def explained(cluster: LocalCluster, asked: list[Asked]) -> list[admin_pb2.FlightRecord]:
    """What the router remembers of each."""
    run = cluster.run_file()
    with grpc.insecure_channel(next(iter(run.internal.values()))) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        shown = access_here(run).metadata
        return [
            stub.Explain(admin_pb2.ExplainRequest(request_id=each.request_id), timeout=10, metadata=shown)
            for each in asked
        ]


def stages_of(records: list[admin_pb2.FlightRecord]) -> dict[str, list[float]]:
    """Milliseconds of each stage, over the requests."""
    found: dict[str, list[float]] = {}
    for record in records:
        for stage in record.stages:
            found.setdefault(stage.name, []).append(stage.ms)
    return found


def main() -> int:
    """Measures and writes benchmarks/results/ttft_stages.md; exit status 1 when too much is left over."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ttft_stages", description=__doc__)
    parser.add_argument("--requests", type=int, default=100, help="of each load")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4], help="requests at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="print only, and leave benchmarks/results as it is")
    flags = parser.parse_args()
    draw = random.Random(flags.seed)
    parts, worst = [], 0.0
    with LocalCluster() as cluster:
        asyncio.run(measure(cluster, num=8, at_once=4, draw=draw))  # warm
        for at_once in flags.at_once:
            asked = asyncio.run(measure(cluster, num=flags.requests, at_once=at_once, draw=draw))
            records = explained(cluster, asked)
            ttfts_ms = [each.ttft_ms for each in records]
            stages = stages_of(records)
            rows: list[list[object]] = [
                [name, percentile(times, 0.5), percentile(times, 0.95), f"{100 * sum(times) / sum(ttfts_ms):.1f} %"]
                for name, times in stages.items()
            ]
            rows.append(["TTFT", percentile(ttfts_ms, 0.5), percentile(ttfts_ms, 0.95), "100 %"])
            outside = [each.seen_ms - ttft_ms for each, ttft_ms in zip(asked, ttfts_ms, strict=True)]
            rows.append(["seen by the client beyond it", percentile(outside, 0.5), percentile(outside, 0.95), ""])
            shares = [other / ttft_ms for other, ttft_ms in zip(stages["other"], ttfts_ms, strict=True)]
            share = percentile(shares, 0.95)
            worst = max(worst, share)
            parts.append(
                f"## {at_once} at a time, {len(asked)} requests\n\n"
                + report.table(["stage", "p50 ms", "p95 ms", "of all TTFT"], rows)
                + f"\n\nOf a request's TTFT `other` is {100 * percentile(shares, 0.5):.1f} % at p50, "
                f"{100 * share:.1f} % at p95; at most {100 * RESIDUE_SHARE_MAX:.0f} % is wanted."
            )
    body = "\n\n".join(parts)
    if flags.no_write:
        print(body)
    else:
        report.write("ttft_stages", "Stages of TTFT", body, seed=flags.seed, threads="1 a worker")
    return 1 if worst > RESIDUE_SHARE_MAX else 0


if __name__ == "__main__":
    sys.exit(main())
