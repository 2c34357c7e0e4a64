"""Containers of the rendered chart as processes of this machine: only paths, addresses and ports are this machine's."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import httpx
import psutil
from chart import Object, Release
from grpc_health.v1 import health_pb2, health_pb2_grpc

BIN = Path(sys.executable).parent
END_S = 60.0


class Substitutions:
    """What stands for what of a pod. The longest goes first, so that no path is taken for the beginning of another."""

    def __init__(self, pairs: Mapping[str, str]) -> None:
        self._pairs = sorted(pairs.items(), key=lambda each: -len(each[0]))

    def __call__(self, text: str) -> str:
        """The text for this machine."""
        for there, ours in self._pairs:
            text = text.replace(there, ours)
        return text


def variables(container: Object, release: Release, pod_ip: str) -> dict[str, str]:
    """The container's environment as Kubernetes makes it of secrets, fields and other variables."""
    found: dict[str, str] = {}
    for each in container.get("env", []):
        value = each.get("value", "")
        source = each.get("valueFrom", {})
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == "status.podIP"
            value = pod_ip
        elif "secretKeyRef" in source:
            secret = release.named("Secret", source["secretKeyRef"]["name"])
            value = base64.b64decode(secret["data"][source["secretKeyRef"]["key"]]).decode()
        found[each["name"]] = _expanded(value, found)
    return found


def _expanded(text: str, known: Mapping[str, str]) -> str:
    """Kubernetes' own $(NAME), which it leaves alone where there is no such variable."""
    return re.sub(r"\$\((\w+)\)", lambda match: known.get(match[1], match[0]), text)


class Container:
    """One container of a pod, and the commands that the kubelet runs in it. `words` stands for its command."""

    def __init__(
        self,
        container: Object,
        *,
        release: Release,
        pod_ip: str,
        ours: Substitutions,
        log: Path,
        words: Sequence[str] | None = None,
    ) -> None:
        self.container = container
        self._ours = ours
        self._ip = pod_ip
        self.log = log
        given = variables(container, release, pod_ip)
        self._words = [ours(_expanded(word, given)) for word in (words or container.get("command", []))]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TANDEM_", "RAY_"))}
        path = f"{BIN}:{inherited.get('PATH', '')}"
        self._environ = {**inherited, **{key: ours(value) for key, value in given.items()}, "PATH": path}
        self.process: psutil.Popen | None = None

    def run(self, words: Sequence[str] | None = None, *, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Runs the container's own command to its end, or another one in it."""
        chosen = self._words if words is None else [self._ours(word) for word in words]
        return subprocess.run(
            chosen, env=self._environ, capture_output=True, text=True, timeout=timeout_s, start_new_session=True
        )

    def start(self) -> Container:
        """Starts the container's own command."""
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                self._words, env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def pre_stop(self, *, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """What the kubelet runs before it stops the container."""
        return self.run(self.container["lifecycle"]["preStop"]["exec"]["command"], timeout_s=timeout_s)

    def passes(self, probe: str) -> bool:
        """Whether it does now, as the kubelet asks."""
        asked = self.container[probe]
        timeout_s = asked.get("timeoutSeconds", 1) + 4  # this machine may be much busier than a node
        if "exec" in asked:
            return self.run(asked["exec"]["command"], timeout_s=timeout_s).returncode == 0
        port = self._port(asked.get("grpc", asked.get("httpGet"))["port"])
        if "grpc" in asked:
            with grpc.insecure_channel(f"{self._ip}:{port}") as channel:
                try:
                    answer = health_pb2_grpc.HealthStub(channel).Check(
                        health_pb2.HealthCheckRequest(), timeout=timeout_s
                    )
                except grpc.RpcError:
                    return False
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        try:
            url = f"{asked['httpGet']['scheme'].lower()}://{self._ip}:{port}{asked['httpGet']['path']}"
            return 200 <= httpx.get(url, timeout=timeout_s, verify=False).status_code < 400
        except httpx.HTTPError:
            return False

    def _port(self, named: str | int) -> int:
        ports = {each["name"]: each["containerPort"] for each in self.container["ports"]}
        return int(self._ours(str(ports.get(named, named))))

    def wait_until_passes(self, probe: str, timeout_s: float) -> None:
        """Asks as often as it takes. Fails when the process ends, or the time is over."""
        until_s = time.monotonic() + timeout_s
        while not self.passes(probe):
            assert self.process is not None
            assert self.process.poll() is None, f"it ended:\n{self.log.read_text()[-4000:]}"
            assert time.monotonic() < until_s, f"{probe} never passed:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.2)

    def stop(self, timeout_s: float = END_S) -> int:
        """SIGTERM, as the kubelet sends it after preStop; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return int(self.process.wait(timeout_s))

    def __enter__(self) -> Container:
        return self.start() if self.process is None else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever is left of it goes."""
        if self.process is None or not self.process.is_running():
            return
        left = self.process.children(recursive=True)
        for each in [self.process, *left]:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs([self.process, *left], timeout=10)


def ray_start(group: Object, *, head: bool, address: str = "") -> list[str]:
    """The command that KubeRay makes of a group's parameters."""
    params: dict[str, Any] = dict(group["rayStartParams"])
    if not head:
        params["address"] = address
    flags = [f"--{key}" if value == "true" else f"--{key}={value}" for key, value in params.items()]
    return ["ray", "start", *(["--head"] if head else []), *flags]
