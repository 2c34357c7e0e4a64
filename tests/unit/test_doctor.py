"""`tandem doctor`: every fact that keeps a cluster from serving is found, named and answered with what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis_server import redis_server
from rich.console import Console
from typer.testing import CliRunner

from cli.doctor import to_table
from cli.main import app
from cluster.doctor import Facts, Gpu, MiB, Package, RedisFacts, Verdict, judge
from cluster.doctor_facts import packages

RUNNER = CliRunner()
TORCH = Package(name="torch", wanted="torch>=2.10", found="2.13.0", fits=True)
WELL = Facts(
    python="3.11.7", packages=(TORCH,), hidden="", compiler="/usr/bin/cc", num_cores=8, num_workers=3, threads=2,
    shortage="", shared_memory_bytes=1024 * MiB, open_files=65_536, ports={"--port": "", "--grpc-port": ""}, model="",
)  # fmt: skip
GPU = Gpu(name="H200", capability=(9, 0), free_bytes=100 << 30)


def test_nothing_is_wrong_with_a_good_machine() -> None:
    for facts in (
        WELL,
        replace(WELL, redis=RedisFacts(where="redis://h", version=(7, 2, 4)), ray_address="h:1"),
        replace(WELL, driver="570.1", cuda="12.8", nccl="2.27.3", gpus=(GPU,)),
        replace(WELL, ports={"--port": "taken", "--grpc-port": "taken"}, cluster="the cluster at port 8000"),
    ):
        findings = judge(facts)
        assert {each.verdict for each in findings} == {Verdict.OK}
        assert not any(each.advice for each in findings)


@pytest.mark.parametrize(
    ("change", "area", "verdict", "says", "advice"),
    [
        ({"packages": (replace(TORCH, found="2.1", fits=False),)}, "packages", "bad", "torch 2.1, wanted", "pip"),
        ({"packages": (replace(TORCH, found="", fits=False),)}, "packages", "bad", "torch is missing", "'torch>=2.10'"),
        ({"hidden": "hides a part"}, "packages", "bad", "hides", "pip uninstall kernels"),
        ({"compiler": ""}, "compiler", "warn", "no C compiler", "install gcc"),
        ({"threads": 4}, "cores", "warn", "8 cores for 3 workers of 4 threads", "lower --threads"),
        ({"shortage": "kv_memory: 3 workers need"}, "memory", "bad", "kv_memory", "lower"),
        ({"shared_memory_bytes": 64 * MiB}, "shared memory", "warn", "64 MiB free", "--shm-size"),
        ({"open_files": 512}, "open files", "bad", "512", "ulimit -Hn"),
        ({"open_files": 4096}, "open files", "warn", "4096", "ulimit -Hn"),
        ({"ports": {"--port": "8000 is in use"}}, "ports", "bad", "8000 is in use", "another with --port"),
        ({"model": "no such folder"}, "model", "bad", "no such folder", "--model"),
        ({"ray_address": "h:1", "ray_error": "refused"}, "ray", "bad", "h:1: refused", "ray start --head"),
        ({"redis": RedisFacts(where="r", error="refused")}, "redis", "bad", "r: refused", "start it"),
        ({"redis": RedisFacts(where="r", version=(5, 0, 1))}, "redis", "bad", "version 5.0.1", "6.2 or newer"),
        ({"redis": RedisFacts(where="r", version=(7, 0), clock_ms=-2500)}, "clocks", "warn", "2.5 s behind", "NTP"),
        ({"driver": "570.1"}, "gpu", "warn", "CPU build", "CUDA build of torch"),
        ({"driver": "570.1", "cuda": "12.8"}, "gpu", "bad", "no device", "nvidia-smi"),
        (
            {"driver": "1", "cuda": "12", "nccl": "2", "gpus": (replace(GPU, capability=(7, 5)),)},
            "gpu", "warn", "capability 7.5", "8.0 and newer",
        ),
        ({"driver": "1", "cuda": "12", "gpus": (GPU,)}, "nccl", "warn", "gloo", "NCCL"),
        ({"cluster": "c", "cluster_not_ready": "no pair"}, "cluster", "bad", "c is not ready: no pair", "status"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_to_do(
    change: dict[str, Any], area: str, verdict: str, says: str, advice: str
) -> None:
    [finding] = [each for each in judge(replace(WELL, **change)) if each.verdict is not Verdict.OK]
    assert (finding.area, finding.verdict) == (area, verdict)
    assert says in finding.says
    assert advice in finding.advice


def test_installed_packages_are_held_to_what_is_asked() -> None:
    found = {
        each.name: each for each in packages(["pytest>=1", "pytest-nowhere>=1", "numpy>=999", "ruff; extra == 'x'"])
    }
    assert list(found) == ["pytest", "pytest-nowhere", "numpy"]
    assert [each.fits for each in found.values()] == [True, False, False]
    assert found["pytest-nowhere"].found == ""


def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    with redis_server() as redis:
        asked = ["doctor", "--model", "fake", "--redis", redis.url, "--run-dir", str(tmp_path)]
        done = RUNNER.invoke(app, [*asked, "--port", "0", "--grpc-port", "0", "--json"])
        assert done.exit_code == 0, done.output
        findings = {each["area"]: each for each in json.loads(done.output)}
        assert findings["redis"]["says"].startswith(redis.url)
        assert "ms apart" in findings["clocks"]["says"]
        assert {"packages", "memory", "ports", "model", "gpu"} <= set(findings)
    done = RUNNER.invoke(app, [*asked, "--address", "127.0.0.1:1", "--port", "0"])
    assert done.exit_code == 1
    assert "Connection refused" in done.output


def test_people_see_what_to_do() -> None:
    console = Console(width=100, record=True)
    console.print(to_table(judge(replace(WELL, model="no such [folder]"))))
    shown = console.export_text()
    assert "BAD" in shown
    assert "no such [folder]" in shown
    assert "give --model a folder" in shown
