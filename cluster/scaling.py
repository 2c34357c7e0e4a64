"""Which workers come and which go so that the pools have the sizes that an operator wants."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cluster.draining import last_of_its_kind, parse_role
from cluster.membership import OVER, Membership, MemberState
from tandem.errors import InvalidRequest, ScaleRefused
from tandem.messages import Role
from tandem.request import WorkerId

POOL_MAX = 64


@dataclass(frozen=True, slots=True)
class Grow:
    """The role shall have so many workers, which is more than there are; `now` those that there are."""

    role: Role
    num: int
    now: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True)
class Shrink:
    """These are drained: they have the fewest requests, and of as many the highest numbers."""

    role: Role
    workers: tuple[WorkerId, ...]


def parse_sizes(wanted: Mapping[str, int]) -> dict[Role, int]:
    """The sizes by role. Raises InvalidRequest naming what is wrong."""
    if not wanted:
        raise InvalidRequest("pools", "is empty; say which pools, such as decode=4")
    sizes = {}
    for name, num in wanted.items():
        role = parse_role(name, "pools")
        if not 0 <= num <= POOL_MAX:
            raise InvalidRequest(f"pools.{name}", f"is {num}, must be 0 to {POOL_MAX}")
        sizes[role] = num
    return sizes


def plan(
    membership: Membership,
    sizes: Mapping[Role, int],
    *,
    num_requests: Callable[[WorkerId], int],
    draining: Collection[WorkerId],
) -> list[Grow | Shrink]:
    """What is to be done; empty: the pools have these sizes. Raises ScaleRefused saying why it may not.

    `draining`: workers whose drain is not over. While one of a role is, nobody can tell how many there will be.
    """
    members = [each for each in membership.members.values() if each.state not in OVER]
    steps: list[Grow | Shrink] = []
    gone: set[WorkerId] = set()
    for role, num in sizes.items():
        present = [each for each in members if each.info.role is role]
        names = [each.info.worker_id for each in present]
        busy = sorted({each.info.worker_id for each in present if each.state is MemberState.DRAINING} | set(draining))
        busy = [each for each in busy if each in names]
        if num == len(present) and not busy:
            continue
        if busy:
            raise ScaleRefused(f"{', '.join(busy)} is draining; scale {role} when that is over")
        if num > len(present):
            steps.append(Grow(role, num, tuple(names)))
            continue
        ready = [each.info.worker_id for each in present if each.state is MemberState.READY]
        num_gone = len(present) - num
        if num_gone > len(ready):
            of_these = f"{num_gone} of {len(present)} {role} workers"
            raise ScaleRefused(f"{of_these} would have to go, and {len(ready)} are ready")
        order = sorted(ready, key=lambda each: (num_requests(each), -_number(each)))
        steps.append(Shrink(role, tuple(order[:num_gone])))
        gone |= set(order[:num_gone])
    _check_kinds(membership, steps, gone)
    return steps


def _check_kinds(membership: Membership, steps: list[Grow | Shrink], gone: set[WorkerId]) -> None:
    """The last worker that reads prompts, or that writes tokens, stays; one that is only to come does not count."""
    ready = [each.info for each in membership.members.values() if each.state is MemberState.READY]
    left = {each.role for each in ready if each.worker_id not in gone}
    for step in steps:
        if isinstance(step, Shrink):
            refusal = last_of_its_kind(step.workers[-1], step.role, left)
            if refusal:
                raise ScaleRefused(refusal.partition(";")[0])


def _number(worker_id: WorkerId) -> int:
    number = worker_id.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
