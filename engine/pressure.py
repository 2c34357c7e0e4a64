"""What becomes of a sequence whose blocks an older one needs: swapped to host memory, or computed again later.

The first answer to memory that runs out is given elsewhere, and earlier: requests are moved to other workers while they
run (cluster/rebalancer.py), and who is being moved keeps its blocks. What is left is the cheaper of two: copying the
blocks out and back, or running their tokens again (vLLM's two ways of preemption, with measured speeds for a rule).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

BYTES_PER_MS = 1_000_000.0  # a first guess: of a slow memory


class Answer(StrEnum):
    """What is done."""

    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer and why, with the two costs in milliseconds of the engine's time."""

    answer: Answer
    reason: str
    swap_ms: float = 0.0
    recompute_ms: float = 0.0


@dataclass(slots=True, kw_only=True)
class Pressure:
    """Weighs the answers. `recompute_ms(tokens)`: what a prefill of so many takes, as measured while the worker runs.

    `copy_bytes_per_ms`: of the host's memory, as measured when the worker started.
    """

    block_bytes: int = 1
    copy_bytes_per_ms: float = BYTES_PER_MS
    recompute_ms: Callable[[int], float] = float

    def answer(self, *, num_blocks: int, num_tokens: int, num_free_slots: int, num_slots: int) -> Verdict:
        """For a sequence whose first `num_tokens` tokens are computed, in `num_blocks` blocks."""
        swap_ms = 2 * num_blocks * self.block_bytes / self.copy_bytes_per_ms
        recompute_ms = self.recompute_ms(num_tokens)
        costs = f"swapping costs {swap_ms:.2f} ms, recomputing {num_tokens} tokens {recompute_ms:.2f} ms"
        answer = Answer.SWAP if swap_ms <= recompute_ms else Answer.RECOMPUTE
        if not num_slots:
            answer, costs = Answer.RECOMPUTE, "there is no swap memory"
        elif num_blocks > num_free_slots:
            answer = Answer.RECOMPUTE
            costs = f"{num_blocks} blocks do not fit the swap memory, {num_free_slots} of {num_slots} are free"
        return Verdict(answer=answer, reason=costs, swap_ms=swap_ms, recompute_ms=recompute_ms)
