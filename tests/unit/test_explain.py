"""What `tandem explain` tells: placements with their candidates, the stages of TTFT, moves and the story."""

from __future__ import annotations

import io
import json

from rich.console import Console
from router_rig import Rig, request

from cli.explain import show
from cluster.admin import request_status
from cluster.documents import record_document
from cluster.flight_record import flight_record
from router.events import Submitted
from router.flight import Flight
from router.stages import FirstToken, Stage
from tandem.messages import Role
from tandem.v1 import admin_pb2 as pb


def record() -> pb.FlightRecord:
    """Of a request that two prefill and two decode workers were considered for, and that was moved."""
    rig = Rig()
    for name, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)):
        rig.up(name, role)
    rig.feed(Submitted(request=request("r")))
    [snapshot] = rig.core.status(rig.now_ms).requests
    first = FirstToken(ttft_ms=90.0, stages=((Stage.QUEUE, 30.0), (Stage.PREFILL, 57.0), (Stage.OTHER, 3.0)))
    move = pb.MoveStatus(
        request="r", to="d1", reason="balance", why="loads 9 and 2", outcome="moved", rounds=2, blocks=7,
        bytes=7_000_000, precopy_ms=40, pause_ms=12,
    )  # fmt: skip
    setattr(move, "from", "d0")
    flight = Flight(request=snapshot, moves=(), first=first, now_ms=0, arrived_ms_ago=0.0)
    return flight_record(flight, request_status(snapshot, "router-0"), [move])


def test_json_has_what_was_decided_and_why() -> None:
    document = json.loads(json.dumps(record_document(record())))
    assert (document["request"], document["state"], document["router"]) == ("r", "prefilling", "router-0")
    assert document["ttft_ms"] == 90
    assert document["stages"] == [
        {"name": "queue", "ms": 30}, {"name": "prefill", "ms": 57}, {"name": "other", "ms": 3}
    ]  # fmt: skip
    [placement] = document["placements"]
    assert placement["reason"].startswith("prefill: wait 0 ms")
    chosen = {each["part"]: each["worker"] for each in placement["candidates"] if each["chosen"]}
    assert chosen == {"prefill": placement["prefill_worker"], "decode": placement["decode_worker"]}
    considered = {(each["part"], each["worker"]) for each in placement["candidates"]}
    assert considered == {("prefill", "p0"), ("prefill", "p1"), ("decode", "d0"), ("decode", "d1")}
    for each in placement["candidates"]:
        parts = ("queue_ms", "prefill_ms") if each["part"] == "prefill" else ("batch_ms", "copy_ms")
        assert sum(each["terms"][part] for part in parts) == each["score_ms"]
    [move] = document["moves"]
    assert {name: move[name] for name in ("from", "to", "reason", "rounds", "bytes", "pause_ms", "outcome")} == {
        "from": "d0", "to": "d1", "reason": "balance", "rounds": 2, "bytes": 7_000_000, "pause_ms": 12,
        "outcome": "moved",
    }  # fmt: skip
    assert document["story"][0]["what"] == "admitted"


def test_people_see_the_same() -> None:
    out = io.StringIO()
    show(record(), Console(file=out, width=160))
    told = out.getvalue()
    assert "r is prefilling at router-0" in told
    assert "TTFT 90.0 ms" in told
    assert "prefill  57.0 ms  #########################" in told
    assert "placed after 0 ms on p0 -> d0: prefill: wait 0 ms" in told
    assert told.count("*") == 2, "the two that were chosen"
    assert "r moved from d0 to d1: 7 blocks in 2 rounds, 7.0 MB in 40 ms, pause 12 ms; balance: loads 9 and 2" in told


def test_what_is_not_known_is_not_shown() -> None:
    bare = pb.FlightRecord(request=pb.RequestStatus(id="r", state="failed", error="the worker is gone"))
    assert record_document(bare)["ttft_ms"] is None
    out = io.StringIO()
    show(bare, Console(file=out))
    assert "TTFT" not in out.getvalue()
    assert "the worker is gone" in out.getvalue()
