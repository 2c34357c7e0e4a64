"""The socket at which HTTP is served: it is there before any router is, and all routers of a cluster share it."""

from __future__ import annotations

import socket

BACKLOG = 1024
# A client that vanished without a word is given up after 50 s: when nothing is on its way to it, by probes that it does
# not answer (20 s + 3 * 10 s); when something is, by the time that this stays unacknowledged. The second also ends a
# client that reads nothing for so long.
_VANISHED_MS = 50_000
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _VANISHED_MS),
)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections for `serve_http`, of one process or of several; port 0 takes a free one.

    Raises OSError when the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, or asyncio does not switch off Nagle: a reply of two writes would take 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for level, option, value in _KEEPALIVE:  # connections inherit them
            bound.setsockopt(level, option, value)
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError:
        bound.close()
        raise
    return bound
