"""The pictures in docs/protocol.md are those of the tables."""

from __future__ import annotations

from pathlib import Path

from cluster.pictures import page


def test_the_committed_page_is_printed_from_the_tables() -> None:
    committed = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
    assert committed.read_text() == page(), "stale: python -m cluster.pictures > docs/protocol.md"
