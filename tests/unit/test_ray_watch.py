"""What is decided about the parts of a local Ray: who is started again, who is ended, and when this Ray is lost."""

from __future__ import annotations

from cluster.ray_watch import SILENT_MAX_MS, KillPart, Lost, Part, PartSeen, RayWatch, StartGcs, WatchAction
from cluster.restarts import Restarts


class Rig:
    """A watch that is asked every 500 ms, over parts that a test sets."""

    def __init__(self, *, restarts_max: int = 3) -> None:
        self.watch = RayWatch(gcs_restarts=Restarts(restarts_max=restarts_max))
        self.now_ms = 1_000_000
        self.dead: set[Part] = set()
        self.mute: dict[Part, int] = {}  # since when
        self.parts = set(Part)

    def look(self, *, after_ms: int = 500) -> list[WatchAction]:
        self.now_ms += after_ms
        heard = {part: self.mute.get(part, self.now_ms) for part in self.parts}
        return self.watch.look(
            self.now_ms, {part: PartSeen(lives=part not in self.dead, heard_ms=heard[part]) for part in self.parts}
        )

    def silence(self, part: Part) -> None:
        self.mute[part] = self.now_ms

    def looks(self, for_ms: int) -> list[WatchAction]:
        """All that is said in so long a time."""
        return [action for _ in range(for_ms // 500) for action in self.look()]


def test_nothing_follows_while_all_live_and_answer() -> None:
    assert Rig().looks(60_000) == []


def test_a_dead_gcs_is_started_at_once_and_then_with_back_off() -> None:
    rig = Rig()
    rig.dead = {Part.GCS}
    assert rig.look() == [StartGcs()]
    rig.dead = set()
    assert rig.look() == []
    rig.dead = {Part.GCS}
    assert [rig.look(), rig.look(after_ms=400), rig.look(after_ms=100)] == [[], [], [StartGcs()]]


def test_a_gcs_that_dies_at_every_start_ends_this_ray() -> None:
    rig = Rig(restarts_max=3)
    rig.dead = {Part.GCS}
    told = rig.looks(10_000)
    assert told[:3] == [StartGcs()] * 3
    assert isinstance(told[3], Lost)


def test_a_ray_without_its_raylet_is_lost_whatever_else_died() -> None:
    for dead in ({Part.RAYLET}, {Part.RAYLET, Part.GCS}):
        rig = Rig()
        rig.dead = dead
        assert rig.look() == [Lost(reason="its raylet ended")]


def test_a_part_that_answers_nobody_is_ended_but_not_before_its_time() -> None:
    for part in Part:
        rig = Rig()
        rig.silence(part)
        assert rig.looks(SILENT_MAX_MS[part]) == []
        [action] = rig.look()
        assert isinstance(action, KillPart)
        assert action.part is part
        assert "has not answered for" in action.reason


def test_time_in_which_nobody_looked_counts_against_nobody() -> None:
    rig = Rig()
    rig.look()
    rig.silence(Part.GCS)
    assert rig.look(after_ms=120_000) == [], "we were stopped, not the service"
    assert rig.looks(SILENT_MAX_MS[Part.GCS]) == []
    assert isinstance(rig.look()[0], KillPart)


def test_of_a_ray_of_somebody_else_only_the_raylet_is_seen() -> None:
    rig = Rig()
    rig.parts = {Part.RAYLET}
    assert rig.look() == []
    rig.dead = {Part.RAYLET}
    assert isinstance(rig.look()[0], Lost)
    rig.parts = set()
    assert rig.look() == []
