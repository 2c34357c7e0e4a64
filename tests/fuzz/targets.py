"""Every target of the coverage-guided fuzzer by its name: what runs one input, and the inputs that it begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import receiving_agent
import router_core
import worker_core
from decoding import DECODINGS

FRAMES = "receiving agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`run` takes any bytes, raises when a promise breaks, and says how many things the input held."""

    run: Callable[[bytes], int]
    seeds: Callable[[], list[bytes]]
    holds: str  # what these things are
    bytes_max: int
    share: int  # of the runs, out of all targets' together; the frames have their own count


def targets() -> dict[str, Target]:
    """The agent's first: its frames are what is counted."""
    world = receiving_agent.World()
    found = {
        FRAMES: Target(run=world.run, seeds=receiving_agent.seeds, holds="frames", bytes_max=600, share=0),
        "worker core": Target(
            run=worker_core.run, seeds=receiving_agent.seeds, holds="messages", bytes_max=2000, share=6
        ),
        "router core": Target(
            run=router_core.run, seeds=receiving_agent.seeds, holds="events", bytes_max=2000, share=20
        ),
    }
    for each in DECODINGS:
        holds = "files" if "GGUF" in each.name else "messages"
        found[each.name] = Target(run=each.read, seeds=each.seeds, holds=holds, bytes_max=4096, share=50)
    return found
