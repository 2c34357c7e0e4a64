"""Keeps a request that breaks a step from ending its neighbours: such a step is run again, row by row.

A step has no effect but the KV that it writes, and a row writes and samples the same again, whatever runs beside it
(in exact mode to the last bit). So only rows that break by themselves come to nothing.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence

from engine.layout import KVLayout
from engine.runner import Runner
from engine.step import Drawn, StepPlan, StepRow, Undrawn
from tandem.errors import StepFailed

log = logging.getLogger(__name__)


FAILURES_MAX = 3  # rows that may break one after another; more is not the requests' doing
MESSAGE_CHARS_MAX = 200


class IsolatingRunner:
    """A Runner over another one, which answers a row that raises by itself with Undrawn, code `step_failed`.

    An engine that breaks on everything must not fail one request after another. So `run` raises what the runner
    raised when no row succeeded between `failures_max` that broke, or when all rows of a step of several did.
    """

    def __init__(self, runner: Runner, *, failures_max: int = FAILURES_MAX) -> None:
        if failures_max < 1:
            raise ValueError(f"failures_max is {failures_max}, must be at least 1")
        self._runner = runner
        self._failures_max = failures_max
        self._num_failures = 0  # since a row succeeded

    @property
    def layout(self) -> KVLayout:
        """How the runner's pool lies in memory."""
        return self._runner.layout

    @property
    def progress(self) -> int:
        """The runner's."""
        return self._runner.progress

    def run(self, plan: StepPlan) -> Sequence[Drawn | None]:
        """Runs the step; one result per row, Undrawn also where the row raises. Raises what tells of a broken engine.

        KeyboardInterrupt and SystemExit are passed on at once.
        """
        try:
            drawn = self._runner.run(plan)
        except Exception as error:
            return self._run_alone(plan.rows, _described(error))
        self._num_failures = 0
        return drawn

    def _run_alone(self, rows: Sequence[StepRow], reason: str) -> list[Drawn | None]:
        results: list[Drawn | None] = []
        num_failed = 0
        for row in rows:
            try:
                (drawn,) = self._runner.run(StepPlan(rows=(row,)))
            except Exception as error:
                self._num_failures += 1
                num_failed += 1
                if self._num_failures >= self._failures_max or num_failed == len(rows) > 1:
                    raise
                drawn = Undrawn(code=StepFailed.code, reason=_described(error))
                log.error("request=%s fails alone at position %d: %s", row.request_id, row.start, drawn.reason)
            else:
                self._num_failures = 0
            results.append(drawn)
        if not num_failed:
            log.warning("a step of %d rows failed, though none of them does alone: %s", len(rows), reason)
        return results


def _described(error: Exception) -> str:
    """Type, first line of the message and place, within bounds: it goes into a log line and to the client."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0][:MESSAGE_CHARS_MAX]}" if lines else type(error).__name__
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return f"{said} (in {frame.f_code.co_qualname})"
