"""Gates and damage: what is armed holds for as long as it was said to, and not a moment longer."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import framed_socket
from kv_transfer.agent_wire import Ping
from kv_transfer.framed_socket import FramedSocket, LinkLost
from kv_transfer.gate import OPEN_SHARE, Damage, Gate


def test_a_gate_that_nobody_shut_lets_everything_pass() -> None:
    assert Gate().wait_s(0.0) == Gate().wait_s(1e9) == 0.0


@given(st.floats(0, 1e6), st.floats(0.001, 600), st.floats(0, 1.5))
def test_a_partition_lasts_as_long_as_it_was_said_to(now_s: float, for_s: float, part: float) -> None:
    gate = Gate()
    gate.shut(now_s, for_s=for_s)
    at_s = now_s + part * for_s
    assert gate.wait_s(at_s) == pytest.approx(max(0.0, now_s + for_s - at_s))


@given(st.floats(0.01, 1), st.floats(0, 20))
def test_a_slow_link_opens_once_a_period(period_s: float, after_s: float) -> None:
    gate = Gate()
    gate.shut(100.0, for_s=10.0, period_s=period_s)
    wait_s = gate.wait_s(100.0 + after_s)
    assert 0 <= wait_s <= period_s * (1 - OPEN_SHARE)
    assert after_s < 10 or not wait_s
    assert not wait_s or not gate.wait_s(100.0 + after_s + wait_s + 1e-6)


def test_passing_waits_for_the_end_and_then_costs_nothing() -> None:
    async def body() -> float:
        gate = Gate()
        await gate.passing()
        gate.shut(time.monotonic(), for_s=0.2)
        began_s = time.monotonic()
        await asyncio.wait_for(gate.passing(), 5)
        return time.monotonic() - began_s

    assert 0.19 <= asyncio.run(body()) < 4


def test_damage_comes_to_each_nth_frame_and_ends() -> None:
    damage = Damage(every=3)
    assert [damage.due() for _ in range(7)] == [False, False, True, False, False, True, False]
    assert not any(Damage().due() for _ in range(5))
    damage.arm(time.monotonic(), every=1, for_s=60)
    assert damage.due()
    damage.arm(time.monotonic() - 2, every=1, for_s=1)
    assert not damage.due()


def test_what_is_sent_into_a_partition_arrives_after_it_in_order() -> None:
    here, there = socket.socketpair()
    gate = Gate()
    source, target = FramedSocket(here, send_timeout_s=5, gate=gate), FramedSocket(there, send_timeout_s=5)
    gate.shut(time.monotonic(), for_s=1.2)
    for number in range(3):
        source.send(Ping(number=number, answer=False))  # does not wait for the end
    assert target.receive(0.1) is None
    target.send(Ping(number=9, answer=True))
    assert source.receive(0.1) is None, "nothing comes in, either"
    assert source.receive(5) == Ping(number=9, answer=True)
    assert [target.receive(5) for _ in range(3)] == [Ping(number=number, answer=False) for number in range(3)]
    source.close()
    target.close()


def test_a_slow_link_delays_and_loses_nothing() -> None:
    here, there = socket.socketpair()
    gate = Gate()
    source, target = FramedSocket(here, send_timeout_s=5, gate=gate), FramedSocket(there, send_timeout_s=5)
    gate.shut(time.monotonic(), for_s=1.0, period_s=0.1)

    def send() -> None:
        for number in range(20):
            source.send(Ping(number=number, answer=False))

    sending = threading.Thread(target=send)
    sending.start()
    assert [target.receive(5) for _ in range(20)] == [Ping(number=number, answer=False) for number in range(20)]
    sending.join(5)
    source.close()
    target.close()


def test_a_partition_holds_no_more_than_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framed_socket, "SHUT_WAIT_S", 0.0)
    monkeypatch.setattr(framed_socket, "MAX_HELD", 10)
    here, there = socket.socketpair()
    gate = Gate()
    gate.shut(time.monotonic(), for_s=60)
    source = FramedSocket(here, send_timeout_s=5, gate=gate)
    for number in range(10):
        source.send(Ping(number=number, answer=False))
    with pytest.raises(LinkLost, match="nothing more can be held"):
        source.send(Ping(number=10, answer=False))
    source.close()
    there.close()
