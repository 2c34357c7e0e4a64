"""API keys: what a key that is shown is worth, and to whom it belongs.

Keys are kept as plain SHA-256: a key is 256 random bits, so there is no dictionary to try and nothing that a slow or a
salted hash would add, while every request pays for it. Who reads the file of hashes cannot ask with them.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from tandem.errors import Unauthenticated

KEY_PREFIX = "tandem_"  # lets scanners for leaked secrets find it
KEY_CHARACTERS_MAX = 512
KEY_SHARE = 4  # of what a router does for requests before any limit counts them, no key has more than this part
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SALT_BYTES = 16
_LOOKUP_BYTES = 8
_PRINTABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEntry:
    """What is known of one key. Limits that are None are off; `expires_s` is Unix time."""

    name: str
    digest: bytes = field(repr=False)
    expires_s: float | None = None
    revoked: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    priority_max: int | None = None
    operator: bool = False
    tenant: str = ""  # whose prefix cache its requests share; empty: that of all who have none


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks. Without an entry: anybody, where no key is needed."""

    entry: KeyEntry | None = None

    @property
    def name(self) -> str:
        """Whose a request is; empty where no key is needed."""
        return "" if self.entry is None else self.entry.name

    @property
    def is_operator(self) -> bool:
        """Whether it may see and end what belongs to others."""
        return self.entry is None or self.entry.operator

    @property
    def only(self) -> str | None:
        """Whose requests alone are there for this caller; None: everybody's."""
        return None if self.is_operator else self.name

    def may_touch(self, owner: str) -> bool:
        """Whether a request of this owner is there at all, for this caller."""
        return self.is_operator or owner == self.name

    def own(self, name: str) -> str:
        """A name that the caller chose, apart from the same one of others. Empty stays empty."""
        return f"{self.name}/{name}" if name and self.name else name

    def cache_salt(self, chosen: str = "") -> bytes:
        """Of the block hashes of its requests. `chosen` by the client sets them apart within the tenant's."""
        tenant = "" if self.entry is None else self.entry.tenant
        if not tenant and not chosen:
            return b""
        parts = (tenant.encode(), chosen.encode())
        told = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
        return hashlib.blake2b(told, digest_size=SALT_BYTES, person=b"tandem-salt").digest()


ANYBODY = Caller()

# Who the call or request under way is from: set at the door, before anything of it is looked at.
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


class KeyRing:
    """All keys of a cluster at one time. Raises ValueError naming the entries when two have one name or one key."""

    def __init__(self, entries: Iterable[KeyEntry]) -> None:
        self.entries: dict[str, KeyEntry] = {}
        self._by_digest: dict[bytes, KeyEntry] = {}
        for entry in entries:
            if entry.name in self.entries:
                raise ValueError(f"keys: two entries are named {entry.name!r}")
            same = self._by_digest.setdefault(entry.digest[:_LOOKUP_BYTES], entry)
            if same is not entry:
                raise ValueError(f"keys: {same.name!r} and {entry.name!r} have the same sha256")
            self.entries[entry.name] = entry

    def caller(self, key: str, now_s: float) -> Caller:
        """Whose key this is. Raises Unauthenticated for one that is unknown, revoked or expired.

        What is looked up, and compared in constant time, are digests: how long that takes tells nobody how near a
        guessed key is, since no two keys that are alike have digests that are.
        """
        digest = digest_of(key)
        entry = self._by_digest.get(digest[:_LOOKUP_BYTES])
        if entry is None or not hmac.compare_digest(digest, entry.digest):
            raise Unauthenticated("authorization: the API key is not known here")
        reason = _over(entry, now_s)
        if reason is not None:
            raise Unauthenticated(f"authorization: the API key {entry.name!r} {reason}")
        return Caller(entry=entry)

    def objection(self, caller: Caller, now_s: float) -> str | None:
        """Why a caller who was let in earlier would not be now, or None: its key may have been revoked since."""
        if caller.entry is None:
            return "was not needed when it was let in"
        entry = self.entries.get(caller.entry.name)
        if entry is None or not hmac.compare_digest(entry.digest, caller.entry.digest):
            return "is not known here any more"
        return _over(entry, now_s)


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).digest()


def bearer(values: Sequence[str]) -> str:
    """The key in the `authorization` headers of one request. Raises Unauthenticated; says nothing of what was shown.

    Two headers are refused even when they agree: somebody between here and the client may have looked at the other.
    """
    if not values:
        raise Unauthenticated("authorization: is missing; send 'Authorization: Bearer KEY'")
    if len(values) > 1:
        raise Unauthenticated(f"authorization: came {len(values)} times, must come once")
    scheme, _, key = values[0].partition(" ")
    key = key.strip(" ")
    if scheme.lower() != "bearer" or not key:
        raise Unauthenticated("authorization: must be 'Bearer KEY'")
    if len(key) > KEY_CHARACTERS_MAX:
        raise Unauthenticated(f"authorization: the key has {len(key)} characters, at most {KEY_CHARACTERS_MAX}")
    if not _PRINTABLE.fullmatch(key):
        raise Unauthenticated("authorization: the key must be printable ASCII without spaces")
    return key


def _over(entry: KeyEntry, now_s: float) -> str | None:
    if entry.revoked:
        return "is revoked"
    if entry.expires_s is not None and now_s >= entry.expires_s:
        return "has expired"
    return None
