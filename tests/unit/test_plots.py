"""The curves of a bench run, in the terminal and as a picture; and what is refused before the run begins."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from benchmarks.curves import BUCKETS, curves, distribution, throughput
from benchmarks.figures import Outcome, Slo
from benchmarks.plots import HEIGHT, check_picture, in_terminal, write_picture
from benchmarks.workload import BadWorkload
from cli.main import main

SLO = Slo(ttft_ms=150, tpot_ms=30)


def outcomes() -> list[Outcome]:
    """Four requests, a second apart, of 10 tokens each; one that failed, and one of a single token."""
    whole = [
        Outcome(sent_s=at_s, token_times_s=[at_s + 0.1 * (at_s + 1) + 0.02 * number for number in range(10)])
        for at_s in (0.0, 1.0, 2.0, 3.0)
    ]
    return [*whole, Outcome(sent_s=0.5, error="UNAVAILABLE: gone"), Outcome(sent_s=1.0, token_times_s=[1.25])]


def test_a_distribution_goes_up_a_step_at_each_value() -> None:
    curve = distribution("TTFT", [30.0, 10.0], 20.0)
    assert (curve.xs, curve.ys, curve.limit) == ((10.0, 10.0, 30.0, 30.0), (0.0, 0.5, 0.5, 1.0), 20.0)


def test_throughput_counts_each_token_once() -> None:
    curve = throughput(outcomes())
    length_s = curve.xs[1] - curve.xs[0]
    assert round(sum(curve.ys) * length_s) == 41
    assert len(curve.xs) <= BUCKETS
    assert 0 < curve.xs[0] < curve.xs[-1] < 3.58
    at_once = throughput([Outcome(sent_s=5.0, token_times_s=[5.0, 5.0])])
    assert sum(at_once.ys) == 2.0


def test_only_curves_with_points_are_drawn() -> None:
    assert [curve.title for curve in curves(outcomes(), SLO)] == [
        "TTFT: share of requests", "TPOT: share of requests", "output tokens a second",
    ]  # fmt: skip
    assert curves([Outcome(sent_s=0.0, error="x")], SLO) == []
    assert len(curves([Outcome(sent_s=0.0, token_times_s=[0.1])], SLO)) == 2, "one token has no TPOT"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_plot_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal, which the test has none of
    for curve in curves(outcomes(), SLO):
        lines = in_terminal(curve, width, colours=False).split("\n")
        assert HEIGHT < len(lines) <= HEIGHT + 6
        assert max(map(len, lines[1:])) <= width
        assert "\x1b" not in "".join(lines)
        assert any("⠀" < character <= "⣿" for line in lines for character in line)
        assert ("SLO" in lines[0]) == (curve.limit is not None)
    assert "SLO, 150 ms, is far to the right" in in_terminal(
        distribution("TTFT", [1.0, 2.0], 150.0), width, colours=False
    )
    assert "\x1b[3" in in_terminal(curves(outcomes(), SLO)[0], width, colours=True)


@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_a_picture_is_written(suffix: str, begins: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"
    check_picture(path)
    write_picture(curves(outcomes(), SLO), path, "a run")
    content = path.read_bytes()
    assert content.startswith(begins)
    if suffix == ".svg":
        assert content.count(b'id="axes_') == 3


def test_a_picture_that_could_not_be_written_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(BadWorkload, match=r"plot: 'run.jpg' does not end in .svg, .png or .pdf"):
        check_picture(Path("run.jpg"))
    with pytest.raises(BadWorkload, match="plot: there is no folder"):
        check_picture(tmp_path / "nowhere" / "run.svg")
    monkeypatch.setattr(sys, "argv", ["tandem", "bench", "--plot", "run.jpg", "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: plot: 'run.jpg'")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadWorkload, match=r"needs matplotlib: pip install 'tandem-serve\[plot\]'"):
        check_picture(tmp_path / "run.svg")
