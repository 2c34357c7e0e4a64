"""Worlds that several tests look at, each run once."""

from __future__ import annotations

import pytest

from simulator.run import Outcome, run_seeds

SMOKE_SEEDS = 100


@pytest.fixture(scope="session")
def outcomes() -> list[Outcome]:
    """What became of the first worlds."""
    return run_seeds(range(SMOKE_SEEDS))
