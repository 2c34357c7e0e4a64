"""A sequence whose logits are not finite ends alone, and nothing that it touched is shared any more."""

from __future__ import annotations

from role_cores import BLOCK, PROMPT, VOCAB, parts

from engine.fake_runner import expected_tokens
from engine.prefix_cache import block_hashes
from engine.sequence import Sequence
from engine.step import Drawn, Failed, Undrawn
from tandem.request import RequestId, Sampling


def sequence(name: str) -> Sequence:
    prompt = list(PROMPT)
    return Sequence(
        request_id=RequestId(name), epoch=1, tokens=prompt, num_prompt_tokens=len(prompt), sampling=Sampling()
    )


def test_its_neighbours_go_on_and_its_prefix_is_computed_anew() -> None:
    ledger, batch, runner = parts()
    answers: dict[str, list[int]] = {}

    def step(broken: str = "") -> tuple[Failed, ...]:
        plan = batch.compose()
        assert plan is not None
        sampled: list[Drawn | None] = [*runner.run(plan)]
        for number, row in enumerate(plan.rows):
            if row.request_id == broken:
                sampled[number] = Undrawn(reason="nan")
        outcome = batch.apply(plan, sampled)
        for token in outcome.tokens:
            answers.setdefault(token.request_id, []).append(token.token_id)
        assert ledger.audit() == []
        return outcome.failed

    batch.add(sequence("first"))
    while "first" not in answers:
        step()
    batch.add(sequence("broken"))  # shares the full blocks of the first one
    while "broken" not in answers:
        step()
    assert step("broken") == (Failed(request_id=RequestId("broken"), epoch=1, code="not_finite", reason="nan"),)
    assert batch.get(RequestId("broken")) is None
    assert ledger.match(block_hashes(b"", PROMPT, BLOCK)) == 0
    batch.add(sequence("later"))
    while len(batch):
        step()
    expected = expected_tokens(PROMPT, Sampling(), 16, VOCAB)
    assert (answers["first"], answers["later"]) == (expected, expected)
