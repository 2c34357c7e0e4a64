"""Which faults strike a running cluster, when, and whom: drawn from a seed, so that a run can be made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

Choose = Callable[[int], int]  # a number below the one given

# Shorter than a heartbeat, about as long as the dead are waited for, and longer: then the process is killed.
STOPS_MS = (200, 2_000, 8_000)
SETTLE_MS = 10_000  # after the last fault: every recovery is to be over by then


class FaultKind(StrEnum):
    """What happens."""

    KILL = "kill"  # SIGKILL
    STOP = "stop"  # SIGSTOP, and SIGCONT after a while
    CANCEL = "cancel"  # half of the clients leave at once


class Victim(StrEnum):
    """Whom it strikes."""

    PREFILL = "prefill worker"
    DECODE = "decode worker"
    PREFILL_AGENT = "prefill worker's agent"
    DECODE_AGENT = "decode worker's agent"
    ROUTER = "router"
    CLIENTS = "clients"


# A router that is killed takes its streams with it while nothing is journalled: that is no fault to survive yet.
VICTIMS: dict[FaultKind, tuple[Victim, ...]] = {
    FaultKind.KILL: (Victim.DECODE, Victim.PREFILL, Victim.DECODE_AGENT, Victim.PREFILL_AGENT),
    FaultKind.STOP: (Victim.DECODE, Victim.PREFILL, Victim.DECODE_AGENT, Victim.PREFILL_AGENT, Victim.ROUTER),
    FaultKind.CANCEL: (Victim.CLIENTS,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. `pick` chooses among the victims there are when it strikes; `for_ms` is how long a stop lasts."""

    number: int
    at_ms: int  # since the run began
    kind: FaultKind
    victim: Victim
    pick: int
    for_ms: int = 0

    def __str__(self) -> str:
        lasts = f" for {self.for_ms} ms" if self.for_ms else ""
        return f"{self.kind} {self.victim}{lasts}"


def parse_kinds(text: str) -> tuple[FaultKind, ...]:
    """The kinds in a list with commas. Raises ValueError naming the one that there is not."""
    kinds = []
    for name in filter(None, (each.strip() for each in text.split(","))):
        if name not in list(FaultKind):
            raise ValueError(f"--faults: there is no fault {name!r}; there are {', '.join(FaultKind)}")
        kinds.append(FaultKind(name))
    if not kinds:
        raise ValueError(f"--faults: is {text!r}, must name some of {', '.join(FaultKind)}")
    return tuple(dict.fromkeys(kinds))


def plan(choose: Choose, *, kinds: Sequence[FaultKind], duration_ms: int, every_ms: int) -> tuple[Fault, ...]:
    """The faults of one run: a new one about `every_ms`, every kind and victim as often as every other.

    Raises ValueError when the run is too short for one of them.
    """
    deck = [(kind, victim) for kind in kinds for victim in VICTIMS[kind]]
    hand: list[tuple[FaultKind, Victim]] = []
    faults: list[Fault] = []
    at_ms = every_ms // 2 + choose(every_ms)
    while at_ms <= duration_ms - SETTLE_MS:
        hand = hand or list(deck)
        kind, victim = hand.pop(choose(len(hand)))
        for_ms = STOPS_MS[choose(len(STOPS_MS))] if kind is FaultKind.STOP else 0
        if victim is Victim.ROUTER:
            for_ms = min(for_ms, STOPS_MS[1])  # clients wait for it meanwhile
        fault = Fault(
            number=len(faults) + 1, at_ms=at_ms, kind=kind, victim=victim, pick=choose(1 << 16), for_ms=for_ms
        )
        faults.append(fault)
        at_ms += every_ms // 2 + choose(every_ms)
    if not faults:
        least_s = (SETTLE_MS + 2 * every_ms) / 1000
        raise ValueError(f"--duration: is {duration_ms / 1000:g} s, too short for a fault; {least_s:g} s are enough")
    return tuple(faults)
