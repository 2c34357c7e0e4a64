"""Copies blocks between the KV pool and host memory before a step runs: the shell of what engine/step.py decides."""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence

from engine.layout import KVLayout
from engine.runner import Runner
from engine.step import Drawn, StepPlan

PROBE_BYTES = 16 << 20  # copied to measure the speed
PROBES = 3


class SwappingRunner:
    """A Runner over another one and its pool, with `num_slots` slots of host memory, taken as they are first used.

    The other runner never sees a plan without rows.
    """

    def __init__(self, runner: Runner, *, pool: memoryview, num_slots: int) -> None:
        self._runner = runner
        self._pool = pool
        self._block_bytes = runner.layout.block_bytes
        self._num_copied = 0
        self._memory = mmap.mmap(-1, max(1, num_slots * self._block_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._slots = memoryview(self._memory)

    @property
    def layout(self) -> KVLayout:
        """How the pool lies in memory."""
        return self._runner.layout

    @property
    def progress(self) -> int:
        """The runner's, and blocks copied."""
        return self._runner.progress + self._num_copied

    def run(self, plan: StepPlan) -> Sequence[Drawn | None]:
        """Copies out, then back, then runs the rows, if there are any."""
        for block, slot in plan.copies_out:
            self._of(self._slots, slot)[:] = self._of(self._pool, block)
            self._num_copied += 1
        for slot, block in plan.copies_back:
            self._of(self._pool, block)[:] = self._of(self._slots, slot)
            self._num_copied += 1
        return self._runner.run(plan) if plan.rows else []

    def close(self) -> None:
        """Gives the host memory back. Closing twice is harmless."""
        self._slots.release()
        self._memory.close()

    def _of(self, memory: memoryview, index: int) -> memoryview:
        return memory[index * self._block_bytes : (index + 1) * self._block_bytes]


def copy_bytes_per_ms() -> float:
    """How fast this machine copies memory: the best of a few tries, for it may be busy just now."""
    source, target = bytearray(PROBE_BYTES), bytearray(PROBE_BYTES)
    best_s = float("inf")
    for _ in range(PROBES):
        began_s = time.perf_counter()
        target[:] = source
        best_s = min(best_s, time.perf_counter() - began_s)
    return PROBE_BYTES / (best_s * 1000)
