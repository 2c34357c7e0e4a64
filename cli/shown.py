"""What commands print: messages of the protocol as JSON's types, and a console that cuts nothing off."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console

WHOLE_64_BITS = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)


def plain(message: Message) -> dict[str, Any]:
    """Every field by its name in the protocol, whole numbers as numbers."""
    document: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _as_numbers(message.DESCRIPTOR, document)
    return document


def _as_numbers(kind: Any, document: dict[str, Any]) -> None:
    """Of a message of that descriptor: protobuf's own JSON has whole numbers of 64 bits as text."""
    for field in kind.fields:
        value = document.get(field.name)
        if field.message_type is not None:
            for each in value if isinstance(value, list) else [value] if value else []:
                _as_numbers(field.message_type, each)
        elif field.cpp_type in WHOLE_64_BITS and value is not None:
            document[field.name] = [int(each) for each in value] if isinstance(value, list) else int(value)


def console(width: int, *, highlight: bool = True) -> Console:
    """As wide as the terminal; where there is none, so wide."""
    shown = Console(highlight=highlight)
    if not shown.is_terminal:
        shown.width = width
    return shown
