"""Gathers what a worker's cores tell its routers: the pieces of one step become one WorkerReport a session."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace
from typing import assert_never

from kv_transfer.actions import Piece, Report
from tandem.messages import (
    BlockEvents,
    CommitAsk,
    MoveFailed,
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
        """One WorkerReport for each session that `reports` speak to, and one more for each further BlockEvents.

        Those are numbered, and a router that misses a number forgets what it knew: so two never become one.
        """
        told: dict[int, list[list[Piece]]] = {}
        for report in reports:
            parts = told.setdefault(report.session, [[]])
            if isinstance(report.piece, BlockEvents) and any(isinstance(each, BlockEvents) for each in parts[-1]):
                parts.append([])
            parts[-1].append(report.piece)
        return [(session, self._build(session, pieces)) for session, parts in told.items() for pieces in parts]

    @property
    def num_sessions(self) -> int:
        """Sessions whose reports are counted."""
        return len(self._sequences)

    def keep(self, sessions: Container[int]) -> None:
        """Forgets all sessions but these. A core may speak to one that is over, while a transfer outlives it."""
        for session in [each for each in self._sequences if each not in sessions]:
            del self._sequences[session]

    def _build(self, session: int, pieces: list[Piece]) -> WorkerReport:
        tokens: list[Token] = []
        failed: list[RequestFailed] = []
        asks: list[CommitAsk] = []
        queries: list[OwnerQuery] = []
        moves_failed: list[MoveFailed] = []
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
                case MoveFailed():
                    moves_failed.append(piece)
                case TransferStats():
                    transfers.append(piece)
                case BlockEvents():
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
            moves_failed=tuple(moves_failed),
            transfers=tuple(transfers),
            blocks=blocks,
            load=load,
        )


def stamped(report: WorkerReport, now_s: float) -> WorkerReport:
    """The report as it is written now: it says how long the worker has held what has its first token in it."""
    if not any(stats.first is not None for stats in report.transfers):
        return report
    return replace(report, transfers=tuple(_held(stats, now_s) for stats in report.transfers))


def _held(stats: TransferStats, now_s: float) -> TransferStats:
    if stats.first is None:
        return stats
    return replace(stats, first=replace(stats.first, hold_ms=1000 * (now_s - stats.first.heard_s)))


def joined(reports: Iterable[WorkerReport]) -> list[WorkerReport]:
    """Reports to one session that wait to be written, as few of them as say the same.

    A router that lags hears of many steps at once, and catches up. Else it would be cut off and place everything anew,
    which is no help to one that has too much to do. Two BlockEvents never become one, since a gap among them is seen.
    The order of pieces of different kinds is not kept: none of a later kind is said before an earlier one is answered.
    """
    parts: list[WorkerReport] = []
    for report in reports:
        last = parts[-1] if parts else None
        if last is None or (last.blocks is not None and report.blocks is not None):
            parts.append(report)
            continue
        parts[-1] = replace(
            last,
            sequence=report.sequence,
            tokens=last.tokens + report.tokens,
            failed=last.failed + report.failed,
            commit_asks=last.commit_asks + report.commit_asks,
            owner_queries=last.owner_queries + report.owner_queries,
            moves_failed=last.moves_failed + report.moves_failed,
            transfers=last.transfers + report.transfers,
            blocks=last.blocks or report.blocks,
            load=report.load or last.load,
        )
    return parts
