"""Counts what the router's edge sees, under the names of tandem/metrics.py, and prints it for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from enum import StrEnum
from typing import TypeVar, assert_never

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from router.events import HandedOver, Note, Placed, Recovering
from router.lately import Counted, LastMinute, Lately, Timed
from router.move import MoveOutcome, MoveRecord
from router.stages import FirstToken
from tandem import metrics as table
from tandem.errors import TandemError
from tandem.messages import TransferStats
from tandem.metrics import Metric
from tandem.request import Slo

_Kind = TypeVar("_Kind", Counter, Gauge)

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Api(StrEnum):
    """The door that a request came in by."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    GRPC = "grpc"
    HTTP = "http"  # its other pages


class EdgeMetrics:
    """The edge's metrics, in a registry of their own; others may add theirs to `registry`.

    On the page each carries the name of its router. Several may answer at one address: `others` are the pages of those
    that do not answer this time. `cluster` has what any router would say of all, and is on the whole page alone.
    """

    def __init__(self, router_id: str = "router-0", *, clock: Callable[[], float] = time.monotonic) -> None:
        self._router_id = router_id
        self._clock = clock
        self._last_minute = LastMinute(clock())
        self.others: Callable[[], Awaitable[list[str]]] | None = None
        self.cluster: Collector | None = None
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

    def answered(self, *, num_prompt_tokens: int, num_cached_tokens: int, tpot_s: float | None) -> None:
        """A request has all of its answer. `tpot_s` None: it has fewer than two tokens, or nobody saw the first."""
        self._prefix_queries.inc(num_prompt_tokens)
        self._prefix_hits.inc(num_cached_tokens)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)
            self._last_minute.took(self._clock(), Timed.TPOT, 1000 * tpot_s)

    def judged(self, slo: Slo | None, *, ttft_s: float, tpot_s: float, whole: bool) -> None:
        """Whether a request met its targets; `whole`: it has all of its answer. One without targets has met them."""
        wanted = slo or Slo()
        late = bool(wanted.ttft_ms) and 1000 * ttft_s > wanted.ttft_ms
        slow = bool(wanted.tpot_ms) and 1000 * tpot_s > wanted.tpot_ms
        missed = {(False, False): "met", (True, False): "ttft", (False, True): "tpot", (True, True): "both"}
        slo_class = "none" if slo is None else slo.slo_class.value
        self._slo.labels(slo_class, missed[late, slow] if whole else "failed").inc()

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

    def lately(self) -> Lately:
        """What this router's clients saw in the last minute."""
        return self._last_minute.look(self._clock())

    def _generated(self, num_tokens: int) -> None:
        self._generated_tokens.inc(num_tokens)
        self._last_minute.count(self._clock(), Counted.TOKENS, num_tokens)

    # ---- pages -----------------------------------------------------------------------------------------------------

    def page(self) -> bytes:
        """This router's metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(_Labelled(self.registry, self._router_id))

    async def whole_page(self) -> bytes:
        """The metrics of all routers, of this one alone when there is no other; and those of the cluster, once."""
        others = [] if self.others is None else await self.others()
        page = self.page()
        if others:
            page = prometheus_client.generate_latest(_Merged([page.decode(), *others]))
        return page if self.cluster is None else page + prometheus_client.generate_latest(self.cluster)

    def _plain(self, kind: type[_Kind], metric: Metric) -> _Kind:
        return kind(metric.name, metric.help, metric.labels, registry=self.registry)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry)


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
