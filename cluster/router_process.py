"""The router process: `python -m cluster.router_process`. HTTP, gRPC, registry and driver on one event loop.

It never imports Ray or torch. It reports to its supervisor as lines of JSON on stdout, one each second at least, takes
its settings and then commands as lines of JSON on stdin, and ends when stdin does. In a session of its own it gets no
Ctrl-C; it still dies with its supervisor.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import resource
import secrets
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import uvloop
from fastapi import FastAPI

from cluster.admin import Addresses, Admin
from cluster.canary import Canaries
from cluster.config import ClusterConfig, without_password
from cluster.dashboard import OPEN_PAGES, Dashboard
from cluster.dashboard_feed import Feed
from cluster.dashboard_source import RealCluster
from cluster.drain_relay import DrainWord
from cluster.elastic import Elastic
from cluster.key_file import KeyFile
from cluster.member_access import member_access
from cluster.membership import Membership, StateChanged
from cluster.operations import Operations
from cluster.peers import Peers
from cluster.processes import die_with_parent, is_heard
from cluster.prometheus import ClusterMetrics
from cluster.registry import LOOK_MS, Registry
from cluster.router_settings import RouterSettings
from cluster.run_file import reachable
from cluster.served_model import describe
from cluster.state import RedisStore, identity_of
from router.api_keys import KeyRing
from router.config import RouterConfig
from router.door import Door
from router.driver import Driver
from router.grpc_api import CONNECTIONS_MAX as GRPC_CONNECTIONS_MAX
from router.grpc_api import GrpcServer, build_grpc_server
from router.http_connection import HttpLimits
from router.http_server import HttpServer, serve_http
from router.journal import Journal, StoreDown
from router.metrics import EdgeMetrics
from router.openai_api import build_app
from router.service import ServedModel, Service
from router.transcripts import Transcripts
from tandem.cluster_access import MembersOnly
from tandem.log_lines import LogFormat, log_by
from tandem.messages import Role
from tandem.request import WorkerId
from tandem.tls import server_context
from tandem.v1 import admin_pb2, admin_pb2_grpc, worker_pb2, worker_pb2_grpc

if TYPE_CHECKING:
    from cluster.tracing import Tracing

log = logging.getLogger(__name__)

OPEN_FILES = 16_384  # asked for; many a shell gives 1024
ANNOUNCE_S = 0.05
BEAT_S = 1.0
GRACE_S = 3.0  # for running replies, once every request has ended with a named error


class Supervisor:
    """The other end of this process's stdin and stdout."""

    def say(self, event: str, **fields: object) -> None:
        """One line to the supervisor. A supervisor that is gone is noticed on stdin."""
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
            sys.stdout.flush()

    async def beat(self, on_late: Callable[[float], None]) -> None:
        """Says each second, from the event loop, that this one gets round; `on_late`: by how many seconds too late.

        A supervisor that stands still reads nothing: it must not stop the event loop, too, once the pipe is full.
        """
        loop = asyncio.get_running_loop()
        while True:
            if is_heard(sys.stdout.fileno()):
                self.say("beat")
            due_s = loop.time() + BEAT_S
            await asyncio.sleep(BEAT_S)
            on_late(max(0.0, loop.time() - due_s))

    async def listen(self, on_command: Callable[[dict[str, Any]], None]) -> None:
        """Takes commands until stdin ends."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            on_command(json.loads(line))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The store that this router shares with others. `born_us`: its time when this router came; None: it was away."""

    store: RedisStore
    born_us: int | None


async def open_store(config: ClusterConfig, name: str) -> Shared | None:
    """The store, if there is one. Raises StoreRefused. A store that is away is waited for while requests are served."""
    if not config.redis:
        return None
    identity = identity_of(model=config.model, dtype=config.dtype, exact=config.exact)
    holder = f"{name}-{secrets.token_hex(8)}"  # a router that is started again is another one
    store = RedisStore(config.redis, prefix=config.redis_prefix, holder=holder, identity=identity)
    try:
        return Shared(store=store, born_us=await store.open())
    except StoreDown as error:
        log.warning("the shared store %s does not answer: %s", without_password(config.redis), error)
        return Shared(store=store, born_us=None)


class NoTracing(RuntimeError):
    """Spans are wanted and cannot be sent; the message says what to do."""


class RouterProcess:
    """Everything of the router, from its sockets to its end."""

    def __init__(self, settings: RouterSettings, shared: Shared | None) -> None:
        self.settings = settings
        self.config = config = settings.config
        self.store = None if shared is None else shared.store
        self.supervisor = Supervisor()
        self.stopping = asyncio.Event()
        edge = describe(config)
        self.access = member_access(config, settings.join_token)
        self.keys = None if config.api_keys is None else KeyFile(config.api_keys)
        self.door = Door(None if self.keys is None else self.keys.load())
        metrics = EdgeMetrics(settings.router_id)
        self.driver = Driver(
            RouterConfig(router_id=settings.router_id, local_prefill_tokens=config.local_prefill_tokens),
            transcripts=Transcripts(shared=shared is not None),
            born_us=None if shared is None else shared.born_us,
            access=self.access,
            account=self.door,
            watcher=metrics,
        )
        self.journal = None if shared is None else Journal(self.driver, shared.store)
        self.membership = Membership(
            heartbeat_ms=config.heartbeat_ms,
            dead_after_misses=config.dead_after_misses,
            stall_ms=config.stall_ms,
            look_ms=LOOK_MS,
            model=edge.name,
        )
        self.registry = Registry(
            membership=self.membership,
            driver=self.driver,
            on_change=self._changed,
            on_refused=lambda num: self.service.metrics.refused_at_workers(num),
        )
        self.operations = Operations(
            driver=self.driver,
            registry=self.registry,
            config=config,
            say=self.supervisor.say,
            number=settings.number,
            num_routers=len(settings.internal),
        )
        self.model = ServedModel(
            id=edge.name,
            context_tokens=edge.context_tokens,
            created_s=int(time.time()),
            dtype=config.dtype,
            exact=config.exact,
        )
        self.canaries = Canaries(driver=self.driver, vocab_size=edge.tokenizer.vocab_size)
        self.service = Service(
            driver=self.driver,
            tokenizer=edge.tokenizer,
            model=self.model,
            metrics=metrics,
            journal=self.journal,
            not_ready=self.canaries.not_ready,
            door=self.door,
        )
        self._wire_metrics()
        self.tracing = self._start_tracing()
        self.addresses = Addresses(model=self.model.id, http="", grpc="", store=without_password(config.redis))

    def _start_tracing(self) -> Tracing | None:
        config = self.config
        if not config.otlp_endpoint:
            return None
        try:
            from cluster.tracing import Tracing
        except ImportError as error:
            raise NoTracing(f"otlp_endpoint: {error.name} is missing: pip install 'tandem-serve[otel]'") from None
        tracing = Tracing(
            config.otlp_endpoint, router=self.settings.router_id, model=self.model.id, share=config.trace_share
        )
        self.service.tracer = tracing
        return tracing

    def _wire_metrics(self) -> None:
        """What is counted elsewhere is asked for at each scrape."""
        metrics, driver, journal = self.service.metrics, self.driver, self.journal
        metrics.follow_line(lambda: driver.num_waiting, lambda: driver.queued_tokens)
        if journal is not None:
            metrics.follow_store(lambda: journal.away_s)
        metrics.cluster = ClusterMetrics(
            self.membership,
            driver.fleet,
            ready_pairs=lambda: sum(each.served_ms is not None and not each.error for each in self.canaries.status()),
        )

    async def _announce(self) -> None:
        """Tells the supervisor of each change between ready and not, and why."""
        told: str | None = None
        while True:
            reason = self.canaries.not_ready()
            if told is None or bool(reason) != bool(told):
                self.supervisor.say("readiness", not_ready=reason)
                told = reason
            await asyncio.sleep(ANNOUNCE_S)

    async def run(self) -> None:
        """Serves until it is told to stop, then ends requests, streams and servers, each within a bound."""
        open_files = raise_open_files()
        self.peers = Peers(self.settings.router_id, self.settings.internal, self.access)
        self.service.metrics.others = self.peers.metrics
        self.admin, board, app = self._make_operators_doors()
        public = build_grpc_server(
            self.service,
            extra=(self._add_admin,),
            cancel_elsewhere=self.peers.cancel,
            connections_max=min(GRPC_CONNECTIONS_MAX, open_files // 4),
        )
        members = MembersOnly(self.access, on_refused=self.service.metrics.stranger)
        internal = build_grpc_server(
            self.service,
            extra=(self._add_registry, self._add_admin),
            members=members,
            cancel_elsewhere=self.peers.cancel,
        )
        with socket.socket(fileno=self.settings.listener) as listener:
            http = await serve_http(
                app,
                listener=listener,
                grace_s=GRACE_S,
                limits=limits_within(open_files),
                tls=http_tls(self.config),
            )
            tasks: list[asyncio.Task[None]] = []
            try:
                await self._listen(http, public, internal)
                await self.driver.start()
                tasks = [
                    asyncio.create_task(self.driver.crashed()),
                    asyncio.create_task(self.registry.tick()),
                    asyncio.create_task(self.operations.run()),
                    asyncio.create_task(self.canaries.run()),
                    asyncio.create_task(self._announce()),
                    asyncio.create_task(board.feed.run()),
                    asyncio.create_task(self.supervisor.listen(self._command)),
                    asyncio.create_task(self._until_stopped()),
                ]
                if self.journal is not None:
                    tasks.append(asyncio.create_task(self.journal.run()))
                if self.keys is not None:
                    tasks.append(asyncio.create_task(self.keys.follow(self._take_keys)))
                self.supervisor.say("listening", pid=os.getpid())
                tasks.append(asyncio.create_task(self.supervisor.beat(self.service.metrics.came_late)))
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                board.feed.close("the router ends")
                await board.close()
                await self.driver.stop()
                await self._hand_over()
                await asyncio.gather(http.stop(), public.stop(GRACE_S), internal.stop(GRACE_S), self.peers.close())
                if self.tracing is not None:
                    await asyncio.to_thread(self.tracing.close)

    async def _listen(self, http: HttpServer, public: GrpcServer, internal: GrpcServer) -> None:
        """Binds both gRPC ports. Raises OSError with the flag that changes them."""
        tls = self.access.tls
        within = None if tls is None else tls.server_credentials(tls.ca)
        await internal.start(self.config.host, self.settings.internal_port, within)
        client_ca = b"" if self.config.tls_client_ca is None else self.config.tls_client_ca.read_bytes()
        outside = None if tls is None else tls.server_credentials(client_ca)
        try:
            port = await public.start(self.config.host, self.config.grpc_port, outside)
        except OSError as error:
            raise OSError(f"{error}; choose another port with --grpc-port") from None
        host = reachable(self.config.host)
        self.addresses = dataclasses.replace(
            self.addresses, http=f"{self.config.scheme}://{host}:{http.port}", grpc=f"{host}:{port}"
        )  # fmt: skip

    async def _hand_over(self) -> None:
        """Writes what the store lacks: whoever comes after goes on from there."""
        if self.journal is not None and self.store is not None:
            await self.journal.hand_over()
            await self.store.leave()

    async def _until_stopped(self) -> None:
        await self.stopping.wait()

    def _add_registry(self, server: grpc.aio.Server) -> str:
        worker_pb2_grpc.add_RegistryServicer_to_server(self.registry, server)  # type: ignore[no-untyped-call]
        return worker_pb2.DESCRIPTOR.services_by_name["Registry"].full_name

    def _make_operators_doors(self) -> tuple[Admin, Dashboard, FastAPI]:
        """The operators' service, their dashboard, and the HTTP application with it."""
        elastic = Elastic(
            driver=self.driver,
            registry=self.registry,
            operations=self.operations,
            config=self.config,
            say=self.supervisor.say,
        )
        admin = Admin(
            membership=self.membership,
            driver=self.driver,
            operations=self.operations,
            elastic=elastic,
            canaries=self.canaries,
            peers=self.peers,
            addresses=lambda: self.addresses,
            cancel=self.service.cancel,
            metrics=self.service.metrics.page,
            lately=self.service.metrics.lately,
            stop=lambda reason: self.supervisor.say("stop_asked", reason=reason),
        )
        cluster = RealCluster(
            model=self.model.id,
            driver=self.driver,
            membership=self.membership,
            operations=self.operations,
            elastic=elastic,
            canaries=self.canaries,
            peers=self.peers,
            admin=admin,
        )
        metrics, names_allowed = self.service.metrics, self.config.tls_cert is not None
        feed = Feed(cluster, metrics.recent, self.door.check_operator)
        board = Dashboard(cluster, feed=feed, door=self.door, metrics=metrics, names_allowed=names_allowed)
        app = build_app(self.service, open_pages=OPEN_PAGES)
        board.add_to(app)
        return admin, board, app

    def _add_admin(self, server: grpc.aio.Server) -> str:
        admin_pb2_grpc.add_AdminServicer_to_server(self.admin, server)  # type: ignore[no-untyped-call]
        return admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name

    def _take_keys(self, ring: KeyRing | None) -> None:
        """The keys may have changed, and time has passed: whoever is not welcome any more has to leave."""
        if ring is not None:
            self.door.ring = ring
        self.service.end_unwelcome()

    def _command(self, command: dict[str, Any]) -> None:
        worker_id, incarnation, reason = WorkerId(command["id"]), int(command["incarnation"]), str(command["reason"])
        if command["word"] == "ended":
            self.registry.ended(worker_id, incarnation, reason)
            self.operations.ended(worker_id, incarnation, reason)
            return
        word = DrainWord(command["word"])
        role = Role(command["role"]) if command["role"] else None
        requests = int(command["requests"])
        self.operations.told(word, worker_id, incarnation, requests=requests, reason=reason, role=role)

    def _changed(self, change: StateChanged) -> None:
        self.operations.changed(change)
        member = self.membership.members[change.worker_id]
        self.supervisor.say(
            "worker",
            id=change.worker_id,
            incarnation=change.incarnation,
            state=change.state.value,
            reason=change.reason,
            exact=member.info.exact,
            exact_reason=dict(member.info.labels).get("exact_reason", ""),
        )
        exact = self.config.exact and all(each.info.exact for each in self.membership.alive())
        self.service.model = dataclasses.replace(self.model, exact=exact)


def http_tls(config: ClusterConfig) -> ssl.SSLContext | None:
    """What HTTP listens with; None without TLS."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    return server_context(cert=config.tls_cert, key=config.tls_key, client_ca=config.tls_client_ca)


def raise_open_files() -> int:
    """Raises this process's limit on open files towards OPEN_FILES, as far as it may; returns the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def limits_within(open_files: int) -> HttpLimits:
    """HTTP may hold half of the process's open files, gRPC a quarter: clients must not cut off the workers."""
    usual = HttpLimits()
    return dataclasses.replace(usual, connections_max=min(usual.connections_max, open_files // 2))


async def serve(settings: RouterSettings) -> None:
    """Runs the router until SIGTERM or the end of stdin."""
    shared = await open_store(settings.config, settings.router_id)
    process = RouterProcess(settings, shared)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, process.stopping.set)
    await process.run()


def read_settings() -> RouterSettings:
    """The first line of stdin; what follows it stays there."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # unbuffered: a line is all that is taken
        return RouterSettings.from_json(stdin.readline())


def main() -> int:
    """The process's entry: 0 after an orderly stop, 1 with a line that says why it could not start."""
    parser = argparse.ArgumentParser(prog="python -m cluster.router_process", description=__doc__)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument(
        "--router-id", required=True, help="whose settings come on stdin; for people who list processes"
    )
    flags = parser.parse_args()
    die_with_parent(flags.parent_pid)
    settings = read_settings()
    log_by(logging.StreamHandler(sys.stderr), settings.config.log_level, LogFormat(settings.config.log_format))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))
    except (OSError, ValueError, NoTracing) as error:
        log.error("the router ends: %s", error, exc_info=True)
        Supervisor().say("failed", message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
