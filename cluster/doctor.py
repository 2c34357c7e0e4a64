"""What a machine lacks for a cluster, judged from facts about it: each finding says what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

MiB = 1 << 20
OPEN_FILES_LEAST, OPEN_FILES_GOOD = 1024, 16_384  # a quarter of them is what gRPC takes as connections
SHARED_MEMORY_LEAST = 96 * MiB  # Ray's object store; KV lies in memory of its own
CLOCK_OFF_MS = 1_000  # keys expire, and records are named, by wall clocks
REDIS_LEAST = (6, 2)
CUDA_CAPABILITY_LEAST = (8, 0)


class Verdict(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"  # it serves, slower or less
    BAD = "bad"  # it does not


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. `advice` is empty where all is well."""

    area: str
    verdict: Verdict
    says: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A distribution that is needed: what is asked for, what is there (empty: nothing), and whether that will do."""

    name: str
    wanted: str
    found: str
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device, as torch sees it."""

    name: str
    capability: tuple[int, int]
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisFacts:
    """The shared store; `error` says why it does not answer. `clock_ms`: how far its clock is before ours."""

    where: str
    error: str = ""
    version: tuple[int, ...] = ()
    clock_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A machine, as far as a cluster of these settings needs it."""

    python: str
    packages: tuple[Package, ...]
    hidden: str  # by what else is installed; empty: nothing
    compiler: str  # path; empty: there is none
    num_cores: int
    num_workers: int
    threads: int  # of each worker; 0: its share
    shortage: str  # of memory; empty: there is enough
    shared_memory_bytes: int
    open_files: int  # the most that this process may ask for
    ports: Mapping[str, str]  # flag -> why it cannot be bound; empty: it can
    model: str  # what is wrong with it; empty: nothing
    ray_address: str = ""
    ray_error: str = ""
    redis: RedisFacts | None = None
    cuda: str = ""  # version that torch is built for; empty: it is not
    nccl: str = ""
    driver: str = ""  # of NVIDIA; empty: none
    gpus: tuple[Gpu, ...] = ()
    cluster: str = ""  # one that runs at this port
    cluster_not_ready: str = ""


def judge(facts: Facts) -> list[Finding]:
    """All findings, in the order in which they matter."""
    parts: tuple[Callable[[Facts], list[Finding]], ...] = (
        _installation, _compute, _memory, _ports, _model, _ray, _redis, _gpus, _running
    )  # fmt: skip
    return [finding for part in parts for finding in part(facts)]


def _ok(area: str, says: str) -> Finding:
    return Finding(area=area, verdict=Verdict.OK, says=says)


def _bad(area: str, says: str, advice: str) -> Finding:
    return Finding(area=area, verdict=Verdict.BAD, says=says, advice=advice)


def _warn(area: str, says: str, advice: str) -> Finding:
    return Finding(area=area, verdict=Verdict.WARN, says=says, advice=advice)


def _installation(facts: Facts) -> list[Finding]:
    unfit = [each for each in facts.packages if not each.fits]
    found = []
    for each in unfit:
        told = f"{each.name} {each.found or 'is missing'}, wanted: {each.wanted}"
        found.append(_bad("packages", told, f"pip install '{each.wanted}'"))
    if not unfit:
        versions = {each.name: each.found for each in facts.packages}
        told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "ray", "grpcio", "redis") if name in versions)
        found.append(_ok("packages", f"Python {facts.python}; {told}; all {len(facts.packages)} are there"))
    if facts.hidden:
        found.append(_bad("packages", facts.hidden, "pip uninstall kernels"))
    return found


def _compute(facts: Facts) -> list[Finding]:
    found = []
    if facts.compiler:
        found.append(_ok("compiler", facts.compiler))
    else:
        found.append(_warn("compiler", "there is no C compiler: kernels run in torch, slower", "install gcc or clang"))
    busy = facts.num_workers * max(1, facts.threads)
    told = f"{facts.num_cores} cores for {facts.num_workers} workers of {facts.threads or 'a share of'} threads"
    if facts.threads and busy > facts.num_cores:
        advice = "lower --threads or the number of workers: more busy threads than cores slow each other down"
        found.append(_warn("cores", told, advice))
    else:
        found.append(_ok("cores", told))
    return found


def _memory(facts: Facts) -> list[Finding]:
    found = []
    if facts.shortage:
        found.append(_bad("memory", facts.shortage, "lower what it names"))
    else:
        found.append(_ok("memory", "there is enough for weights, KV and swap of all workers"))
    shared = f"/dev/shm has {facts.shared_memory_bytes // MiB} MiB free"
    if facts.shared_memory_bytes < SHARED_MEMORY_LEAST:
        advice = f"give Ray {SHARED_MEMORY_LEAST // MiB} MiB (docker run --shm-size): else it uses files, slower"
        found.append(_warn("shared memory", shared, advice))
    else:
        found.append(_ok("shared memory", shared))
    files = f"up to {facts.open_files} open files"
    if facts.open_files < OPEN_FILES_LEAST:
        found.append(_bad("open files", files, f"ulimit -Hn {OPEN_FILES_GOOD}"))
    elif facts.open_files < OPEN_FILES_GOOD:
        found.append(
            _warn("open files", f"{files}: a router takes a quarter as connections", f"ulimit -Hn {OPEN_FILES_GOOD}")
        )
    else:
        found.append(_ok("open files", files))
    return found


def _ports(facts: Facts) -> list[Finding]:
    taken = {flag: why for flag, why in facts.ports.items() if why}
    if facts.cluster:
        return [_ok("ports", f"in use by {facts.cluster}")]
    if not taken:
        return [_ok("ports", f"{', '.join(facts.ports)}: free")]
    return [_bad("ports", f"{flag}: {why}", f"choose another with {flag}, or 0") for flag, why in taken.items()]


def _model(facts: Facts) -> list[Finding]:
    if facts.model:
        return [_bad("model", facts.model, "give --model a folder, a GGUF file, a packaged name or a Hugging Face id")]
    return [_ok("model", "is there, and of a family that is served")]


def _ray(facts: Facts) -> list[Finding]:
    if not facts.ray_address:
        return []
    if facts.ray_error:
        advice = "start Ray there (`ray start --head`), or leave --address out for a local one"
        return [_bad("ray", f"{facts.ray_address}: {facts.ray_error}", advice)]
    return [_ok("ray", f"{facts.ray_address} answers")]


def _redis(facts: Facts) -> list[Finding]:
    redis = facts.redis
    if redis is None:
        return []
    if redis.error:
        advice = "start it, or correct --redis; until it answers nothing is kept for a router's successor"
        return [_bad("redis", f"{redis.where}: {redis.error}", advice)]
    version = ".".join(map(str, redis.version))
    found = []
    if redis.version < REDIS_LEAST:
        wanted = ".".join(map(str, REDIS_LEAST))
        found.append(_bad("redis", f"{redis.where} is version {version}", f"use {wanted} or newer"))
    else:
        found.append(_ok("redis", f"{redis.where} answers, version {version}"))
    if abs(redis.clock_ms) > CLOCK_OFF_MS:
        before = "before" if redis.clock_ms > 0 else "behind"
        told = f"its clock is {abs(redis.clock_ms) / 1000:.1f} s {before} this machine's"
        found.append(_warn("clocks", told, "keep both by NTP: keys expire by this machine's clock"))
    else:
        found.append(_ok("clocks", f"{abs(redis.clock_ms)} ms apart from Redis"))
    return found


def _gpus(facts: Facts) -> list[Finding]:
    if not facts.driver:
        return [_ok("gpu", "there is no NVIDIA driver: workers compute on CPUs")]
    if not facts.cuda:
        advice = "install a CUDA build of torch to use the GPUs; workers compute on CPUs until then"
        return [_warn("gpu", f"driver {facts.driver}, and torch is a CPU build", advice)]
    if not facts.gpus:
        return [_bad("gpu", f"driver {facts.driver}, torch for CUDA {facts.cuda}, and no device", "look at nvidia-smi")]
    found = []
    for number, gpu in enumerate(facts.gpus):
        capability = ".".join(map(str, gpu.capability))
        told = f"{number}: {gpu.name}, {gpu.free_bytes // MiB} MiB free, compute capability {capability}"
        if gpu.capability < CUDA_CAPABILITY_LEAST:
            wanted = ".".join(map(str, CUDA_CAPABILITY_LEAST))
            found.append(_warn("gpu", told, f"kernels are written for {wanted} and newer"))
        else:
            found.append(_ok("gpu", told))
    if facts.nccl:
        found.append(_ok("nccl", facts.nccl))
    else:
        found.append(
            _warn("nccl", "torch has no NCCL: blocks move over gloo, by way of the host", "use a torch with NCCL")
        )
    return found


def _running(facts: Facts) -> list[Finding]:
    if not facts.cluster:
        return []
    if facts.cluster_not_ready:
        return [
            _bad(
                "cluster",
                f"{facts.cluster} is not ready: {facts.cluster_not_ready}",
                "see `tandem status` and `tandem logs`",
            )
        ]
    return [_ok("cluster", f"{facts.cluster} is ready")]
