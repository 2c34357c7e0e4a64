"""What a router knows of one request: the same for `tandem explain`, spans and the operators' page."""

from __future__ import annotations

from dataclasses import dataclass

from router.move import MoveRecord
from router.request import RequestSnapshot
from router.stages import FirstToken


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """One request, now or when it ended. `age_ms` of `request` counts from its submission to its end.

    `arrived_ms_ago`: since it came to the edge; of one that another router had before, since it came here.
    """

    request: RequestSnapshot
    moves: tuple[MoveRecord, ...]
    first: FirstToken | None
    now_ms: int  # on the clock of the moves' `at_ms`
    arrived_ms_ago: float
