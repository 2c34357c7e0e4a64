"""Which blocks the frames of a worker's transfers pin while they are read."""

from __future__ import annotations

from collections.abc import Sequence

from engine.blocks import BlockLedger
from engine.layout import KVLayout
from kv_transfer.handoff import Attempt, ExportFrame
from kv_transfer.messages import FrameHeader, SendFrame
from tandem.request import TransferId


class Exports:
    """Turns frames that a machine asks for into commands for the agent, and keeps their blocks until the read ends."""

    def __init__(self, ledger: BlockLedger, layout: KVLayout) -> None:
        self._ledger = ledger
        self._layout = layout
        self._frames: dict[TransferId, dict[int, tuple[int, ...]]] = {}

    def send(self, attempt: Attempt, asked: ExportFrame, table: Sequence[int]) -> SendFrame:
        """Pins the frame's part of the block table; returns what the agent is to do."""
        blocks = tuple(table[asked.first : asked.first + len(asked.target_blocks)])
        assert len(blocks) == len(asked.target_blocks), f"{attempt.transfer_id} lacks blocks for {asked}"
        self._frames.setdefault(attempt.transfer_id, {})[asked.sequence] = blocks
        header = FrameHeader(
            transfer_id=attempt.transfer_id,
            epoch=attempt.epoch,
            source_incarnation=attempt.source_incarnation,
            target_incarnation=attempt.target_incarnation,
            sequence=asked.sequence,
            source_blocks=blocks,
            source_generations=self._ledger.export(attempt.transfer_id, blocks),
            target_blocks=asked.target_blocks,
            target_generations=asked.target_generations,
            num_bytes=len(blocks) * self._layout.block_bytes,
        )
        return SendFrame(header=header, endpoint=asked.endpoint, priority=asked.priority)

    def end(self, transfer_id: TransferId, sequence: int | None) -> None:
        """The frame is read no more; None: nor any other of the transfer."""
        if sequence is None:
            self._ledger.end_export(transfer_id)
            self._frames.pop(transfer_id, None)
        else:
            self._ledger.end_export(transfer_id, self._frames.get(transfer_id, {}).pop(sequence, ()))
