"""Random numbers that are functions of (seed, position, token id) alone, so that a request carries no generator.

The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014): two multiplications in 64 bits, the same on every machine. Drawing by Gumbel noise and argmax is the
Gumbel-max trick: argmax(logits / T + g) is distributed as softmax(logits / T).
"""

from __future__ import annotations

import math

MASK_64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: steps of it visit all 64-bit numbers
FACTOR_1 = 0xBF58476D1CE4E5B9
FACTOR_2 = 0x94D049BB133111EB
UNIFORM_BITS = 52


def mix64(value: int) -> int:
    """A 64-bit number in which every bit of `value` (taken modulo 2**64) has its part."""
    value &= MASK_64
    value = ((value ^ (value >> 30)) * FACTOR_1) & MASK_64
    value = ((value ^ (value >> 27)) * FACTOR_2) & MASK_64
    return value ^ (value >> 31)


def stream_key(seed: int, position: int) -> int:
    """The 64-bit key of the noise for the token at absolute position `position` of a request with this seed."""
    return mix64(mix64(seed) + GOLDEN * (position + 1))


def random_bits(key: int, token_id: int) -> int:
    """52 random bits for one candidate token under the key of its position."""
    return mix64(key + GOLDEN * (token_id + 1)) >> (64 - UNIFORM_BITS)


def gumbel(key: int, token_id: int) -> float:
    """Standard Gumbel noise for one candidate: -log(-log(u)), in double precision.

    u = (bits + 1/2) / 2**52 is exact in a double and never 0 or 1, so the noise is finite: from -3.6 to 36.7.
    """
    return -math.log(-math.log((random_bits(key, token_id) + 0.5) / (1 << UNIFORM_BITS)))
