"""Settings of the decode side of a worker: whom to admit, and how long to let a source wait."""

from __future__ import annotations

from dataclasses import dataclass, field

from kv_transfer.handoff import HandoffConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """Past-future admission. `alpha` is the share of draws that may overflow."""

    max_requests: int = 64  # running and reserved
    watermark_share: float = 0.02  # of the pool, kept free while anything else runs
    num_draws: int = 20
    alpha: float = 0.05
    history_max: int = 500  # lengths of finished answers that are remembered
    unknown_output_tokens: int = 256  # expected while nothing has finished yet
    retry_after_ms: int = 50  # a source that waits asks again no sooner,
    retry_every_ms: int = 4  # all that wait no more often than this together,
    retry_max_ms: int = 1_000  # and each as often, however many wait: sources say an offer again after this
    wait_limit_ms: int = 8_000  # after this a source that waits is refused, so that the router may choose another

    def __post_init__(self) -> None:
        at_least_one = ("max_requests", "num_draws", "history_max", "unknown_output_tokens")
        for name in (*at_least_one, "retry_after_ms", "retry_every_ms", "retry_max_ms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("watermark_share", "alpha"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0 and less than 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """The decode side of one worker."""

    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    handoff: HandoffConfig = field(default_factory=HandoffConfig)
    max_requests: int = 1024  # requests here at once, waiting or running
    early_offers_max: int = 256  # offers that came before their assignment
    early_offer_ms: int = 10_000  # how long such an offer is kept
    exact: bool = True  # requests that leave here go only where the same bits are computed
    ended_max: int = 4096  # ended transfers that are remembered, to answer late messages

    def __post_init__(self) -> None:
        for name in ("max_requests", "early_offers_max", "early_offer_ms", "ended_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
