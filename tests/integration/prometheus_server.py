"""A real Prometheus for the time of a test: it scrapes a cluster each second and has Tandem's rules."""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from served import wait_until

from cluster.processes import pick_port

RULES = Path(__file__).resolve().parents[2] / "helm/tandem/alerts.yaml"
START_S = 30.0


class Prometheus:
    """What it says. A query that it does not take is a failure with its reason."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=20)

    def ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def values(self, expr: str) -> dict[tuple[str, ...], float]:
        """The newest value of each series by its labels' values, in the order of the labels' names."""
        found = self.ask("query", query=expr)["result"]
        return {
            tuple(value for _, value in sorted(each["metric"].items())): float(each["value"][1]) for each in found
        }  # fmt: skip

    def value(self, expr: str) -> float:
        """The one value; NaN while there is none."""
        values = list(self.values(expr).values())
        assert len(values) <= 1, f"{expr} has {len(values)} series"
        return values[0] if values else math.nan

    def close(self) -> None:
        self._client.close()


@contextmanager
def prometheus(target: str, **labels: str) -> Iterator[Prometheus]:
    """One that scrapes `target` (host:port), gives its series these labels, and evaluates the rules."""
    executable = shutil.which("prometheus")
    if executable is None:
        pytest.skip("prometheus is not installed")
    with tempfile.TemporaryDirectory(prefix="tandem-prometheus-") as folder:
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {"job_name": "tandem", "static_configs": [{"targets": [target], "labels": labels}]},
            ],
        }
        Path(folder, "prometheus.yaml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{pick_port('127.0.0.1', 0, '--port')}"
        words = ("--config.file", f"{folder}/prometheus.yaml", "--storage.tsdb.path", f"{folder}/data")
        process = subprocess.Popen(
            [executable, *words, "--web.listen-address", address, "--log.level", "error"], stderr=subprocess.PIPE
        )
        asked = Prometheus(f"http://{address}")
        try:
            wait_until(lambda: process.poll() is not None or asked.ready(), START_S)
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            yield asked
        finally:
            asked.close()
            process.terminate()
            process.communicate(timeout=20)
