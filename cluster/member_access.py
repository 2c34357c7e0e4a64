"""What a member of the cluster shows to the others, from its settings."""

from __future__ import annotations

from pathlib import Path

from cluster.config import ClusterConfig
from cluster.run_file import RunFile
from cluster.secret_files import read_secret
from tandem.cluster_access import ClusterAccess
from tandem.tls import Tls, check_members, load_tls


def member_access(config: ClusterConfig, token: str) -> ClusterAccess:
    """Reads the certificates of this machine. Raises TlsError."""
    return ClusterAccess(token=token, tls=member_tls(config))


def member_tls(config: ClusterConfig) -> Tls | None:
    """The certificates that members know each other by; None without TLS. Raises TlsError."""
    if config.tls_cert is None or config.tls_key is None or config.tls_ca is None:
        return None
    check_members(ca=config.tls_ca, cert=config.tls_cert, key=config.tls_key)
    return load_tls(ca=config.tls_ca, cert=config.tls_cert, key=config.tls_key, name=config.tls_name)


def access_here(run: RunFile, *, needs_token: bool = True) -> ClusterAccess:
    """What a command of this machine shows to the members of a running cluster. Raises SecretError, TlsError."""
    tls = None
    if run.tls_ca:
        tls = load_tls(ca=Path(run.tls_ca), cert=Path(run.tls_cert), key=Path(run.tls_key), name=run.tls_name)
    return ClusterAccess(token=read_secret(Path(run.join_token_file)) if needs_token else "", tls=tls)
