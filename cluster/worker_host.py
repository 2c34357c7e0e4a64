"""Everything of one worker process without Ray: model, pool, agent, cores, engine thread, gRPC services, registration.

One engine thread decides, another computes; an asyncio loop on a thread of its own speaks with router and peers; the
agent's threads post what it says. Any of them may end the worker, with a reason. Whoever hosts it then ends the
process, since a worker that has lost a part has no honest way on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio

from cluster.ambush import WatchedCore
from cluster.fault_service import FaultService
from cluster.member_access import member_access
from cluster.run_file import reachable
from cluster.worker_core import WorkerCore, WorkerCoreConfig
from cluster.worker_model import WorkerModel, load_model
from cluster.worker_registration import Pulse, RegistrationOver, Registrations
from cluster.worker_reports import ReportBuilder
from cluster.worker_service import WorkerService
from cluster.worker_settings import WorkerSettings
from decode_worker.config import DecodeConfig
from engine.blocks import BlockLedger
from engine.events import PeerGone, RouterGone
from engine.isolation import IsolatingRunner
from engine.loop import EngineLoop, InboxFull
from engine.pressure import Pressure
from engine.step import Batch, BatchConfig
from engine.swap_space import SwapSpace
from engine.swapping import Swapping
from engine.swapping_runner import SwappingRunner, copy_bytes_per_ms
from kv_transfer.actions import AgentLost, Registered, Report, RouterJoined, SendTransfer
from kv_transfer.agent_client import AgentClient, AgentInfo
from kv_transfer.agent_settings import AgentSettings, FrameTags, TransportChoice
from kv_transfer.endpoint import layout_digest
from kv_transfer.gate import Gate
from kv_transfer.handoff import HandoffConfig
from kv_transfer.messages import EndTransfer, ExpectFrames, SendFrame
from kv_transfer.seal import agents_secret
from kv_transfer.session import TransferSessions
from prefill_worker.config import PrefillConfig
from router.clients import MESSAGE_BYTES_MAX
from tandem.cluster_access import MembersOnly
from tandem.errors import Unavailable
from tandem.grpc_requests import ParsedRequests
from tandem.log_lines import LogFormat
from tandem.messages import WorkerAddress, WorkerInfo
from tandem.request import WorkerId
from tandem.v1 import faults_pb2, faults_pb2_grpc, worker_pb2_grpc

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0  # from this process's threads to its own event loop
STOP_TIMEOUT_MS = 5_000
SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a ping has a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
]

T = TypeVar("T")


class StartFailed(RuntimeError):
    """The worker cannot run; the message is for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A worker that runs."""

    info: WorkerInfo
    timings_ms: dict[str, int]  # of the parts of its start


class WorkerHost:
    """One worker. `start`, then `wait` until it ends by itself or by `stop`; once only."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._ended: Future[str] = Future()
        self._ending = threading.Lock()
        self._cleanup = ExitStack()  # what was started, ended in reverse
        self._loop = asyncio.new_event_loop()
        self._router_sessions: set[int] = set()  # those whose stream is open
        self._engine: EngineLoop | None = None  # None: not yet
        self._watched: WatchedCore | None = None  # None: no faults are allowed
        self._gates: dict[int, Gate] = {link: Gate() for link in (faults_pb2.LINK_ROUTERS, faults_pb2.LINK_WORKERS)}
        self._stuck = False
        self._num_refused = 0  # callers that are no members of the cluster
        self._timings_ms: dict[str, int] = {}
        self._lap_s = time.monotonic()

    # ---- life ------------------------------------------------------------------------------------------------------

    def start(self) -> Started:
        """Loads, connects, registers and runs. Raises StartFailed; then nothing is left running."""
        try:
            started = self._start()
        except (ValueError, OSError, RuntimeError, Unavailable, MemoryError) as error:
            log.exception("worker=%s cannot start", self.settings.worker_id)
            self.end(f"did not start: {error}")
            self.stop()
            raise StartFailed(str(error) or type(error).__name__) from error
        log.info(
            "worker=%s incarnation=%d runs: %s", started.info.worker_id, self.settings.incarnation, self._timings_ms
        )
        return started

    def _start(self) -> Started:
        self._access = member_access(self.settings.config, self.settings.join_token)
        model = load_model(self.settings)
        self._cleanup.callback(self._close_model, model)
        self._lap("model")
        agent = self._start_agent(model)
        self._lap("agent")
        self._start_loop()
        control = self._call(self._bind())
        info = self._describe(model, agent, control)
        self._call(self._register(info))
        self._me = WorkerAddress(
            worker_id=info.worker_id,
            incarnation=self.settings.incarnation,
            control=control,
            endpoint=agent.endpoint,
        )
        self._start_engine(model)
        self._call(self._serve())
        self._cleanup.callback(lambda: self._call(self._hang_up()))
        self._lap("join")
        if self._ended.done():
            raise Unavailable(self._ended.result())
        return Started(info=info, timings_ms=dict(self._timings_ms))

    def wait(self, timeout_s: float | None = None) -> str:
        """Why it ended, once it has. TimeoutError when it has not within `timeout_s`."""
        return self._ended.result(timeout_s)

    def end(self, reason: str) -> None:
        """Declares the worker over, from any thread; the first reason stays."""
        with self._ending:
            if not self._ended.done():
                log.warning("worker=%s ends: %s", self.settings.worker_id, reason)
                self._ended.set_result(reason)

    def stop(self) -> None:
        """Ends all parts, the newest first, each within a bound: streams, engine, event loop, agent, pool."""
        self.end("stopped")
        self._cleanup.close()

    def _lap(self, part: str) -> None:
        now_s = time.monotonic()
        self._timings_ms[part] = round((now_s - self._lap_s) * 1000)
        self._lap_s = now_s

    # ---- the parts -------------------------------------------------------------------------------------------------

    def _start_agent(self, model: WorkerModel) -> AgentInfo:
        self._agent = AgentClient(
            pool=model.pool.fd,
            num_blocks=model.pool.num_blocks,
            block_bytes=model.pool.block_bytes,
            layout_digest=layout_digest(model.layout),
            settings=AgentSettings(
                bind_host=self.settings.bind_host,
                advertised_host=self.settings.advertised_host,
                transport=TransportChoice(self.settings.config.transport),
                frame_tags=FrameTags(self.settings.config.frame_tags),
                log_format=LogFormat(self.settings.config.log_format),
            ),
            secret=agents_secret(self.settings.join_token),
            on_event=self._post,
            on_restart=self._agent_restarted,
            log_file=Path(self.settings.log_file),
        )
        self._cleanup.callback(self._agent.close)
        return self._agent.start()

    def _start_loop(self) -> None:
        thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        thread.start()

        def stop() -> None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(STOP_TIMEOUT_MS / 1000)
            if not thread.is_alive():
                self._loop.close()

        self._cleanup.callback(stop)

    def _close_model(self, model: WorkerModel) -> None:
        if not self._stuck:  # an engine that still runs reads the pool; the process's end frees it
            model.close()

    def _close_swap(self, runner: SwappingRunner) -> None:
        if not self._stuck:
            runner.close()

    def _describe(self, model: WorkerModel, agent: AgentInfo, control: str) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.settings.worker_id,
            role=self.settings.role,
            control=control,
            endpoint=agent.endpoint,
            pid=os.getpid(),
            agent_pid=agent.pid,
            model=model.name,
            namespace=model.layout.namespace,
            fingerprint=model.layout.fingerprint,
            exact=model.exact,
            dtype=model.layout.dtype,
            block_size=model.layout.block_size,
            total_blocks=model.pool.num_blocks,
            context_tokens=model.context_tokens,
            block_bytes=model.layout.block_bytes,
            labels=(("exact_reason", model.exact_reason),),
        )

    def _start_engine(self, model: WorkerModel) -> None:
        config = self.settings.config
        ledger = BlockLedger(
            num_blocks=model.pool.num_blocks, block_size=config.block_size, prefix_cache=config.prefix_cache
        )
        batch = BatchConfig(
            max_tokens_per_step=config.max_tokens_per_step,
            max_rows=config.max_rows,
            chunk_tokens=config.chunk_tokens,
            context_tokens=model.context_tokens,
            eos_token_ids=model.eos_token_ids,
            namespace=model.layout.namespace.encode(),
        )
        num_slots = model.num_swap_slots(config.swap_bytes)
        swapping = Swapping(
            config.block_size,
            space=SwapSpace(num_slots),
            pressure=Pressure(block_bytes=model.layout.block_bytes, copy_bytes_per_ms=copy_bytes_per_ms()),
        )
        runner = SwappingRunner(IsolatingRunner(model.runner), pool=model.pool.view, num_slots=num_slots)
        self._cleanup.callback(self._close_swap, runner)
        self._core = core = WorkerCore(
            me=self._me,
            layout=model.layout,
            ledger=ledger,
            batch=Batch(ledger, batch, swapping),
            config=WorkerCoreConfig(
                prefill=PrefillConfig(exact=config.exact),
                decode=DecodeConfig(exact=config.exact, handoff=HandoffConfig(fence_blocks=config.fence_blocks)),
            ),
        )
        self._reports = ReportBuilder(worker_id=self._me.worker_id, incarnation=self._me.incarnation)
        if config.allow_faults:
            self._watched = WatchedCore(core)
        engine = EngineLoop(
            core=self._watched or core,
            runner=runner,
            perform=self._perform,
            on_crash=self._crashed,
            name="engine",
        )
        engine.start()
        self._engine = engine

        def stop() -> None:
            self._stuck = not engine.stop(deadline_ms=STOP_TIMEOUT_MS)

        self._cleanup.callback(stop)

    # ---- on the deciding thread, and on the agent's ------------------------------------------------------------------

    def _perform(self, actions: list[object]) -> None:
        reports: list[Report] = []
        for action in actions:
            match action:
                case Report():
                    reports.append(action)
                case SendTransfer():
                    self._sessions.send(action.to, action.message)
                case SendFrame() | ExpectFrames() | EndTransfer():
                    self._agent.send(action, endpoint=self._core.prefill.me.endpoint)  # the agent it was told of
                case _:
                    raise TypeError(f"{type(action).__name__} is no action of a worker's core")
        if reports:
            self._loop.call_soon_threadsafe(self._service.report, self._reports.merge(reports))
            self._reports.keep(self._router_sessions)

    def _crashed(self, error: BaseException, story: str) -> None:
        log.critical("worker=%s the engine crashed; its story:\n%s", self._me.worker_id, story, exc_info=error)
        self.end(f"the engine crashed: {type(error).__name__}: {error}")

    def _post(self, event: object) -> None:
        if self._engine is None:  # nothing is under way yet: only the loss of the agent can be told so early
            self.end(f"{type(event).__name__} before the engine ran")
            return
        try:
            self._engine.post(event)
        except InboxFull as error:
            self.end(f"the engine is stuck: {error}")
            raise

    def _agent_restarted(self, info: AgentInfo | None) -> None:
        if info is None:
            self.end("the transfer agent dies again and again, or cannot be reaped")
            return
        self._post(AgentLost(reason="the transfer agent died and is reaped"))
        if self._engine is None:
            return
        address = WorkerAddress(
            worker_id=self._me.worker_id,
            incarnation=self._me.incarnation,
            control=self._me.control,
            endpoint=info.endpoint,
        )
        self._post(Registered(address=address))

    # ---- on the event loop -------------------------------------------------------------------------------------------

    def _call(self, coroutine: Coroutine[None, None, T]) -> T:
        """Runs a coroutine on the event loop from another thread, and waits for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(
            CALL_TIMEOUT_S + self.settings.router_gone_s
        )

    async def _bind(self) -> str:
        """A server that is bound but takes no calls yet: registration needs its port, its services a registration."""
        guard = MembersOnly(self._access, on_refused=self._refused)
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[guard, ParsedRequests()])
        port = self._access.listen(self._server, f"{reachable(self.settings.bind_host)}:0")
        return f"{reachable(self.settings.reachable_host)}:{port}"

    async def _register(self, info: WorkerInfo) -> None:
        self._registrations = Registrations(
            registries=self.settings.registries,
            info=info,
            incarnation=self.settings.incarnation,
            gone_s=self.settings.router_gone_s,
            access=self._access,
        )
        try:
            await self._registrations.register()
        except RegistrationOver:
            await self._registrations.close()
            raise

    async def _serve(self) -> None:
        """Begins to take calls: only now, since each goes to the engine. Heartbeats follow each router's first call."""
        self._service = WorkerService(
            post=self._from_router, on_session=self._registrations.dialled, gate=self._gates[faults_pb2.LINK_ROUTERS]
        )
        self._sessions = TransferSessions(
            worker_id=self._me.worker_id,
            incarnation=self._me.incarnation,
            on_message=self._post,
            on_peer_gone=self._peer_gone,
            access=self._access,
            gate=self._gates[faults_pb2.LINK_WORKERS],
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]
        worker_pb2_grpc.add_TransferServicer_to_server(self._sessions, self._server)  # type: ignore[no-untyped-call]
        if self._watched is not None:
            faults = FaultService(
                gates=self._gates,
                disturb_agent=self._agent.disturb,
                agent_pid=lambda: info.pid if (info := self._agent.info) is not None else 0,
                lay=self._watched.lay,
            )
            faults_pb2_grpc.add_FaultsServicer_to_server(faults, self._server)  # type: ignore[no-untyped-call]
        await self._server.start()
        self._beating = asyncio.create_task(self._beat(), name="heartbeats")

    def _from_router(self, event: object) -> None:
        match event:
            case RouterJoined(session=session):
                self._router_sessions.add(session)  # before the core can speak to it
            case RouterGone(session=session):
                self._router_sessions.discard(session)
        self._post(event)

    def _refused(self) -> None:
        self._num_refused += 1

    def _peer_gone(self, worker_id: WorkerId, incarnation: int) -> None:
        self._post(PeerGone(worker_id=worker_id, incarnation=incarnation))

    async def _beat(self) -> None:
        try:
            await self._registrations.beat(self._pulse)
        except RegistrationOver as error:
            self.end(str(error))
        except Exception as error:
            # Without heartbeats the worker is dead to the cluster in seconds: better by name than in silence.
            log.exception("worker=%s the heartbeats failed", self.settings.worker_id)
            self.end(f"the heartbeats failed: {type(error).__name__}: {error}")

    def _pulse(self) -> Pulse:
        agent, engine = self._agent.info, self._engine
        assert engine is not None, "heartbeats begin after the engine"
        return Pulse(
            progress=engine.progress,
            runnable=engine.busy,
            agent_pid=agent.pid if agent is not None else 0,
            refused=self._num_refused + self._agent.num_refused,
            damaged=self._agent.num_damaged,
        )

    async def _hang_up(self) -> None:
        self._beating.cancel()
        await asyncio.gather(self._beating, self._registrations.close(), return_exceptions=True)
        await self._sessions.close()
        self._service.close()
        await self._server.stop(grace=0.2)
