"""Gathers what `cluster/doctor.py` judges: from this machine, and from what the settings name."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import time
from contextlib import closing, suppress
from importlib import metadata
from pathlib import Path

import redis
from packaging.requirements import Requirement

from cluster.config import FAKE_MODEL, ClusterConfig, without_password
from cluster.doctor import Facts, Gpu, Package, RedisFacts
from cluster.installation import clash
from cluster.memory import shortage
from cluster.processes import PortInUse, pick_port
from engine.arch import ModelError
from engine.kv_pool import available_bytes
from engine.model_files import find_model, read_arch
from kernels.build import COMPILERS
from router.listener import listen

DISTRIBUTION = "tandem-serve"
ANSWER_S = 3.0
DRIVER = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")


def gather(config: ClusterConfig) -> Facts:
    """Looks at everything, each with a time limit. What cannot be found out is told as such."""
    model, too_little = _model(config)
    cuda, nccl, gpus = _gpus()
    driver = DRIVER.read_text() if DRIVER.exists() else ""
    version = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", driver)
    return Facts(
        python=platform.python_version(),
        packages=packages(metadata.requires(DISTRIBUTION) or []),
        hidden=clash() or "",
        compiler=next((path for name in COMPILERS if (path := shutil.which(name))), ""),
        num_cores=len(os.sched_getaffinity(0)),
        num_workers=config.num_workers,
        threads=config.threads,
        shortage=too_little,
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        ports=_ports(config),
        model=model,
        ray_address=config.address,
        ray_error=_unreachable(config.address) if config.address else "",
        redis=_redis(config.redis) if config.redis else None,
        cuda=cuda,
        nccl=nccl,
        driver=version[1] if version else "",
        gpus=gpus,
    )


def packages(requirements: list[str]) -> tuple[Package, ...]:
    """What is asked for without any extra, and what of it is installed."""
    found = []
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            version = ""
        fits = bool(version) and wanted.specifier.contains(version, prereleases=True)
        found.append(Package(name=wanted.name, wanted=f"{wanted.name}{wanted.specifier}", found=version, fits=fits))
    return tuple(found)


def _model(config: ClusterConfig) -> tuple[str, str]:
    """What is wrong with the model, and how much memory is missing for it; empty: nothing."""
    if config.model == FAKE_MODEL:
        return "", ""
    try:
        arch = read_arch(find_model(config.model))
    except ModelError as error:
        return str(error), ""
    if config.address:
        return "", ""  # the workers are elsewhere
    return "", shortage(config, arch, available_bytes=available_bytes()) or ""


def _ports(config: ClusterConfig) -> dict[str, str]:
    ports = {"--port": "", "--grpc-port": ""}
    try:
        listen(config.host, config.port).close()
    except OSError as error:
        ports["--port"] = f"{config.port} at {config.host}: {error.strerror}"
    try:
        pick_port(config.host, config.grpc_port, "--grpc-port")
    except PortInUse as error:
        ports["--grpc-port"] = str(error)
    return ports


def _unreachable(address: str) -> str:
    """Why nothing listens there; empty: something does."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return "must be host:port"
    try:
        with closing(socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _redis(url: str) -> RedisFacts:
    where = without_password(url)
    client = redis.Redis.from_url(url, socket_timeout=ANSWER_S, socket_connect_timeout=ANSWER_S)
    try:
        with closing(client):
            info = client.info("server")
            asked_s = time.time()
            seconds, micros = client.time()
            ours_s = (asked_s + time.time()) / 2
    except redis.RedisError as error:
        return RedisFacts(where=where, error=f"{type(error).__name__}: {error}")
    version = tuple(int(part) for part in re.findall(r"\d+", str(info["redis_version"]))[:3])
    return RedisFacts(where=where, version=version, clock_ms=round(1000 * (seconds + micros / 1e6 - ours_s)))


def _gpus() -> tuple[str, str, tuple[Gpu, ...]]:
    """CUDA, NCCL and the devices, as torch has them."""
    import torch  # takes seconds

    if torch.version.cuda is None:
        return "", "", ()
    nccl = ""
    with suppress(AttributeError, RuntimeError):
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    gpus = []
    for number in range(torch.cuda.device_count()):
        free_bytes, _ = torch.cuda.mem_get_info(number)
        gpus.append(
            Gpu(
                name=torch.cuda.get_device_name(number),
                capability=torch.cuda.get_device_capability(number),
                free_bytes=free_bytes,
            )
        )
    return torch.version.cuda, nccl, tuple(gpus)
