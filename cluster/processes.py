"""Processes and ports of this machine: who dies with whom, what is left of a tree, which port is free."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import sys
import termios
import time
from collections.abc import Iterable
from contextlib import suppress

import psutil

POLL_S = 0.02
UNREAD_MAX_BYTES = 8 << 10  # of signs of life; the rest of a pipe, 64 KiB, is for what must not be lost
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class PortInUse(OSError):
    """A port cannot be bound; the message names it and the flag that changes it."""


def die_with_parent(parent_pid: int) -> None:
    """The kernel kills this process when the thread that started it ends. Linux only; elsewhere a closed stdin tells.

    Raises ProcessLookupError when the parent is gone already.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise ProcessLookupError(f"the parent {parent_pid} is gone")


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans, so that none of them escapes a stop."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def bury_orphans(seen: set[int]) -> set[int]:
    """Reaps children that were zombies at the last look, `seen`, and are still; returns the other zombies there are.

    Whoever started a child itself waits for it, well within the time between two looks. For an adopted one nobody does.
    """
    zombies = {child.pid for child in psutil.Process().children() if not lives(child)}
    for pid in zombies & seen:
        with suppress(ChildProcessError):  # it was waited for after all
            os.waitpid(pid, os.WNOHANG)
    return zombies - seen


def descendants() -> list[psutil.Process]:
    """All living processes below this one."""
    return psutil.Process().children(recursive=True)


def wait_gone(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Waits for the processes to end, and says which have not. Zombies are gone, whoever may reap them later."""
    until_s = time.monotonic() + timeout_s
    left = list(processes)
    while True:
        # A zombie that is a child of ours is reaped by the way.
        _, left = psutil.wait_procs(left, timeout=0)
        left = [process for process in left if lives(process)]
        if not left or time.monotonic() >= until_s:
            return left
        time.sleep(POLL_S)


def kill_all(processes: Iterable[psutil.Process], timeout_s: float = 5.0) -> list[psutil.Process]:
    """SIGKILL to each, and what is left after `timeout_s`."""
    doomed = list(processes)
    for process in doomed:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return wait_gone(doomed, timeout_s)


def is_heard(pipe: int) -> bool:
    """Whether the other end of a pipe reads what is written to it, or there is room enough not to care.

    Who says something each second asks first: when the reader stands still the pipe fills, and then a write waits.
    """
    unread = bytearray(4)
    try:
        fcntl.ioctl(pipe, termios.FIONREAD, unread)
    except OSError:  # no pipe
        return True
    return int.from_bytes(unread, sys.byteorder) < UNREAD_MAX_BYTES


def pick_port(host: str, port: int, flag: str) -> int:
    """`port` when it can be bound at `host`, or a free one for 0. Raises PortInUse or OSError naming port and flag."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise PortInUse(f"port {port} at {host}: {error.strerror}; choose another with {flag}") from None
        return int(probe.getsockname()[1])


def hold_port(host: str, port: int, flag: str) -> socket.socket:
    """Keeps `port`, a free one for 0, for servers that bind it with SO_REUSEPORT; takes no connection itself.

    Before the first of them, and between two, the kernel would else lend it to any server or connection. Raises
    PortInUse or OSError, also when other servers would share it.
    """
    if port:
        pick_port(host, port, flag)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise PortInUse(f"port {port} at {host}: {error.strerror}; choose another with {flag}") from None
    return held


def lives(process: psutil.Process) -> bool:
    """Whether the process runs, or could: a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)  # a used pid may be another's
    except psutil.NoSuchProcess:
        return False


def _prctl(option: int, value: int) -> None:
    if not hasattr(signal, "pthread_sigmask") or os.uname().sysname != "Linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
