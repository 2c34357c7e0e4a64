"""What `tandem bench` does: offers a workload to a running cluster and prints what its requests saw."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.figures import Outcome, Slo, summary
from benchmarks.load import Metadata, Ongoing, offer
from benchmarks.report import table
from benchmarks.workload import BadWorkload, Offered, Scale, from_trace, random_prompts, uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """One run: the workload, its bounds and its seed."""

    address: str  # host:port of tandem.v1.Inference
    dial: Callable[[str], grpc.aio.Channel] = grpc.aio.insecure_channel
    metadata: Metadata = field(default=(), repr=False)  # an API key, where one is needed
    trace: Path | None = None
    num_requests: int = 50
    rate: float | None = 1.0
    prompt_tokens: int = 128
    output_tokens: int = 64
    spread: float = 0.5
    length_scale: float = 1.0
    prompt_tokens_max: int = 4096
    output_tokens_max: int = 512
    vocab_size: int = 32000
    slo: Slo = field(default_factory=lambda: Slo(ttft_ms=2000, tpot_ms=100))
    seed: int = 1


def workload(options: ServingOptions) -> list[Offered]:
    """The requests of a run; BadWorkload names what is wrong with the trace or the options."""
    if options.num_requests < 1:
        raise BadWorkload(f"requests: {options.num_requests} is below 1")
    if options.rate is not None and options.rate <= 0:
        raise BadWorkload(f"rate: {options.rate} is not above 0 requests per second")
    if options.trace is not None:
        if not options.trace.is_file():
            raise BadWorkload(f"trace: no file {options.trace}")
        scale = Scale(
            length=options.length_scale,
            rate=options.rate,
            prompt_tokens_max=options.prompt_tokens_max,
            output_tokens_max=options.output_tokens_max,
        )
        return from_trace(options.trace, num_requests=options.num_requests, scale=scale, seed=options.seed)
    return uniform(
        num_requests=options.num_requests,
        rate=options.rate or 1.0,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        spread=options.spread,
        seed=options.seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What came of a run: all figures as plain numbers, ready for JSON, and what they were made from."""

    figures: dict[str, Any]
    outcomes: list[Outcome]


def run(options: ServingOptions, *, progress: Callable[[Ongoing], None] | None = None) -> Served:
    """Offers the workload; `progress` hears how far it is."""
    offered = workload(options)
    prompts: Sequence[Sequence[int]] = random_prompts(offered, vocab_size=options.vocab_size, seed=options.seed)
    outcomes = asyncio.run(
        offer(options.address, offered, prompts, progress=progress, dial=options.dial, metadata=options.metadata)
    )
    figures = {
        "workload": {
            "trace": str(options.trace) if options.trace else None,
            "seed": options.seed,
            "rate": options.rate,
            "prompt_tokens_mean": round(sum(one.prompt_tokens for one in offered) / len(offered), 1),
            "output_tokens_mean": round(sum(one.output_tokens for one in offered) / len(offered), 1),
        },
        **summary(outcomes, slo=options.slo),
    }
    return Served(figures=figures, outcomes=outcomes)


def as_text(figures: dict[str, Any]) -> str:
    """The figures for a person: one table of percentiles, one line of goodput, the errors."""
    rows = [[name, *figures[name].values()] for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")]
    slo = figures["slo"]
    lines = [
        table(["ms", "mean", "p50", "p90", "p99"], rows),
        "",
        f"{figures['completed']} of {figures['requests']} requests in {figures['span_s']} s, "
        f"{figures['tokens_per_s']} output tokens/s",
        f"goodput {figures['goodput_per_s']}/s ({100 * figures['good_share']:.1f} % of all offered) under "
        f"TTFT <= {slo['ttft_ms']:.0f} ms and TPOT <= {slo['tpot_ms']:.0f} ms together",
        *(f"{count} x {error}" for error, count in figures["errors"].items()),
    ]
    return "\n".join(lines)


def to_json(figures: dict[str, Any]) -> str:
    """The figures for a program."""
    return json.dumps(figures, indent=2)
