"""The one source of every choice of a world: drawn from a seed, or replayed from a list."""

from __future__ import annotations

import random
from collections.abc import Sequence


class Choices:
    """`choose(n)` is a number below n. 0 is always the calm choice, and what a replay gives when its list is used up.

    `taken` holds all choices made so far; `Choices(replay=taken)` makes the same world again.
    """

    def __init__(self, *, seed: int | None = None, replay: Sequence[int] = ()) -> None:
        self._bits = None if seed is None else random.Random(seed).getrandbits
        self._replay = replay
        self.taken: list[int] = []

    def choose(self, n: int) -> int:
        """A number from 0 to n - 1."""
        assert n > 0, "nothing to choose from"
        if self._bits is not None:
            num_bits = n.bit_length()  # as Random.randrange has it, in a quarter of the time
            chosen = self._bits(num_bits)
            while chosen >= n:
                chosen = self._bits(num_bits)
        else:
            at = len(self.taken)
            chosen = self._replay[at] % n if at < len(self._replay) else 0
        self.taken.append(chosen)
        return chosen

    def chance(self, permille: int) -> bool:
        """True in `permille` of 1000 cases."""
        return permille > 0 and self.choose(1000) >= 1000 - permille

    def between(self, low: int, high: int) -> int:
        """A number from `low` (the calm one) to `high`, both included."""
        return low + self.choose(high - low + 1)
