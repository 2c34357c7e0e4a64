"""Admission: bounds on what is in flight; who would miss its targets is told so early, and the rate does not swing."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_rig import D, P, Rig, request

from router.admission import RETRY_MAX_MS, Ratios
from router.config import RouterConfig
from router.events import Deliver, NewRequest, Refuse, SendToWorker, Submitted, Tick
from router.validation import check_slo
from tandem.errors import InvalidRequest, Overloaded
from tandem.messages import Assign, AssignMode, BlockCounts, CommitAsk, Role, WorkerLoad
from tandem.request import FinishReason, RequestId, Slo, SloClass, Token

PREFILL_MS = 100
WARM_UP = 40


def refused(rig: Rig, new: NewRequest) -> Overloaded | None:
    actions = rig.feed(Submitted(request=new))
    errors = [each.error for each in actions if isinstance(each, Refuse)]
    assert all(isinstance(each, Overloaded) for each in errors)
    return errors[0] if errors else None  # type: ignore[return-value]


def test_bounds_on_what_is_in_flight_say_when_to_come_again() -> None:
    rig = Rig(RouterConfig(requests_max=2, queued_tokens_max=100))
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    assert refused(rig, request("a", tuple(range(500)))) is None, "a lone one may be longer than the queue"
    much = refused(rig, request("b", tuple(range(10))))
    assert much is not None
    assert "500 prompt tokens are queued and 10 would be added, the limit is 100" in much.message
    few = Rig(RouterConfig(requests_max=2))
    few.up("d0", Role.DECODE)
    (worker,) = few.core.fleet
    few.core.fleet.charge_prefill(
        worker, RequestId("other"), now_ms=few.now_ms, predicted_ms=1e9, num_uncached=1, num_tokens=1
    )  # fmt: skip
    assert refused(few, request("a")) is None
    assert refused(few, request("b")) is None
    many = refused(few, request("c"))
    assert many is not None
    assert many.message == "2 requests are in flight, the limit is 2"
    assert many.retry_after_ms == RETRY_MAX_MS


# ---- a cluster in which a prefill takes 100 ms -----------------------------------------------------------------------


@dataclass
class Served:
    """What became of a request."""

    at_ms: int
    refused: Overloaded | None = None
    ttft_ms: int | None = None


class Serving(Rig):
    """One prefill worker, first come first served, and a decode worker that ends each answer with its second token."""

    def __init__(self) -> None:
        super().__init__()
        self.up("p0", Role.PREFILL, total_blocks=10_000)
        self.up("d0", Role.DECODE, total_blocks=10_000)
        self.requests: dict[RequestId, Served] = {}
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = count()
        self._free_ms = 0
        for number in range(WARM_UP):  # it learns what a prefill takes
            self.offer(None, f"w{number}")
            self.run_until(self.now_ms + 2 * PREFILL_MS)

    def offer(self, slo: Slo | None, name: str = "") -> Served:
        request_id = RequestId(name or f"q{next(self._numbers)}")
        served = self.requests[request_id] = Served(self.now_ms)
        salt = next(self._numbers) * 1_000
        new = replace(request(request_id, tuple(range(salt, salt + 40)), max_tokens=2), slo=slo)
        served.refused = refused(self, new)
        self._follow()
        return served

    def _follow(self) -> None:
        """Workers do what they were told."""
        for action in self.actions:
            match action:
                case SendToWorker(message=Assign(mode=AssignMode.PREFILL) as assign):
                    self._free_ms = max(self._free_ms, self.now_ms) + PREFILL_MS
                    self._at(self._free_ms, lambda assign=assign: self._prefilled(assign))  # type: ignore[misc]
                case Deliver(request_id=request_id):
                    served = self.requests[request_id]
                    served.ttft_ms = self.now_ms - served.at_ms if served.ttft_ms is None else served.ttft_ms
        self.actions.clear()

    def _at(self, at_ms: int, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (at_ms, next(self._numbers), do))

    def _prefilled(self, assign: Assign) -> None:
        first = Token(request_id=assign.request_id, epoch=assign.epoch, index=0, token_id=1)
        last = replace(first, epoch=assign.epoch + 1, index=1, finish=FinishReason.LENGTH)
        ask = CommitAsk(
            request_id=assign.request_id,
            transfer_id=assign.transfer_id,
            from_epoch=assign.epoch,
            next_index=1,
            tokens=(),
        )
        self.report(P, tokens=(first,))
        self.report(D, commit_asks=(ask,))
        self.report(D, tokens=(last,))

    def run_until(self, until_ms: int) -> None:
        while self._due and self._due[0][0] <= until_ms:
            self.now_ms, _, do = heapq.heappop(self._due)
            do()
            self._follow()
        self.now_ms = until_ms
        self.feed(Tick())
        self._follow()


def overloaded(slo: Slo, *, seed: int, seconds: int, load: float) -> list[Served]:
    """Arrivals at random times, so many times as many as can be served."""
    serving, random = Serving(), Random(seed)
    began_ms, at_ms = serving.now_ms, float(serving.now_ms)
    found = []
    while at_ms < began_ms + 1000 * seconds:
        serving.run_until(int(at_ms))
        found.append(serving.offer(slo))
        at_ms += random.expovariate(load / PREFILL_MS)
    serving.run_until(int(at_ms) + 60_000)
    return found


@pytest.mark.parametrize("load", [1.2, 2.0, 4.0])
def test_under_overload_who_is_taken_in_is_served_in_time_and_the_rate_does_not_swing(load: float) -> None:
    slo = Slo(ttft_ms=1_000)
    served = overloaded(slo, seed=1, seconds=60, load=load)
    taken = [each for each in served if each.refused is None]
    times = [each.ttft_ms for each in taken]
    assert all(each is not None for each in times)
    in_time = sum(each is not None and each <= slo.ttft_ms for each in times) / len(times)
    bins = [sum(each.at_ms // 5_000 == number for each in taken) for number in {each.at_ms // 5_000 for each in taken}]
    rates = sorted(bins)[1:-1]  # the first and the last are not whole
    print(f"load {load}: {len(taken)} of {len(served)} taken in, {in_time:.3f} in time, each 5 s {sorted(bins)}")
    assert in_time >= 0.95
    assert len(taken) >= 0.93 * 60_000 / PREFILL_MS, "and the worker does not idle"
    assert statistics.pstdev(rates) <= 0.1 * statistics.mean(rates)


def test_who_comes_again_when_it_was_told_to_is_taken_in() -> None:
    serving, slo = Serving(), Slo(ttft_ms=1_000)
    while (last := serving.offer(slo)).refused is None:
        pass
    told_ms = last.refused.retry_after_ms
    assert 0 < told_ms <= 1_000
    serving.run_until(serving.now_ms + told_ms)
    again = serving.offer(slo)
    assert again.refused is None
    serving.run_until(serving.now_ms + 5_000)
    assert again.ttft_ms is not None
    assert again.ttft_ms <= slo.ttft_ms


@given(st.integers(0, 1_000), st.sampled_from([1.5, 3.0]))
@settings(max_examples=8)
def test_a_sheddable_request_is_refused_the_more_probably_the_later_it_would_be(seed: int, load: float) -> None:
    served = overloaded(Slo(slo_class=SloClass.SHEDDABLE, ttft_ms=1_000), seed=seed, seconds=30, load=load)
    late = [each.ttft_ms / 1_000 for each in served if each.refused is None and each.ttft_ms is not None]
    assert max(late) <= 1.35, "the band, and one prefill"
    assert any(each.refused for each in served)


def test_batch_requests_wait_and_are_never_refused_for_a_target() -> None:
    served = overloaded(Slo(slo_class=SloClass.BATCH, ttft_ms=1_000), seed=3, seconds=10, load=3.0)
    assert not any(each.refused for each in served)
    assert all(each.ttft_ms is not None for each in served)


def test_requests_without_targets_are_not_judged_by_any() -> None:
    served = overloaded(Slo(slo_class=SloClass.INTERACTIVE), seed=3, seconds=10, load=3.0)
    assert not any(each.refused for each in served)


def test_a_batch_that_is_too_slow_for_a_target_is_not_joined() -> None:
    rig = Rig()
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    (worker,) = [each for each in rig.core.fleet if each.worker_id == D]
    for number in range(400):
        worker.cost.learn_step(1 + number % 16, 10.0 * (1 + number % 16))
    blocks = BlockCounts(total=100, free=90, owned=10)
    rig.report(D, load=WorkerLoad(
        running=7, waiting=0, blocks=blocks, prefill_backlog_tokens=0, steps=1, last_step_ms=70
    ))  # fmt: skip
    assert refused(rig, replace(request("a"), slo=Slo(tpot_ms=90))) is None
    late = refused(rig, replace(request("b"), slo=Slo(tpot_ms=50)))
    assert late is not None
    assert "a token is expected every 80 ms among 8 requests, the target is 50 ms" in late.message
    never = refused(rig, replace(request("c"), slo=Slo(tpot_ms=5)))
    assert never is not None
    assert never.retry_after_ms == RETRY_MAX_MS


def test_a_chance_follows_what_predictions_were_worth() -> None:
    ratios = Ratios()
    assert (ratios.chance(90, 100), ratios.chance(110, 100)) == (0.0, 1.0)
    for _ in range(200):
        ratios.learn(100, 200)
    assert ratios.chance(60, 100) == 1.0, "all took twice as long"
    for _ in range(100):
        ratios.learn(100, 50)
    assert ratios.chance(60, 100) == 0.5


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("fast", 0, 0), "slo_class: is 'fast', must be one of interactive, sheddable, batch"),
        (("", -1, 0), "ttft_target_ms: is -1"),
        (("", 0, 10**9), "tpot_target_ms: is 1000000000"),
    ],
)
def test_targets_are_checked_by_name(asked: tuple[str, int, int], message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check_slo(*asked)
    assert message in str(error.value)


def test_no_target_is_no_slo() -> None:
    assert check_slo("", 0, 0) is None
    assert check_slo("batch", 0, 0) == Slo(slo_class=SloClass.BATCH)
    assert check_slo("", 5, 0) == Slo(ttft_ms=5)
