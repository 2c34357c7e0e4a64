"""Where an agent is reached, as the string that workers hand around without looking into it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from kv_transfer.layout import KVLayout

MAX_ENDPOINT_CHARACTERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One agent: its network address, its local socket, its own incarnation and the token that opens both."""

    host: str
    port: int
    uds: str
    incarnation: int  # of the agent, 63 random bits; not the worker's
    token: str  # hex


def format_endpoint(endpoint: Endpoint) -> str:
    """The endpoint as it stands in offers and grants."""
    return json.dumps(asdict(endpoint), separators=(",", ":"), sort_keys=True)


def parse_endpoint(text: str) -> Endpoint:
    """Raises ValueError naming the field that is missing or not what it must be."""
    if len(text) > MAX_ENDPOINT_CHARACTERS:
        raise ValueError(f"endpoint: has {len(text)} characters, at most {MAX_ENDPOINT_CHARACTERS} are taken")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):  # a thousand brackets nest deeper than the reader goes
        raise ValueError(f"endpoint: is {text[:80]!r}, must be JSON") from None
    if not isinstance(fields, dict):
        raise ValueError(f"endpoint: is {text[:80]!r}, must be a JSON object")
    for name, kind in (("host", str), ("port", int), ("uds", str), ("incarnation", int), ("token", str)):
        if type(fields.get(name)) is not kind:
            raise ValueError(f"endpoint.{name}: is {fields.get(name)!r}, must be of type {kind.__name__}")
    if not 0 < fields["port"] < 65536:
        raise ValueError(f"endpoint.port: is {fields['port']}, must be from 1 to 65535")
    if not 0 <= fields["incarnation"] < 1 << 64:
        raise ValueError(f"endpoint.incarnation: is {fields['incarnation']}, must have at most 64 bits")
    try:
        bytes.fromhex(fields["token"])
    except ValueError:
        raise ValueError("endpoint.token: must be hexadecimal") from None
    return Endpoint(
        host=fields["host"],
        port=fields["port"],
        uds=fields["uds"],
        incarnation=fields["incarnation"],
        token=fields["token"],
    )


def layout_digest(layout: KVLayout) -> bytes:
    """16 bytes that differ when blocks of two layouts may not be exchanged. The fingerprint is left to the workers."""
    parts = (
        layout.namespace, layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_size, layout.dtype,
        layout.order, layout.tp_rank, layout.tp_size,
    )  # fmt: skip
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
