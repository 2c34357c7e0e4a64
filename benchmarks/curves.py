"""The curves of a run, as points: how TTFT and TPOT are distributed, and the tokens that came over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.figures import Outcome, Slo

BUCKETS = 60  # of time, at most
BUCKET_S_LEAST = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One curve. `limit`: where on the x axis the bound of an SLO stands."""

    title: str
    x_label: str
    y_label: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    limit: float | None = None


def curves(outcomes: Sequence[Outcome], slo: Slo) -> list[Curve]:
    """Those that the outcomes have points for."""
    done = [one for one in outcomes if not one.error and one.token_times_s]
    tpots = [value for one in done if (value := one.tpot_ms) is not None]
    found = [
        distribution("TTFT", [one.ttft_ms for one in done], slo.ttft_ms),
        distribution("TPOT", tpots, slo.tpot_ms),
        throughput(outcomes),
    ]
    return [curve for curve in found if curve.xs]


def distribution(title: str, values_ms: Sequence[float], limit_ms: float) -> Curve:
    """The share of requests that took at most so long: from nothing, a step up at each value."""
    xs: list[float] = []
    ys: list[float] = []
    for number, value_ms in enumerate(sorted(values_ms)):
        xs += [value_ms, value_ms]
        ys += [number / len(values_ms), (number + 1) / len(values_ms)]
    return Curve(
        title=f"{title}: share of requests", x_label="ms", y_label="share", xs=tuple(xs), ys=tuple(ys), limit=limit_ms
    )


def throughput(outcomes: Sequence[Outcome]) -> Curve:
    """Tokens a second, in buckets of equal length from the first request's sending to the last token's coming."""
    times_s = sorted(at_s for one in outcomes for at_s in one.token_times_s)
    title = "output tokens a second"
    if not times_s:
        return Curve(title=title, x_label="s", y_label="tokens/s", xs=(), ys=())
    began_s = min(one.sent_s for one in outcomes)
    span_s = times_s[-1] - began_s
    num = max(1, min(BUCKETS, int(span_s / BUCKET_S_LEAST)))
    length_s = span_s / num if span_s > 0 else 1.0
    counts = [0] * num
    for at_s in times_s:
        counts[min(num - 1, int((at_s - began_s) / length_s))] += 1
    xs = tuple((number + 0.5) * length_s for number in range(num))
    return Curve(title=title, x_label="s", y_label="tokens/s", xs=xs, ys=tuple(each / length_s for each in counts))
