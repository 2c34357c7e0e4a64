"""The one source of every choice of a world: drawn from a seed, or replayed from a list."""

from __future__ import annotations

import random
from collections.abc import Sequence


class Choices:
    """`choose(n)` is a number below n. 0 is always the calm choice, and what a replay gives when its list is used up.

    `taken` holds all choices made so far; `Choices(replay=taken)` makes the same world again.
    """

    def __init__(self, *, seed: int | None = None, replay: Sequence[int] = ()) -> None:
        self._random = None if seed is None else random.Random(seed)
        self._replay = replay
        self.taken: list[int] = []

    def choose(self, n: int) -> int:
        """A number from 0 to n - 1."""
        assert n > 0, "nothing to choose from"
        if self._random is not None:
            chosen = self._random.randrange(n)
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
