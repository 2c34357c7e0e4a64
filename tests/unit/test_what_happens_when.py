"""docs/what-happens-when.md names a test for every fault, and only tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.chaos_plan import FaultKind

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "what-happens-when.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "tests |" not in line]
DEFINED = re.compile(r"^def (test_\w+)\(", re.MULTILINE)
# The word by which a row of the page speaks of each kind of fault.
WORDS = {
    FaultKind.KILL: "is killed",
    FaultKind.STOP: "is stopped",
    FaultKind.PARTITION: "nothing passes",
    FaultKind.DELAY: "slow",
    FaultKind.CORRUPT: "damaged",
    FaultKind.REDIS_DOWN: "Redis",
    FaultKind.CANCEL: "clients leave",
}


def test_every_row_names_tests_that_exist() -> None:
    defined = {name for path in (ROOT / "tests").rglob("test_*.py") for name in DEFINED.findall(path.read_text())}
    for row in ROWS:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, set(named) - defined


def test_every_kind_of_fault_has_its_row() -> None:
    for kind in FaultKind:
        assert any(WORDS[kind] in row.split("|")[1] for row in ROWS), kind
