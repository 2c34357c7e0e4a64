"""Random protobuf messages from their descriptors: every field, extreme numbers, and names that somebody knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draws import Draws
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

DEPTH_MAX = 4
_WHOLE_BITS = {
    FieldDescriptor.TYPE_UINT32: 32,
    FieldDescriptor.TYPE_FIXED32: 32,
    FieldDescriptor.TYPE_UINT64: 64,
    FieldDescriptor.TYPE_FIXED64: 64,
}
_REALS = (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT)

Known = Mapping[str, Sequence[Any]]  # field name -> values that mean something to the receiver


def fill(message: Message, draws: Draws, known: Known, *, depth: int = 0) -> None:
    """Sets fields of `message`; of a oneof at most the last that was drawn stays."""
    for field in message.DESCRIPTOR.fields:
        if draws.byte() < 80:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _fill_map(message, field, draws)
        elif field.is_repeated:
            _fill_list(message, field, draws, known, depth)
        elif field.message_type is not None:
            if depth < DEPTH_MAX:
                child = getattr(message, field.name)
                child.SetInParent()
                fill(child, draws, known, depth=depth + 1)
        else:
            setattr(message, field.name, _value(field, draws, known))


def _fill_list(message: Message, field: Any, draws: Draws, known: Known, depth: int) -> None:
    values = getattr(message, field.name)
    num = draws.below(6)
    if field.message_type is not None:
        for _ in range(num if depth < DEPTH_MAX else 0):
            fill(values.add(), draws, known, depth=depth + 1)
        return
    repeats = 400 if draws.chance(4) else 1
    values.extend([_value(field, draws, known) for _ in range(num)] * repeats)


def _fill_map(message: Message, field: Any, draws: Draws) -> None:
    key, value = field.message_type.fields
    entries = getattr(message, field.name)
    for _ in range(draws.below(4)):
        entries[_value(key, draws, {})] = _value(value, draws, {})


def _value(field: Any, draws: Draws, known: Known) -> Any:
    names = known.get(field.name, ())
    if names and draws.byte() < 192:
        return draws.pick(names)
    if field.type in _WHOLE_BITS:
        return draws.whole(_WHOLE_BITS[field.type])
    if field.type in _REALS:
        value = draws.real()
        return value if field.type == FieldDescriptor.TYPE_DOUBLE or abs(value) < 3e38 else 0.0
    if field.type == FieldDescriptor.TYPE_BOOL:
        return bool(draws.below(2))
    if field.type == FieldDescriptor.TYPE_STRING:
        return draws.text()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draws.raw(16 if draws.byte() < 192 else draws.below(40))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return draws.below(5)
    raise TypeError(f"{field.full_name}: no value for type {field.type}")


def damage(data: bytes, draws: Draws) -> bytes:
    """Some bytes changed, cut out, put in twice, or the end cut off."""
    out = bytearray(data)
    for _ in range(1 + draws.below(3)):
        if not out:
            break
        at = draws.below(min(len(out), 65536))
        match draws.below(4):
            case 0:
                out[at] = draws.byte()
            case 1:
                del out[at : at + 1 + draws.below(8)]
            case 2:
                out[at:at] = out[at : at + 1 + draws.below(16)]
            case _:
                del out[at:]
    return bytes(out)
