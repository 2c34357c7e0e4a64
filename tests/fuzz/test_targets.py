"""Each target of the fuzzer for a moment, without guidance; and bugs planted into the agent, which it must find."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from draws import Draws
from random_messages import damage
from receiving_agent import World
from targets import FRAMES, Target, targets

from engine.blocks import BlockLedger
from kv_transfer import agent_attempts
from kv_transfer.agent_attempts import Attempts
from kv_transfer.agent_context import AgentContext
from kv_transfer.agent_incoming import IncomingLink
from kv_transfer.transports import pull
from router.events import Deliver
from router.outbox import Outbox
from tandem.request import RequestId, Token

TARGETS = targets()
NUM_INPUTS = {FRAMES: 400, "agent streams": 500, "worker core": 200, "router core": 500}
NUM_INPUTS_USUAL = 2000


def inputs(target: Target, num: int, seed: int) -> list[bytes]:
    """The seeds, some of them damaged, and noise."""
    draw = random.Random(seed)
    found = target.seeds()
    while len(found) < num:
        base = draw.choice(found) if draw.random() < 0.7 else draw.randbytes(draw.choice((16, 200, target.bytes_max)))
        found.append(damage(base, Draws(draw.randbytes(24)))[: target.bytes_max])
    return found


def run_all(run: Callable[[bytes], int], data: list[bytes]) -> None:
    """One after the other; an error names its input."""
    for each in data:
        try:
            run(each)
        except Exception as error:
            error.add_note(each.hex())
            raise


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_a_promise(name: str) -> None:
    run_all(TARGETS[name].run, inputs(TARGETS[name], NUM_INPUTS.get(name, NUM_INPUTS_USUAL), seed=1))


def forgetful(kind: type, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A method that does nothing any more."""
    return lambda monkeypatch: monkeypatch.setattr(kind, name, lambda *arguments: None)


def blind_to(word: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The check of a frame against what was granted no longer sees one thing."""
    mismatch = agent_attempts._mismatch

    def blind(*arguments: Any) -> str | None:
        found = mismatch(*arguments)
        return None if found is not None and word in found else found

    return lambda monkeypatch: monkeypatch.setattr(agent_attempts, "_mismatch", blind)


def _lands_again(self: Attempts, header: Any, checksum: int) -> bool:
    attempt = self._open[(header.transfer_id, header.epoch)]
    attempt.taking.discard(header.sequence)
    return not attempt.ended


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a block of another generation": blind_to("generation"),
    "a block that is not granted": blind_to("not among"),
    "another source's agent": blind_to("source agent"),
    "another incarnation": blind_to("source incarnation"),
    "a frame of another size": lambda monkeypatch: monkeypatch.setattr(pull, "check_frame", lambda *arguments: None),
    "a dropped frame that stays open": forgetful(AgentContext, "dropped"),
    "a frame that is not answered": forgetful(IncomingLink, "_nack"),
    "a frame that lands twice": lambda monkeypatch: monkeypatch.setattr(Attempts, "landed", _lands_again),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_of_the_agent_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    PLANTED[bug](monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        run_all(world.run, inputs(TARGETS[FRAMES], 400, seed=2))


def _delivers_twice(self: Outbox, request_id: RequestId, token: Token) -> None:
    self._actions += [Deliver(request_id=request_id, tokens=(token,))] * 2


def test_planted_bugs_of_the_cores_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind, method, bug in (
        ("router core", Outbox, "deliver", _delivers_twice),
        ("worker core", BlockLedger, "release", lambda *arguments: None),
    ):
        with monkeypatch.context() as planted:
            planted.setattr(kind, method, bug)
            with pytest.raises(AssertionError):
                run_all(TARGETS[name].run, inputs(TARGETS[name], 200, seed=2))
