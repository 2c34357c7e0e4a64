"""Frames within one process: between two pools of a mixed worker, and in tests."""

from __future__ import annotations

from kv_transfer.messages import FrameHeader
from kv_transfer.transports.memory import MappedPool, load_copy_frame
from kv_transfer.transports.pull import PullSource, PullTarget


def move(header: FrameHeader, *, source: MappedPool, target: MappedPool) -> int:
    """Copies the frame's blocks, checked, and gives its checksum. Raises FrameCorrupt and ValueError."""
    checksum = PullSource(source).prepare(header)
    PullTarget(source=source, target=target, copy_frame=load_copy_frame()).take(header, checksum)
    return checksum
