"""The store that routers share, as a model of the scripts in cluster/state.py, and a router's way to it.

The model and a real Redis are held against one another by tests/worlds/test_store_model.py. Nothing expires here but
leases: a world ends long before a record would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from router.events import NewRequest
from router.journal import LEASE_S, StoreDown
from router.transcripts import Behind, Ended, Keep, Kept, Seen, Verdict, Write
from simulator.loop import ProcessLoop
from tandem.request import RequestId, Token

if TYPE_CHECKING:
    from simulator.world import World

T = TypeVar("T")

STORE = "store"
LEASE_US = round(3 * LEASE_S * 1_000_000)
CALL_TIMEOUT_S = 0.4


@dataclass(slots=True)
class Record:
    """One request. `tokens` follow one another from the first on."""

    holder: str
    fence: int
    entry: tuple[NewRequest, Keep]
    at_us: int
    tokens: list[Token] = field(default_factory=list)
    ended: Ended | None = None


def mark_of(record: Record) -> bytes:
    """What tells this request from others that had its id, or will."""
    return repr(record.entry).encode()


class StoreModel:
    """What Redis holds under one prefix. Times are microseconds of its own clock."""

    def __init__(self) -> None:
        self.boot = ""
        self.identity = ""
        self.leases: dict[str, int] = {}
        self.records: dict[RequestId, Record] = {}
        self.keys: dict[str, RequestId] = {}

    def clear(self) -> None:
        """It is started again, empty."""
        self.boot = self.identity = ""
        self.leases.clear()
        self.records.clear()
        self.keys.clear()

    def lives(self, now_us: int, holder: str) -> bool:
        return self.leases.get(holder, 0) > now_us

    def open(self, now_us: int, identity: str) -> str:
        """The identity of another cluster that lives here, or empty."""
        self.leases = {holder: until_us for holder, until_us in self.leases.items() if until_us > now_us}
        if self.identity not in ("", identity) and self.leases:
            return self.identity
        self.identity = identity
        return ""

    def renew(self, now_us: int, identity: str, holder: str, fresh: str) -> str:
        """The boot id: `fresh` where there was none."""
        self.identity = identity
        self.leases[holder] = now_us + LEASE_US
        self.boot = self.boot or fresh
        return self.boot

    def leave(self, holder: str) -> None:
        self.leases.pop(holder, None)

    def claim(self, now_us: int, holder: str, write: Write, key: str) -> Kept | RequestId | None:
        """See router.journal.RequestStore."""
        assert write.entry is not None, "a claim says what was asked"
        known = self.records.get(self.keys[key]) if key in self.keys else None
        if known is not None:
            new, keep = known.entry
            return Kept(new=new, keep=keep, tokens=(), ended=None, fence=0)
        had = self.records.get(write.request_id)
        if had is not None and had.ended is None and had.holder != holder and self.lives(now_us, had.holder):
            return write.request_id
        if had is not None and had.holder == holder and had.fence >= write.fence:
            return None  # carried out late, or twice
        self.records[write.request_id] = Record(holder, write.fence, write.entry, now_us)
        if key:
            self.keys[key] = write.request_id
        return None

    def look(self, request_id: RequestId) -> Seen | None:
        """What was asked under this id."""
        record = self.records.get(request_id)
        return None if record is None else Seen(new=record.entry[0], keep=record.entry[1], mark=mark_of(record))

    def take_over(self, now_us: int, holder: str, request_id: RequestId, fence: int, mark: bytes = b"") -> Kept | None:
        """See router.journal.RequestStore."""
        record = self.records.get(request_id)
        if record is None or (mark and mark != mark_of(record)):
            return None
        if record.ended is None and record.holder != holder:
            record.fence, record.holder = max(record.fence + 1, fence), holder
        new, keep = record.entry
        left_ms = max(1, new.deadline_ms - (now_us - record.at_us) // 1000) if new.deadline_ms else 0
        num = len(record.tokens) if record.ended is None else record.ended.num_tokens
        return Kept(
            new=replace(new, deadline_ms=left_ms),
            keep=keep,
            tokens=tuple(record.tokens[:num]),
            ended=record.ended,
            fence=record.fence,
        )

    def write(self, now_us: int, holder: str, write: Write) -> Verdict | Behind:
        """See router.journal.RequestStore."""
        had = self.records.get(write.request_id)
        mine = had is not None and had.fence == write.fence and had.holder == holder
        if had is not None and not mine:
            if had.holder == holder and had.ended is None and had.fence > write.fence:
                return Behind(had.fence)
            over = had.ended is not None or had.holder == holder or not self.lives(now_us, had.holder)
            if had.fence >= write.fence or not over:
                return Verdict.FENCED
        if write.entry is not None:
            at_us = had.at_us if had is not None and mine else now_us
            had = self.records[write.request_id] = Record(holder, write.fence, write.entry, at_us)
            if key := write.entry[1].key:
                self.keys.setdefault(key, write.request_id)
        elif had is None or not mine:
            return Verdict.MISSING
        num = len(had.tokens)
        ends_before = write.ended is not None and not write.tokens and write.from_index < num
        if write.from_index != num and not ends_before:
            return Verdict.MISSING
        had.tokens += write.tokens
        had.ended = write.ended or had.ended
        if write.ended is not None and self.keys.get(write.frees) == write.request_id:
            del self.keys[write.frees]
        return Verdict.WRITTEN


class StoreServer:
    """The process behind the model: up or down, quick or slow, with a clock that shows each microsecond once."""

    def __init__(self, world: World) -> None:
        self.model = StoreModel()
        self.up = True
        self.slow_ms = 0  # at most so late, each way
        self.num_boots = 0
        self._world = world
        self._last_us = self._num_calls = 0

    def now_us(self) -> int:
        self._num_calls += 1
        now_us = 1_000_000_000 + self._world.schedule.now_ms * 1000 + self._num_calls % 1000
        self._last_us = max(self._last_us + 1, now_us)
        return self._last_us

    def fresh(self) -> str:
        """A boot id that was never before."""
        self.num_boots += 1
        return f"boot-{self.num_boots}"


class StoreLink:
    """A RequestStore (router/journal.py): the store as the router `holder` reaches it, late, twice or not at all."""

    def __init__(self, world: World, server: StoreServer, *, holder: str, loop: ProcessLoop) -> None:
        self._world = world
        self._server = server
        self._holder = holder
        self._loop = loop
        self._boot = ""

    async def renew(self) -> bool:
        fresh = self._server.fresh()
        boot = await self._call(lambda model, now_us: model.renew(now_us, "cluster", self._holder, fresh))
        known, self._boot = self._boot == boot, boot
        return known

    async def claim(self, write: Write, key: str) -> Kept | RequestId | None:
        return await self._call(lambda model, now_us: model.claim(now_us, self._holder, write, key))

    async def look(self, request_id: RequestId) -> Seen | None:
        return await self._call(lambda model, now_us: model.look(request_id))

    async def take_over(self, request_id: RequestId, fence: int, mark: bytes = b"") -> Kept | None:
        return await self._call(lambda model, now_us: model.take_over(now_us, self._holder, request_id, fence, mark))

    async def write(self, writes: Sequence[Write]) -> list[Verdict | Behind]:
        def apply(model: StoreModel, now_us: int) -> list[Verdict | Behind]:
            verdicts = [model.write(now_us, self._holder, write) for write in writes]
            for write, verdict in zip(writes, verdicts, strict=True):
                if verdict is Verdict.WRITTEN:
                    self._world.checks.stored(write, model.records[write.request_id].tokens)
            return verdicts

        checks = self._world.checks
        checks.writes(self._holder, writes)
        verdicts = await self._call(apply)
        for write, verdict in zip(writes, verdicts, strict=True):
            checks.answered(self._holder, write, verdict)
        return verdicts

    async def _call(self, ask: Callable[[StoreModel, int], T]) -> T:
        world, server = self._world, self._server
        answer: asyncio.Future[Any] = self._loop.create_future()

        def arrive() -> None:
            if world.parts(self._holder, STORE):
                return
            if not server.up:
                back(lambda: answer.set_exception(StoreDown("refused")))
                return
            if world.choices.chance(world.options.store_repeats):
                ask(server.model, server.now_us())  # the answer was lost, and the client asks again
            result = ask(server.model, server.now_us())
            back(lambda: answer.set_result(result))

        def back(tell: Callable[[], None]) -> None:
            def told() -> None:
                if not world.parts(STORE, self._holder):
                    self._loop.do(lambda: None if answer.done() else tell())

            world.schedule.after(self._delay_ms(), told)

        world.schedule.after(self._delay_ms(), arrive)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                result: T = await answer
        except TimeoutError:
            raise StoreDown("no answer in time") from None
        return result

    def _delay_ms(self) -> int:
        choices, world = self._world.choices, self._world
        slow = choices.choose(self._server.slow_ms) if self._server.slow_ms else 0
        return choices.choose(1 + min(5, world.options.delay_max_ms)) + slow
