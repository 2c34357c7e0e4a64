"""The driver over real gRPC streams, against a small worker that counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from router.config import RouterConfig
from router.driver import Driver, NewRequest, WantedMove
from router.move import MoveOutcome, MoveReason, MoveRecord
from router.token_stream import RequestStream
from tandem import report_wire, wire
from tandem.errors import (
    Cancelled,
    DeadlinePassed,
    DuplicateRequest,
    InvalidRequest,
    MoveImpossible,
    Overloaded,
    Unavailable,
    UnknownRequest,
)
from tandem.messages import (
    Assign,
    AssignMode,
    CancelAssigned,
    CommitAsk,
    Migrate,
    MoveFailed,
    OwnerIs,
    Role,
    RouterMessage,
    StopMove,
    WorkerInfo,
    WorkerReport,
)
from tandem.request import FinishReason, RequestId, Sampling, Token, WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

INCARNATION = 5


def token_at(prompt: tuple[int, ...], index: int) -> int:
    return (sum(prompt) + 7 * index) % 1000


class CountingWorker(worker_pb2_grpc.WorkerServicer):
    """Serves LOCAL assignments: token i is a function of the prompt and i. Ends its stream when `cut_at` is due."""

    def __init__(self, worker_id: str = "m0") -> None:
        self.worker_id = WorkerId(worker_id)
        self.gives_moves_up = False
        self.server = grpc.aio.server()
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self.server)  # type: ignore[no-untyped-call]
        self.sessions: list[int] = []
        self.heard: list[RouterMessage] = []
        self.cut_at: int | None = None
        self.num_tokens_max = 10**9  # says nothing after so many
        self.num_at_once = 1  # tokens in a report

    async def Connect(self, request_iterator: AsyncIterator[pb.RouterMessage], context: Any) -> None:
        hello = await anext(request_iterator)
        self.sessions.append(hello.hello.session)
        writing = asyncio.Lock()

        async def beat() -> None:
            while True:
                async with writing:
                    await context.write(pb.WorkerReport())
                await asyncio.sleep(1)

        beats = asyncio.create_task(beat())
        try:
            async for report in self._serve(request_iterator):
                async with writing:
                    await context.write(report)
        finally:
            async with writing:
                beats.cancel()

    async def _serve(self, request_iterator: AsyncIterator[pb.RouterMessage]) -> AsyncIterator[pb.WorkerReport]:
        async for message in request_iterator:
            assign = wire.decode_router_message(message)
            self.heard.append(assign)
            if isinstance(assign, Migrate) and self.gives_moves_up:
                yield report_wire.encode_report(self._gives_up(assign))
            if isinstance(assign, OwnerIs) and assign.worker_id == self.worker_id:
                yield report_wire.encode_report(self._goes_on(assign))
            if not isinstance(assign, Assign):
                continue
            if assign.move:
                yield report_wire.encode_report(self._asks(assign))
                continue
            prompt = assign.tokens[: assign.num_prompt_tokens]
            first = len(assign.tokens) - len(prompt)
            end = min(assign.sampling.max_tokens, self.num_tokens_max)
            for index in range(first, end, self.num_at_once):
                if self.cut_at == index:
                    self.cut_at = None
                    return
                reports = [self._report(assign, prompt, each) for each in range(index, end)[: self.num_at_once]]
                tokens = tuple(token for report in reports for token in report.tokens)
                yield report_wire.encode_report(replace(reports[0], tokens=tokens))

    def _report(self, assign: Assign, prompt: tuple[int, ...], index: int) -> WorkerReport:
        last = index + 1 == assign.sampling.max_tokens
        token = Token(
            request_id=assign.request_id,
            epoch=assign.epoch,
            index=index,
            token_id=token_at(prompt, index),
            finish=FinishReason.LENGTH if last else None,
        )
        return WorkerReport(worker_id=self.worker_id, incarnation=INCARNATION, sequence=index, tokens=(token,))

    def _asks(self, assign: Assign) -> WorkerReport:
        """A target whose blocks come in no time."""
        self.moved = assign
        ask = CommitAsk(
            request_id=assign.request_id,
            transfer_id=assign.transfer_id,
            from_epoch=assign.epoch,
            next_index=len(assign.tokens) - assign.num_prompt_tokens,
            tokens=(),
        )
        asks = () if self.gives_moves_up else (ask,)
        return WorkerReport(worker_id=self.worker_id, incarnation=INCARNATION, sequence=1, commit_asks=asks)

    def _goes_on(self, owner: OwnerIs) -> WorkerReport:
        assign = replace(self.moved, epoch=owner.epoch)
        prompt = assign.tokens[: assign.num_prompt_tokens]
        return self._report(assign, prompt, len(assign.tokens) - len(prompt))

    def _gives_up(self, migrate: Migrate) -> WorkerReport:
        failed = MoveFailed(
            request_id=migrate.request_id,
            transfer_id=migrate.transfer_id,
            epoch=migrate.epoch,
            code="planted",
            message="no",
        )
        return WorkerReport(worker_id=self.worker_id, incarnation=INCARNATION, sequence=1, moves_failed=(failed,))

    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
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
        await until(lambda: any(each.state == "cancelled" for each in driver.status().requests))

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
        with pytest.raises(Unavailable, match="stopping"):
            await collect(stream)
        with pytest.raises(Unavailable):
            driver.submit(request("late"))

    task: Coroutine[Any, Any, None] = main()
    asyncio.run(task)


@asynccontextmanager
async def moving_pair(driver: Driver, worker: CountingWorker) -> AsyncIterator[tuple[CountingWorker, RequestStream]]:
    """The request r decodes on m0 and stands at token 5; m1 could take it, and writes one token then."""
    worker.num_tokens_max = 5
    driver.worker_joined(worker.info(), INCARNATION)
    await until(lambda: driver.status().workers[0].state == "ready")
    stream = driver.submit(request("r"))
    await until(lambda: stream.num_buffered == 5)
    other = CountingWorker("m1")
    await other.server.start()
    try:
        driver.worker_joined(other.info(), INCARNATION)
        await until(lambda: [each.state for each in driver.status().workers] == ["ready", "ready"])
        yield other, stream
    finally:
        await other.server.stop(None)


def test_a_move_is_awaited_and_its_record_returned() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        async with moving_pair(driver, worker) as (_, stream):
            record = await driver.move(RequestId("r"), WorkerId("m1"), MoveReason.OPERATOR, "asked for")
            assert driver.move_ended.is_set()
            driver.move_ended.clear()
            assert (record.outcome, record.source, record.target) == (MoveOutcome.MOVED, "m0", "m1")
            assert stream.num_buffered == 6
            assert [each.token_id for each in await anext(stream)] == [token_at((1, 2, 3), each) for each in range(6)]
            assert driver.status().moves == (record,)
            with pytest.raises(MoveImpossible, match="it is there"):
                await driver.move(RequestId("r"), WorkerId("m1"), MoveReason.OPERATOR, "")
            with pytest.raises(UnknownRequest):
                await driver.move(RequestId("nobody"), None, MoveReason.OPERATOR, "")
            assert not driver.move_ended.is_set(), "what is refused is no end: it would be planned again at once"
            assert not driver._moves

    run(case)


def test_a_move_that_its_source_gives_up_is_told_as_its_record() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        async with moving_pair(driver, worker) as (other, _):
            worker.gives_moves_up = other.gives_moves_up = True
            record = await driver.move(RequestId("r"), None, MoveReason.OPERATOR, "")
            assert (record.outcome, record.error) == (MoveOutcome.FAILED, "planted: no")
            await until(lambda: any(isinstance(each, CancelAssigned) for each in other.heard))

    run(case)


def test_askers_of_moves_are_bounded_in_number_and_time() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        async with moving_pair(driver, worker) as (other, _):
            other.gives_moves_up = True  # and the source says nothing
            first = asyncio.create_task(driver.move(RequestId("r"), None, MoveReason.OPERATOR, ""))
            await until(lambda: bool(driver._moves))
            with pytest.raises(Overloaded, match="1 callers"):
                await driver.move(RequestId("r"), None, MoveReason.OPERATOR, "")
            record = await first
            assert (record.outcome, "no commit" in record.error) == (MoveOutcome.FAILED, True)
            await until(lambda: any(isinstance(each, StopMove) for each in worker.heard))

    run(case, RouterConfig(redial_ms=10, tick_ms=10, move_askers_max=1, move_deadline_ms=50))


def test_an_asker_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        async with moving_pair(driver, worker):
            monkeypatch.setattr("router.driver.GRACE_MS", 0)
            with pytest.raises(DeadlinePassed, match="did not end within"):
                await driver.move(RequestId("r"), None, MoveReason.OPERATOR, "")

    monkeypatch.setattr(Driver, "_move_ended", lambda self, ticket, how: None)
    run(case, RouterConfig(redial_ms=10, tick_ms=10, move_deadline_ms=50, decode_stall_ms=50))


def test_moves_of_the_rebalancer_are_refused_at_once_or_seen_in_status() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        async with moving_pair(driver, worker) as (_, stream):
            wanted = [
                WantedMove(request_id=RequestId(name), to=WorkerId(to), reason=MoveReason.BALANCE, why="")
                for name, to in (("r", "m9"), ("r", "m1"), ("r", "m1"))
            ]
            refused = driver.request_moves(wanted)
            assert [type(each.error) for each in refused] == [InvalidRequest, MoveImpossible]
            await until(lambda: [each.outcome for each in driver.status().moves] == [MoveOutcome.MOVED])
            await until(lambda: stream.num_buffered == 6)

    run(case)


def test_stopping_ends_the_wait_for_a_move() -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        async with moving_pair(driver, worker) as (other, _):
            other.gives_moves_up = True
            asked = asyncio.create_task(driver.move(RequestId("r"), None, MoveReason.OPERATOR, ""))
            await until(lambda: bool(driver._moves))
            await driver.stop()
            record: MoveRecord = await asked
            assert record.outcome is MoveOutcome.ENDED
            with pytest.raises(Unavailable):
                await driver.move(RequestId("r"), None, MoveReason.OPERATOR, "")

    run(case)


def test_a_core_that_breaks_is_told_to_whoever_hosts_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    async def case(driver: Driver, worker: CountingWorker) -> None:
        def broken(now_ms: int, event: object) -> list[object]:
            raise AssertionError("planted")

        monkeypatch.setattr(driver._core, "handle", broken)
        with pytest.raises(AssertionError, match="planted"):
            await asyncio.wait_for(driver.crashed(), 5)
        monkeypatch.undo()

    run(case)
