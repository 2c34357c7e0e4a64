"""Gathers what a worker's cores tell its routers: the pieces of one step become one WorkerReport a session."""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from kv_transfer.actions import Piece, Report
from tandem.messages import (
    BlockEvents,
    CommitAsk,
    OwnerQuery,
    RequestFailed,
    TransferStats,
    WorkerLoad,
    WorkerReport,
)
from tandem.request import Token, WorkerId


class ReportBuilder:
    """Counts the reports of each session, so that a router sees a gap."""

    def __init__(self, *, worker_id: WorkerId, incarnation: int) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._sequences: dict[int, int] = {}

    def merge(self, reports: Iterable[Report]) -> list[tuple[int, WorkerReport]]:
        """One WorkerReport for each session that `reports` speak to."""
        pieces: dict[int, list[Piece]] = {}
        for report in reports:
            pieces.setdefault(report.session, []).append(report.piece)
        return [(session, self._build(session, told)) for session, told in pieces.items()]

    def forget(self, session: int) -> None:
        """The session is over."""
        self._sequences.pop(session, None)

    def _build(self, session: int, pieces: list[Piece]) -> WorkerReport:
        tokens: list[Token] = []
        failed: list[RequestFailed] = []
        asks: list[CommitAsk] = []
        queries: list[OwnerQuery] = []
        transfers: list[TransferStats] = []
        blocks: BlockEvents | None = None
        load: WorkerLoad | None = None
        for piece in pieces:
            match piece:
                case Token():
                    tokens.append(piece)
                case RequestFailed():
                    failed.append(piece)
                case CommitAsk():
                    asks.append(piece)
                case OwnerQuery():
                    queries.append(piece)
                case TransferStats():
                    transfers.append(piece)
                case BlockEvents():
                    assert blocks is None, "two block events in one step"
                    blocks = piece
                case WorkerLoad():
                    load = piece
                case _:
                    assert_never(piece)
        sequence = self._sequences[session] = self._sequences.get(session, 0) + 1
        return WorkerReport(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            sequence=sequence,
            tokens=tuple(tokens),
            failed=tuple(failed),
            commit_asks=tuple(asks),
            owner_queries=tuple(queries),
            transfers=tuple(transfers),
            blocks=blocks,
            load=load,
        )
