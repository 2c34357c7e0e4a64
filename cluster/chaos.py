"""Strikes a running cluster of this machine with planned faults while a load checks each token of each stream."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc
import psutil

from cluster.chaos_audit import Footprint, IdleWatch, Lasting, exact_and_here, grown, held, missing, unbalanced
from cluster.chaos_load import STATUS_TIMEOUT_S, CheckingLoad, Load
from cluster.chaos_plan import LINKS, Fault, FaultKind, Ground, Victim
from cluster.chaos_processes import (
    command_of,
    footprints,
    restart_store,
    send,
    stay_stopped,
    store_process,
    until_struck,
)
from cluster.chaos_tally import Tally
from cluster.member_access import access_here, dial_routers
from cluster.run_file import RunFile
from tandem.cluster_access import ClusterAccess
from tandem.v1 import admin_pb2, admin_pb2_grpc, faults_pb2, faults_pb2_grpc, inference_pb2, inference_pb2_grpc

SETTLE_TIMEOUT_S = 60.0
WATCH_S = 0.5
LASTING_MS = 6_000  # longer than a canary may take: these come and go
STILL_LOOKS = 2  # in a row: a worker that has just come back to a router has not reported its blocks yet
WARM_UP_S = 3.0  # of load before the first fault: links among all are there
VICTIM_WAIT_S = 45.0  # for one that is there to be struck
STATE_WAIT_S = 20.0  # for a transfer that enters the state
ROUTER_WAIT_S = 30.0  # for a router that is stopped, or started again
FAULTS_TIMEOUT_S = 5.0
PROVOKED_MS, PROVOKED_BY_MS = 5_000, 300  # links are slow for so long, and each message by up to so much
FAILING = ("target.quarantine",)  # states that only transfers come into which fail under way
ROLES: dict[Victim, tuple[str, ...]] = {
    Victim.PREFILL: ("prefill",),
    Victim.PREFILL_AGENT: ("prefill",),
    Victim.DECODE: ("decode",),
    Victim.DECODE_AGENT: ("decode",),
    Victim.PAIR: ("prefill", "decode"),
}
ANY_ROLE = ("prefill", "decode", "mixed")
AGENTS = (Victim.PREFILL_AGENT, Victim.DECODE_AGENT)
GATES = {
    Victim.ROUTER_LINK: faults_pb2.LINK_ROUTERS,
    Victim.WORKER_LINK: faults_pb2.LINK_WORKERS,
    Victim.AGENT_LINK: faults_pb2.LINK_AGENTS,
}


class NotReady(RuntimeError):
    """The cluster cannot be shot at; the message says why."""


class NoVictim(RuntimeError):
    """There is nobody whom this fault could strike now; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the cluster is, its supervisor's process, and what its members ask to be shown."""

    run: RunFile
    supervisor_pid: int
    access: ClusterAccess

    @classmethod
    def of(cls, run: RunFile) -> Place:
        """Of a cluster that runs here. Raises SecretError, TlsError."""
        return cls(run=run, supervisor_pid=run.pid, access=access_here(run))


class ChaosRun:
    """One run against a cluster of this machine. `say` is told what happens, a line each.

    All streams pause after each `audit_every` faults, so that everything must be back.
    """

    def __init__(
        self, place: Place, *, load: Load, seed: int, say: Callable[[str], None], audit_every: int = 10
    ) -> None:
        self.tally = Tally()
        self._place = place
        self._say = say
        self._audit_every = audit_every
        self._begin_s = time.monotonic()
        self._paused_ms = 0  # in which no fault is due
        self._baseline: Mapping[str, Footprint] = {}
        self._workers: frozenset[str] = frozenset()  # that there were then
        self._stores: list[subprocess.Popen[bytes]] = []  # started in place of a Redis that was killed
        self._load = CheckingLoad(place.run, load=load, draw=random.Random(seed), tally=self.tally, now_ms=self._now_ms)

    def _now_ms(self) -> int:
        return round((time.monotonic() - self._begin_s) * 1000)

    async def ground(self) -> Ground:
        """What the cluster allows. Raises NotReady and grpc.RpcError."""
        async with dial_routers(self._place.run) as channel:
            status = await self._status(admin_pb2_grpc.AdminStub(channel))  # type: ignore[no-untyped-call]
        problem = exact_and_here(status, psutil.pids())
        if problem:
            raise NotReady(problem)
        allowed = [
            await _allows_faults(each.control, self._place.access) for each in status.workers if each.state == "ready"
        ]
        return Ground(faults_allowed=bool(allowed) and all(allowed), has_store=bool(status.store))

    async def run(self, faults: Sequence[Fault], duration_ms: int) -> Tally:
        """All faults in their time; returns what they did. Raises NotReady and grpc.RpcError."""
        async with dial_routers(self._place.run) as channel:
            admin = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            inference = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            (model, *_) = (
                await inference.ListModels(inference_pb2.ListModelsRequest(), timeout=STATUS_TIMEOUT_S)
            ).models
            num = await self._load.ask_first(model.vocab_size, model.context_tokens, self._say)
            self._say(f"{num} questions answered undisturbed; {len(faults)} faults follow")
            self._begin_s = time.monotonic()
            try:
                async with asyncio.TaskGroup() as group:
                    beside = [group.create_task(self._load.run(admin)), group.create_task(self._watch(admin))]
                    await asyncio.sleep(WARM_UP_S)
                    await self._audit(admin)
                    await self._strike_all(admin, faults, duration_ms)
                    for task in beside:
                        task.cancel()
            except ExceptionGroup as several:
                raise _first(several) from several
        return self.tally

    async def _strike_all(self, admin: admin_pb2_grpc.AdminStub, faults: Sequence[Fault], duration_ms: int) -> None:
        for number, fault in enumerate(faults, start=1):
            await asyncio.sleep(max(0.0, (fault.at_ms + self._paused_ms - self._now_ms()) / 1000))
            await self._strike(admin, fault)
            if number % self._audit_every == 0:
                await self._audit(admin)
        await asyncio.sleep(max(0.0, (duration_ms + self._paused_ms - self._now_ms()) / 1000))
        await self._audit(admin)

    # ---- the cluster -------------------------------------------------------------------------------------------------

    async def _status(self, admin: admin_pb2_grpc.AdminStub) -> admin_pb2.StatusResponse:
        """Waits for a router that is stopped, or was killed. Raises grpc.RpcError when there is none for long."""
        until_s = time.monotonic() + ROUTER_WAIT_S
        while True:
            try:
                answer: admin_pb2.StatusResponse = await admin.Status(
                    admin_pb2.StatusRequest(include_finished=False), timeout=STATUS_TIMEOUT_S
                )
                return answer
            except grpc.aio.AioRpcError:
                if time.monotonic() > until_s:
                    raise
                await asyncio.sleep(WATCH_S)

    async def _audit(self, admin: admin_pb2_grpc.AdminStub) -> None:
        """Lets all streams end, and waits until every worker is back and holds nothing; what stays is a leak."""
        began_ms = self._now_ms()
        await self._load.pause()
        still_ms = self._now_ms()
        until_s = time.monotonic() + SETTLE_TIMEOUT_S
        num_still, lasting = 0, Lasting(LASTING_MS)
        while True:
            status = await self._status(admin)
            problems = held(status, self._workers)
            footprint = await asyncio.to_thread(footprints, self._place.supervisor_pid)
            if self._baseline:
                problems += missing(self._baseline, footprint) + grown(self._baseline, footprint)
            leaks = lasting.look(self._now_ms(), problems)
            num_still = 0 if problems else num_still + 1
            if num_still == STILL_LOOKS:
                self._baseline = self._baseline or footprint
                self._workers = self._workers or frozenset(each.id for each in status.workers if each.state != "left")
                processes = ", ".join(f"{each.num_processes} {name}" for name, each in sorted(footprint.items()))
                self.tally.audited(
                    self._now_ms(), f"everything is back after {self._now_ms() - still_ms} ms; {processes}"
                )
                break
            late_s = time.monotonic() - until_s
            if late_s > 0 and (leaks or late_s > SETTLE_TIMEOUT_S):
                for problem in leaks or problems:
                    told = f"{problem}, {SETTLE_TIMEOUT_S:.0f} s after the last stream"
                    self._say(f"leak: {told}")
                    self.tally.leaked(self._now_ms(), told)
                break
            await asyncio.sleep(WATCH_S)
        self._paused_ms += self._now_ms() - began_ms
        self._load.resume()

    async def _watch(self, admin: admin_pb2_grpc.AdminStub) -> None:
        """Looks at every worker's blocks all the time."""
        seen: set[str] = set()
        idle = IdleWatch()
        while True:
            await asyncio.sleep(WATCH_S)
            with suppress(grpc.aio.AioRpcError):  # the router may be stopped
                status = await self._status(admin)
                problems = [problem for worker in status.workers for problem in unbalanced(worker)]
                for problem in [*problems, *idle.look(self._now_ms(), status)]:
                    if problem not in seen:
                        seen.add(problem)
                        self._say(f"leak: {problem}")
                        self.tally.leaked(self._now_ms(), problem)

    # ---- faults ------------------------------------------------------------------------------------------------------

    async def _strike(self, admin: admin_pb2_grpc.AdminStub, fault: Fault) -> None:
        try:
            match fault.kind:
                case FaultKind.CANCEL:
                    self._struck(fault, self._load.leave())
                case FaultKind.REDIS_DOWN:
                    await self._strike_store(admin, fault)
                case _ if fault.victim in LINKS:
                    await self._strike_link(admin, fault)
                case _ if fault.state:
                    await self._strike_in_state(admin, fault)
                case _:
                    await self._strike_processes(admin, fault)
        except (NoVictim, grpc.aio.AioRpcError, psutil.NoSuchProcess) as error:
            reason = str(error) if isinstance(error, NoVictim) else f"it ended just now: {type(error).__name__}"
            self._say(f"{self._now_ms() / 1000:7.1f} s  {fault}: {reason}")
            self.tally.not_met(self._now_ms(), fault, reason)

    async def _strike_processes(self, admin: admin_pb2_grpc.AdminStub, fault: Fault) -> None:
        names, processes = [], []
        if fault.victim is Victim.ROUTER:
            status = await self._status(admin)
            routers = [(each.id, each.pid) for each in status.routers if each.up and each.pid]
            name, pid = routers[fault.pick % len(routers)] if routers else ("router", status.router_pid)
            names, processes = [name], [psutil.Process(pid)]
        for role in ROLES.get(fault.victim, ()):
            worker = await self._worker(admin, (role,), fault)
            on_agent = fault.victim in AGENTS
            names.append(f"{worker.id}'s agent" if on_agent else worker.id)
            processes.append(psutil.Process(worker.agent_pid if on_agent else worker.pid))
        self._struck(fault, " and ".join(names))
        stops = fault.kind is FaultKind.STOP
        for process in processes:
            send(process, signal.SIGSTOP if stops else signal.SIGKILL)
        if stops:
            await stay_stopped(processes, fault.for_ms)

    async def _strike_in_state(self, admin: admin_pb2_grpc.AdminStub, fault: Fault) -> None:
        """Lays an ambush in one worker, and waits until a transfer has walked into it."""
        worker = await self._worker(admin, ROLES[fault.victim], fault)
        on_agent = fault.victim in AGENTS
        process = psutil.Process(worker.agent_pid if on_agent else worker.pid)
        stops = fault.kind is FaultKind.STOP
        async with self._place.access.dial(worker.control) as channel:
            await faults_pb2_grpc.FaultsStub(channel).Ambush(  # type: ignore[no-untyped-call]
                faults_pb2.AmbushRequest(
                    state=fault.state,
                    signal=faults_pb2.SIGNAL_STOP if stops else faults_pb2.SIGNAL_KILL,
                    agent=on_agent,
                    after_ms=fault.after_ms,
                    within_ms=round(STATE_WAIT_S * 1000),
                ),
                timeout=FAULTS_TIMEOUT_S,
                metadata=self._place.access.metadata,
            )
        provoking = [asyncio.create_task(self._provoke(worker))] if fault.state in FAILING else []
        try:
            struck = await until_struck(process, STATE_WAIT_S + 1)
        finally:
            for task in provoking:
                task.cancel()
            await asyncio.gather(*provoking, return_exceptions=True)
        if not struck:
            raise NoVictim(f"no transfer of {worker.id} was in {fault.state} within {STATE_WAIT_S:.0f} s")
        self._struck(fault, f"{worker.id}'s agent" if on_agent else worker.id)
        if stops:
            await stay_stopped([process], fault.for_ms)

    async def _provoke(self, worker: admin_pb2.WorkerStatus) -> None:
        """Has transfers of the worker fail, until cancelled: slow links, and half of the clients leave each second."""
        access = self._place.access
        slow = faults_pb2.DisturbRequest(link=faults_pb2.LINK_AGENTS, for_ms=PROVOKED_MS, period_ms=PROVOKED_BY_MS)
        async with access.dial(worker.control) as channel:
            stub = faults_pb2_grpc.FaultsStub(channel)  # type: ignore[no-untyped-call]
            while True:
                await stub.Disturb(slow, timeout=FAULTS_TIMEOUT_S, metadata=access.metadata)
                for _ in range(PROVOKED_MS // 1000):
                    await asyncio.sleep(1.0)
                    self._load.leave()

    async def _strike_link(self, admin: admin_pb2_grpc.AdminStub, fault: Fault) -> None:
        worker = await self._worker(admin, ANY_ROLE, fault)
        async with self._place.access.dial(worker.control) as channel:
            await faults_pb2_grpc.FaultsStub(channel).Disturb(  # type: ignore[no-untyped-call]
                faults_pb2.DisturbRequest(
                    link=GATES[fault.victim],
                    for_ms=fault.for_ms,
                    period_ms=fault.period_ms,
                    corrupt_every=fault.corrupt_every,
                ),
                timeout=FAULTS_TIMEOUT_S,
                metadata=self._place.access.metadata,
            )
        self._struck(fault, worker.id)  # not before: a worker that does not answer is not struck
        await asyncio.sleep(fault.for_ms / 1000)

    async def _strike_store(self, admin: admin_pb2_grpc.AdminStub, fault: Fault) -> None:
        store = (await self._status(admin)).store
        try:
            process = await asyncio.to_thread(store_process, store)
        except LookupError as error:
            raise NoVictim(str(error)) from None
        if fault.victim is Victim.STORE_STOPPED:
            self._struck(fault, store)
            send(process, signal.SIGSTOP)
            await stay_stopped([process], fault.for_ms)
            return
        command = await asyncio.to_thread(command_of, store)
        self._struck(fault, store)
        self._stores.append(await restart_store(process, command, fault.for_ms))

    async def _worker(
        self, admin: admin_pb2_grpc.AdminStub, roles: Sequence[str], fault: Fault
    ) -> admin_pb2.WorkerStatus:
        """The worker that is struck; waits until there is one. Raises NoVictim when there is none."""
        until_s = time.monotonic() + VICTIM_WAIT_S
        while time.monotonic() < until_s:
            status = await self._status(admin)
            ready = [each for each in status.workers if each.state == "ready" and each.role in roles]
            if fault.victim in AGENTS:
                ready = [each for each in ready if each.agent_pid]
            if ready:
                return ready[fault.pick % len(ready)]
            await asyncio.sleep(WATCH_S)
        raise NoVictim(f"there was no {fault.victim} within {VICTIM_WAIT_S:.0f} s")

    def _struck(self, fault: Fault, where: str) -> None:
        now_ms = self._now_ms()
        self.tally.struck(now_ms, fault, where)
        self._say(f"{now_ms / 1000:7.1f} s  {fault}: {where}, {self.tally.strikes[-1].in_flight} streams in flight")


def _first(several: ExceptionGroup[Exception]) -> Exception:
    """The first of the errors that tasks ended with."""
    (error, *_) = several.exceptions
    return _first(error) if isinstance(error, ExceptionGroup) else error


async def _allows_faults(control: str, access: ClusterAccess) -> bool:
    """Whether the worker at this address takes faults."""
    request = faults_pb2.AmbushRequest()  # names no state: refused as such by who has the service
    async with access.dial(control) as channel:
        stub = faults_pb2_grpc.FaultsStub(channel)  # type: ignore[no-untyped-call]
        try:
            await stub.Ambush(request, timeout=FAULTS_TIMEOUT_S, metadata=access.metadata)
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.INVALID_ARGUMENT
    return True
