"""For a moment, what `make fuzz` does to a cluster's edges for longer: nothing breaks, and all is as before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import http_cases
import pytest
from grpc_calls import calls
from idlers import ATTACKS, Target
from siege import Siege

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(240)]

SHORT = 20  # so many times less than in full
SLOWEST_S = 10.0  # an answer meanwhile, on a machine that runs the attack, too


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    """One for all attacks."""
    with Siege(run_dir=tmp_path_factory.mktemp("run")) as siege:
        yield siege


@pytest.fixture(autouse=True)
def unharmed(cluster: Siege) -> Iterator[None]:
    """The same processes, blocks, files and memory after each."""
    cluster.before()
    yield
    cluster.after()


def test_random_messages_to_every_grpc_service(cluster: Siege) -> None:
    with cluster.asker() as asker:
        ended = asyncio.run(calls(1500, 1, cluster.grpc_address, cluster.peers()))
    assert asker.slowest_s < SLOWEST_S
    assert ended["Inference/Generate OK"] > 20, ended
    assert ended["Worker/Connect OK"] + ended["Worker/Connect CANCELLED"] > 20, ended


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_requests_made_of_the_document(cluster: Siege, path: str) -> None:
    statuses = http_cases.run(cluster.url, "POST", path, 60, 1)
    assert statuses[200] > 10
    assert statuses[400] > 10


@pytest.mark.parametrize("name", ATTACKS)
def test_clients_that_hold_on_or_do_not_listen(cluster: Siege, name: str) -> None:
    attack, num = ATTACKS[name]
    target = Target(http_port=cluster.port, grpc_port=int(cluster.grpc_address.rsplit(":", 1)[1]))
    with cluster.asker() as asker:
        asyncio.run(attack(target, num // SHORT))
    assert asker.slowest_s < SLOWEST_S
