"""The swarm options of a world: how large it is, and which faults it has how often; drawn before anything happens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.choices import Choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One world's size and faults; how often in a thousand turns of misfortune, frames, steps or tokens."""

    num_prefill: int
    num_decode: int
    num_mixed: int
    num_blocks: int
    reserve_tokens: int  # of each answer that the router counts in advance: none leaves it to preemption
    num_requests: int
    answer_tokens_max: int
    faulty_ms: int
    delay_max_ms: int
    step_max_ms: int
    link_breaks: int
    peer_breaks: int
    partitions: int
    crashes: int
    false_deaths: int
    suspicions: int
    drains: int
    pauses: int
    slow_steps: int
    agent_kills: int
    client_leaves: int
    doubts: int  # so often, while a commit is asked for, something breaks at one of its ends
    loss: int
    corruption: int
    clock_drift: int  # a clock gains or loses up to so many thousandths
    moves: int  # so often, when tokens of a request come, somebody wants it moved
    rebalances: bool
    swap_slots: int  # blocks of memory that a worker may swap out to
    canaries: bool  # the cluster asks itself, too
    pressed: bool  # decode workers let in more than they have memory for
    num_routers: int
    shared: bool  # they share a store
    router_kills: int
    router_stops: int
    store_faults: int
    store_repeats: int  # so often a call is made twice, since its answer was lost
    breaks: int  # of clients' connections
    twins: int  # so often two clients come with the same idempotency key at once
    second_readers: int
    stops: int  # so often a request has a stop string
    clock_skew_ms: int  # of a router that comes while the store is away
    hasty_fences: bool  # a fence lasts not much longer than a good one has to, so that many commits are in doubt

    @property
    def excuses(self) -> bool:
        """Whether a request may be lost by its name: to workers that failed it too often, or with all that knew it."""
        workers = (self.link_breaks, self.partitions, self.crashes, self.false_deaths, self.pauses, self.slow_steps)
        data = (self.peer_breaks, self.suspicions, self.drains, self.agent_kills, self.doubts, self.loss)
        return any((*workers, *data, self.corruption, self.router_kills and (self.store_faults or not self.shared)))


def draw_options(choices: Choices) -> Options:
    """Each fault is there in half of the worlds; 0 is always the calm choice."""

    def sometimes(most: int) -> int:
        return choices.choose(2) * choices.choose(most + 1)

    moves = sometimes(300)
    num_routers = 1 + choices.choose(2) * choices.choose(3)
    options = Options(
        num_prefill=1 + choices.choose(2),
        num_decode=1 + choices.choose(3),
        num_mixed=choices.choose(4) // 3,
        num_blocks=24 + 4 * choices.choose(8),
        reserve_tokens=16 * choices.choose(2),
        num_requests=3 + choices.choose(8),
        answer_tokens_max=16 + 48 * (choices.choose(4) > 0 if moves else choices.choose(6) // 5),
        faulty_ms=1_000 + 1_000 * choices.choose(4),
        delay_max_ms=1 + choices.choose(8 if moves else 30),
        step_max_ms=(1 + choices.choose(20)) * (1 + 24 * (choices.choose(4) // 3)),
        link_breaks=sometimes(300),
        peer_breaks=sometimes(400),
        partitions=sometimes(200),
        crashes=sometimes(200),
        false_deaths=sometimes(150),
        suspicions=sometimes(200),
        drains=sometimes(200),
        pauses=sometimes(300),
        slow_steps=sometimes(20),
        agent_kills=sometimes(200),
        client_leaves=sometimes(300),
        doubts=sometimes(500),
        loss=sometimes(300),
        corruption=sometimes(300),
        clock_drift=sometimes(20),
        moves=moves,
        rebalances=bool(choices.choose(2)),
        num_routers=num_routers,
        shared=num_routers > 1 or bool(choices.choose(2)),
        router_kills=sometimes(200),
        router_stops=sometimes(200),
        store_faults=sometimes(200),
        store_repeats=sometimes(100),
        breaks=sometimes(400),
        twins=sometimes(300),
        second_readers=sometimes(300),
        stops=sometimes(400),
        clock_skew_ms=choices.choose(2) * choices.choose(3) * 1_000,
        hasty_fences=bool(choices.choose(2)),
        swap_slots=(0, 6, 24, 24)[choices.choose(4)],
        pressed=choices.choose(3) == 2,
        canaries=bool(choices.choose(2)),
    )
    if not options.pressed:
        return options
    return replace(
        options, num_blocks=24, reserve_tokens=0, num_requests=options.num_requests + 4, answer_tokens_max=64
    )
