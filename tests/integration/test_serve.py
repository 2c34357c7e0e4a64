"""`tandem serve` for real: Ray, agents, gRPC and HTTP, with the fake model, whose every token checks the whole KV."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served import Served, tandem, wait_until

from engine.fake_runner import expected_tokens
from tandem.request import Sampling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAKE = ["--model", "fake", "--kv-memory", "1MiB"]
JSON_LOGS = ["--log-format", "json"]
GREEDY = Sampling(temperature=0.0)
VOCAB_SIZE = 256


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served([*FAKE, *JSON_LOGS], run_dir=tmp_path_factory.mktemp("run")) as served:
        yield served


def test_a_request_is_disaggregated(cluster: Served) -> None:
    prompt = [number * 7 % VOCAB_SIZE for number in range(600)]
    assert cluster.greedy(prompt, 40) == expected_tokens(prompt, GREEDY, 40, VOCAB_SIZE)
    status = cluster.status_when(lambda status: status["requests"][-1]["state"] == "finished")
    request = status["requests"][-1]
    assert request["prefill_worker"] == "prefill-0"
    assert request["decode_worker"] in ("decode-0", "decode-1")
    assert request["tokens"] == 40
    assert request["tokens_recomputed"] == 0
    assert request["blocks_moved"] == request["blocks_granted"] == 38


def test_every_worker_has_an_agent_of_its_own(cluster: Served) -> None:
    workers = cluster.status()["workers"]
    assert [(worker["id"], worker["role"], worker["state"]) for worker in workers] == [
        ("decode-0", "decode", "ready"),
        ("decode-1", "decode", "ready"),
        ("prefill-0", "prefill", "ready"),
    ]
    pids = [pid for worker in workers for pid in (worker["pid"], worker["agent_pid"])]
    assert len(set(pids)) == 6
    assert set(pids) < {process.pid for process in cluster.tree()}


def test_no_part_of_ray_runs_that_nobody_asks(cluster: Served) -> None:
    words = [" ".join(process.cmdline()) for process in cluster.tree()]
    assert any("raylet" in each for each in words)
    assert not [each for each in words if "monitor.py" in each or "dashboard/dashboard.py" in each]


def test_the_schema_of_status(cluster: Served) -> None:
    cluster.complete("schema", max_tokens=3)
    status = cluster.status_printed()
    types = {
        "id": str, "role": str, "state": str, "pid": int, "agent_pid": int, "incarnation": int, "running": int,
        "waiting": int, "exact": bool, "kv_blocks": dict,
    }  # fmt: skip
    for worker in status["workers"]:
        assert {key: type(worker[key]) for key in types} == types
        blocks = worker["kv_blocks"]
        states = ("free", "cached", "owned", "exported", "granted", "quarantined")
        assert blocks["total"] == sum(blocks[state] for state in states) > 0
        assert worker["audit"] == []
    types = {
        "id": str, "state": str, "prefill_worker": str, "decode_worker": str, "tokens": int, "blocks_moved": int,
        "tokens_recomputed": int,
    }  # fmt: skip
    for request in status["requests"]:
        assert {key: type(request[key]) for key in types} == types


def test_status_for_people(cluster: Served) -> None:
    done = cluster.command("status")
    assert done.returncode == 0, done.stderr
    assert "prefill-0" in done.stdout
    assert "ready" in done.stdout


def test_bench_draws_a_picture_and_top_sees_its_requests(cluster: Served, tmp_path: Path) -> None:
    load = ["--requests", "5", "--rate", "20", "--prompt-tokens", "40", "--output-tokens", "8"]
    done = cluster.command("bench", *load, "--json", "--plot", str(tmp_path / "run.svg"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completed"] == 5
    assert (tmp_path / "run.svg").read_text().startswith("<?xml")
    done = cluster.command("top", "--once", "--json", "--interval", "0.2")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["error"] == ""
    assert 0 < seen["cluster"]["ttft_p50_ms"] <= seen["cluster"]["ttft_p95_ms"]
    assert seen["cluster"]["tpot_p50_ms"] is not None
    assert [(row["id"], row["role"]) for row in seen["workers"]] == [
        ("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "decode"),
    ]  # fmt: skip
    assert {row["tokens_written_per_s"] for row in seen["workers"]} == {0.0}, "canaries are no tokens"
    workers = cluster.status()["workers"]
    assert sum(each["tokens_read"] for each in workers) >= 5 * 20
    assert sum(each["tokens_written"] for each in workers) >= 5 * 4


def test_a_near_miss_is_named(cluster: Served) -> None:
    for arguments, told in (
        (("drain", "decode-00"), "did you mean decode-0?"),
        (("logs", "router0"), "did you mean router-0?"),
        (("scale", "decoder=2"), "did you mean decode?"),
    ):
        done = cluster.command(*arguments)
        assert done.returncode != 0
        assert told in done.stderr
        assert done.stderr.count("\n") == 1


def test_logs_are_json_and_have_no_prompt(cluster: Served) -> None:
    cluster.complete("the secret of the day", max_tokens=3)
    done = cluster.command("logs", "--json", "-n", "1000", "--level", "debug")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"router-0", "prefill-0", "decode-0", "decode-1"} <= {each["part"] for each in said}
    assert "secret of the day" not in done.stdout
    files = [path for path in cluster.run_dir.glob("*.logs/*.log") if path.stem != "ray"]
    for line in (line for path in files for line in path.read_text().splitlines()):
        assert {"time", "level", "logger", "message"} <= set(json.loads(line)), line


def test_blocks_come_back(cluster: Served) -> None:
    for number in range(4):
        cluster.complete(f"{number} " * 100, max_tokens=20)

    def idle(status: dict[str, list[dict[str, dict[str, int]]]]) -> bool:
        blocks = [worker["kv_blocks"] for worker in status["workers"]]
        return all(each["free"] + each["cached"] == each["total"] for each in blocks)

    cluster.status_when(idle)


def test_http_tells_that_it_is_ready(cluster: Served) -> None:
    assert httpx.get(f"{cluster.url}/ready").status_code == 200
    assert httpx.get(f"{cluster.url}/v1/models").json()["data"][0]["id"] == "fake"


def test_the_printed_curl_is_about_this_cluster(cluster: Served) -> None:
    [ready] = [number for number, line in enumerate(cluster.lines) if "ready" in line]
    assert cluster.lines[ready + 1].strip().startswith(f"curl -s {cluster.url}/v1/")


def test_a_second_cluster_at_the_port_is_refused(cluster: Served, tmp_path: Path) -> None:
    done = tandem("serve", *FAKE, "--port", str(cluster.port), "--run-dir", str(tmp_path))
    assert done.returncode == 1
    assert f"port {cluster.port}" in done.stdout
    assert "--port" in done.stdout
    assert cluster.complete("still here", max_tokens=2)["choices"]


def test_a_killed_worker_comes_back_under_a_new_incarnation(cluster: Served) -> None:
    before = {worker["id"]: worker for worker in cluster.status()["workers"]}
    os.kill(before["decode-0"]["pid"], signal.SIGKILL)
    cluster.wait_for(lambda line: line.startswith("decode-0 ended"), 30)
    prompt = list(range(100))
    assert cluster.greedy(prompt, 10) == expected_tokens(prompt, GREEDY, 10, VOCAB_SIZE)

    def is_back(status: dict[str, list[dict[str, object]]]) -> bool:
        [worker] = [worker for worker in status["workers"] if worker["id"] == "decode-0"]
        return worker["state"] == "ready" and worker["incarnation"] != before["decode-0"]["incarnation"]

    after = {worker["id"]: worker for worker in cluster.status_when(is_back, 60)["workers"]}
    assert after["decode-0"]["incarnation"] == 2
    assert after["decode-0"]["pid"] != before["decode-0"]["pid"]
    assert after["decode-1"]["incarnation"] == 1


def test_a_killed_router_comes_back_and_keeps_the_workers(cluster: Served) -> None:
    before = cluster.status()
    os.kill(before["router_pid"], signal.SIGKILL)
    cluster.wait_for(lambda line: line.startswith("router-0 ended"), 30)

    def answers() -> bool:
        try:
            return httpx.get(f"{cluster.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers, 30)
    everyone = cluster.status_when(lambda status: len(status["workers"]) == 3, 30)
    assert everyone["router_pid"] != before["router_pid"]
    pids = {worker["id"]: worker["pid"] for worker in before["workers"]}
    assert {worker["id"]: worker["pid"] for worker in everyone["workers"]} == pids
    prompt = list(range(50, 150))
    assert cluster.greedy(prompt, 10) == expected_tokens(prompt, GREEDY, 10, VOCAB_SIZE)


@pytest.mark.parametrize("port", ["--port", "--grpc-port"])
def test_a_port_in_use_is_named_with_its_flag(port: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        done = tandem("serve", *FAKE, "--run-dir", str(tmp_path), port, number)
    assert done.returncode == 1
    assert f"error: port {number} at 127.0.0.1" in done.stdout
    assert port in done.stdout
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/at/all"], "no such folder"),
        (["--model", "fake", "--decode", "0"], "decode: 0 workers can write tokens"),
        (["--model", "fake", "--port", "99999"], "port: 99999"),
    ],
)
def test_what_cannot_start_says_why(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = tandem("serve", *arguments, "--run-dir", str(tmp_path))
    assert done.returncode in (1, 2)
    [line] = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert message in line
    assert not list(tmp_path.glob("*.json"))


def test_a_broken_model_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    done = tandem("serve", "--model", str(folder), "--run-dir", str(tmp_path))
    assert done.returncode == 1
    assert "error:" in done.stdout
    assert str(folder) in done.stdout


def test_no_cluster(tmp_path: Path) -> None:
    for verb in ("status", "down"):
        done = tandem(verb, "--run-dir", str(tmp_path))
        assert done.returncode == 1
        assert "no cluster runs here" in done.stderr
