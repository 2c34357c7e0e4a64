"""Offers a workload to a cluster in an open loop over gRPC and notes when each token arrives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from benchmarks.figures import Outcome
from benchmarks.workload import Offered
from tandem.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

Metadata = tuple[tuple[str, str], ...]

REQUEST_DEADLINE_S = 600.0
MOVE_DEADLINE_S = 60.0


async def generate(
    stub: inference_pb2_grpc.InferenceStub,
    prompt: Sequence[int],
    *,
    output_tokens: int,
    seed: int = 0,
    temperature: float = 0.0,
    ignore_eos: bool = True,
    request_id: str = "",
    on_tokens: Callable[[int], None] | None = None,
    metadata: Metadata = (),
) -> Outcome:
    """Sends one request and returns its outcome; errors become `Outcome.error`.

    `on_tokens` hears after each message how many tokens have come. `metadata`: an API key, where one is needed.
    """
    sampling = inference_pb2.SamplingParams(
        temperature=temperature, seed=seed, max_tokens=output_tokens, ignore_eos=ignore_eos
    )
    request = inference_pb2.GenerateRequest(
        request_id=request_id,
        tokens=inference_pb2.TokenPrompt(ids=prompt),
        sampling=sampling,
        return_token_ids=True,
    )
    outcome = Outcome(sent_s=time.perf_counter(), asked_tokens=output_tokens)
    try:
        async for response in stub.Generate(request, timeout=REQUEST_DEADLINE_S, metadata=metadata):
            now = time.perf_counter()
            outcome.token_ids.extend(response.token_ids)
            outcome.token_times_s.extend([now] * len(response.token_ids))
            if on_tokens is not None:
                on_tokens(len(outcome.token_ids))
    except grpc.aio.AioRpcError as error:
        outcome.error = f"{error.code().name}: {error.details()}"
    if not outcome.error and not outcome.token_ids:
        outcome.error = "no tokens"
    return outcome


async def migrate(stub: admin_pb2_grpc.AdminStub, request_id: str, to: str = "") -> admin_pb2.MoveStatus:
    """Moves a request and returns the record of it. Raises grpc.aio.AioRpcError when that is refused."""
    asked = admin_pb2.MigrateRequest(request_id=request_id, to=to)
    move: admin_pb2.MoveStatus = await stub.Migrate(asked, timeout=MOVE_DEADLINE_S)
    return move


@dataclass(slots=True)
class Ongoing:
    """How far a workload is."""

    num_requests: int
    sent: int = 0
    ended: int = 0
    failed: int = 0
    tokens: int = 0


async def offer(
    address: str,
    offered: Sequence[Offered],
    prompts: Sequence[Sequence[int]],
    *,
    progress: Callable[[Ongoing], None] | None = None,
    dial: Callable[[str], grpc.aio.Channel] = grpc.aio.insecure_channel,
    metadata: Metadata = (),
) -> list[Outcome]:
    """Sends each request at its arrival time, whether or not earlier ones have ended, and waits for all.

    `progress` is told of each change, in one object that goes on changing.
    """
    async with dial(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        ongoing = Ongoing(len(offered))

        def tell(more_tokens: int = 0) -> None:
            ongoing.tokens += more_tokens
            if progress is not None:
                progress(ongoing)

        async def one(index: int) -> Outcome:
            await asyncio.sleep(max(0.0, offered[index].arrival_s - (time.perf_counter() - start)))
            ongoing.sent += 1
            tell()
            known = 0

            def on_tokens(num_tokens: int) -> None:
                nonlocal known
                tell(num_tokens - known)
                known = num_tokens

            outcome = await generate(
                stub,
                prompts[index],
                output_tokens=offered[index].output_tokens,
                on_tokens=on_tokens,
                metadata=metadata,
            )
            ongoing.ended += 1
            ongoing.failed += bool(outcome.error)
            tell()
            return outcome

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index)) for index in range(len(offered))]
        return [task.result() for task in tasks]
