"""What a run amounts to: percentiles of TTFT, TPOT, ITL and end-to-end time, and joint goodput under SLOs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of one request. Times in seconds of one clock; `token_times_s[i]` is when token i arrived."""

    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    asked_tokens: int = 0
    error: str = ""

    @property
    def ttft_ms(self) -> float:
        """Request sent to first token received."""
        return (self.token_times_s[0] - self.sent_s) * 1000

    @property
    def e2e_ms(self) -> float:
        """Request sent to last token received."""
        return (self.token_times_s[-1] - self.sent_s) * 1000

    @property
    def tpot_ms(self) -> float | None:
        """(End-to-end - TTFT) / (tokens - 1); None for a single token."""
        num = len(self.token_times_s)
        return None if num < 2 else (self.e2e_ms - self.ttft_ms) / (num - 1)

    @property
    def itls_ms(self) -> list[float]:
        """Gaps between single tokens. Tokens that came in one message have a gap of 0."""
        times = self.token_times_s
        return [(later - earlier) * 1000 for earlier, later in pairwise(times)]


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest values; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """The bounds that a request must meet together to count as good."""

    ttft_ms: float
    tpot_ms: float


def is_good(outcome: Outcome, slo: Slo) -> bool:
    """True when the request ended well within both bounds. Refused, failed and short answers are misses."""
    if outcome.error or not outcome.token_times_s:
        return False
    tpot = outcome.tpot_ms
    return outcome.ttft_ms <= slo.ttft_ms and (tpot is None or tpot <= slo.tpot_ms)


def summary(outcomes: Sequence[Outcome], *, slo: Slo) -> dict[str, object]:
    """All figures of a run as plain numbers; `span_s` is first request sent to last token received."""
    done = [one for one in outcomes if not one.error and one.token_times_s]
    tpots = [value for one in done if (value := one.tpot_ms) is not None]
    itls = [gap for one in done for gap in one.itls_ms]
    series = {
        "ttft_ms": [one.ttft_ms for one in done],
        "tpot_ms": tpots,
        "itl_ms": itls,
        "e2e_ms": [one.e2e_ms for one in done],
    }
    span_s = max((one.token_times_s[-1] for one in done), default=0.0) - min(
        (one.sent_s for one in outcomes), default=0.0
    )
    good = sum(is_good(one, slo) for one in outcomes)
    errors: dict[str, int] = {}
    for one in outcomes:
        if one.error:
            errors[one.error] = errors.get(one.error, 0) + 1
    return {
        "requests": len(outcomes),
        "completed": len(done),
        "errors": errors,
        "span_s": round(span_s, 3),
        "output_tokens": sum(len(one.token_times_s) for one in done),
        "tokens_per_s": round(sum(len(one.token_times_s) for one in done) / span_s, 2) if span_s > 0 else 0.0,
        **{
            name: {
                "mean": round(fmean(values), 2) if values else None,
                **{f"p{int(100 * q)}": round(percentile(values, q), 2) if values else None for q in (0.5, 0.9, 0.99)},
            }
            for name, values in series.items()
        },
        "slo": {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms},
        "good_share": round(good / len(outcomes), 4) if outcomes else 0.0,
        "goodput_per_s": round(good / span_s, 4) if span_s > 0 else 0.0,
    }
