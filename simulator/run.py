"""`python -m simulator.run --seeds N`: runs seeded worlds on all cores and says which promise broke in which."""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from simulator.choices import Choices
from simulator.world import World

STORY_ROWS = 80
CHUNK = 25  # worlds that one process runs before it asks for more
PROGRESS_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one world. `problem` is empty when every promise held."""

    seed: int
    problem: str
    world: World | None
    taken: tuple[int, ...]
    events: int
    tokens: int


@dataclass(slots=True)
class Tally:
    """What many worlds did, and the seeds of those that broke a promise."""

    num: int = 0
    events: int = 0
    tokens: int = 0
    moves: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.num += other.num
        self.events += other.events
        self.tokens += other.tokens
        self.moves.update(other.moves)
        self.broken += other.broken


def run_world(choices: Choices, seed: int) -> Outcome:
    """Runs one world to its end. Any exception of a core in it is a broken promise too."""
    world: World | None = None
    problem = ""
    try:
        world = World(choices)
        world.run()
    except Exception as error:  # it is told, and the seed makes it again
        problem = f"{type(error).__name__}: {error}"
    return Outcome(
        seed=seed,
        problem=problem,
        world=world,
        taken=tuple(choices.taken),
        events=0 if world is None else world.schedule.num_events,
        tokens=0 if world is None else world.checks.num_tokens,
    )


def run_seed(seed: int) -> Outcome:
    """The world of one seed."""
    return run_world(Choices(seed=seed), seed)


def run_seeds(seeds: Iterable[int], *, stop: Callable[[Outcome], bool] = lambda _: False) -> list[Outcome]:
    """The worlds of many seeds, in order, until `stop` says so."""
    outcomes = []
    for seed in seeds:
        outcomes.append(run_seed(seed))
        if stop(outcomes[-1]):
            break
    return outcomes


def shrink(outcome: Outcome, *, runs_max: int = 300) -> Outcome:
    """A calmer world that still breaks a promise: choices become 0, many at once and then fewer, as long as it does."""
    best, runs = outcome, 0
    size = max(1, len(outcome.taken) // 2)
    while size:
        at = 0
        while at < len(best.taken) and runs < runs_max:
            calmer = (*best.taken[:at], *[0] * size, *best.taken[at + size :])
            if any(best.taken[at : at + size]):
                runs += 1
                tried = run_world(Choices(replay=calmer), outcome.seed)
                if tried.problem:
                    best = tried
            at += size
        size //= 2
    return best


def show(outcome: Outcome) -> str:
    """The story of a world that broke a promise."""
    lines = [f"seed {outcome.seed}: {outcome.problem}"]
    if outcome.world is not None:
        lines += [f"  {outcome.world.options}", *(f"  {row}" for row in outcome.world.story[-STORY_ROWS:])]
        for worker in outcome.world.workers.values():
            lines += [f"  {worker.worker_id}: {row}" for row in worker.core.story()[-20:]]
    lines.append(f"again: python -m simulator.run --seed {outcome.seed} --shrink")
    return "\n".join(lines)


# ---- many worlds ---------------------------------------------------------------------------------------------------


def tally(seeds: Sequence[int]) -> Tally:
    """The worlds of these seeds, one after the other."""
    total = Tally()
    for seed in seeds:
        outcome = run_seed(seed)
        moves = Counter() if outcome.world is None else Counter(outcome.world.checks.moves())
        broken = [(seed, outcome.problem)] if outcome.problem else []
        total.add(Tally(num=1, events=outcome.events, tokens=outcome.tokens, moves=moves, broken=broken))
    return total


def _tallies(seeds: range, jobs: int) -> Iterator[Tally]:
    chunks = [seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK)]
    if jobs == 1:
        yield from map(tally, chunks)
        return
    gc.freeze()  # what is there by now is shared by all processes, and is not looked at again
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(tally, chunks)


def run_many(seeds: range, *, jobs: int, failures: int, say: Callable[[str], None]) -> Tally:
    """All these worlds, until so many have broken a promise. The same ones are found whatever `jobs` is."""
    total = Tally()
    began_s = told_s = time.perf_counter()
    for part in _tallies(seeds, jobs):
        total.add(part)
        if len(total.broken) >= failures:
            break
        now_s = time.perf_counter()
        if now_s - told_s >= PROGRESS_S:
            told_s = now_s
            left_s = (now_s - began_s) / total.num * (len(seeds) - total.num)
            say(f"{total.num} of {len(seeds)} worlds, {len(total.broken)} broke a promise, {left_s:.0f} s to go")
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a promise broke."""
    parser = argparse.ArgumentParser(prog="python -m simulator.run", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many worlds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, default=None, help="only this one, with its story")
    parser.add_argument("--shrink", action="store_true", help="with --seed: look for a calmer world that breaks it too")
    parser.add_argument("--failures", type=int, default=1, help="stop after so many broken worlds")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; all cores")
    options = parser.parse_args(arguments)
    logging.disable()  # routers warn of what a world does to them
    if options.seed is not None:
        outcome = run_seed(options.seed)
        if outcome.problem and options.shrink:
            outcome = shrink(outcome)
            print(f"{sum(map(bool, outcome.taken))} choices of {len(outcome.taken)} are left that are not calm")
        print(show(outcome) if outcome.problem else f"seed {options.seed}: all promises held")
        return 1 if outcome.problem else 0
    began_s = time.perf_counter()
    seeds = range(options.first, options.first + options.seeds)
    total = run_many(
        seeds, jobs=options.jobs, failures=options.failures, say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    took_s = time.perf_counter() - began_s
    for seed, problem in total.broken[1:]:
        print(f"seed {seed}: {problem}")
    if total.broken:
        print(show(run_seed(total.broken[0][0])))
    moves = ", ".join(f"{num} {how}" for how, num in sorted(total.moves.items()))
    print(
        f"{total.num} worlds, {total.events} events, {total.tokens} tokens in {took_s:.1f} s; moves: {moves or 'none'}"
    )
    print(f"{len(total.broken)} broke a promise")
    return 1 if total.broken else 0


if __name__ == "__main__":
    sys.exit(main())
