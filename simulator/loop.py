"""An asyncio loop on the virtual clock: what one process does, until it is stopped for a while or killed."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from simulator.network import Clock, Schedule
from tandem.errors import TandemError

T = TypeVar("T")

_Call = tuple[asyncio.Handle | None, Callable[..., object], tuple[Any, ...], contextvars.Context]


class ProcessLoop:
    """Runs the very coroutines of a process, one callback at a time, with no time passing in them. It has of an
    asyncio loop what tasks, futures, sleeps and timeouts need.

    An error that no coroutine answers for comes out of the schedule's run, and so breaks the world.
    """

    def __init__(self, schedule: Schedule, clock: Clock) -> None:
        self.alive = True
        self._schedule = schedule
        self._clock = clock
        self._loop = cast(asyncio.AbstractEventLoop, self)
        self._tasks: dict[asyncio.Task[Any], None] = {}  # that have not ended
        self._late: list[_Call] | None = None  # while it is stopped: what it has still to do

    @property
    def hears(self) -> bool:
        """Whether it lives, and is not stopped."""
        return self.alive and self._late is None

    def kill(self) -> None:
        """Nothing of it happens any more."""
        self.alive = False
        for task in self._tasks:
            task.get_coro().close()  # now, and not when its memory is collected
        self._tasks.clear()

    def freeze(self) -> None:
        """It does nothing for now, as under SIGSTOP."""
        if self._late is None:
            self._late = []

    def thaw(self) -> None:
        """It goes on, with everything that came meanwhile, in order."""
        late, self._late = self._late or [], None
        for call in late:
            self._schedule.after(0, lambda call=call: self._run(call))  # type: ignore[misc]

    def do(self, callback: Callable[..., object], *args: Any) -> None:
        """Something reaches the process from outside: now, or when it goes on."""
        self._run((None, callback, args, contextvars.copy_context()))

    def _run(self, call: _Call) -> None:
        handle, callback, args, context = call
        if not self.alive or (handle is not None and handle.cancelled()):
            return
        if self._late is not None:
            self._late.append(call)
            return
        asyncio._set_running_loop(self._loop)
        try:
            context.run(callback, *args)
        finally:
            asyncio._set_running_loop(None)

    # ---- what asyncio asks of a loop -------------------------------------------------------------------------------

    def time(self) -> float:
        return self._clock.now_ms / 1000

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Of tasks that died with their process; whatever else goes wrong comes out of `_ended`."""

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer stays in the schedule, and does nothing."""

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self._loop, context)
        call = handle, callback, args, context or contextvars.copy_context()
        self._schedule.after(0, lambda: self._run(call))
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(self.time() + delay, callback, args, self._loop, context)
        call = handle, callback, args, context or contextvars.copy_context()
        self._schedule.after(max(1, round(delay * 1000)), lambda: self._run(call))
        return handle

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_later(when - self.time(), callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._loop)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        task = asyncio.Task(coro, loop=self._loop, name=name, context=context)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TandemError):
            raise error
