"""Where a figure came from: machine, load, command, seed; and the file in benchmarks/results that states it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def cpu_name() -> str:
    """The processor's own name, or the platform's word for it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that runs, with `+` when files of it are changed; `unknown` outside a checkout."""

    def git(*arguments: str) -> str:
        ran = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parents[1], check=False)
        return ran.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def circumstances(*, seed: int | None = None, threads: str = "") -> list[str]:
    """The lines that stand above every result."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = f"python -m {module.name}" if module is not None else sys.argv[0]
    return [
        f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; commit {commit()}",
        f"- machine: {os.cpu_count()} x {cpu_name()}; Python {platform.python_version()}, "
        f"torch {metadata.version('torch')}, transformers {metadata.version('transformers')}",
        f"- command: `{' '.join([program, *map(shlex.quote, sys.argv[1:])])}`",
        f"- load average when written (1, 5, 15 min): {load}",
        *([f"- threads: {threads}"] if threads else []),
        *([f"- seed: {seed}"] if seed is not None else []),
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats get two decimals."""

    def cell(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    cells = [[cell(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[column]) for row in cells)]) for column, name in enumerate(header)]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"

    return "\n".join([line(list(header)), line(["-" * width for width in widths]), *(line(row) for row in cells)])


def write(name: str, title: str, body: str, *, seed: int | None = None, threads: str = "") -> Path:
    """Prints the result and writes it to benchmarks/results/NAME.md."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = "\n".join([f"# {title}", "", *circumstances(seed=seed, threads=threads), "", body.rstrip(), ""])
    path = RESULTS / f"{name}.md"
    path.write_text(text)
    print(text)
    return path
