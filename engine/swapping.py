"""Which sequences a step swaps out of the KV pool and which it brings back, and who waits for the room that this makes.

A sequence that is swapped out keeps its blocks until the step has copied them; one that is brought back has them from
the step's beginning. In between its KV is in slots of the swap space and nowhere else, but for blocks that happen to
stay in the prefix cache. The batch (engine/step.py) moves the blocks; here it is known who is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.pressure import Answer, Pressure, Verdict
from engine.sequence import Sequence
from engine.swap_space import SwapSpace
from tandem.messages import SwapCounts


@dataclass(slots=True)
class Swapping:
    """The copies of one step at a time, from `begin` to `end`. Counters are over the worker's life."""

    block_size: int
    space: SwapSpace = field(default_factory=lambda: SwapSpace(0))
    pressure: Pressure = field(default_factory=Pressure)
    copies_out: list[tuple[int, int]] = field(default_factory=list)  # (block, slot)
    copies_back: list[tuple[int, int]] = field(default_factory=list)  # (slot, block)
    num_out: int = 0  # sequences swapped out
    num_back: int = 0  # and brought back
    num_recomputed: int = 0  # sequences that lost their blocks for nothing
    _out: list[Sequence] = field(default_factory=list)
    _back: list[Sequence] = field(default_factory=list)
    _num_coming: int = 0  # blocks that become free with the copies and that nobody has claimed
    _claims: set[str] = field(default_factory=set)

    @property
    def copies(self) -> tuple[Sequence, ...]:
        """Sequences that the step copies, in either direction."""
        return (*self._out, *self._back)

    def counts(self) -> SwapCounts:
        """For the router and for watchers."""
        space = self.space
        return SwapCounts(
            total=space.num_slots,
            used=space.num_slots - space.num_free,
            requests=space.num_owners,
            swapped_out=self.num_out,
            brought_back=self.num_back,
            recomputed=self.num_recomputed,
        )

    def begin(self) -> None:
        """A step is composed."""
        assert not self.copies, "the step under way copies"
        self.copies_out, self.copies_back = [], []
        self._num_coming = 0
        self._claims = set()

    def weigh(self, sequence: Sequence) -> Verdict:
        """What shall become of a sequence that loses its blocks."""
        if not sequence.num_computed:
            return Verdict(answer=Answer.RECOMPUTE, reason="nothing of it is computed")
        return self.pressure.answer(
            num_blocks=self._num_written(sequence),
            num_tokens=sequence.num_computed,
            num_free_slots=self.space.num_free,
            num_slots=self.space.num_slots,
        )

    def take_out(self, sequence: Sequence, *, num_freed: int) -> None:
        """The step copies what is written of the sequence; then `num_freed` blocks become free."""
        num = self._num_written(sequence)
        self.copies_out += zip(sequence.blocks, self.space.take(sequence.owner, num), strict=False)
        self._out.append(sequence)
        sequence.copying = True
        self._num_coming += num_freed
        self.num_out += 1

    def bring_back(self, sequence: Sequence, *, num_found: int) -> None:
        """The step fills the sequence's blocks from its slots, but for the first ones, found in the prefix cache."""
        slots = self.space.slots_of(sequence.owner)
        self.copies_back += list(zip(slots, sequence.blocks, strict=False))[num_found:]
        self._back.append(sequence)
        sequence.copying = True
        self.num_back += 1

    def claim(self, sequence: Sequence, num_blocks: int) -> bool:
        """Whether the copies of this step make room for so many blocks: then they are the sequence's to wait for."""
        if num_blocks > self._num_coming:
            return False
        self._num_coming -= num_blocks
        self._claims.add(sequence.owner)
        return True

    def waits(self, sequence: Sequence) -> bool:
        """Whether the sequence is not in the step under way since room is being made for it."""
        return sequence.owner in self._claims

    def end(self) -> list[Sequence]:
        """The step has made the copies. Returns whose blocks may go now; slots of who came back are free again."""
        for sequence in self._back:
            self.space.free(sequence.owner)
        out, back, self._out, self._back = self._out, self._back, [], []
        for sequence in (*out, *back):
            sequence.copying = False
        self._claims = set()
        return out

    def _num_written(self, sequence: Sequence) -> int:
        """Blocks with something computed in them; a sequence may have more, for the tokens to come."""
        return -(-sequence.num_computed // self.block_size)
