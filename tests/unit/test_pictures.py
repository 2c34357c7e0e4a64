"""The files that are printed from tables and commands, pages of docs/ and Grafana's boards, are what these say now."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cli import reference
from cluster.config import ClusterConfig
from cluster.diagrams import picture
from cluster.pictures import PAGES

ROOT = Path(__file__).resolve().parents[2]
PRINTED: dict[str, tuple[Callable[[], str], str]] = {
    **{name: (printed, "cluster.pictures") for name, printed in PAGES.items()},
    reference.PAGE: (reference.page, "cli.reference"),
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_committed_file_is_printed_from_the_tables(name: str) -> None:
    printed, module = PRINTED[name]
    assert (ROOT / name).read_text() == printed(), f"stale: python -m {module}"


def test_diagrams_become_pictures_that_fetch_nothing() -> None:
    diagrams = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs/protocol.md").read_text(), re.DOTALL)
    assert len(diagrams) == 4
    pictures = [picture(each, "mermaid", "picture", {}, None) for each in diagrams]
    for each in pictures:
        assert each.count("<svg") == 1
        assert set(re.findall(r"https?://[^/\"]+", each)) == {"http://www.w3.org"}, (
            "names of formats, which nobody opens"
        )
    assert "QUARANTINE" in pictures[2]
    ids = [set(re.findall(r' id="([^"]+)"', each)) for each in pictures]
    assert sum(map(len, ids)) == len(set().union(*ids)), "one page has them all"


def test_every_setting_and_every_command_is_on_its_page() -> None:
    settings = (ROOT / "docs/configuration.md").read_text()
    for key in ClusterConfig.model_fields:
        assert settings.count(f"`TANDEM_{key.upper()}`") >= 1, key
    commands = (ROOT / "docs/commands.md").read_text()
    for name in ("serve", "status", "explain", "migrate", "drain", "scale", "logs", "chaos run", "keys", "doctor"):
        assert f"## tandem {name}" in commands
    assert "run_dir" not in commands
    assert str(Path.home()) not in settings + commands, "a page may not know the machine that it was printed on"


def test_the_pages_of_the_interfaces_have_their_parts() -> None:
    grpc, http, python = ((ROOT / f"docs/api-{name}.md").read_text() for name in ("grpc", "http", "python"))
    for call in ("Generate", "Attach", "Cancel", "Tokenize", "Drain", "Scale", "Migrate"):
        assert f"| `{call}` |" in grpc
    assert "| `temperature` | `double`, optional | 0 is greedy; default 1; 0 to 2 |" in grpc
    for path in ("POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models", "GET /ready", "GET /metrics"):
        assert f"## {path}\n" in http
    assert "| `temperature` | number, at least 0, at most 2 |" in http
    for name in ("Client", "AsyncClient", "Completion", "SecurityOptions", "Errors"):
        assert f"## {name}\n" in python
