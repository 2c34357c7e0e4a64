"""Random interleavings of a handoff with lost, doubled and overtaken words, dying workers, agents and clients.

Over each seed: tokens are right, a token index is delivered once by the owner of its epoch, every request ends, and
all blocks are back at their baseline.
"""

from __future__ import annotations

import os

import pytest
from pair_world import Faults, World

NUM_SEEDS = int(os.environ.get("TANDEM_HANDOFF_SEEDS", "500"))
BATCHES = 10


def run_seed(seed: int) -> World:
    """One world: three workers, a handful of requests that share prefixes, faults drawn from the seed."""
    world = World(seed=seed, names=("p0", "d0", "d1"), num_blocks=40)
    random = world.random
    world.faults = Faults(
        lose=random.choice((0.0, 0.05, 0.2)),
        double=random.choice((0.0, 0.1)),
        overtake=random.random() < 0.7,
        fail_frame=random.choice((0.0, 0.1, 0.3)),
        kill=random.choice((0.0, 0.2)),
        cancel=random.choice((0.0, 0.2)),
        agent=random.choice((0.0, 0.2)),
        leave_cancels=random.random() < 0.5,
    )
    shared = tuple(random.randrange(97) for _ in range(24))
    left = random.randrange(2, 7)
    num_asked = 0
    for _ in range(60_000):
        if left and random.random() < 0.05:
            left -= 1
            num_asked += 1
            cut = random.randrange(0, 25)
            own = tuple(random.randrange(97) for _ in range(random.randrange(1, 30)))
            asked = world.ask(
                f"r{num_asked}",
                (*shared[:cut], *own),
                max_tokens=random.choice((1, 2, 5, 12)),
                target=random.choice(("d0", "d1")),
                local=random.random() < 0.2,
            )
            if world.hits(world.faults.cancel):
                world.later(lambda asked=asked: world.cancel(asked, "client gone") if not asked.end else None, "cancel")  # type: ignore[misc]
            if world.hits(world.faults.kill):
                victim = random.choice(("p0", "d0", "d1"))
                world.later(lambda victim=victim: world.kill(victim), "kill")  # type: ignore[misc]
            if world.hits(world.faults.agent):
                victim = random.choice(("p0", "d0", "d1"))
                world.later(lambda victim=victim: world.kill_agent(victim), "kill agent")  # type: ignore[misc]
        if not world.step_one() and not left:
            break
    world.run()
    world.check()
    return world


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_worlds(batch: int) -> None:
    for seed in range(batch, NUM_SEEDS, BATCHES):
        try:
            run_seed(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_the_worlds_reach_what_they_are_for() -> None:
    """Faults really happen: attempts fail and are repeated, frames are sent again, handoffs still commit."""
    attempts = commits = failures = 0
    for seed in range(40):
        world = run_seed(seed)
        attempts += sum(asked.num_attempts for asked in world.requests.values())
        failures += sum(len(asked.failures) for asked in world.requests.values())
        commits += sum(stats.committed_ms > 0 for stats in world.stats)
    assert attempts > 100
    assert commits > 50
    assert failures > 5
