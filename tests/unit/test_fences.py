"""The fence of a request's life leads all of its epochs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from router_rig import R, Rig, request, token

from router.config import RouterConfig
from router.driver import Driver
from router.events import FenceRaised, Submitted, Tick, WorkerLost
from router.journal import Journal, StoreDown
from router.move import EPOCHS_PER_FENCE
from router.transcripts import Behind, Ended, Keep, Kept, Transcripts, Verdict, Write
from tandem.errors import RequestLost
from tandem.messages import Assign, CancelAssigned, Role
from tandem.request import WorkerId


def test_a_life_of_a_request_brings_its_own_epochs() -> None:
    """Another router's epochs may be above all of this core's: the fence of the life that began last leads."""
    rig = Rig()
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    rig.feed(Submitted(request=request(), first_epoch=9 * EPOCHS_PER_FENCE, taken_over=True))
    assert {assign.epoch for _, assign in rig.sent(Assign)} == {9 * EPOCHS_PER_FENCE}


def test_the_placements_of_a_life_fit_under_its_fence() -> None:
    with pytest.raises(ValueError, match="replacements_all_max: is 65, must be below 65"):
        RouterConfig(replacements_all_max=65)
    rig = Rig()
    rig.feed(Submitted(request=request(max_tokens=400), first_epoch=9 * EPOCHS_PER_FENCE))
    for incarnation in range(1, 2 + RouterConfig().replacements_all_max):
        rig.up("m0", Role.MIXED, incarnation=incarnation)
        rig.feed(Tick(), after_ms=1000)
        placed = rig.assigns()[-1].epoch
        rig.report(WorkerId("m0"), incarnation, tokens=(token(placed, incarnation - 1),))
        rig.feed(WorkerLost(worker_id=WorkerId("m0"), incarnation=incarnation, reason="killed"))
    assert isinstance(rig.error(), RequestLost)
    assert len({each.epoch for each in rig.assigns()}) == RouterConfig().replacements_all_max + 1
    assert {each.epoch // EPOCHS_PER_FENCE for each in rig.assigns()} == {9}


def test_a_life_goes_on_under_a_later_fence_when_its_router_says_so() -> None:
    """Whatever is under way is given to workers anew; what waits begins there."""
    rig = Rig()
    rig.feed(Submitted(request=request(), first_epoch=5 * EPOCHS_PER_FENCE))
    rig.feed(FenceRaised(request_id=R, first_epoch=7 * EPOCHS_PER_FENCE))
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    rig.feed(Tick())
    assert {assign.epoch for _, assign in rig.sent(Assign)} == {7 * EPOCHS_PER_FENCE}
    rig.feed(FenceRaised(request_id=R, first_epoch=9 * EPOCHS_PER_FENCE))
    assert {cancel.epoch for _, cancel in rig.sent(CancelAssigned)} == {7 * EPOCHS_PER_FENCE}
    rig.feed(Tick(), 1000)
    assert {assign.epoch for assign in rig.assigns()} == {7 * EPOCHS_PER_FENCE, 9 * EPOCHS_PER_FENCE}
    assert not rig.ends()


def test_the_next_fence_is_above_one_that_was_taken_over() -> None:
    """It may come from a router whose clock was ahead."""
    driver = Driver(born_us=1_000)
    ahead = driver.next_fence() + 10**12
    driver.take_over(Kept(new=request(), keep=Keep(form=b"{}"), tokens=(), ended=None, fence=ahead))
    assert driver.next_fence() > ahead
    assert driver.next_fence(2 * ahead) > 2 * ahead


class BehindStore:
    """Says of each write that this router has the request under a later fence; its claims are answered when told."""

    def __init__(self) -> None:
        self.claimed = asyncio.Event()

    async def write(self, writes: Sequence[Write]) -> list[Verdict | Behind]:
        return [Behind(each.fence + 1) for each in writes]

    async def claim(self, write: Write, key: str) -> None:
        await self.claimed.wait()


class SlowStore:
    """Carries each write out; the first answer does not come."""

    def __init__(self) -> None:
        self.tokens = 0
        self.begun = asyncio.Event()

    async def renew(self) -> bool:
        return True

    async def write(self, writes: Sequence[Write]) -> list[Verdict | Behind]:
        verdicts: list[Verdict | Behind] = []
        for each in writes:
            fits = each.entry is not None or each.from_index == self.tokens
            self.tokens = (0 if each.entry is not None else self.tokens) + len(each.tokens) if fits else self.tokens
            verdicts.append(Verdict.WRITTEN if fits else Verdict.MISSING)
        if not self.begun.is_set():
            self.begun.set()
            await asyncio.Event().wait()
        return verdicts


def test_a_router_that_ends_hands_over_all_that_its_store_lacks() -> None:
    """Also where its last write was under way, and where there is more than one write may have."""

    async def main() -> None:
        store, driver = SlowStore(), Driver(transcripts=Transcripts(shared=True))
        journal = Journal(driver, store)  # type: ignore[arg-type]
        driver.transcripts.begin(request(), Keep(form=b"{}"), fence=5, written=True)
        driver.transcripts.deliver(R, tuple(token(1, index) for index in range(10)))
        writing = asyncio.create_task(journal.run())
        await store.begun.wait()
        writing.cancel()
        driver.transcripts.deliver(R, tuple(token(1, index) for index in range(10, 10_000)))
        await journal.hand_over()
        assert store.tokens == 10_000

    asyncio.run(main())


def test_what_is_over_is_not_renewed_above_the_claim_of_its_ids_next_life() -> None:
    async def main() -> None:
        store = BehindStore()
        driver = Driver(transcripts=Transcripts(shared=True))
        journal = Journal(driver, store)  # type: ignore[arg-type]
        new, keep = request(), Keep(form=b"{}")
        driver.transcripts.begin(new, keep, fence=5)
        driver.transcripts.end(0, R, Ended(num_tokens=0, usage=None, code="cancelled"))
        claim = asyncio.create_task(journal.claim(new, keep))
        await asyncio.sleep(0)
        await journal.flush()
        kept = driver.transcripts.find(R)
        assert kept is not None
        assert kept.fence == 5
        store.claimed.set()
        await claim
        await journal.flush()
        kept = driver.transcripts.find(R)
        assert kept is not None
        assert kept.fence > 6, "else the store would never hear of its end"

    asyncio.run(main())


class AwayStore:
    """One that answers nothing until it may."""

    def __init__(self) -> None:
        self.back = False

    async def renew(self) -> bool:
        if not self.back:
            raise StoreDown("it is away")
        return True


def test_how_long_the_store_is_away_is_known_until_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.journal.BACKOFF_S", 0.01)

    async def main() -> None:
        store = AwayStore()
        journal = Journal(Driver(transcripts=Transcripts(shared=True)), store)  # type: ignore[arg-type]
        assert journal.away_s == 0.0
        running = asyncio.create_task(journal.run())
        async with asyncio.timeout(10):
            while journal.away_s < 0.05:
                await asyncio.sleep(0)
            store.back = True
            while journal.away_s:
                await asyncio.sleep(0)
        assert journal.problem == ""
        running.cancel()

    asyncio.run(main())
