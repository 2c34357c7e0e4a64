"""Canaries in the router's core: they go where they are sent or nowhere, and leave no trace but that a pair served."""

from __future__ import annotations

from dataclasses import replace

from router_rig import D, P, R, Rig, request, token

from router.config import RouterConfig
from router.events import Submitted, Tick, WorkerLost, WorkerSuspected
from router.request import RequestState
from tandem.errors import DeadlinePassed, Overloaded, RequestLost, Unavailable
from tandem.messages import AssignMode, Role
from tandem.request import FinishReason, Pair, RequestId, WorkerId

PAIR: Pair = ((P, 1), (D, 1))


def sent(rig: Rig, pair: Pair = PAIR, deadline_ms: int = 4_000) -> None:
    rig.feed(Submitted(request=replace(request(tokens=(1, 2, 3), max_tokens=2, deadline_ms=deadline_ms), canary=pair)))


def served(rig: Rig) -> None:
    rig.commit(D, 1, 1, (token(1, 0),))
    rig.token(D, 2, 1, FinishReason.LENGTH)


def pair_rig(config: RouterConfig | None = None) -> Rig:
    rig = Rig(config)
    rig.up("p0", Role.PREFILL)
    rig.up("p9", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    return rig


def test_a_canary_goes_through_its_pair_and_shows_that_it_serves() -> None:
    rig = pair_rig()
    assert rig.core.fleet.served_ms(PAIR) is None
    sent(rig)
    assert [(each.mode, each.num_prompt_tokens) for each in rig.assigns()] == [
        (AssignMode.DECODE, 3), (AssignMode.PREFILL, 3)
    ]  # fmt: skip
    at_ms = rig.now_ms
    rig.now_ms += 500
    assert rig.core.status(rig.now_ms).requests == (), "users do not see it"
    served(rig)
    assert rig.core.fleet.served_ms(PAIR) == at_ms, "when it was given, not when it ended"
    assert rig.core.status(rig.now_ms).requests == ()
    assert rig.core.num_requests == 0


def test_what_clients_ask_shows_it_too_and_an_answer_without_a_handoff_does_not() -> None:
    rig = pair_rig()
    rig.feed(Submitted(request=request(max_tokens=2)))
    source = rig.core.status(rig.now_ms).requests[-1].prefill_worker
    served(rig)
    assert rig.core.fleet.served_ms(((WorkerId(source), 1), (D, 1))) == rig.now_ms
    lone = pair_rig()
    lone.feed(Submitted(request=request(max_tokens=1)))
    lone.token(P, 1, 0, FinishReason.LENGTH)
    assert lone.core.fleet.served_ms(PAIR) is None


def test_nobody_learns_from_a_canary_what_a_prefill_takes() -> None:
    rig = pair_rig()
    sent(rig)
    (worker,) = [each for each in rig.core.fleet if each.worker_id == P]
    assert worker.queue_ms(rig.now_ms) == 0
    before_ms = worker.cost.prefill_ms(1_000, 1_000)
    rig.now_ms += 3_000
    served(rig)
    assert worker.cost.prefill_ms(1_000, 1_000) == before_ms


def test_a_canary_is_placed_once_at_once_and_nowhere_else() -> None:
    rig = pair_rig()
    sent(rig)
    rig.feed(WorkerLost(worker_id=P, incarnation=1, reason="killed"))
    rig.feed(Tick(), after_ms=5_000)
    assert isinstance(rig.error(), RequestLost | DeadlinePassed)
    assert len(rig.assigns()) == 2
    suspect = pair_rig()
    suspect.feed(WorkerSuspected(worker_id=D, incarnation=1, suspected=True))
    sent(suspect)
    assert isinstance(suspect.error(), Unavailable)


def test_a_canary_without_memory_fails_as_overloaded_and_holds_up_nobody() -> None:
    rig = Rig()
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE, total_blocks=5)
    rig.feed(Submitted(request=request("big", tuple(range(60)), max_tokens=30)))
    sent(rig)
    assert isinstance(rig.error(), Overloaded)
    assert rig.core.status(rig.now_ms).requests[-1].request_id == RequestId("big")


def test_a_canary_ends_by_its_deadline() -> None:
    rig = pair_rig()
    sent(rig)
    rig.feed(Tick(), after_ms=4_001)
    assert isinstance(rig.error(), DeadlinePassed)
    assert rig.core.fleet.served_ms(PAIR) is None


def test_a_full_line_takes_a_canary_in() -> None:
    rig = pair_rig(RouterConfig(requests_max=1))
    rig.feed(Submitted(request=request("client")))
    sent(rig)
    assert rig.ends() == []
    assert {each.request_id for each in rig.assigns()} == {RequestId("client"), R}
    assert rig.core.status(rig.now_ms).requests[-1].state is RequestState.PREFILLING


def test_a_mixed_worker_is_asked_alone() -> None:
    rig = Rig()
    rig.up("m0", Role.MIXED)
    alone: Pair = ((WorkerId("m0"), 1), (WorkerId("m0"), 1))
    sent(rig, alone)
    (assign,) = rig.assigns()
    assert assign.mode is AssignMode.LOCAL
    rig.token(WorkerId("m0"), 1, 0)
    assert rig.core.fleet.served_ms(alone) is None, "one token is not the end of it"
    rig.token(WorkerId("m0"), 1, 1, FinishReason.LENGTH)
    assert rig.core.fleet.served_ms(alone) == rig.now_ms
