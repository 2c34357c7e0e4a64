"""Seeded worlds: the real cores keep every promise under faults, and planted bugs are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from smoke import smoke_worlds

import router.attempts
import router.commit
import router.owners
import simulator.moves
from cluster.draining import Looked, left_on
from decode_worker.core import DecodeCore
from engine.blocks import BlockLedger
from engine.events import Tick
from engine.sequence import Sequence
from engine.step import Batch
from engine.swapping import Swapping
from kv_transfer.exports import Exports
from kv_transfer.handoff import HandedOver, Quarantine, Row, Silence
from kv_transfer.handoff_target import TargetHandoff, TargetState
from kv_transfer.messages import EndTransfer, TransferQuiet
from kv_transfer.migration_source import MIGRATION_TABLE, MigrationState, SourceMigration
from kv_transfer.plan import SendWindow
from prefill_worker.core import PrefillCore
from router.placement import NoPlacement, Placer, Why
from router.request import RequestSnapshot
from simulator.agents import VirtualAgent
from simulator.choices import Choices
from simulator.run import main, run_seed, run_seeds, run_world, show, shrink
from simulator.world import World
from tandem.request import WorkerId

pytestmark = pytest.mark.timeout(600)  # a search through worlds, on a machine that others use, too

SEEDS_TO_FIND = 2000
ANY = tuple(MigrationState)
STORED_SEEDS = Path(__file__).parent.parent / "testdata" / "seeds.txt"


@pytest.mark.slow
def test_every_promise_holds_in_seeded_worlds() -> None:
    broken = [outcome for outcome in smoke_worlds() if outcome.problem]
    assert not broken, "\n".join(show(outcome) for outcome in broken[:1])


def test_seeds_that_once_found_something_stay_quiet() -> None:
    """One a line, with what it found behind a #."""
    lines = STORED_SEEDS.read_text().splitlines()
    seeds = [int(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]
    assert seeds
    broken = [outcome for outcome in run_seeds(seeds) if outcome.problem]
    assert not broken, "\n".join(show(outcome) for outcome in broken[:1])


def test_a_seed_makes_the_same_world_and_its_choices_make_it_again() -> None:
    first, again = run_seed(7), run_seed(7)
    replayed = run_world(Choices(replay=first.taken), 7)
    assert first.world is not None
    assert again.world is not None
    assert replayed.world is not None
    assert first.world.story == again.world.story == replayed.world.story
    assert len(first.world.story) > 10


def statuses(world: World) -> list[RequestSnapshot]:
    """What the routers that live know of requests."""
    return [each for router in world.routers for each in router.core.status(router.clock.now_ms).requests]


def test_the_calm_world_hands_every_request_over() -> None:
    """Without a choice left, nothing goes wrong; what is served then is served by a handoff, as it should be."""
    outcome = run_world(Choices(), 0)
    assert not outcome.problem, show(outcome)
    assert outcome.world is not None
    requests = statuses(outcome.world)
    assert {each.mode for each in requests} == {"prefill"}
    assert {each.state for each in requests} == {"finished"}
    assert all(each.transferred.blocks_moved for each in requests)


@pytest.mark.slow
def test_the_worlds_meet_what_they_are_meant_to_meet() -> None:
    """Faults that never happen test nothing."""
    told: list[str] = []
    num_moved = num_replaced = num_lost = num_corrupted = num_swapped = num_recomputed = 0
    for outcome in smoke_worlds():
        world = outcome.world
        assert world is not None
        for each in statuses(world):
            told.append(each.error)
            num_moved += each.transferred.blocks_moved
            num_replaced += each.num_replacements
        told += world.story
        for worker in world.workers.values():
            num_swapped += worker.core.batch.swapping.num_back
            num_recomputed += worker.core.batch.swapping.num_recomputed
        num_lost += world.agent_faults.num_lost
        num_corrupted += world.agent_faults.num_corrupted
    assert num_moved > 500
    assert num_replaced > 30
    assert num_swapped > 15
    assert num_recomputed > 10
    assert num_lost > 30
    assert num_corrupted > 30
    meant = ("broken", "crashes", "taken for dead", "stands still", "agent", "cancelled", "cut off", "drains", "leaves")
    assert not [each for each in (*meant, "suspected", "move 1:") if each not in "\n".join(told)]


# ---- planted bugs --------------------------------------------------------------------------------------------------


def source_frees_before_the_answer(patch: pytest.MonkeyPatch) -> None:
    """Its blocks are given up as soon as its last frame is on the way."""
    send, prefilled = Exports.send, PrefillCore._prefilled

    def unpinned(exports: Exports, attempt, asked, table):  # type: ignore[no-untyped-def]
        sent = send(exports, attempt, asked, table)
        exports._ledger.end_export(sent.header.transfer_id, sent.header.source_blocks)
        return sent

    def released(core: PrefillCore, now_ms, request, token):  # type: ignore[no-untyped-def]
        actions = prefilled(core, now_ms, request, token)
        core._ledger.release(request.sequence.owner)
        return actions

    patch.setattr(Exports, "send", unpinned)
    patch.setattr(PrefillCore, "_prefilled", released)


def mover_frees_before_the_answer(patch: pytest.MonkeyPatch) -> None:
    """The source of a move takes its own request to commit for the answer."""

    def free(machine: SourceMigration, now_ms: int):  # type: ignore[no-untyped-def]
        actions = send_tail(machine, now_ms)
        return [*actions, HandedOver()] if machine.state is MigrationState.COMMITTING else actions

    send_tail = SourceMigration._send_tail
    patch.setattr(SourceMigration, "_send_tail", free)


def mover_resumes_on_an_ambiguous_commit(patch: pytest.MonkeyPatch) -> None:
    """The source waits for the commit's answer for a while, and then runs the request again."""

    def resume(machine: SourceMigration, now_ms: int, reason: str):  # type: ignore[no-untyped-def]
        return machine._fail(now_ms, reason)

    patch.setattr(SourceMigration, "_doubt", resume)
    patch.setitem(MIGRATION_TABLE, (MigrationState.COMMITTING, Tick), Row(SourceMigration._tick_committing, ANY))


def mover_never_resumes(patch: pytest.MonkeyPatch) -> None:
    """A move that failed at the fence leaves its request standing still."""
    patch.setattr(Batch, "resume", lambda batch, request_id: None)


def mover_cuts_the_tail_before_the_fence(patch: pytest.MonkeyPatch) -> None:
    """The request is taken to stand still while a step with it is under way."""
    patch.setattr(Batch, "is_running", lambda batch, request_id: False)


def router_accepts_a_stale_epoch(patch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a request gets it, whatever attempt it speaks of."""
    patch.setattr(router.commit, "refusal", lambda request, worker, ask: "" if request.owner else "over")


def router_hears_stale_owners(patch: pytest.MonkeyPatch) -> None:
    """Tokens of any epoch and worker are taken, as long as their index fits."""
    patch.setattr(router.commit, "is_owner", lambda owner, worker, epoch: owner is not None)


def router_forgets_settled_attempts(patch: pytest.MonkeyPatch) -> None:
    """The epoch of a commit is given away again, to the next placement."""
    patch.setattr(router.attempts, "EPOCHS_PER_PLACEMENT", 1)


def target_runs_with_a_hole(patch: pytest.MonkeyPatch) -> None:
    """Sent is as good as arrived: the source asks for the commit then, and the target believes it."""

    def seal(machine: TargetHandoff, now_ms: int):  # type: ignore[no-untyped-def]
        if machine._commit is None:
            return []
        machine.state = TargetState.SEALED
        machine._next_ms = now_ms + machine.config.resend_ms
        return [*([] if machine._quiet else [Silence()]), machine._ask()]

    patch.setattr(TargetHandoff, "_seal", seal)
    patch.setattr(SendWindow, "complete", property(lambda window: window._next == window.num_blocks))


def target_skips_the_quarantine(patch: pytest.MonkeyPatch) -> None:
    """Blocks of a transfer that was given up are used again while frames are still on the way."""
    do = DecodeCore._do

    def hasty(core: DecodeCore, now_ms, request, machine, asked):  # type: ignore[no-untyped-def]
        actions = do(core, now_ms, request, machine, asked)
        if isinstance(asked, Quarantine):
            core._ledger.end_quarantine(machine.attempt.transfer_id)
        return actions

    patch.setattr(DecodeCore, "_do", hasty)


def target_keeps_what_has_not_landed(patch: pytest.MonkeyPatch) -> None:
    """Of an attempt that failed every offered block becomes prefix cache, whether or not it has come."""

    def offered(machine: TargetHandoff) -> tuple[tuple[int, int], ...]:
        if machine._offer is None or machine._grant is None:
            return ()
        reused, blocks = machine._grant.num_reused, machine._grant.blocks
        return tuple(enumerate(blocks[: max(0, len(machine._offer.hashes) - reused)], reused))

    patch.setattr(TargetHandoff, "_whole", offered)


def agent_believes_every_frame(patch: pytest.MonkeyPatch) -> None:
    """No checksum is compared."""
    patch.setattr(VirtualAgent, "_is_whole", lambda agent, payload, checksum: True)


def agent_checks_no_generations(patch: pytest.MonkeyPatch) -> None:
    """An agent says that it is quiet and writes on, whoever has the blocks by then."""

    def end(agent: VirtualAgent, command: EndTransfer) -> None:
        agent._tell(TransferQuiet(transfer_id=command.transfer_id, epoch=command.epoch))

    patch.setattr(VirtualAgent, "_end", end)
    patch.setattr(VirtualAgent, "_may_write", lambda agent, header: None)


def blocks_are_freed_under_a_step(patch: pytest.MonkeyPatch) -> None:
    """A request that is cancelled while its step runs gives its blocks away at once."""
    patch.setattr(BlockLedger, "begin_step", lambda ledger, owners: None)


def drain_frees_under_a_reader(patch: pytest.MonkeyPatch) -> None:
    """A worker leaves when it has no request any more, whoever still reads its blocks."""

    def requests_only(snapshot, worker_id, incarnation, obstacle):  # type: ignore[no-untyped-def]
        looked = left_on(snapshot, worker_id, incarnation, obstacle)
        return Looked(num_requests=looked.num_requests, num_blocks=0)

    patch.setattr(simulator.moves, "left_on", requests_only)


def incarnations_are_reused(patch: pytest.MonkeyPatch) -> None:
    """A worker that comes back calls itself what it was called before."""

    def same(world: World, worker_id: WorkerId) -> int:
        return int.from_bytes(worker_id.encode()[-8:], "big")

    patch.setattr(World, "_next_incarnation", same)


def swap_frees_before_the_copy(patch: pytest.MonkeyPatch) -> None:
    """Whose blocks are to be copied out gives them away at once, to be written by this very step."""

    def hasty(batch: Batch, sequence: Sequence) -> None:
        preempt(batch, sequence)
        if sequence.copying:
            batch._lose_blocks(sequence)

    preempt = Batch._preempt
    patch.setattr(Batch, "_preempt", hasty)


def swap_brings_back_one_block_too_few(patch: pytest.MonkeyPatch) -> None:
    """The last block, which is seldom full, stays behind."""

    def short(swapping: Swapping, sequence: Sequence, *, num_found: int) -> None:
        bring_back(swapping, sequence, num_found=num_found)
        if swapping.copies_back:
            swapping.copies_back.pop()

    bring_back = Swapping.bring_back
    patch.setattr(Swapping, "bring_back", short)


def swap_keeps_slots_of_who_has_left(patch: pytest.MonkeyPatch) -> None:
    """A request that ends or goes elsewhere while it is swapped out keeps its slots."""
    patch.setattr(Batch, "remove", lambda batch, request_id: batch._sequences.pop(request_id))


def a_lost_prefill_pool_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    """No worker serves alone, though all of the other kind are gone."""
    nobody = NoPlacement(why=Why.NO_WORKERS, reason="no pair")
    patch.setattr(Placer, "_local", lambda placer, case, roles, why: nobody)


BUGS = [
    swap_frees_before_the_copy,
    swap_brings_back_one_block_too_few,
    swap_keeps_slots_of_who_has_left,
    a_lost_prefill_pool_is_waited_for,
    source_frees_before_the_answer,
    mover_frees_before_the_answer,
    mover_resumes_on_an_ambiguous_commit,
    mover_never_resumes,
    mover_cuts_the_tail_before_the_fence,
    router_accepts_a_stale_epoch,
    router_hears_stale_owners,
    target_runs_with_a_hole,
    router_forgets_settled_attempts,
    target_skips_the_quarantine,
    target_keeps_what_has_not_landed,
    agent_believes_every_frame,
    agent_checks_no_generations,
    blocks_are_freed_under_a_step,
    drain_frees_under_a_reader,
    incarnations_are_reused,
]


# Where few worlds show it the search begins shortly before one that does. When worlds change it takes longer.
FIRST_SEEDS: dict[Callable[[pytest.MonkeyPatch], None], int] = {
    swap_keeps_slots_of_who_has_left: 56,
    mover_frees_before_the_answer: 101,
    mover_resumes_on_an_ambiguous_commit: 131,
    mover_never_resumes: 63,
    mover_cuts_the_tail_before_the_fence: 14,
    router_accepts_a_stale_epoch: 27,
    drain_frees_under_a_reader: 60,
    incarnations_are_reused: 17,
}


@pytest.mark.slow
@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    first = FIRST_SEEDS.get(plant, 0)
    outcomes = run_seeds(range(first, first + SEEDS_TO_FIND), stop=lambda outcome: bool(outcome.problem))
    assert outcomes[-1].problem, f"not found in {SEEDS_TO_FIND} worlds"
    print(f"{plant.__name__}: seed {outcomes[-1].seed}: {outcomes[-1].problem[:200]}")


def test_a_broken_world_is_made_calmer(monkeypatch: pytest.MonkeyPatch) -> None:
    agent_believes_every_frame(monkeypatch)
    (*_, broken) = run_seeds(range(SEEDS_TO_FIND), stop=lambda outcome: bool(outcome.problem))
    calmer = shrink(broken, runs_max=120)
    assert calmer.problem
    assert sum(map(bool, calmer.taken)) < sum(map(bool, broken.taken)) / 2


def test_the_command_says_what_it_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3"]) == 0
    assert "3 worlds" in capsys.readouterr().out
    assert main(["--seed", "3"]) == 0
    assert "all promises held" in capsys.readouterr().out
