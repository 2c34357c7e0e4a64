"""The driver over real gRPC streams, against a small worker that counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import grpc.aio
import pytest

from router.config import RouterConfig
from router.driver import Driver, NewRequest, RequestStream
from tandem import wire
from tandem.errors import Cancelled, DuplicateRequest, InvalidRequest, Unavailable
from tandem.messages import Assign, AssignMode, CancelAssigned, Role, RouterMessage, WorkerInfo, WorkerReport
from tandem.request import FinishReason, RequestId, Sampling, Token, WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

INCARNATION = 5


def token_at(prompt: tuple[int, ...], index: int) -> int:
    return (sum(prompt) + 7 * index) % 1000


class CountingWorker(worker_pb2_grpc.WorkerServicer):
    """Serves LOCAL assignments: token i is a function of the prompt and i. Ends its stream when `cut_at` is due."""

    def __init__(self) -> None:
        self.server = grpc.aio.server()
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self.server)  # type: ignore[no-untyped-call]
        self.sessions: list[int] = []
        self.heard: list[RouterMessage] = []
        self.cut_at: int | None = None
        self.num_tokens_max = 10**9  # says nothing after so many

    async def Connect(
        self, request_iterator: AsyncIterator[pb.RouterMessage], context: Any
    ) -> AsyncIterator[pb.WorkerReport]:
        hello = await anext(request_iterator)
        self.sessions.append(hello.hello.session)
        async for message in request_iterator:
            assign = wire.decode_router_message(message)
            self.heard.append(assign)
            if not isinstance(assign, Assign):
                continue
            prompt = assign.tokens[: assign.num_prompt_tokens]
            first = len(assign.tokens) - len(prompt)
            for index in range(first, min(assign.sampling.max_tokens, self.num_tokens_max)):
                if self.cut_at == index:
                    self.cut_at = None
                    return
                yield wire.encode_report(self._report(assign, prompt, index))

    def _report(self, assign: Assign, prompt: tuple[int, ...], index: int) -> WorkerReport:
        last = index + 1 == assign.sampling.max_tokens
        token = Token(
            request_id=assign.request_id,
            epoch=assign.epoch,
            index=index,
            token_id=token_at(prompt, index),
            finish=FinishReason.LENGTH if last else None,
        )
        return WorkerReport(worker_id=WorkerId("m0"), incarnation=INCARNATION, sequence=index, tokens=(token,))

    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=WorkerId("m0"),
            role=Role.MIXED,
            control=f"127.0.0.1:{self.port}",
            endpoint="",
            pid=1,
            agent_pid=1,
            model="m",
            namespace="n",
            fingerprint="f",
            exact=True,
            dtype="float32",
            block_size=16,
            total_blocks=1000,
            context_tokens=8192,
            block_bytes=1,
        )


def request(name: str, num: int = 20, prompt: tuple[int, ...] = (1, 2, 3)) -> NewRequest:
    return NewRequest(request_id=RequestId(name), tokens=prompt, sampling=Sampling(max_tokens=num))


async def collect(stream: RequestStream) -> list[Token]:
    return [token async for batch in stream for token in batch]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


def run(case: Callable[[Driver, CountingWorker], Awaitable[None]], config: RouterConfig | None = None) -> None:
    async def main() -> None:
        worker = CountingWorker()
        await worker.server.start()
        try:
            async with Driver(config or RouterConfig(redial_ms=10, tick_ms=10)) as driver:
                await asyncio.wait_for(case(driver, worker), 20)
        finally:
            await worker.server.stop(None)

    asyncio.run(main())


def test_tokens_come_in_order_and_the_stream_ends() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        driver.worker_joined(worker.info(), INCARNATION)
        streams = [driver.submit(request(f"r{each}", 20, (each,))) for each in range(5)]
        for each, stream in enumerate(streams):
            tokens = await collect(stream)
            assert [token.token_id for token in tokens] == [token_at((each,), index) for index in range(20)]
            assert stream.usage is not None
            assert stream.usage.completion_tokens == 20
        assert {each.state for each in driver.status().requests} == {"finished"}

    run(case)


def test_a_broken_stream_is_dialled_again_and_the_answer_goes_on() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        worker.cut_at = 7
        driver.worker_joined(worker.info(), INCARNATION)
        tokens = await collect(driver.submit(request("r")))
        assert [token.index for token in tokens] == list(range(20))
        assert [token.token_id for token in tokens] == [token_at((1, 2, 3), index) for index in range(20)]
        assert len(set(worker.sessions)) == 2
        assert sorted(worker.sessions) == worker.sessions
        assigns = [each for each in worker.heard if isinstance(each, Assign)]
        assert [(each.mode, len(each.tokens)) for each in assigns] == [(AssignMode.LOCAL, 3), (AssignMode.LOCAL, 10)]

    run(case)


def test_refusals_are_raised_at_once_and_leave_the_first_alone() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        first = driver.submit(request("r"))
        with pytest.raises(DuplicateRequest):
            driver.submit(request("r"))
        driver.worker_joined(worker.info(), INCARNATION)
        assert len(await collect(first)) == 20
        assert not driver.cancel(RequestId("r"), "gone already")

    run(case)


def test_what_can_never_be_served_is_raised_at_once() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        driver.worker_joined(worker.info(), INCARNATION)
        await until(lambda: driver.status().workers[0].state == "ready")
        with pytest.raises(InvalidRequest, match="prompt"):
            driver.submit(request("r", prompt=tuple(range(16_000))))

    run(case)


def test_nobody_there_is_a_named_error_after_a_bounded_wait() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        with pytest.raises(Unavailable):
            await collect(driver.submit(request("r")))

    run(case, RouterConfig(workers_wait_ms=50, tick_ms=10))


def test_cancel_and_stop_reach_the_worker() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        worker.num_tokens_max = 5
        driver.worker_joined(worker.info(), INCARNATION)
        stopped, cancelled = driver.submit(request("stopped")), driver.submit(request("cancelled"))
        num = 0
        while num < 5:
            num += len(await anext(stopped))
        driver.stop_at(RequestId("stopped"), 2)
        with pytest.raises(StopAsyncIteration):
            await anext(stopped)
        assert stopped.usage is not None
        assert stopped.usage.completion_tokens == 3
        assert driver.cancel(RequestId("cancelled"), "operator")
        with pytest.raises(Cancelled, match="operator"):
            await collect(cancelled)
        await until(lambda: sum(isinstance(each, CancelAssigned) for each in worker.heard) == 2)

    run(case)


def test_a_client_that_lags_is_cut_off_by_name() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        driver.worker_joined(worker.info(), INCARNATION)
        stream = driver.submit(request("r", 100))
        await until(lambda: stream.ended)
        with pytest.raises(Cancelled, match="too slowly"):
            await collect(stream)
        await until(lambda: any(each.state == "failed" for each in driver.status().requests))

    run(case, RouterConfig(stream_tokens_max=10, redial_ms=10))


def test_a_lost_worker_is_closed_and_a_new_incarnation_serves() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        driver.worker_joined(worker.info(), INCARNATION - 1)
        await until(lambda: bool(worker.sessions))
        stream = driver.submit(request("r"))  # its reports speak as another incarnation: not heard
        driver.worker_joined(worker.info(), INCARNATION)
        assert len(await collect(stream)) == 20
        driver.worker_lost(WorkerId("m0"), INCARNATION, "killed")
        assert [each.state for each in driver.status().workers] == ["dead"]

    run(case)


def test_stopping_ends_every_stream() -> None:
    async def main() -> None:
        async with Driver() as driver:
            stream = driver.submit(request("r"))
        with pytest.raises(Cancelled, match="stopping"):
            await collect(stream)
        with pytest.raises(Unavailable):
            driver.submit(request("late"))

    task: Coroutine[Any, Any, None] = main()
    asyncio.run(task)


def test_a_core_that_breaks_is_told_to_whoever_hosts_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        def broken(now_ms: int, event: object) -> list[object]:
            raise AssertionError("planted")

        monkeypatch.setattr(driver._core, "handle", broken)
        with pytest.raises(AssertionError, match="planted"):
            await asyncio.wait_for(driver.crashed(), 5)
        monkeypatch.undo()

    run(case)
