"""The block ledger against a naive model that recounts everything, and bugs planted to see that they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from engine.blocks import BlockLedger, BlockState
from engine.prefix_cache import block_hashes

NUM_BLOCKS = 8
OWNERS = ("a", "b", "c", "d")
TRANSFERS = ("t", "u", "v")
CHAINS = [block_hashes(b"m", [chain] * 6, 1) for chain in range(3)]


class LedgerMachine(RuleBasedStateMachine):
    """Drives a ledger and, beside it, a model made of sets and lists in which every answer is recounted.

    The model also keeps what a block's content is: who may have written it last. A block that is handed out must be
    one that nobody can read or write, and one whose generation has risen since anybody could.
    """

    make_ledger: Callable[[], BlockLedger] = staticmethod(lambda: BlockLedger(num_blocks=NUM_BLOCKS, block_size=1))

    def __init__(self) -> None:
        super().__init__()
        self.ledger = self.make_ledger()
        self.owned: dict[str, list[int]] = {}
        self.chain_of: dict[str, int] = {}  # each owner's tokens belong to one chain
        self.exported: dict[str, list[int]] = {}
        self.granted: dict[str, list[int]] = {}
        self.quarantined: dict[str, list[int]] = {}
        self.index: dict[bytes, int] = {}
        self.lru: list[int] = []  # cached blocks, next to go first
        self.stepping: set[str] = set()
        self.leaving: list[str] = []
        self.handed_out_at: dict[int, int] = {}  # block -> generation when it was last handed out
        self.heard: set[bytes] = set()

    # ---- the model -----------------------------------------------------------------------------------------------

    def pinned(self, block: int) -> bool:
        groups = [*self.owned.values(), *self.exported.values(), *self.granted.values(), *self.quarantined.values()]
        return any(block in group for group in groups)

    def expected_state(self, block: int) -> BlockState:
        for groups, state in (
            (self.granted, BlockState.GRANTED),
            (self.quarantined, BlockState.QUARANTINED),
            (self.exported, BlockState.EXPORTED),
            (self.owned, BlockState.OWNED),
        ):
            if any(block in group for group in groups.values()):
                return state
        return BlockState.CACHED if block in self.index.values() else BlockState.FREE

    def unpinned(self, blocks: list[int]) -> None:
        """These blocks lost a pin, in this order."""
        for block in blocks:
            if not self.pinned(block) and block in self.index.values() and block not in self.lru:
                self.lru.append(block)

    def handed_out(self, blocks: list[int] | None, num: int) -> None:
        """Checks blocks that an allocation or a grant returned, before the model books them."""
        free = [b for b in range(NUM_BLOCKS) if self.expected_state(b) is BlockState.FREE]
        if num > len(free) + len(self.lru):
            assert blocks is None
            return
        assert blocks is not None
        assert len(set(blocks)) == len(blocks) == num
        evicted = self.lru[: max(0, num - len(free))]
        assert set(blocks) == set(evicted) | (set(blocks) & set(free)), "what is pinned or more recent was taken"
        for block in evicted:
            self.lru.remove(block)
            self.index = {h: b for h, b in self.index.items() if b != block}
        for block in blocks:
            generation = self.ledger.generation(block)
            assert generation > self.handed_out_at.get(block, -1), f"block {block} is reused at generation {generation}"
            self.handed_out_at[block] = generation

    # ---- rules ---------------------------------------------------------------------------------------------------

    @rule(owner=st.sampled_from(OWNERS), chain=st.integers(0, 2), num=st.integers(0, 6))
    def acquire(self, owner: str, chain: int, num: int) -> None:
        if owner in self.owned or owner in self.leaving:
            return
        expected = []
        for block_hash in CHAINS[chain][:num]:
            if block_hash not in self.index:
                break
            expected.append(self.index[block_hash])
        assert self.ledger.match(CHAINS[chain][:num]) == len(expected)
        assert self.ledger.acquire(owner, CHAINS[chain][:num]) == expected
        self.lru = [block for block in self.lru if block not in expected]
        if expected:
            self.owned[owner] = expected
            self.chain_of[owner] = chain

    @rule(owner=st.sampled_from(OWNERS), chain=st.integers(0, 2), num=st.integers(0, 5))
    def allocate(self, owner: str, chain: int, num: int) -> None:
        if owner in self.leaving:
            return
        blocks = self.ledger.allocate(owner, num)
        self.handed_out(blocks, num)
        if blocks:
            self.chain_of.setdefault(owner, chain)
            self.owned.setdefault(owner, []).extend(blocks)

    @rule(owner=st.sampled_from(OWNERS), number=st.integers(0, 5))
    def publish(self, owner: str, number: int) -> None:
        if number >= len(self.owned.get(owner, [])):
            return
        block, block_hash = self.owned[owner][number], CHAINS[self.chain_of[owner]][number]
        self.ledger.publish(owner, block, block_hash)
        self.index.setdefault(block_hash, block)

    @rule(owner=st.sampled_from(OWNERS), chain=st.integers(0, 2), num=st.integers(2, 6))
    def prefill(self, owner: str, chain: int, num: int) -> None:
        """What a sequence does: share what is there, allocate the rest, publish all."""
        self.release(owner)
        if owner in self.leaving:
            return
        self.acquire(owner, chain, num)
        self.allocate(owner, chain, num - len(self.owned.get(owner, [])))
        for number in range(num):
            self.publish(owner, number)

    @rule(owner=st.sampled_from(OWNERS))
    def release(self, owner: str) -> None:
        self.ledger.release(owner)
        if owner in self.stepping:
            self.leaving += [owner] if owner not in self.leaving else []
            return
        blocks = self.owned.pop(owner, [])
        self.chain_of.pop(owner, None)
        self.unpinned(blocks[::-1])

    @rule(owners=st.sets(st.sampled_from(OWNERS), min_size=1))
    def begin_step(self, owners: set[str]) -> None:
        if not self.stepping:
            self.ledger.begin_step(owners)
            self.stepping = set(owners)

    @rule()
    def end_step(self) -> None:
        self.ledger.end_step()
        self.stepping = set()
        for owner in self.leaving:
            blocks = self.owned.pop(owner, [])
            self.chain_of.pop(owner, None)
            self.unpinned(blocks[::-1])
        self.leaving = []

    @rule(transfer=st.sampled_from(TRANSFERS), owner=st.sampled_from(OWNERS), num=st.integers(0, 6))
    def export(self, transfer: str, owner: str, num: int) -> None:
        blocks = self.owned.get(owner, [])[:num]
        generations = self.ledger.export(transfer, blocks)
        assert generations == tuple(self.ledger.generation(block) for block in blocks)
        if blocks:
            pins = self.exported.setdefault(transfer, [])
            pins.extend(block for block in blocks if block not in pins)

    @rule(transfer=st.sampled_from(TRANSFERS))
    def export_cached(self, transfer: str) -> None:
        blocks = self.lru[:2]
        self.ledger.export(transfer, blocks)
        if blocks:
            self.exported.setdefault(transfer, []).extend(blocks)
            self.lru = self.lru[2:]

    @rule(transfer=st.sampled_from(TRANSFERS), num=st.none() | st.integers(0, 3))
    def end_export(self, transfer: str, num: int | None) -> None:
        pins = self.exported.get(transfer, [])
        ended = list(pins) if num is None else pins[:num]
        self.ledger.end_export(transfer, None if num is None else ended)
        self.exported[transfer] = [block for block in pins if block not in ended]
        if not self.exported[transfer]:
            del self.exported[transfer]
        self.unpinned(ended[::-1])

    @rule(transfer=st.sampled_from(TRANSFERS), num=st.integers(0, 5))
    def grant(self, transfer: str, num: int) -> None:
        if transfer in self.granted or transfer in self.quarantined:
            return
        blocks = self.ledger.grant(transfer, num)
        self.handed_out(blocks, num)
        if blocks is not None:
            self.granted[transfer] = blocks

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), owner=st.sampled_from(OWNERS), chain=st.integers(0, 2))
    def accept(self, data: st.DataObject, owner: str, chain: int) -> None:
        transfer = data.draw(st.sampled_from(sorted(self.granted)))
        if owner in self.leaving:
            return
        blocks = self.ledger.accept(transfer, owner)
        assert blocks == self.granted.pop(transfer)
        if blocks:
            self.chain_of.setdefault(owner, chain)
            self.owned.setdefault(owner, []).extend(blocks)

    @rule(transfer=st.sampled_from(TRANSFERS))
    def quarantine(self, transfer: str) -> None:
        self.ledger.quarantine(transfer)
        blocks = self.granted.pop(transfer, [])
        if blocks:
            self.quarantined[transfer] = blocks

    @rule(transfer=st.sampled_from(TRANSFERS), chain=st.integers(0, 2), first=st.integers(0, 5), num=st.integers(0, 3))
    def end_quarantine(self, transfer: str, chain: int, first: int, num: int) -> None:
        """The leading `num` blocks turn out to be whole, as blocks of a chain from `first` on."""
        blocks = self.quarantined.pop(transfer, [])
        whole = dict(zip(blocks[:num], CHAINS[chain][first:], strict=False))
        self.ledger.end_quarantine(transfer, whole)
        for block in reversed(blocks):
            if block in whole:
                self.index.setdefault(whole[block], block)
        self.unpinned(blocks[::-1])

    @rule(transfer=st.sampled_from(TRANSFERS), chain=st.integers(0, 2), num=st.integers(1, 3))
    def lose(self, transfer: str, chain: int, num: int) -> None:
        """What an attempt does that fails when its blocks have landed."""
        self.grant(transfer, num)
        self.quarantine(transfer)
        self.end_quarantine(transfer, chain, 0, num)

    @rule()
    def drain_events(self) -> None:
        stored, removed = self.ledger.drain_events()
        assert not set(stored) & self.heard
        assert set(removed) <= self.heard
        self.heard = (self.heard | set(stored)) - set(removed)
        assert self.heard == set(self.index)

    # ---- after every rule ----------------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        states = [self.expected_state(block) for block in range(NUM_BLOCKS)]
        assert [self.ledger.state(block) for block in range(NUM_BLOCKS)] == states
        counts = self.ledger.counts()
        told = (counts.free, counts.cached, counts.owned, counts.exported, counts.granted, counts.quarantined)
        assert told == tuple(states.count(state) for state in BlockState)
        assert sum(told) == counts.total == NUM_BLOCKS
        assert self.ledger.num_available == states.count(BlockState.FREE) + states.count(BlockState.CACHED)
        for owner in OWNERS:
            assert list(self.ledger.blocks_of(owner)) == self.owned.get(owner, [])
        for transfer in TRANSFERS:
            assert list(self.ledger.exported_by(transfer)) == self.exported.get(transfer, [])
            assert list(self.ledger.granted_to(transfer)) == self.granted.get(transfer, [])
        assert set(self.ledger.hashes()) == set(self.index)
        assert self.ledger.audit() == []

    def teardown(self) -> None:
        self.ledger.end_step()
        for name in (*OWNERS, *TRANSFERS):
            self.ledger.release(name)
            self.ledger.end_export(name)
            self.ledger.quarantine(name)
            self.ledger.end_quarantine(name)
        counts = self.ledger.counts()
        assert counts.free + counts.cached == NUM_BLOCKS, f"leaked: {counts}"


SETTINGS = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_ledger_is_its_model() -> None:
    run_state_machine_as_test(LedgerMachine, settings=SETTINGS)


# ---- planted bugs: each must be found -------------------------------------------------------------------------------


class FreesWhileShared(BlockLedger):
    def release(self, owner: str) -> None:
        for block in reversed(self._owned.pop(owner, {})):
            self._num_owners[block] = 0
            self._settle(block)


class FreesUnderAStep(BlockLedger):
    def begin_step(self, owners: Iterable[str]) -> None:
        pass


class ForgetsWhoLeftInAStep(BlockLedger):
    def end_step(self) -> None:
        self._leaving.clear()
        super().end_step()


class FreesWhileExported(BlockLedger):
    def _settle(self, block: int) -> None:
        exports, self._num_exports[block] = self._num_exports[block], 0
        super()._settle(block)
        self._num_exports[block] = exports


class KeepsStaleHash(BlockLedger):
    def _take(self, num: int) -> list[int] | None:
        if num > self.num_available or num <= len(self._free):
            return super()._take(num)
        block = next(iter(self._cache._parked))
        block_hash = self._cache.hash_of(block)
        assert block_hash is not None
        blocks = super()._take(num)
        self._cache._block_of[block_hash] = block
        self._cache._hash_of[block] = block_hash
        return blocks


class AllocatesTooMuch(BlockLedger):
    def allocate(self, owner: str, num: int) -> list[int] | None:
        return super().allocate(owner, min(num, self.num_available))


class ForgetsGenerationOnFree(BlockLedger):
    def _put_free(self, block: int) -> None:
        self._generation[block] -= 1
        super()._put_free(block)


class ForgetsGenerationOnEviction(BlockLedger):
    def _take(self, num: int) -> list[int] | None:
        before = list(self._generation)
        blocks = super()._take(num)
        self._generation = before
        return blocks


class FreesGrantWithoutQuarantine(BlockLedger):
    def quarantine(self, transfer: str) -> None:
        super().quarantine(transfer)
        self.end_quarantine(transfer)


class EvictsHeadFirst(BlockLedger):
    def release(self, owner: str) -> None:
        if owner in self._owned:
            self._owned[owner] = dict.fromkeys(reversed(self._owned[owner]))
        super().release(owner)


class LosesAGrantedBlock(BlockLedger):
    def end_quarantine(self, transfer: str, whole: Mapping[int, bytes] | None = None) -> None:
        self._quarantined[transfer] = self._quarantined.get(transfer, [])[:-1]
        super().end_quarantine(transfer, whole)


class ForgetsWhatIsWhole(BlockLedger):
    def end_quarantine(self, transfer: str, whole: Mapping[int, bytes] | None = None) -> None:
        super().end_quarantine(transfer)


class ForgetsToTellRemoval(BlockLedger):
    def drain_events(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        return super().drain_events()[0], ()


@pytest.mark.parametrize(
    "broken",
    [
        FreesWhileShared, FreesUnderAStep, ForgetsWhoLeftInAStep,
        FreesWhileExported, KeepsStaleHash, AllocatesTooMuch, ForgetsGenerationOnFree,
        ForgetsGenerationOnEviction, FreesGrantWithoutQuarantine, EvictsHeadFirst, LosesAGrantedBlock,
        ForgetsWhatIsWhole, ForgetsToTellRemoval,
    ],
)  # fmt: skip
def test_planted_bug_is_found(broken: type[BlockLedger]) -> None:
    class Machine(LedgerMachine):
        make_ledger = staticmethod(lambda: broken(num_blocks=NUM_BLOCKS, block_size=1))

    quiet = settings(
        SETTINGS, phases=[phase for phase in SETTINGS.phases if phase.name == "generate"], print_blob=False
    )
    with pytest.raises((AssertionError, KeyError, IndexError)):
        run_state_machine_as_test(Machine, settings=quiet)


# ---- single facts ---------------------------------------------------------------------------------------------------


def test_a_stale_block_and_generation_is_recognised() -> None:
    ledger = BlockLedger(num_blocks=2, block_size=4)
    (block,) = ledger.allocate("a", 1) or []
    generation = ledger.generation(block)
    ledger.release("a")
    assert ledger.generation(block) != generation


def test_a_shared_prefix_survives_its_first_owner_and_any_export() -> None:
    ledger = BlockLedger(num_blocks=4, block_size=1)
    hashes = CHAINS[0][:2]
    blocks = ledger.allocate("a", 2) or []
    for block, block_hash in zip(blocks, hashes, strict=True):
        ledger.publish("a", block, block_hash)
    assert ledger.acquire("b", CHAINS[0]) == blocks
    ledger.export("t", blocks)
    ledger.release("a")
    ledger.release("b")
    assert ledger.counts().exported == 2
    assert ledger.allocate("c", 3) is None
    ledger.end_export("t", blocks[:1])
    assert ledger.counts().cached == 1
    ledger.end_export("t")
    assert ledger.match(hashes) == 2


def test_without_a_prefix_cache_nothing_is_kept_or_shared() -> None:
    ledger = BlockLedger(num_blocks=4, block_size=1, prefix_cache=False)
    hashes = CHAINS[0][:2]
    for block, block_hash in zip(ledger.allocate("a", 2) or [], hashes, strict=True):
        ledger.publish("a", block, block_hash)
    assert ledger.acquire("b", hashes) == []
    ledger.release("a")
    assert (ledger.counts().free, ledger.counts().cached, ledger.match(hashes), ledger.audit()) == (4, 0, 0, [])


def test_the_tail_of_a_prefix_is_evicted_first() -> None:
    ledger = BlockLedger(num_blocks=4, block_size=1)
    for block, block_hash in zip(ledger.allocate("a", 4) or [], CHAINS[0], strict=False):
        ledger.publish("a", block, block_hash)
    ledger.release("a")
    ledger.allocate("b", 1)
    assert ledger.match(CHAINS[0][:4]) == 3
    assert ledger.drain_events() == ((CHAINS[0][0], CHAINS[0][1], CHAINS[0][2]), ())


def test_nothing_is_taken_when_it_does_not_fit() -> None:
    ledger = BlockLedger(num_blocks=3, block_size=1)
    assert ledger.grant("t", 4) is None
    assert ledger.allocate("a", 4) is None
    assert ledger.counts().free == 3
    assert ledger.blocks_of("a") == ()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda ledger: ledger.publish("b", 0, CHAINS[0][0]),
        lambda ledger: ledger.export("u", [3]),
        lambda ledger: ledger.export("u", ledger.granted_to("t")),
        lambda ledger: ledger.grant("t", 1),
        lambda ledger: ledger.accept("u", "a"),
        lambda ledger: ledger.allocate("a", -1),
    ],
)
def test_misuse_is_an_assertion(misuse: Callable[[BlockLedger], object]) -> None:
    ledger = BlockLedger(num_blocks=4, block_size=1)
    ledger.allocate("a", 1)
    ledger.grant("t", 1)
    with pytest.raises(AssertionError):
        misuse(ledger)
    assert ledger.audit() == []


def test_of_what_a_quarantine_leaves_the_end_is_evicted_first() -> None:
    ledger = BlockLedger(num_blocks=4, block_size=1)
    blocks = ledger.grant("t", 4)
    assert blocks is not None
    ledger.quarantine("t")
    ledger.end_quarantine("t", dict(zip(blocks[:3], CHAINS[0], strict=False)))
    assert (ledger.counts().free, ledger.counts().cached) == (1, 3)
    for left in (3, 2, 1):
        assert ledger.match(CHAINS[0]) == left
        ledger.allocate(f"a{left}", 1 + (left == 3))


def test_without_a_prefix_cache_a_quarantine_leaves_nothing() -> None:
    ledger = BlockLedger(num_blocks=2, block_size=1, prefix_cache=False)
    blocks = ledger.grant("t", 1)
    assert blocks is not None
    ledger.quarantine("t")
    ledger.end_quarantine("t", {blocks[0]: CHAINS[0][0]})
    assert ledger.counts().free == 2


def test_ending_twice_or_what_never_began_has_no_effect() -> None:
    ledger = BlockLedger(num_blocks=4, block_size=1)
    ledger.grant("t", 2)
    for _ in range(2):
        ledger.quarantine("t")
    assert ledger.counts().quarantined == 2
    for _ in range(2):
        ledger.end_quarantine("t")
    ledger.release("nobody")
    ledger.end_export("nothing")
    assert ledger.counts().free == 4


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 1), (1, 0)])
def test_refuses_an_empty_pool(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockLedger(num_blocks=num_blocks, block_size=block_size)
