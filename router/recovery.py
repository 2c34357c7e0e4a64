"""What becomes of a request whose attempt is lost: who may hold its KV already, how long to wait, when to give up.

Of what was computed nothing is thrown away that a worker still holds: a target that has all of it commits though its
source is gone; full blocks that landed become prefix cache there; the source of a committed handoff kept its own.
"""

from __future__ import annotations

from router.config import RouterConfig
from router.fleet import Worker
from router.request import Request, RequestState
from tandem.messages import AssignMode


def heir(request: Request) -> Worker | None:
    """The target that may hold all of a request that has just lost a worker, so that its commit may be on the way.

    Of a handoff that is so once the first token is there: the source says that it has sent everything, and what the
    token is, in one breath. To be asked when the lost worker is no longer among those involved.
    """
    if request.move is not None:
        return request.move.target if request.move.target in request.involved else None
    if request.state is not RequestState.HANDING_OFF or request.placement is None:
        return None
    target = request.placement.decode_worker
    return next((each for each in request.involved if each.key == (target.worker_id, target.incarnation)), None)


def leaves_blocks(request: Request) -> bool:
    """Whether a target of the attempt that ends is alive, and may make prefix cache of what has landed there."""
    placement = request.placement
    if placement is None or placement.mode is AssignMode.LOCAL or request.owner is None or request.owner.committed:
        return False
    target = placement.decode_worker.worker_id, placement.decode_worker.incarnation
    return any(each.key == target for each in request.involved)


def overdue(config: RouterConfig, request: Request, now_ms: int) -> tuple[str, Worker]:
    """What did not come in time, and from whom."""
    after_ms = now_ms - request.placed_ms
    what = {
        RequestState.PREFILLING: f"no first token {after_ms} ms after the placement",
        RequestState.HANDING_OFF: f"no commit {after_ms} ms after the placement",
        RequestState.DECODING: f"no token for {config.decode_stall_ms} ms",
    }[request.state]
    suspect = request.involved[-1 if request.state is RequestState.HANDING_OFF else 0]
    return f"{what} ({suspect.worker_id})", suspect


def exhausted(config: RouterConfig, request: Request) -> str:
    """Counts one attempt more that was lost; why there shall be no other, or empty."""
    if request.new.canary is not None:
        return "a canary is placed once"
    if request.num_in_vain >= config.replacements_max:
        return f"placed {request.num_in_vain + 1} times in vain"
    if request.num_replacements >= config.replacements_all_max:
        return f"placed {request.num_replacements + 1} times"
    request.num_in_vain += 1
    request.num_replacements += 1
    return ""


def pause_ms(config: RouterConfig, request: Request, *, salvages: bool) -> int:
    """How long the request waits until it is placed again: not at all the first time, then doubling."""
    backoff_ms = config.replace_backoff_ms * ((1 << (request.num_in_vain - 1)) - 1)
    return max(backoff_ms, config.salvage_ms if salvages else 0)
