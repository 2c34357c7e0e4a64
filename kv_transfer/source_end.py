"""What the source's ends of handoffs and migrations have in common: a grant, frames under way, and how they end."""

from __future__ import annotations

from typing import Any

from kv_transfer.handoff import (
    Attempt,
    Closed,
    EndExport,
    ExportFrame,
    HandoffConfig,
    Machine,
    S,
    Silence,
    Table,
)
from kv_transfer.messages import FrameAcked, FrameFailed, Grant, Offer
from kv_transfer.plan import SendWindow, frame_blocks
from tandem.messages import OwnerIs


class SourceEnd(Machine[S]):
    """A machine that offers and sends. The tables and what single rows do are the subclasses' own.

    `home` is the state in which no attempt is alive, `freed` the one in which nothing of the attempt is held any more.
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
        freed: S,
    ) -> None:
        super().__init__(
            attempt=attempt, config=config, deadline_ms=deadline_ms, state=home, table=table, inside=inside
        )
        self.offer = offer
        self.first_frame_ms: int | None = None  # absolute
        self._home, self._freed = home, freed
        self._grant: Grant | None = None
        self._window: SendWindow | None = None
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether the attempt has failed and waits only for the agent."""
        return self._draining

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

    def _lost(self, now_ms: int, event: FrameFailed) -> str | None:
        """Has what failed go again; says why not, when it has failed too often."""
        assert self._window is not None
        lost = self._window.in_flight if event.sequence is None else (event.sequence,)
        for sequence in lost:
            frame = self._window.failed(sequence)
            if frame is None:
                self.num_ignored += 1
            elif frame.tries > self.config.resends_max:
                return f"frame {sequence} failed {frame.tries} times, at last: {event.reason}"
            else:
                self.story.tell(now_ms, f"frame {sequence} failed: {event.reason}")
        return None

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _late_ack(self, now_ms: int, event: FrameAcked) -> list[Any]:
        """After the attempt failed: the frame's read is over, so its blocks need no pin."""
        return [EndExport(sequence=event.sequence)] if self._draining else []

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
