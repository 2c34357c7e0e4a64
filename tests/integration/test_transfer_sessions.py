"""Workers talk over real gRPC streams: in order, both ways, and a peer that is gone is told within a bound."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import grpc
import pytest

from kv_transfer import session
from kv_transfer.gate import Gate
from kv_transfer.messages import Cancel, Header, TransferMessage
from kv_transfer.session import TransferSessions
from tandem.messages import WorkerAddress
from tandem.request import RequestId, TransferId, WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc as pb_grpc

CUT_OFF_S = session.BEAT_TIMEOUT_S + session.CONNECT_TIMEOUT_S + session.RECONNECT_DELAY_S
BOUND_S = session.BEAT_TIMEOUT_S + 2 * session.CONNECT_TIMEOUT_S + 5


def message(number: int, sender: str = "a") -> TransferMessage:
    """Any message; its reason carries a number."""
    header = Header(
        transfer_id=TransferId("t"), request_id=RequestId("r"), epoch=1, sender=WorkerId(sender),
        source_incarnation=1, target_incarnation=2,
    )  # fmt: skip
    return TransferMessage(header=header, body=Cancel(reason=str(number)))


class Worker:
    """One end: a server, its sessions, and what came."""

    def __init__(self, name: str, incarnation: int) -> None:
        self.name, self.incarnation = name, incarnation
        self.messages: list[TransferMessage] = []
        self.gone: list[tuple[WorkerId, int]] = []
        self.gate = Gate()
        self._changed = asyncio.Event()

    async def start(self, port: int = 0) -> None:
        """Serves on a free port of the loopback interface."""
        self.sessions = TransferSessions(
            incarnation=self.incarnation,
            worker_id=WorkerId(self.name),
            on_message=self._took,
            on_peer_gone=self._lost,
            gate=self.gate,
        )
        self._server = grpc.aio.server()
        pb_grpc.add_TransferServicer_to_server(self.sessions, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()

    def _took(self, what: TransferMessage) -> None:
        self.messages.append(what)
        self._changed.set()

    def _lost(self, worker_id: WorkerId, incarnation: int) -> None:
        self.gone.append((worker_id, incarnation))
        self._changed.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10) -> None:
        """Waits for the condition on what came."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    @property
    def address(self) -> WorkerAddress:
        """Where peers send to."""
        return WorkerAddress(
            worker_id=WorkerId(self.name), incarnation=self.incarnation, control=f"127.0.0.1:{self.port}", endpoint=""
        )

    async def stop(self) -> None:
        """Ends the streams and the server."""
        await self.sessions.close()
        await self._server.stop(0)


def run(scenario: Callable[[Worker, Worker], Awaitable[None]]) -> None:
    """Runs a scenario with two workers that are stopped afterwards."""

    async def both() -> None:
        a, b = Worker("a", 1), Worker("b", 2)
        await a.start()
        await b.start()
        try:
            await scenario(a, b)
        finally:
            await a.stop()
            await b.stop()

    asyncio.run(both())


def test_messages_from_several_threads_arrive_once_and_replies_go_back() -> None:
    async def scenario(a: Worker, b: Worker) -> None:
        def speak(first: int) -> None:
            for number in range(first, first + 200):
                a.sessions.send(b.address, message(number))

        threads = [threading.Thread(target=speak, args=(first,)) for first in (0, 1000)]
        for thread in threads:
            thread.start()
        await b.until(lambda: len(b.messages) == 400)
        for thread in threads:
            thread.join()
        numbers = [int(came.body.reason) for came in b.messages if isinstance(came.body, Cancel)]
        assert [n for n in numbers if n < 1000] == list(range(200))  # in the order of each thread
        assert [n for n in numbers if n >= 1000] == list(range(1000, 1200))
        b.sessions.send(a.address, message(7, "b"))
        await a.until(lambda: a.messages == [message(7, "b")])
        assert not a.gone
        assert not b.gone

    run(scenario)


def test_a_peer_that_was_never_there_is_gone_at_once() -> None:
    async def scenario(a: Worker, b: Worker) -> None:
        await b.stop()
        a.sessions.send(b.address, message(1))
        await a.until(lambda: a.gone == [(WorkerId("b"), 2)])
        a.sessions.send(b.address, message(2))  # each further attempt is answered too
        await a.until(lambda: len(a.gone) == 2)

    run(scenario)


def test_another_incarnation_at_the_same_address_is_another_peer() -> None:
    async def scenario(a: Worker, b: Worker) -> None:
        before = b.address
        a.sessions.send(before, message(1))
        await b.until(lambda: len(b.messages) == 1)
        b.sessions.incarnation = b.incarnation = 3
        stale = WorkerAddress(worker_id=WorkerId("c"), incarnation=2, control=before.control, endpoint="")
        a.sessions.send(stale, message(2))
        await a.until(lambda: a.gone == [(WorkerId("c"), 2)])
        a.sessions.send(b.address, message(3))
        await b.until(lambda: len(b.messages) == 2)
        assert b.messages[1] == message(3)

    run(scenario)


def test_a_peer_restarted_at_its_address_is_reached_again() -> None:
    async def scenario(a: Worker, b: Worker) -> None:
        a.sessions.send(b.address, message(1))
        await b.until(lambda: len(b.messages) == 1)
        port = b.port
        await b.stop()
        await a.until(lambda: a.gone == [(WorkerId("b"), 2)])  # told although nothing was being sent
        await b.start(port)
        a.sessions.send(b.address, message(2))
        await b.until(lambda: len(b.messages) == 2)

    run(scenario)


def test_a_malformed_message_ends_the_stream_and_nothing_else() -> None:
    async def scenario(a: Worker, b: Worker) -> None:
        async with grpc.aio.insecure_channel(b.address.control) as channel:
            metadata = ((session.INCARNATION_KEY, "2"),)
            stub = pb_grpc.TransferStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Exchange(metadata=metadata)
            await call.write(pb.TransferMessage(offer=pb.Offer(num_tokens=3)))
            with pytest.raises(grpc.aio.AioRpcError, match="header: is missing"):
                await _read_on(call)
        a.sessions.send(b.address, message(1))
        await b.until(lambda: b.messages == [message(1)])

    run(scenario)


async def _read_on(call: grpc.aio.StreamStreamCall[pb.TransferMessage, pb.TransferMessage]) -> None:
    while True:
        await call.read()


STOPPED = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from test_transfer_sessions import Worker
async def main():
    worker = Worker("b", 2)
    await worker.start()
    print(worker.port, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_a_peer_that_is_stopped_is_gone_within_the_bound() -> None:
    async def scenario(a: Worker, b: Worker) -> None:
        process = subprocess.Popen([sys.executable, "-c", STOPPED, os.path.dirname(__file__)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            port = int(await asyncio.to_thread(process.stdout.readline))
            peer = WorkerAddress(worker_id=WorkerId("b"), incarnation=2, control=f"127.0.0.1:{port}", endpoint="")
            a.sessions.send(peer, message(1))
            a.sessions.send(b.address, message(1))
            await b.until(lambda: len(b.messages) == 1)
            os.kill(process.pid, signal.SIGSTOP)
            await a.until(lambda: a.gone == [(WorkerId("b"), 2)], BOUND_S)
        finally:
            process.kill()
            process.communicate()

    run(scenario)


class Fickle(pb_grpc.TransferServicer):
    """Ends its first streams at once, well and without a word more than a sign of life; then it is `of`'s sessions."""

    def __init__(self, of: Worker, num: int) -> None:
        self._of, self._num = of, num

    async def Exchange(
        self,
        request_iterator: AsyncIterator[pb.TransferMessage],
        context: grpc.aio.ServicerContext[pb.TransferMessage, pb.TransferMessage],
    ) -> None:
        if self._num:
            self._num -= 1
            await context.write(pb.TransferMessage())
            return
        await self._of.sessions.Exchange(request_iterator, context)


@pytest.mark.parametrize("end", ["source", "target"])
def test_a_peer_that_is_cut_off_is_told_within_a_bound_and_heard_again(end: str) -> None:
    """Nothing passes, either way, although its sockets answer; whichever end is cut off."""

    async def scenario(a: Worker, b: Worker) -> None:
        gate = a.gate if end == "source" else b.gate
        a.sessions.send(b.address, message(1))
        await b.until(lambda: b.messages == [message(1)])
        gate.shut(time.monotonic(), for_s=60)
        began_s = time.monotonic()
        a.sessions.send(b.address, message(2))
        await a.until(lambda: a.gone == [(WorkerId("b"), 2)], CUT_OFF_S + 5)
        assert time.monotonic() - began_s < CUT_OFF_S + 2
        gate.shut(time.monotonic(), for_s=0.0)
        a.sessions.send(b.address, message(3))
        await b.until(lambda: b.messages[-1] == message(3), CUT_OFF_S + 5)

    run(scenario)


def test_a_slow_network_delays_messages_and_keeps_their_order() -> None:
    async def scenario(a: Worker, b: Worker) -> None:
        b.gate.shut(time.monotonic(), for_s=3, period_s=0.3)
        for number in range(50):
            a.sessions.send(b.address, message(number))
        await b.until(lambda: len(b.messages) == 50)
        assert b.messages == [message(number) for number in range(50)]
        assert not a.gone

    run(scenario)


def test_a_stream_that_ends_well_under_a_message_is_opened_again() -> None:
    async def scenario(a: Worker, b: Worker) -> None:
        server = grpc.aio.server()
        pb_grpc.add_TransferServicer_to_server(Fickle(b, 5), server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            peer = WorkerAddress(worker_id=WorkerId("b"), incarnation=2, control=f"127.0.0.1:{port}", endpoint="")
            while not b.messages:  # each may have been written to a stream that ended before it was read
                a.sessions.send(peer, message(1))
                with contextlib.suppress(TimeoutError):
                    await b.until(lambda: len(b.messages) > 0, 0.2)
                assert asyncio.get_running_loop().time() < deadline_s
        finally:
            await server.stop(0)

    deadline_s = time.monotonic() + BOUND_S
    run(scenario)


def test_a_message_that_has_no_encoding_costs_itself_and_not_the_peer() -> None:
    async def scenario(a: Worker, b: Worker) -> None:
        bad = message(1)
        a.sessions.send(b.address, replace(bad, header=replace(bad.header, epoch=1 << 70)))
        await a.until(lambda: a.gone == [(WorkerId("b"), 2)])
        a.sessions.send(b.address, message(2))
        await b.until(lambda: b.messages == [message(2)])

    run(scenario)


def test_a_peer_that_takes_nothing_is_given_up_when_its_queue_is_full() -> None:
    async def scenario(a: Worker, b: Worker) -> None:
        await b.stop()
        for number in range(session.MAX_QUEUED_MESSAGES + 1):
            a.sessions.send(b.address, message(number))
        await a.until(lambda: len(a.gone) >= 1)

    run(scenario)


class Watched(pb_grpc.TransferServicer):
    """`of`'s sessions, and how many streams of theirs have ended."""

    def __init__(self, of: Worker) -> None:
        self._of, self.num_ended = of, 0

    async def Exchange(
        self,
        request_iterator: AsyncIterator[pb.TransferMessage],
        context: grpc.aio.ServicerContext[pb.TransferMessage, pb.TransferMessage],
    ) -> None:
        try:
            await self._of.sessions.Exchange(request_iterator, context)
        finally:
            self.num_ended += 1


async def _heavy_beat(
    context: grpc.aio.ServicerContext[pb.TransferMessage, pb.TransferMessage], writing: asyncio.Lock
) -> None:
    """More than the window of a peer that does not read."""
    while True:
        async with writing:
            await context.write(pb.TransferMessage(cancel=pb.TransferCancel(reason="x" * 1_000_000)))


def test_a_peer_that_ends_its_stream_and_reads_nothing_holds_it_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "_beat", _heavy_beat)
    monkeypatch.setattr(session, "WRITE_TIMEOUT_S", 0.5)

    async def scenario(a: Worker, b: Worker) -> None:
        server, watched = grpc.aio.server(), Watched(b)
        pb_grpc.add_TransferServicer_to_server(watched, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = pb_grpc.TransferStub(channel)  # type: ignore[no-untyped-call]
                call = stub.Exchange(metadata=((session.INCARNATION_KEY, "2"),))
                await call.initial_metadata()
                await asyncio.sleep(0.5)  # the beats have come to a halt
                await call.done_writing()
                async with asyncio.timeout(5):
                    while not watched.num_ended:
                        await asyncio.sleep(0.05)
                call.cancel()
        finally:
            await server.stop(0)

    run(scenario)
