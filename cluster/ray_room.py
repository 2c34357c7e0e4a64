"""Waits until a Ray cluster has room for some workers. Where it can grow by itself, the wait is what asks it to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.ray_session import RayError

LOOK_S = 5.0
TELL_S = 60.0


def wait_for_room(address: str, num_workers: int, *, within_s: float, say: Callable[[str], None]) -> None:
    """Returns once every worker could have a CPU. Raises RayError when that is not so within the time.

    It is reserved and given back: demand that is only counted would bring no machine.
    """
    until_s = time.monotonic() + within_s
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
        _reserve(num_workers, until_s, say)
        while (free := _free_cpus()) < num_workers and time.monotonic() < until_s:  # what was given back takes a moment
            time.sleep(0.1)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        raise RayError(f"Ray at {address}: {error}") from None
    finally:
        ray.shutdown()
    if free < num_workers:
        raise RayError(
            f"Ray at {address} has {free:g} CPUs free after {within_s:g} s, {num_workers} workers need one each"
        )


def _reserve(num_workers: int, until_s: float, say: Callable[[str], None]) -> None:
    group = placement_group([{"CPU": 1}] * num_workers, strategy="SPREAD")
    told_s = float("-inf")
    try:
        while not group.wait(LOOK_S) and time.monotonic() < until_s:
            if time.monotonic() - told_s >= TELL_S:
                told_s = time.monotonic()
                say(f"{num_workers} workers wait for machines: {_free_cpus():g} CPUs of the Ray cluster are free")
    finally:
        remove_placement_group(group)


def _free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]
