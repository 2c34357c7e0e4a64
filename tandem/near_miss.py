"""Says which of the known words a wrong one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

GIVEN_MAX = 100  # characters: nobody mistypes more, and likeness costs the square of it
KNOWN_MAX = 200  # words


def nearest(given: str, known: Iterable[str]) -> str:
    """The known word that is most like the given one, whatever its case; empty when none is.

    Of many words the first KNOWN_MAX are looked at: a router has other things to do.
    """
    if len(given) > GIVEN_MAX:
        return ""
    words = {each.casefold(): each for each in islice(known, KNOWN_MAX)}
    found = difflib.get_close_matches(given.casefold(), words, n=1)
    return words[found[0]] if found else ""


def did_you_mean(given: str, known: Iterable[str], *, prefix: str = "") -> str:
    """The end of a sentence that refuses `given`: a question after the nearest known word; empty when none is near."""
    word = nearest(given, known)
    return f"; did you mean {prefix}{word}?" if word else ""
