"""Every gRPC service of a cluster under random messages, bytes that are none, and streams cut at any point.

`python tests/fuzz/grpc_calls.py NUM SEED ROUTER [WORKER=ADDRESS@INCARNATION ...]` prints how many calls ended how, as
JSON. A call that ends with INTERNAL, UNKNOWN or DATA_LOSS, or hangs, ends it with the message.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from draws import Draws
from google.protobuf.message import Message
from grpc._cython.cygrpc import ExecuteBatchError  # type: ignore[import-not-found]
from grpc_health.v1 import health_pb2
from random_messages import Known, damage, fill

from kv_transfer.session import INCARNATION_KEY
from tandem.cluster_access import ClusterAccess
from tandem.v1 import admin_pb2, inference_pb2, worker_pb2

HANG_S = 30.0  # a call that is not over by then hangs
READ_S = 0.3  # a stream that is to be cut is read for so long at most
AT_ONCE = 16
INPUT_BYTES = 700
CHANNEL = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", 64 << 20)]
BUGS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
OWN_INTERNAL = "Internal error from Core"  # this side's library, when it writes to a call that has ended
TOKEN = "FUZZ_JOIN_TOKEN"  # the variable that has the cluster's
STRANGER = "stranger"  # what is done to a worker by its name is done to this one: there is no such


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A worker whose own server is called. `shown`: what makes the caller a member: others are not heard at all."""

    name: str
    address: str
    incarnation: int
    shown: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method. `weight`: of all calls, relative to the others'."""

    path: str
    request: type[Message]
    weight: int = 1
    streams: bool = False  # requests
    answers: bool = False  # with a stream
    known: Known = field(default_factory=dict)


_SAMPLING: dict[str, list[Any]] = {
    "temperature": [0.0, 1.0, 2.0, 2.1],
    "top_p": [1.0, 0.5],
    "repetition_penalty": [1.0],
    "max_tokens": [1, 4, 16],
    "min_tokens": [0, 1],
    "priority": [0, 3, 4],
    "logprobs": [0, 5, 21],
    "role": ["user", "system", "tool"],
    "model": ["", "fake"],
    "request_id": ["", "", "one", "two"],
    "ids": [0, 1, 255, 256],
    "stop": ["a", "END"],
    "stop_token_ids": [1, 2],
}
_WORKER: dict[str, list[Any]] = {
    "request_id": ["fuzz-0", "fuzz-1", "fuzz-2"],
    "transfer_id": ["fuzz-x0", "fuzz-x1"],
    "epoch": [1, 2, 3],
    "tokens": [0, 1, 255],
    "num_prompt_tokens": [1, 2, 3],
    "mode": [1, 2, 3],
    "max_tokens": [1, 4, 16],
    "temperature": [0.0, 1.0],
    "top_p": [1.0],
    "repetition_penalty": [1.0],
    "deadline_ms": [100, 1000],
    "control": ["127.0.0.1:1", "nowhere", "127.0.0.1:99999", "unix:/dev/null"],
    "endpoint": ["", "[" * 1000, '{"host":"127.0.0.1","port":1,"uds":"u","incarnation":1,"token":"00"}'],
    "worker_id": ["decode-0", "prefill-0", "stranger"],
    "sender": ["decode-0", "prefill-0", "stranger"],
    "incarnation": [1, 2],
    "source_incarnation": [1],
    "target_incarnation": [1],
    "role": ["decode", "prefill", "mixed"],
    "block_size": [16],
    "num_tokens": [1, 3, 20],
}
ROUTER_METHODS = (
    Method(path="/tandem.v1.Inference/Generate", request=inference_pb2.GenerateRequest, weight=10, answers=True,
           known=_SAMPLING),
    Method(path="/tandem.v1.Inference/Attach", request=inference_pb2.AttachRequest, weight=2, answers=True,
           known=_SAMPLING),
    Method(path="/tandem.v1.Inference/Cancel", request=inference_pb2.CancelRequest, weight=2, known=_SAMPLING),
    Method(path="/tandem.v1.Inference/Tokenize", request=inference_pb2.TokenizeRequest, weight=3, known=_SAMPLING),
    Method(path="/tandem.v1.Inference/ListModels", request=inference_pb2.ListModelsRequest),
    Method(path="/tandem.v1.Admin/Status", request=admin_pb2.StatusRequest),
    Method(path="/tandem.v1.Admin/Migrate", request=admin_pb2.MigrateRequest, weight=2, known=_SAMPLING),
    Method(path="/tandem.v1.Admin/Drain", request=admin_pb2.DrainRequest, weight=2, answers=True),
    Method(path="/tandem.v1.Registry/Register", request=worker_pb2.RegisterRequest, weight=3, known=_WORKER),
    Method(path="/tandem.v1.Registry/Heartbeat", request=worker_pb2.HeartbeatRequest, weight=2, known=_WORKER),
    Method(path="/grpc.health.v1.Health/Check", request=health_pb2.HealthCheckRequest),
)  # fmt: skip
WORKER_METHODS = (
    Method(path="/tandem.v1.Worker/Connect", request=worker_pb2.RouterMessage, weight=8, streams=True, answers=True,
           known=_WORKER),
    Method(path="/tandem.v1.Transfer/Exchange", request=worker_pb2.TransferMessage, weight=8, streams=True,
           answers=True, known=_WORKER),
)  # fmt: skip


class Caller:
    """Makes calls from one seed, several at once."""

    def __init__(self, seed: int, router: str, workers: Sequence[Peer]) -> None:
        self._random = random.Random(seed)
        self._channels: dict[str, Any] = {"": grpc.aio.insecure_channel(router, options=CHANNEL)}
        self._workers = list(workers)
        for worker in workers:
            self._channels[worker.name] = grpc.aio.insecure_channel(worker.address, options=CHANNEL)
        self._session = seed << 32
        self.ended: Counter[str] = Counter()

    async def run(self, num: int) -> None:
        """`num` calls."""
        left = iter(range(num))

        async def some() -> None:
            for _ in left:
                await self._call()

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(AT_ONCE):
                    tasks.create_task(some())
        finally:
            for channel in self._channels.values():
                await channel.close(None)

    async def _call(self) -> None:
        methods = [*ROUTER_METHODS, *(WORKER_METHODS if self._workers else ())]
        method = self._random.choices(methods, [each.weight for each in methods])[0]
        worker = self._random.choice(self._workers) if method in WORKER_METHODS else None
        draws = Draws(self._random.randbytes(INPUT_BYTES))
        messages = self._messages(method, draws)
        try:
            async with asyncio.timeout(HANG_S):
                code = await self._one(method, worker, draws, messages)
        except TimeoutError:
            raise AssertionError(f"{method.path} hangs: {_shown(messages)}") from None
        self.ended[f"{method.path.rpartition('.')[2]} {code.name}"] += 1
        if code in BUGS:
            raise AssertionError(f"{method.path} ended with {code.name}: {_shown(messages)}")

    def _messages(self, method: Method, draws: Draws) -> list[bytes]:
        found = []
        if method.path.endswith("Connect") and draws.byte() < 240:
            self._session += 1
            hello = worker_pb2.RouterHello(router_id="fuzz", session=self._session)
            found.append(worker_pb2.RouterMessage(hello=hello).SerializeToString())
        for _ in range(1 + draws.below(4) if method.streams else 1):
            message: Any = method.request()
            fill(message, draws, method.known)
            if isinstance(message, worker_pb2.RouterMessage) and message.WhichOneof("kind") == "assign":
                _make_whole(message.assign)
            if isinstance(message, inference_pb2.GenerateRequest) and draws.byte() < 160:
                _ask_well(message, draws)
            for name in ("worker", "worker_id") if not method.streams else ():
                if name in message.DESCRIPTOR.fields_by_name and getattr(message, name):
                    setattr(message, name, STRANGER)
            data = message.SerializeToString()
            found.append(damage(data, draws) if draws.chance(40) else data)
        return found

    async def _one(self, method: Method, worker: Peer | None, draws: Draws, messages: list[bytes]) -> grpc.StatusCode:
        channel = self._channels["" if worker is None else worker.name]
        metadata: list[tuple[str, str]] = [] if worker is None or draws.byte() > 248 else [*worker.shown]
        if method.path.endswith("Exchange") and worker is not None:
            wanted = worker.incarnation if draws.byte() < 224 else draws.whole(64)
            metadata.append((INCARNATION_KEY, str(wanted)))
        cut = draws.chance(128 if method.streams or method.answers else 16)
        deadline_s = None if draws.byte() < 224 else 0.001 * (1 + draws.below(100))
        call: Any
        if method.streams:
            call = channel.stream_stream(method.path)(metadata=metadata, timeout=deadline_s)
            for message in messages:
                try:
                    await call.write(message)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    break  # it has ended: how, is seen below
            else:
                if not cut:
                    with suppress(ExecuteBatchError):  # it ended just now, which grpc.aio has no name for
                        await call.done_writing()
        elif method.answers:
            call = channel.unary_stream(method.path)(messages[0], metadata=metadata, timeout=deadline_s)
        else:
            call = channel.unary_unary(method.path)(messages[0], metadata=metadata, timeout=deadline_s)
        if cut:
            try:
                async with asyncio.timeout(READ_S):
                    await self._read(call, method, draws.below(4))
            except TimeoutError:
                pass
            call.cancel()
        else:
            await self._read(call, method, 1 << 30)
        code: grpc.StatusCode = await call.code()
        if code is grpc.StatusCode.INTERNAL and str(await call.details()).startswith(OWN_INTERNAL):
            return grpc.StatusCode.CANCELLED
        return code

    async def _read(self, call: Any, method: Method, num: int) -> None:
        try:
            if not method.answers:
                await call
                return
            answers: AsyncIterator[bytes] = aiter(call)
            for _ in range(num):
                if await anext(answers, None) is None:
                    break
        except (grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError):
            if not call.done():
                raise  # this task itself is cancelled


def _make_whole(assign: Any) -> None:
    """Often whole enough to be taken."""
    if not assign.tokens:
        assign.tokens.extend([1, 2, 3])
    assign.num_prompt_tokens = min(max(1, assign.num_prompt_tokens), len(assign.tokens))
    assign.sampling.SetInParent()
    if assign.mode == worker_pb2.ASSIGN_MODE_LOCAL:
        assign.ClearField("peer")
        assign.ClearField("transfer_id")


def _ask_well(request: Any, draws: Draws) -> None:
    """A request that is served."""
    request.Clear()
    if draws.below(2):
        request.text = "x" * (1 + draws.below(60))
    else:
        request.tokens.ids.extend([draws.byte() for _ in range(1 + draws.below(300))])
    request.sampling.max_tokens = 1 + draws.below(40)
    request.sampling.seed = draws.whole(64)
    request.priority = draws.below(4)
    request.return_token_ids = bool(draws.below(2))
    if draws.chance(64):
        request.sampling.logprobs = draws.below(21)


def _shown(messages: list[bytes]) -> list[str]:
    return [message.hex()[:2000] for message in messages]


async def calls(num: int, seed: int, router: str, workers: Sequence[Peer] = ()) -> Counter[str]:
    """`num` calls from `seed`; how many of which method ended with which code."""
    caller = Caller(seed, router, workers)
    await caller.run(num)
    return caller.ended


def main(arguments: list[str]) -> None:
    """Prints the counts."""
    num, seed, router, *workers = arguments
    peers = []
    shown = ClusterAccess(token=os.environ.get(TOKEN, "")).metadata
    for each in workers:
        name, _, rest = each.partition("=")
        address, _, incarnation = rest.partition("@")
        peers.append(Peer(name=name, address=address, incarnation=int(incarnation), shown=shown))
    print(json.dumps(asyncio.run(calls(int(num), int(seed), router, peers))))


if __name__ == "__main__":
    main(sys.argv[1:])
