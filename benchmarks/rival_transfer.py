"""Mooncake's and NIXL's transfer engines behind two pipes, for benchmarks/transfer.py; runs in their environment.

`python rival_transfer.py {mooncake,nixl} POOL_BYTES BLOCK_BYTES`: a line in is bytes of a frame and how many; a line
out is JSON: the seconds that they took from this process's memory to another's, or what went wrong. Each frame is one
batch of scattered blocks and is over before the next begins. The first answer says that bytes arrive as they left.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import numpy

HOST = "127.0.0.1"
Move = Callable[[list[int], list[int], int], None]  # offsets here, offsets there, bytes of each


def mooncake_engine(buffer: numpy.ndarray) -> Any:
    """An engine over TCP that knows the buffer."""
    from mooncake.engine import TransferEngine  # type: ignore[import-not-found, unused-ignore]

    engine = TransferEngine()
    if engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") or engine.register_memory(buffer.ctypes.data, buffer.nbytes):
        raise RuntimeError("mooncake does not start")
    return engine


def nixl_agent_over(buffer: numpy.ndarray, name: str) -> Any:
    """An agent over UCX that knows the buffer."""
    from nixl_cu12._api import (  # type: ignore[import-not-found, unused-ignore]
        nixl_agent,
        nixl_agent_config,
    )

    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "")], "DRAM")
    return agent


def serve(kind: str, pool_bytes: int) -> None:
    """The target: says where it is, then the checksum of its pool for each line that comes."""
    buffer = numpy.zeros(pool_bytes, numpy.uint8)
    if kind == "mooncake":
        engine = mooncake_engine(buffer)
        place = f"{HOST}:{engine.get_rpc_port()}"
    else:
        engine = nixl_agent_over(buffer, "target")
        place = engine.get_agent_metadata().hex()
    say({"place": place, "address": buffer.ctypes.data})
    for _ in sys.stdin:
        say({"checksum": zlib.crc32(buffer.data)})


def mover(kind: str, buffer: numpy.ndarray, target: dict[str, Any]) -> Move:
    """Writes blocks of the buffer into the target's."""
    here, there, place = buffer.ctypes.data, target["address"], target["place"]
    if kind == "mooncake":
        engine = mooncake_engine(buffer)

        def with_mooncake(from_: list[int], to: list[int], size: int) -> None:
            sources, targets = [here + at for at in from_], [there + at for at in to]
            if engine.batch_transfer_sync_write(place, sources, targets, [size] * len(from_)):
                raise RuntimeError("mooncake did not write")

        return with_mooncake
    agent = nixl_agent_over(buffer, "source")
    peer = agent.add_remote_agent(bytes.fromhex(place))

    def with_nixl(from_: list[int], to: list[int], size: int) -> None:
        sources = agent.get_xfer_descs([(here + at, size, 0) for at in from_], "DRAM")
        targets = agent.get_xfer_descs([(there + at, size, 0) for at in to], "DRAM")
        handle = agent.initialize_xfer("WRITE", sources, targets, peer, "")
        state = agent.transfer(handle)
        while state != "DONE":
            if state == "ERR":
                raise RuntimeError("NIXL did not write")
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)

    return with_nixl


def run(kind: str, pool_bytes: int, block_bytes: int) -> None:
    """The source: starts the target, proves that bytes arrive, and obeys."""
    buffer = numpy.frombuffer(os.urandom(pool_bytes), numpy.uint8).copy()
    command = [sys.executable, __file__, kind, str(pool_bytes), str(block_bytes), "target"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            target = json.loads(process.stdout.readline())
            if "error" in target:
                raise RuntimeError(target["error"])
            move = mover(kind, buffer, target)
            starts = list(range(0, pool_bytes, block_bytes))
            move(starts, starts, block_bytes)
            print(file=process.stdin, flush=True)
            arrived = json.loads(process.stdout.readline())["checksum"] == zlib.crc32(buffer.data)
            say({"ready": kind} if arrived else {"error": "what arrived is not what left"})
            shuffled = random.Random(1).sample(starts, len(starts))
            for line in sys.stdin:
                frame_bytes, num_frames = map(int, line.split())
                num = frame_bytes // block_bytes
                began = time.perf_counter()
                for number in range(num_frames):
                    first = number * num % (len(starts) - num + 1)
                    move(starts[first : first + num], shuffled[first : first + num], block_bytes)
                say({"took_s": time.perf_counter() - began})
        finally:
            process.kill()


def say(what: dict[str, Any]) -> None:
    """One line to whoever started this process."""
    print(json.dumps(what), file=ANSWERS, flush=True)


if __name__ == "__main__":
    # The engines print what they like: answers go to what was standard output, and prints to standard error.
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with redirect_stdout(sys.stderr):
        try:
            if sys.argv[4:] == ["target"]:
                serve(sys.argv[1], int(sys.argv[2]))
            else:
                run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
            sys.exit(1)
