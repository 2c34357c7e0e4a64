"""Sends spans of requests to an OpenTelemetry collector, in the background; what it cannot take is dropped.

To be imported only where spans are wanted: the packages that it needs are an extra.
"""

from __future__ import annotations

import random
import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from cluster.spans import Span, spans_of
from router.flight import Flight
from router.trace_context import TraceContext

EXPORT_S = 5.0  # for one batch
FLUSH_MS = 2_000  # of what is left when the router ends
PATH = "/v1/traces"


class Tracing:
    """The spans of one router. Those of a client that samples, and of `share` of the others.

    `endpoint`: where an OTLP collector listens for HTTP, without the path.
    """

    def __init__(self, endpoint: str, *, router: str, model: str, share: float) -> None:
        self._router = router
        self._model = model
        self._share = share
        self._draw = random.SystemRandom()
        self._resource = Resource.create({"service.name": "tandem", "service.instance.id": router})
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + PATH, timeout=EXPORT_S)
        self._processor = BatchSpanProcessor(exporter)

    def ended(self, flight: Flight, trace: TraceContext | None) -> None:
        """The request is over for its client."""
        sampled = trace.sampled if trace is not None else self._draw.random() < self._share
        if not sampled:
            return
        spans = spans_of(flight, wall_ns=time.time_ns(), router=self._router, model=self._model)
        trace_id = trace.trace_id if trace is not None else self._draw.getrandbits(128) or 1
        root = self._context(trace_id)
        client = None if trace is None else _context(trace.trace_id, trace.span_id, is_remote=True)
        for number, span in enumerate(spans):
            self._send(span, root if number == 0 else self._context(trace_id), client if number == 0 else root)

    def close(self) -> None:
        """Sends what waits, within a bound."""
        self._processor.force_flush(FLUSH_MS)
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def _context(self, trace_id: int) -> SpanContext:
        return _context(trace_id, self._draw.getrandbits(64) or 1, is_remote=False)

    def _send(self, span: Span, context: SpanContext, parent: SpanContext | None) -> None:
        self._processor.on_end(
            ReadableSpan(
                name=span.name,
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=span.attributes,
                events=[Event(each.name, each.attributes, each.at_ns) for each in span.events],
                kind=SpanKind.SERVER if parent is None or parent.is_remote else SpanKind.INTERNAL,
                status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.OK),
                start_time=span.start_ns,
                end_time=max(span.start_ns, span.end_ns),
            )
        )


def _context(trace_id: int, span_id: int, *, is_remote: bool) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote, TraceFlags(TraceFlags.SAMPLED))
