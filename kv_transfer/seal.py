"""Seals on what two agents say to each other: made by a member of the cluster, for this link, in this order.

Every message carries a keyed BLAKE2b tag over its number and its bytes. The key comes from the cluster's secret and
from a salt of each end, drawn for this link: a message that was recorded fits no other link, and no other place in its
own. What an Announce says of a frame, blocks, generations, checksum and tag of its bytes, is sealed like all the rest.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

SALT_BYTES = 16
SEAL_BYTES = 16
FRAME_TAG_BYTES = 16
SECRET_BYTES = 32


class Forged(ValueError):
    """A message that no member of the cluster has said, or not here, or not now."""


def agents_secret(join_token: str) -> bytes:
    """What the agents of one cluster share; nobody learns the join token from it."""
    return hashlib.blake2b(join_token.encode(), digest_size=SECRET_BYTES, person=b"tandem-agents").digest()


class Seal:
    """One direction of one link: seals what leaves, or opens what arrives, in order. Not thread-safe."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0

    def seal(self, body: bytes) -> bytes:
        """The message with its seal before it."""
        return self._next(body) + body

    def open(self, data: bytes) -> bytes:
        """The message, without its seal. Raises Forged."""
        body = data[SEAL_BYTES:]
        if not hmac.compare_digest(data[:SEAL_BYTES], self._next(body)):
            raise Forged("its seal does not fit: it was forged or altered, said before, or comes from another cluster")
        return body

    def _next(self, body: bytes) -> bytes:
        number = self._number.to_bytes(8, "little")
        self._number += 1
        return hashlib.blake2b(number + body, key=self._key, digest_size=SEAL_BYTES).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkKeys:
    """The keys of one link, as far as its salts are known yet. Without any: that of hellos, which all links share."""

    secret: bytes = field(repr=False)
    source_salt: bytes = b""
    target_salt: bytes = b""

    def seal(self, use: str) -> Seal:
        """`use`: hello, welcome, to_target or to_source."""
        return Seal(self.key(use))

    def key(self, use: str) -> bytes:
        """32 bytes for one use."""
        told = b"".join(len(part).to_bytes(2, "little") + part for part in (self.source_salt, self.target_salt))
        return hashlib.blake2b(told + use.encode(), key=self.secret, digest_size=32, person=b"tandem-link").digest()


def frame_tag(key: bytes, frame: memoryview) -> bytes:
    """A keyed tag of a frame's bytes, HMAC-SHA256. A checksum of xxh3 can be met by intent; this cannot.

    Of what the standard library has, it is the fastest where the CPU computes SHA-256 itself. Lets other threads run.
    """
    mac = hmac.new(key, digestmod="sha256")
    mac.update(frame)
    return mac.digest()[:FRAME_TAG_BYTES]
