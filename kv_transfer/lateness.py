"""Ends of transfers that last longer than they may: blocks that an agent may still read or write hang on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tandem.request import TransferId


def not_quiet(ended_ms: Mapping[TransferId, int | None], now_ms: int, warn_ms: int) -> list[str]:
    """Attempts that are over for longer than that, and whose blocks an agent still reads; None: it is not over."""
    since = [(key, now_ms - at_ms) for key, at_ms in ended_ms.items() if at_ms is not None]
    late = [(key, for_ms) for key, for_ms in since if for_ms > warn_ms]
    return [f"transfer {key} is over for {for_ms} ms and its agent is not quiet" for key, for_ms in late]


def next_late_ms(since_ms: Iterable[int | None], after_ms: int, warn_ms: int) -> int | None:
    """When, later than `after_ms`, the next of them has lasted longer than that; None: no one will."""
    late = (at_ms + warn_ms + 1 for at_ms in since_ms if at_ms is not None)
    return min((at_ms for at_ms in late if at_ms > after_ms), default=None)
