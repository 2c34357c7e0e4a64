"""The table of metrics: name, kind, unit, labels, help. Exporters and dashboards are made from it or tested against it.

Labels are bounded: each takes its values from a closed set named here, never from what a client sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MetricKind(StrEnum):
    """How a metric behaves over time."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Unit(StrEnum):
    """What is counted; the name of the metric ends in it, counters in `_total` after it."""

    SECONDS = "seconds"
    TOKENS = "tokens"
    REQUESTS = "requests"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric. `buckets` are upper bounds, ascending, for histograms only."""

    name: str
    kind: MetricKind
    unit: Unit
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# The values that a label may take. `api` is the door a request came in by; `code` is a code of tandem.errors.
LABEL_VALUES: dict[str, str] = {
    "api": "chat, completions, grpc, or http for its other pages",
    "code": "a code of tandem.errors",
    "stage": "edge, line, retry, wire, queue, prefill, deliver, or other for the rest",
    "outcome": "stop, length, or a code of tandem.errors",
    "router": "the name of the router that counted; every metric has it",
}

_TTFT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)

REQUESTS_TOTAL = Metric(
    name="tandem_router_requests_total",
    kind=MetricKind.COUNTER,
    unit=Unit.REQUESTS,
    labels=("api", "outcome"),
    help="Requests that ended, by how; those refused at the edge are counted in refusals.",
)
REFUSALS_TOTAL = Metric(
    name="tandem_router_refused_requests_total",
    kind=MetricKind.COUNTER,
    unit=Unit.REQUESTS,
    labels=("api", "code"),
    help="Requests refused before any work was done for them, by error code.",
)
STRANGERS_TOTAL = Metric(
    name="tandem_router_refused_strangers_requests_total",
    kind=MetricKind.COUNTER,
    unit=Unit.REQUESTS,
    help="Calls to the registry that were refused: no join token, a wrong one, or another protocol version.",
)
WORKER_STRANGERS_TOTAL = Metric(
    name="tandem_router_refused_at_workers_requests_total",
    kind=MetricKind.COUNTER,
    unit=Unit.REQUESTS,
    help="What workers have refused, as their heartbeats say: calls without the join token, and links, messages and "
    "frames that were forged, replayed or strangers'. Each router hears of all workers.",
)
REQUESTS_RUNNING = Metric(
    name="tandem_router_running_requests",
    kind=MetricKind.GAUGE,
    unit=Unit.REQUESTS,
    help="Requests admitted and not yet ended.",
)
RESUMED_TOTAL = Metric(
    name="tandem_router_resumed_requests_total",
    kind=MetricKind.COUNTER,
    unit=Unit.REQUESTS,
    help="Times that a client came back for an answer, here or from another router.",
)
PROMPT_TOKENS_TOTAL = Metric(
    name="tandem_router_prompt_tokens_total",
    kind=MetricKind.COUNTER,
    unit=Unit.TOKENS,
    help="Prompt tokens of the requests admitted.",
)
GENERATED_TOKENS_TOTAL = Metric(
    name="tandem_router_generated_tokens_total",
    kind=MetricKind.COUNTER,
    unit=Unit.TOKENS,
    help="Answer tokens handed to clients.",
)
TTFT_SECONDS = Metric(
    name="tandem_router_ttft_seconds",
    kind=MetricKind.HISTOGRAM,
    unit=Unit.SECONDS,
    buckets=_TTFT_BUCKETS,
    help="From the request's arrival at the edge until its first token was handed to its client.",
)
TTFT_STAGE_SECONDS = Metric(
    name="tandem_router_ttft_stage_seconds",
    kind=MetricKind.HISTOGRAM,
    unit=Unit.SECONDS,
    labels=("stage",),
    buckets=_TTFT_BUCKETS,
    help="What the stages of TTFT took, each measured by itself; they add up to it.",
)
ITL_SECONDS = Metric(
    name="tandem_router_itl_seconds",
    kind=MetricKind.HISTOGRAM,
    unit=Unit.SECONDS,
    buckets=_ITL_BUCKETS,
    help="Gaps between the arrivals of a request's tokens; tokens that arrive together count as one arrival.",
)
E2E_SECONDS = Metric(
    name="tandem_router_e2e_seconds",
    kind=MetricKind.HISTOGRAM,
    unit=Unit.SECONDS,
    buckets=_E2E_BUCKETS,
    help="From the request's admission at the edge to its end.",
)

METRICS: tuple[Metric, ...] = (
    REQUESTS_TOTAL,
    REFUSALS_TOTAL,
    STRANGERS_TOTAL,
    WORKER_STRANGERS_TOTAL,
    REQUESTS_RUNNING,
    RESUMED_TOTAL,
    PROMPT_TOKENS_TOTAL,
    GENERATED_TOKENS_TOTAL,
    TTFT_SECONDS,
    TTFT_STAGE_SECONDS,
    ITL_SECONDS,
    E2E_SECONDS,
)
