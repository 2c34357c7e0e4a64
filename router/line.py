"""The line of requests that wait for a place: by priority, then first come first served; each wait has a bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from router.config import RouterConfig
from router.placement import NoPlacement, Why
from router.request import Request, RequestState
from tandem.errors import InvalidRequest, Overloaded, TandemError, Unavailable

LEFT_KEPT = 32
ENDED_KEPT = 64  # in the line, at most so many beside as many as are in flight


class Line:
    """Who needs much memory is not overtaken for ever: what cannot be placed now holds up what comes after it.

    Only higher priorities overtake; who is overtaken until its wait is over is told so.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._waiting: deque[Request] = deque()
        self.blocked: NoPlacement | None = None  # why the first one cannot be placed
        self._no_workers_since_ms = 0
        self._blocked_since_ms = 0
        self._left_ms: deque[int] = deque(maxlen=LEFT_KEPT)  # when the last ones were placed

    def append(self, request: Request) -> None:
        """Behind all of its priority."""
        at = len(self._waiting)
        while at and self._waiting[at - 1].new.priority < request.new.priority:
            at -= 1
        self._waiting.insert(at, request)

    def appendleft(self, request: Request) -> None:
        """For who has waited before: ahead of all of its priority."""
        at = 0
        while at < len(self._waiting) and self._waiting[at].new.priority > request.new.priority:
            at += 1
        self._waiting.insert(at, request)

    def __len__(self) -> int:
        """Who stands here, those that ended meanwhile included."""
        return len(self._waiting)

    def tidy(self, num_alive: int) -> None:
        """Lets go of who ended while it waited, when they could be most: whoever comes and goes must not pile up."""
        if len(self._waiting) > 2 * num_alive + ENDED_KEPT:
            self._waiting = deque(each for each in self._waiting if each.state is RequestState.ADMITTED)

    def advance(self, now_ms: int, place: Callable[[Request], NoPlacement | None]) -> None:
        """Lets `place` take the first ones; it says why it did not, unless that ended the request."""
        held: list[Request] = []
        blocked: NoPlacement | None = None
        while self._waiting and blocked is None:
            request = self._waiting.popleft()
            if request.state is not RequestState.ADMITTED:
                continue  # ended while it waited
            if request.not_before_ms <= now_ms:
                blocked = place(request)
                if blocked is None:
                    self._left_ms.append(now_ms)
            if blocked is not None or request.not_before_ms > now_ms:
                held.append(request)
        self._waiting.extendleft(reversed(held))
        if blocked is not None and blocked.why is Why.NO_WORKERS and not self.lacks_workers:
            self._no_workers_since_ms = now_ms
        if blocked is not None and self.blocked is None:
            self._blocked_since_ms = now_ms
        self.blocked = blocked

    def wait_ms(self, now_ms: int) -> float:
        """How long one more at its end may expect to wait, by how fast it moves; 0: it does not stand."""
        if self.blocked is None:
            return 0.0
        stands_ms = float(now_ms - self._blocked_since_ms)
        if len(self._left_ms) < 2:
            return stands_ms
        span_ms = max(self._left_ms[-1] - self._left_ms[0], now_ms - self._left_ms[-1])
        return max(stands_ms / max(1, len(self._left_ms)), len(self._waiting) * span_ms / (len(self._left_ms) - 1))

    @property
    def lacks_workers(self) -> bool:
        """Whether no worker at all is ready, as far as was tried."""
        return self.blocked is not None and self.blocked.why is Why.NO_WORKERS

    def due_ms(self, request: Request) -> int:
        """When a waiting request has waited too long."""
        if self.lacks_workers:
            return max(request.stage_since_ms, self._no_workers_since_ms) + self._config.workers_wait_ms
        return request.stage_since_ms + self._config.queue_wait_ms

    def overdue(self, now_ms: int, request: Request) -> TandemError:
        """What a request is told that has waited too long."""
        why = "its turn did not come" if self.blocked is None else self.blocked.reason
        message = f"waited {now_ms - request.stage_since_ms} ms: {why}"
        message += f"; before that: {request.last_failure}" if request.last_failure else ""
        if self.lacks_workers:
            return Unavailable(message)
        return Overloaded(message, retry_after_ms=self._config.workers_wait_ms)

    @staticmethod
    def hopeless(request: Request, found: NoPlacement) -> TandemError | None:
        """What a request is told that need not wait since no place will do, or may not since it is a canary."""
        if request.new.canary is not None:
            full = found.why is Why.NO_MEMORY
            return Overloaded(found.reason, retry_after_ms=0) if full else Unavailable(found.reason)
        return InvalidRequest("prompt", found.reason) if found.why is Why.NEVER_FITS else None
