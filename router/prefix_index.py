"""Which worker holds which prefix: hash of a block -> bit mask of workers, kept by sequenced block events.

Form of algorithms.md 14 (7). Hashes are chained and workers evict leaves first, so a worker's blocks are prefix-closed
and the set of holders only shrinks along a prompt; the depths of all workers are found by bisection over sets.
The index may be wrong (a late event, a lost one): that costs time, never tokens, since workers check what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tandem.messages import BlockEvents


@dataclass(slots=True)
class _Holder:
    incarnation: int
    sequence: int | None = None  # of the last event; None: none yet
    hashes: set[bytes] = field(default_factory=set)


class PrefixIndex:
    """Block hashes by worker slot. A slot is a small number that the fleet gives to each worker."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._slots: dict[int, _Holder] = {}
        self.num_gaps = 0

    def __len__(self) -> int:
        return len(self._holders)

    def join(self, slot: int, incarnation: int) -> None:
        """A new incarnation holds nothing yet."""
        self.leave(slot)
        self._slots[slot] = _Holder(incarnation)

    def leave(self, slot: int) -> None:
        """Forgets all that the worker held. Idempotent."""
        holder = self._slots.pop(slot, None)
        if holder is not None:
            self._forget(slot, holder)

    def apply(self, slot: int, incarnation: int, events: BlockEvents) -> None:
        """Takes one batch of events. Old batches and old incarnations have no effect; after a gap all is forgotten.

        A batch with `cleared` begins anew, whatever its number.
        """
        holder = self._slots.get(slot)
        if holder is None or holder.incarnation != incarnation:
            return
        if holder.sequence is not None and not events.cleared:
            if events.sequence <= holder.sequence:
                return
            if events.sequence != holder.sequence + 1:
                self.num_gaps += 1
                self._forget(slot, holder)
        holder.sequence = events.sequence
        if events.cleared:
            self._forget(slot, holder)
        bit = 1 << slot
        for removed in events.removed:
            if removed in holder.hashes:
                holder.hashes.discard(removed)
                self._drop(removed, bit)
        for stored in events.stored:
            holder.hashes.add(stored)
            self._holders[stored] = self._holders.get(stored, 0) | bit

    def num_blocks(self, slot: int) -> int:
        """Blocks that the worker is believed to hold."""
        holder = self._slots.get(slot)
        return 0 if holder is None else len(holder.hashes)

    def depth(self, slot: int, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of `hashes` this worker holds, by bisection."""
        holder = self._slots.get(slot)
        if holder is None:
            return 0
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in holder.hashes:
                low = middle
            else:
                high = middle - 1
        return low

    def deepest(self, hashes: Sequence[bytes], among: int, num: int) -> list[int]:
        """Up to `num` slots of the bit mask `among`, those that hold most leading blocks of `hashes` first.

        All workers are bisected at once: O(k log n) sets for n blocks and the k depths that are found.
        """
        found: list[int] = []
        if not hashes:
            return found
        holders = self._holders.get
        # Each entry: workers known to hold `low` blocks, and at most `high`. The deepest is popped first.
        todo = [(holders(hashes[0], 0) & among, 1, len(hashes))]
        while todo and len(found) < num:
            workers, low, high = todo.pop()
            if low == high:
                found += islice(_bits(workers), num - len(found))
                continue
            middle = (low + high + 1) // 2
            deeper = workers & holders(hashes[middle - 1], 0)
            if workers != deeper:
                todo.append((workers & ~deeper, low, middle - 1))
            if deeper:
                todo.append((deeper, middle, high))
        return found

    def audit(self) -> list[str]:
        """Differences between the two directions of the index; empty when it is sound."""
        wrong = []
        for slot, holder in self._slots.items():
            wrong += [
                f"slot {slot} misses its bit" for each in holder.hashes if not self._holders.get(each, 0) >> slot & 1
            ]
        for mask in self._holders.values():
            for slot in _bits(mask):
                if slot not in self._slots:
                    wrong.append(f"slot {slot} left but is still named")
        return wrong

    def _forget(self, slot: int, holder: _Holder) -> None:
        bit = 1 << slot
        for each in holder.hashes:
            self._drop(each, bit)
        holder.hashes = set()

    def _drop(self, block: bytes, bit: int) -> None:
        rest = self._holders.get(block, 0) & ~bit
        if rest:
            self._holders[block] = rest
        else:
            self._holders.pop(block, None)


def _bits(mask: int) -> Iterator[int]:
    """The positions of the set bits, lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
