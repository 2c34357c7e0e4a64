"""Whether one more request is taken in, or told when to come again."""

from __future__ import annotations

from router.config import RouterConfig
from tandem.errors import Overloaded

RETRY_MIN_MS = 500
RETRY_MAX_MS = 60_000


def refusal(
    config: RouterConfig, *, num_requests: int, queued_tokens: int, new_tokens: int, predicted_wait_ms: float
) -> Overloaded | None:
    """Why a request of `new_tokens` prompt tokens is not taken now, or None when it is.

    Both bounds are on what is in flight: requests, and prompt tokens without a first token yet. `predicted_wait_ms` is
    the shortest queue of any worker: when it is over there is room again.
    """
    if num_requests >= config.requests_max:
        reason = f"{num_requests} requests are in flight, the limit is {config.requests_max}"
    elif queued_tokens and queued_tokens + new_tokens > config.queued_tokens_max:
        reason = (
            f"{queued_tokens} prompt tokens are queued and {new_tokens} would be added, "
            f"the limit is {config.queued_tokens_max}"
        )
    else:
        return None
    return Overloaded(reason, retry_after_ms=round(min(RETRY_MAX_MS, max(RETRY_MIN_MS, predicted_wait_ms))))
