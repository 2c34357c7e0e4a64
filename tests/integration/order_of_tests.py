"""Whose turn it is, among the processes of one test run: tests that share the machine, and one that has it alone."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Waits until nobody has the machine alone; with `alone`, until nobody else has a turn, and lets nobody in.

    All of a run name the same folder. Who waits to be alone stands in the door, so that those who come later wait.
    """
    with open(folder / "door", "a") as door, open(folder / "room", "a") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        yield
