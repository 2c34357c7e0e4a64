"""What the router process sees to before it serves: its open files, and HTTP's share of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.router_process import OPEN_FILES, limits_within
from router.http_connection import HttpLimits

SHOW = """
import resource, sys
from cluster.router_process import raise_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
print(raise_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "now"), [(200, 600, 600), (600, 600, 600)])
def test_the_limit_on_open_files_is_raised_as_far_as_it_may(soft: int, hard: int, now: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOW, str(soft), str(hard)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == [str(now), str(now), str(hard)]


def test_http_leaves_half_of_the_open_files_to_the_workers() -> None:
    assert limits_within(1024).connections_max == 512
    assert limits_within(OPEN_FILES).connections_max == HttpLimits().connections_max
