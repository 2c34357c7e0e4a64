"""The reference of the programming interfaces, printed from what they are made of: .proto files, OpenAPI, the client.

Part of `python -m cluster.pictures`. Needs grpcio-tools, which a development environment has.
"""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, get_type_hints

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from cluster.config import ClusterConfig
from cluster.served_model import describe
from router.driver import Driver
from router.metrics import EdgeMetrics
from router.openai_api import build_app
from router.service import ServedModel, Service
from tandem import client, errors

PROTO = Path(__file__).resolve().parent.parent / "proto"

GRPC_HEAD = """# gRPC

Printed by `python -m cluster.pictures` from the comments in proto/tandem/v1; a test compares. Reflection and health
(`grpc.health.v1.Health`) are on. Errors carry their code as `tandem-code` in the trailing metadata.
"""
HTTP_HEAD = """# HTTP

Printed by `python -m cluster.pictures` from the OpenAPI document that a cluster serves at `/openapi.json`; a test
compares. Limits that depend on the model are those of the model `fake`, with a context of 8,192 tokens.
"""
PYTHON_HEAD = """# Python client

Printed by `python -m cluster.pictures` from tandem/client.py; a test compares. Both are imported from
`tandem`; errors are those [below](#errors).
"""

Comments = dict[tuple[int, ...], str]


# ---- gRPC ------------------------------------------------------------------------------------------------------------


def grpc_page() -> str:
    """The services that clients and operators call, and their messages."""
    parts = [GRPC_HEAD]
    for name, title in (("inference", "What a client asks"), ("admin", "What an operator asks")):
        file = _described(f"tandem/v1/{name}.proto")
        comments = _comments(file)
        parts.append(f"## {title}\n")
        for number, service in enumerate(file.service):
            parts += _service(file.package, service, (6, number), comments)
        parts.append(f"### Messages of {name}.proto\n")
        for number, message in enumerate(file.message_type):
            parts += _message(message, (4, number), comments)
    return "\n".join(parts)


def _described(name: str) -> descriptor_pb2.FileDescriptorProto:
    """The file as protoc reads it, its comments included."""
    import grpc_tools
    from grpc_tools import protoc

    include = Path(grpc_tools.__file__).parent / "_proto"
    with tempfile.NamedTemporaryFile() as out:
        flags = [f"-I{PROTO}", f"-I{include}", "--include_source_info", f"--descriptor_set_out={out.name}"]
        assert protoc.main(["protoc", *flags, name]) == 0, f"protoc does not take {name}"
        [file] = descriptor_pb2.FileDescriptorSet.FromString(Path(out.name).read_bytes()).file
    return file


def _comments(file: descriptor_pb2.FileDescriptorProto) -> Comments:
    return {
        tuple(each.path): " ".join((each.leading_comments + each.trailing_comments).split())
        for each in file.source_code_info.location
    }


def _service(
    package: str, service: descriptor_pb2.ServiceDescriptorProto, path: tuple[int, ...], comments: Comments
) -> Iterator[str]:
    yield f"### {package}.{service.name}\n\n{comments.get(path, '')}".rstrip() + "\n"
    yield "| call | request | answer | |\n|---|---|---|---|"
    for number, method in enumerate(service.method):
        asked, answer = (_last(each) for each in (method.input_type, method.output_type))
        streams = ["stream of " if each else "" for each in (method.client_streaming, method.server_streaming)]
        meaning = _cell(comments.get((*path, 2, number), ""))
        yield f"| `{method.name}` | {streams[0]}`{asked}` | {streams[1]}`{answer}` | {meaning} |"
    yield ""


def _message(message: descriptor_pb2.DescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield f"#### {message.name}\n"
    if comment := comments.get(path):
        yield f"{comment}\n"
    if not message.field:
        yield "No fields.\n"
        return
    yield "| field | type | |\n|---|---|---|"
    maps = {each.name: each for each in message.nested_type if each.options.map_entry}
    for number, each in enumerate(message.field):
        kind = _field_type(each, maps)
        if each.HasField("oneof_index") and not each.proto3_optional:
            kind += f", one of `{message.oneof_decl[each.oneof_index].name}`"
        yield f"| `{each.name}` | {kind} | {_cell(comments.get((*path, 2, number), ''))} |"
    yield ""
    for number, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(nested, (*path, 3, number), comments)


def _field_type(field: FieldDescriptorProto, maps: Mapping[str, descriptor_pb2.DescriptorProto]) -> str:
    named = _last(field.type_name)
    if named in maps:
        key, value = (_field_type(each, {}) for each in maps[named].field)
        return f"map of {key} to {value}"
    kind = f"`{named}`" if named else f"`{FieldDescriptorProto.Type.Name(field.type).removeprefix('TYPE_').lower()}`"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {kind}"
    return f"{kind}, optional" if field.proto3_optional else kind


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---- HTTP ------------------------------------------------------------------------------------------------------------


def http_page() -> str:
    """Every path with what may be sent and what is answered."""
    document = openapi()
    schemas = document["components"]["schemas"]
    parts = [HTTP_HEAD, document["info"]["description"].strip() + "\n"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"## {method.upper()} {path}\n")
            parts.append(f"{operation.get('description') or operation.get('summary', '')}\n")
            parts += _fields("header", ((each["name"], each) for each in operation.get("parameters", ())))
            if "requestBody" in operation:
                body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
                parts += _fields("field", schemas[body]["properties"].items(), set(schemas[body].get("required", ())))
            parts.append("| status | |\n|---|---|")
            parts += [f"| {status} | {_cell(each['description'])} |" for status, each in operation["responses"].items()]
            parts.append("")
    return "\n".join(parts)


def openapi() -> dict[str, Any]:
    """The document of a router's real application over a model without weights."""
    edge = describe(ClusterConfig(model="fake"))
    model = ServedModel(id=edge.name, context_tokens=edge.context_tokens, created_s=0, dtype="float32", exact=True)
    service = Service(driver=Driver(), tokenizer=edge.tokenizer, model=model, metrics=EdgeMetrics())
    return build_app(service).openapi()


def _fields(
    what: str, fields: Iterable[tuple[str, Mapping[str, Any]]], required: set[str] | None = None
) -> Iterator[str]:
    """A table of them; those that are ignored or not supported in a sentence below."""
    rows, apart = [], dict[str, list[str]]()
    for name, each in fields:
        schema = each.get("schema", each)
        meaning = _cell(each.get("description", schema.get("description", "")))
        if meaning.startswith(("Ignored", "Not supported")):
            apart.setdefault(meaning, []).append(f"`{name}`")
            continue
        needed = " (required)" if name in (required or ()) or (what != "field" and each.get("required")) else ""
        rows.append(f"| `{name}`{needed} | {_cell(_schema(schema))} | {meaning} |")
    if rows:
        yield f"| {what} | value | |\n|---|---|---|"
        yield from rows
        yield ""
    for meaning, names in apart.items():
        yield f"{meaning} {', '.join(names)}\n"


def _schema(schema: Mapping[str, Any]) -> str:
    """Type and limits in words."""
    if "$ref" in schema:
        return f"`{schema['$ref'].rsplit('/', 1)[-1]}`"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_schema(each) for each in schema["anyOf"] if each.get("type") != "null"))
    if "enum" in schema:
        return ", ".join(f"`{each!r}`" if each == "" else f"`{each}`" for each in schema["enum"])
    kind = schema.get("type", "anything")
    kind = " or ".join(each for each in kind if each != "null") if isinstance(kind, list) else kind
    if kind == "array":
        kind = f"array of {_schema(schema.get('items', {}))}"
    limits = [f"{word} {schema[name]}" for name, word in _LIMITS.items() if name in schema]
    return ", ".join([kind, *limits])


_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "minLength": "characters at least",
    "maxLength": "characters at most",
    "minItems": "items at least",
    "maxItems": "items at most",
    "maxProperties": "entries at most",
}


# ---- Python ----------------------------------------------------------------------------------------------------------


CLIENTS = (client.Client, client.AsyncClient)
OPTIONS = (client.SamplingOptions, client.RequestOptions, client.SecurityOptions)
GIVEN = (client.Chunk, client.Completion, client.Usage, client.TokenLogprobs, client.Logprob, client.ModelInfo)


def python_page() -> str:
    """The clients, their options and what they give, then the errors."""
    parts = [PYTHON_HEAD]
    for kind in CLIENTS:
        parts += _class(kind)
    for record in (*OPTIONS, *GIVEN):
        parts += _record(record)
    tree = (errors.__doc__ or "").split("\n\n", 1)[1]
    parts.append(f"## Errors\n\n```\n{tree.rstrip()}\n```\n")
    return "\n".join(parts)


def _class(kind: type) -> Iterator[str]:
    yield f"## {kind.__name__}\n\n{inspect.getdoc(kind)}\n"
    for name, method in vars(kind).items():
        if not isinstance(method, FunctionType) or (name.startswith("_") and name != "__init__"):
            continue
        shown = kind.__name__ if name == "__init__" else name
        prefix = "async " if inspect.iscoroutinefunction(method) else ""
        yield f"```python\n{prefix}{shown}{_signature(method)}\n```\n"
        if name != "__init__":
            yield f"{inspect.getdoc(method)}\n"


def _signature(method: FunctionType) -> str:
    signature = inspect.signature(method)
    parameters = [each for name, each in signature.parameters.items() if name != "self"]
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature.replace(parameters=parameters)))  # annotations
    return text.removesuffix(" -> None")


def _record(kind: type) -> Iterator[str]:
    yield f"## {kind.__name__}\n\n{inspect.getdoc(kind)}\n"
    own = get_type_hints(kind)
    yield "| field | type |\n|---|---|"
    for name, each in own.items():
        shown = each.__name__ if isinstance(each, type) and not getattr(each, "__args__", ()) else str(each)
        yield f"| `{name}` | `{_cell(shown.replace('collections.abc.', '').replace('tandem.client.', ''))}` |"
    yield ""
