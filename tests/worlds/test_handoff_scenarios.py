"""Each edge of a handoff, once: two worker cores, a router that only keeps the owner record, tokens against the oracle."""

from __future__ import annotations

import pytest
from pair_world import BLOCK, SESSION, World

from engine.fake_runner import expected_tokens, fake_layout
from kv_transfer.messages import (
    Cancel,
    CommitRequest,
    Grant,
    Offer,
    Refuse,
    TransferMessage,
)
from tandem.request import Sampling

PROMPT = tuple(range(3, 30))  # 27 tokens: six full blocks and three tokens of a seventh


def said(world: World, kind: type) -> int:
    return sum(isinstance(message.body, kind) for message in world.words)


def test_tokens_equal_the_oracle_and_nothing_is_left() -> None:
    world = World()
    asked = world.ask("r", PROMPT)
    world.run()
    world.check()
    assert (asked.end, asked.num_attempts) == ("length", 1)
    committed = [each for each in world.stats if each.committed_ms]
    assert [(each.blocks_granted, each.blocks_moved, each.blocks_reused) for each in committed] == [(7, 7, 0)]
    assert committed[0].bytes == 7 * fake_layout(block_size=BLOCK).block_bytes


if __name__ == "__main__":
    pytest.main([__file__])
