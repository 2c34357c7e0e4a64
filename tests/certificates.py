"""A small authority for tests of TLS, made with the openssl command: good, expired, and of another authority."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Two PEM files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates for 127.0.0.1 and for `names`. Skips the test where there is no openssl."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl command")
        self._folder = folder / name
        self._folder.mkdir()
        self.cert, self._key = self._folder / "ca.pem", self._folder / "ca.key"
        _openssl("req", "-x509", *_KEY, "-keyout", self._key, "-out", self.cert, "-subj", f"/CN={name}", "-days", "30")

    def sign(self, name: str, *, days: int = 30, names: str = "IP:127.0.0.1", usage: str = "") -> Certificate:
        """`days` -1: it has expired. `names`: who it is made out to. `usage`: what alone it is good for."""
        key, request, cert, more = (self._folder / f"{name}.{kind}" for kind in ("key", "csr", "pem", "ext"))
        _openssl("req", *_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        more.write_text(f"subjectAltName={names}\n" + (f"extendedKeyUsage={usage}\n" if usage else ""))
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial", "-out", cert,
            "-days", str(days), "-extfile", more,
        )  # fmt: skip
        return Certificate(cert=cert, key=key)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
