"""Shoots at clusters of its own with every kind of fault, in every protocol state, under a load that checks each token.

`make chaos`: ten minutes, 2 prefill and 2 decode workers, a random model with heavy KV. `make chaos-long`: 500 faults
and more, a tenth of them on SmolLM2. Exit status 1 when anything was lost, doubled, wrong or leaked, when streams took
longer than the bounds, or when the run was not as long as it should have been.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import fat_kv_model, report
from benchmarks.local_cluster import LocalCluster
from benchmarks.local_redis import LocalRedis
from cluster.chaos import ChaosRun, Place
from cluster.chaos_load import Load
from cluster.chaos_plan import SETTLE_MS, FaultKind, deck, parse_kinds, parse_states, plan
from cluster.chaos_report import markdown, summary
from cluster.chaos_tally import Tally
from cluster.config import DEFAULT_MODEL

SERVE = [
    "--prefill", "2", "--decode", "2", "--threads", "1", "--dtype", "float32", "--exact", "--allow-faults",
    "--max-restarts", "1000", "--restart-delay-max-ms", "1000",
]  # fmt: skip
EVERY_S = 8.0
RECOVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One cluster that is shot at."""

    model: str  # fat-kv, or a model of `tandem serve --model`
    load: Load
    duration_s: float = 0.0  # 0: as long as so many faults take
    num_faults: int | None = None  # None: as many as fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """How long a run must have been to count."""

    faults: int = 0
    of_each_kind: int = 0
    of_each_state: int = 0
    hard: int = 0  # SIGKILL or SIGSTOP with 8 or more streams in flight
    streams: int = 0


SMALL = Load(num_clients=12, num_questions=24, prompt_tokens_max=384, output_tokens_max=160)
LARGE = Load(num_clients=10, num_questions=12, prompt_tokens_max=160, output_tokens_max=64)
SHORT = [Phase(model=fat_kv_model.NAME, duration_s=600, load=SMALL)]
LONG = [
    Phase(model=fat_kv_model.NAME, num_faults=455, load=SMALL),
    Phase(model=DEFAULT_MODEL, num_faults=55, load=LARGE),
]
LEAST_SHORT = Least(faults=60, of_each_kind=1, of_each_state=1)
LEAST_LONG = Least(faults=500, of_each_kind=40, of_each_state=1, hard=100, streams=5_000)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every promise was kept."""
    flags = _flags(arguments)
    phases = LONG if flags.long else SHORT
    if flags.duration:
        phases = [Phase(model=phases[0].model, duration_s=flags.duration, load=phases[0].load)]
    least = Least() if flags.duration else LEAST_LONG if flags.long else LEAST_SHORT
    parts, tallies, broken = [], [], []
    for number, phase in enumerate(phases):
        tally = _shoot(phase, seed=flags.seed + number, flags=flags)
        tallies.append(tally)
        broken += tally.failures(recovery_limit_ms=round(flags.recovery * 1000))
        parts.append(f"## {phase.model}\n\n{markdown(tally)}\n\n{summary(tally)}")
        if flags.timeline:
            path = Path(f"{flags.timeline}-{phase.model}.txt")
            path.write_text("".join(f"{entry}\n" for entry in tally.timeline))
    broken += _too_little(tallies, least)
    verdict = "Every promise was kept." if not broken else "Broken:\n\n" + "\n".join(f"- {each}" for each in broken)
    examples = "\n".join(f"- {example}" for tally in tallies for example in tally.examples)
    body = "\n\n".join([*parts, verdict, *([examples] if examples else [])])
    name = "chaos_long" if flags.long else "chaos"
    if flags.no_write:
        print(body)
    else:
        report.write(name, "Chaos", body, seed=flags.seed, threads="1 a worker")
    return 1 if broken else 0


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--long", action="store_true", help="500 faults and more, a tenth on SmolLM2")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--duration", type=float, default=0.0, help="seconds; a shorter run, that need not be complete")
    parser.add_argument("--faults", default="", help="kinds with commas; default: all that the cluster allows")
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between faults, about")
    parser.add_argument("--recovery", type=float, default=RECOVERY_S, help="seconds that streams may take to go on")
    parser.add_argument("--redis", action="store_true", help="the cluster keeps its state in a Redis of its own")
    parser.add_argument("--timeline", default="", help="a file of this name and the model's for all that happened")
    parser.add_argument("--no-write", action="store_true", help="print only, and leave benchmarks/results as it is")
    return parser.parse_args(arguments)


@contextmanager
def running(model: str, *, redis: bool) -> Iterator[LocalCluster]:
    """The cluster that is shot at, with a Redis of its own if it has one."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-chaos-")))
        path = str(fat_kv_model.write(folder)) if model == fat_kv_model.NAME else model
        arguments = [*SERVE, "--model", path]
        if redis:
            arguments += ["--routers", "2", "--redis", stack.enter_context(LocalRedis()).url]
        yield stack.enter_context(LocalCluster(arguments))


def _shoot(phase: Phase, *, seed: int, flags: argparse.Namespace) -> Tally:
    with running(phase.model, redis=flags.redis) as cluster:
        shooting = ChaosRun(
            Place.of(cluster.run_file()),
            load=phase.load,
            seed=seed,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        ground = asyncio.run(shooting.ground())
        kinds = parse_kinds(flags.faults or ",".join(each for each in FaultKind if _possible(each, flags)))
        states = parse_states("all") if {FaultKind.KILL, FaultKind.STOP} & set(kinds) else ()
        every_ms = round(flags.every * 1000)
        duration_ms = round(phase.duration_s * 1000) or 2 * (phase.num_faults or 1) * every_ms + SETTLE_MS
        faults = plan(
            random.Random(seed).randrange,
            suits=deck(ground, kinds=kinds, states=states),
            duration_ms=duration_ms,
            every_ms=every_ms,
            num_max=phase.num_faults,
        )
        if phase.num_faults:
            duration_ms = faults[-1].at_ms + SETTLE_MS
        return asyncio.run(shooting.run(faults, duration_ms))


def _possible(kind: FaultKind, flags: argparse.Namespace) -> bool:
    return kind is not FaultKind.REDIS_DOWN or bool(flags.redis)


def _too_little(tallies: Sequence[Tally], least: Least) -> list[str]:
    """What the run should have done and has not."""
    strikes = [strike for tally in tallies for strike in tally.strikes]
    planned = {*(each.fault.kind for each in strikes), *(each.kind for tally in tallies for each in tally.unmet)}
    kinds = {kind: sum(each.fault.kind is kind for each in strikes) for kind in planned}
    states = {state: sum(sum(tally.states()[state].values()) for tally in tallies) for state in tallies[0].states()}
    facts = [
        ("faults", len(strikes), least.faults),
        ("streams", sum(tally.num_streams for tally in tallies), least.streams),
        ("SIGKILL or SIGSTOP with 8 streams in flight", sum(tally.num_hard for tally in tallies), least.hard),
        *((f"faults of kind {kind}", num, least.of_each_kind) for kind, num in sorted(kinds.items())),
        *((f"faults in {state}", num, least.of_each_state) for state, num in states.items()),
    ]
    return [f"{num} {what}, at least {wanted} are wanted" for what, num, wanted in facts if num < wanted]


if __name__ == "__main__":
    raise SystemExit(main())
