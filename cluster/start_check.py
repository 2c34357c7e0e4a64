"""What can be known of a cluster before anything of it is started: its ports, its model, its memory."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from cluster.config import FAKE_MODEL, WILDCARDS, ClusterConfig
from cluster.memory import shortage
from cluster.own_secrets import check_security
from cluster.processes import PortInUse, hold_port
from engine.arch import ModelError
from engine.kv_pool import available_bytes
from engine.model_files import find_model, read_arch
from router.listener import listen

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class StartFailed(RuntimeError):
    """The cluster cannot start, or cannot go on; the message is for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A cluster that may be started: its ports are fixed and kept, and the HTTP socket is open."""

    config: ClusterConfig
    listener: socket.socket
    grpc_held: socket.socket  # keeps the gRPC port for the routers
    model: str  # the name that it is served under


def check(config: ClusterConfig) -> Checked:
    """Raises StartFailed, ConfigError or OSError with what is to be changed."""
    try:
        listener = listen(config.host, config.port)
    except OSError as error:
        where = f"port {config.port} at {config.host}"
        raise StartFailed(f"{where}: {error.strerror}; choose another with --port") from None
    try:
        grpc_held = hold_port(config.host, config.grpc_port, "--grpc-port")
    except PortInUse as error:
        raise StartFailed(str(error)) from None
    ports = {"port": listener.getsockname()[1], "grpc_port": grpc_held.getsockname()[1]}
    config = config.model_copy(update=ports)
    check_security(config)
    if config.address and config.host in (*LOOPBACK, *WILDCARDS):
        raise StartFailed(f"host: workers on {config.address} cannot reach {config.host}; give --host an address")
    model = config.model
    if model != FAKE_MODEL:
        try:
            files = find_model(model)
            arch = read_arch(files)
        except ModelError as error:
            raise StartFailed(str(error)) from None
        model = files.name
        too_little = None if config.address else shortage(config, arch, available_bytes=available_bytes())
        if too_little is not None:
            raise StartFailed(too_little)
    return Checked(config=config, listener=listener, grpc_held=grpc_held, model=model)
