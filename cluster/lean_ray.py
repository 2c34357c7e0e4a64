"""A local Ray without those of its parts that nobody asks here: autoscaler, log monitor and API server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray._private.node import Node

# Each starts an interpreter, of 80 MB and a second of work, that polls for as long as the cluster lives.
UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")


@contextmanager
def without_unused_parts() -> Iterator[None]:
    """While it is open, `ray.init` starts none of them: it has no settings for them, so its methods are set aside.

    One that a Ray does not have by that name is started as that Ray sees fit.
    """
    kept = {name: getattr(Node, name) for name in UNUSED if hasattr(Node, name)}
    for name in kept:
        setattr(Node, name, _nothing)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


def _nothing(node: Node, **_: object) -> None:
    pass
