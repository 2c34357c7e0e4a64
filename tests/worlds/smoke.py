"""The first seeded worlds, which several tests look at, each run once."""

from __future__ import annotations

from functools import cache

from simulator.run import Outcome, run_seeds

SMOKE_SEEDS = 100


@cache
def smoke_worlds() -> list[Outcome]:
    """What became of them."""
    return run_seeds(range(SMOKE_SEEDS))
