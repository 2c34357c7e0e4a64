"""docs/threat-model.md: every line says what, who, how, what stops it, and names only tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "docs" / "threat-model.md").read_text().splitlines()
ROWS = [line for line in LINES if line.startswith("| ") and not line.startswith("| asset |")]
DEFINED = re.compile(r"^def (test_\w+)\(", re.MULTILINE)


@pytest.mark.parametrize("row", ROWS)
def test_every_line_is_whole_and_names_tests_that_exist(row: str) -> None:
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == 5, row
    assert all(cells), row
    defined = {name for path in (ROOT / "tests").rglob("test_*.py") for name in DEFINED.findall(path.read_text())}
    named = re.findall(r"`(test_\w+)`", cells[4])
    assert named, row
    assert set(named) <= defined, set(named) - defined


def test_there_are_lines() -> None:
    assert len(ROWS) >= 25
