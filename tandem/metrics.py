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
    BYTES = "bytes"
    BLOCKS = "blocks"
    STEPS = "steps"
    ATTEMPTS = "attempts"
    MIGRATIONS = "migrations"
    WORKERS = "workers"
    ROUTERS = "routers"
    PAIRS = "pairs"
    FRAMES = "frames"
    FINDINGS = "findings"


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
    "mode": "prefill (two workers and a handoff) or local (one)",
    "cause": "worker_gone, handoff_failed, reported, overdue, broken_word or fence",
    "reason": "operator, drain, pressure, priority, balance or defragment",
    "result": "moved, failed (the request runs on where it was) or ended (the request itself did)",
    "phase": "precopy, fence or pause",
    "how": "moved, or reused: the target had it",
    "slo_class": "a class of tandem.request.SloClass, or none",
    "slo": "met, or what was missed: ttft, tpot, both, or failed: no whole answer came",
    "worker": "the name of a worker; a pool has at most 64",
    "role": "prefill, decode or mixed",
    "state": "of a worker: joining, ready, suspect, draining, left or dead; of blocks: free, cached, owned, exported, "
    "granted or quarantined; of a router: answering or silent",
    "what": "swapped_out, brought_back or recomputed",
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

TPOT_SECONDS = Metric(
    name="tandem_router_tpot_seconds",
    kind=MetricKind.HISTOGRAM,
    unit=Unit.SECONDS,
    buckets=_ITL_BUCKETS,
    help="Time between two tokens of an answer, on average over the answer; of those with two or more.",
)
WAITING_REQUESTS = Metric(
    name="tandem_router_waiting_requests",
    kind=MetricKind.GAUGE,
    unit=Unit.REQUESTS,
    help="Requests in line: admitted, and no worker has them.",
)
QUEUED_TOKENS = Metric(
    name="tandem_router_queued_tokens",
    kind=MetricKind.GAUGE,
    unit=Unit.TOKENS,
    help="Prompt tokens of the requests whose first token is to come.",
)
PLACEMENTS_TOTAL = Metric(
    name="tandem_router_placed_attempts_total",
    kind=MetricKind.COUNTER,
    unit=Unit.ATTEMPTS,
    labels=("mode",),
    help="Times that a request was given to workers.",
)
RECOVERIES_TOTAL = Metric(
    name="tandem_router_lost_attempts_total",
    kind=MetricKind.COUNTER,
    unit=Unit.ATTEMPTS,
    labels=("cause",),
    help="Attempts that were lost; each such request was placed anew.",
)
HANDOFF_SECONDS = Metric(
    name="tandem_router_handoff_seconds",
    kind=MetricKind.HISTOGRAM,
    unit=Unit.SECONDS,
    buckets=_ITL_BUCKETS,
    help="From a request's first token until a decode worker owned it.",
)
TRANSFERRED_BYTES = Metric(
    name="tandem_router_transferred_bytes_total",
    kind=MetricKind.COUNTER,
    unit=Unit.BYTES,
    help="KV bytes that handoffs and migrations brought to their targets.",
)
TRANSFERRED_BLOCKS = Metric(
    name="tandem_router_transferred_blocks_total",
    kind=MetricKind.COUNTER,
    unit=Unit.BLOCKS,
    labels=("how",),
    help="KV blocks of handoffs and migrations that were moved, or that their targets had already.",
)
PREFIX_QUERIES = Metric(
    name="tandem_router_prefix_queried_tokens_total",
    kind=MetricKind.COUNTER,
    unit=Unit.TOKENS,
    help="Prompt tokens that were looked for in a prefix cache.",
)
PREFIX_HITS = Metric(
    name="tandem_router_prefix_hit_tokens_total",
    kind=MetricKind.COUNTER,
    unit=Unit.TOKENS,
    help="Prompt tokens that were found in a prefix cache.",
)
RECOMPUTED_TOKENS = Metric(
    name="tandem_router_recomputed_tokens_total",
    kind=MetricKind.COUNTER,
    unit=Unit.TOKENS,
    help="Prompt and delivered tokens that a decode worker had to run itself.",
)
MIGRATIONS_TOTAL = Metric(
    name="tandem_router_migrations_total",
    kind=MetricKind.COUNTER,
    unit=Unit.MIGRATIONS,
    labels=("reason", "result"),
    help="Moves of running requests that were begun, by how they ended.",
)
MIGRATION_SECONDS = Metric(
    name="tandem_router_migration_seconds",
    kind=MetricKind.HISTOGRAM,
    unit=Unit.SECONDS,
    labels=("phase",),
    buckets=_ITL_BUCKETS,
    help="Of moves that came about: copying while the request ran, its standing still until the target owned it, and "
    "the pause that its client saw.",
)
MIGRATION_BYTES = Metric(
    name="tandem_router_migration_bytes_total",
    kind=MetricKind.COUNTER,
    unit=Unit.BYTES,
    labels=("reason",),
    help="KV bytes that moves copied.",
)
SLO_REQUESTS = Metric(
    name="tandem_router_slo_requests_total",
    kind=MetricKind.COUNTER,
    unit=Unit.REQUESTS,
    labels=("slo_class", "slo"),
    help="Requests that ended, but for cancelled ones, by whether they met their targets; those met are the goodput.",
)
STORE_AWAY_SECONDS = Metric(
    name="tandem_router_store_away_seconds",
    kind=MetricKind.GAUGE,
    unit=Unit.SECONDS,
    help="For how long the store that routers share has not answered; 0 while it does, and where there is none.",
)
LOOP_LATE_SECONDS = Metric(
    name="tandem_router_loop_late_seconds",
    kind=MetricKind.HISTOGRAM,
    unit=Unit.SECONDS,
    buckets=_ITL_BUCKETS,
    help="How late the router's event loop came to what is due each second: all that it does waits as long.",
)
CPU_SECONDS = Metric(
    name="tandem_router_cpu_seconds_total",
    kind=MetricKind.COUNTER,
    unit=Unit.SECONDS,
    help="Processor time of the router's process; its event loop has one core at most.",
)
RESIDENT_BYTES = Metric(
    name="tandem_router_resident_bytes",
    kind=MetricKind.GAUGE,
    unit=Unit.BYTES,
    help="Memory of the router's process that is resident.",
)
READY_PAIRS = Metric(
    name="tandem_router_ready_pairs",
    kind=MetricKind.GAUGE,
    unit=Unit.PAIRS,
    help="Pairs of workers that have served lately.",
)
ROUTERS = Metric(
    name="tandem_routers",
    kind=MetricKind.GAUGE,
    unit=Unit.ROUTERS,
    labels=("state",),
    help="Routers of the cluster, by whether their metrics are on this page: a silent one did not answer in time.",
)
WORKERS = Metric(
    name="tandem_workers",
    kind=MetricKind.GAUGE,
    unit=Unit.WORKERS,
    labels=("role", "state"),
    help="Workers by role and state.",
)
WORKER_BLOCKS = Metric(
    name="tandem_worker_kv_blocks",
    kind=MetricKind.GAUGE,
    unit=Unit.BLOCKS,
    labels=("worker", "role", "state"),
    help="KV blocks of a worker by state; they sum to its pool.",
)
WORKER_RUNNING = Metric(
    name="tandem_worker_running_requests",
    kind=MetricKind.GAUGE,
    unit=Unit.REQUESTS,
    labels=("worker", "role"),
    help="Requests in a worker's batch.",
)
WORKER_WAITING = Metric(
    name="tandem_worker_waiting_requests",
    kind=MetricKind.GAUGE,
    unit=Unit.REQUESTS,
    labels=("worker", "role"),
    help="Requests that wait at a worker.",
)
WORKER_BACKLOG = Metric(
    name="tandem_worker_backlog_tokens",
    kind=MetricKind.GAUGE,
    unit=Unit.TOKENS,
    labels=("worker", "role"),
    help="Prompt tokens that a worker has yet to run.",
)
WORKER_STEPS = Metric(
    name="tandem_worker_steps_total",
    kind=MetricKind.COUNTER,
    unit=Unit.STEPS,
    labels=("worker", "role"),
    help="Steps of a worker since it started.",
)
WORKER_STEP_SECONDS = Metric(
    name="tandem_worker_last_step_seconds",
    kind=MetricKind.GAUGE,
    unit=Unit.SECONDS,
    labels=("worker", "role"),
    help="How long a worker's newest step took.",
)
WORKER_SWAP_BLOCKS = Metric(
    name="tandem_worker_swap_blocks",
    kind=MetricKind.GAUGE,
    unit=Unit.BLOCKS,
    labels=("worker", "role"),
    help="Blocks of host memory that a worker's KV is swapped out to.",
)
WORKER_PREEMPTED = Metric(
    name="tandem_worker_preempted_requests_total",
    kind=MetricKind.COUNTER,
    unit=Unit.REQUESTS,
    labels=("worker", "role", "what"),
    help="Requests that lost their blocks for want of memory, by what became of them, since the worker started.",
)
WORKER_DAMAGED = Metric(
    name="tandem_worker_damaged_frames_total",
    kind=MetricKind.COUNTER,
    unit=Unit.FRAMES,
    labels=("worker", "role"),
    help="Frames of KV that arrived at a worker's agent and did not check, since the worker started; none was used.",
)
WORKER_AUDIT = Metric(
    name="tandem_worker_audit_findings",
    kind=MetricKind.GAUGE,
    unit=Unit.FINDINGS,
    labels=("worker", "role"),
    help="What a worker's own audit of its blocks found wrong: above 0 is a bug.",
)

ROUTER_METRICS: tuple[Metric, ...] = (
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
    TPOT_SECONDS,
    WAITING_REQUESTS,
    QUEUED_TOKENS,
    PLACEMENTS_TOTAL,
    RECOVERIES_TOTAL,
    HANDOFF_SECONDS,
    TRANSFERRED_BYTES,
    TRANSFERRED_BLOCKS,
    PREFIX_QUERIES,
    PREFIX_HITS,
    RECOMPUTED_TOKENS,
    MIGRATIONS_TOTAL,
    MIGRATION_SECONDS,
    MIGRATION_BYTES,
    SLO_REQUESTS,
    STORE_AWAY_SECONDS,
    LOOP_LATE_SECONDS,
    CPU_SECONDS,
    RESIDENT_BYTES,
)
# Told once, by the router that answers: each would say the same.
CLUSTER_METRICS: tuple[Metric, ...] = (
    READY_PAIRS,
    ROUTERS,
    WORKERS,
    WORKER_BLOCKS,
    WORKER_RUNNING,
    WORKER_WAITING,
    WORKER_BACKLOG,
    WORKER_STEPS,
    WORKER_STEP_SECONDS,
    WORKER_SWAP_BLOCKS,
    WORKER_PREEMPTED,
    WORKER_DAMAGED,
    WORKER_AUDIT,
)

METRICS = ROUTER_METRICS + CLUSTER_METRICS
