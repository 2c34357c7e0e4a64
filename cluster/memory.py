"""Whether a machine has room for the workers of a cluster, and what to change when it has not."""

from __future__ import annotations

from cluster.config import KV_MEMORY_LEAST, ClusterConfig, MiB
from engine.arch import ArchSpec
from engine.tensor_shapes import num_parameters

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}  # of one number
OTHER_BYTES = 192 * MiB  # of a worker: Python, torch and its transfer agent, without what they share; measured


def shortage(config: ClusterConfig, arch: ArchSpec, *, available_bytes: int) -> str | None:
    """Why the workers do not fit into `available_bytes`, how much is missing, and which flag helps; None: they fit."""
    weights = num_parameters(arch) * WEIGHT_BYTES[config.dtype]
    kv, swap, num = int(config.kv_memory), config.swap_bytes, config.num_workers
    missing = num * (weights + kv + swap + OTHER_BYTES) - available_bytes
    if missing <= 0:
        return None
    # Unless it was given, what is swapped to shrinks with it.
    kv_left = (kv - -(-missing // num)) // MiB * MiB
    fits = kv_left >= max(MiB, KV_MEMORY_LEAST)
    hints = [f"--kv-memory to {kv_left // MiB}MiB" if fits else "--kv-memory and --swap-memory"]
    hints.append("the number of workers (--prefill, --decode, --mixed)")
    return (
        f"kv_memory: {num} workers need {weights // MiB} MiB of weights, {kv // MiB} MiB of KV, {swap // MiB} MiB to "
        f"swap it to and about {OTHER_BYTES // MiB} MiB besides each; {available_bytes // MiB} MiB are available, "
        f"{-(-missing // MiB)} MiB too little: lower {' or '.join(hints)}"
    )
