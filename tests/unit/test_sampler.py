"""The sampler against a plain scalar version, its distribution, and its independence of the batch."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.noise import GOLDEN, gumbel, random_bits, stream_key
from engine.sampler import Sampler, random_bits_numpy, random_bits_torch
from engine.step import Sampled, StepRow, Undrawn
from tandem.request import RequestId, Sampling

VOCAB = 97
EOS = (5, 6)


def row(sampling: Sampling, context: tuple[int, ...] = (1, 2, 3), num_prompt: int = 2, *, position: int = 0) -> StepRow:
    """A decode row that samples the token after `context` (or at `position`, where the tokens do not matter)."""
    end = position or len(context)
    penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    return StepRow(
        request_id=RequestId("r"),
        tokens=(context[-1],),
        start=end - 1,
        blocks=(0,),
        sample=True,
        sampling=sampling,
        num_prompt_tokens=num_prompt,
        context=context if penalised else (),
    )


def draw(sampler: Sampler, logits: torch.Tensor, rows: list[StepRow]) -> list[Sampled]:
    """What is drawn of rows that are finite."""
    drawn = [each for each in sampler.sample(logits, rows) if isinstance(each, Sampled)]
    assert len(drawn) == len(rows)
    return drawn


def naive(logits: list[float], sampling: Sampling, context: tuple[int, ...], num_prompt: int) -> int:
    """The definition, one scalar after the other. Logits and what is added to them are kept in float32."""
    f32 = np.float32
    values = [f32(logit) for logit in logits]
    for token, bias in sampling.logit_bias:
        values[token] = values[token] + f32(bias)
    if len(context) - num_prompt < sampling.min_tokens:
        for token in sampling.stop_token_ids + (() if sampling.ignore_eos else EOS):
            values[token] = f32(-math.inf)
    for token in set(context):
        factor = f32(sampling.repetition_penalty)
        values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
    for token, count in Counter(context[num_prompt:]).items():
        values[token] -= f32(sampling.frequency_penalty * count + sampling.presence_penalty)
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if sampling.temperature == 0:
        return order[0]
    highest = values[order[0]]
    scaled = [float((value - highest) / f32(sampling.temperature)) for value in values]
    kept = order[: sampling.top_k] if sampling.top_k else order
    total, reached, nucleus = sum(math.exp(scaled[token]) for token in kept), 0.0, []
    for token in kept:
        if reached < sampling.top_p * total or sampling.top_p == 1.0:
            nucleus.append(token)
        reached += math.exp(scaled[token])
    kept = [token for token in nucleus if math.exp(scaled[token]) >= sampling.min_p]
    key = stream_key(sampling.seed, len(context))
    return min(kept, key=lambda token: (-(scaled[token] + gumbel(key, token)), token))


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 0, 1, 3, 20, 90, 500]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.99]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.sampled_from([0, 1, 2, 5]),
    stop_token_ids=st.sampled_from([(), (9, 10)]),
    ignore_eos=st.booleans(),
    logit_bias=st.sampled_from([(), ((3, 4.5), (90, -100.0)), ((7, 100.0),)]),
)


@given(
    logits_seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.01, 1.0, 5.0, 30.0]),
    ties=st.booleans(),
    sampling=samplings,
    context=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=12).map(tuple),
)
@settings(max_examples=400, deadline=None)
def test_equals_the_naive_version(
    logits_seed: int, spread: float, ties: bool, sampling: Sampling, context: tuple[int, ...]
) -> None:
    rng = random.Random(logits_seed)
    logits = [rng.gauss(0, spread) for _ in range(VOCAB)]
    if ties:
        logits = [float(round(logit)) for logit in logits]
    drawn = draw(Sampler(vocab_size=VOCAB, eos_token_ids=EOS), torch.tensor([logits]), [row(sampling, context)])
    assert drawn[0].token_id == naive(logits, sampling, context, 2)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 7])
@pytest.mark.parametrize("position", [0, 1, 8191])
def test_vector_noise_equals_scalar_noise(seed: int, position: int) -> None:
    key = stream_key(seed, position)
    steps = np.arange(1, 5001, dtype=np.uint64) * np.uint64(GOLDEN)
    scalar = [random_bits(key, token_id) for token_id in range(5000)]
    assert random_bits_numpy(steps, key).tolist() == scalar
    assert random_bits_torch(torch.from_numpy(steps.view(np.int64)), key).tolist() == scalar


def test_noise_is_uniform_over_tokens_positions_and_seeds() -> None:
    for axis in range(3):
        drawn = [random_bits(stream_key(*key[:2]), key[2]) for key in (_along(axis, n) for n in range(20_000))]
        counted = Counter(bits >> 46 for bits in drawn)  # the leading 6 bits: 64 cells
        assert _chi_square([counted[cell] for cell in range(64)], [20_000 / 64] * 64) < 110  # p = 0.0002 at 63 degrees
        assert abs(sum(bits & 1 for bits in drawn) - 10_000) < 350  # five sigma


def _along(axis: int, number: int) -> tuple[int, int, int]:
    key = [11, 12, 13]
    key[axis] = number
    return key[0], key[1], key[2]


def _chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in zip(observed, expected, strict=True))


@pytest.mark.parametrize(
    ("sampling", "num_left"),
    [
        (Sampling(temperature=1.0, seed=3), 16),
        (Sampling(temperature=0.6, seed=4), 16),
        (Sampling(temperature=1.3, top_k=5, seed=5), 5),
        (Sampling(temperature=1.0, top_p=0.7, seed=6), None),
    ],
)
def test_distribution_is_that_of_softmax(sampling: Sampling, num_left: int | None) -> None:
    size, num_draws = 16, 6000
    logits = torch.linspace(-2.0, 1.5, size)[torch.randperm(size, generator=torch.Generator().manual_seed(1))]
    weights = (logits.double() / sampling.temperature).softmax(-1)
    order = weights.argsort(descending=True).tolist()
    if num_left is None:
        num_left, reached = 0, 0.0
        while reached < sampling.top_p:
            reached += float(weights[order[num_left]])
            num_left += 1
    kept = order[:num_left]
    sampler = Sampler(vocab_size=size, eos_token_ids=())
    rows = [row(sampling, position=position) for position in range(3, 3 + num_draws)]
    counted = Counter(drawn.token_id for drawn in draw(sampler, logits.expand(num_draws, size), rows))
    assert set(counted) <= set(kept)
    expected = [float(num_draws * weights[token] / weights[kept].sum()) for token in kept]
    # Mean num_left - 1; five standard deviations above it.
    degrees = num_left - 1
    assert _chi_square([counted[token] for token in kept], expected) < degrees + 5 * math.sqrt(2 * degrees)


def test_a_row_does_not_depend_on_its_batch() -> None:
    vocab = 49_152
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(9, vocab, generator=generator) * 4
    kinds = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.8, top_p=0.95, seed=2),
        Sampling(temperature=0.9, top_k=50, top_p=0.9, seed=3, logprobs=3),
        Sampling(temperature=1.2, min_p=0.02, seed=4),
        Sampling(repetition_penalty=1.2, frequency_penalty=0.3, logprobs=0),
        Sampling(temperature=1.0, top_p=0.9999, seed=9),
        Sampling(),
        Sampling(temperature=5.0, min_p=1e-9, seed=4),
    ]
    rows = [row(kind, (1, 2, 3, number)) for number, kind in enumerate(kinds)]
    sampler = Sampler(vocab_size=vocab, eos_token_ids=EOS)
    together = draw(sampler, logits, rows)
    for order in ([8, 2, 5, 0, 1, 7, 3, 6, 4], [4], [0, 7], [1, 3]):
        assert draw(sampler, logits[order], [rows[number] for number in order]) == [together[n] for n in order]


def test_raw_logits_are_left_alone() -> None:
    logits = torch.zeros(1, VOCAB)
    sampling = Sampling(repetition_penalty=2.0, logit_bias=((1, 5.0),), min_tokens=9, presence_penalty=1.0)
    draw(Sampler(vocab_size=VOCAB, eos_token_ids=EOS), logits, [row(sampling)])
    assert not logits.any()


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [40, 20, 60]] = 3.0
    drawn = draw(Sampler(vocab_size=VOCAB, eos_token_ids=EOS), logits, [row(Sampling()), row(Sampling(logprobs=2))])
    assert drawn[0] == Sampled(token_id=20)
    assert drawn[1].token_id == 0
    assert [token for token, _ in drawn[1].top] == [0, 1]


def test_top_k_ties_keep_the_lowest_ids() -> None:
    sampler = Sampler(vocab_size=VOCAB, eos_token_ids=())
    rows = [row(Sampling(temperature=1.0, top_k=3), position=position) for position in range(3, 200)]
    assert {drawn.token_id for drawn in draw(sampler, torch.zeros(len(rows), VOCAB), rows)} == {0, 1, 2}


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    logits[0, EOS[0]] = 9.0  # likeliest, yet masked by min_tokens
    sampling = Sampling(temperature=0.5, seed=7, logprobs=4, min_tokens=3, logit_bias=((1, 2.0),))
    (drawn,) = draw(Sampler(vocab_size=VOCAB, eos_token_ids=EOS), logits, [row(sampling)])
    expected = logits[0].log_softmax(-1)
    assert drawn.token_id != EOS[0]
    assert drawn.logprob == pytest.approx(float(expected[drawn.token_id]))
    assert [token for token, _ in drawn.top] == expected.argsort(descending=True)[:4].tolist()
    assert drawn.top[0][1] == pytest.approx(float(expected[EOS[0]]))


def test_other_seeds_and_positions_draw_other_tokens() -> None:
    sampler = Sampler(vocab_size=VOCAB, eos_token_ids=())
    kinds = [(seed, position) for seed in range(5) for position in range(3, 8)]
    rows = [row(Sampling(temperature=1.0, seed=seed), position=position) for seed, position in kinds]
    assert len({drawn.token_id for drawn in draw(sampler, torch.zeros(25, VOCAB), rows)}) > 12


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_logits_are_not_answered_with(sampling: Sampling, broken: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = broken
    logits = torch.cat([logits, torch.zeros(1, VOCAB)])
    rows = [row(sampling), row(sampling)]
    undrawn, drawn = Sampler(vocab_size=VOCAB, eos_token_ids=EOS).sample(logits, rows)
    assert isinstance(undrawn, Undrawn)
    assert undrawn.reason == f"r: the logits at position 2 have maximum {broken}"
    assert isinstance(drawn, Sampled), "its neighbour suffers"


def test_everything_masked_yields_a_token_still() -> None:
    sampling = Sampling(temperature=1.0, min_tokens=9, stop_token_ids=tuple(range(VOCAB)))
    (drawn,) = draw(Sampler(vocab_size=VOCAB, eos_token_ids=EOS), torch.zeros(1, VOCAB), [row(sampling)])
    assert drawn.token_id == 0


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 12.0])
def test_pruning_never_loses_the_winner(spread: float) -> None:
    vocab = 32_000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(8)) * spread
    scaled = (logits[0] - logits.max()).double().numpy()
    steps = np.arange(1, vocab + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    sampler = Sampler(vocab_size=vocab, eos_token_ids=())
    for seed in range(60):
        bits = random_bits_numpy(steps, stream_key(seed, 3)).astype(np.float64)
        noise = -np.log(-np.log((bits + 0.5) / 2**52))
        (drawn,) = draw(sampler, logits, [row(Sampling(temperature=1.0, seed=seed))])
        assert drawn.token_id == int((scaled + noise).argmax())
