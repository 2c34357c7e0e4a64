"""Spans: made from a flight record, under the client's own, and received by a collector as OTLP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SentSpan
from router_rig import D, P, Rig, request

from cluster.spans import ROOT, Span, spans_of
from cluster.tracing import Tracing
from router.events import Submitted
from router.flight import Flight
from router.move import MoveOutcome, MoveReason, MoveRecord
from router.stages import FirstToken, Stage
from router.trace_context import TraceContext, trace_of
from tandem.messages import Role
from tandem.request import FinishReason, RequestId, WorkerId

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
WALL_NS = 1_800_000_000_000_000_000
MS = 1_000_000


@pytest.mark.parametrize(
    ("headers", "sampled"),
    [
        ([f"00-{TRACE}-{SPAN}-01"], True),
        ([f" 00-{TRACE}-{SPAN}-00 "], False),
        ([f"00-{TRACE}-{SPAN}-03"], True),
        ([f"cc-{TRACE}-{SPAN}-01-what-the-future-brings"], True),
    ],
)
def test_a_clients_trace_is_taken(headers: list[str], sampled: bool) -> None:
    assert trace_of(headers) == TraceContext(int(TRACE, 16), int(SPAN, 16), sampled)


@pytest.mark.parametrize(
    "headers",
    [
        [], [""], [f"00-{TRACE}-{SPAN}-01"] * 2, [f"00-{TRACE}-{SPAN}"], [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-01-more"], [f"00-{'0' * 32}-{SPAN}-01"], [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE.upper()}-{SPAN}-01"], [f"00-{TRACE[:-1]}g-{SPAN}-01"],
    ],
)  # fmt: skip
def test_what_keeps_no_form_is_as_good_as_nothing(headers: list[str]) -> None:
    assert trace_of(headers) is None


@given(st.lists(st.text(max_size=80), max_size=2))
def test_no_header_breaks_it(headers: list[str]) -> None:
    trace_of(headers)


def flight() -> Flight:
    """A request that was handed over, moved, and is finished."""
    rig = Rig()
    for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE)):
        rig.up(name, role)
    rig.feed(Submitted(request=request("r", max_tokens=2)))
    rig.now_ms += 60
    rig.token(P, 1, 0)
    rig.now_ms += 7
    rig.commit(D, 1, 1)
    rig.now_ms += 33
    rig.token(D, 2, 1, FinishReason.LENGTH)
    found = rig.core.explain(rig.now_ms, RequestId("r"))
    assert found is not None
    snapshot, moves = found
    assert moves == ()
    stages = {Stage.EDGE: 4.0, Stage.QUEUE: 20.0, Stage.PREFILL: 35.0, Stage.DELIVER: 1.0, Stage.OTHER: 4.0}
    first = FirstToken(ttft_ms=64.0, stages=tuple((stage, stages.get(stage, 0.0)) for stage in Stage))
    move = MoveRecord(
        request_id=RequestId("r"), source=WorkerId("d0"), target=WorkerId("d1"), reason=MoveReason.BALANCE, why="loads",
        outcome=MoveOutcome.MOVED, rounds=2, bytes_moved=9000, precopy_ms=10, fence_ms=2, pause_ms=5,
        at_ms=rig.now_ms - 20,
    )  # fmt: skip
    return Flight(request=snapshot, moves=(move,), first=first, now_ms=rig.now_ms, arrived_ms_ago=104.0)


def test_stages_lie_end_to_end_under_the_request_and_handoff_and_moves_beside_them() -> None:
    root, *under = spans_of(flight(), wall_ns=WALL_NS, router="router-0", model="m")
    assert (root.name, root.start_ns, root.end_ns) == (ROOT, WALL_NS - 104 * MS, WALL_NS)
    assert root.attributes["gen_ai.usage.input_tokens"] == 40
    assert root.attributes["tandem.request.state"] == "finished"
    [placed] = root.events
    assert placed.at_ns == root.start_ns + 4 * MS
    assert placed.attributes["tandem.prefill_worker"] == "p0"
    assert "tandem.score_ms.decode.d0" in placed.attributes

    named = {each.name: each for each in under}
    stages = [each for each in under if each.name not in ("tandem.handoff", "tandem.migration")]
    assert [each.name for each in stages] == [
        "tandem.edge", "tandem.queue", "tandem.prefill", "tandem.deliver", "tandem.other"
    ]  # fmt: skip
    assert stages[0].start_ns == root.start_ns
    for before, after in pairwise(stages):
        assert after.start_ns == before.end_ns
    assert stages[-1].end_ns == root.start_ns + 64 * MS
    assert named["tandem.prefill"].attributes == {"tandem.worker": "p0"}

    handoff = named["tandem.handoff"]
    assert (handoff.end_ns - handoff.start_ns, handoff.attributes["tandem.to"]) == (7 * MS, "d0")
    move = named["tandem.migration"]
    assert (move.start_ns, move.end_ns) == (WALL_NS - 20 * MS, WALL_NS - 5 * MS)
    assert move.attributes["tandem.reason"] == "balance"
    for each in under:
        assert root.start_ns <= each.start_ns <= each.end_ns <= root.end_ns


def test_what_is_not_known_makes_no_span() -> None:
    bare = replace(flight(), first=None, moves=())
    assert [each.name for each in spans_of(bare, wall_ns=WALL_NS, router="r", model="m")] == [ROOT]


@contextmanager
def collector() -> Iterator[tuple[str, list[SentSpan], threading.Event]]:
    """An OTLP collector that keeps what it gets."""
    got: list[SentSpan] = []
    came = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    got.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()
            came.set()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got, came
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sent(trace: TraceContext | None, *, share: float = 1.0, change: Flight | None = None) -> list[SentSpan]:
    with collector() as (endpoint, got, _):
        tracing = Tracing(endpoint, router="router-0", model="m", share=share)
        tracing.ended(change or flight(), trace)
        tracing.close()
        return got


def test_a_collector_gets_them_under_the_clients_span() -> None:
    got = sent(TraceContext(int(TRACE, 16), int(SPAN, 16), True))
    assert {each.trace_id.hex() for each in got} == {TRACE}
    [root] = [each for each in got if each.name == ROOT]
    assert root.parent_span_id.hex() == SPAN
    assert {each.parent_span_id for each in got if each is not root} == {root.span_id}
    assert len({each.span_id for each in got}) == len(got) == 8
    assert root.kind == SentSpan.SPAN_KIND_SERVER
    texts = {each.key: each.value.string_value for each in root.attributes}
    assert texts["tandem.request.id"] == "r"
    assert [event.name for event in root.events] == ["placed"]


def test_what_its_client_does_not_sample_is_not_sent_and_others_by_their_share() -> None:
    assert sent(TraceContext(1, 1, False)) == []
    assert sent(None, share=0.0) == []
    assert sent(TraceContext(1, 1, True), share=0.0) != []
    alone = sent(None)
    [root] = [each for each in alone if each.name == ROOT]
    assert root.parent_span_id == b""
    assert int.from_bytes(root.trace_id) != 0


def test_a_failure_is_one_in_the_span() -> None:
    whole = flight()
    failed = replace(whole.request, state=type(whole.request.state).FAILED, error="the worker is gone")
    [root] = [each for each in sent(None, change=replace(whole, request=failed)) if each.name == ROOT]
    assert (root.status.code, root.status.message) == (2, "the worker is gone")


def test_a_collector_that_is_not_there_holds_up_nobody() -> None:
    tracing = Tracing("http://127.0.0.1:1", router="r", model="m", share=1.0)
    for _ in range(100):
        tracing.ended(flight(), None)
    tracing.close()


def test_spans_are_plain_data() -> None:
    [root, *_] = spans_of(flight(), wall_ns=WALL_NS, router="r", model="m")
    assert isinstance(root, Span)
    json.dumps(root.attributes)
