"""Requests to offer: lengths and arrivals from a real trace or from a stated distribution.

Traces understood: Mooncake's JSON lines (timestamp in ms, input_length, output_length), Azure's CSV (TIMESTAMP,
ContextTokens, GeneratedTokens) and length-only CSVs (num_prefill_tokens, num_decode_tokens), which need `rate`.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tandem.errors import CommandError


class BadWorkload(CommandError, ValueError):
    """A trace cannot be read, or an option is out of range; the message says what to give."""

    exit_status = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """One request of a workload: when it arrives, how long its prompt is, how many tokens it asks for."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How a trace is fitted to the machine at hand; stated beside each result."""

    length: float = 1.0  # factor on prompt and output lengths
    rate: float | None = None  # requests per second; None keeps the trace's own arrivals
    prompt_tokens_max: int = 1024
    output_tokens_max: int = 128


def _azure_seconds(text: str) -> float:
    day, clock = text.split(" ")
    whole, _, fraction = clock.partition(".")
    return datetime.fromisoformat(f"{day}T{whole}").timestamp() + float(f"0.{fraction or 0}")


def _rows(path: Path) -> Iterator[tuple[float | None, int, int]]:
    """(arrival in seconds or None, prompt tokens, output tokens) of each row of a trace."""
    if path.suffix == ".jsonl":
        with path.open() as lines:
            for line in lines:
                row = json.loads(line)
                yield row["timestamp"] / 1000, row["input_length"], row["output_length"]
        return
    with path.open(newline="") as lines:
        reader = csv.DictReader(lines)
        fields = set(reader.fieldnames or ())
        for row in reader:
            if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= fields:
                yield _azure_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])
            elif {"num_prefill_tokens", "num_decode_tokens"} <= fields:
                yield None, int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])
            else:
                raise BadWorkload(
                    f"{path}: columns {sorted(fields)} are of no trace known here; needs timestamp/input_length/"
                    "output_length (JSON lines), TIMESTAMP/ContextTokens/GeneratedTokens, or "
                    "num_prefill_tokens/num_decode_tokens"
                )


def from_trace(path: Path, *, num_requests: int, scale: Scale, seed: int) -> list[Offered]:
    """The first `num_requests` of a trace, scaled. Length-only traces arrive as a Poisson process of `scale.rate`.

    With a rate, a trace's own arrivals are stretched to it as a whole, so that its burstiness stays.
    """
    rows = []
    for row in _rows(path):
        rows.append(row)
        if len(rows) == num_requests:
            break
    if not rows:
        raise BadWorkload(f"{path}: the trace is empty")
    arrivals = [row[0] for row in rows]
    timed = [at for at in arrivals if at is not None]
    if len(timed) == len(rows) and timed[-1] > timed[0]:
        stretch = 1.0 if scale.rate is None else (len(rows) / scale.rate) / (timed[-1] - timed[0])
        times = [(at - timed[0]) * stretch for at in timed]
    elif scale.rate is None:
        raise BadWorkload(f"{path}: has no arrival times; state a rate in requests per second")
    else:
        times = poisson(len(rows), rate=scale.rate, seed=seed)
    return [
        Offered(
            arrival_s=at,
            prompt_tokens=max(1, min(scale.prompt_tokens_max, round(row[1] * scale.length))),
            output_tokens=max(1, min(scale.output_tokens_max, round(row[2] * scale.length))),
        )
        for at, row in zip(times, rows, strict=True)
    ]


def poisson(num: int, *, rate: float, seed: int) -> list[float]:
    """Arrival times in seconds of a Poisson process with `rate` per second, starting at 0."""
    source = random.Random(seed)
    times = [0.0]
    while len(times) < num:
        times.append(times[-1] + source.expovariate(rate))
    return times[:num]


def uniform(
    *, num_requests: int, rate: float, prompt_tokens: int, output_tokens: int, spread: float, seed: int
) -> list[Offered]:
    """Poisson arrivals; lengths uniform within +- `spread` (a share of the mean)."""
    source = random.Random(seed + 1)

    def draw(mean: int) -> int:
        return max(1, round(mean * (1 + spread * (2 * source.random() - 1))))

    return [
        Offered(arrival_s=at, prompt_tokens=draw(prompt_tokens), output_tokens=draw(output_tokens))
        for at in poisson(num_requests, rate=rate, seed=seed)
    ]


def random_prompts(offered: Sequence[Offered], *, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    """Token ids for each request, with nothing in common: what is measured is not a prefix cache."""
    source = random.Random(seed + 2)
    low = min(1000, vocab_size // 2)  # the lowest ids are special tokens in many vocabularies
    return [tuple(source.randrange(low, vocab_size) for _ in range(one.prompt_tokens)) for one in offered]
