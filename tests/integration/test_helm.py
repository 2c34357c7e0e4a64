"""The chart's pods as processes of this machine: rendered commands, variables, probes and preStop hooks as they are.

KubeRay's part is played by the test: it makes `ray start` of a group's parameters, and a pod in the place of one that
went. Each pod has a loopback address of its own, and a port of its own for its raylet.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
from chart import NAME, NAMESPACE, Object, Release, render
from checked_streams import Answer
from processes import Container, Substitutions, ray_start
from served import wait_until

from benchmarks.local_cluster import free_port
from benchmarks.local_redis import executable
from cli.status import ask
from cluster.documents import plain
from cluster.run_file import find
from tandem.client import Client

pytestmark = [
    pytest.mark.helm, pytest.mark.cluster, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600),
]  # fmt: skip

UP_S = 150.0
PROMPT = [number * 7 % 256 for number in range(64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    """A release that runs. `start_worker` plays KubeRay: a pod of that group."""

    release: Release
    workers: dict[str, Container]  # by group
    serve: Container
    run_dir: Path
    http: int
    grpc_address: str
    start_worker: Callable[[str], Container]

    def document(self) -> dict[str, Any]:
        """What `tandem status --json` says in the serve pod."""
        return dict(plain(ask(find(self.run_dir, self.http))))

    def ready(self) -> set[str]:
        """Workers that are ready, with their incarnations."""
        return {
            f"{each['id']}#{each['incarnation']}" for each in self.document()["workers"] if each["state"] == "ready"
        }


class Starter:
    """Makes processes of the release's containers, each with what stands for its paths, addresses and ports."""

    def __init__(self, release: Release, folder: Path, ports: dict[str, int]) -> None:
        self.release, self.folder, self.ports = release, folder, ports
        [cluster] = release.of("RayCluster")
        self.cluster: Object = cluster
        self._addresses: dict[str, str] = {}
        self._shared = {
            f"{cluster['metadata']['name']}-head-svc.{NAMESPACE}.svc": self.ip("head"),
            f"{NAME}-redis.{NAMESPACE}.svc:6379": f"127.0.0.1:{ports['redis']}",
            f"{NAME}-pods.{NAMESPACE}.svc": self.ip("serve"),
        }

    def ip(self, pod: str) -> str:
        """The pod's address. Not 127.0.0.1, in whose place Ray puts the machine's."""
        return self._addresses.setdefault(pod, f"127.0.0.{len(self._addresses) + 2}")

    def ours(self, pod: str, **more: str) -> Substitutions:
        """What stands for what in this pod."""
        own = self.folder / pod
        places = {
            "/run/tandem": own / "run", "/var/cache/tandem": own / "cache", "/etc/tandem-join": own / "join",
            "/etc/tandem/": f"{own / 'settings'}/",
        }  # fmt: skip
        for name in ("run", "cache", "join", "settings"):
            (own / name).mkdir(parents=True, exist_ok=True)
        raylet = {str(self.ports["raylet"]): str(free_port())}
        return Substitutions({**self._shared, **{key: str(value) for key, value in places.items()}, **raylet, **more})

    def ray(self, part: str, group: Object, *, pod: str) -> Container:
        """A pod of the RayCluster, as KubeRay would start it."""
        head = part == "ray-head"
        words = ray_start(group, head=head, address=f"{self.ip('head')}:{self.ports['gcs']}")
        words += ["--node-ip-address", self.ip(pod), "--min-worker-port", "0", "--max-worker-port", "0"]
        words += ["--temp-dir", str(self.folder / "ray")] if head else []
        container = group["template"]["spec"]["containers"][0]
        made = self.make(container, self.ours(pod), pod, words=words)
        with ExitStack() as failed:
            failed.push(made.start())
            made.wait_until_passes("startupProbe", UP_S)
            failed.pop_all()
        return made

    def make(self, container: Object, ours: Substitutions, pod: str, *, words: list[str] | None = None) -> Container:
        """A container that is not started yet."""
        log = self.folder / f"{pod}-{container['name']}.log"
        return Container(container, release=self.release, pod_ip=self.ip(pod), ours=ours, log=log, words=words)


@pytest.fixture(scope="module")
def pods() -> Iterator[Pods]:
    """The release, up: Redis, Ray's head, a pod for each of two workers, and the serve pod with all its containers."""
    try:
        executable()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    ports = {name: free_port() for name in ("http", "grpc", "gcs", "raylet", "redis")}
    release = render({
        "model": {"name": "fake"},
        "serve": {
            "httpPort": ports["http"], "grpcPort": ports["grpc"], "settleSeconds": 0, "drainSeconds": 60, "routers": 1,
        },
        "ray": {"gcsPort": ports["gcs"], "nodeManagerPort": ports["raylet"]},
        "workers": {"threads": 1, "kvMemory": "1MiB", "decode": {"replicas": 1}},
        "settings": {"heartbeat_ms": 300, "fake_step_ms": 20, "max_restarts": 100},
    })  # fmt: skip
    with ExitStack() as running:
        # Not pytest's own: the paths of Ray's sockets must be short.
        folder = Path(running.enter_context(TemporaryDirectory(prefix="th-", dir="/tmp", ignore_cleanup_errors=True)))
        starter = Starter(release, folder, ports)
        spec = starter.cluster["spec"]
        groups = {each["groupName"]: each for each in spec["workerGroupSpecs"]}
        redis = release.pod("redis").container("redis")
        places = {"port 6379": f"port {ports['redis']}", "/etc/redis/": f"{folder}/", "dir /data": f"dir {folder}"}
        ours = Substitutions({**places, "redis-cli": f"redis-cli -p {ports['redis']}"})
        (folder / "redis.conf").write_text(ours(release.named("ConfigMap", f"{NAME}-redis")["data"]["redis.conf"]))
        running.enter_context(store := starter.make(redis, ours, "redis"))
        store.wait_until_passes("startupProbe", 30)
        running.push(starter.ray("ray-head", spec["headGroupSpec"], pod="head"))
        numbers = iter(range(100))

        def start_worker(group: str) -> Container:
            made = starter.ray("ray-worker", groups[group], pod=f"{group}-{next(numbers)}")
            running.push(made)
            return made

        workers = {group: start_worker(group) for group in groups}
        serve = release.pod("serve")
        ours = starter.ours("serve")
        (folder / "serve/settings/tandem.yaml").write_text(ours(release.settings))
        token = base64.b64decode(release.named("Secret", f"{NAME}-secrets")["data"]["join-token"])
        (folder / "serve/join/join-token").write_bytes(token)
        containers = {
            each["name"]: starter.make(each, ours, "serve", words=_on_this_machine(each)) for each in serve.containers()
        }
        assert containers["join-token"].run(timeout_s=10).returncode == 0
        running.enter_context(containers["ray-node"])
        containers["ray-node"].wait_until_passes("startupProbe", UP_S)
        room = containers["room"].run(timeout_s=UP_S)
        assert room.returncode == 0, room.stderr
        running.enter_context(containers["serve"])
        containers["serve"].wait_until_passes("startupProbe", UP_S)
        yield Pods(
            release=release, workers=workers, serve=containers["serve"], run_dir=folder / "serve/run/cluster",
            http=ports["http"], grpc_address=f"{starter.ip('serve')}:{ports['grpc']}",
            start_worker=start_worker,
        )  # fmt: skip


def _on_this_machine(container: Object) -> list[str] | None:
    """Nodes of one machine take no fixed ports for their workers."""
    if container["name"] != "ray-node":
        return None
    return [*container["command"], "--min-worker-port", "0", "--max-worker-port", "0"]


def test_a_release_answers_and_passes_its_probes(pods: Pods) -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert pods.serve.passes(probe)
        assert all(worker.passes(probe) for worker in pods.workers.values())
    # The first that is ready serves alone until the other one is.
    wait_until(lambda: {each.partition("#")[0] for each in pods.ready()} == {"prefill-0", "decode-0"}, UP_S)
    with Client(pods.grpc_address, timeout_s=60) as client:
        assert Answer(PROMPT, num_tokens=50).read(client) == ""
    assert "redis" in pods.document()["store"]


def test_a_pod_that_ends_is_drained_and_no_stream_notices(pods: Pods) -> None:
    """Its preStop moves everything away; a fresh worker starts where KubeRay makes room, not where it was."""
    group, leaving = next(iter(pods.workers.items()))
    assert leaving.process is not None
    inside = {process.pid for process in leaving.process.children(recursive=True)}
    [gone] = [each for each in pods.document()["workers"] if each["pid"] in inside]
    raylet = next(each for each in leaving.process.children(recursive=True) if each.name() == "raylet")
    [node] = re.findall(r"--node_id=(\w+)", " ".join(raylet.cmdline()))
    hook = list(leaving.container["lifecycle"]["preStop"]["exec"]["command"])
    assert hook[2].count("ray drain-node") == 1
    # Ray looks for the node of this machine, and finds several.
    hook[2] = hook[2].replace("ray drain-node", f"ray drain-node --node-id {node}")
    with Client(pods.grpc_address, timeout_s=120) as client, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(Answer(PROMPT, num_tokens=600).read, client)
        wait_until(lambda: any(each["state"] == "decoding" for each in pods.document()["requests"]), 20)
        fresh = pods.start_worker(group)  # as KubeRay does when a pod is marked to go
        done = leaving.run(hook, timeout_s=120)
        assert done.returncode == 0, done.stderr
        assert f"{gone['id']} is starting" in done.stderr or f"{gone['id']} is done" in done.stderr
        leaving.stop()
        wait_until(lambda: len(pods.ready()) == 2, 90)
        assert fresh.process is not None
        assert stream.result(60) == ""
    back = next(each for each in pods.document()["workers"] if each["id"] == gone["id"])
    assert back["incarnation"] > gone["incarnation"]
    assert back["pid"] not in inside


def test_a_serve_pod_ends_when_its_requests_have(pods: Pods) -> None:
    with Client(pods.grpc_address, timeout_s=60) as client, ThreadPoolExecutor(2) as pool:
        stream = pool.submit(Answer(PROMPT, num_tokens=200).read, client)
        wait_until(lambda: any(each["state"] == "decoding" for each in pods.document()["requests"]), 20)
        done = pods.serve.pre_stop(timeout_s=60)
        assert done.returncode == 0, done.stderr
        assert "1 requests run" in done.stderr
        assert stream.result(10) == "", "it ended before the hook did"
    began_s = time.monotonic()
    tree = psutil.Process(pods.serve.process.pid).children(recursive=True) if pods.serve.process else []
    assert pods.serve.stop() == 0
    grace_s = pods.release.pod("serve").spec["terminationGracePeriodSeconds"]
    assert time.monotonic() - began_s < grace_s
    assert not [each for each in tree if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
