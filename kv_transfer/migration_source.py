"""The source's end of a live migration: it copies full blocks while the request runs, fences it, and hands it over.

The request runs in RUNNING, OFFERED, PRECOPY and FENCING; it stands still in TAIL and COMMITTING. The sentences that
the table keeps: before CommitRequest has been said, any failure lets the request run on at once; from then on nobody
resumes it but on the owner record's word that this attempt is over, and nothing is freed but on its word that
the request has another owner (or the router's that it has ended).

Rounds of pre-copy follow Clark et al., "Live Migration of Virtual Machines" (NSDI'05): each copies what became full
during the one before; since KV is append-only, a round that does not shrink will not converge.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from engine.events import PeerGone, Tick
from kv_transfer.actions import AgentLost
from kv_transfer.handoff import (
    AskOwner,
    Attempt,
    EndExport,
    GiveUp,
    HandedOver,
    HandoffConfig,
    Hold,
    MigrationAction,
    Over,
    Resume,
    Row,
    Say,
    Stop,
    Table,
)
from kv_transfer.handoff_source import BlocksReady, Start
from kv_transfer.messages import (
    Cancel,
    CommitRequest,
    FrameAcked,
    FrameFailed,
    Grant,
    Offer,
    Refuse,
    TransferQuiet,
    Wait,
)
from kv_transfer.source_end import SourceEnd, who
from tandem.messages import OwnerIs, StopMove
from tandem.request import Token

Actions = list[MigrationAction]
FAILED_CODE = "move_failed"
PRECOPY_PRIORITY, FENCE_PRIORITY = 1, 0


class MigrationState(StrEnum):
    """How far the source is."""

    RUNNING = "running"  # no attempt is alive; one that failed may still have frames under way
    OFFERED = "offered"  # the target has been asked for room
    PRECOPY = "precopy"  # full blocks are copied, in rounds, while the request runs
    FENCING = "fencing"  # the request is to stand still at the next step boundary
    TAIL = "tail"  # it stands still; its last blocks travel
    COMMITTING = "committing"  # everything is there and the commit is asked: only the owner record decides
    HANDED = "handed"  # the target owns the request; the agent is about to fall silent
    FREED = "freed"  # nothing of the attempt is held any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Fenced:
    """The request stands still: the KV of its first `num_computed` tokens is final, the target goes on from `tokens`.

    `token_ms`: what one more token in a step costs at most, as far as is known here.
    """

    num_computed: int
    tokens: tuple[Token, ...]
    token_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """The request has lost its blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Starved:
    """A request here found no block for its next step, which this one's could have given."""


def tail_by_ids(*, exact: bool, num_tokens: int, frame_ms: float | None, token_ms: float | None) -> bool:
    """Whether the target should rather compute the last `num_tokens` tokens itself than wait for one more frame.

    Only when both give the same bits, and both durations are known; then the shorter wins.
    """
    if not exact or frame_ms is None or token_ms is None:
        return False
    return num_tokens * token_ms < frame_ms


class SourceMigration(SourceEnd[MigrationState]):
    """The source's end of one attempt. `offer.num_tokens` is how far the request may grow until it stands still.

    The target has been told the answer's tokens before `first_index`. `deadline_ms` is absolute, on the clock of
    `now_ms`.
    """

    def __init__(
        self, *, attempt: Attempt, config: HandoffConfig, deadline_ms: int, offer: Offer, first_index: int
    ) -> None:
        super().__init__(
            attempt=attempt,
            config=config,
            deadline_ms=deadline_ms,
            offer=offer,
            table=MIGRATION_TABLE,
            inside=MIGRATION_INSIDE,
            home=MigrationState.RUNNING,
            offered=MigrationState.OFFERED,
            handed=MigrationState.HANDED,
            freed=MigrationState.FREED,
        )
        self.first_index = first_index
        self.num_blocks = -(-offer.num_tokens // offer.layout.block_size)  # that the target grants or has
        self.num_ready = len(offer.hashes)
        self.num_rounds = 0
        self.granted_ms: int | None = None  # absolute, as are the others
        self.fenced_ms: int | None = None
        self._round_end = 0  # blocks that are there when this round is over
        self._round_blocks = 0
        self._frame_ms: float | None = None  # the shortest time that a frame was under way
        self._sent_ms: dict[int, int] = {}
        self._computed = 0  # tokens whose KV the target gets; known in TAIL
        self._tokens: tuple[Token, ...] = ()
        self._revoking = False

    @property
    def alive(self) -> bool:
        """Whether the attempt may still come to something."""
        return self.state not in (MigrationState.RUNNING, MigrationState.HANDED, MigrationState.FREED)

    def next_deadline_ms(self) -> int | None:
        """When a Tick is wanted at the latest; None: not at all."""
        match self.state:
            case MigrationState.PRECOPY | MigrationState.FENCING:
                return min(self.deadline_ms, self._next_ms)
            case MigrationState.OFFERED | MigrationState.TAIL:
                return min(self.deadline_ms, self._next_ms, self._until_ms)
            case MigrationState.COMMITTING:
                return self._next_ms if self._revoking else min(self.deadline_ms, self._next_ms, self._until_ms)
            case _:
                return None

    # ---- while the request runs --------------------------------------------------------------------------------------

    def _ready(self, now_ms: int, event: BlocksReady) -> Actions:
        assert self.num_ready <= event.num, f"{event.num} blocks ready after {self.num_ready}"
        self.num_ready = event.num
        return self._advance(now_ms) if self.state is MigrationState.PRECOPY else []

    def _granted(self, now_ms: int, event: Grant) -> Actions:
        if (misfit := self._misfit(event, self.num_blocks)) is not None:
            return self._fail(now_ms, misfit)
        self._open(event, None)
        self.granted_ms = now_ms
        self._round_end = event.num_reused
        self.state = MigrationState.PRECOPY
        self._next_ms = now_ms + self.config.renew_ms
        return self._advance(now_ms)

    def _advance(self, now_ms: int) -> Actions:
        """Sends what this round still has; when all of it is there, begins the next one or fences the request."""
        assert self._window is not None
        outgrown = "the request has outgrown the room that the target granted"
        if self.num_ready >= self.num_blocks:
            return self._fail(now_ms, outgrown)
        if self.num_ready == self.num_blocks - 1:  # the last granted block begins to fill
            return self._fence_or_fail(now_ms, outgrown)
        actions = self._send(now_ms, self._round_end, PRECOPY_PRIORITY)
        if self._window.num_acked < self._round_end:
            return actions
        fresh = self.num_ready - self._round_end
        if fresh <= self.config.fence_blocks:
            return [*actions, *self._hold(now_ms, f"{fresh} full blocks are left after {self.num_rounds} rounds")]
        # A round of one block cannot shrink but to none.
        shrinks = self.num_rounds == 0 or fresh < self._round_blocks or fresh == 1
        if self.num_rounds >= self.config.rounds_max or not shrinks:
            told = f"round {self.num_rounds} copied {self._round_blocks} blocks, {fresh} became full meanwhile"
            return [*actions, *self._fail(now_ms, f"copying does not converge: {told}")]
        self.num_rounds += 1
        self._round_blocks, self._round_end = fresh, self.num_ready
        return [*actions, *self._send(now_ms, self._round_end, PRECOPY_PRIORITY)]

    def _hold(self, now_ms: int, reason: str) -> Actions:
        self.story.tell(now_ms, f"fence: {reason}")
        self.state = MigrationState.FENCING
        return [Hold()]

    def _fence_or_fail(self, now_ms: int, reason: str) -> Actions:
        """The request should not run on here: stand still for what is left, if that is not most of it."""
        assert self._window is not None
        missing = self.num_ready - self._window.num_acked
        if 2 * missing <= self.num_ready or missing == 1:
            return self._hold(now_ms, f"{missing} of {self.num_ready} blocks are not there, but {reason}")
        return self._fail(now_ms, f"{reason}, and {missing} of {self.num_ready} blocks are not there")

    def _starved(self, now_ms: int, event: Starved) -> Actions:
        return self._fence_or_fail(now_ms, "a request here found no block for its next step")

    def _preempted(self, now_ms: int, event: Preempted) -> Actions:
        return self._fail(now_ms, "the request lost its blocks to an older one")

    # ---- while it is to stand still, and does ------------------------------------------------------------------------

    def _fenced(self, now_ms: int, event: Fenced) -> Actions:
        assert self._window is not None
        indexes = [token.index for token in event.tokens]
        if indexes != list(range(self.first_index, self.first_index + len(indexes))):
            told = f"the newest tokens known here begin at {indexes[:1]}, the target knows those before"
            return self._fail(now_ms, f"{told} {self.first_index}")
        num_full, num_tail = divmod(event.num_computed, self.offer.layout.block_size)
        by_ids = tail_by_ids(
            exact=self.offer.exact, num_tokens=num_tail, frame_ms=self._frame_ms, token_ms=event.token_ms
        )
        if by_ids:
            num_tail = 0
        num_blocks = num_full + (num_tail > 0)
        if num_blocks > self.num_blocks:
            return self._fail(now_ms, f"the request has grown to {num_blocks} blocks, the grant is {self.num_blocks}")
        self.story.tell(now_ms, f"fenced at {event.num_computed} tokens, tail by {'ids' if by_ids else 'copy'}")
        self.fenced_ms = now_ms
        self._computed = num_full * self.offer.layout.block_size + num_tail
        self._tokens = event.tokens
        self._window.close(num_blocks)
        self.num_ready = num_blocks
        self.state = MigrationState.TAIL
        self._until_ms = now_ms + self.config.fence_limit_ms
        return self._send_tail(now_ms)

    def _send_tail(self, now_ms: int) -> Actions:
        assert self._window is not None
        actions = self._send(now_ms, self.num_ready, FENCE_PRIORITY)
        if not self._window.complete:
            return actions
        self.state = MigrationState.COMMITTING
        self._until_ms = now_ms + self.config.fence_limit_ms
        self._next_ms = now_ms + self.config.fence_resend_ms
        return [*actions, Say(body=self._commit_request())]

    # ---- frames ------------------------------------------------------------------------------------------------------

    def _send(self, now_ms: int, num_ready: int, priority: int) -> Actions:
        exports = self._exports(now_ms, num_ready, priority=priority)
        self._sent_ms.update((each.sequence, now_ms) for each in exports)
        return [*exports]

    def _send_more(self, now_ms: int) -> Actions:
        match self.state:
            case MigrationState.PRECOPY:
                return self._advance(now_ms)
            case MigrationState.FENCING:
                return self._send(now_ms, self.num_ready, FENCE_PRIORITY)
            case _:
                return self._send_tail(now_ms)

    def _acked(self, now_ms: int, event: FrameAcked) -> Actions:
        assert self._window is not None
        if self._window.acked(event.sequence, event.checksum) is None:
            self.num_ignored += 1
            return []
        frame_ms = float(now_ms - self._sent_ms[event.sequence])
        self._frame_ms = frame_ms if self._frame_ms is None else min(frame_ms, self._frame_ms)
        return [EndExport(sequence=event.sequence), *self._send_more(now_ms)]

    # ---- failures before the commit is asked -------------------------------------------------------------------------

    def _refused(self, now_ms: int, event: Refuse) -> Actions:
        return self._fail(now_ms, event.reason, code=event.code, tell_peer=False)

    def _stopped(self, now_ms: int, event: StopMove) -> Actions:
        """The router has given the move up, and the owner record knows."""
        return self._fail(now_ms, event.reason, tell_router=False)

    def _owner_told(self, now_ms: int, event: OwnerIs) -> Actions:
        """The router speaks up before the commit was asked: news is only that the request or the move is over."""
        if not self._still_ours(event):
            return [Say(body=Cancel(reason="the request is over")), Over(reason=who(event)), *self._drain()]
        return self._fail(now_ms, "the router has given the move up", tell_router=False) if event.over else []

    def _tick_copying(self, now_ms: int, event: Tick) -> Actions:
        if now_ms >= self.deadline_ms:
            return self._fail(now_ms, "the deadline passed while blocks were copied")
        return self._renew(now_ms)

    def _tick_tail(self, now_ms: int, event: Tick) -> Actions:
        if now_ms >= self.deadline_ms:
            return self._fail(now_ms, "the deadline passed while the last blocks travelled")
        if now_ms >= self._until_ms:
            return self._fail(now_ms, f"the last blocks were not there after {self.config.fence_limit_ms} ms")
        return self._renew(now_ms)

    # ---- the commit is asked -----------------------------------------------------------------------------------------

    def _owner_answered(self, now_ms: int, event: OwnerIs) -> Actions:
        if self._is_theirs(event):
            self.state = MigrationState.HANDED
            return [HandedOver(), *self._silence_or_close()]
        if not self._still_ours(event):
            return [Over(reason=who(event)), *self._end()]
        if not event.over:
            return []  # the target may be about to ask
        return self._fail(now_ms, "the commit is revoked", tell_router=False)

    def _doubt(self, now_ms: int, reason: str) -> Actions:
        """The attempt looks lost, but the commit may have happened: ask, and let it not happen any more."""
        self.story.tell(now_ms, reason)
        self._revoking = True
        self._next_ms = now_ms + self.config.resend_ms
        return [AskOwner(revoke=True)]

    def _tick_committing(self, now_ms: int, event: Tick) -> Actions:
        if not self._revoking and now_ms >= min(self.deadline_ms, self._until_ms):
            return self._doubt(now_ms, f"the commit was not answered in {self.config.fence_limit_ms} ms")
        if now_ms < self._next_ms:
            return []
        if self._revoking:
            return self._doubt(now_ms, "the owner record does not answer")
        self._next_ms = now_ms + self.config.fence_resend_ms
        return [Say(body=self._commit_request())]

    def _nothing(self, now_ms: int, event: object) -> Actions:
        return []

    # ---- parts of rows -----------------------------------------------------------------------------------------------

    def _commit_request(self) -> CommitRequest:
        return self._commit(self._computed, self._tokens)

    def _fail(
        self, now_ms: int, reason: str, *, code: str = FAILED_CODE, tell_peer: bool = True, tell_router: bool = True
    ) -> Actions:
        """Back to RUNNING: the request goes on here at once."""
        self.story.tell(now_ms, reason)
        told: Actions = [Say(body=Cancel(reason=reason))] if tell_peer else []
        given_up: Actions = [GiveUp(code=code, reason=reason)] if tell_router else []
        return [*told, Resume(), *given_up, *self._drain()]


_R, _O, _P = MigrationState.RUNNING, MigrationState.OFFERED, MigrationState.PRECOPY
_F, _T, _C = MigrationState.FENCING, MigrationState.TAIL, MigrationState.COMMITTING
_H, _X = MigrationState.HANDED, MigrationState.FREED
_M = SourceMigration

MIGRATION_INSIDE: frozenset[type] = frozenset({Start, BlocksReady, Fenced, Preempted, Starved, Stop, Tick})
MIGRATION_TABLE: Table[MigrationState] = {
    (_R, Start): Row(_M._start, (_O,)),
    (_R, FrameAcked): Row(_M._late_ack, (_R,)),
    (_R, TransferQuiet): Row(_M._quiet, (_R, _X)),
    (_R, AgentLost): Row(_M._agent_lost_late, (_R, _X)),
    (_R, Stop): Row(_M._stop, (_R, _X)),
    (_R, Tick): Row(_M._nothing, (_R,)),
    (_O, BlocksReady): Row(_M._ready, (_O,)),
    (_O, Preempted): Row(_M._preempted, (_X,)),
    (_O, Grant): Row(_M._granted, (_P, _F, _X)),
    (_O, Wait): Row(_M._wait, (_O,)),
    (_O, Refuse): Row(_M._refused, (_X,)),
    (_O, Cancel): Row(_M._cancelled, (_X,)),
    (_O, PeerGone): Row(_M._peer_gone, (_X,)),
    (_O, AgentLost): Row(_M._agent_lost, (_X,)),
    (_O, OwnerIs): Row(_M._owner_told, (_O, _X)),
    (_O, StopMove): Row(_M._stopped, (_X,)),
    (_O, Stop): Row(_M._stop, (_X,)),
    (_O, Tick): Row(_M._tick_offered, (_O, _X)),
    (_P, BlocksReady): Row(_M._ready, (_P, _F, _R)),
    (_P, Preempted): Row(_M._preempted, (_R,)),
    (_P, Starved): Row(_M._starved, (_F, _R)),
    (_P, FrameAcked): Row(_M._acked, (_P, _F, _R)),
    (_P, FrameFailed): Row(_M._frame_failed, (_P, _R)),
    (_P, Refuse): Row(_M._refused, (_R,)),
    (_P, Cancel): Row(_M._cancelled, (_R,)),
    (_P, PeerGone): Row(_M._peer_gone, (_R,)),
    (_P, AgentLost): Row(_M._agent_lost, (_X,)),
    (_P, OwnerIs): Row(_M._owner_told, (_P, _R)),
    (_P, StopMove): Row(_M._stopped, (_R,)),
    (_P, Stop): Row(_M._stop, (_R,)),
    (_P, Tick): Row(_M._tick_copying, (_P, _R)),
    (_F, Fenced): Row(_M._fenced, (_T, _C, _R, _X)),
    (_F, FrameAcked): Row(_M._acked, (_F,)),
    (_F, FrameFailed): Row(_M._frame_failed, (_F, _R)),
    (_F, Refuse): Row(_M._refused, (_R, _X)),
    (_F, Cancel): Row(_M._cancelled, (_R, _X)),
    (_F, PeerGone): Row(_M._peer_gone, (_R, _X)),
    (_F, AgentLost): Row(_M._agent_lost, (_X,)),
    (_F, OwnerIs): Row(_M._owner_told, (_F, _R, _X)),
    (_F, StopMove): Row(_M._stopped, (_R, _X)),
    (_F, Stop): Row(_M._stop, (_R, _X)),
    (_F, Tick): Row(_M._tick_copying, (_F, _R, _X)),
    (_T, FrameAcked): Row(_M._acked, (_T, _C)),
    (_T, FrameFailed): Row(_M._frame_failed, (_T, _R)),
    (_T, Refuse): Row(_M._refused, (_R,)),
    (_T, Cancel): Row(_M._cancelled, (_R,)),
    (_T, PeerGone): Row(_M._peer_gone, (_R,)),
    (_T, AgentLost): Row(_M._agent_lost, (_X,)),
    (_T, OwnerIs): Row(_M._owner_told, (_T, _R)),
    (_T, StopMove): Row(_M._stopped, (_R,)),
    (_T, Stop): Row(_M._stop, (_R,)),
    (_T, Tick): Row(_M._tick_tail, (_T, _R)),
    (_C, OwnerIs): Row(_M._owner_answered, (_C, _H, _R, _X)),
    (_C, Cancel): Row(_M._doubt_cancel, (_C,)),
    (_C, PeerGone): Row(_M._doubt_peer, (_C,)),
    (_C, StopMove): Row(_M._stopped, (_R, _X)),
    (_C, Stop): Row(_M._stop_asked, (_X,)),
    (_C, Tick): Row(_M._tick_committing, (_C,)),
    (_H, TransferQuiet): Row(_M._quiet, (_X,)),
    (_H, AgentLost): Row(_M._agent_lost_late, (_X,)),
    (_H, Stop): Row(_M._nothing, (_H,)),
    (_H, Tick): Row(_M._nothing, (_H,)),
}
