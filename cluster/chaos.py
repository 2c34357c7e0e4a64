"""Strikes a running cluster of this machine with planned faults while a load checks each token of each stream."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import grpc
import psutil

from cluster.chaos_plan import Fault, FaultKind, Victim
from cluster.chaos_tally import Tally
from tandem.client import AsyncClient, SamplingOptions
from tandem.errors import Overloaded, TandemError, Unavailable
from tandem.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

STATUS_TIMEOUT_S = 10.0
STREAM_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 60.0
WATCH_S = 0.5
VICTIM_WAIT_S = 30.0  # for one that is there to be struck
ROLES = {
    Victim.PREFILL: "prefill",
    Victim.PREFILL_AGENT: "prefill",
    Victim.DECODE: "decode",
    Victim.DECODE_AGENT: "decode",
}
AGENTS = (Victim.PREFILL_AGENT, Victim.DECODE_AGENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The streams that check: so many clients at once, each asking one of so many questions over and over."""

    num_clients: int = 8
    num_questions: int = 12
    prompt_tokens_max: int = 200
    output_tokens_max: int = 96


@dataclass(slots=True)
class _Question:
    prompt: list[int]
    sampling: SamplingOptions
    answer: list[int] = field(default_factory=list)


class NotReady(RuntimeError):
    """The cluster cannot be shot at; the message says why."""


class ChaosRun:
    """One run against the cluster at a gRPC address. `say` is told what happens, a line each."""

    def __init__(self, address: str, *, load: Load, seed: int, say: Callable[[str], None]) -> None:
        self.tally = Tally()
        self._address = address
        self._load = load
        self._draw = random.Random(seed)
        self._say = say
        self._begin_s = 0.0
        self._num_streams = 0
        self._reading: set[asyncio.Task[None]] = set()

    def _now_ms(self) -> int:
        return round((time.monotonic() - self._begin_s) * 1000)

    async def run(self, faults: Sequence[Fault], duration_ms: int) -> Tally:
        """All faults in their time; returns what they did. Raises NotReady and grpc.RpcError."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            admin = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            inference = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            status = await self._status(admin)
            self._check(status)
            (model, *_) = (
                await inference.ListModels(inference_pb2.ListModelsRequest(), timeout=STATUS_TIMEOUT_S)
            ).models
            questions = await self._ask_first(model.vocab_size, model.context_tokens)
            self._say(f"{len(questions)} questions answered undisturbed; {len(faults)} faults follow")
            self._begin_s = time.monotonic()
            clients = [asyncio.create_task(self._client(questions, duration_ms)) for _ in range(self._load.num_clients)]
            watcher = asyncio.create_task(self._watch(admin))
            for fault in faults:
                await asyncio.sleep(max(0.0, (fault.at_ms - self._now_ms()) / 1000))
                await self._strike(admin, fault)
            await asyncio.gather(*clients)
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            await self._settle(admin)
        return self.tally

    # ---- the cluster -------------------------------------------------------------------------------------------------

    async def _status(self, admin: admin_pb2_grpc.AdminStub) -> admin_pb2.StatusResponse:
        answer: admin_pb2.StatusResponse = await admin.Status(
            admin_pb2.StatusRequest(include_finished=False), timeout=STATUS_TIMEOUT_S
        )
        return answer

    def _check(self, status: admin_pb2.StatusResponse) -> None:
        inexact = [each.id for each in status.workers if each.state == "ready" and not each.exact]
        if inexact:
            raise NotReady(f"{', '.join(inexact)}: not in exact mode, so tokens cannot be compared")
        strange = [each.id for each in status.workers if each.state == "ready" and not psutil.pid_exists(each.pid)]
        if strange:
            raise NotReady(f"{', '.join(strange)}: runs on another machine, where no fault can be made from here")

    async def _settle(self, admin: admin_pb2_grpc.AdminStub) -> None:
        """Waits until every worker is back and holds nothing; what stays is a leak."""
        until_s = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            problems = _held(await self._status(admin))
            if not problems:
                return
            if time.monotonic() > until_s:
                for problem in problems:
                    self.tally.leaked(f"{problem}, {SETTLE_TIMEOUT_S:.0f} s after the last stream")
                return
            await asyncio.sleep(WATCH_S)

    async def _watch(self, admin: admin_pb2_grpc.AdminStub) -> None:
        """Looks at every worker's audit all the time."""
        seen: set[str] = set()
        while True:
            await asyncio.sleep(WATCH_S)
            with suppress(grpc.aio.AioRpcError):  # the router may be stopped
                for worker in (await self._status(admin)).workers:
                    for problem in worker.audit:
                        told = f"{worker.id}: {problem}"
                        if told not in seen:
                            seen.add(told)
                            self.tally.leaked(told)

    # ---- the load ----------------------------------------------------------------------------------------------------

    async def _ask_first(self, vocab_size: int, context_tokens: int) -> list[_Question]:
        """Draws the questions and has each answered before anything happens."""
        load, draw = self._load, self._draw
        questions = []
        longest = min(load.prompt_tokens_max, context_tokens // 2)
        most = min(load.output_tokens_max, context_tokens // 2)
        for number in range(load.num_questions):
            prompt = [draw.randrange(vocab_size) for _ in range(draw.randint(1, longest))]
            sampling = SamplingOptions(
                temperature=float(number % 2),
                seed=number,
                max_tokens=draw.randint(min(16, most), most),
                ignore_eos=True,
            )
            questions.append(_Question(prompt, sampling))
        async with AsyncClient(self._address, timeout_s=STREAM_TIMEOUT_S) as client:
            for question in questions:
                answer = await client.generate(question.prompt, **question.sampling)
                question.answer = list(answer.token_ids)
        return questions

    async def _client(self, questions: Sequence[_Question], duration_ms: int) -> None:
        async with AsyncClient(self._address, timeout_s=STREAM_TIMEOUT_S) as client:
            while self._now_ms() < duration_ms:
                reading = asyncio.create_task(self._read(client, self._draw.choice(questions)))
                self._reading.add(reading)
                reading.add_done_callback(self._reading.discard)
                await asyncio.gather(reading, return_exceptions=True)
                if not reading.cancelled():
                    reading.result()

    async def _read(self, client: AsyncClient, question: _Question) -> None:
        """One stream to its end."""
        self._num_streams += 1
        stream = self._num_streams
        self.tally.opened(self._now_ms(), stream, question.answer)
        try:
            async for chunk in client.stream(question.prompt, **question.sampling):
                if chunk.token_ids:
                    self.tally.came(self._now_ms(), stream, chunk.index, chunk.token_ids)
        except asyncio.CancelledError:
            self.tally.ended(self._now_ms(), stream, cancelled=True)
            raise
        except TandemError as error:
            refused = isinstance(error, Overloaded | Unavailable)
            self.tally.ended(self._now_ms(), stream, f"{error.code}: {error.message}", refused=refused)
            await asyncio.sleep(WATCH_S if refused else 0)
        else:
            self.tally.ended(self._now_ms(), stream)

    # ---- faults ------------------------------------------------------------------------------------------------------

    async def _strike(self, admin: admin_pb2_grpc.AdminStub, fault: Fault) -> None:
        if fault.kind is FaultKind.CANCEL:
            reading = list(self._reading)[: (len(self._reading) + 1) // 2]
            self._struck(fault, f"{len(reading)} of {len(self._reading)} streams")
            for each in reading:
                each.cancel()
            return
        name, process = await self._victim(admin, fault)
        self._struck(fault, name)
        with suppress(psutil.NoSuchProcess):  # it has just ended by itself
            if fault.kind is FaultKind.KILL:
                process.send_signal(signal.SIGKILL)
                return
            process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(fault.for_ms / 1000)
            finally:  # also when the run is interrupted: nobody else would wake it
                process.send_signal(signal.SIGCONT)

    async def _victim(self, admin: admin_pb2_grpc.AdminStub, fault: Fault) -> tuple[str, psutil.Process]:
        """The process that is struck, by its name; waits until there is one. Raises NotReady when there is none."""
        until_s = time.monotonic() + VICTIM_WAIT_S
        while time.monotonic() < until_s:
            status = await self._status(admin)
            if fault.victim is Victim.ROUTER:
                return "router", psutil.Process(status.router_pid)
            ready = [each for each in status.workers if each.state == "ready" and each.role == ROLES[fault.victim]]
            if ready:
                worker = ready[fault.pick % len(ready)]
                with suppress(psutil.NoSuchProcess):
                    if fault.victim in AGENTS:
                        return f"{worker.id}'s agent", psutil.Process(worker.agent_pid)
                    return worker.id, psutil.Process(worker.pid)
            await asyncio.sleep(WATCH_S)
        raise NotReady(f"there was no {fault.victim} to strike within {VICTIM_WAIT_S:.0f} s")

    def _struck(self, fault: Fault, where: str) -> None:
        now_ms = self._now_ms()
        self.tally.struck(now_ms, fault, where)
        self._say(f"{now_ms / 1000:7.1f} s  {fault}: {where}, {self.tally.strikes[-1].in_flight} streams in flight")


def _held(status: admin_pb2.StatusResponse) -> list[str]:
    """What keeps the cluster from being as it was before the load."""
    problems = []
    for worker in status.workers:
        if worker.state in ("dead", "left"):
            continue
        if worker.state != "ready":
            problems.append(f"{worker.id} is {worker.state}")
            continue
        blocks = worker.kv_blocks
        held = {name: getattr(blocks, name) for name in ("owned", "exported", "granted", "quarantined")}
        problems += [f"{worker.id} has {num} blocks {name}" for name, num in held.items() if num]
    return problems
