"""Who has which slot of the host memory that KV blocks are swapped out to; the only place where that changes."""

from __future__ import annotations

from collections.abc import Iterable


class SwapSpace:
    """`num_slots` slots of one block each. An owner's slots are in the order of its block table.

    A slot that is given back may be taken at once: only steps read and write slots, one step after another.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 0:
            raise ValueError(f"num_slots is {num_slots}, must be at least 0")
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # a stack: the lowest go first
        self._held: dict[str, tuple[int, ...]] = {}

    @property
    def num_free(self) -> int:
        """Slots that `take` can hand out now."""
        return len(self._free)

    @property
    def num_owners(self) -> int:
        """Who has slots."""
        return len(self._held)

    def take(self, owner: str, num: int) -> tuple[int, ...]:
        """`num` slots for an owner that has none. The caller has looked that there are so many."""
        assert owner not in self._held, f"{owner} has slots"
        assert 0 < num <= len(self._free), f"{num} slots asked, {len(self._free)} are free"
        slots = tuple(self._free.pop() for _ in range(num))
        self._held[owner] = slots
        return slots

    def slots_of(self, owner: str) -> tuple[int, ...]:
        """The owner's slots in order; empty when it has none."""
        return self._held.get(owner, ())

    def free(self, owner: str) -> None:
        """The owner's slots mean nothing any more. An unknown owner has none."""
        self._free.extend(reversed(self._held.pop(owner, ())))

    def audit(self, owners: Iterable[str]) -> list[str]:
        """Broken invariants, where `owners` are those that may hold slots; empty when all is well."""
        known = set(owners)
        broken = [f"swap slots of {owner}, who is not here" for owner in self._held if owner not in known]
        counted = [*self._free, *(slot for slots in self._held.values() for slot in slots)]
        if sorted(counted) != list(range(self.num_slots)):
            broken.append(f"swap slots: {len(counted)} are told of, each of {self.num_slots} must be once")
        return broken
