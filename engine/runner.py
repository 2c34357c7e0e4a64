"""What a runner is: something that runs one planned step over the KV pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.layout import KVLayout
from engine.step import Drawn, StepPlan
from engine.step import Sampled as Sampled


class Runner(Protocol):
    """Computes the KV of a plan's rows, writes it through their block tables, and samples where a row asks."""

    @property
    def layout(self) -> KVLayout:
        """How its pool lies in memory."""
        ...

    @property
    def progress(self) -> int:
        """Rises while a step gets on, so that a slow step can be told from one that hangs; any thread may look."""
        ...

    def run(self, plan: StepPlan) -> Sequence[Drawn | None]:
        """Runs the step; one result per row in the plan's order, None where the row's `sample` is False.

        A row whose logits are not finite is answered with Undrawn. An exception says that the step as a whole did not
        run; engine/isolation.py finds out for whom it would.
        """
        ...
