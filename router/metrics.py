"""Counts what the router's edge sees, under the names of tandem/metrics.py, and prints it for Prometheus."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tandem import metrics as table
from tandem.errors import TandemError
from tandem.metrics import Metric

_Kind = TypeVar("_Kind", Counter, Gauge)

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Api(StrEnum):
    """The door that a request came in by."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    GRPC = "grpc"
    HTTP = "http"  # its other pages


class EdgeMetrics:
    """The edge's metrics, in a registry of their own; others may add theirs to `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._plain(Counter, table.REQUESTS_TOTAL)
        self._refusals = self._plain(Counter, table.REFUSALS_TOTAL)
        self._strangers = self._plain(Counter, table.STRANGERS_TOTAL)
        self._running = self._plain(Gauge, table.REQUESTS_RUNNING)
        self._resumed = self._plain(Counter, table.RESUMED_TOTAL)
        self._prompt_tokens = self._plain(Counter, table.PROMPT_TOKENS_TOTAL)
        self._generated_tokens = self._plain(Counter, table.GENERATED_TOKENS_TOTAL)
        self._ttft = self._histogram(table.TTFT_SECONDS)
        self._itl = self._histogram(table.ITL_SECONDS)
        self._e2e = self._histogram(table.E2E_SECONDS)

    def admitted(self, num_prompt_tokens: int) -> None:
        """A request was taken in."""
        self._running.inc()
        self._prompt_tokens.inc(num_prompt_tokens)

    def refused(self, api: Api, error: TandemError) -> None:
        """A request was not taken in."""
        self._refusals.labels(api.value, error.code).inc()

    def stranger(self) -> None:
        """Somebody without the join token, or of another version, called what is for members of the cluster."""
        self._strangers.inc()

    def first_tokens(self, num_tokens: int, after_s: float) -> None:
        """A request's first tokens came `after_s` seconds after it was taken in."""
        self._generated_tokens.inc(num_tokens)
        self._ttft.observe(after_s)

    def next_tokens(self, num_tokens: int, gap_s: float) -> None:
        """More tokens of a request came, `gap_s` seconds after those before."""
        self._generated_tokens.inc(num_tokens)
        self._itl.observe(gap_s)

    def reopened(self) -> None:
        """A client came back for an answer."""
        self._resumed.inc()
        self._running.inc()

    def resumed(self, num_tokens: int) -> None:
        """The first tokens that a client had not came to it; no gap is known."""
        self._generated_tokens.inc(num_tokens)

    def ended(self, api: Api, outcome: str, after_s: float) -> None:
        """A request taken in ended; `outcome` is a finish reason or an error's code."""
        self._running.dec()
        self._requests.labels(api.value, outcome).inc()
        self._e2e.observe(after_s)

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)

    def _plain(self, kind: type[_Kind], metric: Metric) -> _Kind:
        return kind(metric.name, metric.help, metric.labels, registry=self.registry)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry)
