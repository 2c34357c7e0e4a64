"""One request on the decode side of a worker, from its assignment to its end there."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from engine.prefix_cache import BlockHash
from engine.prompt_clock import PromptClock
from engine.sequence import Sequence
from kv_transfer.actions import Piece, Report
from kv_transfer.handoff_target import TargetHandoff
from tandem.messages import Assign
from tandem.request import RequestId, Token, TransferId

TOKENS_KEPT = 256  # the newest of each request: so far may its router be behind when it is migrated


@dataclass(slots=True, kw_only=True)
class Request:
    """One request on this side, or an attempt to bring one here that is not yet closed."""

    session: int
    assign: Assign
    received_ms: int
    clock: PromptClock | None  # LOCAL, until its first token is drawn
    epoch: int  # that we report under: the assignment's, from the commit on the next
    salt: int  # tells it from others in the draws of admission
    owner: str  # its name in the ledger
    machine: TargetHandoff | None  # None: LOCAL
    hashes: list[BlockHash]
    sequence: Sequence | None = None  # in the batch
    num_reused: int = 0
    num_granted: int = 0
    reserved: bool = False
    waiting_since_ms: int | None = None  # the source has been told to wait
    num_known_tokens: int = 0  # tokens that were computed once already, or that the router gave us
    num_recomputed_tokens: int = 0  # of those, run here: the prefill of a LOCAL request, or after a preemption
    stepped: bool = False  # a step has run it here
    newest: deque[Token] = field(default_factory=lambda: deque(maxlen=TOKENS_KEPT))  # that it wrote here
    moving: TransferId | None = None  # of the attempt to move it away that is alive

    @property
    def request_id(self) -> RequestId:
        """Its name everywhere."""
        return self.assign.request_id

    @property
    def newest_epoch(self) -> int:
        """The newest that it is known here under, that of a commit whose agent is not quiet yet included."""
        return self.epoch if self.machine is None else max(self.epoch, self.machine.epoch)

    def report(self, piece: Piece) -> Report:
        """To the router that assigned it."""
        return Report(session=self.session, piece=piece)
