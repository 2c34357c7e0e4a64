"""The clients of a world: each reads one answer over as many calls as it takes, as tandem/client.py does.

Connections break, clients leave, two of them read the same request, or send the same idempotency key at once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.fake_runner import expected_tokens
from router.answer import Piece
from router.metrics import Api
from router.service import Ask
from router.validation import SamplingFields
from simulator.network import Stream
from simulator.router import VirtualRouter, spelled
from tandem.errors import TandemError, Unavailable
from tandem.request import FinishReason, RequestId, Sampling
from tandem.resuming import Attach, Begin, Resuming

if TYPE_CHECKING:
    from simulator.world import World

CLIENTS = "clients"  # all of them are on one side of a partition
RESUME_S = 30.0
SHARED_MAX, OWN_MAX = 20, 20  # tokens of a prompt
PROMPT_MAX = SHARED_MAX + OWN_MAX

Said = tuple[RequestId, Piece] | TandemError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a client asks for, and the answer that it must get."""

    ask: Ask
    sampling: Sampling
    answer: tuple[int, ...]  # up to the stop string, if there is one
    finish: FinishReason

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(self.ask.prompts[0])

    @property
    def salt(self) -> bytes:
        """Of its prefix hashes."""
        return self.ask.caller.cache_salt(self.ask.cache_salt)


class _Call:
    """One connection between a client and a router, and the call on it."""

    def __init__(self, world: World, client: Client, router: VirtualRouter) -> None:
        self.router = router
        self._world = world
        self._client = client
        self._task: asyncio.Task[None] | None = None
        self._broken = False
        delay_ms = world.options.delay_max_ms
        ask, call = client.next_call()
        self.up: Stream[None] = Stream(
            world.schedule,
            world.choices,
            delay_max_ms=delay_ms,
            arrive=lambda _: router.serve(ask, call, self._say, self._started),
        )
        self.down: Stream[Said] = Stream(
            world.schedule, world.choices, delay_max_ms=delay_ms, arrive=lambda said: client.hear(self, said)
        )
        self.hold()
        self.up.send(None)

    def hold(self) -> None:
        self._world.hold(self.up, CLIENTS, self.router.name)
        self._world.hold(self.down, self.router.name, CLIENTS)

    def _say(self, said: Said) -> None:
        if self.router.alive:
            self.down.send(said)

    def _started(self, task: asyncio.Task[None]) -> None:
        self._task = task
        if self._broken:
            task.cancel()

    def hang_up(self) -> None:
        """Nothing passes any more; the router notices in its own time."""
        self.up.cut()
        self.down.cut()

        def noticed() -> None:
            self._broken = True
            if self._task is not None:
                self.router.loop.do(self._task.cancel)

        self._world.later(noticed, 20)


class Client:
    """One reader of one answer."""

    def __init__(self, world: World, number: int, wish: Wish) -> None:
        self.number = number
        self.wish = wish
        self.call: _Call | None = None
        self.ended = False
        self._world = world
        self._request_id = RequestId(wish.ask.request_id)
        self._resuming = Resuming(resume_s=RESUME_S)
        world.checks.readers.comes(number, wish, healthy=world.healed)
        self._dial()

    def next_call(self) -> tuple[Ask, Begin | Attach]:
        return replace(self.wish.ask, request_id=self._request_id), self._resuming.next_call()

    def hear(self, call: _Call, said: Said) -> None:
        """Something came on the call."""
        if self.ended or call is not self.call:
            return
        if isinstance(said, TandemError):
            self._failed(said, said=True)
        elif said is None:
            self._end(TandemError("the stream ended without a finish"))
        else:
            self._request_id, piece = said
            num, finished = len(piece.tokens), piece.finish is not None
            if self._resuming.heard(piece.index, num, finished=finished):
                self._world.checks.readers.heard(self.number, piece)
                self._world.movers.delivered(self._request_id)
            if self._resuming.finished:
                self._end(None)

    def broken(self) -> None:
        """The connection breaks, and the client notices in its own time."""
        call = self.call
        if call is None or self.ended:
            return
        call.hang_up()

        def noticed() -> None:
            if self.call is call and not self.ended:
                self._failed(Unavailable("the connection broke"), said=False)

        self._world.later(noticed, 20)

    def leave(self, *, politely: bool) -> None:
        """It goes for good: it cancels, at whichever router, or is just not there any more."""
        if self.ended:
            return
        world = self._world
        world.checks.readers.leaves(self.number)
        self._close()
        router = world.any_router(CLIENTS)
        if politely and router is not None:
            request_id = self._request_id
            world.later(lambda: router.cancel(request_id), 1)

    def _dial(self) -> None:
        """Any router answers at their one address."""
        if self.ended:
            return
        router = self._world.any_router(CLIENTS)
        if router is None:
            self._failed(Unavailable("no router is there"), said=False)
        else:
            self.call = _Call(self._world, self, router)

    def _failed(self, error: TandemError, *, said: bool) -> None:
        if self.call is not None:
            self.call.hang_up()
            self.call = None
        try:
            pause_s = self._resuming.failed(self._now_s(), error, said=said)
        except TandemError as last:
            self._end(last)
            return
        self._world.schedule.after(round(pause_s * 1000), self._dial)

    def _end(self, error: TandemError | None) -> None:
        self._close()
        self._world.checks.readers.ended(self.number, error)
        how = "all of it" if error is None else f"{type(error).__name__}: {error}"
        self._world.tell(f"client {self.number} of {self._request_id} ends with {how}")

    def _close(self) -> None:
        self.ended = True
        if self.call is not None:
            self.call.hang_up()
            self.call = None

    def _now_s(self) -> float:
        return self._world.schedule.now_ms / 1000


class Clients:
    """All clients of a world."""

    def __init__(self, world: World) -> None:
        self.all: list[Client] = []
        self.num_requests = 0
        self._world = world

    def hold(self) -> None:
        """Lets the calls stall that cross the partition."""
        for each in self.all:
            if each.call is not None:
                each.call.hold()

    def router_died(self, router: VirtualRouter) -> None:
        for each in self.all:
            if each.call is not None and each.call.router is router:
                each.broken()

    def submit(self) -> None:
        """A client comes, perhaps with another one that wants the same."""
        world, choices, options = self._world, self._world.choices, self._world.options
        self.num_requests += 1
        wish = self._wish()
        world.checks.submitted(RequestId(wish.ask.request_id), wish.prompt, wish.sampling, wish.salt)
        self._come(wish)
        if world.healed:
            return
        if choices.chance(options.twins):
            twin = wish
            if choices.choose(2):
                twin = replace(wish, ask=replace(wish.ask, request_id=f"{wish.ask.request_id}-twin"))
                world.checks.submitted(RequestId(twin.ask.request_id), wish.prompt, wish.sampling, wish.salt)
            world.schedule.after(choices.choose(2) * choices.choose(20), lambda: self._come(twin))
        if choices.chance(options.second_readers):
            world.schedule.after(choices.choose(1_000), lambda: self._come(wish))

    def _come(self, wish: Wish) -> None:
        world, choices = self._world, self._world.choices
        client = Client(world, len(self.all), wish)
        self.all.append(client)
        if choices.chance(world.options.client_leaves) and not world.healed:
            politely = bool(choices.choose(2))
            world.schedule.after(choices.choose(500), lambda: client.leave(politely=politely))

    def _wish(self) -> Wish:
        """Prompts begin alike, so that there are prefixes to share."""
        world, choices, options = self._world, self._world.choices, self._world.options
        number = self.num_requests
        shared = [100 * choices.choose(2) + each for each in range(4 * choices.choose(1 + SHARED_MAX // 4))]
        own = [1_000 * number + each for each in range(1 + choices.choose(OWN_MAX))]
        prompt = (*shared, *own)
        sampled = choices.choose(2)
        room = options.num_blocks * world.block_size - len(prompt)  # of a pool: it could never end else
        seed = choices.choose(1_000) * sampled
        most = min(2 + choices.choose(options.answer_tokens_max), room)
        sampling = Sampling(temperature=float(sampled), seed=seed, max_tokens=most, ignore_eos=True)
        answer = tuple(expected_tokens(prompt, sampling, most, world.vocab_size))
        finish, stops = FinishReason.LENGTH, []
        if choices.chance(options.stops):
            stop = answer[choices.choose(most)]
            stops, finish = [spelled(stop)], FinishReason.STOP
            answer = answer[: answer.index(stop) + 1]
        ask = Ask(
            api=Api.GRPC,
            request_id=f"r{number}",
            prompts=[prompt],
            fields=SamplingFields(temperature=float(sampled), seed=seed, max_tokens=most, ignore_eos=True, stop=stops),
            priority=max(0, choices.choose(6) - 3),
            idempotency_key=f"key-{number}",
            cache_salt="" if number % 8 else "another tenant's",
            resume_ms=round(RESUME_S * 1000),
            form={"token_ids": True},
        )
        world.tell(f"r{number}: {len(prompt)} tokens, then {len(answer)} ({finish})")
        return Wish(ask=ask, sampling=sampling, answer=answer, finish=finish)
