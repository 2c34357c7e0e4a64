"""Draws the curves of a run: in the terminal, or as a picture in a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import plotille

from benchmarks.curves import Curve
from benchmarks.workload import BadWorkload

SUFFIXES = (".svg", ".png", ".pdf")
AXIS_CHARACTERS = 21  # what plotille writes beside the canvas
HEIGHT = 10
EDGE = 1.02  # a point on the very edge is not drawn
LIMIT_SHARE_MAX = 2.0  # an SLO so much further out than the last point would leave no room for the curve
PICTURE_INCHES = (9.0, 3.2)  # of each curve


def in_terminal(curve: Curve, width: int, *, colours: bool) -> str:
    """The curve in braille dots, in lines of at most `width` characters; a dotted line is the bound of an SLO."""
    figure = plotille.Figure()
    figure.width, figure.height = max(10, width - AXIS_CHARACTERS), HEIGHT
    figure.with_colors, figure.color_mode = colours, "names"
    figure.x_label, figure.y_label = curve.x_label, curve.y_label
    figure.origin = False
    figure.x_ticks_fkt = figure.y_ticks_fkt = _tick
    right, top = max(curve.xs) or 1.0, max(curve.ys) or 1.0
    limit = curve.limit if curve.limit is not None and curve.limit <= LIMIT_SHARE_MAX * right else None
    figure.set_x_limits(min_=0.0, max_=EDGE * max(right, limit or 0.0))
    figure.set_y_limits(min_=0.0, max_=EDGE * top)
    figure.plot(curve.xs, curve.ys, lc="green" if colours else None)
    if limit is not None:
        heights = [top * step / (2 * HEIGHT) for step in range(2 * HEIGHT + 1)]
        figure.scatter([limit] * len(heights), heights, lc="yellow" if colours else None)
    return f"{curve.title}{_bound(curve, drawn=limit is not None)}\n{figure.show()}"


def _bound(curve: Curve, *, drawn: bool) -> str:
    if curve.limit is None:
        return ""
    what = f"{curve.limit:g} {curve.x_label}"
    return f"; the dotted line: SLO, {what}" if drawn else f"; SLO, {what}, is far to the right"


def _tick(low: float, high: float) -> str:
    return f"{low:.0f}" if high - low >= 1 else f"{low:.2f}"


def check_picture(path: Path) -> None:
    """Raises BadWorkload when no picture could be written there: before a run, rather than after it."""
    if path.suffix.lower() not in SUFFIXES:
        raise BadWorkload(f"plot: {str(path)!r} does not end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not path.absolute().parent.is_dir():
        raise BadWorkload(f"plot: there is no folder {path.absolute().parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise BadWorkload("plot: a picture needs matplotlib: pip install 'tandem-serve[plot]'")


def write_picture(curves: Sequence[Curve], path: Path, title: str) -> None:
    """The curves one below the other, in the format that the file's name ends in. Needs matplotlib."""
    from matplotlib.figure import Figure  # an extra: only who wants a picture needs it

    width, height = PICTURE_INCHES
    figure = Figure(figsize=(width, height * len(curves) + 0.4), layout="constrained")
    figure.suptitle(title)
    for number, curve in enumerate(curves, 1):
        axes = figure.add_subplot(len(curves), 1, number)
        axes.plot(curve.xs, curve.ys)
        axes.set(title=curve.title, xlabel=curve.x_label, ylabel=curve.y_label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if curve.limit is not None:
            axes.axvline(curve.limit, linestyle="--", color="tab:orange", label=f"SLO, {curve.limit:g} {curve.x_label}")
            axes.legend()
    figure.savefig(path)
