"""Which frames the dashboard's watchers get: one with everything for who comes, then one with what has changed, each.

One set of frames serves all watchers, so that another one costs nothing but the sending. A request's counter of tokens
moves all the time: it is told in turns, each in every TURNS-th frame, unless something else of the request changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.dashboard_view import MOVE_FIELDS, REQUEST_FIELDS, WORKER_FIELDS, Row, View
from router.recent import SECONDS_MAX, Second

FORMAT = 1  # of the frames: a page that knows another one loads itself anew
TURNS = 4
SECOND_FIELDS = (
    "number", "tokens", "ended", "ttft_num", "ttft_p50", "ttft_p95", "tpot_num", "tpot_p50", "tpot_p95", "moves",
    "failed",
)  # fmt: skip
TASK_FIELDS = ("id", "kind", "what", "state", "detail", "at_ms", "by")
EMPTY = View(head={}, workers={}, requests={}, tokens={}, moves={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something that an operator began from a dashboard. `state`: running, done or failed; `by`: the key's name."""

    id: int
    kind: str
    what: str
    state: str
    detail: str
    at_ms: int
    by: str

    @property
    def row(self) -> Row:
        """In the order of TASK_FIELDS."""
        return self.id, self.kind, self.what, self.state, self.detail, self.at_ms, self.by


class Frames:
    """What all watchers have been told. Requests are named by small numbers, given when they are first seen."""

    def __init__(self) -> None:
        self._number = 0
        self._at_ms = 0
        self._view = EMPTY
        self._told: dict[str, int] = {}  # tokens, by request
        self._handles: dict[str, int] = {}
        self._next_handle = 1
        self._seconds: Sequence[Second] = ()
        self._tasks: dict[int, Row] = {}

    @property
    def number(self) -> int:
        """Of the newest frame."""
        return self._number

    def look(self, at_ms: int, view: View, seconds: Sequence[Second], tasks: Iterable[Task]) -> bytes:
        """The frame that brings whoever has all before it up to this view. `at_ms`: Unix time."""
        before, self._view, self._at_ms = self._view, view, at_ms
        self._number += 1
        frame: dict[str, object] = {"kind": "delta", "number": self._number, "at_ms": at_ms}
        if view.head != before.head:
            frame["head"] = view.head
        self._table(frame, "workers", before.workers, view.workers)
        self._requests(frame, before)
        self._table(frame, "moves", before.moves, view.moves)
        newest = self._seconds[-1].number if self._seconds else -1
        fresh = [_second_row(each) for each in seconds if each.number > newest]
        if fresh:
            frame["seconds"] = fresh
        self._seconds = seconds
        rows = {each.id: each.row for each in tasks}
        changed = [row for key, row in rows.items() if self._tasks.get(key) != row]
        if changed:
            frame["tasks"] = changed
        self._tasks = rows
        return _encode(frame)

    def full(self) -> bytes:
        """Everything as of the newest frame, for who comes now."""
        view = self._view
        return _encode(
            {
                "kind": "full",
                "format": FORMAT,
                "number": self._number,
                "at_ms": self._at_ms,
                "fields": {
                    "workers": WORKER_FIELDS,
                    "requests": ("handle", *REQUEST_FIELDS, "tokens"),
                    "moves": MOVE_FIELDS,
                    "seconds": SECOND_FIELDS,
                    "tasks": TASK_FIELDS,
                },
                "seconds_max": SECONDS_MAX,
                "head": view.head,
                "workers": list(view.workers.values()),
                "requests": [(self._handles[key], *row, self._told[key]) for key, row in view.requests.items()],
                "moves": list(view.moves.values()),
                "seconds": [_second_row(each) for each in self._seconds],
                "tasks": list(self._tasks.values()),
            }
        )

    def _table(self, frame: dict[str, object], name: str, before: Mapping[str, Row], now: Mapping[str, Row]) -> None:
        changed = [row for key, row in now.items() if before.get(key) != row]
        gone = [key for key in before if key not in now]
        if changed:
            frame[name] = changed
        if gone:
            frame[f"{name}_gone"] = gone

    def _requests(self, frame: dict[str, object], before: View) -> None:
        now, tokens, told, turn = self._view.requests, self._view.tokens, self._told, self._number % TURNS
        rows, counters = [], []
        for key, row in now.items():
            had = before.requests.get(key)
            if had is None:
                self._handles[key], self._next_handle = self._next_handle, self._next_handle + 1
            handle, num = self._handles[key], tokens[key]
            if had != row:
                rows.append((handle, *row, num))
                told[key] = num
            elif handle % TURNS == turn and told[key] != num:
                counters += [handle, num]
                told[key] = num
        gone = [self._handles[key] for key in before.requests if key not in now]
        for key in [key for key in before.requests if key not in now]:
            del self._handles[key], told[key]
        if rows:
            frame["requests"] = rows
        if counters:
            frame["tokens"] = counters  # handle, tokens, handle, tokens, ...
        if gone:
            frame["requests_gone"] = gone


def _second_row(second: Second) -> tuple[object, ...]:
    spreads: list[object] = []
    for each in (second.ttft, second.tpot):
        spreads += [0, None, None] if each is None else [each.num, round(each.p50_ms, 1), round(each.p95_ms, 1)]
    return second.number, second.tokens, second.ended, *spreads, dict(second.moves), second.moves_failed


def _encode(frame: Mapping[str, object]) -> bytes:
    """One line: no string in JSON has a line's end in it."""
    return json.dumps(frame, separators=(",", ":")).encode() + b"\n"
