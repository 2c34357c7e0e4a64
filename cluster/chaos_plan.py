"""Which faults strike a running cluster, when, whom and in which state: drawn from a seed, to be made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.chaos_states import STATES, role_in
from tandem.messages import Role
from tandem.near_miss import did_you_mean

Choose = Callable[[int], int]  # a number below the one given

# Shorter than a heartbeat, about as long as the dead are waited for, and longer: then the process is killed.
STOPS_MS = (200, 2_000, 8_000)
# Shorter than any time limit, about as long as a peer's silence is borne, and longer than any recovery may take.
PARTITIONS_MS = (400, 3_000, 15_000)
DELAYS_MS = (30, 100, 300)  # each message waits so long, at most
DELAY_FOR_MS = 4_000
CORRUPT_EVERY = (1, 2, 5)  # each frame that arrives is damaged, or each second, or each fifth
CORRUPT_FOR_MS = 2_000
STORE_DOWN_MS = (1_000, 5_000)
AFTER_STATE_MS = (0, 2, 20)  # at once, before what the state brings with it is said; or a little later
SETTLE_MS = 10_000  # after the last fault: every recovery is to be over by then


class FaultKind(StrEnum):
    """What happens."""

    KILL = "kill"  # SIGKILL
    STOP = "stop"  # SIGSTOP, and SIGCONT after a while
    PARTITION = "partition"  # a link lets nothing pass for a while
    DELAY = "delay"  # a link is slow for a while
    CORRUPT = "corrupt"  # frames arrive damaged for a while
    REDIS_DOWN = "redis-down"  # the store is stopped for a while, or killed and started again
    CANCEL = "cancel"  # half of the clients leave at once


class Victim(StrEnum):
    """Whom it strikes."""

    PREFILL = "prefill worker"
    DECODE = "decode worker"
    PREFILL_AGENT = "prefill worker's agent"
    DECODE_AGENT = "decode worker's agent"
    PAIR = "prefill and decode worker"  # one of each, at once
    ROUTER = "router"
    ROUTER_LINK = "stream of router and worker"
    WORKER_LINK = "streams among workers"
    AGENT_LINK = "links among agents"
    STORE_STOPPED = "redis, stopped"
    STORE_KILLED = "redis, killed"
    CLIENTS = "clients"


LINKS = (Victim.ROUTER_LINK, Victim.WORKER_LINK, Victim.AGENT_LINK)
PROCESSES = (Victim.DECODE, Victim.PREFILL, Victim.DECODE_AGENT, Victim.PREFILL_AGENT)
VICTIMS: dict[FaultKind, tuple[Victim, ...]] = {
    FaultKind.KILL: (*PROCESSES, Victim.PAIR, Victim.ROUTER),
    FaultKind.STOP: (*PROCESSES, Victim.PAIR, Victim.ROUTER),
    FaultKind.PARTITION: LINKS,
    FaultKind.DELAY: LINKS,
    FaultKind.CORRUPT: (Victim.AGENT_LINK,),
    FaultKind.REDIS_DOWN: (Victim.STORE_STOPPED, Victim.STORE_KILLED),
    FaultKind.CANCEL: (Victim.CLIENTS,),
}
ARMED = frozenset({FaultKind.PARTITION, FaultKind.DELAY, FaultKind.CORRUPT})  # in the workers themselves
# Of a state's worker, and of its agent, each is struck in each state.
STATE_VICTIMS = {
    Role.PREFILL: (Victim.PREFILL, Victim.PREFILL_AGENT),
    Role.DECODE: (Victim.DECODE, Victim.DECODE_AGENT),
}


# How often a kind comes beside the others: what kills and stops does so to many victims, and in many states.
WEIGHTS = {FaultKind.KILL: 5, FaultKind.STOP: 5}
WEIGHT = 2


@dataclass(frozen=True, slots=True)
class Target:
    """What a fault strikes, and how. `state`: in the moment in which a transfer of the victim enters it."""

    kind: FaultKind
    victim: Victim
    state: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suit:
    """Kinds of faults that are dealt together, so many in a round. Each card comes as often as every other.

    A card is a target, or the ways to strike in one state, which take turns.
    """

    weight: int
    cards: tuple[tuple[Target, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What the cluster that is struck allows."""

    faults_allowed: bool  # its workers take faults over gRPC
    has_store: bool  # a Redis keeps its state


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. `pick` chooses among the victims there are when it strikes; the others are as their kind has them."""

    number: int
    at_ms: int  # since the run began
    kind: FaultKind
    victim: Victim
    pick: int
    state: str = ""
    for_ms: int = 0
    period_ms: int = 0
    corrupt_every: int = 0
    after_ms: int = 0  # after the state was entered

    @property
    def target(self) -> Target:
        """What it is one of."""
        return Target(self.kind, self.victim, self.state)

    def __str__(self) -> str:
        parts = [f"{self.kind} {self.victim}"]
        parts += [f"in {self.state} + {self.after_ms} ms"] if self.state else []
        parts += [f"by up to {self.period_ms} ms"] if self.period_ms else []
        parts += [f"each {self.corrupt_every}th frame"] if self.corrupt_every else []
        parts += [f"for {self.for_ms} ms"] if self.for_ms else []
        return " ".join(parts)


def parse_kinds(text: str) -> tuple[FaultKind, ...]:
    """The kinds in a list with commas. Raises ValueError naming the one that there is not."""
    kinds = tuple(map(FaultKind, _listed(text, tuple(FaultKind), "--faults", "fault")))
    if not kinds:
        raise ValueError(f"--faults: is {text!r}, must name some of {', '.join(FaultKind)}")
    return kinds


def parse_states(text: str) -> tuple[str, ...]:
    """The states in a list with commas; "all" and "" mean all and none. Raises ValueError as above."""
    return STATES if text == "all" else _listed(text, STATES, "--states", "state")


def parse_victims(text: str) -> tuple[Victim, ...]:
    """The victims in a list with commas; "" means all, as none are named. Raises ValueError as above."""
    return tuple(map(Victim, _listed(text, tuple(Victim), "--victims", "victim")))


def _listed(text: str, known: Sequence[str], option: str, what: str) -> tuple[str, ...]:
    """The names between commas, each once. Raises ValueError when one is not known."""
    names = tuple(dict.fromkeys(filter(None, (each.strip() for each in text.split(",")))))
    for name in names:
        if name not in known:
            raise ValueError(
                f"{option}: there is no {what} {name!r}; there are {', '.join(known)}{did_you_mean(name, known)}"
            )
    return names


def check_duration(duration_ms: int, every_ms: int) -> None:
    """Raises ValueError when the run is too short for a fault, and says how long is enough."""
    least_ms = SETTLE_MS + 2 * every_ms
    if duration_ms < least_ms:
        raise ValueError(
            f"--duration: is {duration_ms / 1000:g} s, too short for a fault; {least_ms / 1000:g} s are enough"
        )


def deck(
    ground: Ground,
    *,
    kinds: Sequence[FaultKind],
    states: Sequence[str] = (),
    victims: Sequence[Victim] = (),
    router_dies: bool | None = None,
) -> tuple[Suit, ...]:
    """All faults of these kinds that the ground allows. `router_dies` None: if its streams outlive it.

    `victims` none: all. Raises ValueError naming what the ground does not allow, or when nothing is left.
    """
    if FaultKind.REDIS_DOWN in kinds and not ground.has_store:
        raise ValueError("--faults: redis-down needs a cluster that keeps its state in Redis, this one has none")
    if router_dies and not ground.has_store:
        raise ValueError("--kill-router: needs a cluster with Redis, without it a router's streams end with it")
    refused = [kind for kind in kinds if kind in ARMED]
    if refused and not ground.faults_allowed:
        raise ValueError(
            f"--faults: {', '.join(refused)}: the cluster takes no faults; start it with `tandem serve --allow-faults`"
        )
    if states and not ground.faults_allowed:
        raise ValueError("--states: the cluster takes no faults; start it with `tandem serve --allow-faults`")
    if states and not {FaultKind.KILL, FaultKind.STOP} & set(kinds):
        raise ValueError("--states: only kill and stop strike in a state; name one of them in --faults")
    dies = ground.has_store if router_dies is None else router_dies
    hard = tuple(kind for kind in kinds if kind in WEIGHTS)
    cards: list[tuple[Target, ...]] = [(Target(kind, victim),) for kind in hard for victim in VICTIMS[kind]]
    cards = [each for each in cards if dies or each != (Target(FaultKind.KILL, Victim.ROUTER),)]
    for state in states:
        struck = STATE_VICTIMS[role_in(state)]
        cards.append(tuple(Target(kind, victim, state) for victim in struck for kind in hard))
    suits = [Suit(weight=sum(WEIGHTS[kind] for kind in hard), cards=tuple(cards))]
    for kind in (each for each in kinds if each not in WEIGHTS):
        suits.append(Suit(weight=WEIGHT, cards=tuple((Target(kind, victim),) for victim in VICTIMS[kind])))
    left = [_against(suit, victims) for suit in suits] if victims else suits
    if not any(suit.cards for suit in left):
        named = f"--victims {', '.join(victims)} and " if victims else ""
        raise ValueError(f"{named}--faults {', '.join(kinds)}: there is no such fault on this cluster")
    return tuple(suit for suit in left if suit.cards)


def _against(suit: Suit, victims: Sequence[Victim]) -> Suit:
    """What of it strikes these."""
    cards = (tuple(target for target in card if target.victim in victims) for card in suit.cards)
    return Suit(weight=suit.weight, cards=tuple(card for card in cards if card))


def plan(
    choose: Choose, *, suits: Sequence[Suit], duration_ms: int, every_ms: int, num_max: int | None = None
) -> tuple[Fault, ...]:
    """The faults of one run, a new one about `every_ms`, `num_max` at most.

    Raises ValueError when the run is too short for one.
    """
    check_duration(duration_ms, every_ms)
    dealer = _Dealer(choose, suits)
    faults: list[Fault] = []
    at_ms = every_ms // 2 + choose(every_ms)
    while at_ms <= duration_ms - SETTLE_MS and len(faults) != num_max:
        faults.append(_fault(choose, len(faults) + 1, at_ms, dealer.deal()))
        at_ms += every_ms // 2 + choose(every_ms)
    return tuple(faults)


class _Dealer:
    """Deals suits by their weights, a suit's cards evenly, and a card's ways in turn."""

    def __init__(self, choose: Choose, suits: Sequence[Suit]) -> None:
        self._choose = choose
        self._suits = suits
        self._round: list[int] = []  # indexes of suits that are left of it
        self._hands: list[list[tuple[Target, ...]]] = [[] for _ in suits]
        self._turns: dict[tuple[Target, ...], int] = {}

    def deal(self) -> Target:
        self._round = self._round or [number for number, suit in enumerate(self._suits) for _ in range(suit.weight)]
        number = self._round.pop(self._choose(len(self._round)))
        hand = self._hands[number]
        if not hand:
            hand += self._suits[number].cards
        card = hand.pop(self._choose(len(hand)))
        turn = self._turns[card] + 1 if card in self._turns else self._choose(len(card))
        self._turns[card] = turn
        return card[turn % len(card)]


def _fault(choose: Choose, number: int, at_ms: int, target: Target) -> Fault:
    def one_of(numbers: Sequence[int]) -> int:
        return numbers[choose(len(numbers))]

    for_ms = period_ms = corrupt_every = 0
    match target.kind:
        case FaultKind.STOP:
            for_ms = one_of(STOPS_MS)
            if target.victim is Victim.ROUTER:
                for_ms = min(for_ms, STOPS_MS[1])  # clients wait for it meanwhile
        case FaultKind.PARTITION:
            for_ms = one_of(PARTITIONS_MS)
        case FaultKind.DELAY:
            for_ms, period_ms = DELAY_FOR_MS, one_of(DELAYS_MS)
        case FaultKind.CORRUPT:
            for_ms, corrupt_every = CORRUPT_FOR_MS, one_of(CORRUPT_EVERY)
        case FaultKind.REDIS_DOWN:
            for_ms = one_of(STORE_DOWN_MS)
    return Fault(
        number=number,
        at_ms=at_ms,
        kind=target.kind,
        victim=target.victim,
        pick=choose(1 << 16),
        state=target.state,
        for_ms=for_ms,
        period_ms=period_ms,
        corrupt_every=corrupt_every,
        after_ms=one_of(AFTER_STATE_MS) if target.state else 0,
    )
