"""What a request is: its identity, its sampling parameters, its tokens and how it ends."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
TransferId = NewType("TransferId", str)
Incarnation = tuple[WorkerId, int]  # one life of a worker
Pair = tuple[Incarnation, Incarnation]  # who prefills and who decodes; twice the same: it does both


PRIORITY_MAX = 3
CANARY_PREFIX = "canary#"  # no client's id has a #


def weight_of(priority: int) -> int:
    """How much the waiting of a request of this priority counts, beside that of one of priority 0."""
    return 1 << 2 * priority


def is_canary(request_id: RequestId) -> bool:
    """Whether the request is the cluster's own, to see whether workers serve: nobody learns from how long it took."""
    return request_id.startswith(CANARY_PREFIX)


class SloClass(StrEnum):
    """What becomes of a request that would miss its targets."""

    INTERACTIVE = "interactive"  # it is refused at once
    SHEDDABLE = "sheddable"  # it is refused the more probably the later it would be
    BATCH = "batch"  # it waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a client wants of one request. 0: no target."""

    slo_class: SloClass = SloClass.INTERACTIVE
    ttft_ms: int = 0  # until the first token
    tpot_ms: int = 0  # between two tokens, on average


class FinishReason(StrEnum):
    """Why a request ended well."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context is used up


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Values are validated at the edge; behind it they are trusted."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # noise is a function of (seed, position, token id) alone
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # number of alternatives; None: none asked, 0: only the chosen token's
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a request's answer. `index` counts answer tokens from 0 over all workers that wrote them."""

    request_id: RequestId
    epoch: int
    index: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None
