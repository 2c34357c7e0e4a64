"""The dashboard on a real cluster: a stream is watched, moved by its button, looked into, and its worker drained.

About 20 CPU seconds. With `--screenshots FOLDER` the model is a real one, and the documentation's pictures are taken.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from cluster_under_test import ClusterUnderTest
from dashboard_rig import chromium, live, page_at
from served import Served, wait_until

from engine.fake_runner import expected_tokens
from tandem.request import Sampling

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.cluster, pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = [number * 5 % 256 for number in range(300)]
NUM_TOKENS = 6000  # longer than the test needs
WATCHED = "watched"
WAIT_MS = 60_000
WIDE = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
OTHERS = ("summary-7f3a", "translate-19c2", "chat-e41b", "extract-80d6", "chat-55a9")


class Stream:
    """A client that reads a long answer until it is told to leave."""

    def __init__(self, url: str, name: str, prompt: list[int], num_tokens: int) -> None:
        self.ids: list[int] = []
        self._url, self._name, self._prompt, self._num_tokens = url, name, prompt, num_tokens
        self._enough = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        body = {
            "prompt": self._prompt, "max_tokens": self._num_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        head = {"x-request-id": self._name}
        with httpx.stream("POST", f"{self._url}/v1/completions", json=body, headers=head, timeout=120) as reply:
            assert reply.status_code == 200
            for line in reply.iter_lines():
                for choice in json.loads(line[6:]).get("choices", ()) if line.startswith("data: {") else ():
                    self.ids += choice.get("token_ids") or []
                if self._enough.is_set():
                    return

    def leave(self) -> None:
        self._enough.set()
        self._reader.join(60)
        assert not self._reader.is_alive()


@contextmanager
def cluster(real: bool, run_dir: Path) -> Iterator[Served]:
    """One prefill and two decode workers; nothing moves that nobody asked for."""
    pools = ("--prefill", "1", "--decode", "2", "--no-rebalance")
    served = (
        Served(pools, run_dir=run_dir)
        if real
        else ClusterUnderTest(*pools, "--kv-memory", "1MiB", "--fake-step-ms", "10", run_dir=run_dir)
    )
    with served:
        yield served


def test_a_stream_is_watched_moved_looked_into_and_its_worker_drained(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.config.getoption("--screenshots")
    with ExitStack() as stack:
        browser = stack.enter_context(chromium())
        served = stack.enter_context(cluster(folder is not None, tmp_path))
        stream = Stream(served.url, WATCHED, PROMPT, NUM_TOKENS)
        others = []
        if folder is not None:
            others = [Stream(served.url, name, PROMPT[: 60 + 40 * at], 900) for at, name in enumerate(OTHERS)]
        wait_until(lambda: len(stream.ids) > 5, 60)
        page = stack.enter_context(page_at(browser, served.url, viewport=WIDE))
        live(page)
        page.wait_for_selector(".tile[data-state=ready] >> nth=2")

        link = page.locator(f".tile a[title^='{WATCHED}:']")
        link.wait_for()
        home = str(link.locator("xpath=ancestor::article").locator("button").text_content())
        other = {"decode-0": "decode-1", "decode-1": "decode-0"}[home]
        link.click()
        page.locator("#drawer select").select_option(other)
        seen = len(stream.ids)
        page.get_by_role("button", name="Migrate").click()
        page.wait_for_selector(".arcs g[data-why=operator] .arc-label", state="attached")
        page.locator("#toasts", has_text=f"{WATCHED} moved from {home} to {other}, pause ").wait_for()
        page.locator("#moves li[data-why=operator]", has_text=f"{home} → {other}").wait_for()
        page.locator(f".tile:has(button[data-worker={other}]) a[title^='{WATCHED}:']").wait_for()

        card = page.locator("#drawer .move-card[data-why=operator]")
        card.wait_for()
        assert "pre-copy" in card.inner_text()
        assert page.locator("#drawer .timeline .why").all_text_contents() == ["handoff", "operator"]
        assert page.locator("#drawer .timeline .lane").all_text_contents() == ["prefill-0", home, other]
        record = httpx.get(f"{served.url}/dashboard/requests/{WATCHED}", headers={"x-tandem-dashboard": "1"}).json()
        told = json.loads(served.command("explain", WATCHED, "--json").stdout)
        for move in (*record["moves"], *told["moves"]):
            del move["at_ms"]  # on a clock that is read anew for each answer
        assert record["moves"] == told["moves"]
        assert record["placements"] == told["placements"]
        assert [each["to"] for each in record["moves"]] == [other]
        assert sum(each["ms"] for each in record["stages"]) == pytest.approx(record["ttft_ms"])
        wait_until(lambda: len(stream.ids) > seen + 20, 60)

        if folder is not None:
            pictures(stack, browser, page, served, Path(folder))
        page.keyboard.press("Escape")
        page.locator(f"button[data-worker={other}]").click()
        page.locator("#drawer").get_by_role("button", name="Drain…", exact=True).click()
        page.locator("#dialog").get_by_role("button", name="Drain").click()
        page.locator("#moves li[data-why=drain]", has_text=f"{other} → {home}").first.wait_for(timeout=WAIT_MS)
        page.locator("#tasks li", has_text=f"drain {other}").filter(has_text="done").wait_for(timeout=WAIT_MS)
        page.locator(f".tile[data-state=left]:has(button[data-worker={other}])").wait_for(timeout=WAIT_MS)
        wait_until(lambda: len(stream.ids) > seen + 60, 60)
        for each in (stream, *others):
            each.leave()
        if folder is None:
            expected = expected_tokens(PROMPT, Sampling(temperature=0.0), NUM_TOKENS, 256)
            assert stream.ids == expected[: len(stream.ids)], "the answer is as if nobody had touched it"


def pictures(stack: ExitStack, browser: Browser, page: Page, served: Served, folder: Path) -> None:
    """Takes the documentation's pictures of what runs now: a record, moves under way, in the dark, on a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / "dashboard-request.png")
    shots: dict[str, dict[str, object]] = {
        "light": {"viewport": WIDE},
        "dark": {"viewport": WIDE, "color_scheme": "dark"},
        "phone": {"viewport": PHONE, "is_mobile": True, "has_touch": True, "device_scale_factor": 2},
    }
    for name, options in shots.items():
        shown = stack.enter_context(page_at(browser, served.url, **options))
        live(shown)
        shown.wait_for_selector("#requests tr")
        moving = threading.Thread(target=served.command, args=("migrate", WATCHED))
        moving.start()
        shown.wait_for_selector(".arcs g[data-why=operator] .arc-label", state="attached")
        shown.screenshot(path=folder / f"dashboard-{name}.png")
        moving.join()
