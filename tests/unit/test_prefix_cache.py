"""Block hashes and the prefix index."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prefix_cache import PrefixCache, block_hashes, chain_hash, root_hash

TOKENS = list(range(100, 140))


def test_only_full_blocks_have_hashes() -> None:
    assert [len(block_hashes(b"m", TOKENS[:num], 16)) for num in (0, 15, 16, 17, 32, 40)] == [0, 0, 1, 1, 2, 2]
    assert {len(block_hash) for block_hash in block_hashes(b"m", TOKENS, 8)} == {16}


def test_a_hash_names_the_whole_prefix() -> None:
    hashes = block_hashes(b"m", TOKENS, 8)
    changed = block_hashes(b"m", [1, *TOKENS[1:]], 8)
    assert len(set(hashes)) == 5
    assert not set(hashes) & set(changed)
    tail_changed = block_hashes(b"m", [*TOKENS[:-1], 1], 8)
    assert tail_changed[:-1] == hashes[:-1]
    assert tail_changed[-1] != hashes[-1]
    assert not set(hashes) & set(block_hashes(b"other model", TOKENS, 8))


def test_equal_blocks_at_other_places_have_other_hashes() -> None:
    assert len(set(block_hashes(b"m", [7] * 64, 8))) == 8


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.integers(1, 9), st.integers(0, 60))
def test_incremental_equals_at_once(tokens: list[int], block_size: int, known: int) -> None:
    whole = block_hashes(b"m", tokens, block_size)
    assert block_hashes(b"m", tokens, block_size, whole[:known]) == whole
    parent = root_hash(b"m")
    for number, expected in enumerate(whole):
        parent = chain_hash(parent, tokens[number * block_size : (number + 1) * block_size])
        assert parent == expected


def test_hashes_are_the_same_in_every_process() -> None:
    program = "from engine.prefix_cache import block_hashes; print(block_hashes(b'm', list(range(16)), 16)[0].hex())"
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60,
        env={"PYTHONHASHSEED": "7"},
    ).stdout.strip()  # fmt: skip
    assert printed == block_hashes(b"m", list(range(16)), 16)[0].hex() == "133c7400ae73ab9d43e7e5e88a56bf33"


def test_least_recently_parked_goes_first() -> None:
    cache = PrefixCache()
    for block in (4, 5, 6):
        assert cache.insert(bytes([block]), block)
        cache.park(block)
    cache.unpark(4)
    cache.park(4)
    assert [cache.evict(), cache.evict(), cache.evict()] == [5, 6, 4]
    with pytest.raises(KeyError):
        cache.evict()


def test_the_first_block_of_a_hash_stays() -> None:
    cache = PrefixCache()
    assert cache.insert(b"a", 1)
    assert cache.insert(b"a", 1)
    assert not cache.insert(b"a", 2)
    assert cache.find(b"a") == 1
    assert cache.hash_of(2) is None


def test_a_block_cannot_change_its_hash() -> None:
    cache = PrefixCache()
    cache.insert(b"a", 1)
    with pytest.raises(AssertionError, match="another hash"):
        cache.insert(b"b", 1)


def test_events_tell_the_net_change() -> None:
    cache = PrefixCache()
    cache.insert(b"a", 1)
    cache.insert(b"b", 2)
    assert cache.drain_events() == ((b"a", b"b"), ())
    cache.park(1)
    cache.evict()
    cache.insert(b"c", 1)
    cache.park(1)
    cache.evict()  # came and went unheard of
    assert cache.drain_events() == ((), (b"a",))
    cache.park(2)
    cache.evict()
    cache.insert(b"b", 3)  # went and came back unheard of
    assert cache.drain_events() == ((), ())
    assert cache.hashes() == (b"b",)


def test_two_salts_share_no_hash() -> None:
    salts = (b"", b"a" * 16, b"b" * 16)
    chains = [block_hashes(b"m", TOKENS, 8, salt=salt) for salt in salts]
    assert len({each for chain in chains for each in chain}) == sum(map(len, chains))
    assert block_hashes(b"m", TOKENS, 8, chains[1][:2], salt=salts[1]) == chains[1]
    assert block_hashes(b"m", TOKENS, 8, salt=b"") == block_hashes(b"m", TOKENS, 8)
