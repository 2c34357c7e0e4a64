"""The prefix cache: chained hashes of full blocks, which block holds which prefix, and which block to drop next.

A hash names a prefix everywhere: here, in the router's index, in events and when a transfer skips what the target
holds. The chain is that of vLLM's automatic prefix caching, with a cryptographic hash so that two tenants cannot be
made to collide: h[-1] = H(namespace), h[i] = H(h[i-1] || token ids of block i as little-endian uint32), where H is
BLAKE2b with 16 bytes. A salt goes into h[-1] as BLAKE2b's own: two tenants with different salts share no hash, so that
neither can find out by the time to its first token what the other one has asked.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

BlockHash = bytes  # 16 bytes

HASH_BYTES = 16
SALT_BYTES = 16  # the most that BLAKE2b takes


def root_hash(namespace: bytes, salt: bytes = b"") -> BlockHash:
    """The parent of every first block. `namespace` names all that determines KV values (model, dtype, block size).

    `salt` is empty or has SALT_BYTES: blocks are shared only among those who have the same.
    """
    return blake2b(namespace, digest_size=HASH_BYTES, salt=salt).digest()


def chain_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """The hash of one full block of `tokens` that follows the block hashed `parent`."""
    return blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=HASH_BYTES).digest()


def block_hashes(
    namespace: bytes,
    tokens: Sequence[int],
    block_size: int,
    previous: Sequence[BlockHash] = (),
    *,
    salt: bytes = b"",
) -> list[BlockHash]:
    """Hashes of all full blocks of `tokens`, in order; a last partial block has none.

    `tokens` is the whole sequence from position 0. `previous` are the hashes of its leading blocks where they are
    known already: they are taken over, not computed again, so that a growing sequence costs one hash a block.
    """
    hashes = list(previous)
    parent = hashes[-1] if hashes else root_hash(namespace, salt)
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        parent = chain_hash(parent, tokens[start : start + block_size])
        hashes.append(parent)
    return hashes


class PrefixCache:
    """Which block holds which hash, and in which order blocks that nobody uses are given up (least recent first).

    All operations are O(1). The ledger (engine/blocks.py) is its only user.
    """

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._parked: OrderedDict[int, None] = OrderedDict()
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    @property
    def num_parked(self) -> int:
        """Blocks that can be evicted."""
        return len(self._parked)

    def find(self, block_hash: BlockHash) -> int | None:
        """The block that holds this prefix, or None."""
        return self._block_of.get(block_hash)

    def hash_of(self, block: int) -> BlockHash | None:
        """The hash that the block is indexed by, or None."""
        return self._hash_of.get(block)

    def insert(self, block_hash: BlockHash, block: int) -> bool:
        """Indexes the block; False when another block has this hash, which then stays the one indexed."""
        held_by = self._block_of.get(block_hash)
        if held_by is not None:
            return held_by == block
        assert block not in self._hash_of, f"block {block} has another hash"
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        if block_hash in self._removed:
            del self._removed[block_hash]  # nobody has heard of the removal yet
        else:
            self._stored[block_hash] = None
        return True

    def park(self, block: int) -> None:
        """Nobody uses the indexed block any more: it is the last to be evicted of those parked so far."""
        assert block in self._hash_of, f"block {block} is not indexed"
        self._parked[block] = None

    def unpark(self, block: int) -> None:
        """Somebody uses the block again: it may not be evicted."""
        del self._parked[block]

    def evict(self) -> int:
        """Takes the least recently parked block out of the index. KeyError when none is parked."""
        block, _ = self._parked.popitem(last=False)
        self.drop(block)
        return block

    def drop(self, block: int) -> None:
        """Takes a block that is not parked out of the index; without effect when it is not there."""
        assert block not in self._parked, f"block {block} is parked"
        block_hash = self._hash_of.pop(block, None)
        if block_hash is None:
            return
        del self._block_of[block_hash]
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None

    def drain_events(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Hashes (stored, removed) since the last call; one that came and went in between is in neither."""
        events = tuple(self._stored), tuple(self._removed)
        self._stored.clear()
        self._removed.clear()
        return events

    def audit(self, cached: set[int]) -> list[str]:
        """Broken invariants, where `cached` are the blocks that ought to be parked."""
        broken = []
        if {block: block_hash for block_hash, block in self._block_of.items()} != self._hash_of:
            broken.append("prefix index: hash to block and block to hash differ")
        if set(self._parked) != cached:
            broken.append(
                f"prefix index: parked blocks differ from CACHED ones: {sorted(set(self._parked) ^ cached)[:8]}"
            )
        if not set(self._parked) <= set(self._hash_of):
            broken.append("prefix index: a parked block has no hash")
        return broken

    def hashes(self) -> tuple[BlockHash, ...]:
        """All hashes held now, for a full report after a gap."""
        return tuple(self._block_of)
