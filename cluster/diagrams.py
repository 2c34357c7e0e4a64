"""Turns the Mermaid diagrams of the documentation into SVG as the site is built: no reader has to fetch a script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def picture(source: str, language: str, css_class: str, options: Mapping[str, str], md: object, **others: Any) -> str:
    """A fence of the language `mermaid`, as pymdownx.superfences asks for it. Raises where the diagram is none."""
    import mmdr

    svg: str = mmdr.render(source).svg()
    return f'<div class="{css_class}">{svg}</div>'
