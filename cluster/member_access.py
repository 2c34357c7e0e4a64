"""What a member of the cluster shows to the others, from its settings; and a client of this machine to the routers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio

from cluster.config import ClusterConfig
from cluster.run_file import RunFile
from cluster.secret_files import read_secret
from tandem.client import SecurityOptions
from tandem.cluster_access import ClusterAccess
from tandem.tls import Tls, check_members, load_tls

API_KEY = "TANDEM_API_KEY"


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
    return ClusterAccess(token=read_secret(Path(run.join_token_file)) if needs_token else "", tls=tls_here(run))


def tls_here(run: RunFile) -> Tls | None:
    """The certificates of a cluster of this machine; None where it speaks no TLS. Raises TlsError."""
    if not run.tls_ca:
        return None
    return load_tls(ca=Path(run.tls_ca), cert=Path(run.tls_cert), key=Path(run.tls_key), name=run.tls_name)


def key_metadata() -> tuple[tuple[str, str], ...]:
    """TANDEM_API_KEY, to show with each call of a client; empty without it."""
    key = os.environ.get(API_KEY, "")
    return (("authorization", f"Bearer {key}"),) if key else ()


def client_options(run: RunFile) -> SecurityOptions:
    """What tandem.Client needs for the routers of a cluster of this machine: TANDEM_API_KEY, and its certificates."""
    options: SecurityOptions = {"api_key": os.environ.get(API_KEY, "")}
    if run.tls_ca:
        options |= {"ca": run.tls_ca, "cert": run.tls_cert, "key": run.tls_key, "tls_name": run.tls_name}
    return options


def dial_routers(run: RunFile) -> grpc.aio.Channel:
    """A channel to the public port of a cluster of this machine. Calls with one answer show TANDEM_API_KEY by
    themselves, streams do not. Raises TlsError.
    """
    shows: Any = [_Shows()] if key_metadata() else []
    return ClusterAccess(token="", tls=tls_here(run)).dial(run.grpc_address, interceptors=shows)


class _Shows(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # it is none at run time
    async def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """Sends the key with the call."""
        return await continuation(details._replace(metadata=grpc.aio.Metadata(*key_metadata())), request)
