"""What is told of an error: one line for people, and the exit status."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from tandem.errors import CommandError, TandemError

EXPECTED = (CommandError, TandemError, grpc.RpcError)


def told(error: Exception) -> tuple[str, int]:
    """The sentence and the exit status of one of the EXPECTED."""
    match error:
        case CommandError():
            return str(error), error.exit_status
        case TandemError():
            return error.message, 1
        case grpc.RpcError():
            return _of_call(error), 1
    raise TypeError(f"nobody expects {error!r}")


def _of_call(error: grpc.RpcError) -> str:
    """What the cluster says, when it was the cluster that refused."""
    trailers: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    if any(key == "tandem-code" for key, _ in trailers):
        return str(error.details())
    return f"the cluster does not answer: {error.details()}"
