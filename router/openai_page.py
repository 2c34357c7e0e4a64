"""/docs: the API's schema as one plain page that loads nothing, so that it can be read without the Internet."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}code{font-size:1em}"
    "td,th{text-align:left;vertical-align:top;padding:.1rem 1.5rem .1rem 0}"
)


def page_of(document: Mapping[str, Any]) -> str:
    """The page for an OpenAPI document: each operation, and for those with a JSON body its fields and their types."""
    title = escape(document["info"]["title"])
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>',
        f"<h1>{title}</h1><p>{escape(document['info']['description'])}",
        ' The schema for machines: <a href="openapi.json">openapi.json</a>.</p>',
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            if "requestBody" in operation:
                parts.append(_fields(operation["requestBody"]["content"]["application/json"]["schema"]))
    return "".join(parts)


def _fields(schema: Mapping[str, Any]) -> str:
    """A table of the fields of an object, the required ones marked, then one for each object inside it."""
    rows = []
    for name, field in schema["properties"].items():
        required = " (required)" if name in schema.get("required", ()) else ""
        cells = (f"<code>{escape(name)}</code>", escape(_type(field)) + required, escape(field.get("description", "")))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    inner = [f"<h3>{escape(name)}</h3>{_fields(each)}" for name, each in schema.get("$defs", {}).items()]
    return f"<table><tr><th>field<th>type<th></tr>{''.join(rows)}</table>{''.join(inner)}"


def _type(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_type(each) for each in field["anyOf"] if each.get("type") != "null")
    if field.get("type") == "array":
        return f"array of {_type(field['items'])}"
    return str(field.get("type", "anything"))
