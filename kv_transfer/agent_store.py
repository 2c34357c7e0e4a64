"""The one store of an agent, where sources meet it for gloo pairs; made when the first pair is asked for."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


class GlooStore:
    """Thread-safe."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        self._host = host
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._opened: tuple[Store, int] | None = None

    def open(self) -> tuple[Store, int]:
        """The store and its port. The first call imports torch, which takes a second or two. Raises ChannelLost."""
        from kv_transfer.transports import gloo

        with self._lock:
            if self._opened is None:
                self._opened = gloo.host_store(self._host, timeout_s=self._timeout_s)
            return self._opened
