"""What a runner is: something that runs one planned step over the KV pool."""

from __future__ import annotations

from typing import Protocol

from engine.layout import KVLayout
from engine.step import Sampled as Sampled
from engine.step import StepPlan


class Runner(Protocol):
    """Computes the KV of a plan's rows, writes it through their block tables, and samples where a row asks."""

    @property
    def layout(self) -> KVLayout:
        """How its pool lies in memory."""
        ...

    def run(self, plan: StepPlan) -> list[Sampled | None]:
        """Runs the step; one result per row in the plan's order, None where the row's `sample` is False."""
        ...
