"""Drains over several routers: who is told what, who may begin, and what becomes of one whose router ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.drain_relay import DrainRelay, DrainWord, Tell
from tandem.messages import Role
from tandem.request import WorkerId

P0, D0, D1 = WorkerId("prefill-0"), WorkerId("decode-0"), WorkerId("decode-1")
ROLES = {P0: Role.PREFILL, D0: Role.DECODE, D1: Role.DECODE}
W = DrainWord


def relay(num: int = 3) -> DrainRelay:
    made = DrainRelay()
    for number in range(num):
        assert made.up(f"router-{number}") == []
    return made


def begun(made: DrainRelay, router: str = "router-0", worker: WorkerId = D0, *, restart: bool = False) -> list[Tell]:
    return made.begun(router, worker, 1, restart=restart, roles=ROLES)


def shown(told: list[Tell]) -> list[tuple[str, DrainWord, int]]:
    return [(each.router, each.word, each.requests) for each in told]


def test_alone_a_router_waits_for_nobody() -> None:
    assert shown(begun(relay(1))) == [("router-0", W.ELSEWHERE, 0)]


def test_the_others_help_and_their_requests_are_summed() -> None:
    made = relay()
    assert shown(begun(made)) == [
        ("router-0", W.ELSEWHERE, 2), ("router-1", W.DRAINING, 0), ("router-2", W.DRAINING, 0),
    ]  # fmt: skip
    assert shown(made.part("router-1", D0, 1, 5)) == [("router-0", W.ELSEWHERE, 6)], "one has not answered"
    assert shown(made.part("router-2", D0, 1, 0)) == [("router-0", W.ELSEWHERE, 5)]
    assert shown(made.part("router-1", D0, 1, 0)) == [("router-0", W.ELSEWHERE, 0)]
    assert made.part("router-1", D0, 2, 1) == made.part("router-9", D0, 1, 1) == made.part("router-1", D1, 1, 1) == []


def test_its_end_is_passed_on_once() -> None:
    for end in ("left", "taken_back"):
        made = relay()
        begun(made)
        assert made.taken_back("router-1", D0, 1, "not its drain") == []
        told = made.left("router-0", D0, 1) if end == "left" else made.taken_back("router-0", D0, 1, "late")
        word = W.LEFT if end == "left" else W.TAKEN_BACK
        assert shown(told) == [("router-1", word, 0), ("router-2", word, 0)]
        assert made.left("router-0", D0, 1) == []


def flipped(told: list[Tell]) -> list[tuple[str, DrainWord, int, Role | None]]:
    return [(each.router, each.word, each.incarnation, each.role) for each in told]


def test_a_flip_is_told_to_all_and_to_who_comes_later_while_that_incarnation_lives() -> None:
    made = relay(2)
    begun(made)
    assert made.flip("router-1", D0, 1, Role.PREFILL) == [], "not its drain"
    word = W.FLIPPED, 1, Role.PREFILL
    assert flipped(made.flip("router-0", D0, 1, Role.PREFILL)) == [("router-0", *word), ("router-1", *word)]
    assert made.flip("router-0", D0, 1, Role.PREFILL) == [], "once"
    made.down("router-1")
    assert flipped(made.up("router-1")) == [("router-1", *word)]
    made.ended(D0, 1)
    assert made.up("router-2") == [], "the next one registers with its role"


def test_a_flip_of_one_that_has_ended_comes_to_nothing() -> None:
    made = relay(1)
    begun(made)
    made.ended(D0, 1)
    assert made.flip("router-0", D0, 1, Role.PREFILL) == []


def test_two_routers_do_not_flip_the_last_two() -> None:
    made = relay(2)
    for worker, router in ((D0, "router-0"), (D1, "router-1")):
        told = made.begun(router, worker, 1, restart=False, becomes=Role.PREFILL, roles=ROLES)
    assert shown(told)[0] == ("router-1", W.GIVE_UP, 0)
    made = relay(2)
    for worker, router in ((D0, "router-0"), (D1, "router-1")):
        told = made.begun(router, worker, 1, restart=False, becomes=Role.MIXED, roles=ROLES)
    assert W.GIVE_UP not in [each.word for each in told]


def test_only_one_router_drains_a_worker() -> None:
    made = relay(2)
    begun(made)
    told = begun(made, "router-1")
    assert shown(told) == [("router-1", W.GIVE_UP, 0), ("router-1", W.DRAINING, 0)], "it helps instead"
    assert told[0].reason == "decode-0 is draining already, watched by router-0"
    assert made.taken_back("router-1", D0, 1, told[0].reason) == [], "that ends nothing"
    assert shown(made.left("router-0", D0, 1)) == [("router-1", W.LEFT, 0)]


def test_two_routers_do_not_drain_the_last_two() -> None:
    made = relay(2)
    begun(made, "router-0", D0)
    [refused] = begun(made, "router-1", D1)
    assert (refused.router, refused.word) == ("router-1", W.GIVE_UP)
    assert refused.reason.startswith("decode-1 is the last ready worker that writes tokens")
    assert begun(made, "router-1", D1, restart=True)[0].word is W.ELSEWHERE
    made.ended(D0, 1)
    assert [each.word for each in begun(relay(2), "router-1", P0)] == [W.GIVE_UP]


def test_a_router_that_comes_helps_and_one_that_goes_is_not_waited_for() -> None:
    made = relay(2)
    begun(made)
    made.part("router-1", D0, 1, 0)
    assert shown(made.up("router-2")) == [("router-0", W.ELSEWHERE, 1), ("router-2", W.DRAINING, 0)]
    assert shown(made.down("router-2")) == [("router-0", W.ELSEWHERE, 0)]
    assert made.down("router-1") == []


def test_a_drain_ends_with_its_router() -> None:
    made = relay()
    begun(made)
    told = made.down("router-0")
    assert shown(told) == [("router-1", W.TAKEN_BACK, 0), ("router-2", W.TAKEN_BACK, 0)]
    assert told[0].reason == "router-0, which drained it, has ended"
    assert made.up("router-0") == []
    assert begun(made, "router-1")[0].word is W.ELSEWHERE


ROUTERS = [f"router-{number}" for number in range(3)]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["up", "down", "begun", "part", "left", "taken_back", "ended"]),
        st.sampled_from(ROUTERS),
        st.sampled_from([D0, D1]),
        st.integers(0, 2),
    ),
    max_size=40,
)


@given(STEPS)
def test_nobody_is_left_behind(steps: list[tuple[str, str, WorkerId, int]]) -> None:
    """Each router that helps hears of the end, unless the worker's own end tells it; nobody who is down is told."""
    made, up, helping = relay(0), set[str](), dict[tuple[str, WorkerId], bool]()
    for what, router, worker, num in steps:
        told: list[Tell] = []
        if what == "up" and router not in up:
            up.add(router)
            told = made.up(router)
        elif what == "down" and router in up:
            up.discard(router)
            helping = {key: helps for key, helps in helping.items() if key[0] != router}
            told = made.down(router)
        elif router in up and what == "begun":
            told = begun(made, router, worker, restart=bool(num))
        elif router in up and what == "part":
            told = made.part(router, worker, 1, num)
        elif router in up and what == "left":
            told = made.left(router, worker, 1)
        elif router in up and what == "taken_back":
            told = made.taken_back(router, worker, 1, "why")
        elif what == "ended":
            made.ended(worker, 1)
            helping = {key: helps for key, helps in helping.items() if key[1] != worker}
        for each in told:
            assert each.router in up
            if each.word is W.DRAINING:
                helping[each.router, each.worker_id] = True
            elif each.word in (W.TAKEN_BACK, W.LEFT):
                assert helping.pop((each.router, each.worker_id)), "it was not told of the beginning"
    watched = {(router, worker) for worker, drain in made._drains.items() for router in drain.parts}
    assert set(helping) >= watched - {(each.watcher, worker) for worker, each in made._drains.items()}
    assert {key[1] for key in helping} <= set(made._drains)
