"""Messages of the operators' service as JSON's types: the same for the command line and the dashboard."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from tandem.v1 import admin_pb2 as pb

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


def record_document(record: pb.FlightRecord) -> dict[str, object]:
    """The record as JSON's types."""
    request = record.request
    return {
        "request": request.id,
        "state": request.state,
        "error": request.error,
        "router": request.router,
        "prompt_tokens": request.prompt_tokens,
        "tokens": request.tokens,
        "ttft_ms": record.ttft_ms if record.HasField("ttft_ms") else None,
        "stages": [{"name": each.name, "ms": each.ms} for each in record.stages],
        "placements": [_placement_document(each) for each in record.placements],
        "moves": [plain(each) for each in record.moves],
        "story": [{"at_ms": each.at_ms, "what": each.what} for each in record.story],
    }


def _placement_document(placement: pb.PlacementStatus) -> dict[str, object]:
    candidates = [
        {
            "worker": each.worker,
            "part": each.part,
            "score_ms": each.score_ms,
            "terms": {term.name: term.value for term in each.terms},
            "chosen": each.chosen,
        }
        for each in placement.candidates
    ]
    return {**plain(placement), "candidates": candidates}
