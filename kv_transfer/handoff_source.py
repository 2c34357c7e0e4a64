"""The source's end of a handoff: it offers, sends blocks as they become final, asks for the commit, and lets go.

The sentence that the table keeps: the source frees only after the commit is answered. Once CommitRequest has been
said (FENCED), neither the target's Cancel nor its death ends the attempt: only the owner record does (OwnerIs), or the
router's own word that the request is over (Stop).
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
    Failed,
    HandedOver,
    HandoffConfig,
    Over,
    Row,
    Say,
    SourceAction,
    Stop,
    Table,
)
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
from tandem.messages import OwnerIs
from tandem.request import Token

Actions = list[SourceAction]
FAILED_CODE = "handoff_failed"


class SourceState(StrEnum):
    """How far the source is."""

    HOLDING = "holding"  # the request is ours and no attempt is alive; one that failed may still have frames under way
    OFFERED = "offered"  # the target has been asked for room
    SENDING = "sending"  # the target has granted blocks; frames go as blocks become final
    FENCED = "fenced"  # every block is there and the commit is asked: only the owner record decides
    HANDED = "handed"  # the target owns the request; the agent is about to fall silent
    FREED = "freed"  # nothing of the attempt is held any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Offer the request to the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksReady:
    """The first `num` blocks of the block table are full and final."""

    num: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """The request stands still here: all its blocks are final, the target goes on from `tokens`."""

    tokens: tuple[Token, ...]


class SourceHandoff(SourceEnd[SourceState]):
    """The source's end of one attempt. `num_blocks` is all blocks of the offered tokens, the last one may be partial.

    `deadline_ms` is absolute, on the clock of `now_ms`.
    """

    def __init__(
        self,
        *,
        attempt: Attempt,
        config: HandoffConfig,
        deadline_ms: int,
        offer: Offer,
        num_blocks: int,
    ) -> None:
        super().__init__(
            attempt=attempt,
            config=config,
            deadline_ms=deadline_ms,
            offer=offer,
            table=SOURCE_TABLE,
            inside=SOURCE_INSIDE,
            home=SourceState.HOLDING,
            offered=SourceState.OFFERED,
            handed=SourceState.HANDED,
            freed=SourceState.FREED,
        )
        assert len(offer.hashes) <= num_blocks, f"{len(offer.hashes)} hashes for {num_blocks} blocks"
        self.num_blocks = num_blocks
        self.num_ready = 0
        self._tokens: tuple[Token, ...] | None = None  # known once fenced by the core
        self._give_up: str | None = None  # why the attempt ends as soon as the owner record allows it

    @property
    def alive(self) -> bool:
        """Whether the attempt may still come to something."""
        return not self._draining and self.state not in (SourceState.HANDED, SourceState.FREED)

    def next_deadline_ms(self) -> int | None:
        """When a Tick is wanted at the latest; None: not at all."""
        if not self.alive:
            return None
        if self.state is SourceState.HOLDING:
            return self.deadline_ms
        if self.state is SourceState.OFFERED:
            return min(self.deadline_ms, self._next_ms, self._until_ms)
        if self.state is SourceState.FENCED and self._give_up is not None:
            return self._next_ms
        return min(self.deadline_ms, self._next_ms)

    # ---- before the commit is asked ----------------------------------------------------------------------------------

    def _ready(self, now_ms: int, event: BlocksReady) -> Actions:
        assert self.num_ready <= event.num <= self.num_blocks, f"{event.num} blocks ready after {self.num_ready}"
        self.num_ready = event.num
        return self._send_more(now_ms)

    def _fence(self, now_ms: int, event: Fence) -> Actions:
        assert self._tokens is None, f"{self.attempt.transfer_id} is fenced twice: {self.story}"
        self._tokens = event.tokens
        self.num_ready = self.num_blocks
        return self._send_more(now_ms)

    def _granted(self, now_ms: int, event: Grant) -> Actions:
        if (misfit := self._misfit(event, self.num_blocks)) is not None:
            return self._fail(now_ms, misfit)
        self._open(event, self.num_blocks)
        self.state = SourceState.SENDING
        self._next_ms = now_ms + self.config.renew_ms
        return self._send_more(now_ms)

    def _refused(self, now_ms: int, event: Refuse) -> Actions:
        return self._fail(now_ms, f"{event.code}: {event.reason}", retryable=event.retryable, tell_peer=False)

    def _acked(self, now_ms: int, event: FrameAcked) -> Actions:
        assert self._window is not None
        if self._window.acked(event.sequence, event.checksum) is None:
            self.num_ignored += 1
            return []
        return [EndExport(sequence=event.sequence), *self._send_more(now_ms)]

    def _tick_holding(self, now_ms: int, event: Tick) -> Actions:
        if self._draining or now_ms < self.deadline_ms:
            return []
        return self._fail(now_ms, "the deadline passed before the handoff began", tell_peer=False)

    def _tick_sending(self, now_ms: int, event: Tick) -> Actions:
        if now_ms >= self.deadline_ms:
            return self._fail(now_ms, "the deadline passed before all blocks were sent")
        return self._renew(now_ms)

    def _owner_told(self, now_ms: int, event: OwnerIs) -> Actions:
        """The router speaks up before the commit was asked: only news that the request is not ours matters."""
        if self._still_ours(event):
            return []
        return [Say(body=Cancel(reason="the request is over")), Over(reason=who(event)), *self._drain()]

    # ---- the commit is asked -----------------------------------------------------------------------------------------

    def _owner_answered(self, now_ms: int, event: OwnerIs) -> Actions:
        if self._is_theirs(event):
            self.state = SourceState.HANDED
            return [HandedOver(), *self._silence_or_close()]
        if not self._still_ours(event):
            return [Over(reason=who(event)), *self._end()]
        if self._give_up is None:
            return []  # the target may be about to ask: its lease and our deadline bound that
        return self._fail(now_ms, self._give_up)

    def _doubt(self, now_ms: int, reason: str) -> Actions:
        """The attempt looks lost, but the commit may have happened: ask."""
        if self._give_up is None:
            self._give_up = reason
        self.story.tell(now_ms, reason)
        self._next_ms = now_ms + self.config.resend_ms
        return [AskOwner()]

    def _tick_fenced(self, now_ms: int, event: Tick) -> Actions:
        if now_ms >= self.deadline_ms and self._give_up is None:
            return self._doubt(now_ms, "the deadline passed before the commit was answered")
        if now_ms < self._next_ms:
            return []
        self._next_ms = now_ms + self.config.resend_ms
        again: Actions = [] if self._give_up is not None else [Say(body=self._commit_request())]
        return [*again, AskOwner()]

    # ---- parts of rows -----------------------------------------------------------------------------------------------

    def _commit_request(self) -> CommitRequest:
        assert self._tokens is not None
        return self._commit(self.offer.num_tokens, self._tokens)

    def _send_more(self, now_ms: int) -> Actions:
        """Sends what may go; when all is acknowledged and the request stands still, asks for the commit."""
        if self._window is None:
            return []
        actions: Actions = [*self._exports(now_ms, self.num_ready)]
        if self._tokens is not None and self._window.complete:
            self.state = SourceState.FENCED
            self._next_ms = now_ms + self.config.resend_ms
            actions.append(Say(body=self._commit_request()))
        return actions

    def _fail(self, now_ms: int, reason: str, *, retryable: bool = True, tell_peer: bool = True) -> Actions:
        """Back to HOLDING: the request stays ours, its core reports that this attempt failed."""
        self.story.tell(now_ms, reason)
        told: Actions = [Say(body=Cancel(reason=reason))] if tell_peer else []
        return [*told, Failed(code=FAILED_CODE, reason=reason, retryable=retryable), *self._drain()]


_H, _O, _S = SourceState.HOLDING, SourceState.OFFERED, SourceState.SENDING
_N, _D, _X = SourceState.FENCED, SourceState.HANDED, SourceState.FREED
_M = SourceHandoff

SOURCE_INSIDE: frozenset[type] = frozenset({Start, BlocksReady, Fence, Stop, Tick})
SOURCE_TABLE: Table[SourceState] = {
    (_H, Start): Row(_M._start, (_O,)),
    (_H, BlocksReady): Row(_M._ready, (_H,)),
    (_H, Fence): Row(_M._fence, (_H,)),
    (_H, Tick): Row(_M._tick_holding, (_H, _X)),
    (_H, Stop): Row(_M._stop, (_H, _X)),
    (_H, FrameAcked): Row(_M._late_ack, (_H,)),
    (_H, TransferQuiet): Row(_M._quiet, (_H, _X)),
    (_H, AgentLost): Row(_M._agent_lost_late, (_H, _X)),
    (_O, BlocksReady): Row(_M._ready, (_O,)),
    (_O, Fence): Row(_M._fence, (_O,)),
    (_O, Grant): Row(_M._granted, (_S, _N, _X)),
    (_O, Wait): Row(_M._wait, (_O,)),
    (_O, Refuse): Row(_M._refused, (_X,)),
    (_O, Cancel): Row(_M._cancelled, (_X,)),
    (_O, PeerGone): Row(_M._peer_gone, (_X,)),
    (_O, AgentLost): Row(_M._agent_lost, (_X,)),
    (_O, OwnerIs): Row(_M._owner_told, (_O, _X)),
    (_O, Stop): Row(_M._stop, (_X,)),
    (_O, Tick): Row(_M._tick_offered, (_O, _X)),
    (_S, BlocksReady): Row(_M._ready, (_S,)),
    (_S, Fence): Row(_M._fence, (_S, _N)),
    (_S, FrameAcked): Row(_M._acked, (_S, _N)),
    (_S, FrameFailed): Row(_M._frame_failed, (_S, _H)),
    (_S, Refuse): Row(_M._refused, (_H, _X)),
    (_S, Cancel): Row(_M._cancelled, (_H, _X)),
    (_S, PeerGone): Row(_M._peer_gone, (_H, _X)),
    (_S, AgentLost): Row(_M._agent_lost, (_X,)),
    (_S, OwnerIs): Row(_M._owner_told, (_S, _H, _X)),
    (_S, Stop): Row(_M._stop, (_H, _X)),
    (_S, Tick): Row(_M._tick_sending, (_S, _H, _X)),
    (_N, OwnerIs): Row(_M._owner_answered, (_N, _D, _H, _X)),
    (_N, Cancel): Row(_M._doubt_cancel, (_N,)),
    (_N, PeerGone): Row(_M._doubt_peer, (_N,)),
    (_N, Stop): Row(_M._stop_asked, (_X,)),
    (_N, Tick): Row(_M._tick_fenced, (_N,)),
    (_D, Stop): Row(lambda machine, now_ms, event: [], (_D,)),
    (_D, Tick): Row(lambda machine, now_ms, event: [], (_D,)),
    (_D, TransferQuiet): Row(_M._quiet, (_X,)),
    (_D, AgentLost): Row(_M._agent_lost_late, (_X,)),
}
