"""Hundreds of requests whose clients all leave, each at its own moment: the pools come back by words alone.

That is more than that they come back: no lease and no deadline may be what gives a block back, since those take half a
minute and longer. It holds also where words between workers are lost: the router tells both ends itself.
"""

from __future__ import annotations

import os

import pytest
from pair_world import Asked, Faults, World

from cluster.worker_core import WorkerCoreConfig
from decode_worker.config import DecodeConfig
from kv_transfer.handoff import HandoffConfig
from prefill_worker.config import PrefillConfig

NUM_SEEDS = int(os.environ.get("TANDEM_STORM_SEEDS", "12"))
REQUESTS = 80
NEVER_MS = 1_000_000_000


def storm(seed: int) -> World:
    """All are asked in bursts, and all leave: one by one, or at once."""
    handoff = HandoffConfig(lease_ms=NEVER_MS)
    config = WorkerCoreConfig(prefill=PrefillConfig(handoff=handoff), decode=DecodeConfig(handoff=handoff))
    world = World(seed=seed, names=("p0", "d0", "d1"), num_blocks=40, config=config)
    random = world.random
    world.faults = Faults(
        lose=random.choice((0.0, 0.05, 0.3)), double=random.choice((0.0, 0.1)), overtake=random.random() < 0.7
    )
    at_once = random.random() < 0.5
    num_asked = 0
    while num_asked < REQUESTS:
        if random.random() < 0.3:
            num_asked += 1
            prompt = tuple(random.randrange(97) for _ in range(random.randrange(1, 60)))
            target = random.choice(("d0", "d1"))
            local = random.random() < 0.1
            asked = world.ask(f"r{num_asked}", prompt, max_tokens=190, target=target, local=local, deadline_ms=NEVER_MS)
            if not at_once:
                world.later(lambda asked=asked: _leaves(world, asked), "cancel")  # type: ignore[misc]
        world.step_one()
    for asked in world.requests.values():
        if at_once and (random.random() < 0.9 or asked.end):
            _leaves(world, asked)
    if at_once:  # the others leave with their router
        world.router_gone()
    return world


def _leaves(world: World, asked: Asked) -> None:
    if not asked.end:
        world.cancel(asked, "client gone")


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_pools_come_back_by_words_alone_when_all_clients_leave(seed: int) -> None:
    world = storm(seed)
    while world.step_one():
        assert len(world.log) < 100_000, world.tail()
    world.check()
