"""Requests that move while they run, at every token and against every fault: no token is lost, doubled or wrong.

Over each seed: tokens are right, an index is delivered once by the owner of its epoch, nobody writes after it was
fenced, every request ends, and all blocks are back at their baseline.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from move_world import MoveWorld
from pair_world import BLOCK, Asked, Faults

from cluster.worker_core import WorkerCoreConfig
from decode_worker.config import DecodeConfig
from engine.events import PeerGone, Tick
from engine.fake_runner import fake_layout
from engine.step import Batch
from kv_transfer import migration_source
from kv_transfer.handoff import HandedOver, HandoffConfig, Row
from kv_transfer.messages import Cancel
from kv_transfer.migration_source import MIGRATION_TABLE, MigrationState, SourceMigration
from tandem.request import Sampling

NUM_SEEDS = int(os.environ.get("TANDEM_MOVE_SEEDS", "100"))
BATCHES = 10
LAYOUT = fake_layout(block_size=BLOCK)
PROMPT = tuple(range(5, 16))  # eleven tokens, blocks of four
SAMPLINGS = {
    "greedy": Sampling(max_tokens=14),
    "seeded": Sampling(max_tokens=14, temperature=0.8, seed=7, logprobs=3),
    "penalised": Sampling(max_tokens=14, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=0),
}


def run_to(world: MoveWorld, asked: Asked, num: int) -> None:
    """Until so many tokens are delivered and no move is under way."""
    world.run(until=lambda: bool(asked.end) or (len(asked.delivered) >= num and asked.request_id not in world.moves))


def run_to_decode(world: MoveWorld, asked: Asked) -> None:
    """Until its owner decodes it."""
    world.run(until=lambda: world.decodes(asked) or bool(asked.end))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("at", range(1, 14))
def test_move_at_every_token(at: int, local: bool, sampling: Sampling) -> None:
    for seed in range(3):
        world = MoveWorld(seed=seed)
        asked = world.request("r", PROMPT, sampling, local=local)
        run_to(world, asked, at)
        run_to_decode(world, asked)
        assert world.move(asked, "d1") is not None
        world.run()
        world.check()
        assert world.moved == 1 or asked.end, f"{world.ended}"


@pytest.mark.parametrize("num_moves", [1, 2, 3, 4, 5])
def test_moves_forth_and_back(num_moves: int) -> None:
    moved, num_worlds = 0, 40
    for seed in range(num_worlds):
        world = MoveWorld(seed=seed)
        sampling = Sampling(max_tokens=40, temperature=1.0, seed=seed, logprobs=2)
        asked = world.request("r", PROMPT, sampling)
        for each in range(num_moves):
            run_to(world, asked, 3 + 7 * each)
            assert asked.owner is not None
            assert world.move(asked, "d1" if asked.owner[0] == "d0" else "d0"), "the move was not even begun"
        world.run()
        world.check()
        assert not world.ended or world.moved
        moved += world.moved
        told = [each for each in world.stats if each.fence_ms or each.rounds]
        assert len(told) <= world.moved
    assert moved >= 0.9 * num_worlds * num_moves, "moves without faults nearly always come to their end"


def test_stop_tokens_and_min_tokens_hold_across_a_move() -> None:
    plain = MoveWorld().request("x", PROMPT, Sampling(max_tokens=80)).expected
    last = max(plain.index(each) for each in plain)  # the latest first occurrence
    early = next(each for each in plain[3:9] if each not in plain[10 : last + 1])
    for at in (2, 8, 20):
        world = MoveWorld()
        sampling = Sampling(max_tokens=80, min_tokens=10, stop_token_ids=(early, plain[last]))
        asked = world.request("r", PROMPT, sampling)
        run_to(world, asked, at)
        world.move(asked, "d1")
        world.run()
        world.check()
        assert (world.moved, asked.end, len(asked.delivered)) == (1, "stop", last + 1)


def test_moved_blocks_are_found_where_they_are_and_not_sent_again() -> None:
    world = MoveWorld()
    asked = world.request("r", PROMPT, Sampling(max_tokens=40))
    for at, to in ((8, "d1"), (16, "d0")):
        run_to(world, asked, at)
        world.move(asked, to)
    world.run()
    world.check()
    first, second = (each for each in world.stats if each.blocks_granted)
    assert first.blocks_reused == 0
    assert second.blocks_reused >= 3, "it left them there as prefix cache"
    assert second.blocks_moved < first.blocks_moved + 3


def test_first_step_and_figures_of_a_move_are_told() -> None:
    world = MoveWorld()
    asked = world.request("r", PROMPT, Sampling(max_tokens=40))
    run_to(world, asked, 8)
    move = world.move(asked, "d1")
    assert move is not None
    world.run()
    of_move = [each for each in world.stats if each.transfer_id == move.transfer]
    assert len([each for each in of_move if each.rounds]) == 1
    assert len([each for each in of_move if each.blocks_granted and each.bytes]) == 1
    assert len([each for each in of_move if each.first_step_ms > 0]) == 1


def test_worlds_that_only_lose_words_still_end() -> None:
    """A lost CommitRequest is said again, a lost commit answer is asked for, a lost Cancel is the router's affair."""
    for seed in range(40):
        world = MoveWorld(seed=seed, faults=Faults(lose=0.3, overtake=True))
        asked = world.request("r", PROMPT, Sampling(max_tokens=24))
        run_to(world, asked, 4)
        world.move(asked, "d1")
        run_to(world, asked, 12)
        world.move(asked, "d1" if asked.owner and asked.owner[0] == "d0" else "d0")
        world.run()
        world.check()


def test_owner_record_that_does_not_answer_keeps_both_ends_still() -> None:
    world = MoveWorld()
    asked = world.request("r", PROMPT, Sampling(max_tokens=24))
    run_to(world, asked, 4)
    world.move(asked, "d1")
    world.hold_commits = True
    end_ms = world.now_ms + 20_000
    world.run(until=lambda: world.now_ms >= end_ms)
    assert len(asked.delivered) < 24
    held = [each.held for each in world.workers["d0"].batch.sequences()]
    assert held == [True], "nobody resumes it"
    assert not len(world.workers["d1"].batch), "nobody activates it"
    world.hold_commits = False
    world.run()
    world.check()
    assert world.moved == 1 or world.ended


# ---- random worlds ---------------------------------------------------------------------------------------------------


def run_seed(seed: int) -> MoveWorld:
    """One world: four workers, requests that share prefixes and move about, faults drawn from the seed."""
    tight = seed % 3 == 0
    # The cores' own times are in virtual milliseconds, of which an event takes one on average.
    handoff = HandoffConfig(move_margin_tokens=8 if tight else 64, fence_limit_ms=50 if seed % 2 else 500)
    config = WorkerCoreConfig(decode=DecodeConfig(handoff=handoff))
    world = MoveWorld(
        seed=seed, names=("p0", "d0", "d1", "d2"), num_blocks=60 - 41 * tight - 4 * (seed % 9 == 0), config=config
    )
    random = world.random
    world.faults = Faults(
        lose=random.choice((0.0, 0.05, 0.2)),
        double=random.choice((0.0, 0.1)),
        overtake=random.random() < 0.7,
        fail_frame=random.choice((0.0, 0.1, 0.3)),
        kill=random.choice((0.0, 0.0, 0.1)),
        cancel=random.choice((0.0, 0.1, 0.3)),
        agent=random.choice((0.0, 0.1, 0.3)),
        leave_cancels=random.random() < 0.3,
    )
    if seed % 7 == 0:
        world.move_deadline_ms = 100
    shared = tuple(random.randrange(97) for _ in range(24))
    left, num_asked, requests = random.randrange(2, 8), 0, list[Asked]()
    moves = random.choice((0.02, 0.1, 0.3))
    for _ in range(60_000):
        if left and random.random() < 0.1:
            left -= 1
            num_asked += 1
            own = tuple(random.randrange(97) for _ in range(random.randrange(1, 20)))
            sampling = Sampling(
                max_tokens=random.choice((2, 20, 30) if tight else (2, 8, 20, 40)),
                temperature=random.choice((0.0, 1.0)),
                seed=seed,
                logprobs=random.choice((None, 0, 2)),
                repetition_penalty=random.choice((1.0, 1.1)),
            )
            prompt = (*shared[: random.randrange(0, 25)], *own)[: 16 if tight else None]
            at = random.choice(("d0", "d1", "d2"))
            asked = world.request(f"r{num_asked}", prompt, sampling, at=at, local=random.random() < 0.4)
            requests.append(asked)
        if requests and random.random() < moves:
            asked = random.choice(requests)
            moving = world.move(asked, random.choice(("d0", "d1", "d2", "p0")))
            if moving is not None and world.hits(world.faults.cancel):
                world.later(lambda asked=asked: world.cancel(asked, "client gone") if not asked.end else None, "cancel")  # type: ignore[misc]
            for chance, strike in ((world.faults.kill, world.kill), (world.faults.agent, world.kill_agent)):
                if moving is not None and world.hits(chance):
                    victim = random.choice((moving.source, moving.target))
                    world.later(lambda strike=strike, victim=victim: strike(victim), f"strike {victim}")  # type: ignore[misc]
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
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


def test_the_worlds_reach_what_they_are_for() -> None:
    """Moves are committed and fail, for many reasons."""
    moved, reasons = 0, ""
    for seed in range(60):
        world = run_seed(seed)
        moved += world.moved
        reasons += "\n".join(world.ended)
    assert moved > 60
    for meant in ("finished", "client gone", "revoked", "outgrown", "died"):
        assert meant in reasons, meant


def run_pressed(seed: int) -> tuple[MoveWorld, bool]:
    """A worker that runs out of blocks while it moves requests away; and whether one left at once for that reason."""
    handoff = HandoffConfig(move_margin_tokens=16, credits=1, max_frame_bytes=LAYOUT.block_bytes)
    config = WorkerCoreConfig(decode=DecodeConfig(handoff=handoff))
    world = MoveWorld(seed=seed, num_blocks=20, config=config)
    fled = False
    requests = [
        world.request(f"r{number}", tuple(range(number, number + 9)), Sampling(max_tokens=26), at="d0")
        for number in range(4)
    ]
    for _ in range(20_000):
        if world.random.random() < 0.1:
            world.move(world.random.choice(requests), world.random.choice(("d0", "d1")))
        stories = world.workers["d0"].core.decode.moves.stories()
        fled = fled or any("Starved: precopy -> fencing" in story for story in stories)
        if not world.step_one():
            break
    world.run()
    world.check()
    return world, fled


def test_worker_that_runs_out_of_blocks_while_it_moves_requests() -> None:
    moved, num_fled, reasons = 0, 0, ""
    for seed in range(30):
        world, fled = run_pressed(seed)
        moved += world.moved
        num_fled += fled
        reasons += "\n".join(world.ended)
    assert moved >= 20
    assert num_fled >= 1
    assert "the request lost its blocks to an older one" in reasons


# ---- planted bugs ----------------------------------------------------------------------------------------------------


def _resume_on_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source takes silence for a refusal."""

    def plant(self: SourceMigration, now_ms: int, reason: str) -> object:
        return self._fail(now_ms, reason)

    monkeypatch.setattr(SourceMigration, "_doubt", plant)
    running = Row(lambda machine, now_ms, event: machine._doubt(now_ms, "silence"), (MigrationState.RUNNING,))
    table: dict[tuple[MigrationState, type], Row[MigrationState]] = dict(MIGRATION_TABLE)
    table.update({(MigrationState.COMMITTING, kind): running for kind in (Cancel, PeerGone)})
    tick = MIGRATION_TABLE[MigrationState.COMMITTING, Tick]
    table[MigrationState.COMMITTING, Tick] = Row(tick.step, (*tick.to, MigrationState.RUNNING, MigrationState.FREED))
    monkeypatch.setattr(migration_source, "MIGRATION_TABLE", table)


def _fence_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is handed over as it was before the step that still runs it."""
    monkeypatch.setattr(Batch, "is_running", lambda self, request_id: False)


def _free_before_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source gives its blocks up with the commit request, whatever the answer."""
    send = SourceMigration._send_tail

    def plant(self: SourceMigration, now_ms: int) -> object:
        asked = send(self, now_ms)
        return [*asked, HandedOver()] if self.state is MigrationState.COMMITTING else asked

    monkeypatch.setattr(SourceMigration, "_send_tail", plant)


@pytest.mark.parametrize("plant", [_resume_on_a_guess, _fence_within_a_step, _free_before_the_answer])
def test_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    def search() -> None:
        for seed in range(300):
            run_seed(seed)

    with pytest.raises((AssertionError, KeyError)):
        search()
