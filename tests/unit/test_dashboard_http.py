"""The dashboard's pages over the router's real application: what is open, who may watch and act, and every bound."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

import httpx
import pytest
from dashboard_rig import CLIENT, MARK, OPERATOR, ring, small

from benchmarks.fake_cluster import FakeCluster, Running, serve
from cluster.dashboard import ACTION_BYTES_MAX, FILES, OPEN_PAGES
from cluster.dashboard_feed import BEHIND_MAX, WATCHERS_MAX, Feed, Watcher, send_lines
from cluster.dashboard_tasks import REMEMBERED_MAX, Tasks
from router.api_keys import ANYBODY, KeyRing
from router.recent import Recent

DEADLINE_S = 60
OPS = {"authorization": f"Bearer {OPERATOR}"}
PATHS = [("GET", "/feed"), ("GET", "/requests/x"), ("POST", "/migrate"), ("POST", "/drain"), ("POST", "/scale"),
    ("POST", "/flip")]  # fmt: skip
BODY = {"migrate": {"request": "x"}, "drain": {"worker": "decode-0"}, "scale": {"pools": {"decode": 3}},
    "flip": {"worker": "decode-0", "role": "prefill"}}  # fmt: skip

Case = Callable[[Running, httpx.AsyncClient, FakeCluster], Awaitable[None]]


def run(case: Case, keys: KeyRing | None = None) -> None:
    async def main() -> None:
        fake = small()
        async with serve(fake, keys) as running, httpx.AsyncClient(base_url=running.url, timeout=DEADLINE_S) as client:
            await case(running, client, fake)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


async def first_frame(client: httpx.AsyncClient, headers: dict[str, str]) -> dict[str, object]:
    async with client.stream("GET", "/dashboard/feed", headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        assert reply.headers["content-type"] == "application/x-ndjson"
        async for line in reply.aiter_lines():
            frame: dict[str, object] = json.loads(line)
            return frame
    raise AssertionError("no frame came")


async def ask(client: httpx.AsyncClient, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    body = BODY.get(path.strip("/")) if method == "POST" else None
    return await client.request(method, f"/dashboard{path}", json=body, headers=headers)


def test_the_files_are_open_and_forbid_what_they_do_not_need() -> None:
    async def case(running: Running, client: httpx.AsyncClient, fake: FakeCluster) -> None:
        assert {"/dashboard", "/dashboard/main.js", "/dashboard/dashboard.css"} <= OPEN_PAGES
        for path in sorted(OPEN_PAGES):
            reply = await client.get(path)
            assert reply.status_code == 200, path
            policy = reply.headers["content-security-policy"]
            assert policy.startswith("default-src 'self'; ")
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["referrer-policy"] == "no-referrer"
            again = await client.get(path, headers={"if-none-match": reply.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        page = (await client.get("/dashboard")).text
        assert "<style" not in page
        assert "style=" not in page
        assert " onclick" not in page
        assert page.count("<script") == page.count('<script type="module" src="/dashboard/') == 1
        for name, file in FILES.items():
            source = file.read_text()
            assert "http://" not in source.replace("http://www.w3.org/2000/svg", ""), name
            assert "https://" not in source, f"{name} loads something from elsewhere"
            assert "innerHTML" not in source, name
            assert "localStorage" not in source, name
            assert "sessionStorage" not in source, name

    run(case, ring())


def test_only_an_operator_watches_explains_and_acts() -> None:
    async def case(running: Running, client: httpx.AsyncClient, fake: FakeCluster) -> None:
        for method, path in PATHS:
            assert (await ask(client, method, path, MARK)).status_code == 401, path
            wrong = await ask(client, method, path, {**MARK, "authorization": "Bearer tandem_x"})
            assert wrong.status_code == 401, path
            reply = await ask(client, method, path, {**MARK, "authorization": f"Bearer {CLIENT}"})
            assert reply.status_code == 403, path
            assert "'alice' is no operator's" in reply.json()["error"]["message"]
            for secret in (f"?key={OPERATOR}", f"?authorization={OPERATOR}"):
                assert (await client.request(method, f"/dashboard{path}{secret}", headers=MARK)).status_code == 401
            cookie = {**MARK, "cookie": f"key={OPERATOR}; authorization=Bearer {OPERATOR}"}
            assert (await ask(client, method, path, cookie)).status_code == 401
        assert fake.acted == []
        assert (await first_frame(client, {**MARK, **OPS}))["kind"] == "full"
        assert (await ask(client, "POST", "/drain", {**MARK, **OPS})).status_code == 202
        assert fake.acted == [("drain", "decode-0", False, "ops")]
        page = running.board._metrics.page().decode()
        assert 'refused_requests_total{api="http",code="permission_denied",router="router-0"} 6.0' in page

    run(case, ring())


FOREIGN = [
    {},  # no mark: a form, an image, a script of another site
    {**MARK, "origin": "http://evil.example"},
    {**MARK, "sec-fetch-site": "cross-site"},
    {**MARK, "host": "evil.example:8000", "origin": "http://evil.example:8000"},  # DNS rebinding
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_another_site_neither_sees_nor_does_anything(headers: dict[str, str]) -> None:
    async def case(running: Running, client: httpx.AsyncClient, fake: FakeCluster) -> None:
        for method, path in PATHS:
            reply = await ask(client, method, path, headers)
            assert reply.status_code == 403, path
            assert reply.json()["error"]["code"] == "permission_denied"
        for path in ("/migrate", "/drain", "/scale", "/flip"):
            plain = {**MARK, "content-type": "text/plain"}
            reply = await client.post(f"/dashboard{path}", content=json.dumps(BODY[path[1:]]), headers=plain)
            assert reply.status_code == 403, path
        preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        asked = await client.options("/dashboard/drain", headers=preflight)
        assert asked.status_code == 405
        assert "access-control-allow-origin" not in asked.headers
        assert fake.acted == []

    run(case)


def test_with_keys_any_name_will_do_and_a_foreign_origin_still_not() -> None:
    async def case(running: Running, client: httpx.AsyncClient, fake: FakeCluster) -> None:
        named = {**MARK, **OPS, "host": "tandem.example"}
        assert (await ask(client, "POST", "/drain", {**named, "origin": "https://tandem.example"})).status_code == 202
        assert (await ask(client, "POST", "/drain", {**named, "origin": "https://evil.example"})).status_code == 403
        assert len(fake.acted) == 1

    run(case, ring())


WRONG = [
    ("migrate", {}, "request"), ("migrate", {"request": "x", "more": 1}, "more"),
    ("migrate", {"request": "x" * 200}, "request"), ("migrate", {"request": 7}, "request"),
    ("drain", {"worker": ""}, "worker"), ("drain", {"worker": "d", "restart": "yes"}, "restart"),
    ("scale", {"pools": {}}, "pools"), ("scale", {"pools": {"decode": "3"}}, "pools.decode"), ("scale", [], "body"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "name"), WRONG)
def test_an_action_that_is_wrong_is_refused_by_its_field(path: str, body: object, name: str) -> None:
    async def case(running: Running, client: httpx.AsyncClient, fake: FakeCluster) -> None:
        reply = await client.post(f"/dashboard/{path}", json=body, headers=MARK)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == name
        assert fake.acted == []

    run(case)


def test_what_cannot_be_done_says_why() -> None:
    async def case(running: Running, client: httpx.AsyncClient, fake: FakeCluster) -> None:
        large = await client.post("/dashboard/drain", json={"worker": "d" * ACTION_BYTES_MAX}, headers=MARK)
        assert large.json()["error"]["message"].startswith("body: has 4")
        nobody = await client.post("/dashboard/drain", json={"worker": "nobody"}, headers=MARK)
        assert (nobody.status_code, nobody.json()["error"]["code"]) == (409, "drain_refused")
        still = await client.post("/dashboard/migrate", json={"request": "nothing"}, headers=MARK)
        assert (still.status_code, still.json()["error"]["code"]) == (409, "move_impossible")
        missing = await client.get("/dashboard/requests/nothing", headers=MARK)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_request")

    run(case)


def test_a_key_that_is_taken_back_ends_its_feed() -> None:
    async def case(running: Running, client: httpx.AsyncClient, fake: FakeCluster) -> None:
        for taken in (ring(revoked=True), ring(operator=False), KeyRing([])):
            running.door.ring = ring()
            async with client.stream("GET", "/dashboard/feed", headers={**MARK, **OPS}) as reply:
                lines = reply.aiter_lines()
                assert json.loads(await anext(lines))["kind"] == "full"
                running.door.ring = taken
                last = [json.loads(line) async for line in lines][-1]
                assert last["kind"] == "end"
                assert "ops" in last["why"] or "not known" in last["why"]
            assert running.board.feed.num_watchers == 0

    run(case, ring())


def test_watchers_are_bounded_and_leave_room_when_they_go() -> None:
    async def case(running: Running, client: httpx.AsyncClient, fake: FakeCluster) -> None:
        feed = running.board.feed
        watchers = [feed.admit(f"w{number}", ANYBODY) for number in range(WATCHERS_MAX)]
        reply = await client.get("/dashboard/feed", headers=MARK)
        assert reply.status_code == 429
        assert f"{WATCHERS_MAX} dashboards watch" in reply.json()["error"]["message"]
        assert int(reply.headers["retry-after"]) >= 1
        feed.leave(watchers[0])
        assert (await first_frame(client, MARK))["kind"] == "full"
        while feed.num_watchers == WATCHERS_MAX:  # the browser that left is noticed
            await asyncio.sleep(0.01)

    run(case)


def test_a_browser_that_reads_too_slowly_is_dropped_by_name(caplog: pytest.LogCaptureFixture) -> None:
    fake = small()
    feed = Feed(fake, Recent(), lambda caller: None)
    slow, quick = feed.admit("ops@10.0.0.1:5", ANYBODY), feed.admit("ops@10.0.0.2:6", ANYBODY)

    async def main() -> None:
        lines = quick.lines()
        with caplog.at_level(logging.INFO):
            for _ in range(BEHIND_MAX + 1):
                await anext(lines)
                feed._publish_next()
        assert feed.num_watchers == 1
        assert "dashboard watcher=ops@10.0.0.1:5 is dropped: it reads too slowly: 12 frames wait" in caplog.text
        told = [json.loads(line) async for line in slow.lines()]
        assert [each["kind"] for each in told] == ["end"], "what waited for it is let go of"
        feed.close("the router ends")

    asyncio.run(main())


def test_a_browser_that_takes_nothing_is_let_go_of() -> None:
    async def main() -> None:
        watcher = Watcher("w", ANYBODY)
        watcher.push(b"x\n")

        async def never(line: bytes) -> None:
            await asyncio.Event().wait()

        with pytest.raises(TimeoutError):
            await send_lines(watcher, never, stuck_s=0.01)

    asyncio.run(main())


def test_a_dashboard_that_fails_ends_alone(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    async def case(running: Running, client: httpx.AsyncClient, fake: FakeCluster) -> None:
        async with client.stream("GET", "/dashboard/feed", headers=MARK) as reply:
            lines = reply.aiter_lines()
            await anext(lines)
            monkeypatch.setattr(fake, "snapshot", lambda: 1 / 0)
            last = [json.loads(line) async for line in lines][-1]
        assert last["why"].startswith("the dashboard has failed")
        assert (await client.get("/live")).status_code == 200
        assert "ZeroDivisionError" in caplog.text

    run(case)


def test_tasks_tell_how_far_they_are_how_they_end_and_are_bounded() -> None:
    async def main() -> None:
        tasks = Tasks()

        async def steps(number: int) -> AsyncGenerator[str, None]:
            yield f"step {number}"

        for number in range(REMEMBERED_MAX + 5):
            await tasks.begin("scale", f"decode={number}", "ops", steps(number))
            while any(each.state == "running" for each in tasks.all()):
                await asyncio.sleep(0)
        assert len(tasks.all()) == REMEMBERED_MAX
        assert {each.state for each in tasks.all()} == {"done"}
        assert tasks.all()[-1].detail == f"step {REMEMBERED_MAX + 4}"
        await tasks.close()

    asyncio.run(main())
