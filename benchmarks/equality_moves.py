"""Tokens of requests that are moved one to five times each, against the same requests left where they were.

Half of the requests are greedy, half sampled with a seed of their own, eight at once, moved by command at random tokens
between two decode workers. The model is SmolLM2, and a random one of little compute whose KV is heavy. In exact mode a
token that differs is an error; with bfloat16 it is counted, beside what batching alone makes differ.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from benchmarks import fat_kv_model, report
from benchmarks.figures import Outcome
from benchmarks.load import generate, migrate
from benchmarks.local_cluster import LocalCluster
from engine.model_files import DEFAULT_MODEL
from tandem.v1 import admin_pb2_grpc, inference_pb2_grpc

VOCAB_SIZES = {DEFAULT_MODEL: 49152, fat_kv_model.NAME: fat_kv_model.VOCAB_SIZE}
OUTPUT_TOKENS = {DEFAULT_MODEL: (48, 96), fat_kv_model.NAME: (400, 700)}  # its steps are short: time for moves
RETRY_S = 0.05
SHAPE = ["--prefill", "1", "--decode", "2", "--threads", "1", "--no-rebalance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request, and the numbers of tokens after which it is to move."""

    prompt: tuple[int, ...]
    output_tokens: int
    temperature: float
    seed: int
    moves_at: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Tally:
    """What one comparison came to."""

    model: str
    dtype: str
    what: str
    requests: int = 0
    tokens: int = 0
    same_requests: int = 0
    moved_requests: int = 0
    moves: int = 0
    moves_failed: int = 0
    first_differences: list[int] = field(default_factory=list)  # index of the first token that differs
    errors: list[str] = field(default_factory=list)


def draw(model: str, num: int, *, seed: int) -> list[Asked]:
    """`num` requests, the same for the same seed."""
    rng = random.Random(seed)
    asked = []
    for number in range(num):
        output_tokens = rng.randint(*OUTPUT_TOKENS[model])
        asked.append(
            Asked(
                prompt=tuple(rng.randrange(17, VOCAB_SIZES[model]) for _ in range(rng.randint(4, 300))),
                output_tokens=output_tokens,
                temperature=0.0 if number % 2 else 0.9,
                seed=rng.randrange(1 << 32),
                moves_at=tuple(sorted(rng.sample(range(2, output_tokens - 12), rng.randint(1, 5)))),
            )
        )
    return asked


class Mover:
    """Moves one request, again and again, while its tokens come."""

    def __init__(self, admin: admin_pb2_grpc.AdminStub, name: str, moves_at: tuple[int, ...]) -> None:
        self._admin = admin
        self._name = name
        self._moves_at = moves_at
        self._came = 0
        self._more = asyncio.Event()
        self.moved = 0
        self.failed = 0

    def on_tokens(self, num: int) -> None:
        """So many tokens have come."""
        self._came = num
        self._more.set()

    async def run(self) -> None:
        """One move after the other. A refusal, mostly of a worker that is busy with another move, is tried again."""
        for at in self._moves_at:
            while self._came < at:
                self._more.clear()
                await self._more.wait()
            while not await self._move():
                await asyncio.sleep(RETRY_S)

    async def _move(self) -> bool:
        try:
            move = await migrate(self._admin, self._name)
        except grpc.aio.AioRpcError:
            return False
        self.moved += move.outcome == "moved"
        self.failed += move.outcome != "moved"
        return True


async def answers(
    address: str, asked: list[Asked], *, name: str, moves: bool, at_once: int, tally: Tally
) -> list[Outcome]:
    """All requests, so many at once; with `moves` they are moved."""
    async with grpc.aio.insecure_channel(address) as channel:
        inference = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        admin = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        room = asyncio.Semaphore(at_once)

        async def one(number: int, wanted: Asked) -> Outcome:
            async with room:
                mover = Mover(admin, f"{name}-{number}", wanted.moves_at if moves else ())
                moving = asyncio.create_task(mover.run())
                outcome = await generate(
                    inference,
                    wanted.prompt,
                    output_tokens=wanted.output_tokens,
                    seed=wanted.seed,
                    temperature=wanted.temperature,
                    request_id=f"{name}-{number}",
                    on_tokens=mover.on_tokens,
                )
                moving.cancel()  # what had not come to its turn before the last token
                with suppress(asyncio.CancelledError):  # a mistake of the mover's own is not to pass for no move
                    await moving
                tally.moved_requests += mover.moved > 0
                tally.moves += mover.moved
                tally.moves_failed += mover.failed
                return outcome

        return await asyncio.gather(*(one(number, wanted) for number, wanted in enumerate(asked)))


def compare(tally: Tally, stayed: list[Outcome], others: list[Outcome]) -> None:
    """Adds the comparison of two passes over the same requests."""
    for number, (one, other) in enumerate(zip(stayed, others, strict=True)):
        tally.requests += 1
        tally.tokens += len(one.token_ids)
        for outcome in (one, other):
            if outcome.error:
                tally.errors.append(f"request {number}: {outcome.error}")
        if one.token_ids == other.token_ids:
            tally.same_requests += 1
            continue
        pairs = zip(one.token_ids, other.token_ids, strict=False)
        tally.first_differences.append(next((at for at, (a, b) in enumerate(pairs) if a != b), len(other.token_ids)))


def run(model: str, label: str, dtype: str, asked: list[Asked], *, at_once: int) -> list[Tally]:
    """A fresh cluster: unmoved, unmoved again, moved."""
    exact = "--exact" if dtype == "float32" else "--no-exact"
    again = Tally(model=label, dtype=dtype, what="unmoved, again")
    moved = Tally(model=label, dtype=dtype, what="moved")
    with LocalCluster([*SHAPE, "--model", model, "--dtype", dtype, exact]) as cluster:
        address = cluster.grpc_address
        stayed = asyncio.run(answers(address, asked, name="a", moves=False, at_once=at_once, tally=again))
        if dtype != "float32":
            second = asyncio.run(answers(address, asked, name="b", moves=False, at_once=at_once, tally=again))
            compare(again, stayed, second)
        went = asyncio.run(answers(address, asked, name="c", moves=True, at_once=at_once, tally=moved))
        compare(moved, stayed, went)
        for worker in cluster.status()["workers"]:
            blocks = worker["kv_blocks"]
            if blocks["free"] + blocks["cached"] != blocks["total"] or worker["audit"]:
                moved.errors.append(f"{worker['id']}: blocks left over: {blocks} {worker['audit']}")
    return [moved] if dtype == "float32" else [again, moved]


def main() -> int:
    """Runs all and writes benchmarks/results/equality_moves.md; exit status 1 when a token of exact mode differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300, help="of each model; bfloat16 takes a fifth")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    tallies = []
    with tempfile.TemporaryDirectory() as folder:
        folders = {DEFAULT_MODEL: DEFAULT_MODEL, fat_kv_model.NAME: str(fat_kv_model.write(Path(folder)))}
        for name, dtype in ((DEFAULT_MODEL, "float32"), (fat_kv_model.NAME, "float32"), (DEFAULT_MODEL, "bfloat16")):
            num = options.requests if dtype == "float32" else max(1, options.requests // 5)
            asked = draw(name, num, seed=options.seed)
            tallies += run(folders[name], name, dtype, asked, at_once=options.at_once)
    rows = [
        [
            t.model, t.dtype, t.what, t.requests, t.tokens, t.moved_requests, t.moves, t.moves_failed,
            t.same_requests,
            min(t.first_differences, default=""), len(t.errors),
        ]
        for t in tallies
    ]  # fmt: skip
    body = report.table(
        [
            "model", "dtype", "compared with unmoved", "requests", "tokens", "of them moved", "moves", "moves failed",
            "same requests", "earliest difference", "errors",
        ],
        rows,
    )  # fmt: skip
    wrong = [f"{t.model}: {line}" for t in tallies for line in t.errors]
    wrong += [
        f"{t.model}: {t.requests - t.same_requests} requests differ"
        for t in tallies
        if t.dtype == "float32" and t.same_requests != t.requests
    ]
    wrong += [  # equal tokens say nothing of requests that stayed
        f"{t.model} {t.dtype}: only {t.moved_requests} of {t.requests} requests were moved"
        for t in tallies
        if t.what == "moved" and t.moved_requests < 0.9 * t.requests
    ]
    body += (
        f"\n\n1 prefill and 2 decode workers, {options.at_once} requests at once, half greedy, half sampled at "
        "temperature 0.9; one to five moves a request at random tokens, by command. float32 runs in exact mode: all "
        "must be the same. bfloat16 is not exact: batches alone make answers differ, as its first row shows.\n"
    )
    body += "\n".join(["", "WRONG:", *(f"- {line}" for line in wrong[:50])]) if wrong else ""
    report.write("equality_moves", "Tokens of moved requests", body, seed=options.seed, threads="1 a worker")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
