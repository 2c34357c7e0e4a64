"""`tandem top`: what runs where, live, until q or Ctrl-C."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.live import Live

from cli.keyboard import Key, Keyboard
from cli.options import Port, RunDir, running_cluster
from cli.reach import admin
from cli.sentences import EXPECTED, told
from cli.shown import console
from cli.top_screen import Shown, TopScreen, pressed, whole
from cluster.top import Top, View
from tandem.v1 import admin_pb2 as pb

TIMEOUT_S = 10.0
REDRAW_S = 1.0  # at the least: the time that a router has not answered for is shown
WIDTH = 160  # where no terminal cuts it
SIGTERM_STATUS = 128 + signal.SIGTERM


def top(
    interval: Annotated[float, typer.Option(help="seconds between two looks", min=0.1, max=3600)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="two looks, one view, and the end")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON for each look")] = False,
    port: Port = None,
    run_dir: RunDir = None,
) -> None:
    """Watch workers, requests, moves and what clients see. Keys: q quit, s sort, p pause, arrows scroll."""
    looking = Looking(lambda: ask(run_dir, port))
    out = console(WIDTH, highlight=False)
    live = out.is_terminal and not out.is_dumb_terminal
    with suppress(KeyboardInterrupt):
        looking.look()  # with nobody there this is the end, and an error
        if once or as_json or not live:
            print_looks(looking, interval, out, once=once, as_json=as_json)
        else:
            watch(looking, interval, out)


def ask(run_dir: Path | None, port: int | None) -> pb.StatusResponse:
    """The status, of whichever router answers now: since the last time the cluster may be another one."""
    with admin(running_cluster(run_dir, port)) as stub:
        answer: pb.StatusResponse = stub.Status(pb.StatusRequest(last_minute=True), timeout=TIMEOUT_S)
    return answer


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest view; `trouble` since `since_s`: why there is no newer one. Empty: it is of the last look."""

    view: View
    trouble: str = ""
    since_s: float = 0.0


class Looking:
    """Asks again and again, and goes on asking when nobody answers."""

    def __init__(self, ask: Callable[[], pb.StatusResponse]) -> None:
        self._ask = ask
        self._top = Top()
        self.seen: Seen | None = None
        self._failure: BaseException | None = None
        self._stopped = threading.Event()

    def look(self) -> Seen:
        """One look. Raises one of EXPECTED when the first fails; later ones say so in what is seen."""
        try:
            answer = self._ask()
        except EXPECTED as error:
            if self.seen is None:
                raise
            since_s = self.seen.since_s if self.seen.trouble else time.monotonic()
            self.seen = replace(self.seen, trouble=told(error)[0], since_s=since_s)
        else:
            self.seen = Seen(self._top.look(time.monotonic(), time.time(), answer))
        return self.seen

    def run(self, interval_s: float, on_look: Callable[[], None]) -> None:
        """A look each interval, until `stop`: on a thread, which nobody waits for, since a call may hang."""

        def body() -> None:
            try:
                while not self._stopped.wait(interval_s):
                    self.look()
                    on_look()
            except BaseException as error:  # whoever shows what is seen ends with it
                self._failure = error
                on_look()

        threading.Thread(target=body, name="looking", daemon=True).start()

    def newest(self) -> Seen:
        """What the last look saw. Raises what ended the looking."""
        if self._failure is not None:
            raise self._failure
        assert self.seen is not None, "there was no first look"
        return self.seen

    def stop(self) -> None:
        """The look under way is the last one."""
        self._stopped.set()


def print_looks(looking: Looking, interval_s: float, out: Console, *, once: bool, as_json: bool) -> None:
    """A view for each interval, one after the other; the first when there are rates. Raises as `look` when `once`."""
    while True:
        time.sleep(interval_s)
        seen = looking.look()
        if as_json:
            print(json.dumps(document(seen)), flush=True)
        else:
            out.print(whole(seen.view, Shown(trouble=trouble(seen)), out.options), end="" if once else "\n\n")
            out.file.flush()
        if once:
            if seen.trouble:
                raise typer.Exit(1)
            return


def document(seen: Seen) -> dict[str, object]:
    """A line of --json. While nobody answers `error` says so, and there is nothing else but the time."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"at": at, "error": seen.trouble} if seen.trouble else {"at": at, "error": "", **asdict(seen.view)}


def trouble(seen: Seen) -> str:
    """What is the matter, for people."""
    if not seen.trouble:
        return ""
    return f"no answer for {time.monotonic() - seen.since_s:.0f} s, trying again: {seen.trouble}"


def watch(looking: Looking, interval_s: float, out: Console) -> None:
    """The live view, until a key or Ctrl-C ends it. The terminal is as it was afterwards."""
    signal.signal(signal.SIGTERM, _terminated)
    with Keyboard() as keyboard, Live(console=out, screen=True, auto_refresh=False) as live:
        shown = Shown(keys=keyboard.is_terminal)
        looking.run(interval_s, keyboard.wake)
        paused: View | None = None
        while True:
            seen = looking.newest()
            shown = replace(shown, trouble=trouble(seen))
            screen = TopScreen(paused or seen.view, shown)
            live.update(screen, refresh=True)
            for key in keyboard.wait(REDRAW_S):
                if key is Key.QUIT:
                    looking.stop()
                    return
                shown = pressed(shown, key, page_lines=screen.lines, below=screen.lines_below)
            paused = (paused or seen.view) if shown.paused else None


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Ends as after a key: a plain death would leave the terminal without an echo."""
    raise SystemExit(SIGTERM_STATUS)
