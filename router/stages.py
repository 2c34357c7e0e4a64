"""The stages of a request's TTFT: what each of them took, measured one by one, and what is left over."""

from __future__ import annotations

from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from tandem.messages import FirstTokenTimes
from tandem.request import RequestId

# When the call or request under way came, in seconds of the monotonic clock: set at the door.
ARRIVED: ContextVar[float | None] = ContextVar("arrived", default=None)


class Stage(StrEnum):
    """The parts of TTFT, in their order."""

    EDGE = "edge"  # read, checked and tokenized, until the core had it
    LINE = "line"  # in line, until workers were chosen
    RETRY = "retry"  # attempts that gave no token
    WIRE = "wire"  # between router and worker, both ways
    QUEUE = "queue"  # at the worker that read the prompt, until the first step with it
    PREFILL = "prefill"  # from there until the first token was drawn
    DELIVER = "deliver"  # from when the router had the token until its client's connection did
    OTHER = "other"  # the rest, which nobody has measured


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """A request's TTFT, from its arrival at the edge to its first token's, and the stages, which add up to it."""

    ttft_ms: float
    stages: tuple[tuple[Stage, float], ...]


@dataclass(slots=True)
class _Timing:
    arrived_s: float
    submitted_s: float
    first_assigned_s: float | None = None
    assigned_s: float | None = None  # for the last time
    times: FirstTokenTimes | None = None  # of that attempt
    came_s: float | None = None
    done: FirstToken | None = None


class StageBook:
    """Times of the newest `num_max` requests, on one clock. What it is told out of order, or twice, has no effect."""

    def __init__(self, num_max: int) -> None:
        self._num_max = num_max
        self._book: OrderedDict[RequestId, _Timing] = OrderedDict()

    def submitted(self, request_id: RequestId, *, arrived_s: float, at_s: float) -> None:
        """The core gets the request; of an earlier one of its id nothing is kept."""
        self._book.pop(request_id, None)
        self._book[request_id] = _Timing(min(arrived_s, at_s), at_s)
        while len(self._book) > self._num_max:
            self._book.popitem(last=False)

    def assigned(self, request_id: RequestId, at_s: float) -> None:
        """A worker is told to read its prompt."""
        timing = self._book.get(request_id)
        if timing is None or timing.came_s is not None:
            return
        if timing.first_assigned_s is None:
            timing.first_assigned_s = at_s
        timing.assigned_s, timing.times = at_s, None

    def told(self, request_id: RequestId, times: FirstTokenTimes) -> None:
        """That worker says how it went. It does so with the token, so before anybody can have written that."""
        timing = self._book.get(request_id)
        if timing is not None and timing.done is None and timing.times is None:
            timing.times = times

    def came(self, request_id: RequestId, at_s: float) -> None:
        """The router has its first token."""
        timing = self._book.get(request_id)
        if timing is not None and timing.came_s is None:
            timing.came_s = at_s

    def written(self, request_id: RequestId, at_s: float) -> FirstToken | None:
        """Its client has its first token, or as good as that; the sum, the first time."""
        timing = self._book.get(request_id)
        if timing is None or timing.came_s is None or timing.done is not None:
            return None
        timing.done = _summed(timing, at_s)
        return timing.done

    def arrived_s(self, request_id: RequestId) -> float | None:
        """When it came to the edge; None: that is not known."""
        timing = self._book.get(request_id)
        return None if timing is None else timing.arrived_s

    def find(self, request_id: RequestId) -> FirstToken | None:
        """The sum, if there is one."""
        timing = self._book.get(request_id)
        return None if timing is None else timing.done


def _summed(timing: _Timing, written_s: float) -> FirstToken:
    """What was measured never adds up to more than there was: what overlaps by the clocks' steps is cut off."""
    assert timing.came_s is not None, "checked"
    ttft_ms = max(0.0, 1000 * (written_s - timing.arrived_s))
    measured = {Stage.EDGE: timing.submitted_s - timing.arrived_s, Stage.DELIVER: written_s - timing.came_s}
    if timing.first_assigned_s is not None and timing.assigned_s is not None:
        measured[Stage.LINE] = timing.first_assigned_s - timing.submitted_s
        measured[Stage.RETRY] = timing.assigned_s - timing.first_assigned_s
        if timing.times is not None:
            measured[Stage.WIRE] = timing.came_s - timing.assigned_s - timing.times.hold_ms / 1000
            measured[Stage.QUEUE] = timing.times.queue_ms / 1000
            measured[Stage.PREFILL] = timing.times.prefill_ms / 1000
    left_ms = ttft_ms
    stages: list[tuple[Stage, float]] = []
    for stage in Stage:
        stage_ms = left_ms if stage is Stage.OTHER else min(left_ms, max(0.0, 1000 * measured.get(stage, 0.0)))
        stages.append((stage, stage_ms))
        left_ms -= stage_ms
    return FirstToken(ttft_ms=ttft_ms, stages=tuple(stages))
