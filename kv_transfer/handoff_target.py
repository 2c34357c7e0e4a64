"""The target's end of a handoff or a migration: it reserves, lets blocks land, seals what is whole, asks, and runs it.

To the target they differ little: a request that is migrated grows meanwhile, by the tokens in CommitRequest, and leaves
what it does not fill of the granted blocks for later. The sentences that the table keeps: the target never runs on a
block that is not there, nor on one that anybody may still write (ACTIVE needs the owner record's word and the agent's
silence); and blocks that an outsider may still write are nobody's until the agent is quiet (QUARANTINE).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import StrEnum

from engine.events import PeerGone, Tick
from kv_transfer.actions import AgentLost
from kv_transfer.handoff import (
    AcceptBlocks,
    AskCommit,
    Attempt,
    Closed,
    EndQuarantine,
    Expect,
    Failed,
    HandoffConfig,
    Machine,
    Quarantine,
    Reserve,
    Row,
    Say,
    Silence,
    Stop,
    Table,
    TargetAction,
    frame_digest,
)
from kv_transfer.messages import (
    Cancel,
    CommitRequest,
    FrameFailed,
    FrameLanded,
    Grant,
    Offer,
    Refuse,
    Renew,
    StatusAsk,
    StatusIs,
    TransferQuiet,
    Wait,
)
from tandem.messages import OwnerIs

Actions = list[TargetAction]
FAILED_CODE = "handoff_failed"


class TargetState(StrEnum):
    """How far the target is."""

    NONE = "none"  # nothing is held here
    RESERVED = "reserved"  # blocks are granted, none has landed
    RECEIVING = "receiving"  # some frames have landed
    SEALED = "sealed"  # every block is here and checked; the owner record is asked
    ACTIVE = "active"  # the request is ours
    QUARANTINE = "quarantine"  # given up; the agent may still write the blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """There is room: the leading `num_reused` blocks are here and pinned, `blocks` are granted for the rest."""

    num_reused: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    endpoint: str  # of this worker's agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Postponed:
    """No room now."""

    retry_after_ms: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Declined:
    """No room ever, or not for this source."""

    code: str
    reason: str
    retryable: bool


class TargetHandoff(Machine[TargetState]):
    """The target's end of one attempt. `deadline_ms` is absolute, on the clock of `now_ms`.

    The router told us the first `num_tokens` tokens; the next is answer token `next_index`. The source hands over that
    one alone, or, with `move`, all that it drew until it stood still.
    """

    def __init__(
        self,
        *,
        attempt: Attempt,
        config: HandoffConfig,
        deadline_ms: int,
        num_tokens: int,
        next_index: int,
        block_size: int,
        move: bool = False,
    ) -> None:
        super().__init__(
            attempt=attempt,
            config=config,
            deadline_ms=deadline_ms,
            state=TargetState.NONE,
            table=TARGET_TABLE,
            inside=TARGET_INSIDE,
        )
        self.num_tokens = num_tokens
        self.next_index = next_index
        self.block_size = block_size
        self.move = move
        self.quarantined_since_ms: int | None = None
        self._offer: Offer | None = None
        self._grant: Grant | None = None
        self._landed: dict[int, FrameLanded] = {}
        self._commit: CommitRequest | None = None
        self._lease_until_ms = 0
        self._next_ms = 0
        self._quiet = True  # nobody can write our blocks: no frame was ever expected, or the agent has said so
        self._owned_epoch: int | None = None  # the owner record gave us the request, the agent is not quiet yet
        self._over = False
        self._trusted = True  # what has landed is what the source speaks of

    @property
    def epoch(self) -> int:
        """The epoch that this end reports under: the source's until the commit, then its own."""
        return self.attempt.epoch if self._owned_epoch is None else self._owned_epoch

    def next_deadline_ms(self) -> int | None:
        """When a Tick is wanted at the latest; None: not at all."""
        match self.state:
            case TargetState.NONE:
                return None if self._over else self.deadline_ms
            case TargetState.RESERVED | TargetState.RECEIVING:
                return min(self.deadline_ms, self._lease_until_ms)
            case TargetState.SEALED:
                return self._next_ms
            case _:
                return None

    # ---- reserving ---------------------------------------------------------------------------------------------------

    def _offered(self, now_ms: int, event: Offer) -> Actions:
        if self._over:
            self.num_ignored += 1
            return []
        self._offer = event
        return [Reserve(offer=event)]

    def _reserved(self, now_ms: int, event: Reserved) -> Actions:
        assert self._offer is not None
        self.state = TargetState.RESERVED
        self._grant = Grant(
            num_reused=event.num_reused,
            blocks=event.blocks,
            generations=event.generations,
            credits=self.config.credits,
            lease_ms=min(self._offer.lease_ms, self.config.lease_ms),
            endpoint=event.endpoint,
        )
        self._renew(now_ms)
        expect: Actions = []
        if event.blocks:
            self._quiet = False
            expect = [Expect(blocks=event.blocks, generations=event.generations, endpoint=self._offer.endpoint)]
        return [*expect, Say(body=self._grant)]

    def _postponed(self, now_ms: int, event: Postponed) -> Actions:
        self.story.tell(now_ms, f"no room: {event.reason}")
        return [Say(body=Wait(retry_after_ms=event.retry_after_ms, reason=event.reason))]

    def _declined(self, now_ms: int, event: Declined) -> Actions:
        """The source reports it to the router."""
        self.story.tell(now_ms, f"{event.code}: {event.reason}")
        self._over = True
        return [Say(body=Refuse(code=event.code, reason=event.reason, retryable=event.retryable)), Closed()]

    def _offered_again(self, now_ms: int, event: Offer) -> Actions:
        assert self._grant is not None
        if event != self._offer:
            self.num_ignored += 1
            return []
        return [Say(body=self._grant)]

    def _gone_before(self, now_ms: int, event: PeerGone) -> Actions:
        return self._end_none(now_ms, f"the source {event.worker_id} is gone", report=True)

    def _cancelled_before(self, now_ms: int, event: Cancel) -> Actions:
        return self._end_none(now_ms, event.reason, report=False)

    def _stopped_before(self, now_ms: int, event: Stop) -> Actions:
        return self._end_none(now_ms, event.reason, report=False)

    def _tick_none(self, now_ms: int, event: Tick) -> Actions:
        if self._over or now_ms < self.deadline_ms:
            return []
        return self._end_none(now_ms, "the deadline passed before the source offered", report=True)

    def _end_none(self, now_ms: int, reason: str, *, report: bool) -> Actions:
        if self._over:
            return []
        self._over = True
        self.story.tell(now_ms, reason)
        failed: Actions = [Failed(code=FAILED_CODE, reason=reason, retryable=True)] if report else []
        return [*failed, Closed()]

    # ---- receiving ---------------------------------------------------------------------------------------------------

    def _frame(self, now_ms: int, event: FrameLanded) -> Actions:
        assert self._grant is not None
        before = self._landed.get(event.sequence)
        if before is not None:
            if before == event:
                self.num_ignored += 1
                return []
            return self._distrust(now_ms, f"frame {event.sequence} landed twice with different content")
        if not set(event.target_blocks) <= set(self._grant.blocks):
            return self._distrust(now_ms, f"frame {event.sequence} wrote blocks that were not granted")
        self.state = TargetState.RECEIVING
        self._landed[event.sequence] = event
        self._renew(now_ms)
        return self._seal(now_ms)

    def _frame_failed(self, now_ms: int, event: FrameFailed) -> Actions:
        """The source hears of it too, and sends again or gives up."""
        self.story.tell(now_ms, f"frame {event.sequence} failed: {event.reason}")
        return []

    def _commit_asked(self, now_ms: int, event: CommitRequest) -> Actions:
        """The agent's word on the last frames may come after the source's word that they were acknowledged."""
        if self._commit is not None and self._commit != event:
            return self._distrust(now_ms, "two commit requests differ")
        self._commit = event
        self._renew(now_ms)
        return self._seal(now_ms)

    def _renewed(self, now_ms: int, event: Renew) -> Actions:
        self._renew(now_ms)
        return []

    def _cancelled(self, now_ms: int, event: Cancel) -> Actions:
        self._trusted = self._trusted and not event.spoiled
        return self._abort(now_ms, f"the source cancelled: {event.reason}", report=False, tell_peer=False)

    def _peer_gone(self, now_ms: int, event: PeerGone) -> Actions:
        return self._abort(now_ms, f"the source {event.worker_id} is gone", tell_peer=False)

    def _agent_lost(self, now_ms: int, event: AgentLost) -> Actions:
        self._quiet = True
        aborted = self._abort(now_ms, f"the transfer agent is lost: {event.reason}")
        return [Silence(), *aborted]  # its successor may have been told to expect frames already

    def _stop(self, now_ms: int, event: Stop) -> Actions:
        return self._abort(now_ms, event.reason, report=False)

    def _tick_leased(self, now_ms: int, event: Tick) -> Actions:
        if now_ms >= self.deadline_ms:
            return self._abort(now_ms, "the deadline passed before all blocks were here")
        if now_ms >= self._lease_until_ms:
            return self._abort(now_ms, "the source gave no sign of life within its lease")
        return []

    # ---- sealed ------------------------------------------------------------------------------------------------------

    def _owner_answered(self, now_ms: int, event: OwnerIs) -> Actions:
        if not self._is_ours(event):
            self._owned_epoch = None
            why = event.refused or f"the owner is {event.worker_id} at epoch {event.epoch}"
            return self._abort(now_ms, f"the commit was refused: {why}", report=False)
        if self._owned_epoch is None:
            self._owned_epoch = event.epoch
            self._next_ms = now_ms + self.config.quiet_limit_ms
        return self._activate()

    def _quiet_sealed(self, now_ms: int, event: TransferQuiet | AgentLost) -> Actions:
        self._quiet = True
        return self._activate() if self._owned_epoch is not None else []

    def _tick_sealed(self, now_ms: int, event: Tick) -> Actions:
        if now_ms < self._next_ms:
            return []
        if self._owned_epoch is not None:
            return self._abort(now_ms, "the transfer agent did not fall silent in time")
        self._next_ms = now_ms + self.config.resend_ms
        return [self._ask()]

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _owned_too_late(self, now_ms: int, event: OwnerIs) -> Actions:
        """The owner record gives us what we gave up: it must hear that nobody runs the request."""
        if not self._is_ours(event) or self._owned_epoch is not None:
            return []
        self._owned_epoch = event.epoch
        return [Failed(code=FAILED_CODE, reason="the target had given the attempt up", retryable=True)]

    def _quiet_at_last(self, now_ms: int, event: TransferQuiet | AgentLost) -> Actions:
        self._quiet = self._over = True
        self.state = TargetState.NONE
        return [EndQuarantine(whole=self._whole()), Closed()]

    def _cancelled_late(self, now_ms: int, event: Cancel) -> Actions:
        """The router's word that it is over was faster."""
        self._trusted = self._trusted and not event.spoiled
        return []

    def _nothing(self, now_ms: int, event: object) -> Actions:
        return []

    def _status(self, now_ms: int, event: StatusAsk) -> Actions:
        return [Say(body=StatusIs(state=self.state.value))]

    # ---- parts of rows -----------------------------------------------------------------------------------------------

    def _renew(self, now_ms: int) -> None:
        assert self._grant is not None
        self._lease_until_ms = now_ms + self._grant.lease_ms

    def _seal(self, now_ms: int) -> Actions:
        """When the source has said what all is, and all is here: seal it, or give up what does not fit."""
        commit, grant = self._commit, self._grant
        if commit is None or len(self._landed) < commit.num_frames:
            return []
        assert grant is not None
        problem = self._problem(commit, grant)
        if problem:
            return self._distrust(now_ms, problem)
        self.state = TargetState.SEALED
        self._next_ms = now_ms + self.config.resend_ms
        silence: Actions = [] if self._quiet else [Silence()]
        return [*silence, self._ask()]

    def _problem(self, commit: CommitRequest, grant: Grant) -> str:
        """What does not fit of what the source says and what has landed; empty when all does."""
        size, computed = self.block_size, commit.num_computed_tokens
        num_tokens = self.num_tokens + len(commit.tokens)
        indexes = [token.index for token in commit.tokens]
        expected = list(range(self.next_index, self.next_index + (len(indexes) if self.move else 1)))
        # What is computed ends with the last token but one, or, when that tail goes by token ids, with the last full
        # block before it.
        ends = {num_tokens - 1, (num_tokens - 1) // size * size} if self.move else {self.num_tokens}
        num_written = -(-computed // size) - grant.num_reused
        written = sorted(block for frame in self._landed.values() for block in frame.target_blocks)
        if len(self._landed) > commit.num_frames:
            return f"{len(self._landed)} frames landed, the source speaks of {commit.num_frames}"
        if indexes != expected:
            return f"the source hands over tokens {indexes}, {expected} expected"
        if computed not in ends:
            return f"the source computed {computed} tokens of {num_tokens}, the router spoke of {self.num_tokens}"
        if not 0 <= num_written <= len(grant.blocks):
            return f"{computed} tokens and {grant.num_reused} blocks reused do not fit {len(grant.blocks)} granted"
        if written != sorted(grant.blocks[:num_written]):
            return f"the frames wrote {len(written)} blocks, {num_written} of {len(grant.blocks)} granted were due"
        if frame_digest({seq: frame.checksum for seq, frame in self._landed.items()}) != commit.digest:
            return "the digest of the frames differs from the source's"
        return ""

    def _is_ours(self, event: OwnerIs) -> bool:
        ours = (self.attempt.me, self.attempt.target_incarnation, self.attempt.epoch + 1)
        return (event.worker_id, event.incarnation, event.epoch) == ours

    def _ask(self) -> AskCommit:
        assert self._commit is not None
        return AskCommit(next_index=self.next_index + len(self._commit.tokens), tokens=self._commit.tokens)

    def _activate(self) -> Actions:
        if not self._quiet:
            return []
        assert self._commit is not None
        assert self._owned_epoch is not None
        self.state = TargetState.ACTIVE
        accept = AcceptBlocks(
            epoch=self._owned_epoch,
            tokens=self._commit.tokens,
            num_computed=self._commit.num_computed_tokens,
            num_frames=len(self._landed),
            num_blocks=sum(len(frame.target_blocks) for frame in self._landed.values()),
            num_bytes=sum(frame.num_bytes for frame in self._landed.values()),
        )
        return [accept, Closed()]

    def _whole(self) -> tuple[tuple[int, int], ...]:
        """The leading granted blocks that have landed and that the offer names: worth keeping as prefix cache.

        An offered block was final before the offer was made. A frame that has landed is not written again.
        """
        offer, grant = self._offer, self._grant
        if offer is None or grant is None or not self._trusted:
            return ()
        landed = {block for frame in self._landed.values() for block in frame.target_blocks}
        offered = grant.blocks[: max(0, len(offer.hashes) - grant.num_reused)]
        leading = itertools.takewhile(lambda each: each[1] in landed, enumerate(offered, grant.num_reused))
        return tuple(leading)

    def _distrust(self, now_ms: int, reason: str) -> Actions:
        """The source does not keep to the protocol: nothing of what it sent is used."""
        self._trusted = False
        return self._abort(now_ms, reason)

    def _abort(self, now_ms: int, reason: str, *, report: bool = True, tell_peer: bool = True) -> Actions:
        """Gives the attempt up. The blocks are nobody's until the agent is quiet."""
        self.story.tell(now_ms, reason)
        actions: Actions = [Say(body=Cancel(reason=reason))] if tell_peer else []
        if report:
            actions.append(Failed(code=FAILED_CODE, reason=reason, retryable=True))
        actions.append(Quarantine())
        if self._quiet:
            self._over = True
            self.state = TargetState.NONE
            return [*actions, EndQuarantine(whole=self._whole()), Closed()]
        self.quarantined_since_ms = now_ms
        if self.state is not TargetState.SEALED:  # sealing told the agent already
            actions.append(Silence())
        self.state = TargetState.QUARANTINE
        return actions


_N, _R, _V = TargetState.NONE, TargetState.RESERVED, TargetState.RECEIVING
_S, _A, _Q = TargetState.SEALED, TargetState.ACTIVE, TargetState.QUARANTINE
_M = TargetHandoff

TARGET_INSIDE: frozenset[type] = frozenset({Reserved, Postponed, Declined, Stop, Tick})
TARGET_TABLE: Table[TargetState] = {
    (_N, Offer): Row(_M._offered, (_N,)),
    (_N, Reserved): Row(_M._reserved, (_R,)),
    (_N, Postponed): Row(_M._postponed, (_N,)),
    (_N, Declined): Row(_M._declined, (_N,)),
    (_N, Cancel): Row(_M._cancelled_before, (_N,)),
    (_N, PeerGone): Row(_M._gone_before, (_N,)),
    (_N, StatusAsk): Row(_M._status, (_N,)),
    (_N, Stop): Row(_M._stopped_before, (_N,)),
    (_N, Tick): Row(_M._tick_none, (_N,)),
    (_R, Offer): Row(_M._offered_again, (_R,)),
    (_R, FrameLanded): Row(_M._frame, (_V, _S, _Q, _N)),
    (_R, FrameFailed): Row(_M._frame_failed, (_R,)),
    (_R, CommitRequest): Row(_M._commit_asked, (_R, _S, _Q, _N)),
    (_R, Renew): Row(_M._renewed, (_R,)),
    (_R, Cancel): Row(_M._cancelled, (_Q, _N)),
    (_R, PeerGone): Row(_M._peer_gone, (_Q, _N)),
    (_R, AgentLost): Row(_M._agent_lost, (_N,)),
    (_R, StatusAsk): Row(_M._status, (_R,)),
    (_R, Stop): Row(_M._stop, (_Q, _N)),
    (_R, Tick): Row(_M._tick_leased, (_R, _Q, _N)),
    (_V, Offer): Row(_M._offered_again, (_V,)),
    (_V, FrameLanded): Row(_M._frame, (_V, _S, _Q)),
    (_V, FrameFailed): Row(_M._frame_failed, (_V,)),
    (_V, CommitRequest): Row(_M._commit_asked, (_V, _S, _Q)),
    (_V, Renew): Row(_M._renewed, (_V,)),
    (_V, Cancel): Row(_M._cancelled, (_Q,)),
    (_V, PeerGone): Row(_M._peer_gone, (_Q,)),
    (_V, AgentLost): Row(_M._agent_lost, (_N,)),
    (_V, StatusAsk): Row(_M._status, (_V,)),
    (_V, Stop): Row(_M._stop, (_Q,)),
    (_V, Tick): Row(_M._tick_leased, (_V, _Q)),
    (_S, OwnerIs): Row(_M._owner_answered, (_S, _A, _Q, _N)),
    (_S, TransferQuiet): Row(_M._quiet_sealed, (_S, _A)),
    (_S, AgentLost): Row(_M._quiet_sealed, (_S, _A)),
    (_S, StatusAsk): Row(_M._status, (_S,)),
    (_S, Stop): Row(_M._stop, (_Q, _N)),
    (_S, Tick): Row(_M._tick_sealed, (_S, _Q)),
    (_A, StatusAsk): Row(_M._status, (_A,)),
    (_Q, OwnerIs): Row(_M._owned_too_late, (_Q,)),
    (_Q, Cancel): Row(_M._cancelled_late, (_Q,)),
    (_Q, TransferQuiet): Row(_M._quiet_at_last, (_N,)),
    (_Q, AgentLost): Row(_M._quiet_at_last, (_N,)),
    (_Q, StatusAsk): Row(_M._status, (_Q,)),
    (_Q, Stop): Row(_M._nothing, (_Q,)),
    (_Q, Tick): Row(_M._nothing, (_Q,)),
}
