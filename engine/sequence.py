"""One request as the engine sees it: its tokens, how far they are computed, and its block table."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.prefix_cache import BlockHash
from tandem.request import RequestId, Sampling


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A request on this engine. Only engine/step.py and the role core that added it change it.

    `tokens` is prompt and answer; the KV of the first `num_computed` of them is in `blocks`, block i holding the
    positions [i * block_size, (i + 1) * block_size), or, while it has no blocks, in slots of the swap space. A step
    that computes the last token samples the next one, so a sequence in decode has exactly one token that is not
    computed: its newest.
    """

    request_id: RequestId
    epoch: int
    tokens: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    owner: str = ""  # the name that the ledger knows it by; empty: the request id
    priority: float = 0.0  # prefill order: lower first, then first come first served
    held: bool = False  # not run until resumed; never preempted meanwhile
    preemptible: bool = True  # its blocks may be taken for an older sequence; it is prefilled again later
    copying: bool = False  # the step under way swaps its blocks out or back: nobody else may read or move it
    leaving: bool = False  # it is being copied elsewhere: who wants its blocks waits for it to go, or to give up
    num_cached_tokens: int = 0  # found in the prefix cache at its (last) start
    num_preemptions: int = 0
    cache_salt: bytes = b""  # its blocks are shared only among sequences of the same
    hashes: list[BlockHash] = field(default_factory=list)  # of the leading full blocks, as far as known
    num_published: int = 0  # leading blocks that are in the prefix index
    arrival: int = 0  # set by Batch.add: the age
    last_step: int = 0  # set by Batch: when it was last in a plan
    table: tuple[int, ...] = ()  # `blocks`, frozen for plans; rebuilt as blocks are added

    def __post_init__(self) -> None:
        assert 0 < self.num_prompt_tokens <= len(self.tokens), f"{self.request_id}: no prompt"
        assert 0 <= self.num_computed < len(self.tokens), f"{self.request_id}: nothing left to compute"
        if not self.owner:
            self.owner = str(self.request_id)

    @property
    def index(self) -> int:
        """The index of the next answer token."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_left(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 in decode, more in prefill."""
        return len(self.tokens) - self.num_computed

    @property
    def started(self) -> bool:
        """Whether it holds blocks."""
        return bool(self.blocks)

    @property
    def decoding(self) -> bool:
        """Whether one more token is all that the next sample needs."""
        return self.started and self.num_left == 1 and not self.copying

    def block_table(self) -> tuple[int, ...]:
        """The block table, frozen. Tables only grow (or restart empty), so its length tells whether it is current."""
        if len(self.table) != len(self.blocks):
            self.table = tuple(self.blocks)
        return self.table
