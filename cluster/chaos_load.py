"""The checking load: clients that ask the same questions over and over, and moves of their streams all the time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

import grpc

from cluster.chaos_tally import Tally
from cluster.member_access import client_options
from cluster.run_file import RunFile
from tandem.client import AsyncClient, Chunk, SamplingOptions
from tandem.errors import Overloaded, TandemError, Unavailable
from tandem.v1 import admin_pb2, admin_pb2_grpc

STREAM_TIMEOUT_S = 120.0
REFUSED_WAIT_S = 0.5
MOVE_EVERY_S = 0.2
MOVE_TIMEOUT_S = 30.0
STATUS_TIMEOUT_S = 10.0
TELL_EVERY_MS = 5_000
LONG_SHARE = 5  # one question in so many is as long as may be
NUM_PREFIXES, PREFIX_TOKENS = 3, 64  # that half of the questions begin with
SAMPLINGS: tuple[SamplingOptions, ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 1.2, "min_p": 0.02, "presence_penalty": 0.5},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The streams that check: so many clients at once, each asking one of so many questions over and over."""

    num_clients: int = 12
    num_questions: int = 24
    prompt_tokens_max: int = 384
    output_tokens_max: int = 128
    leave_percent: int = 5  # streams whose client leaves in the middle
    num_movers: int = 2  # who have running streams moved, one after the other


@dataclass(slots=True)
class Question:
    """What is asked, and the answer that it was given before anything happened."""

    prompt: list[int]
    sampling: SamplingOptions
    answer: list[int] = field(default_factory=list)


class CheckingLoad:
    """`ask_first`, then `run` until it is cancelled; `pause` lets all streams end. Tells `tally` what clients see."""

    def __init__(
        self, cluster: RunFile, *, load: Load, draw: random.Random, tally: Tally, now_ms: Callable[[], int]
    ) -> None:
        self._cluster = cluster
        self._load = load
        self._draw = draw
        self._tally = tally
        self._now_ms = now_ms
        self._questions: list[Question] = []
        self._num_streams = 0
        self._reading: set[asyncio.Task[None]] = set()
        self._going = asyncio.Event()
        self._going.set()

    async def ask_first(self, vocab_size: int, context_tokens: int, say: Callable[[str], None]) -> int:
        """Draws the questions and has each answered before anything happens; how many there are."""
        self._questions = _questions(self._draw, self._load, vocab_size, context_tokens)
        told_ms = self._now_ms()
        async with self._connected() as client:
            for number, question in enumerate(self._questions):
                if self._now_ms() - told_ms >= TELL_EVERY_MS:
                    told_ms = self._now_ms()
                    say(f"{number} of {len(self._questions)} questions answered, one after the other")
                answer = await client.generate(question.prompt, **question.sampling)
                question.answer = list(answer.token_ids)
        return len(self._questions)

    async def run(self, admin: admin_pb2_grpc.AdminStub) -> None:
        """All clients and movers, until cancelled. Raises what one of them raised."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._load.num_clients):
                group.create_task(self._client())
            for _ in range(self._load.num_movers):
                group.create_task(self._mover(admin))

    async def pause(self) -> None:
        """Returns when the streams that are open have ended; none is begun until `resume`."""
        self._going.clear()
        while self._reading:
            await asyncio.gather(*self._reading, return_exceptions=True)
            await asyncio.sleep(0)  # a client may have been about to begin one

    def resume(self) -> None:
        """Streams are begun again."""
        self._going.set()

    def leave(self) -> str:
        """Half of the clients leave at once; how many that were."""
        reading = list(self._reading)[: (len(self._reading) + 1) // 2]
        told = f"{len(reading)} of {len(self._reading)} streams"
        for each in reading:
            each.cancel()
        return told

    def _connected(self) -> AsyncClient:
        return AsyncClient(
            self._cluster.grpc_address, timeout_s=STREAM_TIMEOUT_S, **client_options(self._cluster)
        )  # fmt: skip

    # ---- one client --------------------------------------------------------------------------------------------------

    async def _client(self) -> None:
        """One stream after the other, each over a connection of its own: so routers that come get their share too."""
        while True:
            await self._going.wait()
            async with self._connected() as client:
                reading = asyncio.create_task(self._read(client, self._draw.choice(self._questions)))
                self._reading.add(reading)
                reading.add_done_callback(self._reading.discard)
                try:
                    await asyncio.wait({reading})
                finally:  # it cancels its request, for which it needs the connection
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
            if not reading.cancelled():
                reading.result()

    async def _read(self, client: AsyncClient, question: Question) -> None:
        """One stream to its end, or to where its client leaves."""
        self._num_streams += 1
        stream = self._num_streams
        leaves = self._draw.randrange(100) < self._load.leave_percent
        leave_after = self._draw.randrange(len(question.answer)) if leaves else len(question.answer) + 1
        self._tally.opened(self._now_ms(), stream, question.answer)
        try:
            answer = cast("AsyncGenerator[Chunk]", client.stream(question.prompt, **question.sampling))
            async with aclosing(answer) as chunks:
                async for chunk in chunks:
                    if chunk.token_ids:
                        self._tally.came(self._now_ms(), stream, chunk.index, chunk.token_ids)
                    if chunk.index >= leave_after:
                        raise asyncio.CancelledError
        except asyncio.CancelledError:
            self._tally.ended(self._now_ms(), stream, cancelled=True)
            raise
        except TandemError as error:
            refused = isinstance(error, Overloaded | Unavailable)
            self._tally.ended(self._now_ms(), stream, f"{error.code}: {error.message}", refused=refused)
            await asyncio.sleep(REFUSED_WAIT_S if refused else 0)
        else:
            self._tally.ended(self._now_ms(), stream)

    # ---- moves -------------------------------------------------------------------------------------------------------

    async def _mover(self, admin: admin_pb2_grpc.AdminStub) -> None:
        """Has one running stream after the other moved, so that some move is always under way."""
        draw = random.Random(self._draw.random())
        while True:
            await asyncio.sleep(MOVE_EVERY_S)
            await self._going.wait()
            try:
                status: admin_pb2.StatusResponse = await admin.Status(
                    admin_pb2.StatusRequest(), timeout=STATUS_TIMEOUT_S
                )
                running = [each.id for each in status.requests if each.state == "decoding" and not each.moving_to]
                if not running:
                    continue
                wanted = admin_pb2.MigrateRequest(request_id=draw.choice(running))
                move: admin_pb2.MoveStatus = await admin.Migrate(wanted, timeout=MOVE_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:  # no target, too soon, over: or the router is stopped
                self._tally.moved(self._now_ms(), "refused", f"{error.code().name}: {error.details()}")
                continue
            way = f"{move.request[-8:]} {getattr(move, 'from')} -> {move.to}"
            why = f": {move.error}" if move.error else f", pause {move.pause_ms} ms"
            self._tally.moved(self._now_ms(), move.outcome, f"{way}: {move.outcome}{why}")


def _questions(draw: random.Random, load: Load, vocab_size: int, context_tokens: int) -> list[Question]:
    """Short and long, half of them alike at the beginning, drawn in many ways."""
    longest = min(load.prompt_tokens_max, context_tokens // 2)
    most = min(load.output_tokens_max, context_tokens // 2 - 1)

    def tokens(num: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(num)]

    prefixes = [tokens(min(PREFIX_TOKENS, longest // 2)) for _ in range(NUM_PREFIXES)]
    questions = []
    for number in range(load.num_questions):
        begins = draw.choice(prefixes) if number % 2 else []
        room = longest - len(begins)
        num_rest = room if number % LONG_SHARE == 0 else draw.randint(1, max(1, room // 2))
        sampling: SamplingOptions = {
            **SAMPLINGS[number % len(SAMPLINGS)],
            "seed": number,
            "max_tokens": draw.randint(min(16, most), most),
            "ignore_eos": True,
        }
        questions.append(Question([*begins, *tokens(num_rest)], sampling))
    return questions
