"""Each edge of a handoff, once: two worker cores, a router that only keeps the owner record, tokens by the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from pair_world import BLOCK, SESSION, Asked, Faults, World

from cluster.worker_core import WorkerCoreConfig
from engine.fake_runner import expected_tokens, fake_layout
from kv_transfer.actions import FromRouter
from kv_transfer.handoff import HandoffConfig
from kv_transfer.handoff_source import SourceState
from kv_transfer.handoff_target import TargetState
from kv_transfer.messages import Body, Cancel, CommitRequest, Grant, Header, Offer, Refuse, TransferMessage, Wait
from prefill_worker.config import PrefillConfig
from tandem.messages import OwnerIs
from tandem.request import Sampling, TransferId

PROMPT = tuple(range(3, 30))  # 27 tokens: six full blocks and three tokens of a seventh
WHOLE = tuple(range(3, 31))  # seven full blocks
FIRST_TOKEN = expected_tokens(PROMPT, Sampling(), 1, 97)[0]


def said(world: World, kind: type[Body]) -> int:
    return sum(isinstance(message.body, kind) for message in world.words)


def source_state(world: World, asked: Asked) -> SourceState | None:
    attempt = world.worker("p0").core.prefill._attempts.get(asked.transfer)
    return None if attempt is None else attempt.machine.state


def target_state(world: World, asked: Asked) -> TargetState | None:
    attempt = world.worker("d0").core.decode._attempts.get(asked.transfer)
    return None if attempt is None or attempt.machine is None else attempt.machine.state


def run_until(world: World, reached: Callable[[], bool]) -> None:
    """Runs until then; it must be reached."""
    world.run(until=reached)
    assert reached(), world.tail()


# ---- the way without faults --------------------------------------------------------------------------------------


def test_tokens_equal_the_oracle_and_nothing_is_left() -> None:
    world = World()
    asked = world.ask("r", PROMPT)
    world.run()
    world.check()
    assert (asked.end, asked.num_attempts) == ("length", 1)
    (committed,) = [each for each in world.stats if each.committed_ms]
    assert (committed.blocks_granted, committed.blocks_moved, committed.blocks_reused) == (7, 7, 0)
    assert committed.tokens_recomputed == 0
    (sent,) = [each for each in world.stats if each.last_chunk_start_ms]
    assert sent.first_frame_ms <= sent.last_chunk_start_ms, "no frame left before the last chunk began"


def test_last_partial_block_is_sent_whole() -> None:
    world = World()
    world.ask("r", PROMPT)
    world.run()
    (committed,) = [each for each in world.stats if each.committed_ms]
    assert committed.bytes == 7 * fake_layout(block_size=BLOCK).block_bytes


def test_frames_respect_their_size_and_the_credits() -> None:
    block_bytes = fake_layout(block_size=BLOCK).block_bytes
    handoff = HandoffConfig(max_frame_bytes=block_bytes, credits=2)
    config = WorkerCoreConfig(prefill=PrefillConfig(handoff=handoff))
    world = World(config=config)
    world.ask("r", PROMPT)
    world.run()
    world.check()
    (committed,) = [each for each in world.stats if each.committed_ms]
    assert committed.frames == 7


def test_whole_prompt_is_held_already() -> None:
    """No frame moves, and yet the owner record is asked."""
    world = World()
    first = world.ask("r1", WHOLE)
    world.run()
    world.words.clear()
    second = world.ask("r2", WHOLE)
    world.run()
    world.check()
    committed = [each for each in world.stats if each.request_id == "r2" and each.committed_ms]
    assert [(each.blocks_moved, each.blocks_reused, each.frames) for each in committed] == [(0, 7, 0)]
    assert said(world, CommitRequest) == 1
    assert second.delivered == first.delivered
    assert second.epoch == 2, "the commit did not go through the owner record"


def test_next_turn_moves_only_what_is_new() -> None:
    """What the target wrote itself is as good as what it received."""
    world = World()
    first = world.ask("r1", PROMPT, max_tokens=10)
    world.run()
    second = world.ask("r2", (*PROMPT, *first.delivered, 5, 6, 7, 8))
    world.run()
    world.check()
    (committed,) = [each for each in world.stats if each.request_id == second.request_id and each.committed_ms]
    assert committed.blocks_reused == (len(PROMPT) + 9) // BLOCK
    (sent,) = [each for each in world.stats if each.request_id == second.request_id and each.last_chunk_start_ms]
    assert sent.tokens_cached == len(PROMPT) // BLOCK * BLOCK


def test_local_request_uses_what_a_handoff_left() -> None:
    world = World()
    first = world.ask("r1", PROMPT)
    world.run()
    turn = (*PROMPT, *first.delivered, 9)
    world.ask("r2", turn, local=True)
    world.run(until=lambda: bool(world.worker("d0").batch.num_running))
    sequence = world.worker("d0").batch.sequences()[0]
    assert sequence.num_cached_tokens == (len(PROMPT) + 5) // BLOCK * BLOCK
    world.run()
    world.check()


def test_first_token_ends_the_request() -> None:
    world = World(faults=Faults(leave_cancels=True))
    asked = world.ask("r", PROMPT, stop=(FIRST_TOKEN,))
    world.run()
    world.check()
    assert (asked.end, asked.delivered) == ("stop", [FIRST_TOKEN])
    assert said(world, CommitRequest) == 0
    assert world.now_ms < 10_000, "the target was not told, it waited for a deadline"


def test_many_requests_share_the_workers() -> None:
    world = World(seed=3, names=("p0", "d0", "d1"), num_blocks=48)
    asked = [world.ask(f"r{i}", (*PROMPT[: 3 * i], i, 40 + i), target=f"d{i % 2}") for i in range(9)]
    world.run()
    world.check()
    assert all(each.end == "length" for each in asked)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_exact_requests_need_equal_fingerprints() -> None:
    world = World()
    world.worker("d0").core.decode._room._layout = replace(fake_layout(block_size=BLOCK), fingerprint="other")
    asked = world.ask("r", PROMPT)
    run_until(world, lambda: bool(asked.failures))
    assert "fingerprint is 'fake' at the source and 'other' at the target" in asked.failures[0]
    world.cancel(asked, "enough")
    world.run()
    world.check()
    assert said(world, Refuse) >= 1


def test_other_requests_do_not() -> None:
    world = World(config=WorkerCoreConfig(prefill=PrefillConfig(exact=False)))
    world.worker("d0").core.decode._room._layout = replace(fake_layout(block_size=BLOCK), fingerprint="other")
    asked = world.ask("r", PROMPT)
    world.run()
    world.check()
    assert (asked.end, asked.num_attempts) == ("length", 1)


def test_target_without_room_lets_the_source_wait() -> None:
    world = World(num_blocks=16)
    first = world.ask("r1", PROMPT, max_tokens=30)
    run_until(world, lambda: first.epoch == 2)
    second = world.ask("r2", tuple(range(40, 68)), max_tokens=20)
    run_until(world, lambda: said(world, Wait) > 0)
    world.run()
    world.check()
    assert (second.end, second.num_attempts) == ("length", 1)


def test_prompt_that_can_never_fit_is_refused_with_its_limit() -> None:
    world = World(num_blocks=4)
    asked = world.ask("r", PROMPT)
    world.run()
    world.check()
    assert asked.end.startswith("invalid_request")
    assert "needs 7 KV blocks" in asked.end
    assert "the pool has 4" in asked.end


# ---- words that are lost, doubled, late, stale -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Offer, Grant, CommitRequest])
def test_lost_word_is_said_again(kind: type[Body]) -> None:
    world = World()
    lost: list[TransferMessage] = []

    def lose(message: TransferMessage) -> bool:
        if isinstance(message.body, kind) and not lost:
            lost.append(message)
            return True
        return False

    world.lose = lose
    asked = world.ask("r", PROMPT)
    world.run()
    world.check()
    assert len(lost) == 1
    assert (asked.end, asked.num_attempts) == ("length", 1)


@pytest.mark.parametrize("seed", range(20))
def test_doubled_and_overtaken_words_change_nothing(seed: int) -> None:
    world = World(seed=seed, faults=Faults(double=1.0, overtake=True))
    asked = world.ask("r", PROMPT)
    world.run()
    world.check()
    assert (asked.end, asked.num_attempts) == ("length", 1)


def test_lost_cancel_of_the_source_ends_by_the_targets_deadline() -> None:
    world = World(faults=Faults(leave_cancels=True), seed=1)
    world.hits = lambda chance: False  # type: ignore[method-assign]
    world.lose = lambda message: isinstance(message.body, Cancel)
    world.ask("r", PROMPT, stop=(FIRST_TOKEN,), deadline_ms=20_000)
    world.run()
    world.check()
    assert world.now_ms > 20_000


def test_source_keeps_all_until_the_owner_record_answers() -> None:
    world = World()
    asked = world.ask("r", PROMPT)
    world.hold_commits = True
    began_ms = world.now_ms
    run_until(world, lambda: world.now_ms > began_ms + 5_000)
    assert source_state(world, asked) is SourceState.FENCED
    assert world.worker("p0").ledger.counts().owned == 7
    assert world.worker("d0").ledger.counts().granted == 7
    world.hold_commits = False
    world.run()
    world.check()
    assert (asked.end, asked.num_attempts) == ("length", 1)


def test_lost_notice_to_the_source_is_asked_for() -> None:
    """Edge 16: the target runs, the source hears of it only when it asks."""
    world = World()
    asked = world.ask("r", PROMPT)
    say = world.say
    dropped: list[object] = []

    def drop_first(name: str, message: object) -> None:
        if name == "p0" and isinstance(message, OwnerIs) and not dropped:
            dropped.append(message)
        else:
            say(name, message)  # type: ignore[arg-type]

    world.say = drop_first  # type: ignore[method-assign]
    world.run()
    world.check()
    assert len(dropped) == 1
    assert (asked.end, asked.num_attempts) == ("length", 1)


def stale_headers(header: Header) -> list[Header]:
    return [replace(header, epoch=7), replace(header, target_incarnation=7), replace(header, source_incarnation=7)]


@pytest.mark.parametrize("which", range(3))
def test_stale_words_are_dropped_and_counted(which: int) -> None:
    world = World()
    asked = world.ask("r", PROMPT)
    run_until(world, lambda: source_state(world, asked) is SourceState.SENDING)
    grant = next(message for message in world.words if isinstance(message.body, Grant))
    core = world.worker("p0").core
    stale = replace(grant, header=stale_headers(grant.header)[which], body=Cancel(reason="old"))
    before = core.prefill.num_ignored
    assert not [each for each in core.handle(world.now_ms, stale) if not hasattr(each, "piece")]
    assert core.prefill.num_ignored == before + 1
    assert source_state(world, asked) is SourceState.SENDING
    world.run()
    world.check()


# ---- frames that fail --------------------------------------------------------------------------------------------


def test_frame_that_fails_twice_is_sent_again() -> None:
    world = World()
    fails = [True, True]
    world.hits = lambda chance: fails.pop() if fails and chance == 0.5 else False  # type: ignore[method-assign]
    world.faults = Faults(fail_frame=0.5)
    asked = world.ask("r", PROMPT)
    world.run()
    world.check()
    assert not fails
    assert (asked.end, asked.num_attempts) == ("length", 1)


def test_frame_that_always_fails_ends_the_attempt_and_leaves_a_warm_source() -> None:
    world = World()
    world.faults = Faults(fail_frame=0.5)
    world.hits = lambda chance: chance == 0.5 and world.requests[asked.request_id].num_attempts == 1  # type: ignore[method-assign]
    asked = world.ask("r", PROMPT)
    world.run()
    world.check()
    assert asked.num_attempts == 2
    assert "failed 3 times" in asked.failures[0]
    sent = [each for each in world.stats if each.last_chunk_start_ms]
    assert sent[-1].tokens_cached > 0


# ---- ends from outside, at every state ---------------------------------------------------------------------------

SOURCE_STATES = [SourceState.OFFERED, SourceState.SENDING, SourceState.FENCED, SourceState.HANDED]
TARGET_STATES = [TargetState.NONE, TargetState.RESERVED, TargetState.RECEIVING, TargetState.SEALED]
State = SourceState | TargetState


def at(state: State, seed: int) -> tuple[World, Asked]:
    """A world in which the request is in that state at its source or its target."""
    for attempt in range(60):
        world = World(seed=seed * 60 + attempt)
        asked = world.ask("r", PROMPT)
        reached = [False]

        def there(world: World = world, asked: Asked = asked, reached: list[bool] = reached) -> bool:
            now = source_state(world, asked) if isinstance(state, SourceState) else target_state(world, asked)
            reached[0] = now is state
            return reached[0] or bool(asked.end)

        world.run(until=there)
        if reached[0]:
            return world, asked
    raise AssertionError(f"{state} is never reached")


@pytest.mark.parametrize("state", [*SOURCE_STATES, *TARGET_STATES])
@pytest.mark.parametrize("seed", range(4))
def test_client_leaves(state: State, seed: int) -> None:
    world, asked = at(state, seed)
    world.cancel(asked, "client gone")
    world.run()
    world.check()


@pytest.mark.parametrize("state", [*SOURCE_STATES, *TARGET_STATES])
@pytest.mark.parametrize("seed", range(4))
def test_router_goes(state: State, seed: int) -> None:
    world, _ = at(state, seed)
    world.router_gone()
    world.run()
    world.check()


@pytest.mark.parametrize("state", [*SOURCE_STATES, *TARGET_STATES])
@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("seed", range(4))
def test_worker_dies(state: State, victim: str, seed: int) -> None:
    world, asked = at(state, seed)
    world.kill(victim)
    world.run()
    world.check()
    assert asked.end == "length"


@pytest.mark.parametrize("state", [*SOURCE_STATES, *TARGET_STATES])
@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("seed", range(4))
def test_agent_dies(state: State, victim: str, seed: int) -> None:
    world, asked = at(state, seed)
    world.kill_agent(victim)
    world.run()
    world.check()
    assert asked.end == "length"


def test_commit_proceeds_when_the_source_dies_after_the_seal() -> None:
    """Edge 13: the target has all it needs."""
    world, asked = at(TargetState.SEALED, 0)
    world._lost = lambda name, incarnation: None  # type: ignore[method-assign]
    world.kill("p0")
    world.run()
    world.check()
    assert (asked.end, asked.num_attempts) == ("length", 1)


def test_blocks_stay_in_quarantine_until_the_agent_is_quiet() -> None:
    world, asked = at(TargetState.RECEIVING, 0)
    agent = world.worker("d0").agent
    agent.under_way[asked.transfer, asked.epoch] = agent.under_way.get((asked.transfer, asked.epoch), 0) + 1
    world.cancel(asked, "client gone")
    world.run()
    assert world.worker("d0").ledger.counts().quarantined == 7
    agent.under_way[asked.transfer, asked.epoch] -= 1
    agent.quieten((TransferId(f"{asked.request_id}:1"), 1))
    world.run()
    world.check()


def test_owner_record_that_gives_back_what_was_given_up_hears_of_it() -> None:
    """The router's commit and our end of the session cross: nobody would run the request."""
    world, asked = at(TargetState.SEALED, 0)
    core = world.worker("d0").core
    world.router_gone()
    run_until(world, lambda: target_state(world, asked) in (TargetState.QUARANTINE, None))
    address = world.worker("d0").address
    owner = OwnerIs(
        request_id=asked.request_id,
        transfer_id=TransferId("r:1"),
        epoch=2,
        worker_id=address.worker_id,
        incarnation=address.incarnation,
    )
    actions = core.handle(world.now_ms, FromRouter(session=SESSION, message=owner))
    assert "the target had given the attempt up" in str(actions)
