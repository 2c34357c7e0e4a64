"""How a served cluster ends: in order, by force, with requests in flight, and on a Ray that is not its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from served import Served, alive, tandem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAKE = ["--model", "fake", "--kv-memory", "1MiB", "--decode", "1"]


@pytest.mark.parametrize("how", ["down", "SIGTERM"])
def test_nothing_is_left(how: str, tmp_path: Path) -> None:
    with Served(FAKE, run_dir=tmp_path) as served:
        served.complete("abc", max_tokens=3)
        tree = served.tree()
        assert len(tree) > 6
        if how == "down":
            done = served.command("down")
            assert done.returncode == 0, done.stderr
            assert "stopped the cluster" in done.stdout
        else:
            served.process.send_signal(signal.SIGTERM)
        assert served.ended() == 0
        assert alive(tree) == []
        assert not list(tmp_path.glob("*.json"))
        assert served.lines[-1] == "stopped"


def test_requests_in_flight_end_with_a_named_error(tmp_path: Path) -> None:
    with Served([*FAKE, "--fake-step-ms", "50"], run_dir=tmp_path) as served, ThreadPoolExecutor(1) as pool:
        tree = served.tree()
        body = {"prompt": "abc", "max_tokens": 4000}
        asked = pool.submit(httpx.post, f"{served.url}/v1/completions", json=body, timeout=60)
        served.status_when(lambda status: any(each["state"] == "decoding" for each in status["requests"]))
        served.process.send_signal(signal.SIGINT)
        answer = asked.result(60)
        assert answer.status_code >= 400
        assert "the router is stopping" in answer.json()["error"]["message"]
        assert served.ended() == 0
        assert alive(tree) == []


def test_a_second_signal_is_harder(tmp_path: Path) -> None:
    with Served(FAKE, run_dir=tmp_path) as served:
        tree = served.tree()
        served.process.send_signal(signal.SIGINT)
        served.process.send_signal(signal.SIGTERM)
        served.ended()
        assert alive(tree) == []
        assert not list(tmp_path.glob("*.json"))


def test_a_signal_while_it_starts(tmp_path: Path) -> None:
    served = Served(FAKE, run_dir=tmp_path)
    served.start()
    served.wait_for(lambda line: line.startswith("starting"), 60)
    tree = served.tree()
    served.process.send_signal(signal.SIGINT)
    assert served.ended() == 0
    assert alive(tree) == []
    assert not list(tmp_path.glob("*.json"))
    assert not [line for line in served.lines if "ready" in line]
    served.__exit__(None, None, None)


HEAD = """
import sys, tempfile, ray
with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
    here = ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20,
                    log_to_driver=False, configure_logging=False, _temp_dir=folder)
    print(here.address_info["node_ip_address"], here.address_info["address"], flush=True)
    sys.stdin.read()
    ray.shutdown()
"""


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A Ray of somebody else's, with two CPUs: the address of its machine, and its own."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    head = subprocess.Popen([sys.executable, "-c", HEAD], stdin=pipe, stdout=pipe, stderr=nowhere, text=True)
    assert head.stdout is not None
    assert head.stdin is not None
    host, address = head.stdout.readline().split()
    yield host, address
    head.stdin.close()
    head.stdout.close()
    assert head.wait(60) == 0


def test_on_a_ray_that_is_there(ray_cluster: tuple[str, str], tmp_path: Path) -> None:
    host, address = ray_cluster
    rest = ["--address", address, "--port", "0", "--grpc-port", "0", "--run-dir", str(tmp_path)]
    done = tandem("serve", *FAKE, *rest)
    assert done.returncode == 1
    assert f"host: workers on {address} cannot reach 127.0.0.1" in done.stdout
    done = tandem("serve", *FAKE, "--host", host, "--mixed", "1", *rest)
    assert done.returncode == 1
    assert "has 2 of 2 CPUs free, 3 workers need one each; lower --prefill, --decode or --mixed" in done.stdout
    with Served([*FAKE, "--host", host, "--address", address], run_dir=tmp_path) as served:
        assert served.complete("abc", max_tokens=3)["choices"]
    assert served.process.returncode == 0
