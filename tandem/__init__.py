"""The vocabulary of Tandem: requests, messages, errors, generated protocol, public client."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tandem.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> object:
    """The clients, loaded when first asked for: `import tandem` alone brings no gRPC."""
    if name in __all__:
        from tandem import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
