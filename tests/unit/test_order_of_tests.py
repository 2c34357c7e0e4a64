"""Tests that must run alone do, whatever the other processes of a run are at."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from order_of_tests import turn


def take(folder: Path, alone: bool, has: Event, give_back: Event) -> None:
    with turn(folder, alone=alone):
        has.set()
        assert give_back.wait(30)


def test_who_runs_alone_waits_for_all_and_is_not_overtaken(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    events = {name: (context.Event(), context.Event()) for name in ("first", "second", "alone", "late")}
    processes = {name: context.Process(target=take, args=(tmp_path, name == "alone", *events[name])) for name in events}

    def has(name: str, wait_s: float) -> bool:
        return events[name][0].wait(wait_s)

    try:
        for name in ("first", "second"):
            processes[name].start()
            assert has(name, 30), "who is not alone shares"
        processes["alone"].start()
        assert not has("alone", 2)
        processes["late"].start()
        assert not has("late", 2), "it would be waited for, too"
        events["first"][1].set()
        assert not has("alone", 0.5)
        events["second"][1].set()
        assert has("alone", 10)
        assert not has("late", 0.5)
        events["alone"][1].set()
        assert has("late", 10)
    finally:
        for _, give_back in events.values():
            give_back.set()
        began_s = time.monotonic()
        for process in processes.values():
            if process.pid is not None:
                process.join(max(0.1, 30 - (time.monotonic() - began_s)))
                assert process.exitcode == 0
