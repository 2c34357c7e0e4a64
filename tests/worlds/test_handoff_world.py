"""Random interleavings of a handoff with lost, doubled and overtaken words, dying workers, agents and clients.

Over each seed: tokens are right, a token index is delivered once by the owner of its epoch, every request ends, and
all blocks are back at their baseline.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from pair_world import Faults, World

from engine.blocks import BlockLedger
from kv_transfer.handoff import AcceptBlocks, Closed
from kv_transfer.handoff_target import TargetHandoff, TargetState

NUM_SEEDS = int(os.environ.get("TANDEM_HANDOFF_SEEDS", "200"))
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
        cancel=random.choice((0.0, 0.2, 0.6)),
        agent=random.choice((0.0, 0.2, 0.5)),
        leave_cancels=random.random() < 0.5,
    )
    shared = tuple(random.randrange(97) for _ in range(24))
    left = random.randrange(2, 12)
    num_asked = 0
    arrivals = random.choice((0.05, 0.3))  # at 0.3 all are there at once, and what one gives up the next one takes
    for _ in range(60_000):
        if left and random.random() < arrivals:
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


def _no_quarantine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granted blocks of a failed attempt are free at once."""
    quarantine = BlockLedger.quarantine

    def plant(self: BlockLedger, transfer: str) -> None:
        quarantine(self, transfer)
        self.end_quarantine(transfer)

    monkeypatch.setattr(BlockLedger, "quarantine", plant)


def _no_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that an agent reads are not pinned."""
    export = BlockLedger.export

    def plant(self: BlockLedger, transfer: str, blocks: tuple[int, ...]) -> tuple[int, ...]:
        generations = export(self, transfer, blocks)
        self.end_export(transfer, blocks)
        return generations

    monkeypatch.setattr(BlockLedger, "export", plant)


def _eager_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target asks for the commit without looking whether every frame is there."""

    def plant(self: TargetHandoff, now_ms: int) -> object:
        commit, grant = self._commit, self._grant
        if commit is None or grant is None:
            return []
        self.state = TargetState.SEALED
        self._next_ms = now_ms + 1_000
        return [self._ask()]

    monkeypatch.setattr(TargetHandoff, "_seal", plant)
    monkeypatch.setattr(TargetHandoff, "_activate", _activate_at_once)


def _activate_at_once(self: TargetHandoff) -> object:
    self.state = TargetState.ACTIVE
    assert self._commit is not None
    assert self._owned_epoch is not None
    accept = AcceptBlocks(
        epoch=self._owned_epoch,
        tokens=self._commit.tokens,
        num_computed=self._commit.num_computed_tokens,
        num_frames=0,
        num_blocks=0,
        num_bytes=0,
    )
    return [accept, Closed()]


def _commit_by_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target takes the request over without the owner record's word."""
    ask = TargetHandoff._ask

    def plant(self: TargetHandoff) -> object:
        self._owned_epoch = self.attempt.epoch + 1
        return ask(self)

    monkeypatch.setattr(TargetHandoff, "_ask", plant)


# The search begins shortly before a world that shows it.
PLANTED = [(_no_quarantine, 345), (_no_pins, 0), (_eager_seal, 20), (_commit_by_guess, 20)]


@pytest.mark.parametrize(("plant", "first"), PLANTED)
def test_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)

    def search() -> None:
        for seed in range(first, first + 1500):
            run_seed(seed)

    with pytest.raises(AssertionError):
        search()
