"""What one end of a TLS connection shows and trusts, and the check that the two go together before anything listens."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from tandem.errors import CommandError


class TlsError(CommandError, ValueError):
    """Certificates cannot be used; the message names the file or what is wrong with it."""

    exit_status = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM texts. `cert` and `key` are what this end shows, empty for a client that shows nothing.

    `ca`: whoever it signed is trusted; empty: the authorities that the system trusts. `name`: what the certificate of
    the other end must be made out to; empty: the address that was dialled.
    """

    ca: bytes = b""
    cert: bytes = b""
    key: bytes = field(default=b"", repr=False)
    name: str = ""

    @property
    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a gRPC channel."""
        return grpc.ssl_channel_credentials(self.ca or None, self.key or None, self.cert or None)

    @property
    def channel_options(self) -> tuple[tuple[str, str], ...]:
        """For a gRPC channel."""
        return (("grpc.ssl_target_name_override", self.name),) if self.name else ()

    def server_credentials(self, client_ca: bytes) -> grpc.ServerCredentials:
        """For a gRPC server; with `client_ca` only clients whose certificates it signed get in."""
        return grpc.ssl_server_credentials([(self.key, self.cert)], client_ca or None, bool(client_ca))


def load_tls(*, ca: Path | None, cert: Path | None, key: Path | None, name: str = "") -> Tls:
    """Reads the files. Raises TlsError naming the one that is missing or cannot be read."""
    if (cert is None) != (key is None):
        raise TlsError(f"certificate and key go together: {cert or key} came alone")
    return Tls(ca=_read(ca), cert=_read(cert), key=_read(key), name=name)


def server_context(*, cert: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """What an HTTP server listens with: TLS 1.2 or newer. Raises TlsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise TlsError(f"{cert}, {key}: {_said(error)}") from None
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ValueError) as error:
            raise TlsError(f"{client_ca}: {_said(error)}") from None
    return context


def check_members(*, ca: Path, cert: Path, key: Path) -> None:
    """Raises TlsError unless a member of the cluster with this certificate is taken by another one, either way round.

    They shake hands in memory, so that a wrong key, another authority, a certificate that has expired or may not be
    used by a client (or a server) is found before anything listens, and not by the first worker that cannot join.
    """
    listening = server_context(cert=cert, key=key, client_ca=ca)
    dialling = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    dialling.check_hostname = False  # addresses are not known yet
    try:
        dialling.load_verify_locations(ca)
        dialling.load_cert_chain(cert, key)
        _shake_hands(dialling, listening)
    except (OSError, ValueError) as error:
        raise TlsError(f"{cert} is not taken by who trusts {ca}: {_said(error)}") from None


def _shake_hands(dialling: ssl.SSLContext, listening: ssl.SSLContext) -> None:
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [dialling.wrap_bio(back, there), listening.wrap_bio(there, back, server_side=True)]
    for _ in range(8):  # flights of messages; TLS takes four at most
        for end in tuple(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue
        if not ends:
            return
    raise ValueError("the handshake does not end")


def _read(file: Path | None) -> bytes:
    if file is None:
        return b""
    try:
        return file.read_bytes()
    except OSError as error:
        raise TlsError(f"{file}: {error.strerror}") from None


def _said(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return str(getattr(error, "verify_message", "") or error.reason or error)
    return str(error)
