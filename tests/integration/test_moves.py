"""Moves and drains on real clusters: by command, under load, and refused; every stream as if nothing had happened."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_under_test import ClusterUnderTest, unsettled
from mixed_load import Load, Mix, requests
from prometheus_client.parser import text_string_to_metric_families
from served import wait_until

from engine.fake_runner import expected_tokens
from router.stages import Stage
from tandem.client import Client
from tandem.metrics import METRICS
from tandem.request import Sampling

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

LONG = 7000  # tokens: half a minute, longer than any test needs
PROMPT = [number * 5 % 256 for number in range(300)]
WORKERS = ("decode-0", "prefill-0", "decode-1", "prefill-1")
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    """Two and two, on which nothing moves that nobody asked for."""
    arguments = ("--prefill", "2", "--decode", "2", "--kv-memory", "1MiB", "--fake-step-ms", "4", "--no-rebalance")
    with ClusterUnderTest(*arguments, run_dir=tmp_path_factory.mktemp("run")) as served:
        yield served


class Answering:
    """A long answer under way, which ends when the test has seen enough of it."""

    def __init__(self, cluster: ClusterUnderTest, *, prompt: list[int] = PROMPT, num_tokens: int = LONG) -> None:
        self._expected = expected_tokens(prompt, GREEDY, num_tokens, 256)
        self._client = Client(cluster.grpc_address, timeout_s=120)
        before = {each["id"] for each in cluster.document()["requests"]}
        self._stream = self._client.stream(prompt, temperature=0.0, max_tokens=num_tokens)
        self._ids: list[int] = []
        self._enough = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.request = decoding(cluster, lambda each: each["id"] not in before)

    def _read(self) -> None:
        for piece in self._stream:
            self._ids += piece.token_ids
            if self._enough.is_set():
                break
        self._stream.close()  # type: ignore[attr-defined]  # which cancels it, while there is a client

    def end(self) -> None:
        """Waits for some more tokens; all of them are those of an undisturbed answer."""
        seen = len(self._ids)
        wait_until(lambda: len(self._ids) >= seen + 20, 30)
        self._enough.set()
        self._reader.join(30)
        assert not self._reader.is_alive()
        assert self._ids == self._expected[: len(self._ids)]
        self._client.close()

    def whole(self) -> None:
        """Waits for the last token; all of them are those of an undisturbed answer."""
        self._reader.join(120)
        assert self._ids == self._expected
        self._client.close()


def decoding(cluster: ClusterUnderTest, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """A request that is being decoded, and has written something."""
    for _ in range(200):
        for each in cluster.document()["requests"]:
            if each["state"] == "decoding" and each["tokens"] > 2 and wanted(each):
                found: dict[str, Any] = each
                return found
        threading.Event().wait(0.05)
    raise AssertionError("nothing is being decoded")


def state(cluster: ClusterUnderTest, worker: str) -> str:
    return str(next(each["state"] for each in cluster.document()["workers"] if each["id"] == worker))


def other(worker: str) -> str:
    return {"decode-0": "decode-1", "decode-1": "decode-0"}[worker]


def test_a_request_is_moved_by_command_to_and_fro(cluster: ClusterUnderTest) -> None:
    answering = Answering(cluster)
    request_id, home = answering.request["id"], answering.request["decode_worker"]
    for place in (other(home), home):
        done = cluster.command("migrate", request_id[-8:], "--to", place, "--json")
        assert done.returncode == 0, done.stderr
        move = json.loads(done.stdout)
        assert (move["request"], move["from"], move["to"]) == (request_id, other(place), place)
        assert (move["outcome"], move["reason"], move["error"]) == ("moved", "operator", "")
        assert move["blocks"] + move["blocks_reused"] > 300 // 16
        assert move["rounds"] >= 1
        assert move["bytes"] > 0
    done = cluster.command("migrate", request_id)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{request_id} moved from {home} to {other(home)}: ")
    answering.end()
    document = cluster.settled()
    [request] = [each for each in document["requests"] if each["id"] == request_id]
    assert (request["num_moves"], request["num_replacements"]) == (3, 0)
    moves = [each for each in document["moves"] if each["request"] == request_id]
    assert [each["outcome"] for each in moves] == ["moved"] * 3
    shown = cluster.command("status").stdout
    assert "operator" in shown
    assert cluster.mishaps() == []


def test_a_moved_request_explains_itself(cluster: ClusterUnderTest) -> None:
    answering = Answering(cluster, prompt=[number * 7 % 256 for number in range(300)])  # that nobody has cached
    request_id, home = answering.request["id"], answering.request["decode_worker"]
    source = answering.request["prefill_worker"]
    assert cluster.command("migrate", request_id).returncode == 0
    answering.end()
    cluster.settled()
    done = cluster.command("explain", request_id[-8:], "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["request"], record["router"]) == (request_id, "router-0")

    stages = {each["name"]: each["ms"] for each in record["stages"]}
    assert list(stages) == [stage.value for stage in Stage]
    assert sum(stages.values()) == pytest.approx(record["ttft_ms"])
    assert stages["prefill"] >= 3, "a step of the fake model sleeps for 4 ms"
    assert stages["retry"] == 0
    assert stages["other"] < record["ttft_ms"] / 2

    [placement] = record["placements"]
    assert (placement["mode"], placement["prefill_worker"], placement["decode_worker"]) == ("prefill", source, home)
    considered = {each["worker"]: each for each in placement["candidates"]}
    assert set(considered) == set(WORKERS)
    assert {name for name, each in considered.items() if each["chosen"]} == {source, home}
    assert considered[home]["score_ms"] <= considered[other(home)]["score_ms"]

    [move] = record["moves"]
    assert (move["from"], move["to"], move["reason"], move["outcome"]) == (home, other(home), "operator", "moved")
    assert move["bytes"] > 0
    assert move["pause_ms"] > 0
    told = [each["what"] for each in record["story"]]
    assert told[0] == "admitted"
    assert any(f"{other(home)} owns it" in each for each in told)
    shown = cluster.command("explain", request_id).stdout
    assert f"placed after {placement['at_ms']} ms on {source} -> {home}" in shown
    assert f"moved from {home} to {other(home)}" in shown

    unknown = cluster.command("explain", "nobody")
    assert unknown.returncode == 1
    assert "no request of id 'nobody' is known" in unknown.stderr


def test_every_metric_of_the_table_is_there_and_what_happened_is_counted(cluster: ClusterUnderTest) -> None:
    answering = Answering(cluster, prompt=[number * 11 % 256 for number in range(300)])
    home = answering.request["decode_worker"]
    assert cluster.command("migrate", answering.request["id"], "--to", other(home)).returncode == 0
    answering.end()
    cluster.settled()
    page = httpx.get(f"{cluster.url}/metrics", timeout=10).text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind.value
        assert family.documentation == metric.help

    def value(name: str, **labels: str) -> float:
        samples = [each for family in families.values() for each in family.samples if each.name == name]
        assert samples, name
        return sum(each.value for each in samples if labels.items() <= each.labels.items())

    assert value("tandem_router_migrations_total", reason="operator", result="moved") >= 1
    assert value("tandem_router_migration_seconds_count", phase="pause") >= 1
    assert value("tandem_router_migration_bytes_total", reason="operator") > 0
    assert value("tandem_router_handoff_seconds_count") >= 1
    assert value("tandem_router_transferred_blocks_total", how="moved") > 0
    assert value("tandem_router_ttft_stage_seconds_count", stage="prefill") >= 1
    assert value("tandem_workers", state="ready") == 4
    assert value("tandem_router_ready_pairs") >= 1
    for worker in cluster.document()["workers"]:
        assert value("tandem_worker_kv_blocks", worker=worker["id"]) == worker["kv_blocks"]["total"]
        assert value("tandem_worker_audit_findings", worker=worker["id"]) == 0


def test_what_cannot_be_moved_is_refused_in_one_sentence(cluster: ClusterUnderTest) -> None:
    answering = Answering(cluster)
    request_id, home = answering.request["id"], answering.request["decode_worker"]
    for arguments, sentence in (
        (("nothing-of-that-name",), "no request of id 'nothing-of-that-name' is known"),
        (
            (request_id, "--to", "decode-9"),
            "to: no worker of id 'decode-9' is known; there are: decode-0, decode-1, prefill-0, prefill-1; "
            "did you mean decode-1?",
        ),
        ((request_id, "--to", home), f"{request_id} cannot be moved to {home}: it is there"),
        (
            (request_id, "--to", "prefill-0"),
            f"{request_id} cannot be moved to prefill-0: that worker's role is prefill",
        ),
    ):
        done = cluster.command("migrate", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {sentence}\n")
    answering.end()
    wait_until(lambda: unsettled(cluster.document()) == [], 30)
    done = cluster.command("migrate", request_id)
    assert (done.returncode, done.stderr) == (1, f"error: {request_id} is cancelled\n")


def test_a_rolling_restart_of_every_worker_under_load(cluster: ClusterUnderTest) -> None:
    """The pools are exchanged one worker after the other: no request fails, no token differs."""
    before = {each["id"]: (each["incarnation"], each["pid"]) for each in cluster.settled()["workers"]}
    load = Load(url=cluster.url, grpc_address=cluster.grpc_address, concurrency=24)
    wanted = requests(Mix(max_tokens_min=200, max_tokens_max=500, abandoned=0.05, several=0.05), 5000, seed=11)

    async def restart_all() -> list[str]:
        told: list[str] = []
        task = asyncio.create_task(load.run(itertools.takewhile(lambda _: len(told) < len(WORKERS), wanted)))
        while load.outcome.num_ended < 10:
            await asyncio.sleep(0.05)
        for worker in WORKERS:
            ended = await asyncio.to_thread(cluster.command, "drain", worker, "--restart", "--deadline", "60")
            assert ended.returncode == 0, ended.stderr
            told.append(ended.stdout)
        await task
        return told

    told = asyncio.run(restart_all())
    outcome = load.outcome
    assert outcome.wrong == [], f"{len(outcome.wrong)} wrong, the first: {outcome.wrong[0]}"
    assert outcome.errors == []
    assert outcome.num_completed > 40
    assert all("a fresh one starts" in each and "is done; incarnation" in each for each in told)
    document = cluster.settled()
    after = {each["id"]: (each["incarnation"], each["pid"]) for each in document["workers"]}
    assert {name: incarnation for name, (incarnation, _) in after.items()} == {
        name: incarnation + 1 for name, (incarnation, _) in before.items()
    }
    assert not {pid for _, pid in before.values()} & {pid for _, pid in after.values()}
    drains = [each for each in document["moves"] if each["reason"] == "drain"]
    assert sum(each["outcome"] == "moved" for each in drains) > 0
    assert not any("started again" in line for line in cluster.lines), "a drain is no crash"
    assert cluster.mishaps() == []


def test_a_drain_that_cannot_end_is_given_up(cluster: ClusterUnderTest) -> None:
    """With nobody to go to, what runs there is not done in time: the worker takes work again."""
    assert cluster.command("drain", "decode-1").returncode == 0  # for good: see the last test
    answering = Answering(cluster)
    done = cluster.command("drain", "decode-0", "--restart", "--deadline", "1")
    assert done.returncode == 1
    assert "decode-0 still has 1 requests and " in done.stderr
    assert "no other worker that decodes is ready and has room; it takes work again" in done.stderr
    assert state(cluster, "decode-0") == "ready"
    answering.end()
    assert cluster.greedy(PROMPT, 20) == expected_tokens(PROMPT, GREEDY, 20, 256)


def test_the_last_decode_worker_is_exchanged_and_prefill_workers_serve_meanwhile(cluster: ClusterUnderTest) -> None:
    before = Answering(cluster)
    with ThreadPoolExecutor(1) as pool:
        draining = pool.submit(cluster.command, "drain", "decode-0", "--restart")
        wait_until(lambda: state(cluster, "decode-0") == "draining", 30)
        meanwhile = Answering(cluster, prompt=PROMPT[7:])
        before.end()  # it had nowhere to go
        assert draining.result().returncode == 0, draining.result().stderr
    home = meanwhile.request["decode_worker"]
    assert (meanwhile.request["mode"], home.split("-")[0]) == ("local", "prefill")
    assert state(cluster, "decode-0") == "ready"
    done = cluster.command("drain", home, "--restart")  # what it decodes goes to the new one
    assert done.returncode == 0, done.stderr
    meanwhile.end()
    [move] = [each for each in cluster.settled()["moves"] if each["request"] == meanwhile.request["id"]]
    assert (move["from"], move["to"], move["reason"], move["outcome"]) == (home, "decode-0", "drain", "moved")


def test_a_pool_shrinks_by_drains_and_says_what_cannot_be_drained(cluster: ClusterUnderTest) -> None:
    pids = {each["id"]: each["pid"] for each in cluster.document()["workers"]}
    alive = {process.pid for process in cluster.tree()}
    assert pids["decode-1"] not in alive
    done = cluster.command("drain", "prefill-1", "--json")
    assert done.returncode == 0, done.stderr
    states = [json.loads(line)["state"] for line in done.stdout.splitlines()]
    assert states[0] == "emptying"
    assert states[-1] == "done"
    workers = cluster.workers()
    assert {name: each["state"] for name, each in workers.items()} == {
        "decode-0": "ready", "decode-1": "left", "prefill-0": "ready", "prefill-1": "left",
    }  # fmt: skip
    for worker, sentence in (
        (
            "decode-7",
            "worker: no worker of id 'decode-7' is known; there are: decode-0, decode-1, prefill-0, prefill-1; "
            "did you mean decode-1?",
        ),
        ("decode-1", "decode-1 was drained and has left"),
        ("prefill-0", "prefill-0 is the last ready worker that reads prompts; drain it with --restart, or not at all"),
        ("decode-0", "decode-0 is the last ready worker that writes tokens; drain it with --restart, or not at all"),
    ):
        done = cluster.command("drain", worker)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {sentence}\n")
    assert cluster.greedy(PROMPT, 20) == expected_tokens(PROMPT, GREEDY, 20, 256)
    assert unsettled(cluster.settled()) == []
    assert cluster.mishaps() == []


def test_a_worker_that_will_run_out_of_memory_is_relieved_unasked(tmp_path: Path) -> None:
    """All requests are on one worker, since the other one was exchanged: together they will not fit there."""
    arguments = ("--prefill", "1", "--decode", "2", "--kv-memory", "64KiB", "--fake-step-ms", "6")
    with ClusterUnderTest(*arguments, run_dir=tmp_path) as cluster:  # 512 blocks
        answers = [Answering(cluster, prompt=[*PROMPT[at:], at], num_tokens=1900) for at in range(6)]
        drained = cluster.command("drain", "decode-1", "--restart")
        assert drained.returncode == 0, drained.stderr
        for each in answers:
            each.whole()
        moves = [each for each in cluster.settled()["moves"] if each["reason"] != "drain"]
        told = [(each["reason"], each["to"], each["outcome"], each["why"]) for each in moves]
        assert "decode-1" in [to for _, to, outcome, _ in told if outcome == "moved"], told
        # Where a busy machine had steps of larger batches look slow, the load was balanced before memory was short.
        assert {reason for reason, *_ in told} <= {"pressure", "balance"}, told
        assert all("decode-0 will be" in why for reason, _, _, why in told if reason == "pressure"), told
        assert cluster.mishaps() == []
