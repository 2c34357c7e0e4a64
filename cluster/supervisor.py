"""`tandem serve`: starts routers, Ray and workers, watches them, starts again what dies, and leaves nothing behind.

One thread with one queue: whatever happens to a part arrives there. Signals only put a word into it; the second one
ends everything by force.
"""

from __future__ import annotations

import heapq
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, assert_never

import psutil

from cluster import run_file
from cluster.config import FAKE_MODEL, ClusterConfig, ConfigError
from cluster.drain_relay import DrainRelay, DrainWord
from cluster.greeting import described, greeting
from cluster.own_secrets import OwnSecrets, remove_secrets, tls_files, write_secrets
from cluster.pool_events import PoolEvent, PoolsAlive, RayLost, RayMended, RayUp, WorkerDown, WorkerUp, WorkerWaits
from cluster.pools_child import PoolsChild, PoolsEnded
from cluster.processes import adopt_orphans, bury_orphans, descendants, kill_all, wait_gone
from cluster.restarts import Restarts
from cluster.roster import Left, Roster
from cluster.router_child import RouterEnded, RouterSaid
from cluster.routers import Routers
from cluster.run_file import RunFile
from cluster.start_check import Checked, StartFailed, check
from cluster.verdicts import KillWorker, RestartRouter, Verdicts
from cluster.worker_settings import WorkerSettings, workers_of
from kernels import build
from tandem.messages import Role
from tandem.request import WorkerId

RAY = "ray"
POOLS_SILENT_MAX_S = 30.0  # for the process that holds Ray; far longer than Ray's calls take
POOLS_LOOK_MAX_S = 2.0  # of that, for one turn of our own: while we are stopped, nobody is silent
BURIAL_PERIOD_S = 3.0  # far longer than those who wait for a child of their own take
FORCED = 130  # the exit status after a second signal


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """A signal or an operator wants the cluster to end."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsBuilt:
    """The kernels are compiled, so that workers need not wait for one another; or they cannot be, and why."""

    missing_reason: str


Event = RouterSaid | RouterEnded | PoolEvent | PoolsEnded | KernelsBuilt | StopAsked


class Supervisor:
    """One cluster in the foreground. `run` on the main thread; `say` prints a line for whoever watches."""

    def __init__(self, config: ClusterConfig, *, say: Callable[[str], None]) -> None:
        self.config = config
        self._say = say
        self._began_s = time.monotonic()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._due: list[tuple[float, str]] = []  # restarts: when, and of whom
        self._restarts = Restarts(restarts_max=config.max_restarts, delay_max_ms=config.restart_delay_max_ms)
        self._workers = Roster(workers_of(config))
        self._warned: set[str] = set()
        self._is_ready = False
        self._not_ready: dict[str, str] = {}  # why each router cannot serve; empty: it can
        self._num_signals = 0
        self._checked: Checked | None = None
        self._routers: Routers | None = None
        self._verdicts = Verdicts()
        self._drains = DrainRelay()
        self._pools: PoolsChild | None = None
        self._has_ray = False
        self._why_ray_lost = ""
        self._pools_silent_s = 0.0
        self._looked_s = time.monotonic()
        self._buried_s = 0.0
        self._zombies: set[int] = set()
        self._run: RunFile | None = None
        self._model = config.model  # the name that it is served under
        self._secrets = OwnSecrets()  # until it starts

    # ---- life ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serves until it is told to stop. 0 after an orderly stop, 1 after a failure, which has been told."""
        adopt_orphans()
        self._catch_signals()
        try:
            self._checked = check(self.config)
            self.config, self._model = self._checked.config, self._checked.model
            self._log_dir = run_file.log_dir_of(self.config.run_dir, self.config.port)
            run_file.fresh_log_dir(self.config.run_dir, self.config.port)
            return self._serve()
        except (StartFailed, ConfigError, OSError) as error:
            self._say(f"error: {error}")
            return 1

    def _serve(self) -> int:
        try:
            self._start()
            reason = self._watch()
            self._say(f"stopping: {reason}")
            return 0
        finally:
            self._stop()

    @property
    def _pools_here(self) -> PoolsChild:
        assert self._pools is not None, "Ray has not been started"
        return self._pools

    @property
    def _routers_here(self) -> Routers:
        assert self._routers is not None, "no router has been started"
        return self._routers

    def _start(self) -> None:
        config = self.config
        self._threads = config.threads_per_worker(len(os.sched_getaffinity(0)))
        assert self._checked is not None
        self._secrets = write_secrets(config)
        self._routers = Routers(
            config,
            listener=self._checked.listener,
            grpc_held=self._checked.grpc_held,
            log_dir=self._log_dir,
            secrets=self._secrets,
            post=self._events.put,
        )
        self._run = RunFile(
            pid=os.getpid(),
            started_s=psutil.Process().create_time(),
            host=config.host,
            port=config.port,
            grpc_port=config.grpc_port,
            model=config.model,
            log_dir=str(self._log_dir),
            join_token_file=self._secrets.join_token_file,
            **tls_files(config),
            internal=self._routers.internal,
        )
        run_file.write(config.run_dir, self._run)
        self._say(f"starting {described(config, self._threads)}; logs in {self._log_dir}")
        for name in self._routers.names:
            self._routers.start(name)
        if config.model != FAKE_MODEL and not config.address:
            threading.Thread(target=self._build_kernels, name="kernels", daemon=True).start()
        self._start_pools(is_again=False)

    def _remove_files(self) -> None:
        if self._run is None:
            return
        run_file.remove(self.config.run_dir, self._run)
        remove_secrets(self.config)

    def _watch(self) -> str:
        """Takes one event after another until one says stop; returns why."""
        deadline_s = time.monotonic() + self.config.start_timeout_s
        while True:
            self._restart_due()
            self._kill_overdue()
            self._judge()
            self._watch_pools()
            self._bury_orphans()
            now_s = time.monotonic()
            if not self._is_ready and now_s > deadline_s:
                ready = self._routers_here.ready() & set(self._workers.running)
                missing = ", ".join(sorted(self._workers.roles.keys() - ready)) or self._why_not_ready()
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
                    self._workers.up(event.worker_id, event.incarnation)
                    parts = ", ".join(f"{part} {ms / 1000:.1f} s" for part, ms in event.timings_ms.items())
                    self._progress(f"{event.worker_id} up, pid {event.pid} ({parts})")
                    self._announce_once()
                case WorkerDown():
                    self._worker_down(event)
                case WorkerWaits(worker_id=worker_id, reason=reason):
                    self._say(f"{worker_id} waits for a machine: {reason}")
                case RayUp() | RayLost() | RayMended() | PoolsAlive():
                    self._pools_said(event)
                case PoolsEnded():
                    self._pools_ended(event)
                case KernelsBuilt(missing_reason=reason):
                    if reason:
                        self._say(f"warning: kernels run in torch, several times slower: {reason}")

    def _stop(self) -> None:
        """Ends every part in order, then whatever is left of them by force."""
        timeout_s = float(self.config.stop_timeout_s)
        if self._routers is not None:
            self._routers.stop(timeout_s)  # first: they end requests with a named error
        if self._pools is not None:
            self._pools.stop(timeout_s)
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

    def _bury_orphans(self) -> None:
        """Agents of workers that were killed, for example: each start anew would leave some."""
        if time.monotonic() - self._buried_s > BURIAL_PERIOD_S:
            self._buried_s = time.monotonic()
            self._zombies = bury_orphans(self._zombies)

    # ---- the routers -----------------------------------------------------------------------------------------------

    def _router_said(self, said: RouterSaid) -> None:
        routers, name = self._routers_here, said.router
        if not routers.is_current(said):
            return
        routers.heard(name)
        match said.event:
            case "beat":
                return
            case "listening":
                routers.listening(name)
                self._verdicts.up(name)
                routers.relay(self._drains.up(name))
                self._write_pids()
                self._progress(f"{name} up, pid {said.fields['pid']}")
            case "failed":
                self._router_failed(name, str(said.fields["message"]))
            case "worker":
                self._worker_changed(name, said.fields)
            case "scale":
                for worker_id in self._workers.grow(Role(str(said.fields["role"])), int(str(said.fields["num"]))):
                    self._say(f"{worker_id} is started{self._of(name)}")
                    self._start_worker(worker_id)
            case "readiness":
                self._not_ready[name] = str(said.fields["not_ready"])
                self._announce_once()
            case _:
                self._of_a_drain(name, DrainWord(said.event), said.fields)

    def _router_failed(self, name: str, message: str) -> None:
        if not self._is_ready:
            raise StartFailed(f"{name}: {message}")
        self._say(f"{name}: {message}")  # RouterEnded follows

    def _of_a_drain(self, name: str, word: DrainWord, fields: dict[str, Any]) -> None:
        worker_id, incarnation = WorkerId(fields["id"]), int(fields["incarnation"])
        routers = self._routers_here
        match word:
            case DrainWord.DRAINING:
                workers = self._workers
                roles = {each: workers.roles[each] for each in workers.running if each not in workers.leaving}
                restart, becomes = bool(fields["restart"]), _role_of(fields)
                self._say(f"{worker_id} is draining{self._of(name)}")
                routers.relay(
                    self._drains.begun(name, worker_id, incarnation, restart=restart, becomes=becomes, roles=roles)
                )
            case DrainWord.PART:
                routers.relay(self._drains.part(name, worker_id, incarnation, int(fields["requests"])))
            case DrainWord.TAKEN_BACK:
                routers.relay(self._drains.taken_back(name, worker_id, incarnation, str(fields["reason"])))
            case DrainWord.LEFT:
                routers.relay(self._drains.left(name, worker_id, incarnation))
                self._drained(worker_id, incarnation, restart=bool(fields["restart"]))
            case DrainWord.FLIP:
                self._flip(name, worker_id, incarnation, _role_of(fields))
            case DrainWord.ELSEWHERE | DrainWord.GIVE_UP | DrainWord.FLIPPED:
                raise AssertionError(f"{word} is for routers")
            case _:
                assert_never(word)

    def _flip(self, name: str, worker_id: WorkerId, incarnation: int, role: Role | None) -> None:
        """The worker gets another role, unless it has ended meanwhile: then it comes back in its old one."""
        assert role is not None, f"{name} flips {worker_id} to no role"
        told = self._drains.flip(name, worker_id, incarnation, role)
        if told:
            self._workers.flip(worker_id, role)
            self._say(f"{worker_id} is a {role} worker now")
        self._routers_here.relay(told)

    def _router_ended(self, ended: RouterEnded) -> None:
        routers, name = self._routers_here, ended.router
        if not routers.is_current(ended):
            return
        if not self._is_ready:
            raise StartFailed(f"{name} ended with status {ended.code}; see {routers.log_file(name)}")
        routers.ended(name)
        self._verdicts.down(name)
        routers.relay(self._drains.down(name))
        self._write_pids()
        self._again(name, f"{name} ended with status {ended.code}")

    def _write_pids(self) -> None:
        if self._run is not None:
            self._run = replace(self._run, router_pids=self._routers_here.pids)
            run_file.write(self.config.run_dir, self._run)

    def _judge(self) -> None:
        """Ends workers that routers hold for dead, and routers that are stuck or cut off."""
        routers = self._routers_here
        for name, silent_s in routers.kill_stuck():
            self._say(f"{name} is stuck: not a word for {silent_s:.0f} s")
        for action in self._verdicts.judge(_now_ms(), self._workers.running):
            match action:
                case KillWorker(worker_id=worker_id, reason=reason):
                    self._say(f"{worker_id} is dead: {reason}")
                    self._workers.doom(worker_id)
                    self._pools_here.kill(worker_id)  # it may only be stopped or stuck: WorkerDown follows
                case RestartRouter(router=name, reason=reason):
                    self._say(f"{name} is cut off: {reason}")
                    routers.kill(name)
                case _:
                    assert_never(action)

    # ---- Ray -------------------------------------------------------------------------------------------------------

    def _start_pools(self, *, is_again: bool) -> None:
        self._pools_silent_s = 0.0
        self._why_ray_lost = ""
        self._pools = PoolsChild(
            self.config,
            threads=self._threads,
            is_again=is_again,
            log_file=self._log_dir / "ray.log",
            post=self._events.put,
        )

    def _pools_said(self, event: RayUp | RayLost | RayMended | PoolsAlive) -> None:
        self._pools_silent_s = 0.0
        match event:
            case RayUp():
                self._has_ray = True
                self._progress(f"Ray {'joined' if self.config.address else 'started'}")
                for worker_id in self._workers.wanted:
                    self._start_worker(worker_id)
            case RayLost(reason=reason):
                self._why_ray_lost = reason
            case RayMended(what=what):
                self._say(f"Ray: {what}")

    def _pools_ended(self, ended: PoolsEnded) -> None:
        """All workers went with Ray: another Ray gets all of them anew."""
        why = self._why_ray_lost or f"the process that holds it ended with status {ended.code}; see ray.log"
        if not self._is_ready:
            raise StartFailed(why)
        self._has_ray = False
        for worker_id, incarnation in self._workers.running.items():
            self._lost(worker_id, incarnation, f"Ray is gone: {why}")
        self._due = [each for each in self._due if each[1] in self._routers_here.names]
        for worker_id, left in self._workers.all_down().items():
            self._has_left(worker_id, left)
        self._again(RAY, f"Ray is gone: {why}")

    def _watch_pools(self) -> None:
        """A process that holds Ray and hangs harms nobody until a worker has to be started, or ended."""
        now_s = time.monotonic()
        self._pools_silent_s += min(now_s - self._looked_s, POOLS_LOOK_MAX_S)
        self._looked_s = now_s
        patience_s = POOLS_SILENT_MAX_S + (0 if self._has_ray else self.config.start_timeout_s)
        if self._is_ready and not self._workers.is_whole and self._pools_silent_s > patience_s:
            self._why_ray_lost = f"the process that holds it hung for {self._pools_silent_s:.0f} s"
            self._pools_silent_s = 0.0
            self._pools_here.end_now()

    # ---- the workers -----------------------------------------------------------------------------------------------

    def _start_worker(self, worker_id: WorkerId) -> None:
        if not self._has_ray:
            return  # the next Ray gets every worker
        config = self.config
        bind_host = config.worker_host or ("" if config.address else "127.0.0.1")
        self._pools_here.start(
            WorkerSettings(
                worker_id=worker_id,
                incarnation=self._workers.start(worker_id),
                role=self._workers.roles[worker_id],
                config=config.without_store(),
                threads=self._threads,
                registries=self._routers_here.internal,
                bind_host=bind_host,
                log_file=str(self._log_dir / f"{worker_id}.log"),
                join_token=self._secrets.join_token,
            )
        )

    def _worker_changed(self, router: str, fields: dict[str, object]) -> None:
        """One router's view of a worker changed."""
        routers = self._routers_here
        worker_id, state, reason = WorkerId(str(fields["id"])), fields["state"], str(fields["reason"])
        incarnation = int(str(fields["incarnation"]))
        if incarnation != self._workers.starts.get(worker_id):
            return  # of one that is over
        routers.holds(router, worker_id, ready=state == "ready")
        if state == "ready":
            self._warn_of_inexactness(fields)
        elif state == "dead":
            self._verdicts.dead(_now_ms(), router, worker_id, incarnation, reason)
        elif state == "suspect":
            self._say(f"{worker_id} is suspect{self._of(router)}: {reason}")
        self._announce_once()

    def _of(self, router: str) -> str:
        return f" for {router}" if self.config.routers > 1 else ""

    def _drained(self, worker_id: WorkerId, incarnation: int, *, restart: bool) -> None:
        """Nothing of that incarnation is needed any more: it ends, and that is no crash."""
        waits = any(name == worker_id for _, name in self._due)  # it has crashed just now
        left = self._workers.drained(
            worker_id,
            incarnation,
            restart=restart,
            until_ms=_now_ms() + 1000 * self.config.stop_timeout_s,
            is_gone=waits or not self._has_ray,
        )
        if waits and left is not None:
            self._due = [each for each in self._due if each[1] != worker_id]
            heapq.heapify(self._due)
        if left is not None:
            self._has_left(worker_id, left)

    def _has_left(self, worker_id: WorkerId, left: Left) -> None:
        match left:
            case Left.RETIRE:
                self._pools_here.retire(worker_id)
            case Left.REPLACE:
                self._say(f"{worker_id} is drained and has left; another one takes its place")
                self._start_worker(worker_id)
            case Left.FORGET:
                self._say(f"{worker_id} is drained and has left")
            case _:
                assert_never(left)

    def _kill_overdue(self) -> None:
        for worker_id in self._workers.overdue(_now_ms()):
            self._pools_here.kill(worker_id)

    def _worker_down(self, down: WorkerDown) -> None:
        if not down.started and not self._is_ready:
            raise StartFailed(f"{down.worker_id} did not start: {down.reason}")
        left = self._workers.down(down.worker_id)
        self._lost(down.worker_id, down.incarnation, down.reason)
        if left is not None:
            self._has_left(down.worker_id, left)
        else:
            self._again(down.worker_id, f"{down.worker_id} ended: {down.reason}")

    def _lost(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        """No router shall wait for its heartbeats, nor a drain for its end."""
        self._routers_here.lost(worker_id)
        self._drains.ended(worker_id, incarnation)
        self._routers_here.tell_ended(worker_id, incarnation, reason)

    # ---- restarts ----------------------------------------------------------------------------------------------------

    def _again(self, name: str, what: str) -> None:
        """Plans the restart of what has died, as often as it is worth it."""
        delay_ms = self._restarts.died(_now_ms(), name)
        if delay_ms is not None:
            self._say(f"{what}; it is started again" + (f" in {delay_ms / 1000:g} s" if delay_ms else ""))
            heapq.heappush(self._due, (time.monotonic() + delay_ms / 1000, name))
            return
        gone = f"{what}; it has died too often and stays down"
        if name == RAY:
            raise StartFailed(gone)
        self._say(f"error: {gone}")
        if name in self._routers_here.names:
            if not self._routers_here.num_running and not {due for _, due in self._due} & set(self._routers_here.names):
                raise StartFailed("no router is left")
            return
        self._workers.given_up.add(WorkerId(name))
        if self._workers.none_is_left:
            raise StartFailed("no worker is left")

    def _restart_due(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, name = heapq.heappop(self._due)
            if name in self._routers_here.names:
                self._routers_here.start(name)
            elif name == RAY:
                self._start_pools(is_again=True)
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

    def _why_not_ready(self) -> str:
        """Why a router cannot serve, of the first that cannot."""
        told = {name: self._not_ready.get(name, f"{name} has not said yet") for name in self._routers_here.names}
        return next((reason for reason in told.values() if reason), "")

    def _announce_once(self) -> None:
        """Tells that the cluster is ready: Ray says of all workers that they run, and every router that they serve.

        A worker's heartbeat to the router may be heard before Ray's word that it has started.
        """
        workers = self._workers
        all_here = self._routers_here.ready() == workers.roles.keys() == workers.running.keys()
        if self._is_ready or not all_here or self._why_not_ready():
            return
        self._is_ready = True
        after_s = time.monotonic() - self._began_s
        for line in greeting(self.config, model=self._model, after_s=after_s):
            self._say(line)

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


def _role_of(fields: dict[str, Any]) -> Role | None:
    """The role that a word names, if it names one."""
    return Role(fields["role"]) if fields.get("role") else None


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
