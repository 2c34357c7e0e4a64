"""Whose turn it is to rebalance, when several routers do: one after the other, on the clock of their machine.

Each router plans over its own requests and sees what all workers have. Were two to plan at the same time, both would
answer the same imbalance, and then both its opposite. So each waits until the moves of the one before it have ended
and the workers have told of them.
"""

from __future__ import annotations

TURN_MS = 500
PLANNING_MS = 300  # of each turn; in the rest moves end. A migration takes some tens of milliseconds


def has_turn(now_ms: int, number: int, num_routers: int) -> bool:
    """Whether router `number` of `num_routers` may plan at `now_ms`, a time on a clock that all of them share."""
    if num_routers == 1:
        return True
    return now_ms // TURN_MS % num_routers == number and now_ms % TURN_MS < PLANNING_MS
