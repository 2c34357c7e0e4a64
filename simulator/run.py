"""`python -m simulator.run --seeds N`: runs seeded worlds, and says which promise broke in which of them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from simulator.choices import Choices
from simulator.world import World

STORY_ROWS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one world. `problem` is empty when every promise held."""

    seed: int
    problem: str
    world: World | None
    taken: tuple[int, ...]
    events: int
    tokens: int


def run_world(choices: Choices, seed: int) -> Outcome:
    """Runs one world to its end. An assertion of any core in it is a broken promise too."""
    world: World | None = None
    problem = ""
    try:
        world = World(choices)
        world.run()
    except AssertionError as error:
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
    lines.append(f"again: python -m simulator.run --seed {outcome.seed}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a promise broke."""
    parser = argparse.ArgumentParser(prog="python -m simulator.run", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many worlds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, default=None, help="only this one, with its story")
    parser.add_argument("--shrink", action="store_true", help="with --seed: look for a calmer world that breaks it too")
    parser.add_argument("--failures", type=int, default=1, help="stop after so many broken worlds")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        outcome = run_seed(options.seed)
        if outcome.problem and options.shrink:
            outcome = shrink(outcome)
            print(f"{sum(map(bool, outcome.taken))} choices of {len(outcome.taken)} are left that are not calm")
        print(show(outcome) if outcome.problem else f"seed {options.seed}: all promises held")
        return 1 if outcome.problem else 0
    began_s = time.perf_counter()
    broken: list[Outcome] = []
    num = events = tokens = 0
    for seed in range(options.first, options.first + options.seeds):
        outcome = run_seed(seed)
        num, events, tokens = num + 1, events + outcome.events, tokens + outcome.tokens
        if outcome.problem:
            broken.append(outcome)
            print(show(outcome))
            if len(broken) >= options.failures:
                break
    took_s = time.perf_counter() - began_s
    print(f"{num} worlds, {events} events, {tokens} tokens in {took_s:.1f} s: {len(broken)} broke a promise")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
