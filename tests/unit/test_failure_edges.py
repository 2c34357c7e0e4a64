"""docs/failure-edges.md names every edge of a move, and only tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "docs" / "failure-edges.md").read_text().splitlines() if line.startswith("| ")]
DEFINED = re.compile(r"^def (test_\w+)\(", re.MULTILINE)


def test_every_edge_of_a_move_is_there_once() -> None:
    numbers = [int(found[1]) for row in ROWS if (found := re.match(r"\| (\d+) \|", row))]
    assert numbers == list(range(1, 23))


def test_every_row_names_tests_that_exist() -> None:
    defined = {name for path in (ROOT / "tests").rglob("test_*.py") for name in DEFINED.findall(path.read_text())}
    for row in (each for each in ROWS if "| tests |" not in each):
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, set(named) - defined
