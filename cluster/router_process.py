"""The router process: `python -m cluster.router_process`. HTTP, gRPC, registry and driver on one event loop.

It never imports Ray or torch. It reports to its supervisor as lines of JSON on stdout, takes commands as lines of JSON
on stdin, and ends when stdin does. In a session of its own it gets no Ctrl-C; it still dies with its supervisor.
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
import signal
import ssl
import sys
import time
from collections.abc import Callable

import grpc
import grpc.aio
import uvloop

from cluster.admin import Addresses, Admin
from cluster.config import ClusterConfig
from cluster.key_file import KeyFile
from cluster.member_access import member_access, read_join_token
from cluster.membership import Membership, MemberState, StateChanged
from cluster.operations import Operations
from cluster.processes import die_with_parent
from cluster.registry import LOOK_MS, Registry
from cluster.run_file import reachable
from cluster.secret_files import operator_key_path, read_secret
from cluster.served_model import describe
from router.api_keys import KeyEntry, KeyRing, digest_of
from router.config import RouterConfig
from router.door import Door
from router.driver import Driver
from router.grpc_api import build_grpc_server
from router.http_connection import HttpLimits
from router.http_server import serve_http
from router.metrics import EdgeMetrics
from router.openai_api import build_app
from router.service import ServedModel, Service
from tandem.cluster_access import MembersOnly
from tandem.messages import Role
from tandem.request import WorkerId
from tandem.tls import server_context
from tandem.v1 import admin_pb2, admin_pb2_grpc, worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

OPEN_FILES = 16_384  # asked for; many a shell gives 1024
GRACE_S = 3.0  # for running replies, once every request has ended with a named error


class Supervisor:
    """The other end of this process's stdin and stdout."""

    def say(self, event: str, **fields: object) -> None:
        """One line to the supervisor. A supervisor that is gone is noticed on stdin."""
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
            sys.stdout.flush()

    async def listen(self, on_ended: Callable[[str, int, str], None]) -> None:
        """Takes commands until stdin ends."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            command = json.loads(line)
            on_ended(command["ended"], command["incarnation"], command["reason"])


class RouterProcess:
    """Everything of the router, from its sockets to its end."""

    def __init__(self, config: ClusterConfig, *, base_incarnation: int) -> None:
        self.config = config
        self.supervisor = Supervisor()
        self.stopping = asyncio.Event()
        edge = describe(config)
        self.access = member_access(config, read_join_token(config))
        self.keys = None if config.api_keys is None else KeyFile(config.api_keys, extra=(own_operator(config),))
        self.door = Door(None if self.keys is None else self.keys.load())
        self.driver = Driver(
            RouterConfig(local_prefill_tokens=config.local_prefill_tokens), access=self.access, account=self.door
        )
        self.membership = Membership(
            heartbeat_ms=config.heartbeat_ms,
            dead_after_misses=config.dead_after_misses,
            stall_ms=config.stall_ms,
            base_incarnation=base_incarnation,
            look_ms=LOOK_MS,
            model=edge.name,
        )
        self.registry = Registry(membership=self.membership, driver=self.driver, on_change=self._changed)
        self.operations = Operations(
            driver=self.driver, registry=self.registry, config=config, leave=self._leave
        )  # fmt: skip
        self.model = ServedModel(
            id=edge.name,
            context_tokens=edge.context_tokens,
            created_s=int(time.time()),
            dtype=config.dtype,
            exact=config.exact,
        )
        self.service = Service(
            driver=self.driver,
            tokenizer=edge.tokenizer,
            model=self.model,
            metrics=EdgeMetrics(),
            not_ready=self.not_ready,
            door=self.door,
        )
        self.addresses = Addresses(model=self.model.id, http="", grpc="")

    def not_ready(self) -> str:
        """Why no request can be served now; empty when one can."""
        roles = {member.info.role for member in self.membership.members.values() if member.state is MemberState.READY}
        return "" if roles & {Role.DECODE, Role.MIXED} else "no worker that decodes is ready"

    async def run(self) -> None:
        """Serves until it is told to stop, then ends requests, streams and servers, each within a bound."""
        http = await serve_http(
            build_app(self.service),
            host=self.config.host,
            port=self.config.port,
            grace_s=GRACE_S,
            limits=limits_within(raise_open_files()),
            tls=http_tls(self.config),
        )
        members = MembersOnly(self.access, services=("tandem.v1.Registry",), on_refused=self.service.metrics.stranger)
        grpc_server = build_grpc_server(
            self.service, extra=(self._add_registry, self._add_admin), interceptors=(members,)
        )
        tasks: list[asyncio.Task[None]] = []
        try:
            try:
                grpc_port = await grpc_server.start(self.config.host, self.config.grpc_port, self._grpc_tls())
            except OSError as error:
                raise OSError(f"{error}; choose another port with --grpc-port") from None
            host = reachable(self.config.host)
            self.addresses = Addresses(
                model=self.model.id, http=f"{self.config.scheme}://{host}:{http.port}", grpc=f"{host}:{grpc_port}"
            )
            await self.driver.start()
            tasks = [
                asyncio.create_task(self.driver.crashed()),
                asyncio.create_task(self.registry.tick()),
                asyncio.create_task(self.operations.run()),
                asyncio.create_task(self.supervisor.listen(self._ended)),
                asyncio.create_task(self._until_stopped()),
            ]
            if self.keys is not None:
                tasks.append(asyncio.create_task(self.keys.follow(self._take_keys)))
            self.supervisor.say("listening", port=http.port, grpc_port=grpc_port, pid=os.getpid())
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await self.driver.stop()
            await asyncio.gather(http.stop(), grpc_server.stop(GRACE_S))

    async def _until_stopped(self) -> None:
        await self.stopping.wait()

    def _take_keys(self, ring: KeyRing | None) -> None:
        """The keys may have changed, and time has passed: whoever is not welcome any more has to leave."""
        if ring is not None:
            self.door.ring = ring
        self.service.end_unwelcome()

    def _grpc_tls(self) -> grpc.ServerCredentials | None:
        """Members use the same port as clients: where clients need certificates, theirs are as good."""
        tls, client_ca = self.access.tls, self.config.tls_client_ca
        if tls is None:
            return None
        return tls.server_credentials(b"" if client_ca is None else client_ca.read_bytes() + b"\n" + tls.ca)

    def _add_registry(self, server: grpc.aio.Server) -> str:
        worker_pb2_grpc.add_RegistryServicer_to_server(self.registry, server)  # type: ignore[no-untyped-call]
        return worker_pb2.DESCRIPTOR.services_by_name["Registry"].full_name

    def _add_admin(self, server: grpc.aio.Server) -> str:
        admin = Admin(
            membership=self.membership,
            driver=self.driver,
            operations=self.operations,
            addresses=lambda: self.addresses,
            stop=lambda reason: self.supervisor.say("stop_asked", reason=reason),
        )
        admin_pb2_grpc.add_AdminServicer_to_server(admin, server)  # type: ignore[no-untyped-call]
        return admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name

    def _ended(self, worker_id: str, incarnation: int, reason: str) -> None:
        self.registry.ended(worker_id, incarnation, reason)
        self.operations.ended(worker_id, incarnation, reason)

    def _leave(self, worker_id: WorkerId, incarnation: int, restart: bool) -> None:
        self.supervisor.say("drained", id=worker_id, incarnation=incarnation, restart=restart)

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


def own_operator(config: ClusterConfig) -> KeyEntry:
    """The key in the run folder that the command line of this machine and user shows."""
    key = read_secret(operator_key_path(config.run_dir, config.port))
    return KeyEntry(name="operator-of-this-machine", digest=digest_of(key), operator=True)


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
    """HTTP may hold half of the process's open files at most: clients that hold many must not cut off the workers."""
    usual = HttpLimits()
    return dataclasses.replace(usual, connections_max=min(usual.connections_max, open_files // 2))


async def serve(config: ClusterConfig, base_incarnation: int) -> None:
    """Runs the router until SIGTERM or the end of stdin."""
    process = RouterProcess(config, base_incarnation=base_incarnation)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, process.stopping.set)
    await process.run()


def main() -> int:
    """The process's entry: 0 after an orderly stop, 1 with a line that says why it could not start."""
    parser = argparse.ArgumentParser(prog="python -m cluster.router_process", description=__doc__)
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--base-incarnation", type=int, default=0)
    flags = parser.parse_args()
    die_with_parent(flags.parent_pid)
    config = ClusterConfig.model_validate_json(flags.config_json)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(config, flags.base_incarnation))
    except (OSError, ValueError) as error:
        log.error("the router ends: %s", error, exc_info=True)
        Supervisor().say("failed", message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
