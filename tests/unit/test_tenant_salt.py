"""Requests of different cache salts share no block; those of one salt do, and all get the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from role_cores import BLOCK, PROMPT, parts
from router_rig import Rig, request

from engine.prefix_cache import block_hashes
from engine.sequence import Sequence
from router.events import SendToWorker, Submitted
from tandem import wire
from tandem.messages import Assign, Role
from tandem.request import RequestId, Sampling

MINE, OTHERS = b"m" * 16, b"o" * 16


def run_in_turn(salts: list[bytes]) -> tuple[list[int], set[int]]:
    """One request after another over one cache: how many prompt tokens each found, and the tokens drawn."""
    _, batch, runner = parts()
    found: list[int] = []
    drawn: set[int] = set()
    for number, salt in enumerate(salts):
        request_id = RequestId(f"r{number}")
        sequence = Sequence(
            request_id=request_id, epoch=1, tokens=list(PROMPT), num_prompt_tokens=len(PROMPT),
            sampling=Sampling(max_tokens=1), cache_salt=salt,
        )  # fmt: skip
        batch.add(sequence)
        while batch.get(request_id) is not None and (plan := batch.compose()) is not None:
            outcome = batch.apply(plan, runner.run(plan))
            drawn |= {token.token_id for token in outcome.tokens}
        found.append(sequence.num_cached_tokens)
    return found, drawn


def test_a_tenant_hits_its_own_blocks_and_no_other_ones() -> None:
    found, drawn = run_in_turn([MINE, MINE, OTHERS, b"", OTHERS, b""])
    assert [num > 0 for num in found] == [False, True, False, False, True, True]
    assert len(drawn) == 1, "the salt changed a token"


def test_the_router_looks_for_salted_prefixes_and_tells_workers_the_salt() -> None:
    rig = Rig()
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    asked = replace(request(), cache_salt=MINE, owner="alice")
    actions = rig.feed(Submitted(request=asked))
    told = [each.message for each in actions if isinstance(each, SendToWorker) and isinstance(each.message, Assign)]
    assert len(told) == 2
    assert {each.cache_salt for each in told} == {MINE}


@pytest.mark.parametrize("salt", [b"short", b"x" * 17])
def test_salt_of_another_length_is_refused_by_name(salt: bytes) -> None:
    rig = Rig()
    rig.up("d0", Role.MIXED)
    [sent] = [each for each in rig.feed(Submitted(request=request())) if isinstance(each, SendToWorker)]
    message = wire.encode_router_message(sent.message)
    message.assign.cache_salt = salt
    with pytest.raises(ValueError, match=f"assign.cache_salt: has {len(salt)} bytes"):
        wire.decode_router_message(message)


def test_hashes_of_the_empty_salt_are_those_of_before_there_were_salts() -> None:
    assert block_hashes(b"m", range(16), 16)[0].hex() == "133c7400ae73ab9d43e7e5e88a56bf33"
    assert block_hashes(b"m", PROMPT, BLOCK, salt=MINE) != block_hashes(b"m", PROMPT, BLOCK)
