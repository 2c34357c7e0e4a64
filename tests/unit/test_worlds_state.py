"""A long run of worlds that is broken off goes on from what it kept, and not from another code's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import report, worlds
from simulator.run import run_many


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *, seeds: int, first: int = 0, commit: str = "abc") -> int:
    """The command's exit status."""
    monkeypatch.setattr(report, "commit", lambda: commit)
    arguments = ["--seeds", seeds, "--first", first, "--jobs", 1, "--no-write", "--state", path]
    monkeypatch.setattr(sys, "argv", ["worlds", *map(str, arguments)])
    return worlds.main()


def test_goes_on_after_a_break_and_tells_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(worlds, "PART", 2)
    path = tmp_path / "state.json"
    assert run(monkeypatch, path, seeds=2) == 0
    assert run(monkeypatch, path, seeds=5) == 0
    assert "4 of 5 worlds" in capsys.readouterr().err
    went_on, took_s = worlds.resumed(path, "abc", range(5))
    assert took_s > 0.0
    assert went_on == run_many(range(5), jobs=1, failures=5, say=lambda line: None)


def test_keeps_the_broken_ones_with_their_problem(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    total = run_many(range(1), jobs=1, failures=1, say=lambda line: None)
    total.broken.append((0, "token 3 came twice"))
    worlds.keep(path, "abc", range(1), total, 1.5)
    assert worlds.resumed(path, "abc", range(1)) == (total, 1.5)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"commit": "def"}, "ran at commit abc, and this is def"),
        ({"first": 7}, "it has 2 seeds from 0, wanted are 2 from 7"),
        ({"seeds": 1}, "it has 2 seeds from 0, wanted are 1 from 0"),
    ],
)
def test_refuses_what_it_cannot_go_on_from(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    other: dict[str, object],
    named: str,
) -> None:
    path = tmp_path / "state.json"
    assert run(monkeypatch, path, seeds=2) == 0
    assert run(monkeypatch, path, **{"seeds": 2, **other}) == 2  # type: ignore[arg-type]
    assert named in capsys.readouterr().err
