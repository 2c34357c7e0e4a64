"""A request's flight record as OpenTelemetry spans: router, workers and transfers under one that is the request.

Router and workers tell durations, each on its own clock; here they are laid end to end from the request's arrival on.
So spans of one request never contradict one another, whatever the clocks of its machines say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from router.flight import Flight
from router.request import PlacementRecord, RequestState
from router.stages import Stage
from tandem.messages import AssignMode

Value = str | int | float | bool
MS = 1_000_000  # nanoseconds
ROOT = "tandem.request"
# Who did what a stage is named after.
AT_WORKER = (Stage.QUEUE, Stage.PREFILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A moment within a span."""

    name: str
    at_ns: int
    attributes: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One span. Times are nanoseconds of Unix time. `error` is empty where all went well."""

    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Value] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    error: str = ""


def spans_of(flight: Flight, *, wall_ns: int, router: str, model: str) -> list[Span]:
    """The request's own span first, then those under it. `wall_ns`: Unix time at the flight's `now_ms`."""
    start_ns = wall_ns - round(flight.arrived_ms_ago * MS)
    return [
        _root(flight, start_ns, wall_ns, router, model),
        *_stages(flight, start_ns),
        *_handoff(flight, start_ns),
        *_moves(flight, wall_ns),
    ]


def _root(flight: Flight, start_ns: int, wall_ns: int, router: str, model: str) -> Span:
    request = flight.request
    attributes: dict[str, Value] = {
        "tandem.request.id": request.request_id,
        "tandem.request.state": request.state.value,
        "tandem.request.priority": request.priority,
        "tandem.router": router,
        "tandem.moves": request.num_moves,
        "tandem.replacements": request.num_replacements,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": request.tokens,
        "tandem.cached_tokens": request.transferred.tokens_cached,
    }
    if flight.first is not None:
        attributes["tandem.ttft_ms"] = flight.first.ttft_ms
    return Span(
        name=ROOT,
        start_ns=start_ns,
        end_ns=wall_ns,
        attributes=attributes,
        events=tuple(_placed(each, _submitted_ns(flight, start_ns)) for each in request.placements),
        error=request.error if request.state is RequestState.FAILED else "",
    )


def _placed(record: PlacementRecord, submitted_ns: int) -> Event:
    placed = record.placement
    attributes: dict[str, Value] = {
        "tandem.mode": placed.mode.value,
        "tandem.prefill_worker": placed.prefill_worker.worker_id,
        "tandem.decode_worker": placed.decode_worker.worker_id,
        "tandem.epoch": record.epoch,
        "tandem.predicted_ttft_ms": placed.predicted_ms,
        "tandem.reason": placed.reason,
    }
    for each in placed.candidates:
        attributes[f"tandem.score_ms.{each.part.value}.{each.worker_id}"] = each.score_ms
    return Event(name="placed", at_ns=submitted_ns + record.at_ms * MS, attributes=attributes)


def _submitted_ns(flight: Flight, start_ns: int) -> int:
    edge_ms = 0.0 if flight.first is None else dict(flight.first.stages)[Stage.EDGE]
    return start_ns + round(edge_ms * MS)


def _stages(flight: Flight, start_ns: int) -> list[Span]:
    """One after the other, those that took no time left out."""
    if flight.first is None:
        return []
    spans, at_ns = [], start_ns
    for stage, stage_ms in flight.first.stages:
        end_ns = at_ns + round(stage_ms * MS)
        if stage_ms > 0:
            attributes: dict[str, Value] = {}
            if stage in AT_WORKER:
                attributes["tandem.worker"] = flight.request.prefill_worker
            spans.append(Span(name=f"tandem.{stage.value}", start_ns=at_ns, end_ns=end_ns, attributes=attributes))
        at_ns = end_ns
    return spans


def _handoff(flight: Flight, start_ns: int) -> list[Span]:
    """From the first token until a decode worker owned the request."""
    request, done = flight.request, flight.request.transferred
    if request.handoff_ms is None or flight.first is None or request.mode != AssignMode.PREFILL.value:
        return []
    at_ns = start_ns + round((flight.first.ttft_ms - dict(flight.first.stages)[Stage.DELIVER]) * MS)
    attributes: dict[str, Value] = {
        "tandem.from": request.prefill_worker,
        "tandem.to": request.placements[-1].placement.decode_worker.worker_id if request.placements else "",
        "tandem.blocks_moved": done.blocks_moved,
        "tandem.blocks_reused": done.blocks_reused,
        "tandem.bytes": done.bytes_moved,
    }
    return [Span(name="tandem.handoff", start_ns=at_ns, end_ns=at_ns + request.handoff_ms * MS, attributes=attributes)]


def _moves(flight: Flight, wall_ns: int) -> list[Span]:
    spans = []
    for move in flight.moves:
        at_ns = wall_ns - (flight.now_ms - move.at_ms) * MS
        took_ms = move.precopy_ms + max(move.pause_ms, move.fence_ms)
        spans.append(
            Span(
                name="tandem.migration",
                start_ns=at_ns,
                end_ns=min(wall_ns, at_ns + took_ms * MS),
                attributes={
                    "tandem.from": move.source,
                    "tandem.to": move.target,
                    "tandem.reason": move.reason.value,
                    "tandem.why": move.why,
                    "tandem.outcome": move.outcome.value,
                    "tandem.rounds": move.rounds,
                    "tandem.bytes": move.bytes_moved,
                    "tandem.pause_ms": move.pause_ms,
                },
                error=move.error,
            )
        )
    return spans
