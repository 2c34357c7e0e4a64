"""Whether one more request is taken in, or told when to come again: by what is in flight, and by the targets it names.

A request with targets is refused early rather than served late (Mooncake's early rejection, algorithms.md 14 (4)). Its
times are predicted as placement predicts them, own dispatches included, so that each request taken in counts at once:
admission by the state of the last report swings between all and nothing. How far predictions were off lately turns
them into a chance to miss.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.noise import mix64
from router.config import RouterConfig
from router.line import Line
from router.placement import Ask, Forecast, Placer
from router.request import Request
from tandem.errors import Overloaded
from tandem.request import Slo, SloClass

RETRY_MIN_MS = 500
RETRY_MAX_MS = 60_000
RATIOS_KEPT = 200
RATIOS_TRUSTED = 20  # with fewer, the prediction itself counts for those that are missing
SHED_BAND = 0.2  # a sheddable request is refused for sure when it is predicted to take so much more than its target


class Ratios:
    """What the last predictions were worth: measured over predicted, the newest ones."""

    def __init__(self) -> None:
        self._kept: deque[float] = deque(maxlen=RATIOS_KEPT)

    def learn(self, predicted_ms: float, measured_ms: float) -> None:
        """A time is known that was predicted."""
        if predicted_ms > 0:
            self._kept.append(measured_ms / predicted_ms)

    def chance(self, predicted_ms: float, target_ms: float) -> float:
        """That it takes longer than the target."""
        if predicted_ms <= 0:
            return 0.0
        bound = target_ms / predicted_ms
        padding = max(0, RATIOS_TRUSTED - len(self._kept))
        over = sum(each > bound for each in self._kept) + padding * (bound < 1)
        return over / (len(self._kept) + padding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed:
    """Why a request would miss a target. `after_ms`: when it would not, as far as that can be seen."""

    reason: str
    chance: float
    load: float  # predicted over target
    after_ms: float


class Admission:
    """The door. Bounds are on what is in flight: requests, and prompt tokens without a first token yet."""

    def __init__(self, config: RouterConfig, *, placer: Placer, line: Line, ask: Callable[[Request], Ask]) -> None:
        self._config = config
        self._placer = placer
        self._line = line
        self._ask = ask
        self._first = Ratios()
        self._ends_ms: deque[int] = deque(maxlen=RATIOS_TRUSTED)  # of answers

    def refusal(self, now_ms: int, request: Request, *, num_requests: int, queued_tokens: int) -> Overloaded | None:
        """Why the request is not taken now, with the time after which it would be; None: it is."""
        config, new_tokens = self._config, len(request.new.tokens)
        if num_requests >= config.requests_max:
            reason = f"{num_requests} requests are in flight, the limit is {config.requests_max}"
        elif queued_tokens and queued_tokens + new_tokens > config.queued_tokens_max:
            reason = (
                f"{queued_tokens} prompt tokens are queued and {new_tokens} would be added, "
                f"the limit is {config.queued_tokens_max}"
            )
        else:
            return self._by_targets(now_ms, request)
        # When the shortest queue of any worker is over there is room again.
        return _refuse(reason, self._placer.shortest_wait_ms(now_ms))

    def first_token(self, now_ms: int, request: Request) -> None:
        """A prediction can be judged."""
        if request.placement is not None and request.new.canary is None:
            self._first.learn(request.placement.predicted_ms, now_ms - request.placed_ms)

    def ended(self, now_ms: int) -> None:
        """An answer has ended: there is a row less in some batch."""
        self._ends_ms.append(now_ms)

    def _by_targets(self, now_ms: int, request: Request) -> Overloaded | None:
        slo = request.new.slo
        if slo is None or slo.slo_class is SloClass.BATCH:
            return None
        forecast = self._placer.forecast(now_ms, self._ask(request))
        if forecast is None:
            return None  # nobody can say: it waits for a worker, within the line's bounds
        missed = max(self._missed(now_ms, slo, forecast), key=lambda each: each.chance, default=None)
        if missed is None or not self._is_shed(request, slo, missed):
            return None
        return _refuse(f"{missed.reason}; {slo.slo_class.value} requests are refused then", missed.after_ms)

    def _missed(self, now_ms: int, slo: Slo, forecast: Forecast) -> Sequence[Missed]:
        found = []
        if slo.ttft_ms:
            waits_ms = self._line.wait_ms(now_ms)
            ttft_ms = waits_ms + forecast.ttft_ms
            chance = self._first.chance(ttft_ms, slo.ttft_ms)
            told = f"the first token is expected in {ttft_ms:.0f} ms, the target is {slo.ttft_ms} ms"
            found.append(Missed(reason=told, chance=chance, load=ttft_ms / slo.ttft_ms, after_ms=ttft_ms - slo.ttft_ms))
        if slo.tpot_ms:
            told = (
                f"a token is expected every {forecast.tpot_ms:.0f} ms among {forecast.num_rows} requests, "
                f"the target is {slo.tpot_ms} ms"
            )
            late = float(forecast.tpot_ms > slo.tpot_ms)
            after_ms = forecast.rows_over(slo.tpot_ms) * self._between_ends_ms(now_ms)
            found.append(Missed(reason=told, chance=late, load=forecast.tpot_ms / slo.tpot_ms, after_ms=after_ms))
        return found

    def _is_shed(self, request: Request, slo: Slo, missed: Missed) -> bool:
        """Interactive ones when they would probably be late; of sheddable ones the more the later they would be."""
        if slo.slo_class is SloClass.INTERACTIVE:
            return missed.chance > self._config.miss_chance_max
        share = min(1.0, max(0.0, (missed.load - 1.0) / SHED_BAND))
        return _drawn(request.request_id) < share

    def _between_ends_ms(self, now_ms: int) -> float:
        """Between two ends of answers, lately."""
        if len(self._ends_ms) < 2:
            return float(RETRY_MIN_MS)
        return max(self._ends_ms[-1] - self._ends_ms[0], now_ms - self._ends_ms[-1]) / (len(self._ends_ms) - 1)


def _drawn(request_id: str) -> float:
    """A number from 0 to 1 that is the request's own: asked again it is treated alike."""
    seed = 0
    for byte in request_id.encode():
        seed = mix64(seed ^ byte)
    return seed / 2**64


def _refuse(reason: str, after_ms: float) -> Overloaded:
    after_ms = after_ms if math.isfinite(after_ms) else RETRY_MAX_MS
    return Overloaded(reason, retry_after_ms=round(min(RETRY_MAX_MS, max(RETRY_MIN_MS, after_ms))))
