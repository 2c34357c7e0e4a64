"""W3C trace context: the trace that a client's request is part of (w3.org/TR/trace-context, section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

HEADER = "traceparent"
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A client's span, under which ours hang. `sampled`: whether the client records its own."""

    trace_id: int
    span_id: int
    sampled: bool


# Of the call or request under way: set at the door.
TRACE: ContextVar[TraceContext | None] = ContextVar("trace", default=None)


def trace_of(headers: Sequence[str]) -> TraceContext | None:
    """What a request's `traceparent` headers say; None where there is not one alone that keeps to the form.

    As the standard wants it, what cannot be read is as good as nothing, and no error.
    """
    if len(headers) != 1 or (found := _FORM.fullmatch(headers[0].strip())) is None:
        return None
    version, trace, span, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace, 16) or not int(span, 16):
        return None
    return TraceContext(int(trace, 16), int(span, 16), bool(int(flags, 16) & _SAMPLED))
