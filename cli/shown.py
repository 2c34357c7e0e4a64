"""What commands print: messages of the protocol as JSON's types, and a console that cuts nothing off."""

from __future__ import annotations

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console


def plain(message: Message) -> dict[str, object]:
    """Every field by its name in the protocol. Whole numbers of 64 bits are text, as in protobuf's own JSON."""
    document: dict[str, object] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return document


def console(width: int, *, highlight: bool = True) -> Console:
    """As wide as the terminal; where there is none, so wide."""
    shown = Console(highlight=highlight)
    if not shown.is_terminal:
        shown.width = width
    return shown
