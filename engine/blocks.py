"""The block ledger: who may read, write or reuse each KV block of one worker; the only place where that changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from engine.prefix_cache import BlockHash, PrefixCache
from tandem.messages import BlockCounts


class BlockState(StrEnum):
    """What a block is in use for. Each block is in exactly one of these states."""

    FREE = "free"  # its content means nothing
    CACHED = "cached"  # a full block of a known prefix that nobody uses: kept until the room is needed
    OWNED = "owned"  # in the block table of at least one sequence
    EXPORTED = "exported"  # being read by at least one transfer, whether or not it is owned too
    GRANTED = "granted"  # promised to a transfer, which writes it from outside
    QUARANTINED = "quarantined"  # the transfer ended, but something may still write it


class BlockLedger:
    """Moves blocks among the states. Every operation costs O(1) per block that it names.

    Owners and transfers are names that the callers choose. An owner's blocks are in the order of its block table. A
    block's generation rises each time its content becomes somebody else's, so (block, generation) names a content.
    Without `prefix_cache` no block is ever CACHED or shared.
    """

    def __init__(self, *, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks is {num_blocks} and block_size {block_size}, both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._cache = PrefixCache()
        self._state = [BlockState.FREE] * num_blocks
        self._num_in = dict.fromkeys(BlockState, 0)
        self._num_in[BlockState.FREE] = num_blocks
        self._generation = [0] * num_blocks
        self._num_owners = [0] * num_blocks
        self._num_exports = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the lowest ids go first
        self._owned: dict[str, dict[int, None]] = {}
        self._exported: dict[str, dict[int, None]] = {}
        self._granted: dict[str, list[int]] = {}
        self._quarantined: dict[str, list[int]] = {}
        self._stepping: frozenset[str] = frozenset()  # owners whose blocks the step under way reads and writes
        self._leaving: dict[str, None] = {}  # of those, the ones to be released when it ends

    # ---- what is so --------------------------------------------------------------------------------------------------

    def counts(self) -> BlockCounts:
        """Blocks by state."""
        return BlockCounts(
            total=self.num_blocks,
            free=self._num_in[BlockState.FREE],
            cached=self._num_in[BlockState.CACHED],
            owned=self._num_in[BlockState.OWNED],
            exported=self._num_in[BlockState.EXPORTED],
            granted=self._num_in[BlockState.GRANTED],
            quarantined=self._num_in[BlockState.QUARANTINED],
        )

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` or `grant` can hand out now: FREE and CACHED."""
        return len(self._free) + self._cache.num_parked

    def state(self, block: int) -> BlockState:
        """The state that the block is in."""
        return self._state[block]

    def generation(self, block: int) -> int:
        """Rises when the block returns to FREE or is taken out of CACHED for a new content."""
        return self._generation[block]

    def blocks_of(self, owner: str) -> tuple[int, ...]:
        """The owner's blocks in the order of its block table; empty for an unknown owner."""
        return tuple(self._owned.get(owner, ()))

    def num_sole(self, owner: str) -> int:
        """How many of the owner's blocks nobody else owns or reads: so many can be handed out when it ends."""
        return sum(self._num_owners[each] == 1 and not self._num_exports[each] for each in self._owned.get(owner, ()))

    def granted_to(self, transfer: str) -> tuple[int, ...]:
        """The blocks GRANTED to the transfer, in order; empty when there are none."""
        return tuple(self._granted.get(transfer, ()))

    def hash_of(self, block: int) -> BlockHash | None:
        """The prefix hash that the block is indexed by, or None."""
        return self._cache.hash_of(block)

    def hashes(self) -> tuple[BlockHash, ...]:
        """All prefix hashes held here, for a full report."""
        return self._cache.hashes()

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many of the leading hashes are here. Pins nothing: the answer may be stale after the next call."""
        for num, block_hash in enumerate(hashes):
            if self._cache.find(block_hash) is None:
                return num
        return len(hashes)

    # ---- owners ------------------------------------------------------------------------------------------------------

    def acquire(self, owner: str, hashes: Sequence[BlockHash]) -> list[int]:
        """Shares the leading blocks that are here with the owner and returns them, in order. They are read-only."""
        assert owner not in self._leaving, f"{owner} has been released"
        taken = []
        mine = self._owned.setdefault(owner, {})
        for block_hash in hashes:
            block = self._cache.find(block_hash)
            if block is None:
                break
            assert block not in mine, f"{owner} has block {block} already"
            mine[block] = None
            self._num_owners[block] += 1
            self._settle(block)
            taken.append(block)
        if not mine:
            del self._owned[owner]
        return taken

    def allocate(self, owner: str, num: int) -> list[int] | None:
        """`num` blocks for the owner to write, FREE ones first, then the least recently used CACHED ones.

        None, and nothing taken, when there are not enough.
        """
        assert owner not in self._leaving, f"{owner} has been released"
        blocks = self._take(num)
        if blocks:
            mine = self._owned.setdefault(owner, {})
            for block in blocks:
                mine[block] = None
                self._num_owners[block] = 1
                self._move(block, BlockState.OWNED)
        return blocks

    def publish(self, owner: str, block: int, block_hash: BlockHash) -> None:
        """The owner's block is full and really written: others may share it from now on.

        When another block already holds the same prefix, that one stays indexed and this one goes unshared: block
        tables are append-only, so a running sequence never swaps its block for the other.
        """
        assert block in self._owned.get(owner, {}), f"{owner} does not own block {block}"
        if self._prefix_cache:
            self._cache.insert(block_hash, block)

    def release(self, owner: str) -> None:
        """Ends the owner. Its blocks go tail first, so that of a prefix the end is evicted before the start.

        Blocks that somebody else owns or reads stay as they are. An unknown owner has nothing to release. An owner in
        the step under way is released at that step's end, since its blocks are still being written.
        """
        if owner in self._stepping:
            self._leaving[owner] = None
            return
        for block in reversed(self._owned.pop(owner, {})):
            self._num_owners[block] -= 1
            self._settle(block)

    def discard(self, owner: str) -> None:
        """Ends the owner, and takes its blocks out of the prefix index: what is in them is not to be trusted.

        Who shares a block keeps it; nobody new gets it.
        """
        for block in self._owned.get(owner, {}):
            self._cache.drop(block)
        self.release(owner)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def begin_step(self, owners: Iterable[str]) -> None:
        """A step begins that reads and writes these owners' blocks, until `end_step`."""
        assert not self._stepping, "a step is under way"
        self._stepping = frozenset(owners)

    def end_step(self) -> None:
        """The step is over: owners that were released meanwhile end now. No step: no effect."""
        self._stepping = frozenset()
        leaving, self._leaving = self._leaving, {}
        for owner in leaving:
            self.release(owner)

    # ---- readers from outside ----------------------------------------------------------------------------------------

    def export(self, transfer: str, blocks: Sequence[int]) -> tuple[int, ...]:
        """Pins written blocks for the transfer to read; returns their generations. Pinning twice is pinning once."""
        pins = self._exported.setdefault(transfer, {})
        for block in blocks:
            assert self._state[block] in (BlockState.OWNED, BlockState.CACHED, BlockState.EXPORTED), (
                f"transfer {transfer} may not read block {block}, which is {self._state[block]}"
            )
            if block not in pins:
                pins[block] = None
                self._num_exports[block] += 1
                self._settle(block)
        if not pins:
            del self._exported[transfer]
        return tuple(self._generation[block] for block in blocks)

    def exported_by(self, transfer: str) -> tuple[int, ...]:
        """The blocks that the transfer pins now, in the order in which it pinned them."""
        return tuple(self._exported.get(transfer, ()))

    def end_export(self, transfer: str, blocks: Sequence[int] | None = None) -> None:
        """The transfer reads these blocks no more; None: all that it has. Blocks that it does not pin are skipped."""
        pins = self._exported.get(transfer, {})
        for block in reversed(tuple(pins) if blocks is None else blocks):
            if block in pins:
                del pins[block]
                self._num_exports[block] -= 1
                self._settle(block)
        if not pins:
            self._exported.pop(transfer, None)

    # ---- writers from outside ----------------------------------------------------------------------------------------

    def grant(self, transfer: str, num: int) -> list[int] | None:
        """`num` blocks for the transfer to write from outside; None, and nothing taken, when there are not enough."""
        assert transfer not in self._granted, f"transfer {transfer} has a grant"
        assert transfer not in self._quarantined, f"transfer {transfer} is in quarantine"
        blocks = self._take(num)
        if blocks is not None:
            self._granted[transfer] = blocks
            for block in blocks:
                self._move(block, BlockState.GRANTED)
            return list(blocks)
        return None

    def accept(self, transfer: str, owner: str) -> list[int]:
        """What the transfer wrote is whole: its GRANTED blocks are appended, in order, to the owner's."""
        assert transfer in self._granted, f"transfer {transfer} has no grant"
        assert owner not in self._leaving, f"{owner} has been released"
        blocks = self._granted.pop(transfer)
        if blocks:
            mine = self._owned.setdefault(owner, {})
            for block in blocks:
                mine[block] = None
                self._num_owners[block] = 1
                self._move(block, BlockState.OWNED)
        return blocks

    def quarantine(self, transfer: str) -> None:
        """The transfer failed, but writes may be under way: its GRANTED blocks wait. No grant: no effect."""
        blocks = self._granted.pop(transfer, None)
        if blocks:
            self._quarantined[transfer] = blocks
            for block in blocks:
                self._move(block, BlockState.QUARANTINED)

    def end_quarantine(self, transfer: str, whole: Mapping[int, BlockHash] | None = None) -> None:
        """Nothing writes the transfer's blocks any more: they are FREE. Not in quarantine: no effect.

        Of `whole` blocks the content was checked and has this prefix hash: they are CACHED, unless others hold it.
        """
        for block in reversed(self._quarantined.pop(transfer, [])):
            if whole and block in whole and self._prefix_cache:
                self._cache.insert(whole[block], block)
            self._settle(block)

    # ---- for the router and for watchers -----------------------------------------------------------------------------

    def drain_events(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Hashes (stored, removed) since the last call."""
        return self._cache.drain_events()

    def audit(self) -> list[str]:
        """Broken invariants, recounted from the ground; empty when all is well. O(num_blocks)."""
        broken: list[str] = []
        owners = _tally(self._owned.values())
        exports = _tally(self._exported.values())
        granted = _tally(self._granted.values())
        quarantined = _tally(self._quarantined.values())
        free = _tally([self._free])
        for block in range(self.num_blocks):
            pinned = block in owners or block in exports
            claims = [pinned, block in granted, block in quarantined, block in free]
            if sum(claims) > 1 or any(counted.get(block, 0) > 1 for counted in (granted, quarantined, free)):
                broken.append(f"block {block} is in two places at once")
            if owners.get(block, 0) != self._num_owners[block] or exports.get(block, 0) != self._num_exports[block]:
                broken.append(f"block {block}: pins are {self._num_owners[block]} and {self._num_exports[block]}")
            expected = (
                BlockState.FREE if block in free
                else BlockState.GRANTED if block in granted
                else BlockState.QUARANTINED if block in quarantined
                else BlockState.EXPORTED if block in exports
                else BlockState.OWNED if block in owners
                else BlockState.CACHED
            )  # fmt: skip
            if self._state[block] is not expected:
                broken.append(f"block {block} is {self._state[block]}, but ought to be {expected}")
            unwritten = (BlockState.FREE, BlockState.GRANTED, BlockState.QUARANTINED)
            if self._cache.hash_of(block) is not None and expected in unwritten:
                broken.append(f"block {block} is {expected} and has a prefix hash")
        for state in BlockState:
            if self._num_in[state] != self._state.count(state):
                broken.append(f"{self._num_in[state]} blocks are said to be {state}, {self._state.count(state)} are")
        cached = {block for block, state in enumerate(self._state) if state is BlockState.CACHED}
        return broken + self._cache.audit(cached)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _take(self, num: int) -> list[int] | None:
        """Blocks out of FREE and CACHED whose state the caller sets at once."""
        assert num >= 0, f"{num} blocks asked"
        if num > self.num_available:
            return None
        taken = []
        for _ in range(num):
            if self._free:
                taken.append(self._free.pop())
            else:
                block = self._cache.evict()
                self._generation[block] += 1
                taken.append(block)
        return taken

    def _settle(self, block: int) -> None:
        """Derives the state of a written block from its pins."""
        if self._state[block] is BlockState.CACHED:
            self._cache.unpark(block)
        if self._num_exports[block]:
            self._move(block, BlockState.EXPORTED)
        elif self._num_owners[block]:
            self._move(block, BlockState.OWNED)
        elif self._cache.hash_of(block) is not None:
            self._cache.park(block)
            self._move(block, BlockState.CACHED)
        else:
            self._put_free(block)

    def _put_free(self, block: int) -> None:
        self._generation[block] += 1
        self._free.append(block)
        self._move(block, BlockState.FREE)

    def _move(self, block: int, state: BlockState) -> None:
        self._num_in[self._state[block]] -= 1
        self._num_in[state] += 1
        self._state[block] = state


def _tally(groups: Iterable[Iterable[int]]) -> dict[int, int]:
    """How often each block occurs."""
    counted: dict[int, int] = {}
    for group in groups:
        for block in group:
            counted[block] = counted.get(block, 0) + 1
    return counted
