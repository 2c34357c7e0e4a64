"""What the driver needs of those around it: streams to workers, and who keeps count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from router.config import RouterConfig
from router.events import Note
from router.move import MoveRecord
from tandem.cluster_access import ClusterAccess
from tandem.messages import RouterMessage, TransferStats, WorkerReport
from tandem.request import RequestId, WorkerId


class Link(Protocol):
    """What the driver needs of router.clients.WorkerLink."""

    def start(self) -> asyncio.Future[None]:
        """Begins to dial."""
        ...

    async def close(self) -> None:
        """Ends the stream and all dialling."""
        ...

    def send(self, message: RouterMessage) -> None:
        """Queues a message; without a stream it is dropped."""
        ...


class MakeLink(Protocol):
    """Makes a Link to one worker incarnation, as WorkerLink's constructor does."""

    def __call__(
        self,
        *,
        worker_id: WorkerId,
        control: str,
        config: RouterConfig,
        access: ClusterAccess,
        next_session: Callable[[], int],
        on_up: Callable[[], None],
        on_report: Callable[[WorkerReport], None],
        on_lost: Callable[[str], None],
    ) -> Link: ...


class Account(Protocol):
    """Who keeps count of what each client has got."""

    def produced(self, request_id: RequestId, num_tokens: int) -> None:
        """Tokens of an answer came, whether or not anybody reads them."""
        ...

    def ended(self, request_id: RequestId) -> None:
        """The request runs no more."""
        ...


class Watcher(Protocol):
    """Who keeps count of what happens to requests."""

    def noted(self, note: Note) -> None:
        """The core told something for the record."""
        ...

    def moved(self, record: MoveRecord) -> None:
        """A move has ended."""
        ...

    def transferred(self, stats: TransferStats) -> None:
        """A worker told what a transfer did."""
        ...
