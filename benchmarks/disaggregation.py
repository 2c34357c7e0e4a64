"""What disaggregation adds: TTFT against the same engine as one mixed worker, the gap before the second token, overlap.

Both clusters run side by side and are asked in turn (A/B/B/A), idle but for the one request, so that noise of the
machine meets both. The gap before the second token is set against the request's own median decode step, and the
handoff delay is that gap less the very step that ended it, as the decode worker timed it: from the first token, drawn
by the prefill worker, to the beginning of the decode worker's first step.

Before each timed request the same cluster answers some short ones, so that both begin equally warm. Hosts of virtual
machines take memory from idle guests: the first pass over half a gigabyte of weights costs 12 ms more after a second of
idleness, 40 ms after eight, in any process. And of the last processes that ran the processor's cache keeps weights:
a mixed worker that has just decoded finds its own there, a prefill worker those of the decode worker.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from statistics import median

import grpc

from benchmarks import report
from benchmarks.figures import Outcome
from benchmarks.load import generate
from benchmarks.local_cluster import LocalCluster
from benchmarks.workload import Offered, random_prompts
from tandem.v1 import inference_pb2_grpc

OUTPUT_TOKENS = 17
WARMING = (4, 1, 1, 1, 1, 1, 1)  # output tokens: both workers, then the one that begins
CHUNK_TOKENS = 256  # the default


async def ask(address: str, prompt: Sequence[int], name: str = "", *, output_tokens: int = OUTPUT_TOKENS) -> Outcome:
    """One greedy request on an idle cluster."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        outcome = await generate(stub, prompt, output_tokens=output_tokens, request_id=name)
    if outcome.error:
        raise RuntimeError(outcome.error)
    return outcome


def measure(
    split: LocalCluster, mixed: LocalCluster, *, prompt_tokens: int, repeats: int, seed: int
) -> tuple[list[Outcome], list[Outcome], list[float]]:
    """Outcomes of both clusters for `repeats` prompts, no two alike, and the handoff delays in milliseconds.

    The first pair warms up and is dropped.
    """
    offered = [Offered(arrival_s=0, prompt_tokens=prompt_tokens, output_tokens=OUTPUT_TOKENS)] * (repeats + 1)
    ours: list[Outcome] = []
    theirs: list[Outcome] = []
    names = [f"handoff-{prompt_tokens}-{number}" for number in range(repeats + 1)]
    turns = [(split, ours), (mixed, theirs)]
    for name, prompt in zip(names, random_prompts(offered, vocab_size=49152, seed=seed + prompt_tokens), strict=True):
        turns.reverse()
        for cluster, outcomes in turns:
            for output_tokens in WARMING:
                asyncio.run(ask(cluster.grpc_address, prompt[:-17:-1], output_tokens=output_tokens))
            outcomes.append(asyncio.run(ask(cluster.grpc_address, prompt, name)))
    first_step_ms = {one["id"]: one["first_step_ms"] for one in split.status()["requests"]}
    delays = [one.itls_ms[0] - first_step_ms[name] for one, name in zip(ours, names, strict=True)]
    return ours[1:], theirs[1:], delays[1:]


def main() -> int:
    """Measures and writes benchmarks/results/disaggregation.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--repeats", type=int, nargs="+", default=[21, 5], help="for each number of prompt tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--transport", default="auto")
    arguments = parser.parse_args()
    common = ["--dtype", "float32", "--exact", "--threads", "1", "--transport", arguments.transport]
    rows = []
    with (
        LocalCluster([*common, "--prefill", "1", "--decode", "1"]) as split,
        LocalCluster([*common, "--prefill", "0", "--decode", "0", "--mixed", "1"]) as mixed,
    ):
        for prompt_tokens, repeats in zip(arguments.prompt_tokens, arguments.repeats, strict=True):
            ours, theirs, delays = measure(
                split, mixed, prompt_tokens=prompt_tokens, repeats=repeats, seed=arguments.seed
            )
            step_ms = median([gap for one in ours for gap in one.itls_ms[1:]])
            gap_ms = median([one.itls_ms[0] for one in ours])
            ttft, ttft_mixed = median([o.ttft_ms for o in ours]), median([o.ttft_ms for o in theirs])
            added = median([a.ttft_ms - b.ttft_ms for a, b in zip(ours, theirs, strict=True)])
            rows.append([prompt_tokens, ttft, ttft_mixed, added, gap_ms, step_ms, gap_ms - step_ms, median(delays)])
        status = split.status()
    body = report.table(
        [
            "prompt tokens", "TTFT ms", "TTFT mixed ms", "added TTFT ms (median of pairs)", "gap before 2nd token ms",
            "median decode step ms", "gap - step ms", "handoff delay ms",
        ],
        rows,
    )  # fmt: skip
    repeats = " / ".join(map(str, arguments.repeats))
    body += f"\n\n{repeats} interleaved repetitions, medians; float32, exact mode, one thread a worker.\n"
    if len(rows) > 1:
        body += f"Handoff delay at {rows[-1][0]} tokens: {rows[-1][7] / rows[0][7]:.2f} x that at {rows[0][0]} "
        body += f"(gap - step: {rows[-1][6] / rows[0][6]:.2f} x).\n"
    body += overlap(status)
    report.write("disaggregation", "What disaggregation adds", body, seed=arguments.seed, threads="1 a worker")
    return 0


def overlap(status: dict[str, list[dict[str, int]]]) -> str:
    """Whether the first frame left before the last chunk started, for each request of four chunks or more."""
    told = [one for one in status["requests"] if one["prompt_tokens"] >= 4 * CHUNK_TOKENS]
    early = [one for one in told if one["first_frame_ms"] < one["last_chunk_start_ms"]]
    share = f"{len(early)} of {len(told)} requests of four chunks or more"
    return f"First frame sent before the last chunk started: {share}.\n"


if __name__ == "__main__":
    sys.exit(main())
