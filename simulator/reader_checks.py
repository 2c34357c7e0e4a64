"""What must hold for every client, whatever happens to routers, the store and its own connections."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from router.answer import Piece
from tandem.errors import Cancelled, RequestLost, TakenOver, TandemError, Unavailable
from tandem.request import FinishReason

if TYPE_CHECKING:
    from simulator.clients import Wish


class Violation(AssertionError):
    """A promise is broken."""


@dataclass(slots=True)
class _Reader:
    """One client and what it has seen."""

    wish: Wish
    healthy: bool  # it came when all was well: it must get everything
    seen: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    over: bool = False
    error: TandemError | None = None
    gone: bool = False  # it left by itself
    stored: bool = True  # the store has not forgotten it since it was over


class ReaderChecks:
    """Sees all that clients see. `excused`: the world has faults that a request may be lost to by its name."""

    def __init__(self, *, excused: bool) -> None:
        self._excused = excused
        self._readers: dict[int, _Reader] = {}

    def comes(self, number: int, wish: Wish, *, healthy: bool) -> None:
        self._readers[number] = _Reader(wish, healthy)

    def leaves(self, number: int) -> None:
        """It wants nothing more."""
        self._readers[number].gone = self._readers[number].over = True

    def heard(self, number: int, piece: Piece) -> None:
        """Each index once, in order, over all calls, with the token of the oracle."""
        reader = self._readers[number]
        where = f"client {number} of {reader.wish.ask.request_id}"
        if reader.over or reader.finish is not None:
            raise Violation(f"{where} hears {piece} after its end")
        if piece.index != len(reader.seen):
            raise Violation(f"{where} hears token {piece.index} where {len(reader.seen)} is due")
        for token in piece.tokens:
            due = reader.wish.answer[len(reader.seen) : len(reader.seen) + 1]
            if token.index != len(reader.seen) or (token.token_id,) != due:
                raise Violation(f"{where} hears {token} where {due} is due at {len(reader.seen)}")
            reader.seen.append(token.token_id)
        reader.finish = piece.finish

    def ended(self, number: int, error: TandemError | None) -> None:
        """Once; with all of the answer, or with an error that is due."""
        reader = self._readers[number]
        where = f"client {number} of {reader.wish.ask.request_id}"
        if reader.over:
            raise Violation(f"{where} ends twice: {reader.error}, {error}")
        reader.over, reader.error = True, error
        if error is None:
            if reader.finish is not reader.wish.finish or len(reader.seen) != len(reader.wish.answer):
                raise Violation(f"{where} has {len(reader.seen)} of {len(reader.wish.answer)} tokens: {reader.finish}")
        elif isinstance(error, TakenOver):
            self._was_taken(where, reader)
        elif isinstance(error, Cancelled) and self.somebody_left(reader.wish.ask.request_id):
            pass  # its twin cancelled what both had
        elif reader.healthy or not (self._excused and isinstance(error, RequestLost | Unavailable)):
            raise Violation(f"{where} fails after {len(reader.seen)}: {type(error).__name__}: {error}")

    def _was_taken(self, where: str, reader: _Reader) -> None:
        """By somebody: one reader more has the key than have lost the answer."""
        same = [each for each in self._readers.values() if each.wish.ask.idempotency_key == _key(reader)]
        if all(isinstance(each.error, TakenOver) for each in same):
            raise Violation(f"{where} was taken over by nobody: {reader.error}")

    def store_forgot(self) -> None:
        """The store begins anew: no router writes again what was over, and written, before."""
        for each in self._readers.values():
            each.stored = not each.over

    def unended(self) -> list[int]:
        """Clients that still wait."""
        return [number for number, each in self._readers.items() if not each.over]

    def somebody_left(self, request_id: str) -> bool:
        """Whether a client of this request, or of its twin, has gone."""
        readers = [each for each in self._readers.values() if each.wish.ask.request_id == request_id]
        keys = {_key(each) for each in readers}
        return any(each.gone for each in self._readers.values() if _key(each) in keys)

    def ends(self) -> Counter[str]:
        """How many clients ended how."""
        found: Counter[str] = Counter()
        for each in self._readers.values():
            how = "left" if each.gone else "well" if each.error is None else type(each.error).__name__
            found[how if each.over else "not"] += 1
        return found

    def finished(self) -> list[Wish]:
        """What clients of after the healing got whole, and the store must have."""
        whole = [each for each in self._readers.values() if each.over and each.error is None]
        return [each.wish for each in whole if each.healthy and each.stored]


def _key(reader: _Reader) -> str:
    return reader.wish.ask.idempotency_key
