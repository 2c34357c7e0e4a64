"""How a command reaches the cluster that it is about: over TLS where it has that, with this user's operator key."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cluster.run_file import RunFile
from cluster.secret_files import operator_key_path, read_secret
from tandem.tls import Tls, load_tls


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What calls are made with: TANDEM_API_KEY, else the key that `tandem serve` left for its own user."""

    address: str
    api_key: str = field(repr=False)
    tls: Tls | None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """To send with every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def channel(self) -> grpc.Channel:
        """To be closed by whoever uses it."""
        if self.tls is None:
            return grpc.insecure_channel(self.address)
        return grpc.secure_channel(self.address, self.tls.channel_credentials, options=self.tls.channel_options)


def connection_to(run: RunFile, run_dir: Path) -> Connection:
    """Raises TlsError, SecretError."""
    key = os.environ.get("TANDEM_API_KEY", "")
    path = operator_key_path(run_dir, run.port)
    if not key and path.exists():
        key = read_secret(path)
    tls = None
    if run.tls_ca:
        tls = load_tls(ca=Path(run.tls_ca), cert=Path(run.tls_cert), key=Path(run.tls_key), name=run.tls_name)
    return Connection(address=run.grpc_address, api_key=key, tls=tls)
