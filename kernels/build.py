"""Compiles the C kernels at first use, loads them, and says which kernels are in force.

The object lies in $XDG_CACHE_HOME/tandem (else ~/.cache/tandem) under a hash of sources, flags and compiler; it is
renamed into place whole, so processes that build at once cannot harm one another. `TANDEM_KERNELS=torch` asks for the
torch twins; so does a machine without a compiler, after one warning.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("tandem.kernels")

SOURCE_FOLDER = Path(__file__).resolve().parent / "cpu"
COMPILERS = ("cc", "gcc", "clang")
BUILD_TIMEOUT_S = 120.0
# Contraction is off so that only the fused multiply-adds that are written are fused: the bits of exact mode.
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")

# Instruction sets, best first: name, compiler flags, what /proc/cpuinfo must show. All give the same bits. A named
# level and not -march=native: a home folder may be shared by machines of several kinds.
X86_LEVELS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "x86-64-v4": (
        ("-march=x86-64-v4",),
        frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi2"}),
    ),
    "x86-64-v3": (("-march=x86-64-v3",), frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})),
}
ARM_LEVEL = "armv8-a"
# The portable lanes on x86, for the tests: what arm64 runs, without an arm64 machine.
PORTABLE_LEVEL = "portable"

# Argument types, one letter each: pointer, 64-bit integer (q), int, float; the letter before > is the result.
SIGNATURES = {
    "tandem_gemm": "v>pqpqipipqqqi",
    "tandem_paged_attention": "i>pp",
    "tandem_copy_and_hash": "Q>ppppqq",
    "tandem_write_kv": "v>p",
    "tandem_rms_norm": "v>pqqpqqpqqqfiii",
    "tandem_add_rms_norm": "v>pppqpqqfiii",
    "tandem_rope": "v>pqqppqqqqii",
    "tandem_gated": "v>pqpqqqii",
}
LETTERS = {
    "v": None, "p": ctypes.c_void_p, "q": ctypes.c_int64, "Q": ctypes.c_uint64, "i": ctypes.c_int, "f": ctypes.c_float,
}  # fmt: skip


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why in one sentence."""


_lock = threading.Lock()
_chosen: list[ctypes.CDLL | None] = []  # empty until the first call
_missing: list[str] = []  # why there are none, when that was not asked for


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where the torch twins run instead. The first call may compile for some seconds."""
    if not _chosen:
        with _lock:
            if not _chosen:
                _chosen.append(_choose())
    return _chosen[0]


def description() -> str:
    """Names the kernels in force for the numerics fingerprint: "c-<hash of the sources>" or "torch".

    The instruction set is no part of it: all of them give the same bits.
    """
    return "torch" if library() is None else f"c-{source_hash()[:12]}"


def missing_reason() -> str:
    """Why the torch twins run although nobody asked for them; empty when nothing is amiss."""
    library()
    return _missing[0] if _missing else ""


@contextlib.contextmanager
def using(level: str | None) -> Iterator[None]:
    """Runs the kernels of one instruction set (None: the torch twins) inside the block, in the whole process.

    For tests and benchmarks. Raises BuildError where it cannot be built or run here. Weights packed outside must not
    be used inside a block that changes between C and torch, nor the other way round.
    """
    other = None if level is None else load(level)
    before = list(_chosen)
    _chosen[:] = [other]
    try:
        yield
    finally:
        _chosen[:] = before


def levels() -> list[str]:
    """Instruction sets that this machine can run, best first; empty where the C kernels are not supported."""
    machine = platform.machine().lower()
    if sys.byteorder != "little" or sys.platform not in ("linux", "darwin"):
        return []
    if machine in ("aarch64", "arm64"):
        return [ARM_LEVEL]
    if machine not in ("x86_64", "amd64"):
        return []
    flags = cpu_flags()
    return [name for name, (_, needed) in X86_LEVELS.items() if needed <= flags]


@functools.cache
def load(level: str) -> ctypes.CDLL:
    """Builds for one instruction set, or finds it built, and loads it. Raises BuildError."""
    machine_levels = levels()
    if level != PORTABLE_LEVEL and level not in machine_levels:
        raise BuildError(f"this machine cannot run {level}, only {machine_levels}")
    flags: tuple[str, ...] = X86_LEVELS[level][0] if level in X86_LEVELS else ()
    if level == PORTABLE_LEVEL and machine_levels and machine_levels[-1] in X86_LEVELS:
        flags = (*X86_LEVELS[machine_levels[-1]][0], "-DTANDEM_PORTABLE", "-O1")
    folder, kept = _cache_folder()
    try:
        loaded = ctypes.CDLL(str(_built(flags, folder)))
    except OSError as error:
        raise BuildError(f"the built kernels cannot be loaded: {error}") from error
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)  # what is loaded stays mapped
    for name, signature in SIGNATURES.items():
        result, arguments = signature.split(">")
        function = getattr(loaded, name)
        function.restype = LETTERS[result]
        function.argtypes = [LETTERS[letter] for letter in arguments]
    return loaded


@functools.cache
def source_hash() -> str:
    """Hash of the C sources and of the flags that can change bits."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCE_FOLDER.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _choose() -> ctypes.CDLL | None:
    wanted = os.environ.get("TANDEM_KERNELS", "auto")
    if wanted not in ("auto", "torch", *X86_LEVELS, ARM_LEVEL):
        raise ValueError(f"TANDEM_KERNELS is {wanted!r}, must be auto, torch or one of {[*X86_LEVELS, ARM_LEVEL]}")
    if wanted == "torch":
        return None
    try:
        if wanted == "auto":
            available = levels()
            if not available:
                raise BuildError(f"no C kernels for {sys.platform} on {platform.machine()} with this instruction set")
            wanted = available[0]
        return load(wanted)
    except BuildError as error:
        log.warning("kernels run in torch, several times slower: %s", error)
        _missing.append(str(error))
        return None


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo lists of this machine; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _compiler() -> list[str]:
    if os.environ.get("CC"):
        command = shlex.split(os.environ["CC"])
        if shutil.which(command[0]) is None:
            raise BuildError(f"CC is {command[0]}, which cannot be run")
        return command
    for name in COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise BuildError(f"no C compiler is at hand (none of {', '.join(COMPILERS)}; CC is not set)")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{command[0]} failed: {lines[0]}")
    return done.stdout


def _built(flags: tuple[str, ...], folder: Path) -> Path:
    """Path of the object for these flags, compiled into `folder` when it is not there."""
    compiler = _compiler()
    name = hashlib.sha256(f"{source_hash()} {flags} {compiler} {_run([*compiler, '--version'])}".encode()).hexdigest()
    path = folder / f"kernels-{name[:24]}.so"
    if path.exists():
        return path
    with _one_builder(folder):
        if not path.exists():
            _compile(compiler, flags, path)
    return path


def _compile(compiler: list[str], flags: tuple[str, ...], path: Path) -> None:
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix="building-", suffix=".so")
    os.close(handle)
    try:
        sources = [str(source) for source in sorted(SOURCE_FOLDER.glob("*.c"))]
        _run([*compiler, *FLAGS, *flags, *sources, "-o", unfinished, "-lm"])
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _cache_folder() -> tuple[Path, bool]:
    """Where built kernels lie, and whether they are kept there."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "tandem"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder, True
    except (OSError, RuntimeError) as error:
        log.debug("no cache folder: %s", error)
    # Nowhere to keep it: a folder of this process alone, so that nobody else can put an object there.
    return Path(tempfile.mkdtemp(prefix="tandem-kernels-")), False


@contextlib.contextmanager
def _one_builder(folder: Path) -> Iterator[None]:
    """Lets one process build while the others wait for it; whoever has waited too long builds as well."""
    deadline = time.monotonic() + BUILD_TIMEOUT_S
    with (folder / "building.lock").open("w") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError as error:  # a file system without locks: the rename alone must do
                log.debug("no lock in %s: %s", folder, error)
                break
        yield
