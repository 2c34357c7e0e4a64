"""Commands of the chart's smaller containers, run as they are rendered: only paths and ports are this machine's."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chart import NAME, Object, case

from benchmarks.local_cluster import free_port
from benchmarks.local_redis import executable
from cluster.secret_files import SecretError, read_secret

pytestmark = pytest.mark.helm

PASSWORD = "xYz0123456789"
Run = Callable[..., subprocess.CompletedProcess[str]]


def here(words: list[str], paths: dict[str, str]) -> list[str]:
    """The words with each path and port put in the place of the pod's."""
    for there, ours in paths.items():
        words = [word.replace(there, ours) for word in words]
    return words


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[Object, dict[str, str], dict[str, str]]]:
    """The rendered Redis as a process: its container, environment, and what stands for what."""
    try:
        folder = Path(executable()).parent
    except FileNotFoundError as error:
        pytest.skip(str(error))
    container = case("defaults").pod("redis").container("redis")
    (tmp_path / "data").mkdir()
    port = str(free_port())
    paths = {"/etc/redis/": f"{tmp_path}/", "redis-cli": f"redis-cli -p {port}"}
    settings = case("defaults").named("ConfigMap", f"{NAME}-redis")["data"]["redis.conf"]
    [settings] = here([settings], {"/data": str(tmp_path / "data"), "port 6379": f"port {port}"})
    (tmp_path / "redis.conf").write_text(settings)
    environ = {**os.environ, "REDISCLI_AUTH": PASSWORD, "PATH": f"{folder}:{os.environ['PATH']}"}
    process = subprocess.Popen(here(container["command"], paths), env=environ, stdout=subprocess.DEVNULL)
    yield container, environ, paths
    process.terminate()  # to the server itself: the shell has given way to it
    assert process.wait(10) == 0
    assert (tmp_path / "data").iterdir()


def test_redis_answers_its_probes_and_nobody_without_the_password(
    redis: tuple[Object, dict[str, str], dict[str, str]],
) -> None:
    container, environ, paths = redis

    def asked(probe: str, **more: str) -> int:
        words = here(container[probe]["exec"]["command"], paths)
        return subprocess.run(words, env={**environ, **more}, capture_output=True, timeout=10).returncode

    until_s = time.monotonic() + 20
    while asked("startupProbe"):
        assert time.monotonic() < until_s, "it never answered"
    assert asked("readinessProbe") == asked("livenessProbe") == 0
    assert asked("livenessProbe", REDISCLI_AUTH="") != 0
    told = subprocess.run(
        here(["/bin/sh", "-c", "redis-cli config get maxmemory-policy && redis-cli config get appendonly"], paths),
        env=environ, capture_output=True, text=True, timeout=10,
    )  # fmt: skip
    assert told.stdout.split() == ["maxmemory-policy", "noeviction", "appendonly", "yes"]


def test_the_join_token_is_its_users_alone(tmp_path: Path) -> None:
    """A Secret's file may be read by the pod's group, and is refused."""
    container = case("defaults").pod("serve").container("join-token")
    (tmp_path / "tandem-join").mkdir()
    secret = tmp_path / "tandem-join" / "join-token"
    secret.write_text("abcdefghijklmnop0123456789")
    secret.chmod(0o440)
    with pytest.raises(SecretError, match="others may read it"):
        read_secret(secret)
    paths = {"/etc/tandem-join": str(secret.parent), "/run/tandem": str(tmp_path)}
    subprocess.run(here(container["command"], paths), check=True, timeout=10)
    assert read_secret(tmp_path / "join-token") == "abcdefghijklmnop0123456789"
    assert stat.S_IMODE((tmp_path / "join-token").stat().st_mode) == 0o600
    assert "join_token_file: /run/tandem/join-token" in case("defaults").settings
