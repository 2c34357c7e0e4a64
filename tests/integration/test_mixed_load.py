"""Mixed load on real clusters: whatever clients ask and whenever they leave, the tokens are right and nothing leaks."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_under_test import ClusterUnderTest, unsettled
from mixed_load import Load, Mix, Outcome, requests

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

CONCURRENCY = 64
TWO_AND_TWO = ("--prefill", "2", "--decode", "2")


def run(cluster: ClusterUnderTest, mix: Mix, num: int, *, seed: int) -> tuple[Outcome, dict[str, Any]]:
    """Sends the load; what came of it, and the state once nothing is under way."""
    load = Load(url=cluster.url, grpc_address=cluster.grpc_address, concurrency=CONCURRENCY)
    outcome = asyncio.run(load.run(requests(mix, num, seed=seed)))
    assert outcome.wrong == [], f"{len(outcome.wrong)} wrong, the first: {outcome.wrong[0]}"
    assert outcome.num_completed + outcome.num_abandoned + len(outcome.errors) == num
    return outcome, cluster.settled()


def ways(document: dict[str, Any]) -> Counter[str]:
    """How many of the requests that status still shows went which way."""
    done = [request for request in document["requests"] if request["state"] == "finished"]
    return Counter(request["mode"] for request in done)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    """Two prefill and two decode workers with room enough."""
    with ClusterUnderTest(*TWO_AND_TWO, "--kv-memory", "1MiB", run_dir=tmp_path_factory.mktemp("run")) as served:
        yield served


def test_a_thousand_requests_of_which_a_third_is_abandoned(cluster: ClusterUnderTest) -> None:
    router = psutil.Process(cluster.document()["router_pid"])
    run(cluster, Mix(), 20, seed=1)
    fds_before = router.num_fds()
    outcome, document = run(cluster, Mix(), 1000, seed=2)
    assert outcome.errors == []
    assert outcome.num_abandoned > 250
    kinds = [shape.split(" n=")[0] for shape in outcome.shapes]
    assert set(kinds) == {"http", "http stream", "grpc", "grpc stream"}
    assert any("with a stop" in shape for shape in outcome.shapes)
    assert any("n=3" in shape for shape in outcome.shapes)
    assert ways(document)["prefill"] > 400  # the rest: abandoned, or prefilled where its prefix was
    assert router.num_fds() <= fds_before + 16  # kept connections may differ, a leak of one a request would not
    assert cluster.mishaps() == []
    told = cluster.status_printed()
    assert unsettled(told) == []
    assert [each["kv_blocks"] for each in told["workers"]] == [each["kv_blocks"] for each in document["workers"]]


def test_agents_and_workers_killed_under_load(cluster: ClusterUnderTest) -> None:
    load = Load(url=cluster.url, grpc_address=cluster.grpc_address, concurrency=CONCURRENCY)
    faults = [
        killing(cluster, "decode-0", "agent_pid", signal.SIGKILL),
        killing(cluster, "prefill-0", "agent_pid", signal.SIGKILL),
        killing(cluster, "decode-1", "pid", signal.SIGKILL),
        killing(cluster, "prefill-1", "pid", signal.SIGKILL),
    ]
    outcome = asyncio.run(_with_faults(load, 300, faults))
    assert outcome.wrong == [], f"{len(outcome.wrong)} wrong, the first: {outcome.wrong[0]}"
    assert outcome.errors == []  # each was placed anew, and none of them in vain
    document = cluster.settled()
    incarnations = {worker["id"]: worker["incarnation"] for worker in document["workers"]}
    assert incarnations == {"decode-0": 1, "decode-1": 2, "prefill-0": 1, "prefill-1": 2}
    assert any(request["num_replacements"] for request in document["requests"])


def test_pools_much_too_small_for_the_load(tmp_path: Path) -> None:
    # 128 blocks of 16 tokens: a few long requests fill a pool, and answers outgrow what was set aside for them.
    arguments = ("--prefill", "1", "--decode", "1", "--kv-memory", "16KiB")
    with ClusterUnderTest(*arguments, run_dir=tmp_path) as cluster:
        longer = Mix(prompt_tokens_max=60, max_tokens_min=700, max_tokens_max=900, stopped=0.0, several=0.0)
        for mix, num, seed in ((Mix(), 60, 3), (longer, 24, 4)):
            outcome, document = run(cluster, mix, num, seed=seed)
            assert outcome.errors == []
            assert outcome.num_completed > num / 2
        assert any(request["tokens_recomputed"] for request in document["requests"]), "nothing was ever preempted"
        assert cluster.mishaps() == []
        # What can never fit is refused by name, at once.
        refused = cluster.post("/v1/completions", {"prompt": [1] * 3000, "max_tokens": 1})
        assert refused.status_code == 400
        assert "3000 tokens" in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == "prompt"
        cluster.settled()


@pytest.mark.gloo
def test_over_gloo(tmp_path: Path) -> None:
    arguments = ("--prefill", "1", "--decode", "1", "--kv-memory", "1MiB", "--transport", "gloo")
    with ClusterUnderTest(*arguments, run_dir=tmp_path) as cluster:
        outcome, document = run(cluster, Mix(), 150, seed=5)
        assert outcome.errors == []
        assert ways(document)["prefill"] > 60
        assert sum(request["blocks_moved"] for request in document["requests"]) > 1000
        assert cluster.mishaps() == []


async def _with_faults(load: Load, num: int, faults: list[Callable[[], str]]) -> Outcome:
    """Lets the faults happen one by one, each once a part of the load is through."""
    wanted = requests(Mix(max_tokens_max=200, abandoned=0.2, several=0.05), num, seed=5)
    task = asyncio.create_task(load.run(wanted))
    for number, fault in enumerate(faults, start=1):
        share = num * number // (len(faults) + 1)
        while load.outcome.num_ended < share and not task.done():
            await asyncio.sleep(0.02)
        print(await asyncio.to_thread(fault))
    return await task


def killing(cluster: ClusterUnderTest, worker_id: str, part: str, number: signal.Signals) -> Callable[[], str]:
    """A fault: a signal to a worker's process or to its agent's."""

    def fault() -> str:
        worker = next(each for each in cluster.document()["workers"] if each["id"] == worker_id)
        os.kill(worker[part], number)
        return f"{number.name} to {part} of {worker_id}"

    return fault


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("part", ["agent_pid", "pid"])
def test_agents_and_workers_stopped_under_load(part: str, tmp_path: Path) -> None:
    arguments = (*TWO_AND_TWO, "--kv-memory", "1MiB", "--fake-step-ms", "5")
    with ClusterUnderTest(*arguments, run_dir=tmp_path) as cluster:
        load = Load(url=cluster.url, grpc_address=cluster.grpc_address, concurrency=CONCURRENCY)
        faults = [killing(cluster, worker_id, part, signal.SIGSTOP) for worker_id in ("decode-0", "prefill-1")]
        outcome = asyncio.run(_with_faults(load, 300, faults))
        assert outcome.wrong == [], f"{len(outcome.wrong)} wrong, the first: {outcome.wrong[0]}"
        assert outcome.errors == []
        cluster.settled(90)
