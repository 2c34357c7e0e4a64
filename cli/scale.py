"""`tandem scale`: gives the pools of a running cluster other sizes."""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer

from cli.completion import pool_sizes
from cli.options import DEADLINE_S, DEADLINE_S_MAX, AsJsonLines, Port, RunDir, running_cluster, whole_ms
from cli.reach import admin
from cluster.config import ConfigError
from cluster.documents import plain
from tandem.messages import Role
from tandem.near_miss import nearest
from tandem.v1 import admin_pb2 as pb

_POOL = re.compile(r"([a-z]+)=(\d{1,6})")


def scale(
    pools: Annotated[
        list[str], typer.Argument(help="such as prefill=2 decode=4", show_default=False, autocompletion=pool_sizes)
    ],
    deadline: Annotated[
        float, typer.Option(help="seconds until workers that go must be empty", min=0.001, max=DEADLINE_S_MAX)
    ] = DEADLINE_S,
    port: Port = None,
    as_json: AsJsonLines = False,
    run_dir: RunDir = None,
) -> None:
    """Start workers, or drain some and end them, until the pools have these sizes. No stream is lost.

    What has begun goes on when this command is stopped.
    """
    asked = pb.ScaleRequest(pools=sizes(pools), deadline_ms=whole_ms(deadline))
    run = running_cluster(run_dir, port)
    with admin(run) as stub:
        for progress in stub.Scale(asked):  # the router bounds each step
            print(json.dumps(plain(progress)) if as_json else sentence(progress), flush=True)


def sizes(pools: list[str]) -> list[pb.PoolSize]:
    """What the words mean. Raises ConfigError for what is no size of a pool, or said twice."""
    found: dict[str, int] = {}
    for word in pools:
        match = _POOL.fullmatch(word)
        if match is None:
            raise ConfigError(f"pools: {word!r} is not like decode=4{_meant(word)}")
        if match[1] in found:
            raise ConfigError(f"pools: {match[1]} is given twice")
        found[match[1]] = int(match[2])
    return [pb.PoolSize(role=role, num=num) for role, num in found.items()]


def _meant(word: str) -> str:
    """The nearest size of a pool, where the word has a role and a number in it, in whatever form."""
    parts = re.search(r"([A-Za-z]+)\W*(\d{1,6})|(\d{1,6})\W*([A-Za-z]+)", word)
    if parts is None:
        return ""
    role, num = nearest(parts[1] or parts[4], Role), parts[2] or parts[3]
    return f"; did you mean {role}={num}?" if role else ""


def sentence(progress: pb.ScaleProgress) -> str:
    """The progress, for people."""
    what = {
        "joining": "has started and joins",
        "ready": "is ready",
        "emptying": f"drains: {progress.requests} requests and {progress.blocks} blocks left",
        "leaving": "is empty and ends",
        "done": "is gone",
    }
    told = what.get(progress.state, f"is {progress.state}")
    return f"{progress.elapsed_ms / 1000:7.1f} s  {progress.worker} {told}"
