"""The YAML file of API keys: read whole or not at all, read again when it changes, written whole by `tandem keys`."""

from __future__ import annotations

import asyncio
import datetime
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from router.api_keys import NAME, KeyEntry, KeyRing
from tandem.errors import CommandError
from tandem.request import PRIORITY_MAX

log = logging.getLogger(__name__)

LOOK_S = 1.0
FILE_BYTES_MAX = 8 << 20
LIMIT_MAX = 1_000_000_000
_HEAD = "# API keys of Tandem, hashed. `tandem keys` writes this file anew: comments of yours would be lost.\n"

_Stamp = tuple[int, int, int]  # of one state of the file: when it was written, its length, which file it is


class KeyFileError(CommandError, ValueError):
    """The file cannot be used; the message names it, the entry and the field."""

    exit_status = 2


class KeySpec(BaseModel):
    """One entry, as it stands in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    expires: datetime.datetime | None = None  # in UTC where it names no zone
    revoked: bool = False
    requests_per_minute: int | None = Field(None, ge=1, le=LIMIT_MAX)
    tokens_per_minute: int | None = Field(None, ge=1, le=LIMIT_MAX)
    concurrent: int | None = Field(None, ge=1, le=LIMIT_MAX)
    priority_max: int | None = Field(None, ge=0, le=PRIORITY_MAX)
    operator: bool = False
    tenant: str = ""

    @field_validator("name", "tenant")
    @classmethod
    def _plain(cls, value: str) -> str:
        if value and not NAME.fullmatch(value):
            raise ValueError("must begin with a letter or digit, then up to 63 of letters, digits, '.', '_' and '-'")
        return value

    @field_validator("name")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value:
            raise ValueError("must not be empty")
        return value

    @field_validator("expires")
    @classmethod
    def _zoned(cls, value: datetime.datetime | None) -> datetime.datetime | None:
        return value if value is None or value.tzinfo is not None else value.replace(tzinfo=datetime.UTC)

    @property
    def entry(self) -> KeyEntry:
        """As the router keeps it."""
        return KeyEntry(
            name=self.name,
            digest=bytes.fromhex(self.sha256),
            expires_s=None if self.expires is None else self.expires.timestamp(),
            revoked=self.revoked,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            concurrent=self.concurrent,
            priority_max=self.priority_max,
            operator=self.operator,
            tenant=self.tenant,
        )

    def document(self) -> dict[str, Any]:
        """As YAML's types, without what is at its default."""
        return {"name": self.name, **self.model_dump(exclude_defaults=True, exclude={"name"})}


class KeyFile:
    """One file over time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._taken: _Stamp | None = None  # the state that was taken, or refused
        self._seen: _Stamp | None = None

    def load(self) -> KeyRing:
        """The keys of now. Raises KeyFileError."""
        self._taken = self._seen = _stamp(self._path)
        return ring_of(self._path)

    def look(self) -> KeyRing | None:
        """The keys, when they have changed. Raises KeyFileError once for a state that cannot be used.

        A file is read when two looks in a row find it the same: while somebody writes it, half of it may well be valid.
        """
        stamp, before = _stamp(self._path), self._seen
        self._seen = stamp
        if stamp == self._taken or stamp != before:
            return None
        self._taken = stamp
        return ring_of(self._path)

    async def follow(self, take: Callable[[KeyRing | None], None]) -> None:
        """Looks for ever; `take` is called at each look, with the keys when they have changed.

        A file that cannot be used changes nothing: those who had keys keep them, and nobody new gets in.
        """
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                ring = await asyncio.to_thread(self.look)
            except KeyFileError as error:
                log.error("the API keys stay as they were: %s", error)
                ring = None
            if ring is not None:
                log.info("API keys read anew: %d entries", len(ring.entries))
            take(ring)


def ring_of(path: Path) -> KeyRing:
    """Reads the file. Raises KeyFileError."""
    specs = read_keys(path)
    try:
        return KeyRing(spec.entry for spec in specs)
    except ValueError as error:
        raise KeyFileError(f"{path}: {error}") from None


def read_keys(path: Path) -> list[KeySpec]:
    """The entries, in order. Raises KeyFileError."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    if len(raw) > FILE_BYTES_MAX:
        raise KeyFileError(f"{path}: has more than {FILE_BYTES_MAX} bytes")
    try:
        content = yaml.safe_load(raw)
    except Exception as error:  # of a date or a number that is none PyYAML raises whatever it met
        raise KeyFileError(f"{path}: is not YAML: {_said(error)}") from None
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, list) or set(content) != {"keys"}:
        raise KeyFileError(f"{path}: must hold a list named `keys`, and nothing else")
    return [_spec(path, number, entry) for number, entry in enumerate(entries)]


@contextmanager
def changing(path: Path) -> Iterator[list[KeySpec]]:
    """The entries, to be changed in place; then they are written whole. One at a time. Raises KeyFileError.

    A file that is not there yet is one without entries.
    """
    lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        specs = read_keys(path) if path.exists() else []
        yield specs
        _write(path, specs)
    finally:
        os.close(lock)


def _write(path: Path, specs: list[KeySpec]) -> None:
    text = _HEAD + yaml.safe_dump({"keys": [spec.document() for spec in specs]}, sort_keys=False)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)  # of an earlier process, or somebody else's
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        ring_of(draft)  # a name or key that is there already is refused before it replaces anything
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _spec(path: Path, number: int, entry: object) -> KeySpec:
    name = entry.get("name", "") if isinstance(entry, dict) else ""
    try:
        return KeySpec.model_validate(entry)
    except ValidationError as error:
        detail = error.errors(include_input=False)[0]  # what stands there may be a key itself
        field = ".".join(str(part) for part in detail["loc"]) or "entry"
        raise KeyFileError(f"{path}: keys[{number}] {name!r}: {field}: {detail['msg']}") from None


def _said(error: Exception) -> str:
    """What is wrong, without what stands there, which may be a key."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return type(error).__name__ if "'" in str(error) else f"{type(error).__name__}: {error}"


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
