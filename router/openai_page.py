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
                parts.append(_tables(operation["requestBody"]["content"]["application/json"]["schema"], document))
    return "".join(parts)


def _tables(schema: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """A table of the fields of an object that the document describes, then one for each object that it refers to."""
    schemas = document["components"]["schemas"]
    own = schemas[_name(schema)]
    fields = own["properties"].values()
    branches = [each for field in fields for each in field.get("anyOf", [field])]
    referred = [each for branch in branches for each in (branch, branch.get("items", {})) if "$ref" in each]
    inner = [f"<h3>{escape(_name(each))}</h3>{_fields(schemas[_name(each)])}" for each in referred]
    return _fields(own) + "".join(inner)


def _name(reference: Mapping[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _fields(schema: Mapping[str, Any]) -> str:
    """A table of the fields of an object, the required ones marked."""
    rows = []
    for name, field in schema["properties"].items():
        required = " (required)" if name in schema.get("required", ()) else ""
        cells = (f"<code>{escape(name)}</code>", escape(_type(field)) + required, escape(field.get("description", "")))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr><th>field<th>type<th></tr>{''.join(rows)}</table>"


def _type(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return _name(field)
    if "anyOf" in field:
        return " or ".join(_type(each) for each in field["anyOf"] if each.get("type") != "null")
    if field.get("type") == "array":
        return f"array of {_type(field['items'])}"
    return str(field.get("type", "anything"))
