"""Turns the Mermaid diagrams of the documentation into SVG as the site is built: no reader has to fetch a script."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

BACKEND = "merman"  # what begins every id of its SVG


def picture(source: str, language: str, css_class: str, options: Mapping[str, str], md: object, **others: Any) -> str:
    """A fence of the language `mermaid`, as pymdownx.superfences asks for it. Raises where the diagram is none."""
    import mmdr

    svg: str = mmdr.render(source).svg()
    own = f"picture-{hashlib.sha256(source.encode()).hexdigest()[:8]}"  # ids hold for the whole page
    return f'<div class="{css_class}" style="background: #fff">{svg.replace(BACKEND, own)}</div>'
