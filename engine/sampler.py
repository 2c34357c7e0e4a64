"""Draws the next token of each row from its logits, in a way that depends on nothing but the row.

Order of operations, as in vLLM and Hugging Face: logit_bias and min_tokens, repetition penalty (tokens of prompt and
answer: Keskar et al., CTRL, 2019), frequency and presence penalty (answer tokens, as the OpenAI API defines them),
temperature, top-k, top-p (Holtzman et al., 2019), min-p (Nguyen et al., 2024), then Gumbel noise and argmax
(engine/noise.py). Between equal values the lower token id wins, everywhere. Logprobs are those of the raw logits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.noise import FACTOR_1, FACTOR_2, GOLDEN, MASK_64, UNIFORM_BITS, gumbel, stream_key
from engine.step import Drawn, Sampled, StepRow, Undrawn
from tandem.request import Sampling

GREEDY_TEMPERATURE = 1e-5  # below it a row is greedy, as in vLLM: the quotient would leave float32
LEADING = (64, 1024)  # how many leading tokens top-p looks at before it sorts the vocabulary
SCALAR_CANDIDATES_MAX = 64  # so few are scored one by one
SLACK = 1.0001  # float32 exponentials of numbers above -50 are off by a factor of 1 + 1e-5 at most
MARGIN = 1e-9  # of scores in double precision, whose logarithms may differ in the last bit from the scalar ones


class Sampler:
    """Samples rows of one model. Not thread-safe; one engine, one sampler."""

    def __init__(self, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self._id_steps = np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(GOLDEN)

    def sample(self, logits: Tensor, rows: Sequence[StepRow]) -> list[Drawn]:
        """One token a row from float32 `logits` [num_rows, vocab_size], which are left as they are.

        Each row's result is a function of its logits, sampling, position, index and context alone. Undrawn when a row
        has no finite maximum: a made-up answer would be worse than none.
        """
        assert logits.shape == (len(rows), self.vocab_size), f"logits are {tuple(logits.shape)} for {len(rows)} rows"
        assert logits.dtype == torch.float32, f"logits are {logits.dtype}"
        results: list[Drawn | None] = [None] * len(rows)
        plain = [number for number, row in enumerate(rows) if _is_plain(row)]
        if plain:
            chosen = _argmax(logits if len(plain) == len(rows) else logits[plain])
            for number, (token_id, highest) in zip(plain, chosen, strict=True):
                results[number] = _undrawn(highest, rows[number]) or Sampled(token_id=token_id)
        return [
            self._sample_row(logits[number], rows[number]) if result is None else result
            for number, result in enumerate(results)
        ]

    def _sample_row(self, raw: Tensor, row: StepRow) -> Drawn:
        sampling = row.sampling
        logits = self._adjusted(raw, row)
        ((token_id, highest),) = _argmax(logits.unsqueeze(0))
        undrawn = _undrawn(highest, row)
        if undrawn is not None:
            return undrawn
        if sampling.temperature >= GREEDY_TEMPERATURE and highest > -math.inf:
            scaled = (logits - highest) / sampling.temperature  # at most 0, so that exp never overflows
            token_id = self._draw(scaled, token_id, sampling, stream_key(sampling.seed, row.position))
        if sampling.logprobs is None:
            return Sampled(token_id=token_id)
        logprobs = raw.log_softmax(dim=-1)
        top = _leading(logprobs, min(sampling.logprobs, self.vocab_size)) if sampling.logprobs else []
        return Sampled(token_id=token_id, logprob=float(logprobs[token_id]), top=tuple(top))

    def _adjusted(self, raw: Tensor, row: StepRow) -> Tensor:
        """The logits after bias, min_tokens and penalties: `raw` itself where none is asked."""
        sampling = row.sampling
        logits = raw
        if sampling.logit_bias:
            logits = logits.clone()
            bias = dict(sampling.logit_bias)
            ids = torch.tensor(list(bias), device=raw.device)
            logits[ids] += torch.tensor(list(bias.values()), dtype=torch.float32, device=raw.device)
        if row.index < sampling.min_tokens:
            ends = sampling.stop_token_ids + (() if sampling.ignore_eos else self.eos_token_ids)
            if ends:
                logits = logits.clone() if logits is raw else logits
                logits[torch.tensor(ends, device=raw.device)] = -math.inf
        if row.context:
            logits = logits.clone() if logits is raw else logits
            _penalise(logits, row)
        return logits

    def _draw(self, scaled: Tensor, likeliest: int, sampling: Sampling, key: int) -> int:
        """Gumbel-max over what top-k, top-p and min-p leave of `scaled` = (logits - maximum) / temperature."""
        kept = self._kept(scaled, sampling)
        if kept is None:
            kept = self._contenders(scaled, likeliest, key)
        elif len(kept) > SCALAR_CANDIDATES_MAX:
            mask = torch.full_like(scaled, -math.inf)
            ids = torch.tensor([token_id for token_id, _ in kept], device=scaled.device)
            mask[ids] = scaled[ids]
            kept = self._contenders(mask, likeliest, key)
        return min(kept, key=lambda candidate: (-(candidate[1] + gumbel(key, candidate[0])), candidate[0]))[0]

    def _kept(self, scaled: Tensor, sampling: Sampling) -> list[tuple[int, float]] | None:
        """(token id, scaled logit) of what the filters leave; None when none is on."""
        top_k = sampling.top_k if 0 < sampling.top_k < self.vocab_size else None
        leading = None if top_k is None else _leading(scaled, top_k)
        if sampling.top_p < 1.0:
            leading = self._nucleus(scaled, leading, sampling.top_p)
        if sampling.min_p > 0.0:
            if leading is None:
                # A little lower, so that the exact test below decides.
                ids = _where(scaled >= math.log(sampling.min_p) - 1e-5)
                leading = list(zip(ids.tolist(), scaled[ids].tolist(), strict=True))
            leading = [(token_id, value) for token_id, value in leading if math.exp(value) >= sampling.min_p]
        return leading

    def _nucleus(
        self, scaled: Tensor, leading: list[tuple[int, float]] | None, top_p: float
    ) -> list[tuple[int, float]]:
        """The fewest leading tokens that hold at least `top_p` of the probability, at least one."""
        if leading is not None:
            return _until(leading, top_p * math.fsum(math.exp(value) for _, value in leading)) or leading
        mass = top_p * float(scaled.exp().sum(dtype=torch.float64))
        for num in (*LEADING, self.vocab_size):
            leading = _leading(scaled, min(num, self.vocab_size))
            nucleus = _until(leading, mass)
            if nucleus is not None:
                return nucleus
        assert leading is not None
        return leading

    def _contenders(self, scaled: Tensor, likeliest: int, key: int) -> list[tuple[int, float]]:
        """(token id, scaled logit) of those that may have the highest score; the rest surely has a lower one.

        The likeliest token's scaled logit is 0, its score g. Another, scaled z, beats it only if -log(u) <= e^(z - g),
        and 1 - u is never more than -log(u): that takes one exponential in float32 a token, where its noise would take
        two logarithms. Whoever passes is scored in double precision by the caller.
        """
        bits = self._bits(key, scaled.device)
        to_one = ((1 << UNIFORM_BITS) - bits).float() * 2.0**-UNIFORM_BITS
        ids = _where(to_one <= torch.exp(scaled - gumbel(key, likeliest)) * SLACK + 2.0 ** -(UNIFORM_BITS - 1))
        if len(ids) > SCALAR_CANDIDATES_MAX:
            scores = scaled[ids].double() - torch.log(-torch.log((bits[ids] + 0.5) * 2.0**-UNIFORM_BITS))
            ids = ids[_where(scores >= scores.amax() - MARGIN)]
        return list(zip(ids.tolist(), scaled[ids].tolist(), strict=True))

    def _bits(self, key: int, device: torch.device) -> Tensor:
        """`random_bits` of every token id, [vocab_size] int64."""
        if device.type == "cpu":
            return torch.from_numpy(random_bits_numpy(self._id_steps, key).view(np.int64))
        return random_bits_torch(torch.from_numpy(self._id_steps.view(np.int64)).to(device), key)


def random_bits_numpy(id_steps: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """`random_bits` for id_steps = GOLDEN * (token id + 1), in numpy's wrapping unsigned numbers."""
    mixed = id_steps + np.uint64(key)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(FACTOR_1)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(FACTOR_2)
    mixed ^= mixed >> np.uint64(31)
    bits: NDArray[np.uint64] = mixed >> np.uint64(64 - UNIFORM_BITS)
    return bits


def random_bits_torch(id_steps: Tensor, key: int) -> Tensor:
    """The same in torch's signed 64-bit numbers, for devices; a right shift there drags the sign along."""
    mixed = id_steps + _signed(key)
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(FACTOR_1)
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(FACTOR_2)
    return _shift(mixed ^ _shift(mixed, 31), 64 - UNIFORM_BITS)


def _shift(values: Tensor, num_bits: int) -> Tensor:
    return (values >> num_bits) & (MASK_64 >> num_bits)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _is_plain(row: StepRow) -> bool:
    """Whether the row is greedy and asks for nothing that would need it to be looked at alone."""
    sampling = row.sampling
    return (
        sampling.temperature < GREEDY_TEMPERATURE
        and not row.context
        and not sampling.logit_bias
        and sampling.logprobs is None
        and row.index >= sampling.min_tokens
    )


def _undrawn(highest: float, row: StepRow) -> Undrawn | None:
    if highest < math.inf:  # false of NaN too
        return None
    return Undrawn(reason=f"{row.request_id}: the logits at position {row.position - 1} have maximum {highest}")


def _argmax(logits: Tensor) -> list[tuple[int, float]]:
    """(lowest id of the maximum, maximum) of each row. NaN counts as a maximum."""
    if logits.device.type == "cpu":
        array = logits.numpy()
        ids = array.argmax(axis=-1)  # the first one; several times faster than torch's
        return [(int(best), float(array[row, best])) for row, best in enumerate(ids)]
    highest = logits.amax(dim=-1, keepdim=True)
    numbers = torch.arange(logits.shape[1], device=logits.device)
    lowest = torch.where(logits == highest, numbers, logits.shape[1] - 1).amin(dim=-1)
    return list(zip(lowest.tolist(), highest.flatten().tolist(), strict=True))


def _where(mask: Tensor) -> Tensor:
    """The ids at which the mask is set, ascending."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))  # several times faster than torch's
    return torch.nonzero(mask).flatten()


def _leading(values: Tensor, num: int) -> list[tuple[int, float]]:
    """(token id, value) of the `num` highest, highest first, lower ids first among equal ones."""
    highest, ids = torch.topk(values, min(num + 1, len(values)))
    if len(ids) > num and highest[num - 1] > highest[num]:
        ids = ids[:num]
    else:  # which of the equal ones at the end torch takes is not said anywhere
        last = float(highest[num - 1])
        above = _where(values > last)
        ids = torch.cat([above, _where(values == last)[: num - len(above)]])
    return sorted(zip(ids.tolist(), values[ids].tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))


def _until(leading: Sequence[tuple[int, float]], mass: float) -> list[tuple[int, float]] | None:
    """The shortest head whose weights exp(value) reach `mass`; None when all of them do not."""
    reached = 0.0
    for num, (_, value) in enumerate(leading, start=1):
        reached += math.exp(value)
        if reached >= mass:
            return list(leading[:num])
    return None


def _penalise(logits: Tensor, row: StepRow) -> None:
    """Applies repetition, frequency and presence penalties in place, over `row.context`."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.context)), device=logits.device)
        values = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    counts = Counter(row.context[row.num_prompt_tokens :])
    if counts and (sampling.frequency_penalty or sampling.presence_penalty):
        penalties = [sampling.frequency_penalty * count + sampling.presence_penalty for count in counts.values()]
        ids = torch.tensor(list(counts), device=logits.device)
        logits[ids] -= torch.tensor(penalties, dtype=torch.float32, device=logits.device)
