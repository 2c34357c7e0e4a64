"""Secrets of a running cluster as files that only its user may read."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from tandem.errors import CommandError

SECRET_CHARACTERS = range(16, 513)  # 16 are too many to guess; a metadata value has its bounds


class SecretError(CommandError, ValueError):
    """A secret cannot be used; the message names its file, and never what it holds."""

    exit_status = 2


def join_token_path(run_dir: Path, port: int) -> Path:
    """Where the token of the cluster at this HTTP port lies, when it made its own."""
    return run_dir / f"{port}.join-token"


def write_secret(path: Path, secret: str) -> None:
    """Writes the file whole or not at all; it never was readable by others."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret + "\n")
    draft.replace(path)


def read_secret(path: Path) -> str:
    """Raises SecretError when the file is missing, may be read by others, or holds no usable secret."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(SECRET_CHARACTERS.stop + 2)
    except OSError as error:
        raise SecretError(f"{path}: {error.strerror}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise SecretError(f"{path}: has mode {stat.S_IMODE(mode):04o}, others may read it; chmod 600 it")
    secret = content.strip()
    if len(secret) not in SECRET_CHARACTERS or not all(0x21 <= byte <= 0x7E for byte in secret):
        least, most = SECRET_CHARACTERS.start, SECRET_CHARACTERS.stop - 1
        raise SecretError(f"{path}: must hold one word of {least} to {most} printable ASCII characters")
    return secret.decode()


def fresh_secret() -> str:
    """256 random bits as text."""
    return secrets.token_urlsafe(32)
