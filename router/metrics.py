"""Counts what the router's edge sees, under the names of tandem/metrics.py, and prints it for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import product
from typing import TypeVar, assert_never

import prometheus_client
import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from router.events import Cause, HandedOver, Note, Placed, Recovering
from router.lately import Counted, LastMinute, Lately, Timed
from router.move import MoveOutcome, MoveReason, MoveRecord
from router.recent import Recent
from router.stages import FirstToken, Stage
from tandem import metrics as table
from tandem.errors import ERRORS, TandemError
from tandem.messages import AssignMode, TransferStats
from tandem.metrics import Metric
from tandem.request import FinishReason, Slo, SloClass

_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
# The time at which each series began: as many lines again, for nobody.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class Api(StrEnum):
    """The door that a request came in by."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    GRPC = "grpc"
    HTTP = "http"  # its other pages


# What each label of a router's own metrics may say. All of it is on the page from the start: a counter that came into
# being with its first event would hide that event from whoever asks for its increase.
VALUES: dict[str, tuple[str, ...]] = {
    "api": tuple(Api),
    "outcome": (*FinishReason, *ERRORS),
    "code": tuple(ERRORS),
    "mode": (AssignMode.PREFILL, AssignMode.LOCAL),
    "cause": tuple(Cause),
    "reason": tuple(MoveReason),
    "result": tuple(each for each in MoveOutcome if each is not MoveOutcome.MOVING),
    "phase": ("precopy", "fence", "pause"),
    "how": ("moved", "reused"),
    "slo_class": (*SloClass, "none"),
    "slo": ("met", "ttft", "tpot", "both", "failed"),
    "stage": tuple(Stage),
}


class EdgeMetrics:
    """The edge's metrics, in a registry of their own; others may add theirs to `registry`.

    On the page each carries the name of its router. Several may answer at one address: `others` are the pages of those
    that do not answer this time, an empty one of each that is silent. `cluster` has what any router would say of all,
    and is on the whole page alone.
    """

    def __init__(self, router_id: str = "router-0", *, clock: Callable[[], float] = time.monotonic) -> None:
        self._router_id = router_id
        self._clock = clock
        self._last_minute = LastMinute(clock())
        self.others: Callable[[], Awaitable[list[str]]] | None = None
        self.cluster: Collector | None = None
        self.recent = Recent()  # the same second by second, for charts
        self.registry = CollectorRegistry()
        self._requests = self._plain(Counter, table.REQUESTS_TOTAL)
        self._refusals = self._plain(Counter, table.REFUSALS_TOTAL)
        self._strangers = self._plain(Counter, table.STRANGERS_TOTAL)
        self._at_workers = self._plain(Counter, table.WORKER_STRANGERS_TOTAL)
        self._running = self._plain(Gauge, table.REQUESTS_RUNNING)
        self._resumed = self._plain(Counter, table.RESUMED_TOTAL)
        self._prompt_tokens = self._plain(Counter, table.PROMPT_TOKENS_TOTAL)
        self._generated_tokens = self._plain(Counter, table.GENERATED_TOKENS_TOTAL)
        self._ttft = self._histogram(table.TTFT_SECONDS)
        self._ttft_stages = self._histogram(table.TTFT_STAGE_SECONDS)
        self._itl = self._histogram(table.ITL_SECONDS)
        self._e2e = self._histogram(table.E2E_SECONDS)
        self._tpot = self._histogram(table.TPOT_SECONDS)
        self._waiting = self._plain(Gauge, table.WAITING_REQUESTS)
        self._queued = self._plain(Gauge, table.QUEUED_TOKENS)
        self._placed = self._plain(Counter, table.PLACEMENTS_TOTAL)
        self._lost = self._plain(Counter, table.RECOVERIES_TOTAL)
        self._handoff = self._histogram(table.HANDOFF_SECONDS)
        self._transferred_bytes = self._plain(Counter, table.TRANSFERRED_BYTES)
        self._transferred_blocks = self._plain(Counter, table.TRANSFERRED_BLOCKS)
        self._prefix_queries = self._plain(Counter, table.PREFIX_QUERIES)
        self._prefix_hits = self._plain(Counter, table.PREFIX_HITS)
        self._recomputed = self._plain(Counter, table.RECOMPUTED_TOKENS)
        self._migrations = self._plain(Counter, table.MIGRATIONS_TOTAL)
        self._migration = self._histogram(table.MIGRATION_SECONDS)
        self._migration_bytes = self._plain(Counter, table.MIGRATION_BYTES)
        self._slo = self._plain(Counter, table.SLO_REQUESTS)
        self._store_away = self._plain(Gauge, table.STORE_AWAY_SECONDS)
        self._loop_late = self._histogram(table.LOOP_LATE_SECONDS)
        self.registry.register(_Process())

    def admitted(self, num_prompt_tokens: int) -> None:
        """A request was taken in."""
        self._running.inc()
        self._prompt_tokens.inc(num_prompt_tokens)

    def refused(self, api: Api, error: TandemError) -> None:
        """A request was not taken in."""
        self._last_minute.count(self._clock(), Counted.REFUSED)
        self._refusals.labels(api.value, error.code).inc()

    def stranger(self) -> None:
        """Somebody without the join token, or of another version, called what is for members of the cluster."""
        self._strangers.inc()

    def refused_at_workers(self, num: int) -> None:
        """A worker has refused so many more calls, links, messages and frames."""
        self._at_workers.inc(num)

    def first_tokens(self, num_tokens: int) -> None:
        """A request's first tokens came."""
        self._generated(num_tokens)

    def first_token(self, first: FirstToken) -> None:
        """A client has its first token."""
        self._ttft.observe(first.ttft_ms / 1000)
        self._last_minute.took(self._clock(), Timed.TTFT, first.ttft_ms)
        self.recent.first_token(first.ttft_ms)
        for stage, stage_ms in first.stages:
            self._ttft_stages.labels(stage.value).observe(stage_ms / 1000)

    def next_tokens(self, num_tokens: int, gap_s: float) -> None:
        """More tokens of a request came, `gap_s` seconds after those before."""
        self._generated(num_tokens)
        self._itl.observe(gap_s)

    def reopened(self) -> None:
        """A client came back for an answer."""
        self._resumed.inc()
        self._running.inc()

    def resumed(self, num_tokens: int) -> None:
        """The first tokens that a client had not came to it; no gap is known."""
        self._generated(num_tokens)

    def ended(self, api: Api, outcome: str, after_s: float) -> None:
        """A request taken in ended; `outcome` is a finish reason or an error's code."""
        self._running.dec()
        self._requests.labels(api.value, outcome).inc()
        self._e2e.observe(after_s)
        self.recent.ended()

    def answered(self, *, num_prompt_tokens: int, num_cached_tokens: int, tpot_s: float | None) -> None:
        """A request has all of its answer. `tpot_s` None: it has fewer than two tokens, or nobody saw the first."""
        self._prefix_queries.inc(num_prompt_tokens)
        self._prefix_hits.inc(num_cached_tokens)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)
            self._last_minute.took(self._clock(), Timed.TPOT, 1000 * tpot_s)
            self.recent.answered(1000 * tpot_s)

    def judged(self, slo: Slo | None, *, ttft_s: float, tpot_s: float, whole: bool) -> None:
        """Whether a request met its targets; `whole`: it has all of its answer. One without targets has met them."""
        wanted = slo or Slo()
        late = bool(wanted.ttft_ms) and 1000 * ttft_s > wanted.ttft_ms
        slow = bool(wanted.tpot_ms) and 1000 * tpot_s > wanted.tpot_ms
        missed = {(False, False): "met", (True, False): "ttft", (False, True): "tpot", (True, True): "both"}
        slo_class = "none" if slo is None else slo.slo_class.value
        self._slo.labels(slo_class, missed[late, slow] if whole else "failed").inc()

    def came_late(self, late_s: float) -> None:
        """The event loop came so late to what was due."""
        self._loop_late.observe(late_s)

    # ---- as the driver tells ---------------------------------------------------------------------------------------

    def noted(self, note: Note) -> None:
        """The core told something for the record."""
        match note:
            case Placed(mode=mode):
                self._placed.labels(mode.value).inc()
            case HandedOver(after_ms=after_ms):
                self._handoff.observe(after_ms / 1000)
            case Recovering(cause=cause):
                self._lost.labels(cause.value).inc()
                self._last_minute.count(self._clock(), Counted.RECOVERED)
            case _:
                assert_never(note)

    def moved(self, record: MoveRecord) -> None:
        """A move has ended."""
        self._migrations.labels(record.reason.value, record.outcome.value).inc()
        self._migration_bytes.labels(record.reason.value).inc(record.bytes_moved)
        self.recent.moved(record.reason.value, carried_out=record.outcome is MoveOutcome.MOVED)
        if record.outcome is MoveOutcome.MOVED:
            self._migration.labels("pause").observe(record.pause_ms / 1000)
            self._last_minute.count(self._clock(), Counted.MOVED)

    def transferred(self, stats: TransferStats) -> None:
        """A worker told what a transfer did."""
        self._transferred_bytes.inc(stats.bytes)
        self._transferred_blocks.labels("moved").inc(stats.blocks_moved)
        self._transferred_blocks.labels("reused").inc(stats.blocks_reused)
        self._recomputed.inc(stats.tokens_recomputed)
        if stats.rounds or stats.precopy_ms or stats.fence_ms:  # a move that came about, by its source, perhaps late
            self._migration.labels("precopy").observe(stats.precopy_ms / 1000)
            self._migration.labels("fence").observe(stats.fence_ms / 1000)

    def follow_line(self, waiting: Callable[[], float], queued_tokens: Callable[[], float]) -> None:
        """What is asked at each scrape: requests in line, and prompt tokens whose answer has not begun."""
        self._waiting.set_function(waiting)
        self._queued.set_function(queued_tokens)

    def follow_store(self, away_s: Callable[[], float]) -> None:
        """What is asked at each scrape: for how long the store that routers share has not answered."""
        self._store_away.set_function(away_s)

    def lately(self) -> Lately:
        """What this router's clients saw in the last minute."""
        return self._last_minute.look(self._clock())

    def _generated(self, num_tokens: int) -> None:
        self._generated_tokens.inc(num_tokens)
        self._last_minute.count(self._clock(), Counted.TOKENS, num_tokens)
        self.recent.tokens(num_tokens)

    # ---- pages -----------------------------------------------------------------------------------------------------

    def page(self) -> bytes:
        """This router's metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(_Labelled(self.registry, self._router_id))

    async def whole_page(self) -> bytes:
        """The metrics of all routers, of this one alone when there is no other; and those of the cluster, once."""
        asked = [] if self.others is None else await self.others()
        others = [each for each in asked if each]
        page = self.page()
        if others:
            page = prometheus_client.generate_latest(_Merged([page.decode(), *others]))
        if self.cluster is None:
            return page
        routers = _Routers(answering=1 + len(others), silent=len(asked) - len(others))
        return page + prometheus_client.generate_latest(routers) + prometheus_client.generate_latest(self.cluster)

    def _plain(self, kind: type[_Kind], metric: Metric) -> _Kind:
        return _from_zero(kind(metric.name, metric.help, metric.labels, registry=self.registry), metric)

    def _histogram(self, metric: Metric) -> Histogram:
        made = Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry)
        return _from_zero(made, metric)


def _from_zero(made: _Kind, metric: Metric) -> _Kind:
    """The same, with a series for every combination of what its labels may say."""
    for values in product(*(VALUES[name] for name in metric.labels)) if metric.labels else ():
        made.labels(*values)
    return made


class _Process(Collector):
    """What this process takes, asked of the system at each scrape."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """Processor time and memory."""
        cpu, memory = table.CPU_SECONDS, table.RESIDENT_BYTES
        yield CounterMetricFamily(cpu.name, cpu.help, value=time.process_time())
        yield GaugeMetricFamily(memory.name, memory.help, value=self._process.memory_info().rss)


class _Routers(Collector):
    """How many routers have answered one scrape, and how many have not."""

    def __init__(self, *, answering: int, silent: int) -> None:
        self._counted = {"answering": answering, "silent": silent}

    def collect(self) -> Iterable[prometheus_client.Metric]:
        """The one metric."""
        family = GaugeMetricFamily(table.ROUTERS.name, table.ROUTERS.help, labels=table.ROUTERS.labels)
        for state, num in self._counted.items():
            family.add_metric((state,), num)
        return [family]


class _Labelled(Collector):
    """A registry whose samples all have one more label: `router`."""

    def __init__(self, registry: CollectorRegistry, router_id: str) -> None:
        self._registry = registry
        self._router_id = router_id

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """The registry's metrics, labelled."""
        for metric in self._registry.collect():
            metric.samples = [
                each._replace(labels={"router": self._router_id, **each.labels}) for each in metric.samples
            ]  # fmt: skip
            yield metric


class _Merged(Collector):
    """The metrics of several pages as those of one: each metric once, with the samples of all."""

    def __init__(self, pages: Sequence[str]) -> None:
        self._pages = pages

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """The metrics, in the order of the first page."""
        merged: dict[str, prometheus_client.Metric] = {}
        for page in self._pages:
            for metric in text_string_to_metric_families(page):
                known = merged.setdefault(metric.name, metric)
                if known is not metric:
                    known.samples.extend(metric.samples)
        yield from merged.values()
