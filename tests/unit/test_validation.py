"""Validation: every range at its edges, the seed, the ends of sequence, and the words of a refusal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.validation import (
    ANSWER_MARK,
    Limits,
    SamplingFields,
    check_num_choices,
    check_prompt,
    check_request_id,
    check_sampling,
    check_stops,
    seed_of,
    show,
)
from tandem.errors import InvalidRequest
from tandem.request import Sampling

LIMITS = Limits(vocab_size=100, context_tokens=50, eos_token_ids=(2, 3))


def checked(fields: SamplingFields, *, choice: int = 0) -> Sampling:
    return check_sampling(fields, limits=LIMITS, num_prompt_tokens=10, request_id="r", choice=choice)


def with_field(name: str, value: Any) -> SamplingFields:
    return replace(SamplingFields(), **{name: value})


def test_nothing_sent_gives_the_defaults() -> None:
    assert checked(SamplingFields()) == Sampling(
        temperature=1.0, seed=seed_of("r"), max_tokens=40, stop_token_ids=(2, 3)
    )


# Field, values at the edges that are taken, values just outside.
RANGES: list[tuple[str, list[object], list[object]]] = [
    ("temperature", [0, 1e-5, 2], [-0.1, 2.1, 1e-6, math.nan, math.inf]),
    ("top_p", [0.001, 1], [0, 1.1, -1, math.nan]),
    ("top_k", [0, 100], [-1, 101]),
    ("min_p", [0, 1], [-0.1, 1.1, math.nan]),
    ("repetition_penalty", [0.01, 2], [0, 2.1, math.nan]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1, math.nan]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1, math.nan]),
    ("seed", [0, -(2**63), 2**64 - 1], [-(2**63) - 1, 2**64]),
    ("max_tokens", [1, 40], [0, 41, -1, 10**30]),
    ("min_tokens", [0, 40], [-1, 41]),
    ("logprobs", [0, 20], [-1, 21]),
]


@pytest.mark.parametrize(("name", "good", "bad"), RANGES)
def test_ranges_at_their_edges(name: str, good: list[object], bad: list[object]) -> None:
    for value in good:
        checked(with_field(name, value))
    for value in bad:
        with pytest.raises(InvalidRequest, match=r"must be|at most") as caught:
            checked(with_field(name, value))
        assert caught.value.field == name
        assert show(value) in caught.value.message


def test_lists_and_maps() -> None:
    for name, value, message in (
        ("stop_token_ids", [100], "stop_token_ids.0: is 100, must be 0 to 99"),
        ("stop_token_ids", [5] * 129, "stop_token_ids: has 129 ids, at most 128"),
        ("logit_bias", {100: 1.0}, "logit_bias: token 100 must be 0 to 99"),
        ("logit_bias", {5: 101.0}, "logit_bias.5: is 101.0, must be -100 to 100"),
        ("logit_bias", {5: math.nan}, "logit_bias.5: is nan"),
        ("logit_bias", dict.fromkeys(range(1025), 0.0), "logit_bias: has 1025 entries, at most 1024"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            checked(with_field(name, value))
        assert caught.value.message.startswith(message)
    sampling = checked(SamplingFields(stop_token_ids=[7, 2], logit_bias={9: 1, 4: -1}))
    assert sampling.stop_token_ids == (7, 2, 3)
    assert sampling.logit_bias == ((4, -1.0), (9, 1.0))
    assert checked(SamplingFields(stop_token_ids=[7], ignore_eos=True)).stop_token_ids == (7,)


def test_client_names_are_used_in_messages() -> None:
    with pytest.raises(InvalidRequest, match="max_completion_tokens: is 41, but the model's context is 50 tokens and"):
        check_sampling(
            SamplingFields(max_tokens=41),
            limits=LIMITS,
            num_prompt_tokens=10,
            request_id="r",
            names={"max_tokens": "max_completion_tokens"},
        )


def test_prompt_lengths_and_ids() -> None:
    assert check_prompt([1] * 49, LIMITS) == (1,) * 49
    for prompt, message in (
        ([], "prompt: is empty"),
        ([1] * 50, "prompt: has 50 tokens, the model's context is 50 tokens"),
        ([0, 99, 100], "prompt: token 2 is 100, must be 0 to 99"),
        ([-1], "prompt: token 0 is -1"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            check_prompt(prompt, LIMITS)


def test_stops_choices_and_ids() -> None:
    assert check_stops(["x" * 256] * 16) == ("x" * 256,) * 16
    for stops, message in ((["x"] * 17, "has 17"), (["x", ""], r"stop\.1: is empty"), (["x" * 257], "has 257")):
        with pytest.raises(InvalidRequest, match=message):
            check_stops(stops)
    assert check_num_choices(16, 8) == 16
    for n, prompts in ((0, 1), (17, 1), (16, 9)):
        with pytest.raises(InvalidRequest):
            check_num_choices(n, prompts)
    assert check_request_id("a" * 128) == "a" * 128
    for bad in ("", "a" * 129, "a b", "a/b", "é", "-a", "a\n", "a\x00", f"a{ANSWER_MARK}0"):
        with pytest.raises(InvalidRequest, match="request_id"):
            check_request_id(bad)


def test_seed_of_an_id_never_changes() -> None:
    """Routers of other versions and machines must draw the same tokens for a request that they take over."""
    assert seed_of("chatcmpl-1") == 14298812294282006021
    assert checked(SamplingFields(seed=2**64 - 1), choice=1).seed == 0
    assert checked(SamplingFields(seed=-1)).seed == 2**64 - 1


@given(st.text())
def test_shown_values_are_short(text: str) -> None:
    assert len(show(text)) <= 60
