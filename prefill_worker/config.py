"""Settings of the prefill side of a worker: order of prompts, when to offer them, how many may wait."""

from __future__ import annotations

from dataclasses import dataclass, field

from kv_transfer.handoff import HandoffConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """Guarded-slack shortest remaining work. Times are milliseconds."""

    ttft_slo_ms: int = 5_000  # a prompt is due this long after it came
    guard_ms: int = 1_000  # with less slack than this the earliest due goes first
    guard_share: float = 0.1  # of the SLO; the larger guard counts
    margin_share: float = 0.25  # how much longer than predicted a prefill may take (90th percentile)
    switch_share: float = 0.1  # another prompt takes over when it is better by this share of what is left
    aging_share: float = 0.05  # what is late gains so much per millisecond of waiting
    starve_ms: int = 30_000  # after this a prompt goes before all that are on time
    suspend_ms: int = 1_250  # a started prompt stands still for so long at most
    suspensions_max: int = 4  # and so often
    token_ms: float = 2.0  # first guess of the time for one token; measured from then on
    pair_ms: float = 0.0  # and for one pair of tokens in attention

    def __post_init__(self) -> None:
        for name in ("ttft_slo_ms", "starve_ms", "suspend_ms", "token_ms"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be positive")
        for name in ("guard_ms", "guard_share", "margin_share", "switch_share", "aging_share", "pair_ms"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """The prefill side of one worker."""

    queue: QueueConfig = field(default_factory=QueueConfig)
    handoff: HandoffConfig = field(default_factory=HandoffConfig)
    max_queued: int = 1024  # prompts here at once, waiting or running
    offer_ahead_tokens: int = 1024  # a prompt is offered when no more tokens than this are to be run before it
    exact: bool = True  # handoffs only between workers of equal numerics fingerprint

    def __post_init__(self) -> None:
        if self.max_queued < 1:
            raise ValueError(f"max_queued is {self.max_queued}, must be at least 1")
        if self.offer_ahead_tokens < 0:
            raise ValueError(f"offer_ahead_tokens is {self.offer_ahead_tokens}, must not be negative")
