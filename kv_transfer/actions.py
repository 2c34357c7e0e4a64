"""What the cores of a worker take in beside wire messages, and what they ask of their shell.

Into a core go Tick, PeerGone, RouterGone (engine/events.py), TransferMessage and AgentEvent (kv_transfer/messages.py)
and the events below. Out of it come `Action`s; the shell performs them in order and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.messages import EndTransfer, ExpectFrames, SendFrame, TransferMessage
from tandem.messages import (
    BlockEvents,
    CommitAsk,
    MoveFailed,
    OwnerQuery,
    RequestFailed,
    RouterMessage,
    TransferStats,
    WorkerAddress,
    WorkerLoad,
)
from tandem.request import RequestId, Token, TransferId

# ---- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterJoined:
    """A router session began. It is told once which prefix hashes are here (BlockEvents with `cleared`)."""

    session: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FromRouter:
    """A router session said this. A session that was not announced by RouterJoined joins with its first message.

    `heard_s`: when it was read off the stream, on the clock of who writes the reports.
    """

    session: int
    message: RouterMessage
    heard_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLost:
    """The worker's transfer agent ended and is reaped: nothing that it did is under way any more.

    Commands that the core gave before it handles this must not reach a new agent: nobody would wait for their end.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """The registry knows the worker by this name, incarnation and endpoints from now on."""

    address: WorkerAddress


# ---- actions -----------------------------------------------------------------------------------------------------

Piece = Token | RequestFailed | CommitAsk | OwnerQuery | MoveFailed | TransferStats | BlockEvents | WorkerLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Tell this router session; the shell merges the pieces of one session that come together into a WorkerReport."""

    session: int
    piece: Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class SendTransfer:
    """Send the message to the worker at `to`. It may be lost: the tables of handoff.py repeat what matters."""

    to: WorkerAddress
    message: TransferMessage


Action = Report | SendTransfer | SendFrame | ExpectFrames | EndTransfer


def request_failed(
    request_id: RequestId,
    epoch: int,
    code: str,
    message: str,
    *,
    retryable: bool,
    transfer_id: TransferId = TransferId(""),
) -> RequestFailed:
    """What either role tells the router when it gives a request up, or an attempt to bring one here."""
    return RequestFailed(
        request_id=request_id, epoch=epoch, transfer_id=transfer_id, code=code, message=message, retryable=retryable
    )
