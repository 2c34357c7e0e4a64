"""A real Redis for the time of a test, and no such test where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.local_redis import LocalRedis, executable


@contextmanager
def redis_server() -> Iterator[LocalRedis]:
    """It is the test's own, to be stopped, killed and started again; it is empty after that."""
    try:
        executable()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with LocalRedis() as server:
        yield server
