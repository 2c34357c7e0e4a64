"""A runner without a model: its next token is a hash of everything that the block table reaches.

So tests see any lost, stale, swapped or half-written block as a wrong token.

Each token slot of the pool holds 8 bytes: slot[p] = mix(slot[p - 1] ^ mix(token[p])), where slot[p - 1] is read
through the block table. The next token is a hash of the sum over all slots of mix(slot[p] ^ p * GOLDEN), again read
through the table; it plays the part that attention plays in a model. `expected_tokens` says from the tokens alone
what must come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.layout import KVLayout
from engine.noise import FACTOR_1, FACTOR_2, GOLDEN, MASK_64, mix64
from engine.step import Sampled, StepPlan, StepRow
from tandem.request import Sampling

SLOT_BYTES = 8
ROOT = mix64(0x74616E64656D)  # stands before position 0
POISON = 0xDEAD_BEEF_DEAD_BEEF

Slots = NDArray[np.uint64]


def fake_layout(*, block_size: int, namespace: str = "fake", fingerprint: str = "fake") -> KVLayout:
    """A layout whose blocks have 8 bytes a token: one float32 for K and one for V."""
    return KVLayout(
        namespace=namespace,
        fingerprint=fingerprint,
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        block_size=block_size,
        dtype="float32",
    )


def _slot(previous: int, token_id: int) -> int:
    return mix64(previous ^ mix64(token_id + 1))


def _draw(total: int, sampling: Sampling, vocab_size: int) -> int:
    salt = mix64(sampling.seed + 1) if sampling.temperature > 0 else 0
    return mix64((total & MASK_64) ^ salt) % vocab_size


def expected_tokens(prompt: Sequence[int], sampling: Sampling, num: int, vocab_size: int) -> list[int]:
    """The `num` tokens that follow `prompt` (a prompt, or a prompt and the answer so far), whatever happens to it."""
    slot, total, answer = ROOT, 0, []
    for position, token_id in enumerate(prompt):
        slot = _slot(slot, token_id)
        total += mix64(slot ^ (position * GOLDEN))
    for position in range(len(prompt), len(prompt) + num):
        answer.append(_draw(total, sampling, vocab_size))
        slot = _slot(slot, answer[-1])
        total += mix64(slot ^ (position * GOLDEN))
    return answer


def _mix64_array(values: Slots) -> Slots:
    """`mix64` of each element; numpy's uint64 wraps as the definition asks."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(FACTOR_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(FACTOR_2)
    mixed: Slots = values ^ (values >> np.uint64(31))
    return mixed


class FakeRunner:
    """Runs plans over a pool of `num_blocks` blocks of `layout.block_bytes` bytes each.

    `memory` is the pool, such as a KVPool's view, when something else reads or writes it too; without it the runner
    has a pool of its own. `slots[block, offset]` is the pool as 64-bit numbers, for tests that look or meddle.
    Sampling's seed and whether its temperature is zero change the tokens, all else in it does not.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        layout: KVLayout | None = None,
        memory: memoryview | bytearray | None = None,
    ) -> None:
        self._layout = fake_layout(block_size=block_size) if layout is None else layout
        if self._layout.block_size != block_size or self._layout.block_bytes != block_size * SLOT_BYTES:
            raise ValueError(
                f"layout has blocks of {self._layout.block_size} tokens and {self._layout.block_bytes} bytes, "
                f"must be {block_size} tokens of {SLOT_BYTES} bytes"
            )
        if memory is None:
            memory = bytearray(num_blocks * self._layout.block_bytes)
        # A view of its own, so that a pool can release the one that it gave.
        self.slots: Slots = np.frombuffer(memoryview(memory), dtype="<u8").reshape(num_blocks, block_size)
        self.block_size = block_size
        self.vocab_size = vocab_size
        self._steps = np.arange(0, dtype=np.uint64)
        self._num_rows = 0

    @property
    def layout(self) -> KVLayout:
        """How the pool lies in memory."""
        return self._layout

    @property
    def progress(self) -> int:
        """Rows begun."""
        return self._num_rows

    def run(self, plan: StepPlan) -> list[Sampled | None]:
        """Writes the slots of all rows, then draws; one result a row, None where it does not sample."""
        for row in plan.rows:
            self._num_rows += 1
            self._write(row)
        return [self._sample(row) if row.sample else None for row in plan.rows]

    def poison(self, blocks: Iterable[int]) -> None:
        """Overwrites the blocks, so that whoever still reads them gets wrong tokens."""
        for block in blocks:
            self.slots[block] = np.uint64(POISON)

    def read_block(self, block: int) -> bytes:
        """The block's content."""
        content: bytes = self.slots[block].tobytes()
        return content

    def write_block(self, block: int, content: bytes) -> None:
        """Replaces the block's content, as a transfer does. ValueError when the length is another."""
        self.slots[block] = np.frombuffer(content, dtype="<u8")

    def _write(self, row: StepRow) -> None:
        size = self.block_size
        assert row.tokens, f"{row.request_id}: an empty row"
        assert row.position <= len(row.blocks) * size, f"{row.request_id}: the block table ends too early"
        assert len(set(row.blocks)) == len(row.blocks), f"{row.request_id}: a block is twice in the table"
        slot = ROOT
        if row.start:
            before = row.start - 1
            slot = int(self.slots[row.blocks[before // size], before % size])
        for position, token_id in enumerate(row.tokens, start=row.start):
            slot = _slot(slot, token_id)
            self.slots[row.blocks[position // size], position % size] = slot

    def _sample(self, row: StepRow) -> Sampled:
        num = row.position
        if len(self._steps) < num:
            self._steps = np.arange(2 * num, dtype=np.uint64) * np.uint64(GOLDEN)
        table = list(row.blocks[: -(-num // self.block_size)])
        read = self.slots[table].reshape(-1)[:num]
        total = int(_mix64_array(read ^ self._steps[:num]).sum(dtype=np.uint64))
        token_id = _draw(total, row.sampling, self.vocab_size)
        asked = row.sampling.logprobs
        if asked is None:
            return Sampled(token_id=token_id)
        top = tuple(((token_id + rank) % self.vocab_size, -0.5 - rank) for rank in range(min(asked, self.vocab_size)))
        return Sampled(token_id=token_id, logprob=-0.5, top=top)
