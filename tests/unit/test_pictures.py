"""The pages of docs/ that are printed from tables are those of the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.pictures import PAGES

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_printed_from_the_tables(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "stale: python -m cluster.pictures"
