"""The command reference, printed from the commands themselves: `python -m cli.reference` writes docs/commands.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from cli.main import VERBS, app
from cluster.config import ClusterConfig, flag_of

PAGE = "docs/commands.md"
HEAD = """# Commands

Printed by `python -m cli.reference` from the commands; a test compares. Exit status 2: a setting or an argument is
wrong; 1: it could not be done. In both cases one line on stderr says why.
"""
SETTINGS = "Takes every [setting](configuration.md) as a flag."


def page() -> str:
    """The whole page."""
    root = get_command(app)
    context = typer.Context(root, info_name="tandem")
    parts = [HEAD]
    for name in VERBS:
        parts += _command(root.get_command(context, name), name, context)  # type: ignore[attr-defined]
    return "\n".join(parts)


def _command(command: Any, name: str, above: Any) -> Iterator[str]:
    """A command, or each of a group."""
    context = typer.Context(command, info_name=name, parent=above)
    inner = getattr(command, "commands", None)
    if inner:
        for each in inner:
            yield from _command(inner[each], each, context)
        return
    yield f"## {context.command_path}\n"
    yield f"```\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    yield f"{_flowing(command.help or '')}\n"
    settings = {flag_of(key) for key in ClusterConfig.model_fields}
    takes_all = settings <= {flag for each in command.params for flag in each.opts}
    if takes_all:
        yield f"{SETTINGS}\n"
    rows = []
    for each in command.params:
        record = each.get_help_record(context)
        if record is None or (takes_all and settings & set(each.opts)) or each.name in ("help",):
            continue
        what, meaning = (_flowing(text).replace("|", "\\|") for text in record)
        rows.append(f"| `{what}` | {meaning} |")
    if rows:
        yield "\n".join(["| | |", "|---|---|", *rows]) + "\n"


def _flowing(text: str) -> str:
    """Lines as one: Markdown breaks them by itself."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


if __name__ == "__main__":
    Path(PAGE).write_text(page())
