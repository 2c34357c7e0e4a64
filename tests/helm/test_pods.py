"""Every pod of the chart: who it runs as, what it may write, what it is told, how it is probed and how it ends."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chart import CASES, NAME, NAMESPACE, Object, Pod, case
from edge import saying, service_over
from starlette.routing import Route
from typer.main import get_command

from cli.main import app
from cluster.config import ENVIRONMENT_PREFIX, OTHER_VARIABLES, ClusterConfig, load
from cluster.draining import DEADLINE_MS_MAX
from router.http_door import OPEN_PAGES
from router.openai_api import build_app

pytestmark = pytest.mark.helm

EVERY_CASE = pytest.mark.parametrize("name", CASES)
KNOWN = {key.upper() for key in ClusterConfig.model_fields} | OTHER_VARIABLES
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# Where processes of a part write; everything else is read-only.
WRITES = {
    "serve": {"/tmp", "/run/tandem", "/var/cache/tandem", "/dev/shm"},
    "ray-node": {"/tmp", "/run/tandem", "/var/cache/tandem", "/dev/shm"},
    "ray-head": {"/tmp", "/dev/shm"},
    "ray-worker": {"/tmp", "/run/tandem", "/var/cache/tandem", "/dev/shm"},
    "room": {"/tmp", "/dev/shm"},
    "join-token": {"/run/tandem"},
    "redis": {"/data"},
    "completion": set(),
}


def pods_of(name: str) -> Iterator[tuple[Pod, Object]]:
    """Each container with its pod."""
    for pod in case(name).pods():
        for container in pod.containers():
            yield pod, container


def env_of(container: Object) -> dict[str, str]:
    """Variables; those from elsewhere by where they are from."""
    return {each["name"]: each.get("value", json.dumps(each.get("valueFrom"))) for each in container.get("env", [])}


@EVERY_CASE
def test_nobody_is_root_or_can_become_it(name: str) -> None:
    for pod, container in pods_of(name):
        around, own = pod.spec["securityContext"], container["securityContext"]
        assert around["runAsNonRoot"]
        assert around["runAsUser"] > 0
        assert around["runAsGroup"] > 0
        assert around["seccompProfile"] == own["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["runAsNonRoot"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)


@EVERY_CASE
def test_pods_get_no_token_and_no_variables_of_other_services(name: str) -> None:
    """A Service named tandem in the namespace would give them TANDEM_PORT=tcp://..., which is a setting."""
    for pod in case(name).pods():
        assert pod.spec["enableServiceLinks"] is False
        scaled_head = pod.part == "ray-head" and name == "autoscaling"
        assert pod.spec["automountServiceAccountToken"] is scaled_head


@EVERY_CASE
def test_what_is_written_has_a_volume(name: str) -> None:
    for pod, container in pods_of(name):
        volumes = {each["name"]: each for each in pod.spec.get("volumes", [])}
        claimed = {"data"} if pod.part == "redis" else set()
        mounts = {each["mountPath"]: each for each in container.get("volumeMounts", [])}
        assert {each["name"] for each in mounts.values()} <= set(volumes) | claimed
        writable = {
            path
            for path, each in mounts.items()
            if not each.get("readOnly") and (each["name"] in claimed or "emptyDir" in volumes[each["name"]])
        }
        assert WRITES[container["name"]] <= writable, container["name"]
        for path, each in mounts.items():
            if path not in writable:
                assert each.get("readOnly"), f"{container['name']} may write to {path}"
        home = env_of(container).get("HOME")
        assert home is None or home in writable or container["name"] == "completion"


@EVERY_CASE
def test_no_volume_is_idle(name: str) -> None:
    for pod in case(name).pods():
        mounted = {each["name"] for container in pod.containers() for each in container.get("volumeMounts", [])}
        assert {each["name"] for each in pod.spec.get("volumes", [])} <= mounted, pod.owner


@EVERY_CASE
def test_every_variable_is_a_setting(name: str) -> None:
    for _, container in pods_of(name):
        for variable in env_of(container):
            if variable.startswith(ENVIRONMENT_PREFIX):
                assert variable.removeprefix(ENVIRONMENT_PREFIX) in KNOWN, variable
        names = [each["name"] for each in container.get("env", [])]
        assert len(names) == len(set(names))


@EVERY_CASE
def test_serve_takes_its_settings(name: str, tmp_path: Path) -> None:
    """The file and the variables of the container, read by the very code that reads them there."""
    release = case(name)
    file = tmp_path / "tandem.yaml"
    file.write_text(release.settings)
    environ = env_of(release.pod("serve").container("serve"))
    assert environ.pop("TANDEM_CONFIG") == "/etc/tandem/tandem.yaml"
    environ = {key: value for key, value in environ.items() if key.startswith(ENVIRONMENT_PREFIX)}
    environ["TANDEM_HOST"] = "10.0.0.5"
    if name.startswith("another Redis"):
        environ["TANDEM_REDIS"] = "rediss://:secret@redis.example.org:6379/0"
    config = load({}, environ, file).config
    assert config.host == "10.0.0.5"
    assert bool(config.redis) == (name != "no Redis")
    assert (config.port, config.grpc_port) == (8000, 50051)
    assert str(config.run_dir).startswith("/run/tandem/")
    values = CASES[name]
    assert config.decode == values.get("workers", {}).get("decode", {}).get("replicas", 2)
    assert config.scheme == ("https" if "tls" in values else "http")
    assert (config.tls_client_ca is not None) == ("clientCaSecret" in values.get("tls", {}))
    assert (config.api_keys is not None) == ("auth" in values and "apiKeysSecret" in values["auth"])
    for key, value in values.get("settings", {}).items():
        assert getattr(config, key) == value
    mounts = {each["mountPath"] for each in release.pod("serve").container("serve")["volumeMounts"]}
    for path in (config.api_keys, config.tls_cert, config.tls_key, config.tls_ca, config.tls_client_ca):
        assert path is None or str(path.parent) in mounts
    for pod in release.pods():
        if pod.part == "ray-worker":  # workers read their own files at the same paths
            own = {each["mountPath"] for each in pod.container("ray-worker")["volumeMounts"]}
            assert config.tls_cert is None or str(config.tls_cert.parent) in own
            assert "models" not in json.dumps(values) or "/models" in own


def commands_of(container: Object) -> list[list[str]]:
    """Every command line of a container, its probes and hooks included; a shell's script as its commands."""
    asked = [container.get("command")]
    asked += [container.get(probe, {}).get("exec", {}).get("command") for probe in PROBES]
    asked.append(container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command"))
    found = []
    for words in filter(None, asked):
        if words[:2] == ["/bin/sh", "-c"]:
            found += [shlex.split(part) for part in re.split(r"[;|\n]", words[2]) if part.strip()]
        else:
            found.append(words)
    return [words[1:] if words[0] == "exec" else words for words in found]


def check_words(words: list[str]) -> None:
    """Raises a click error when the command line does not have such a verb or flag, or lacks one that it needs."""
    command: Any
    if words[0] == "tandem":
        command = get_command(app)
    else:
        from ray.scripts.scripts import cli as command
    rest = words[1:]
    context = command.make_context(words[0], list(rest), resilient_parsing=False)
    while hasattr(context.command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


@EVERY_CASE
def test_every_command_exists_with_its_flags(name: str) -> None:
    seen = set()
    for _, container in pods_of(name):
        for words in commands_of(container):
            if words[0] in ("tandem", "ray") and tuple(words) not in seen:
                seen.add(tuple(words))
                check_words(words)
            else:
                assert words[0] in ("tandem", "ray", "install", "curl", "redis-server", "redis-cli", "grep",
                                    "$(cat", "requirepass", "SETTINGS"), words  # fmt: skip
    assert {words[1] for words in seen if words[0] == "tandem"} == {"serve", "pod"}


@pytest.mark.parametrize(
    "words",
    [
        ["tandem", "serv"], ["tandem", "serve", "--hots", "x"], ["tandem", "pod", "idle", "--withi", "3"],
        ["tandem", "pod", "leave", "--host", "h"], ["ray", "start", "--no-such-flag"],
    ],
)  # fmt: skip
def test_a_wrong_command_is_found(words: list[str]) -> None:
    import click
    from typer.exceptions import TyperException  # typer has a click of its own

    with pytest.raises((click.ClickException, TyperException)):
        check_words(words)


@EVERY_CASE
def test_ray_is_started_with_flags_that_it_has(name: str) -> None:
    from ray.scripts.scripts import start

    flags = {option.removeprefix("--") for each in start.params for option in each.opts}
    [cluster] = case(name).of("RayCluster")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        assert set(group["rayStartParams"]) <= flags
        assert group["rayStartParams"]["block"] == "true"
    assert groups[0]["rayStartParams"]["num-cpus"] == "0", "no worker may be placed on the head"
    assert all(group["rayStartParams"]["num-cpus"] == "1" for group in groups[1:])


def probed(container: Object) -> dict[str, Object]:
    return {probe: container[probe] for probe in PROBES if probe in container}


@EVERY_CASE
def test_every_page_that_is_probed_exists_and_needs_no_key(name: str) -> None:
    routes = {route.path for route in build_app(service_over(saying("x"))).routes if isinstance(route, Route)}
    asked = set()
    for pod, container in pods_of(name):
        for probe in probed(container).values():
            if "httpGet" in probe:
                asked.add(probe["httpGet"]["path"])
                assert probe["httpGet"]["port"] in pod.ports
                assert probe["httpGet"]["scheme"] == ("HTTPS" if "tls" in CASES[name] else "HTTP")
            elif "grpc" in probe:
                assert probe["grpc"]["port"] in pod.ports.values()
            elif container["name"] == "serve":
                url = shlex.split(probe["exec"]["command"][2])[-1]
                host, _, path = url.removeprefix("https://").partition("/")
                assert host == "llm.example.org:8000"
                asked.add(f"/{path}")
    assert asked == {"/ready", "/live"}
    assert asked <= routes & OPEN_PAGES
    for monitor in case(name).of("ServiceMonitor"):
        assert {each["path"] for each in monitor["spec"]["endpoints"]} == {"/metrics"}
        assert "/metrics" in {getattr(route, "path", "") for route in build_app(service_over(saying("x"))).routes}


@EVERY_CASE
def test_probes_mean_something(name: str) -> None:
    for pod, container in pods_of(name):
        if container["name"] in ("join-token", "room", "completion"):
            continue  # they run to their end
        probes = probed(container)
        assert "livenessProbe" in probes, container["name"]
        start, live = probes["startupProbe"], probes["livenessProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 300
        assert 30 <= live["periodSeconds"] * live["failureThreshold"] <= 120
        assert live["failureThreshold"] > 1
        if pod.part == "serve" and container["name"] == "serve":
            config = load({}, {}, _file(name)).config
            assert start["periodSeconds"] * start["failureThreshold"] > config.start_timeout_s, "serve says it better"
            assert "/ready" in json.dumps(probes["readinessProbe"])
            assert "/live" in json.dumps(live)


def _file(name: str) -> Path:
    from tempfile import mkdtemp

    path = Path(mkdtemp()) / "tandem.yaml"
    settings = case(name).settings
    path.write_text("\n".join(line for line in settings.splitlines() if not line.startswith("routers:")))
    return path


def flags_of(words: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in itertools.pairwise(words) if flag.startswith("--")}


@EVERY_CASE
def test_pods_are_given_the_time_that_their_end_takes(name: str) -> None:
    release = case(name)
    serve = release.pod("serve")
    [words] = [each for each in commands_of(serve.container("serve")) if "idle" in each]
    told = flags_of(words)
    config = load({}, {}, _file(name)).config
    routers_s, workers_s, ray_s, killing_s = config.stop_timeout_s, config.stop_timeout_s, 10, 7
    needed_s = float(told["--settle"]) + float(told["--within"]) + routers_s + workers_s + ray_s + killing_s
    assert serve.spec["terminationGracePeriodSeconds"] >= needed_s
    drain_s = CASES[name].get("serve", {}).get("drainSeconds", 120)
    assert float(told["--within"]) == drain_s
    for pod in release.pods():
        if pod.part == "ray-worker":
            [words] = [each for each in commands_of(pod.container("ray-worker")) if "leave" in each]
            told = flags_of(words)
            assert float(told["--within"]) == drain_s
            assert drain_s * 1000 <= DEADLINE_MS_MAX
            assert pod.spec["terminationGracePeriodSeconds"] > drain_s + 5
            service = release.named("Service", f"{NAME}-pods")
            assert told["--routers"] == f"{service['metadata']['name']}.{NAMESPACE}.svc:50051"
            assert service["spec"]["publishNotReadyAddresses"], "a serve pod that is not ready still has workers"


@EVERY_CASE
def test_whoever_asks_the_routers_has_what_they_ask_for(name: str) -> None:
    """Certificates and keys: of the drain, of the probes, of the scrape, of `helm test`."""
    values, release = CASES[name], case(name)
    keys, tls = "auth" in values and "apiKeysSecret" in values["auth"], values.get("tls", {})
    worker = release.pod("ray-worker").container("ray-worker")
    drain = worker["lifecycle"]["preStop"]["exec"]["command"][2]
    test = [pod.container("completion") for pod in release.pods() if pod.part == "test"]
    for container in (worker, *test):
        assert ("TANDEM_API_KEY" in env_of(container)) == keys
    assert ("--tls-ca" in drain) == bool(tls)
    assert ("--tls-cert" in drain) == ("clientSecret" in tls)
    for monitor in release.of("ServiceMonitor"):
        [endpoint] = monitor["spec"]["endpoints"]
        assert ("authorization" in endpoint) == keys
        assert (endpoint.get("scheme") == "https") == bool(tls)
        assert ("keySecret" in endpoint.get("tlsConfig", {})) == ("clientSecret" in tls)
    for container in test:
        script = container["command"][2]
        assert ("--cacert" in script, "--cert" in script, "Authorization" in script) == (
            bool(tls), "clientSecret" in tls, keys,
        )  # fmt: skip


@EVERY_CASE
def test_no_secret_is_on_a_command_line(name: str) -> None:
    for _, container in pods_of(name):
        secrets = {each["name"] for each in container.get("env", []) if "secretKeyRef" in each.get("valueFrom", {})}
        for words in commands_of(container):
            if words[0] in ("requirepass", "curl"):  # within a here-document; of `helm test`, whose pod has one process
                continue
            assert not [
                secret for secret in secrets for word in words if f"${secret}" in word or f"$({secret})" in word
            ]


@EVERY_CASE
def test_every_container_says_what_it_takes(name: str) -> None:
    for _, container in pods_of(name):
        assert container["resources"]["limits"], container["name"]
    assert len(list(pods_of(name))) >= 6
