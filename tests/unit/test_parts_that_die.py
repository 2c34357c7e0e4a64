"""Parts and a supervisor, when one of them dies or stands still: ends are told, and nobody waits for the other."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest

from cluster import router_process
from cluster.pool_events import PoolsAlive, RayUp, from_line
from cluster.pools_child import PoolsChild, PoolsEnded
from cluster.pools_process import _speaker
from cluster.router_child import RouterChild, RouterEnded, RouterSaid

BEAT = '{"event": "beat"}'


def died_saying(text: str) -> subprocess.Popen[str]:
    """A process that says this, and is gone."""
    script = f"import sys; sys.stdout.write({text!r})"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("last", ["", '{"event": "worker", "reason": "a long st'])
def test_a_router_that_is_killed_in_the_middle_of_a_word_has_ended(last: str) -> None:
    """Else nobody would ever start it again. A word of more than a page of memory does not go in one piece."""
    child: Any = object.__new__(RouterChild)
    child.router, child.generation, child.process = "router-0", 3, died_saying(f"{BEAT}\n{last}")
    heard: list[Any] = []
    child._listen(heard.append)
    assert heard == [
        RouterSaid(router="router-0", generation=3, event="beat", fields={}),
        RouterEnded(router="router-0", generation=3, code=0),
    ]
    child.process.stdout.close()


def test_a_holder_of_ray_that_is_killed_in_the_middle_of_a_word_has_ended() -> None:
    child: Any = object.__new__(PoolsChild)
    child.process = died_saying('{"event": "RayUp"')
    heard: list[Any] = []
    child._listen(heard.append)
    assert heard == [PoolsEnded(code=0)]
    child.process.stdout.close()


# ---- a supervisor that stands still ----------------------------------------------------------------------------------

BEATS = 10_000  # many more than a pipe holds


@pytest.mark.timeout(20)
def test_a_router_goes_round_though_nobody_reads_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tandem serve` can be stopped with Ctrl-Z for hours: no stream may notice when its pipe has filled."""
    reads, writes = os.pipe()

    async def turns() -> None:
        late: list[float] = []
        beating = asyncio.create_task(router_process.Supervisor().beat(late.append))
        for _ in range(BEATS):
            await asyncio.sleep(0)
        beating.cancel()
        assert len(late) > 100
        assert min(late) >= 0

    monkeypatch.setattr(router_process, "BEAT_S", 0.0)
    with os.fdopen(writes, "w") as out, os.fdopen(reads) as supervisor:
        monkeypatch.setattr(sys, "stdout", out)
        asyncio.run(turns())
        router_process.Supervisor().say("worker", id="decode-0")
        out.close()
        *beats, last = supervisor.read().splitlines()
    assert set(beats) == {BEAT}
    assert len(beats) > 100
    assert last == '{"event": "worker", "id": "decode-0"}'


@pytest.mark.timeout(20)
def test_who_holds_ray_looks_after_it_though_nobody_reads_what_it_says() -> None:
    reads, writes = os.pipe()
    with os.fdopen(writes, "w") as out, os.fdopen(reads) as supervisor:
        say = _speaker(out)
        for _ in range(BEATS):
            say(PoolsAlive())
        say(RayUp())
        out.close()
        *beats, last = supervisor.read().splitlines()
    assert len(beats) > 100
    assert from_line(last) == RayUp()
