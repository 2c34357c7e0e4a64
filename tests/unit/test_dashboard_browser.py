"""The dashboard in a real browser over a made-up cluster: what is shown, who may do what, and how it loses its router.

About 25 CPU seconds, most of them Chromium's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dashboard_rig import CLIENT, OPERATOR, Served, chromium, dashboard, live, page_at, ring, small
from playwright.sync_api import Browser, Page, expect

from router.api_keys import KeyRing

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

expect.set_options(timeout=60_000)
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
# All that a page may keep.
KEPT = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, document.documentElement.outerHTML])"
# What can have the focus and has no name for who does not see it.
NAMELESS = """[...document.querySelectorAll("button, a, input, select, canvas, [tabindex='0']")]
    .filter(e => !(e.innerText || e.getAttribute("aria-label") || e.labels?.length ||
                   e.getAttribute("aria-labelledby")))
    .map(e => e.outerHTML)"""
# In how many places an arc's dot is seen.
PLACES = """async e => {
    const seen = new Set();
    for (let frame = 0; frame < 10 && e.isConnected; frame++) {
        await new Promise(requestAnimationFrame);
        if (e.getAttribute("cx")) seen.add(e.getAttribute("cx"));
    }
    return seen.size;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with dashboard(small()) as running:
        yield running


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    with page_at(browser, served.url, viewport=WIDE) as shown:
        live(shown)
        yield shown


def running_request(served: Served) -> str:
    """One that decodes and has much to say yet."""
    found = [each.snapshot for each in list(served.fake._live.values()) if each.snapshot.state == "decoding"]
    return max(found, key=lambda each: each.max_tokens - each.tokens).request_id


def test_pools_workers_requests_and_charts_are_shown_live(page: Page, served: Served) -> None:
    expect(page.locator(".tile")).to_have_count(8)
    expect(page.locator(".pool[data-role=prefill] .tile")).to_have_count(2)
    expect(page.locator("#view")).to_have_text("view of router-0")
    expect(page.locator("#figures")).to_contain_text("8 of 8")
    expect(page.locator("#requests tr").first).to_be_visible()
    painted = page.locator("[data-worker=decode-0] >> xpath=ancestor::article >> css=.kv").evaluate(
        "e => e.style.backgroundImage"
    )
    assert "--owned" in painted or "--cached" in painted
    first = page.locator("#chart-tokens ~ *, .chart output").first
    expect(first).to_contain_text("tokens/s")
    counter = page.locator("#figures .value").nth(3)
    before = counter.inner_text()
    page.wait_for_function("([e, was]) => e.innerText !== was", arg=[counter.element_handle(), before])
    assert page.evaluate("document.querySelectorAll('[style*=url]').length") == 0


def test_a_move_draws_an_arc_with_its_reason_and_is_told(page: Page, served: Served) -> None:
    request = running_request(served)
    page.goto(f"{served.url}/dashboard#/request/{request}")
    expect(page.locator("#drawer-title")).to_have_text(request)
    page.locator("#drawer button.main").click()
    page.wait_for_selector(".arcs g[data-why=operator] .arc-label")
    expect(page.locator("#moves li").first).to_contain_text("operator")
    expect(page.locator("#toasts")).to_contain_text("moved from")
    expect(page.locator("#told")).to_contain_text("operator")
    assert ("migrate", request, "", "") in served.fake.acted
    page.wait_for_selector(".arcs g[data-why=operator]", state="detached")


def test_a_record_shows_stages_placements_moves_and_story(page: Page, served: Served) -> None:
    page.goto(f"{served.url}/dashboard#/request/{running_request(served)}")
    drawer = page.locator("#drawer")
    expect(drawer.locator(".stage-list li")).to_have_count(8)
    expect(drawer.locator(".timeline .lane").first).to_contain_text("prefill-")
    expect(drawer.locator("tr.chosen")).to_have_count(2)
    expect(drawer.locator("tr.chosen").first).to_contain_text("290 ms")
    expect(drawer.locator(".story li").first).to_contain_text("admitted")
    page.goto(f"{served.url}/dashboard#/request/nobody")
    expect(drawer).to_contain_text("no request of id 'nobody' is remembered")


def test_a_worker_is_drained_only_after_a_question(browser: Browser) -> None:
    with dashboard(small()) as served, page_at(browser, served.url, viewport=WIDE) as page:
        live(page)
        page.locator("[data-worker=decode-1]").click()
        drawer = page.locator("#drawer")
        expect(drawer.locator(".blocks li")).to_have_count(6)
        drawer.get_by_role("button", name="Drain…", exact=True).click()
        page.get_by_role("button", name="Cancel").click()
        assert served.fake.acted == []
        drawer.get_by_role("button", name="Drain…", exact=True).click()
        page.locator("#dialog").get_by_role("button", name="Drain").click()
        expect(page.locator("#tasks")).to_contain_text("drain decode-1")
        expect(page.locator(".tile[data-state=draining]")).to_contain_text("decode-1")
        assert served.fake.acted == [("drain", "decode-1", False, "")]
        drawer.get_by_role("button", name="Change role…").click()
        page.locator("#dialog select").select_option("prefill")
        page.locator("#dialog").get_by_role("button", name="Change the role").click()
        page.locator(".pool[data-role=prefill] button[data-worker=decode-1]").wait_for()
        assert served.fake.acted.pop() == ("flip", "decode-1", "prefill", "")
        page.keyboard.press("Escape")
        page.locator("#scale").click()
        page.locator("#dialog input[name=prefill]").fill("4")
        page.locator("#dialog").get_by_role("button", name="Scale").click()
        expect(page.locator("#tasks")).to_contain_text("scale")
        assert served.fake.acted[-1] == ("scale", {"prefill": 4}, "")


def test_keys_ask_for_an_operator_and_stay_in_memory(browser: Browser) -> None:
    with dashboard(small(), ring()) as served, page_at(browser, served.url, viewport=WIDE) as page:
        shown = page.locator("#dialog")
        for key, words in ((f"{CLIENT}x", "is not known here"), (CLIENT, "'alice' is no operator's")):
            shown.locator("input[type=password]").fill(key)
            shown.get_by_role("button", name="Sign in").click()
            expect(shown).to_contain_text(words)
            expect(page.locator(".tile")).to_have_count(0)
        shown.locator("input[type=password]").fill(OPERATOR)
        shown.get_by_role("button", name="Sign in").click()
        live(page)
        expect(page.locator(".tile")).to_have_count(8)
        assert OPERATOR not in page.url
        assert OPERATOR not in page.evaluate(KEPT)
        served.running.door.ring = KeyRing([])  # the key is taken back: the page loses its feed
        expect(page.locator("#banner")).to_contain_text("is not known here")
        served.running.door.ring = ring()
        page.reload()
        expect(shown.locator("input[type=password]")).to_be_visible()
        expect(page.locator(".tile")).to_have_count(0)


def test_a_router_that_restarts_is_said_and_found_again(browser: Browser) -> None:
    with dashboard(small()) as served, page_at(browser, served.url, viewport=WIDE) as page:
        live(page)
        expect(page.locator(".tile")).to_have_count(8)
        _restart(page, served)


def _restart(page: Page, served: Served) -> None:
    """Nothing answers for a while, then another life of the router does."""
    served.running.board.feed.close("the router ends")
    page.wait_for_selector("#link[data-state=lost]")
    expect(page.locator("#banner")).to_contain_text("What you see is as of")
    assert page.locator("#main").get_attribute("data-stale") == "true"
    expect(page.locator(".tile")).to_have_count(8)  # what was seen last stays
    served.fake._viewer.since_ms += 60_000
    served.running.board.feed._closed = False
    live(page)
    expect(page.locator("#toasts")).to_contain_text("Connected again: router-0 was started again")
    expect(page.locator("#banner")).to_be_hidden()


def test_everything_is_reached_by_keyboard_and_focus_comes_back(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.worker") == "prefill-0"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Enter")
    expect(page.locator("#drawer-title")).to_have_text("prefill-0")
    page.keyboard.press("Escape")
    expect(page.locator("#drawer")).to_be_hidden()
    assert page.evaluate("document.activeElement.dataset.worker") == "prefill-0"
    page.locator("#chart-ttft").focus()
    page.wait_for_function("document.querySelector('.chart output').textContent.includes('tokens/s')")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(NAMELESS) == []


def test_a_phone_gets_one_column_and_nothing_sticks_out(browser: Browser, served: Served) -> None:
    options = {"viewport": PHONE, "color_scheme": "dark", "is_mobile": True, "has_touch": True}
    with page_at(browser, served.url, **options) as page:
        live(page)
        page.wait_for_selector(".tile")
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
        page.locator("[data-worker=decode-0]").tap()
        expect(page.locator("#drawer-title")).to_have_text("decode-0")
        assert page.locator("#drawer").evaluate("e => e.scrollWidth <= e.clientWidth")


def test_who_wants_no_motion_gets_none(browser: Browser, served: Served) -> None:
    with page_at(browser, served.url, viewport=WIDE, reduced_motion="reduce") as page:
        live(page)
        page.goto(f"{served.url}/dashboard#/request/{running_request(served)}")
        page.locator("#drawer button.main").click()
        dot = page.locator(".arcs g[data-why=operator] circle").first
        dot.wait_for(state="attached")
        assert dot.evaluate(PLACES) == 1
