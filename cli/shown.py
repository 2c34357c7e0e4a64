"""A console that cuts nothing off."""

from __future__ import annotations

from rich.console import Console


def console(width: int, *, highlight: bool = True) -> Console:
    """As wide as the terminal; where there is none, so wide."""
    shown = Console(highlight=highlight)
    if not shown.is_terminal:
        shown.width = width
    return shown
