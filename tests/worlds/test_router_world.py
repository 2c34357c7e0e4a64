"""Worlds of several routers, their store and their clients: what they meet, and bugs planted in them that are found."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from smoke import smoke_worlds

from router.driver import Driver
from router.service import Service, _Back
from router.transcripts import Behind, Kept, Transcripts, Verdict, Write
from simulator.run import run_seeds
from simulator.store import StoreModel
from simulator.worker import VirtualWorker
from tandem.request import RequestId
from tandem.resuming import Attach, Begin, Resuming

pytestmark = pytest.mark.timeout(600)  # a search through worlds, on a machine that others use, too

SEEDS_TO_FIND = 2000


@pytest.mark.slow
def test_the_worlds_meet_what_they_are_meant_to_meet() -> None:
    """Faults that never happen test nothing."""
    told: list[str] = []
    ends: Counter[str] = Counter()
    for outcome in smoke_worlds():
        assert outcome.world is not None
        told += outcome.world.story
        ends += outcome.world.checks.readers.ends()
    meant = ("router-3 starts", "is killed", "router-1 stands still", "the store is away", "the store is slow")
    more = (
        "is to be a ",
        "forgotten everything",
        "the connection of client",
        "TakenOver",
        "'clients'",
        "'store'",
        "-twin",
    )
    assert not [each for each in (*meant, *more) if each not in "\n".join(told)]
    assert ends["well"] > 10 * ends["RequestLost"]
    assert ends["TakenOver"] > 10
    assert ends["left"] > 10


# ---- planted bugs --------------------------------------------------------------------------------------------------


def take_over_keeps_the_fence(patch: pytest.MonkeyPatch) -> None:
    """Two routers hold one fence, and so the same epochs."""
    take_over = StoreModel.take_over

    def same(
        model: StoreModel, now_us: int, holder: str, request_id: RequestId, fence: int, mark: bytes
    ) -> Kept | None:
        record = model.records.get(request_id)
        before = 0 if record is None else record.fence
        kept = take_over(model, now_us, holder, request_id, fence, mark)
        if kept is None or record is None:
            return kept
        record.fence = before
        return replace(kept, fence=before)

    patch.setattr(StoreModel, "take_over", same)


def router_writes_on_after_being_fenced(patch: pytest.MonkeyPatch) -> None:
    """That another router has the request is taken for a store that has forgotten it."""
    answered = Transcripts.answered

    def deaf(transcripts: Transcripts, write: Write, verdict: Verdict) -> bool:
        return answered(transcripts, write, Verdict.MISSING if verdict is Verdict.FENCED else verdict)

    patch.setattr(Transcripts, "answered", deaf)


def fences_start_again_after_a_restart(patch: pytest.MonkeyPatch) -> None:
    """Every router counts from one."""
    counts: dict[int, itertools.count[int]] = {}

    def low(driver: Driver) -> int:
        return next(counts.setdefault(id(driver), itertools.count(1)))

    patch.setattr(Driver, "next_fence", low)


def worker_keeps_what_a_dead_session_had(patch: pytest.MonkeyPatch) -> None:
    """Its router is gone, and the worker goes on."""
    patch.setattr(VirtualWorker, "gone", lambda worker, session: None)


def client_attaches_one_token_too_late(patch: pytest.MonkeyPatch) -> None:
    """It asks for the token after the next one."""

    def late(resuming: Resuming) -> Begin | Attach:
        return Attach(resuming.num_tokens + 1) if resuming.num_tokens else Begin()

    patch.setattr(Resuming, "next_call", late)


def store_takes_writes_with_a_gap(patch: pytest.MonkeyPatch) -> None:
    """What a write goes on from is not compared."""
    write = StoreModel.write

    def blind(model: StoreModel, now_us: int, holder: str, what: Write) -> Verdict | Behind:
        record = model.records.get(what.request_id)
        at = 0 if record is None or what.entry is not None else len(record.tokens)
        return write(model, now_us, holder, replace(what, from_index=at))

    patch.setattr(StoreModel, "write", blind)


def router_resumes_without_asking_the_store(patch: pytest.MonkeyPatch) -> None:
    """What it has of a request is read again, though another router may have it by now."""
    find = Service._find

    async def hasty(service: Service, request_id: RequestId, back: _Back):  # type: ignore[no-untyped-def]
        here = service.driver.transcripts.find(request_id)
        if here is None:
            return await find(service, request_id, back)
        return here, service.driver.read_again(request_id)

    patch.setattr(Service, "_find", hasty)


def store_forgets_the_keys_of_late_requests(patch: pytest.MonkeyPatch) -> None:
    """A request that began while the store was away is not known by its idempotency key."""
    write = StoreModel.write

    def keyless(model: StoreModel, now_us: int, holder: str, what: Write) -> Verdict | Behind:
        entry = None if what.entry is None else (what.entry[0], replace(what.entry[1], key=""))
        return write(model, now_us, holder, replace(what, entry=entry))

    patch.setattr(StoreModel, "write", keyless)


def service_opens_a_key_twice(patch: pytest.MonkeyPatch) -> None:
    """The same again does not wait until it is known what becomes of the first."""

    class Blind(dict[str, object]):
        def get(self, *key: object) -> None:
            return None

        def __delitem__(self, key: str) -> None:
            self.pop(key, None)

    init = Service.__init__

    def hasty(service: Service, **words: object) -> None:
        init(service, **words)  # type: ignore[arg-type]
        service._opening = Blind()  # type: ignore[assignment]

    patch.setattr(Service, "__init__", hasty)


def driver_says_taken_over_to_who_came_while_the_store_was_away(patch: pytest.MonkeyPatch) -> None:
    """A request that was served twice for want of the store ends for both of its readers."""
    let_go = Driver.let_go

    def final(driver: Driver, request_id: RequestId, *, began_apart: bool) -> None:
        stream = driver._streams.get(request_id)
        if stream is not None:
            stream.sure = True
        let_go(driver, request_id, began_apart=False)

    patch.setattr(Driver, "let_go", final)


BUGS = [
    take_over_keeps_the_fence,
    router_writes_on_after_being_fenced,
    fences_start_again_after_a_restart,
    worker_keeps_what_a_dead_session_had,
    client_attaches_one_token_too_late,
    store_takes_writes_with_a_gap,
    router_resumes_without_asking_the_store,
    store_forgets_the_keys_of_late_requests,
    service_opens_a_key_twice,
    driver_says_taken_over_to_who_came_while_the_store_was_away,
]

# Where few worlds show it the search begins shortly before one that does. When worlds change it takes longer.
FIRST_SEEDS: dict[Callable[[pytest.MonkeyPatch], None], int] = {
    router_writes_on_after_being_fenced: 14,
    fences_start_again_after_a_restart: 292,
    router_resumes_without_asking_the_store: 306,
    store_forgets_the_keys_of_late_requests: 147,
    service_opens_a_key_twice: 23,
    driver_says_taken_over_to_who_came_while_the_store_was_away: 45,
}


@pytest.mark.slow
@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    first = FIRST_SEEDS.get(plant, 0)
    outcomes = run_seeds(range(first, first + SEEDS_TO_FIND), stop=lambda outcome: bool(outcome.problem))
    assert outcomes[-1].problem, f"not found in {SEEDS_TO_FIND} worlds"
    print(f"{plant.__name__}: seed {outcomes[-1].seed}: {outcomes[-1].problem[:200]}")
