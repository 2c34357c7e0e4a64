"""What `tandem serve` tells of its start: the cluster is ready only after every worker is up, whoever says so first."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import load
from cluster.pools import Pools, WorkerUp
from cluster.router_child import RouterSaid
from cluster.supervisor import StartFailed, StopAsked, Supervisor
from tandem.request import WorkerId

WORKERS = ("prefill-0", "decode-0")


class NoPools(Pools):
    """Pools over no Ray: nobody is watched."""

    def watch(self, up: WorkerUp) -> None:
        pass


def up(name: str) -> WorkerUp:
    return WorkerUp(worker_id=WorkerId(name), pid=7, incarnation=1, timings_ms={"model": 1200})


def ready(name: str) -> RouterSaid:
    fields: dict[str, object] = {"id": name, "state": "ready", "incarnation": 1, "exact": True, "exact_reason": ""}
    return RouterSaid(generation=0, event="worker", fields=fields)


def watched(events: list[Any], **flags: object) -> list[str]:
    """What a supervisor says while it takes these events."""
    said: list[str] = []
    config = load({"model": "fake", "prefill": 1, "decode": 1, **flags}, {}).config
    supervisor = Supervisor(config, say=said.append)
    supervisor._pools = NoPools(config, threads=1, post=supervisor._events.put)
    supervisor._router = SimpleNamespace(generation=0)  # type: ignore[assignment]
    for event in events:
        supervisor._events.put(event)
    assert supervisor._watch() == "the end"
    return said


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_ready_is_said_once_and_after_all_workers_are_up(order: tuple[int, ...]) -> None:
    events = [each(name) for name in WORKERS for each in (up, ready)]
    said = watched([*(events[index] for index in order), StopAsked(reason="the end")])
    kinds = ["up" if " up, pid 7" in line else "ready" for line in said if "Tandem is ready" in line or " up, " in line]
    assert kinds == ["up", "up", "ready"]


@pytest.mark.parametrize("kind", [up, ready])
def test_a_worker_of_which_only_one_half_is_known_is_missing(kind: Any) -> None:
    events = [up("prefill-0"), ready("prefill-0"), kind("decode-0")]
    with pytest.raises(StartFailed, match=r"not ready within start_timeout_s, 1 s: decode-0$"):
        watched(events, start_timeout_s=1)
