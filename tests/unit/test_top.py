"""`tandem top` without a terminal: rows of one status, rates of two, what changes, and what fits."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from cli.keyboard import Key, keys_in
from cli.top_screen import Shown, TopScreen, pressed, shares, whole
from cluster.top import Sort, Top, View, percentile, sort_requests
from tandem.v1 import admin_pb2 as pb


def worker(name: str, role: str, **fields: Any) -> pb.WorkerStatus:
    blocks = pb.BlockCountsStatus(total=100, free=60, cached=10, owned=25, exported=5)
    known: dict[str, Any] = {"state": "ready", "incarnation": 1, "kv_blocks": blocks}
    return pb.WorkerStatus(id=name, role=role, **known | fields)


def request(name: str, **fields: Any) -> pb.RequestStatus:
    known: dict[str, Any] = {"state": "decoding", "prefill_worker": "prefill-0", "decode_worker": "decode-0"}
    return pb.RequestStatus(id=name, router="router-0", **known | fields)


def router(name: str = "router-0", pid: int = 10, tokens: int = 0, **minute: Any) -> pb.RouterStatus:
    return pb.RouterStatus(id=name, pid=pid, up=True, tokens_total=tokens, last_minute=pb.LastMinute(**minute))


def moved(name: str, at_s: float, source: str, to: str, **fields: Any) -> pb.MoveStatus:
    known: dict[str, Any] = {"outcome": "moved", "reason": "balance"}
    move = pb.MoveStatus(request=name, to=to, at_ms=round(at_s * 1000), **known | fields)
    setattr(move, "from", source)
    return move


def status(**fields: Any) -> pb.StatusResponse:
    base: dict[str, Any] = {
        "model": "fake",
        "http_address": "http://127.0.0.1:8000",
        "grpc_address": "127.0.0.1:50051",
        "workers": [
            worker("decode-10", "decode"),
            worker("decode-2", "decode", running=3, steps=50, last_step_ms=12.5, tokens_written=100),
            worker("prefill-0", "prefill", tokens_read=1000, steps=9, last_step_ms=80.0),
        ],
        "requests": [request("a-long-name-of-a-request", tokens=40, age_ms=5000, ttft_ms=90, num_moves=1)],
        "routers": [router(tokens=500, ttft_ms=[10, 20, 30, 40], tpot_ms=[5.0], refused=2, moved=1, recovered=3)],
        "moves": [moved("a-long-name-of-a-request", 990.0, "decode-10", "decode-0", pause_ms=12, why="freer")],
    }
    return pb.StatusResponse(**base | fields)


def later() -> pb.StatusResponse:
    """Two seconds on: 100 tokens to clients, 60 of them of decode-2, 300 prompt tokens read."""
    return status(
        workers=[
            worker("decode-10", "decode"),
            worker("decode-2", "decode", running=3, steps=60, last_step_ms=13.0, tokens_written=160),
            worker("prefill-0", "prefill", tokens_read=1300, steps=9, last_step_ms=80.0),
        ],
        requests=[request("a-long-name-of-a-request", tokens=70, age_ms=7000, ttft_ms=90, num_moves=1)],
        routers=[router(tokens=600)],
    )


def test_rates_come_of_two_looks() -> None:
    top = Top()
    first = top.look(10.0, 1000.0, status())
    assert [row.id for row in first.workers] == ["prefill-0", "decode-2", "decode-10"], "by role, then by number"
    assert (first.cluster.tokens_per_s, first.workers[1].tokens_written_per_s) == (None, None)
    assert first.workers[0].step_ms == 80.0
    second = top.look(12.0, 1002.0, later())
    prefill, decode, idle = second.workers
    assert second.cluster.tokens_per_s == 50.0
    assert (decode.tokens_written_per_s, prefill.tokens_read_per_s) == (30.0, 150.0)
    assert (idle.tokens_written_per_s, idle.step_ms, prefill.step_ms, decode.step_ms) == (0.0, None, None, 13.0)
    assert second.requests[0].tokens_per_s == 15.0


def test_the_cluster_is_the_sum_of_its_routers() -> None:
    routers = [router(ttft_ms=[10, 20, 30], refused=1), router("router-1", ttft_ms=[40.0], refused=2, moved=4)]
    row = Top().look(1.0, 1000.0, status(routers=[*routers, pb.RouterStatus(id="router-2")])).cluster
    assert (row.ttft_p50_ms, row.ttft_p95_ms, row.tpot_p50_ms) == (20.0, 40.0, None)
    assert (row.refused, row.moved, row.routers_up, row.routers) == (3, 4, 2, 3)


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.95) == 3.0
    assert percentile(map(float, range(1, 101)), 0.95) == 95.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0


def test_a_process_that_was_started_again_is_told_of_and_counts_from_nothing() -> None:
    top = Top()
    top.look(10.0, 1000.0, status())
    fresh = status(
        workers=[worker("decode-2", "decode", incarnation=2, tokens_written=5, steps=1)],
        routers=[router(pid=11, tokens=3)],
    )
    view = top.look(12.0, 1002.0, fresh)
    assert view.workers[0].tokens_written_per_s is None
    assert view.cluster.tokens_per_s == 0.0
    assert view.notes == (
        "router-0 was started again: pid 10, now 11",
        "decode-2 was started again: incarnation 2",
    )
    assert top.look(41.9, 1032.0, fresh).notes == view.notes
    assert top.look(42.1, 1032.2, fresh).notes == ()


def test_a_role_that_changes_is_shown_with_the_one_before() -> None:
    top = Top()
    top.look(
        10.0, 1000.0, status(workers=[worker("decode-1", "decode", state="draining"), worker("prefill-0", "prefill")])
    )
    flipped = status(workers=[worker("decode-1", "prefill"), worker("prefill-0", "prefill")])
    view = top.look(11.0, 1001.0, flipped)
    roles = [(row.id, row.role, row.was) for row in view.workers]
    assert roles == [("decode-1", "prefill", "decode"), ("prefill-0", "prefill", "")]
    assert "decode-1 is prefill now; it was decode" in view.notes
    assert "decode > prefill" in text(view, 80)
    assert "decode > prefill" not in text(top.look(50.0, 1040.0, flipped), 80)


def test_moves_say_how_long_ago_and_why_and_requests_the_last_reason() -> None:
    moves = [
        moved("r", 900.0, "a", "b", reason="drain"),
        moved("r", 999.5, "b", "c", reason="pressure", why="no blocks in 3 s", pause_ms=7),
        moved("q", 999.8, "b", "c", outcome="failed", error="no room"),
    ]
    view = Top().look(1.0, 1000.0, status(moves=moves, requests=[request("r", num_moves=2), request("q")]))
    assert [(each.request, each.ago_s, each.pause_ms) for each in view.moves] == [
        ("q", 0.2, None), ("r", 0.5, 7), ("r", 100.0, 0),
    ]  # fmt: skip
    assert [row.last_move for row in view.requests] == ["pressure", "balance"]


def test_ended_requests_are_not_shown_and_one_taken_over_goes_on() -> None:
    top = Top()
    top.look(1.0, 1000.0, status(requests=[request("r", tokens=10), request("r", state="failed", tokens=4)]))
    both = [request("r", tokens=16), request("r", state="failed", tokens=10)]
    view = top.look(3.0, 1002.0, status(requests=[*both, request("x", state="finished")]))
    assert [(row.id, row.tokens_per_s) for row in view.requests] == [("r", 3.0)]


def test_requests_are_sorted() -> None:
    rows = Top().look(1.0, 1000.0, status(requests=[
        request("a", tokens=5, age_ms=100, decode_worker="decode-1", ttft_ms=9),
        request("b", tokens=9, age_ms=50, decode_worker="decode-0", num_moves=2, ttft_ms=40),
        request("c", tokens=9, age_ms=900, decode_worker="decode-1"),
    ])).requests  # fmt: skip
    order = {by: "".join(row.id for row in sort_requests(rows, by)) for by in Sort}
    assert order == {Sort.AGE: "cab", Sort.TOKENS: "cba", Sort.TTFT: "cba", Sort.MOVES: "bca", Sort.WORKER: "bca"}
    assert [Sort.AGE.next, Sort.WORKER.next] == [Sort.TOKENS, Sort.AGE]


def text(view: View, width: int, height: int = 24, shown: Shown | None = None, **console: Any) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=console.pop("encoding", "utf-8"))
    out = Console(file=file, width=width, height=height, **console)
    options = out.options.update(height=height)
    return "".join(segment.text for segment in out.render(TopScreen(view, shown or Shown(keys=True)), options))


def busy() -> View:
    top = Top()
    many = [request(f"request-{number}", tokens=number, age_ms=1000 * number) for number in range(40)]
    top.look(10.0, 1000.0, status())
    return top.look(12.0, 1002.0, status(requests=many, not_ready="no pair has served yet", routers=[router(pid=12)]))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 50), (20, 3)])
def test_the_screen_fits(width: int, height: int) -> None:
    drawn = text(busy(), width, height).split("\n")
    assert len(drawn) == height
    assert max(map(len, drawn)) <= width


def test_a_narrow_screen_has_what_matters_and_a_wide_one_has_all() -> None:
    narrow, wide = text(busy(), 80), text(busy(), 160)
    for word in ("fake at http://127.0.0.1:8000", "TTFT p50", "refused", "decode-10", "KV", "out/s", "request-39"):
        assert word in narrow, word
    for word in ("gRPC 127.0.0.1:50051", "blocks", "swap", "why there", "prompt"):
        assert word in wide, word
        assert word not in narrow, word


def test_scrolling_goes_to_the_last_request_and_no_further() -> None:
    view = busy()
    out = Console(width=80, height=24, file=io.StringIO())
    screen = TopScreen(view, Shown(keys=True))
    list(out.render(screen, out.options.update(height=24)))
    assert screen.lines_below > 20
    shown = pressed(Shown(keys=True), Key.BOTTOM, page_lines=screen.lines, below=screen.lines_below)
    assert "request-0 " in text(view, 80, shown=shown)
    assert pressed(shown, Key.DOWN, page_lines=9, below=screen.lines_below).first_line == screen.lines_below
    up = pressed(shown, Key.PAGE_UP, page_lines=9, below=screen.lines_below)
    assert up.first_line == screen.lines_below - 9
    assert pressed(Shown(), Key.UP, page_lines=9, below=5).first_line == 0
    assert pressed(Shown(), Key.SORT, page_lines=9, below=5).sort is Sort.TOKENS
    assert "paused" in text(view, 80, shown=pressed(Shown(), Key.PAUSE, page_lines=9, below=5))


def test_trouble_is_shown() -> None:
    assert "no answer for 3 s" in text(busy(), 80, shown=Shown(trouble="no answer for 3 s, trying again: gone"))


def test_bars_are_shares_and_hide_no_state() -> None:
    assert shares({"owned": 25, "cached": 25, "free": 50}, 100, 12) == {"owned": 3, "cached": 3, "free": 6}
    assert shares({"owned": 1, "quarantined": 1, "free": 998}, 1000, 12) == {"owned": 1, "quarantined": 1, "free": 10}
    assert shares({"owned": 0, "free": 0}, 0, 12) == {}
    for free in range(0, 728, 91):
        assert sum(shares({"owned": 727 - free, "free": free, "granted": 1}, 728, 12).values()) == 12


def test_without_unicode_and_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = text(busy(), 80, encoding="ascii")
    assert plain.isascii()
    assert "###" in plain
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    out = Console(file=file, width=80, force_terminal=True, color_system="truecolor")
    out.print(whole(busy(), Shown(), out.options))
    assert "█" in file.getvalue()
    assert not [code for code in ("\x1b[3", "\x1b[9", "\x1b[38") if f"{code}2m" in file.getvalue()]


def test_keys_are_read_one_by_one() -> None:
    assert keys_in(b"sp\x1b[A\x1bOB\x1b[5~\x1b[6~q") == [
        Key.SORT, Key.PAUSE, Key.UP, Key.DOWN, Key.PAGE_UP, Key.PAGE_DOWN, Key.QUIT,
    ]  # fmt: skip
    assert keys_in(b"x\x1b[1;5q\x1b[Zs") == [Key.SORT], "letters of unknown sequences are no keys"
    assert keys_in(b"\x1b") == keys_in(b"\x1b[") == []


def test_the_view_is_json() -> None:
    from dataclasses import asdict

    document = json.loads(json.dumps(asdict(busy())))
    assert set(document) == {"cluster", "workers", "requests", "moves", "notes"}
    assert document["workers"][0]["blocks"]["owned"] == 25
