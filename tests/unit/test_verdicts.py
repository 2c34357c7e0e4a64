"""Who is ended on whose word: majorities, minorities that wait, routers that are cut off, and those that are silent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.silence import Silence
from cluster.standing import Standing
from cluster.verdicts import Action, KillWorker, RestartRouter, Verdicts
from tandem.request import WorkerId

P0, D0, D1 = WorkerId("prefill-0"), WorkerId("decode-0"), WorkerId("decode-1")
RUNNING = {P0: 1, D0: 2, D1: 1}
NAMES = ("router-0", "router-1", "router-2")


def verdicts(num: int) -> Verdicts:
    made = Verdicts(minority_ms=1000)
    for name in NAMES[:num]:
        made.up(name)
    return made


def say(judge: Verdicts, now_ms: int, router: str, worker: WorkerId = D0) -> list[Action]:
    judge.dead(now_ms, router, worker, RUNNING[worker], "silence")
    return judge.judge(now_ms, RUNNING)


def test_the_only_router_decides() -> None:
    assert say(verdicts(1), 0, "router-0") == [KillWorker(worker_id=D0, incarnation=2, reason="silence")]


def test_half_is_no_majority() -> None:
    judge = verdicts(2)
    assert say(judge, 0, "router-0") == []
    assert say(judge, 1, "router-0") == []
    assert say(judge, 2, "router-1") == [KillWorker(worker_id=D0, incarnation=2, reason="silence")]
    assert say(judge, 3, "router-1") == [], "once"
    assert judge.judge(1001, RUNNING) == []
    assert len(judge.judge(1002, RUNNING)) == 1, "it had no effect: again"


def test_two_of_three_are() -> None:
    judge = verdicts(3)
    assert say(judge, 0, "router-2") == []
    assert len(say(judge, 5, "router-0")) == 1


def test_a_router_that_is_down_has_no_vote_and_its_word_is_forgotten() -> None:
    judge = verdicts(3)
    say(judge, 0, "router-2")
    judge.down("router-2")
    assert say(judge, 1, "router-0") == []
    judge.down("router-1")
    assert [type(each) for each in judge.judge(2, RUNNING)] == [KillWorker], "it is the only one now"
    again = verdicts(2)
    say(again, 0, "router-1")
    again.down("router-1")
    again.up("router-1")
    assert say(again, 1, "router-0") == []


def test_a_minority_is_heard_in_the_end() -> None:
    judge = verdicts(3)
    assert say(judge, 0, "router-1") == []
    assert judge.judge(999, RUNNING) == []
    [kill] = judge.judge(1000, RUNNING)
    assert isinstance(kill, KillWorker)
    assert kill.reason == "silence (said router-1 for 1 s, and no other router)"


def test_a_router_that_has_lost_most_workers_is_the_one_that_is_lost() -> None:
    judge = verdicts(2)
    say(judge, 0, "router-1", D0)
    say(judge, 900, "router-1", P0)
    assert judge.judge(999, RUNNING) == []
    [restart] = judge.judge(1000, RUNNING)
    assert isinstance(restart, RestartRouter)
    assert restart.router == "router-1"
    assert judge.judge(5000, RUNNING) == []
    judge.down("router-1")
    judge.up("router-1")
    assert judge.judge(5001, RUNNING) == []


def test_what_is_over_is_nobodys_verdict() -> None:
    judge = verdicts(1)
    judge.dead(0, "router-0", D0, 1, "silence")
    judge.dead(0, "router-0", WorkerId("nobody"), 1, "silence")
    assert judge.judge(0, RUNNING) == []
    judge.dead(1, "router-0", D0, 3, "silence")
    assert judge.judge(2, RUNNING) == [], "it does not run yet"
    assert len(judge.judge(3, {**RUNNING, D0: 3})) == 1
    assert judge.judge(4, {**RUNNING, D0: 4}) == []


CLAIMS = st.lists(st.tuples(st.integers(0, 400), st.sampled_from(NAMES), st.sampled_from([P0, D0, D1])), max_size=30)


@given(st.integers(2, 3), CLAIMS)
def test_one_router_of_several_never_takes_the_pool(num: int, claims: list[tuple[int, str, WorkerId]]) -> None:
    """Whatever router-0 alone says, and when: at most one worker goes before it is taken to be cut off itself."""
    judge, now_ms, killed = verdicts(num), 0, set()
    for passed_ms, _, worker in [*claims, *((500, "", D0) for _ in range(20))]:
        now_ms += passed_ms
        judge.dead(now_ms, "router-0", worker, RUNNING[worker], "silence")
        for action in judge.judge(now_ms, {each: num for each, num in RUNNING.items() if each not in killed}):
            if isinstance(action, RestartRouter):
                return
            killed.add(action.worker_id)
            assert len(killed) <= 1, "its own process is the next"


@given(CLAIMS)
def test_nobody_goes_whom_no_router_holds_for_dead(claims: list[tuple[int, str, WorkerId]]) -> None:
    judge, now_ms, named = verdicts(3), 0, set()
    for passed_ms, router, worker in claims:
        now_ms += passed_ms
        named.add(worker)
        for action in say(judge, now_ms, router, worker):
            assert not isinstance(action, KillWorker) or action.worker_id in named


# ---- silence ---------------------------------------------------------------------------------------------------------


def listening() -> Silence:
    silence = Silence(look_ms=1000)
    silence.expect(0, "router-0", 5000)
    return silence


def test_who_says_nothing_is_named_once() -> None:
    silence = listening()
    seen = [(now_ms, silence.look(now_ms)) for now_ms in range(0, 12_000, 1000)]
    assert [each for each in seen if each[1]] == [(6000, [("router-0", 6000)])]


def test_who_says_something_is_not() -> None:
    silence = listening()
    for now_ms in range(0, 60_000, 1000):
        assert silence.look(now_ms) == []
        if now_ms % 4000 == 0:
            silence.heard(now_ms, "router-0")
    silence.forget("router-0")
    silence.heard(60_000, "router-0")
    assert silence.look(61_000) == silence.look(62_000) == []


def test_time_in_which_the_listener_was_away_does_not_count() -> None:
    silence = listening()
    silence.look(1000)
    assert silence.look(60_000) == [], "what was said meanwhile is still to be read"
    assert [now_ms for now_ms in range(61_000, 70_000, 1000) if silence.look(now_ms)] == [63_000]


# ---- a worker before its registries ----------------------------------------------------------------------------------


def standing(*names: str) -> Standing:
    return Standing(registries=names, began_ms=0, gone_ms=60_000, recent_ms=15_000)


def test_the_only_registry_decides_at_once() -> None:
    alone = standing("router-0")
    alone.accepted(5, "router-0")
    assert alone.over(6) == ""
    alone.refused(10, "router-0", "it is over")
    assert alone.over(10) == "router-0 refused: it is over"


def test_one_that_wants_the_worker_is_enough() -> None:
    two = standing("router-0", "router-1")
    two.accepted(0, "router-0")
    for now_ms in range(0, 200_000, 1000):
        two.refused(now_ms, "router-1", "it is over")
        two.accepted(now_ms, "router-0")
        assert two.over(now_ms) == ""
    two.refused(200_000, "router-0", "here, too")
    assert two.over(200_000) == "router-0 refused: here, too; router-1 refused: it is over"


def test_one_that_is_away_may_still_want_it() -> None:
    two = standing("router-0", "router-1")
    two.accepted(0, "router-0")
    two.refused(1000, "router-1", "it is over")
    assert two.over(15_000) == ""
    two.refused(15_001, "router-1", "it is over")
    assert two.over(15_001) == "router-1 refused: it is over"


def test_refusals_of_long_ago_end_nobody_whom_another_one_wanted_since() -> None:
    """None of them answers just now: that is a wait for a word, as with one registry, and not a refusal of all."""
    two = standing("router-0", "router-1")
    two.refused(0, "router-1", "it is over")
    two.accepted(1000, "router-0")
    assert two.over(16_001) == ""
    assert two.over(61_001) == "no registry for 60 s"


def test_time_in_which_the_worker_stood_still_is_nobodys_silence() -> None:
    """A machine that was paused for minutes wakes up with all of its workers: none may think itself forgotten."""
    two = Standing(registries=("router-0", "router-1"), began_ms=0, gone_ms=60_000, look_ms=7_000)
    two.refused(500, "router-1", "it is over")
    two.accepted(1000, "router-0")
    assert two.over(600_000) == ""
    two.accepted(600_001, "router-0")
    for now_ms in range(605_000, 660_001, 5_000):
        assert two.over(now_ms) == ""
    assert two.over(660_002) == "no registry for 60 s"


def test_without_a_word_it_is_over() -> None:
    two = standing("router-0", "router-1")
    two.accepted(30_000, "router-1")
    assert two.over(90_000) == ""
    assert two.over(90_001) == "no registry for 60 s"


def test_one_that_asks_it_to_leave_is_obeyed() -> None:
    two = standing("router-0", "router-1")
    two.accepted(1, "router-0")
    two.leave("router-1")
    assert two.over(2) == "router-1 asked the worker to leave"
