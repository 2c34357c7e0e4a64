"""`tandem serve`: starts router, Ray and workers, watches them, starts again what dies, and leaves nothing behind.

One thread with one queue: whatever happens to a part arrives there. Signals only put a word into it; the second one
ends everything by force.
"""

from __future__ import annotations

import heapq
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from types import FrameType

import psutil

from cluster import run_file
from cluster.config import FAKE_MODEL, WILDCARDS, ClusterConfig
from cluster.key_file import KeyFileError, ring_of
from cluster.member_access import member_tls, read_join_token
from cluster.memory import shortage
from cluster.pools import PoolError, Pools, WorkerDown, WorkerUp
from cluster.processes import PortInUse, adopt_orphans, bury_orphans, descendants, kill_all, pick_port, wait_gone
from cluster.reaper import Reaper
from cluster.restarts import Restarts
from cluster.router_child import RouterChild, RouterEnded, RouterSaid
from cluster.run_file import RunFile, reachable
from cluster.secret_files import SecretError, fresh_secret, join_token_path, operator_key_path, write_secret
from cluster.worker_settings import WorkerSettings, workers_of
from engine.arch import ModelError
from engine.kv_pool import available_bytes
from engine.model_files import find_model, read_arch
from kernels import build
from router.api_keys import KEY_PREFIX
from tandem.messages import Role
from tandem.request import WorkerId
from tandem.tls import TlsError, server_context

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ROUTER = "router"
REAPER_PERIOD_S = 1.0
BURIAL_PERIOD_S = 3.0  # far longer than those who wait for a child of their own take
FORCED = 130  # the exit status after a second signal


class StartFailed(RuntimeError):
    """The cluster cannot start, or cannot go on; the message is for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """A signal or an operator wants the cluster to end."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A worker that was drained: by when its process must have ended, and whether another one comes in its place."""

    until_s: float
    restart: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsBuilt:
    """The kernels are compiled, so that workers need not wait for one another; or they cannot be, and why."""

    missing_reason: str


Event = RouterSaid | RouterEnded | WorkerUp | WorkerDown | KernelsBuilt | StopAsked


class Supervisor:
    """One cluster in the foreground. `run` on the main thread; `say` prints a line for whoever watches."""

    def __init__(self, config: ClusterConfig, *, say: Callable[[str], None]) -> None:
        self.config = config
        self._say = say
        self._began_s = time.monotonic()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._due: list[tuple[float, str]] = []  # restarts: when, and of whom
        self._restarts = Restarts(restarts_max=config.max_restarts)
        self._roles = dict(workers_of(config))
        self._running: dict[WorkerId, int] = {}  # incarnation of each worker that is up
        self._ready: set[WorkerId] = set()
        self._leaving: dict[WorkerId, _Leaving] = {}
        self._warned: set[str] = set()
        self._is_ready = False
        self._num_signals = 0
        self._router: RouterChild | None = None
        self._pools: Pools | None = None
        self._reaper: Reaper | None = None
        self._reaped_s = 0.0
        self._buried_s = 0.0
        self._zombies: set[int] = set()
        self._run: RunFile | None = None
        self._model = config.model  # the name that it is served under
        self._join_token = ""  # known once it starts

    # ---- life ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serves until it is told to stop. 0 after an orderly stop, 1 after a failure, which has been told."""
        adopt_orphans()
        self._catch_signals()
        try:
            self.config = self._check()
            log_file = run_file.fresh_log_dir(self.config.run_dir, self.config.port) / "supervisor.log"
            # What Ray prints is for a log; `say` has the terminal.
            with log_file.open("a") as log, redirect_stdout(log), redirect_stderr(log):
                return self._serve()
        except (StartFailed, PoolError, OSError) as error:
            self._say(f"error: {error}")
            return 1

    def _serve(self) -> int:
        try:
            self._start()
            reason = self._watch()
            self._say(f"stopping: {reason}")
            return 0
        except SystemExit:  # Ray's own handler of SIGTERM, in the moments when it is in force
            self._say("stopping: SIGTERM")
            return 0
        finally:
            self._stop()

    @property
    def _pools_here(self) -> Pools:
        assert self._pools is not None, "Ray has not been started"
        return self._pools

    def _start(self) -> None:
        config = self.config
        self._threads = config.threads_per_worker(len(os.sched_getaffinity(0)))
        self._run = RunFile(
            pid=os.getpid(),
            started_s=psutil.Process().create_time(),
            host=config.host,
            port=config.port,
            grpc_port=config.grpc_port,
            model=config.model,
            log_dir=str(self._log_dir),
            tls_ca=str(config.tls_ca or ""),
            tls_cert=str(config.tls_cert or ""),
            tls_key=str(config.tls_key or ""),
            tls_name=config.tls_name,
        )
        self._write_secrets()
        run_file.write(config.run_dir, self._run)
        self._reaper = Reaper()
        self._say(f"starting {_described(config, self._threads)}; logs in {self._log_dir}")
        self._start_router(generation=0)
        if config.model != FAKE_MODEL and not config.address:
            threading.Thread(target=self._build_kernels, name="kernels", daemon=True).start()
        self._pools = Pools(config, threads=self._threads, post=self._events.put)
        self._pools.open()
        self._catch_signals()  # Ray has put its own handlers in their place
        self._progress(f"Ray {'started' if self._pools.is_local else 'joined'}")
        for worker_id in self._roles:
            self._start_worker(worker_id)

    def _check(self) -> ClusterConfig:
        """What can be known before anything is started. Fixes the ports."""
        config = self.config
        try:
            port = pick_port(config.host, config.port, "--port")
            grpc_port = pick_port(config.host, config.grpc_port, "--grpc-port")
        except PortInUse as error:
            raise StartFailed(str(error)) from None
        config = config.model_copy(update={"port": port, "grpc_port": grpc_port})
        self._log_dir = run_file.log_dir_of(config.run_dir, port)
        _check_security(config)
        if config.address and config.host in (*LOOPBACK, *WILDCARDS):
            raise StartFailed(f"host: workers on {config.address} cannot reach {config.host}; give --host an address")
        if config.model != FAKE_MODEL:
            try:
                files = find_model(config.model)
                arch = read_arch(files)
            except ModelError as error:
                raise StartFailed(str(error)) from None
            self._model = files.name
            too_little = None if config.address else shortage(config, arch, available_bytes=available_bytes())
            if too_little is not None:
                raise StartFailed(too_little)
        return config

    def _write_secrets(self) -> None:
        """Each start has secrets of its own, where none are given: those of an earlier one are worth nothing."""
        config = self.config
        if config.join_token_file is None:
            write_secret(join_token_path(config.run_dir, config.port), fresh_secret())
        if config.api_keys is not None:
            write_secret(operator_key_path(config.run_dir, config.port), KEY_PREFIX + fresh_secret())
        self._join_token = read_join_token(config)

    def _remove_files(self) -> None:
        if self._run is None:
            return
        run_file.remove(self.config.run_dir, self._run)
        for path in (join_token_path, operator_key_path):
            path(self.config.run_dir, self.config.port).unlink(missing_ok=True)

    def _watch(self) -> str:
        """Takes one event after another until one says stop; returns why."""
        deadline_s = time.monotonic() + self.config.start_timeout_s
        while True:
            self._restart_due()
            self._kill_overdue()
            self._tell_reaper()
            self._bury_orphans()
            now_s = time.monotonic()
            if not self._is_ready and now_s > deadline_s:
                missing = ", ".join(sorted(set(self._roles) - (self._ready & set(self._running))))
                raise StartFailed(f"not ready within start_timeout_s, {self.config.start_timeout_s} s: {missing}")
            until_s = min(now_s + 1.0, self._due[0][0] if self._due else now_s + 1.0)
            try:
                event = self._events.get(timeout=max(0.0, until_s - now_s))
            except queue.Empty:
                continue
            match event:
                case StopAsked(reason=reason):
                    return reason
                case RouterSaid():
                    if event.event == "stop_asked":
                        return str(event.fields["reason"])
                    self._router_said(event)
                case RouterEnded():
                    self._router_ended(event)
                case WorkerUp():
                    self._pools_here.watch(event)
                    self._running[event.worker_id] = event.incarnation
                    parts = ", ".join(f"{part} {ms / 1000:.1f} s" for part, ms in event.timings_ms.items())
                    self._progress(f"{event.worker_id} up, pid {event.pid} ({parts})")
                    self._announce_once()
                case WorkerDown():
                    self._worker_down(event)
                case KernelsBuilt(missing_reason=reason):
                    if reason:
                        self._say(f"warning: kernels run in torch, several times slower: {reason}")

    def _stop(self) -> None:
        """Ends every part in order, then whatever is left of them by force."""
        timeout_s = float(self.config.stop_timeout_s)
        if self._router is not None:
            self._router.stop(timeout_s)  # first: it ends requests with a named error
        if self._pools is not None:
            self._pools.stop(timeout_s)
            self._pools.close()
        if self._reaper is not None:
            self._reaper.dismiss()
        wait_gone(descendants(), 2.0)
        left = kill_all(descendants())
        if left:
            self._say(f"error: still running: {[process.pid for process in left]}")
        if self._run is not None:
            self._remove_files()
            self._say("stopped")

    def _build_kernels(self) -> None:
        """While Ray starts: the first start of all compiles for some seconds."""
        try:
            self._events.put(KernelsBuilt(missing_reason=build.missing_reason()))
        except ValueError:
            return  # a wrong variable: the workers will not start, and say why

    def _tell_reaper(self) -> None:
        if self._reaper is not None and time.monotonic() - self._reaped_s > REAPER_PERIOD_S:
            self._reaped_s = time.monotonic()
            self._reaper.update()

    def _bury_orphans(self) -> None:
        """Agents of workers that were killed, for example: each start anew would leave some."""
        if time.monotonic() - self._buried_s > BURIAL_PERIOD_S:
            self._buried_s = time.monotonic()
            self._zombies = bury_orphans(self._zombies)

    # ---- the router ------------------------------------------------------------------------------------------------

    def _start_router(self, *, generation: int) -> None:
        self._router = RouterChild(
            self.config, generation=generation, log_file=self._log_dir / "router.log", post=self._events.put
        )

    def _router_said(self, said: RouterSaid) -> None:
        assert self._router is not None
        if said.generation != self._router.generation:
            return
        match said.event:
            case "listening":
                assert self._run is not None
                self._run = replace(self._run, router_pid=self._router.process.pid)
                run_file.write(self.config.run_dir, self._run)
                self._progress(f"router up, pid {said.fields['pid']}")
            case "failed":
                raise StartFailed(f"router: {said.fields['message']}")
            case "worker":
                self._worker_changed(said.fields)
            case "drained":
                self._drained(said.fields)

    def _router_ended(self, ended: RouterEnded) -> None:
        assert self._router is not None
        if ended.generation != self._router.generation:
            return
        if not self._is_ready:
            raise StartFailed(f"the router ended with status {ended.code}; see {self._log_dir / 'router.log'}")
        self._ready.clear()
        self._again(ROUTER, f"the router ended with status {ended.code}")

    # ---- the workers -----------------------------------------------------------------------------------------------

    def _start_worker(self, worker_id: WorkerId) -> None:
        assert self._pools is not None
        config = self.config
        bind_host = config.worker_host or ("127.0.0.1" if self._pools.is_local else "")
        self._pools.start(
            WorkerSettings(
                worker_id=worker_id,
                role=self._roles[worker_id],
                config=config,
                threads=self._threads,
                registry=f"{reachable(config.host)}:{config.grpc_port}",
                bind_host=bind_host,
                log_file=str(self._log_dir / f"{worker_id}.log"),
                join_token=self._join_token,
            )
        )

    def _worker_changed(self, fields: dict[str, object]) -> None:
        """Membership's view of a worker changed."""
        assert self._pools is not None
        worker_id, state = WorkerId(str(fields["id"])), fields["state"]
        if state == "ready":
            self._ready.add(worker_id)
            self._warn_of_inexactness(fields)
        elif state == "dead":
            self._ready.discard(worker_id)
            if self._running.get(worker_id) == fields["incarnation"]:
                self._say(f"{worker_id} is dead: {fields['reason']}")
                self._pools.kill(worker_id)  # it may only be stopped or stuck: WorkerDown follows
        elif state == "left":
            self._ready.discard(worker_id)  # `_drained` follows
        else:
            self._say(f"{worker_id} is {state}: {fields['reason']}")
        self._announce_once()

    def _drained(self, fields: dict[str, object]) -> None:
        """Nothing of the worker is needed any more: it ends, and that is no crash."""
        worker_id, restart = WorkerId(str(fields["id"])), bool(fields["restart"])
        if worker_id not in self._roles:
            return
        self._leaving[worker_id] = _Leaving(time.monotonic() + self.config.stop_timeout_s, restart)
        if any(name == worker_id for _, name in self._due):  # it has crashed just now
            self._due = [each for each in self._due if each[1] != worker_id]
            heapq.heapify(self._due)
            self._has_left(worker_id)
        else:
            self._pools_here.retire(worker_id)

    def _has_left(self, worker_id: WorkerId) -> None:
        if self._leaving.pop(worker_id).restart:
            self._say(f"{worker_id} is drained and has left; another one takes its place")
            self._start_worker(worker_id)
        else:
            del self._roles[worker_id]
            self._say(f"{worker_id} is drained and has left")

    def _kill_overdue(self) -> None:
        for worker_id, leaving in self._leaving.items():
            if time.monotonic() >= leaving.until_s:
                self._pools_here.kill(worker_id)

    def _worker_down(self, down: WorkerDown) -> None:
        assert self._router is not None
        self._pools_here.bury(down)
        if not down.started and not self._is_ready:
            raise StartFailed(f"{down.worker_id} did not start: {down.reason}")
        self._running.pop(down.worker_id, None)
        self._ready.discard(down.worker_id)
        self._router.tell_ended(down.worker_id, down.incarnation, down.reason)
        if down.worker_id in self._leaving:
            self._has_left(down.worker_id)
            return
        self._again(down.worker_id, f"{down.worker_id} ended: {down.reason}")

    # ---- restarts ----------------------------------------------------------------------------------------------------

    def _again(self, name: str, what: str) -> None:
        """Plans the restart of what has died, as often as it is worth it."""
        delay_ms = self._restarts.died(int(time.monotonic() * 1000), name)
        if delay_ms is not None:
            self._say(f"{what}; it is started again" + (f" in {delay_ms / 1000:g} s" if delay_ms else ""))
            heapq.heappush(self._due, (time.monotonic() + delay_ms / 1000, name))
            return
        gone = f"{what}; it has died too often and stays down"
        if name == ROUTER:
            raise StartFailed(gone)
        self._say(f"error: {gone}")
        left = set(self._running) | {WorkerId(due) for _, due in self._due}
        if not any(self._roles.get(worker_id) in (Role.DECODE, Role.MIXED) for worker_id in left):
            raise StartFailed("no worker that decodes is left")

    def _restart_due(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, name = heapq.heappop(self._due)
            if name == ROUTER:
                assert self._router is not None
                self._start_router(generation=self._router.generation + 1)
            else:
                self._start_worker(WorkerId(name))

    # ---- words -------------------------------------------------------------------------------------------------------

    def _progress(self, what: str) -> None:
        self._say(f"  {time.monotonic() - self._began_s:5.1f} s  {what}")

    def _warn_of_inexactness(self, fields: dict[str, object]) -> None:
        reason = str(fields["exact_reason"])
        if self.config.exact and not fields["exact"] and reason not in self._warned:
            self._warned.add(reason)
            self._say(f"warning: exact mode does not hold on this machine: {reason}")

    def _announce_once(self) -> None:
        """Tells that the cluster is ready, once Ray says of all workers that they run, and the router that it has them.

        A worker's heartbeat to the router may be heard before Ray's word that it has started.
        """
        if self._is_ready or not self._ready == set(self._roles) == set(self._running):
            return
        self._is_ready = True
        config = self.config
        url = f"{config.scheme}://{reachable(config.host)}:{config.port}"
        grpc = f"{reachable(config.host)}:{config.grpc_port}"
        self._say(
            f"Tandem is ready at {url} (gRPC {grpc}) after {time.monotonic() - self._began_s:.1f} s. "
            "Ctrl-C or `tandem down` stops it. Try:"
        )
        question = {"role": "user", "content": "What is the capital of France?"}
        body = json.dumps({"model": self._model, "messages": [question], "max_tokens": 32, "temperature": 0})
        self._say(
            f"  curl -s{_curl_flags(config)} {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
        )

    # ---- signals -----------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._events.put(StopAsked(reason=signal.Signals(number).name))
            return
        os.write(2, b"stopping by force\n")  # print may be in the middle of a line
        kill_all(descendants(), timeout_s=2.0)
        self._remove_files()
        os._exit(FORCED)


def _described(config: ClusterConfig, threads: int) -> str:
    counts = [(config.prefill, "prefill"), (config.decode, "decode"), (config.mixed, "mixed")]
    workers = " + ".join(f"{count} {role}" for count, role in counts if count)
    exact = "exact" if config.exact else "fast"
    return f"{config.model} ({config.dtype}, {exact}) on {workers} workers of {threads} thread{'s' * (threads > 1)}"


def _check_security(config: ClusterConfig) -> None:
    """Certificates, keys and token that are given must be usable. Raises StartFailed, naming the setting."""
    try:
        member_tls(config)
        if config.tls_cert is not None and config.tls_key is not None:
            server_context(cert=config.tls_cert, key=config.tls_key, client_ca=config.tls_client_ca)
        if config.api_keys is not None:
            ring_of(config.api_keys)
        if config.join_token_file is not None:
            read_join_token(config)
    except TlsError as error:
        raise StartFailed(f"tls_cert, tls_key, tls_ca, tls_client_ca: {error}") from None
    except KeyFileError as error:
        raise StartFailed(f"api_keys: {error}") from None
    except SecretError as error:
        raise StartFailed(f"join_token_file: {error}") from None


def _curl_flags(config: ClusterConfig) -> str:
    """What curl needs besides, to ask this cluster."""
    flags = f" --cacert {config.tls_ca}" if config.tls_ca else ""
    flags += " --cert FILE --key FILE" if config.tls_client_ca else ""
    return flags + (' -H "Authorization: Bearer $TANDEM_API_KEY"' if config.api_keys else "")
