"""The secrets and certificates of a cluster that starts here: checked before anything listens, made, and removed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from cluster.config import ClusterConfig, ConfigError
from cluster.key_file import KeyFileError, ring_of
from cluster.member_access import member_tls
from cluster.secret_files import (
    SecretError,
    fresh_secret,
    join_token_path,
    read_secret,
    write_secret,
)
from tandem.tls import TlsError, server_context


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSecrets:
    """What the parts of a cluster are told of its secrets."""

    join_token: str = field(default="", repr=False)
    join_token_file: str = ""


def check_security(config: ClusterConfig) -> None:
    """Certificates, keys and token that are given must be usable. Raises ConfigError, naming the setting."""
    try:
        member_tls(config)
        if config.tls_cert is not None and config.tls_key is not None:
            server_context(cert=config.tls_cert, key=config.tls_key, client_ca=config.tls_client_ca)
    except TlsError as error:
        raise ConfigError(f"tls_cert, tls_key, tls_ca, tls_client_ca: {error}") from None
    try:
        if config.api_keys is not None:
            ring_of(config.api_keys)
    except KeyFileError as error:
        raise ConfigError(f"api_keys: {error}") from None
    try:
        if config.join_token_file is not None:
            read_secret(config.join_token_file)
    except SecretError as error:
        raise ConfigError(f"join_token_file: {error}") from None


def write_secrets(config: ClusterConfig) -> OwnSecrets:
    """Each start has a token of its own, where none is given: that of an earlier one is worth nothing."""
    token_file = config.join_token_file
    if token_file is None:
        token_file = join_token_path(config.run_dir, config.port)
        write_secret(token_file, fresh_secret())
    return OwnSecrets(join_token=read_secret(token_file), join_token_file=str(token_file))


def remove_secrets(config: ClusterConfig) -> None:
    """Those that this cluster made."""
    join_token_path(config.run_dir, config.port).unlink(missing_ok=True)


class TlsFiles(TypedDict):
    """What the run file says of certificates."""

    tls_ca: str
    tls_cert: str
    tls_key: str
    tls_name: str


def tls_files(config: ClusterConfig) -> TlsFiles:
    """Where this cluster's certificates are; empty without TLS."""
    return {
        "tls_ca": str(config.tls_ca or ""),
        "tls_cert": str(config.tls_cert or ""),
        "tls_key": str(config.tls_key or ""),
        "tls_name": config.tls_name,
    }


def curl_flags(config: ClusterConfig) -> str:
    """What curl needs besides, to ask this cluster."""
    flags = f" --cacert {config.tls_ca}" if config.tls_ca else ""
    flags += " --cert FILE --key FILE" if config.tls_client_ca else ""
    return flags + (' -H "Authorization: Bearer $TANDEM_API_KEY"' if config.api_keys else "")
