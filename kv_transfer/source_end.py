"""What the source's ends of handoffs and migrations have in common: a grant, frames under way, and how they end."""

from __future__ import annotations

from typing import Any

from engine.events import PeerGone, Tick
from kv_transfer.actions import AgentLost
from kv_transfer.handoff import (
    Attempt,
    Closed,
    EndExport,
    ExportFrame,
    HandoffConfig,
    Machine,
    S,
    Say,
    Silence,
    Stop,
    Table,
    frame_digest,
)
from kv_transfer.messages import (
    Cancel,
    CommitRequest,
    FrameAcked,
    FrameFailed,
    Grant,
    Offer,
    Renew,
    TransferQuiet,
    Wait,
)
from kv_transfer.plan import SendWindow, frame_blocks
from tandem.messages import OwnerIs
from tandem.request import Token


class SourceEnd(Machine[S]):
    """A machine that offers and sends. The tables and what single rows do are the subclasses' own.

    Of the states that all sources have, `home` is the one in which no attempt is alive, `offered` and `handed` are what
    their names say, and in `freed` nothing of the attempt is held any more.
    """

    def __init__(
        self,
        *,
        attempt: Attempt,
        config: HandoffConfig,
        deadline_ms: int,
        offer: Offer,
        table: Table[S],
        inside: frozenset[type],
        home: S,
        offered: S,
        handed: S,
        freed: S,
    ) -> None:
        super().__init__(
            attempt=attempt, config=config, deadline_ms=deadline_ms, state=home, table=table, inside=inside
        )
        self.offer = offer
        self.first_frame_ms: int | None = None  # absolute
        self._home, self._offered, self._handed, self._freed = home, offered, handed, freed
        self._until_ms = 0  # when this state has lasted too long
        self._next_ms = 0  # when the message of this state goes again
        self._grant: Grant | None = None
        self._window: SendWindow | None = None
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether the attempt has failed and waits only for the agent."""
        return self._draining

    # ---- what each source does in its own way ------------------------------------------------------------------------

    def _send_more(self, now_ms: int) -> list[Any]:
        """Sends what may go, now that frames have come free, and goes on when that was the last of it."""
        raise NotImplementedError

    def _fail(self, now_ms: int, reason: str, *, tell_peer: bool = True) -> list[Any]:
        """The attempt failed, and the request stays with this worker."""
        raise NotImplementedError

    def _doubt(self, now_ms: int, reason: str) -> list[Any]:
        """The attempt looks lost, but the commit has been asked and may have happened."""
        raise NotImplementedError

    # ---- the offer ---------------------------------------------------------------------------------------------------

    def _start(self, now_ms: int, event: object) -> list[Any]:
        assert not self._draining, f"{self.attempt.transfer_id} starts again: {self.story}"
        self.state = self._offered
        self._until_ms = now_ms + self.config.offer_limit_ms
        self._next_ms = now_ms + self.config.resend_ms
        return [Say(body=self.offer)]

    def _wait(self, now_ms: int, event: Wait) -> list[Any]:
        self._next_ms = now_ms + min(max(event.retry_after_ms, 1), self.config.resend_ms)
        self.story.tell(now_ms, f"target waits: {event.reason}")
        return []

    def _tick_offered(self, now_ms: int, event: Tick) -> list[Any]:
        if now_ms >= min(self.deadline_ms, self._until_ms):
            return self._fail(now_ms, "the target granted no room in time")
        if now_ms < self._next_ms:
            return []
        self._next_ms = now_ms + self.config.resend_ms
        return [Say(body=self.offer)]

    # ---- the grant and the frames ------------------------------------------------------------------------------------

    def _misfit(self, grant: Grant, num_blocks: int) -> str | None:
        """What is wrong with a grant for `num_blocks` blocks, or None."""
        num_granted = len(grant.blocks)
        if (
            grant.num_reused + num_granted == num_blocks
            and grant.num_reused <= len(self.offer.hashes)
            and len(grant.generations) == num_granted
            and len(set(grant.blocks)) == num_granted
            and grant.credits >= 1
        ):
            return None
        return (
            f"the grant of {num_granted} blocks ({len(grant.generations)} generations, {grant.num_reused} reused, "
            f"{grant.credits} credits) does not fit the offer of {num_blocks} blocks"
        )

    def _open(self, grant: Grant, num_blocks: int | None) -> None:
        """From here frames may go. `num_blocks` None: the request still grows."""
        self._grant = grant
        self._window = SendWindow(
            num_blocks=num_blocks,
            num_reused=grant.num_reused,
            credits=min(grant.credits, self.config.credits),
            blocks_per_frame=frame_blocks(self.offer.layout.block_bytes, self.config.max_frame_bytes),
        )

    def _exports(self, now_ms: int, num_ready: int, *, priority: int = 0) -> list[ExportFrame]:
        """The frames that go now, when the first `num_ready` blocks are final."""
        assert self._window is not None
        assert self._grant is not None
        exports = []
        for frame in self._window.due(num_ready):
            if self.first_frame_ms is None:
                self.first_frame_ms = now_ms
            start = frame.first - self._grant.num_reused
            export = ExportFrame(
                sequence=frame.sequence,
                priority=priority,
                first=frame.first,
                target_blocks=self._grant.blocks[start : start + frame.num],
                target_generations=self._grant.generations[start : start + frame.num],
                endpoint=self._grant.endpoint,
            )
            exports.append(export)
        return exports

    def _renew(self, now_ms: int) -> list[Any]:
        """Gives the target a sign of life when one is due."""
        if now_ms < self._next_ms:
            return []
        self._next_ms = now_ms + self.config.renew_ms
        return [Say(body=Renew(lease_ms=self.config.lease_ms))]

    def _frame_failed(self, now_ms: int, event: FrameFailed) -> list[Any]:
        tried = self._lost(now_ms, event)
        return self._send_more(now_ms) if tried is None else self._fail(now_ms, tried)

    def _lost(self, now_ms: int, event: FrameFailed) -> str | None:
        """Has what failed go again; says why not, when it has failed too often, or when nothing gets through.

        The agent has made the link anew before it says so: to try again here would be to wait as long again.
        """
        assert self._window is not None
        if event.sequence is None:
            return f"no frame gets through: {event.reason}"
        frame = self._window.failed(event.sequence)
        if frame is None:
            self.num_ignored += 1
        elif frame.tries > self.config.resends_max:
            return f"frame {event.sequence} failed {frame.tries} times, at last: {event.reason}"
        else:
            self.story.tell(now_ms, f"frame {event.sequence} failed: {event.reason}")
        return None

    # ---- others end it -----------------------------------------------------------------------------------------------

    def _cancelled(self, now_ms: int, event: Cancel) -> list[Any]:
        return self._fail(now_ms, f"the target cancelled: {event.reason}", tell_peer=False)

    def _peer_gone(self, now_ms: int, event: PeerGone) -> list[Any]:
        return self._fail(now_ms, f"the target {event.worker_id} is gone", tell_peer=False)

    def _agent_lost(self, now_ms: int, event: AgentLost) -> list[Any]:
        actions = self._fail(now_ms, f"the transfer agent is lost: {event.reason}")
        return actions if self.state is self._freed else [*actions, *self._close()]

    def _stop(self, now_ms: int, event: Stop) -> list[Any]:
        if self._draining:
            return []
        told = [] if self.state is self._home else [Say(body=Cancel(reason=event.reason, spoiled=event.spoiled))]
        return [*told, *self._drain()]

    # ---- the commit is asked -----------------------------------------------------------------------------------------

    def _commit(self, num_computed_tokens: int, tokens: tuple[Token, ...]) -> CommitRequest:
        assert self._window is not None
        checksums = self._window.checksums
        return CommitRequest(
            num_frames=len(checksums),
            digest=frame_digest(checksums),
            num_computed_tokens=num_computed_tokens,
            tokens=tokens,
        )

    def _doubt_cancel(self, now_ms: int, event: Cancel) -> list[Any]:
        return self._doubt(now_ms, f"the target cancelled: {event.reason}")

    def _doubt_peer(self, now_ms: int, event: PeerGone) -> list[Any]:
        return self._doubt(now_ms, f"the target {event.worker_id} is gone")

    def _stop_asked(self, now_ms: int, event: Stop) -> list[Any]:
        return [Say(body=Cancel(reason=event.reason)), *self._end()]

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _late_ack(self, now_ms: int, event: FrameAcked) -> list[Any]:
        """After the attempt failed: the frame's read is over, so its blocks need no pin."""
        return [EndExport(sequence=event.sequence)] if self._draining else []

    def _quiet(self, now_ms: int, event: TransferQuiet) -> list[Any]:
        return [] if self.state is self._home and not self._draining else self._close()

    def _agent_lost_late(self, now_ms: int, event: AgentLost) -> list[Any]:
        return self._close() if self._draining or self.state is self._handed else []

    def _drain(self) -> list[Any]:
        """The attempt is dead. What is being read stays pinned until the agent is quiet."""
        self._draining = True
        self.state = self._home
        return self._silence_or_close()

    def _silence_or_close(self) -> list[Any]:
        """Without a frame ever sent the agent knows nothing of the attempt."""
        if self.first_frame_ms is None:
            return self._close()
        return [Silence()]

    def _end(self) -> list[Any]:
        """All frames are acknowledged, so nothing is read any more: no need to wait for the agent."""
        silence: list[Any] = [] if self.first_frame_ms is None else [Silence()]
        return [*silence, *self._close()]

    def _close(self) -> list[Any]:
        self.state = self._freed
        ended: list[Any] = [] if self.first_frame_ms is None else [EndExport(sequence=None)]
        return [*ended, Closed()]

    # ---- the owner record --------------------------------------------------------------------------------------------

    def _still_ours(self, event: OwnerIs) -> bool:
        ours = (self.attempt.me, self.attempt.source_incarnation, self.attempt.epoch)
        return (event.worker_id, event.incarnation, event.epoch) == ours

    def _is_theirs(self, event: OwnerIs) -> bool:
        """Whether the target of this attempt owns the request by its commit."""
        theirs = (self.attempt.peer.worker_id, self.attempt.target_incarnation, self.attempt.epoch + 1)
        return (event.worker_id, event.incarnation, event.epoch) == theirs


def who(owner: OwnerIs) -> str:
    """What the owner record says, for people."""
    if owner.worker_id is None:
        return "the owner record says: over"
    return f"the owner record says: {owner.worker_id} (incarnation {owner.incarnation}) at epoch {owner.epoch}"
