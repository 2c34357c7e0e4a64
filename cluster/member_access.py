"""What a member of the cluster shows to the others, from its settings."""

from __future__ import annotations

from cluster.config import ClusterConfig
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
