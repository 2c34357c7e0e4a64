"""The CPU kernels beside torch and memcpy, interleaved: `python -m benchmarks.kernels` prints one table.

Each figure is the median over rounds of one call (of several where a call is short), with both sides in every round;
the clock is the thread's CPU time, so that another process on the core does not count, though its memory traffic does.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks import report
from kernels import build
from kernels.gemm import linear, pack_weight
from kernels.kv_copy import copy_and_hash
from kernels.paged_attention import paged_attention

# SmolLM2-135M: (name, N, K)
PRODUCTS = [
    ("qkv", 960, 576),
    ("o", 576, 576),
    ("gate_up", 3072, 576),
    ("down", 576, 1536),
    ("lm_head", 49152, 576),
]
ROW_COUNTS = (1, 4, 16, 64, 256)
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
SCALE = HEAD_DIM**-0.5
SHORTEST_S = 0.002
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One comparison: medians in seconds of ours and theirs, and what a call moves or computes."""

    name: str
    ours_s: float
    theirs_s: float
    rate: str


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of CPU time of one call of each, in alternation."""
    sides = (ours, theirs)
    counts = []
    for side in sides:
        side()
        begin = time.perf_counter()
        side()
        counts.append(max(1, int(SHORTEST_S / max(time.perf_counter() - begin, 1e-7))))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, count, taken in zip(sides, counts, times, strict=True):
            begin = time.thread_time()
            for _ in range(count):
                side()
            taken.append((time.thread_time() - begin) / count)
    return statistics.median(times[0]), statistics.median(times[1])


def products(rounds: int) -> Iterator[Line]:
    """linear in exact mode against F.linear, float32."""
    for name, num_outputs, num_inputs in PRODUCTS:
        weight = torch.randn(num_outputs, num_inputs)
        packed = pack_weight(weight, exact=True)
        for rows in ROW_COUNTS:
            x, out = torch.randn(rows, num_inputs), torch.empty(rows, num_outputs)
            ours, theirs = compare(
                lambda x=x, out=out, packed=packed: linear(x, packed, out=out),  # type: ignore[misc]
                lambda x=x, weight=weight: F.linear(x, weight),  # type: ignore[misc]
                rounds,
            )
            gflops = 2e-9 * rows * num_outputs * num_inputs / ours
            gbytes = 4e-9 * num_outputs * num_inputs / ours
            rate = f"{gbytes:.1f} GB/s" if rows == 1 else f"{gflops:.0f} GFLOP/s"
            yield Line(name=f"{name} {num_outputs}x{num_inputs} M={rows}", ours_s=ours, theirs_s=theirs, rate=rate)


def attention(rounds: int, dtype: torch.dtype) -> Iterator[Line]:
    """Paged attention against scaled_dot_product_attention over K and V that already lie contiguous."""
    for num, new, context in (
        (1, 1, 1024),
        (16, 1, 256),
        (16, 1, 1024),
        (1, 512, 512),
        (1, 2048, 2048),
        (1, 256, 2048),
    ):
        blocks = num * (context // BLOCK_SIZE)
        pool = torch.randn(blocks, 1, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(dtype)
        tables = torch.randperm(blocks).to(torch.int32).view(num, -1)
        starts = torch.full((num,), context - new, dtype=torch.int32)
        lengths = torch.full((num,), new, dtype=torch.int32)
        q = torch.randn(num * new, HEADS, HEAD_DIM).to(dtype)
        queries = q.view(num, new, HEADS, HEAD_DIM).transpose(1, 2).contiguous()
        keys, values = torch.randn(2, num, KV_HEADS, context, HEAD_DIM).to(dtype)
        mask = torch.ones(new, context, dtype=torch.bool).tril(context - new) if 1 < new < context else None
        causal = new == context
        ours, theirs = compare(
            lambda q=q, pool=pool, t=tables, s=starts, n=lengths: paged_attention(q, pool, 0, t, s, n, SCALE),  # type: ignore[misc]
            lambda q=queries, k=keys, v=values, m=mask, c=causal: F.scaled_dot_product_attention(  # type: ignore[misc]
                q, k, v, attn_mask=m, is_causal=c, enable_gqa=True
            ),
            rounds,
        )
        if new == 1:
            rate = f"{pool.numel() * pool.element_size() / ours / 1e9:.1f} GB/s"
        else:
            pairs = new * (context - new) + new * (new + 1) / 2
            rate = f"{4e-9 * HEADS * HEAD_DIM * pairs / ours:.0f} GFLOP/s"
        name = f"attention {str(dtype)[6:]} {num} x {new} new of {context}"
        yield Line(name=name, ours_s=ours, theirs_s=theirs, rate=rate)


def copies(rounds: int) -> Iterator[Line]:
    """copy_and_hash against memcpy, each over 64 MiB so that caches help neither."""
    total = 64 << 20
    source, target = torch.randint(0, 255, (total,), dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)
    to, origin = target.data_ptr(), source.data_ptr()
    for mib in (1, 4, 16):
        size = mib << 20
        offsets = range(0, total, size)

        def ours(size: int = size, offsets: range = offsets) -> None:
            for at in offsets:
                copy_and_hash(to + at, origin + at, size)

        def theirs(size: int = size, offsets: range = offsets) -> None:
            for at in offsets:
                ctypes.memmove(to + at, origin + at, size)

        ours_s, theirs_s = compare(ours, theirs, rounds)
        rate = f"{total / ours_s / 1e9:.1f} GB/s"
        yield Line(name=f"copy and hash 64 MiB by {mib} MiB", ours_s=ours_s, theirs_s=theirs_s, rate=rate)


def main() -> None:
    """Measures all, prints the table and writes it to benchmarks/results/kernels.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="at least 5")
    rounds = max(5, parser.parse_args().rounds)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    before = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    rows: list[tuple[str, str, str, float, str]] = []
    for source in (
        products(rounds), attention(rounds, torch.float32), attention(rounds, torch.bfloat16), copies(rounds),
    ):  # fmt: skip
        for line in source:
            ours, theirs = f"{line.ours_s * 1e6:.1f}", f"{line.theirs_s * 1e6:.1f}"
            rows.append((line.name, ours, theirs, line.theirs_s / line.ours_s, line.rate))
    note = (
        f"Kernels {build.description()}, {(build.levels() or ['torch'])[0]}. Against F.linear, "
        "scaled_dot_product_attention on contiguous K and V, and memcpy (which does not hash). Medians of "
        f"{rounds} interleaved rounds of CPU time; ratios above 1: ours is faster. Load average at the start: {before}."
    )
    header = ("what", "ours, us", "theirs, us", "x theirs", "ours")
    report.write(
        "kernels", "CPU kernels against torch and memcpy", f"{note}\n\n{report.table(header, rows)}",
        seed=SEED, threads="1",
    )  # fmt: skip


if __name__ == "__main__":
    main()
