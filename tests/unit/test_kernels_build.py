"""The kernels are built once, by any number of processes at once, or replaced by torch after one warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import build

ROOT = Path(__file__).resolve().parents[2]
WORK = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
from kernels import build
from kernels.elementwise import silu_mul
from kernels.gemm import linear, pack_weight
x, w = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)
silu_mul(linear(x, pack_weight(w, exact=True)))
print(build.description(), linear(x, pack_weight(w, exact=True)).tolist() == (x @ w.T).tolist())
"""

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C kernels here")


def start(cache: Path, **variables: str) -> subprocess.Popen[str]:
    """A process that builds the kernels into `cache`, or does not, and uses them."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", WORK],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@needs_compiler
def test_processes_that_build_at_once_leave_one_object(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(3)]
    for process in processes:
        output, errors = process.communicate(timeout=100)
        assert output.split() == [build.description(), "True"], errors
        assert errors == ""
    names = sorted(path.name for path in (tmp_path / "tandem").iterdir())
    assert names[0] == "building.lock"
    assert len(names) == 2, names


def test_without_a_compiler_there_is_one_warning_and_torch_works(tmp_path: Path) -> None:
    output, errors = start(tmp_path, CC="/nonexistent").communicate(timeout=100)
    assert output.split() == ["torch", "True"]
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("WARNING tandem.kernels kernels run in torch")
    assert "/nonexistent" in lines[0]


def test_a_compiler_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal error: out of ink" >&2\nexit 1\n')
    compiler.chmod(0o755)
    output, errors = start(tmp_path, CC=str(compiler)).communicate(timeout=100)
    assert output.split() == ["torch", "True"]
    assert len(errors.splitlines()) == 1, errors
    assert "out of ink" in errors
    assert not list((tmp_path / "tandem").glob("*.so"))


@needs_compiler
def test_without_a_cache_folder_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "tandem").write_text("no folder")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    output, errors = start(tmp_path, TMPDIR=str(temporary)).communicate(timeout=100)
    assert output.split() == [build.description(), "True"], errors
    assert list(temporary.iterdir()) == []


def test_torch_can_be_asked_for(tmp_path: Path) -> None:
    output, errors = start(tmp_path, TANDEM_KERNELS="torch").communicate(timeout=100)
    assert output.split() == ["torch", "True"]
    assert errors == ""


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path, TANDEM_KERNELS="fortran")
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "TANDEM_KERNELS is 'fortran'" in errors


def test_description_names_the_sources() -> None:
    with build.using(None):
        assert build.description() == "torch"
    if build.library() is not None:
        assert build.description() == f"c-{build.source_hash()[:12]}"


def test_another_machines_level_is_refused() -> None:
    with pytest.raises(build.BuildError, match="cannot run vax"):
        build.load("vax")
