"""One router process of a world: the real driver, service and journal on the virtual clock, over virtual streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from router.answer import Piece
from router.config import RouterConfig
from router.core import RouterCore
from router.driver import Driver
from router.events import Action, Event, FenceRaised, MoveRequested, NewRequest, Submitted
from router.journal import Journal
from router.metrics import EdgeMetrics
from router.service import Ask, ServedModel, Service
from router.store import EmbeddedOwners, OwnerRecord
from router.token_stream import RequestStream
from router.tokenizer import Tokenizer
from router.transcripts import Transcripts
from simulator.loop import ProcessLoop
from simulator.network import Stream
from simulator.store import StoreLink
from simulator.worker import VirtualWorker
from tandem.cluster_access import ClusterAccess
from tandem.errors import TandemError
from tandem.messages import Role, RouterMessage, WorkerInfo, WorkerReport
from tandem.request import RequestId, WorkerId
from tandem.resuming import Attach, Begin

if TYPE_CHECKING:
    from simulator.world import World

REDIAL_MS = 300
JOURNAL_S = 0.1
CONTEXT_TOKENS = 200

Say = Callable[[tuple[RequestId, Piece] | TandemError | None], None]  # None: the call ends


class NumberTokenizer(Tokenizer):
    """Spells each token as its number, so that a stop string can be any token."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.context_tokens = CONTEXT_TOKENS
        self.eos_token_ids = ()
        self.special_ids = frozenset()
        self.byte_level = True

    def token_bytes(self, token_id: int) -> bytes:
        return spelled(token_id).encode()


def spelled(token_id: int) -> str:
    """The text of one token."""
    return f"<{token_id}>"


class VirtualLink:
    """The streams between a router and one worker incarnation, one after another, as router/clients.py has them.

    A None on the way down is the hello.
    """

    def __init__(
        self,
        router: VirtualRouter,
        *,
        worker_id: WorkerId,
        control: str,
        config: RouterConfig,
        access: ClusterAccess,
        next_session: Callable[[], int],
        on_up: Callable[[], None],
        on_report: Callable[[WorkerReport], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.worker_id = worker_id
        self.worker: VirtualWorker | None = None  # while a stream stands
        self.session = 0
        self.router = router
        self._world = router.world
        self._control = control
        self._next_session = next_session
        self._on_up = on_up
        self._on_report = on_report
        self._on_lost = on_lost
        self._closed = False
        self._down: Stream[RouterMessage | None] | None = None
        self._up: Stream[WorkerReport] | None = None

    def start(self) -> asyncio.Future[None]:
        self.router.links.append(self)
        self.router.loop.call_soon(self._dial)
        return self.router.loop.create_future()

    def send(self, message: RouterMessage) -> None:
        if self._down is not None:
            self._down.send(message)

    async def close(self) -> None:
        self.drop()

    def drop(self) -> None:
        """The router's end is gone for good; the worker notices in its own time."""
        self._closed = True
        if self in self.router.links:
            self.router.links.remove(self)
        self._hang_up()

    def cut(self, reason: str) -> None:
        """Both ends notice, each in its own time; the router dials again after that."""
        if self._hang_up():
            self._world.tell(f"link of {self.router.name} to {self.worker_id} cut: {reason}")
            self._world.later(lambda: self.router.loop.do(self._lost, reason), 20)

    def hold(self) -> None:
        """Lets the streams stall that cross the partition, and no others."""
        name = self.router.name
        if self._down is not None and self._up is not None:
            self._world.hold(self._down, name, self.worker_id)
            self._world.hold(self._up, self.worker_id, name)

    def _hang_up(self) -> bool:
        worker, session, down, up = self.worker, self.session, self._down, self._up
        if worker is None or down is None or up is None:
            return False
        down.cut()
        up.cut()
        self.worker = self._down = self._up = None

        def noticed() -> None:
            self._world.sessions.pop((worker.address.control, session), None)
            worker.gone(session)

        self._world.later(noticed, 20)
        return True

    def _lost(self, reason: str) -> None:
        if not self._closed:
            self._on_lost(reason)
            self.router.loop.call_later(self._world.choices.between(1, 300) / 1000, self._dial)

    def _dial(self) -> None:
        world, name = self._world, self.router.name
        worker = world.workers[self.worker_id]
        if self._closed:
            return
        apart = world.parts(name, self.worker_id) or world.parts(self.worker_id, name)
        session = self._next_session()
        if apart or not worker.alive or worker.address.control != self._control or self._is_open(session):
            self.router.loop.call_later(REDIAL_MS / 1000, self._dial)
            return
        self.worker, self.session = worker, session

        def down(message: RouterMessage | None) -> None:
            worker.joined(session) if message is None else worker.said(session, message)

        def up(report: WorkerReport) -> None:
            self.router.loop.do(self._heard, session, report)

        delay_ms = world.options.delay_max_ms
        self._down = Stream(world.schedule, world.choices, delay_max_ms=delay_ms, arrive=down)
        self._up = Stream(world.schedule, world.choices, delay_max_ms=delay_ms, arrive=up)
        world.sessions[self._control, session] = self._up
        self._down.send(None)
        self._on_up()

    def _is_open(self, session: int) -> bool:
        """A worker serves a session once, whoever asks (cluster/worker_service.py)."""
        return (self._control, session) in self._world.sessions

    def _heard(self, session: int, report: WorkerReport) -> None:
        if self.worker is not None and self.session == session:
            self._on_report(report)


class _WatchedDriver(Driver):
    """The real driver; the world sees what begins, and all that its core wants done."""

    def __init__(self, router: VirtualRouter, config: RouterConfig, transcripts: Transcripts, born_us: int) -> None:
        def link(**words: object) -> VirtualLink:
            return VirtualLink(router, **words)  # type: ignore[arg-type]

        super().__init__(
            config,
            transcripts=transcripts,
            born_us=born_us,
            clock_ms=lambda: router.clock.now_ms,
            clock_s=lambda: router.clock.now_ms / 1000,
            link=link,
        )
        self._router = router

    def _begin(self, event: Submitted) -> RequestStream:
        checks = self._router.world.checks
        checks.begins(self._router.name, event)
        try:
            return super()._begin(event)
        except TandemError:
            checks.refused(self._router.name, event.request.request_id)
            raise

    def _handle(self, event: Event) -> list[Action]:
        if isinstance(event, FenceRaised):
            self._router.world.checks.renewed(self._router.name, event)
        return super()._handle(event)

    def _perform(self, action: Action) -> None:
        if self._router.loop.alive:
            self._router.world.router_wants(self._router, action)
            super()._perform(action)

    def ask_move(self, event: MoveRequested) -> None:
        """An operator or the rebalancer asks."""
        self._feed(event)

    @property
    def core(self) -> RouterCore:
        return self._core

    def owner(self, request_id: RequestId) -> OwnerRecord | None:
        """Who may write the request's next token."""
        return self._core._owners._store.get(request_id)

    @property
    def num_owners(self) -> int:
        """Owner records that are left."""
        records = self._core._owners._store
        assert isinstance(records, EmbeddedOwners)
        return len(records)

    @property
    def num_streams(self) -> int:
        """Answers that somebody reads."""
        return len(self._streams)


class VirtualRouter:
    """One life of a router: `name` is nobody else's, neither before nor after."""

    def __init__(self, world: World, name: str, *, config: RouterConfig, born_us: int) -> None:
        self.world = world
        self.name = name
        self.clock = world.new_clock()
        self.loop = ProcessLoop(world.schedule, self.clock)
        self.links: list[VirtualLink] = []
        shared = world.options.shared
        self.driver = _WatchedDriver(self, config, Transcripts(shared=shared), born_us)
        store = StoreLink(world, world.store, holder=name, loop=self.loop)
        self._journal = Journal(self.driver, store, period_s=JOURNAL_S) if shared else None
        self._service = Service(
            driver=self.driver,
            tokenizer=world.tokenizer,
            model=ServedModel(id="fake", context_tokens=CONTEXT_TOKENS, created_s=0, exact=True),
            metrics=EdgeMetrics(clock=self.loop.time),
            journal=self._journal,
            clock=self.loop.time,
        )
        self._words: Stream[Callable[[VirtualRouter], None]] = Stream(
            world.schedule, world.choices, delay_max_ms=5 * world.options.delay_max_ms, arrive=lambda word: word(self)
        )
        self.loop.do(self._start)

    def _start(self) -> None:
        self.loop.create_task(self.driver.start())
        if self._journal is not None:
            self.loop.create_task(self._journal.run())

    @property
    def alive(self) -> bool:
        return self.loop.alive

    @property
    def core(self) -> RouterCore:
        return self.driver.core

    @property
    def rests(self) -> bool:
        """Whether it has nothing to do, and the store lacks nothing of what it did."""
        written = self._journal is None or not self.driver.transcripts.pending()
        return self.loop.hears and not self.core.num_requests and written

    def kill(self) -> None:
        """The process is gone, and all its streams with it."""
        self.loop.kill()
        for link in list(self.links):
            link.drop()

    def link_to(self, worker: VirtualWorker) -> VirtualLink | None:
        """The link whose stream to this incarnation stands."""
        return next((each for each in self.links if each.worker is worker), None)

    # ---- what it is told of workers ----------------------------------------------------------------------------------

    def tell(self, word: Callable[[VirtualRouter], None]) -> None:
        """Something that it hears of workers, in order and in its own time."""
        self._words.send(word)

    def worker_joined(self, info: WorkerInfo, incarnation: int) -> None:
        self.loop.do(self.driver.worker_joined, info, incarnation)

    def worker_lost(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        self.loop.do(self.driver.worker_lost, worker_id, incarnation, reason)

    def worker_suspected(self, worker_id: WorkerId, incarnation: int, suspected: bool) -> None:
        self.loop.do(self.driver.worker_suspected, worker_id, incarnation, suspected)

    def worker_draining(self, worker_id: WorkerId, incarnation: int, draining: bool) -> None:
        self.loop.do(self.driver.worker_draining, worker_id, incarnation, draining)

    def worker_flipped(self, worker_id: WorkerId, incarnation: int, role: Role) -> None:
        self.loop.do(self.driver.worker_flipped, worker_id, incarnation, role)

    def move(self, event: MoveRequested) -> None:
        """An operator or the rebalancer asks."""
        self.loop.do(self.driver.ask_move, event)

    def ask_itself(self, request: NewRequest) -> None:
        """A canary: it may be refused, and nobody reads its answer."""

        def ask() -> None:
            with suppress(TandemError):
                self.driver.submit(request)

        self.loop.do(ask)

    # ---- clients -----------------------------------------------------------------------------------------------------

    def serve(self, ask: Ask, call: Begin | Attach, say: Say, started: Callable[[asyncio.Task[None]], None]) -> None:
        """A call came in; it is answered as router/grpc_api.py does."""
        self.loop.do(lambda: started(self.loop.create_task(self._serve(ask, call, say))))

    async def _serve(self, ask: Ask, call: Begin | Attach, say: Say) -> None:
        service = self._service
        try:
            match call:
                case Begin():
                    answers = await service.open(ask)
                case Attach(from_index=index):
                    answers = await service.resume(ask.request_id, index, key=ask.idempotency_key)
        except TandemError as error:
            say(error)
            return
        try:
            async for piece in answers.answers[0]:
                say((answers.request_id, piece))
            say(None)
        except TandemError as error:
            say(error)
        finally:
            answers.close("the client disconnected")

    def cancel(self, request_id: RequestId) -> None:
        """A client wants nothing more of it."""
        self.loop.do(self._service.cancel, request_id, "cancelled by a client")
