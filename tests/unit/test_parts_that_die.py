"""The ends of parts as their supervisor hears of them: each is told once, whatever the part was doing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cluster.pools_child import PoolsChild, PoolsEnded
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
