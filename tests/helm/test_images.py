"""The Dockerfile: what it makes is pinned, runs as nobody in particular, and holds what the chart's pods run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from chart import CHART, ROOT, case, needed

dockerfile_parse = needed("dockerfile_parse")

pytestmark = pytest.mark.helm

DOCKERFILE = ROOT / "Dockerfile"


def instructions() -> list[dict[str, str]]:
    with DOCKERFILE.open("rb") as file:
        parser = dockerfile_parse.DockerfileParser(fileobj=file, cache_content=True)
        return [each for each in parser.structure if each["instruction"] != "COMMENT"]


def stages() -> dict[str, list[dict[str, str]]]:
    """Instructions of each stage, with those of the stages that it builds on."""
    found: dict[str, list[dict[str, str]]] = {}
    current: list[dict[str, str]] = []
    for each in instructions():
        if each["instruction"] == "FROM":
            base, _, name = each["value"].partition(" AS ")
            current = found[name] = [*found.get(base, []), each]
        elif found:
            current.append(each)
    return found


def test_the_linter_finds_nothing() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("needs hadolint")
    done = subprocess.run([linter, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_as_the_charts_user(target: str) -> None:
    words = stages()[target]
    last = {each["instruction"]: each["value"] for each in words}
    values = yaml.safe_load((CHART / "values.yaml").read_text())["securityContext"]
    assert last["USER"] == f"{values['runAsUser']}:{values['runAsGroup']}"
    assert not [each for each in words if each["instruction"] == "ENTRYPOINT"], "commands of the chart are whole"
    installed = " ".join(each["value"] for each in words if each["instruction"] == "RUN")
    assert all(package in installed.split() for package in ("gcc", "libc6-dev", "curl"))
    copied = [each["value"] for each in words if each["instruction"] == "COPY"]
    assert copied == [f"--from=build-{target} /usr/local /usr/local"], "nothing of the building is left"


def test_whatever_pip_installs_is_pinned() -> None:
    for each in instructions():
        for command in re.split(r"&&", each["value"]) if each["instruction"] == "RUN" else []:
            if "pip install" in command:
                assert "-c constraints.txt" in command, command
    ray = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["version"] == ray.removeprefix("ray==")


def test_versions_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]
    assert f"tandem:{project['version']} " in DOCKERFILE.read_text()


def test_a_build_sees_all_packages_and_no_more() -> None:
    packages = {
        each.split(".")[0]
        for each in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    }
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert packages <= kept
    assert kept - packages == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE"}


def test_the_charts_writable_places_are_the_images() -> None:
    """What the image sets for its processes is what the chart gives them, so that either may be used alone."""
    [values] = [each["value"] for each in stages()["runtime"] if each["instruction"] == "ENV"]
    image = dict(word.split("=", 1) for word in values.split())
    serve = {each["name"]: each.get("value") for each in case("defaults").pod("serve").container("serve")["env"]}
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TANDEM_RUN_DIR", "OMP_WAIT_POLICY"):
        assert image[name] == serve[name]
