"""The files that are printed from tables, pages of docs/ and Grafana's boards, are those of the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.pictures import PAGES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_printed_from_the_tables(name: str) -> None:
    assert (ROOT / name).read_text() == PAGES[name](), "stale: python -m cluster.pictures"
