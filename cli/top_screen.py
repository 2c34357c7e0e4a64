"""Draws what `tandem top` shows as tables that fit: columns and lines that a terminal has no room for are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, assert_never

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cli.keyboard import Key
from cluster.top import MoveRow, RequestRow, Sort, View, WorkerRow, sort_requests

MOVES_SHOWN = 5
ID_CHARACTERS = 12  # of a request id: its end tells it apart
BAR_CHARACTERS, BAR_CHARACTERS_WIDE = 12, 24
WIDE = 120
# A mark for each state of a block, also without colours: what somebody holds is dense, what is free is empty.
MARKS = {"owned": "█", "exported": "▓", "granted": "▒", "quarantined": "x", "cached": "░", "free": "·"}
ASCII_MARKS = {"owned": "#", "exported": "e", "granted": "g", "quarantined": "x", "cached": "-", "free": "."}
COLOURS = {
    "owned": "green", "exported": "cyan", "granted": "blue", "quarantined": "red", "cached": "yellow", "free": "dim",
}  # fmt: skip
STATE_COLOURS = {"ready": "green", "joining": "cyan", "draining": "yellow", "suspect": "yellow", "dead": "red"}

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Column(Generic[_Row]):
    """One column of a table; `least`: the width of the terminal from which it is shown."""

    name: str
    cell: Callable[[_Row], str | Text]
    least: int = 0
    right: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """How the view is looked at. `trouble`: why it is not of now; empty: it is."""

    sort: Sort = Sort.AGE
    paused: bool = False
    first_line: int = 0
    trouble: str = ""
    keys: bool = False


class TopScreen:
    """The view in exactly the lines of a terminal: the cluster above, the keys below, and between them what fits.

    Of that, when it was drawn last, `lines` were shown at once, and so many more there were in all: `lines_below`.
    """

    def __init__(self, view: View, shown: Shown) -> None:
        self._view = view
        self._shown = shown
        self.lines = self.lines_below = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or console.height
        plain = options.update(height=None)
        head = console.render_lines(heading(self._view, self._shown, options.max_width), plain, pad=True)
        foot = console.render_lines(footing(self._shown), plain, pad=True) if self._shown.keys else []
        body = console.render_lines(tables(self._view, self._shown.sort, options), plain, pad=True)
        room = max(0, height - len(head) - len(foot))
        self.lines, self.lines_below = room, max(0, len(body) - room)
        first = min(self._shown.first_line, self.lines_below)
        middle = body[first : first + room]
        middle += [[Segment(" " * options.max_width)]] * (room - len(middle))
        lines = [*head, *middle, *foot][:height]
        for number, line in enumerate(lines):
            yield from line
            if number + 1 < len(lines):
                yield Segment.line()


def pressed(shown: Shown, key: Key, *, page_lines: int, below: int) -> Shown:
    """How the view is looked at after a key. `below`: the last line that may be the first one shown."""
    first = shown.first_line
    match key:
        case Key.SORT:
            return replace(shown, sort=shown.sort.next)
        case Key.PAUSE:
            return replace(shown, paused=not shown.paused)
        case Key.UP:
            first -= 1
        case Key.DOWN:
            first += 1
        case Key.PAGE_UP:
            first -= max(1, page_lines)
        case Key.PAGE_DOWN:
            first += max(1, page_lines)
        case Key.TOP:
            first = 0
        case Key.BOTTOM:
            first = below
        case Key.QUIT:
            return shown
        case _:
            assert_never(key)
    return replace(shown, first_line=max(0, min(first, below)))


def whole(view: View, shown: Shown, options: ConsoleOptions) -> RenderableType:
    """All lines of the view, for what is no terminal."""
    return Group(heading(view, shown, options.max_width), tables(view, shown.sort, options))


def heading(view: View, shown: Shown, width: int) -> RenderableType:
    """The cluster in a few lines, and what is the matter with it."""
    cluster = view.cluster
    lines = [Text(f"{cluster.model} at {cluster.http_address}", style="bold", no_wrap=True, overflow="ellipsis")]
    if width >= WIDE:
        lines[0].append(f", gRPC {cluster.grpc_address}", style="not bold")
    if cluster.routers > 1:
        lines[0].append(f", {cluster.routers_up} of {cluster.routers} routers", style="not bold")
    times = (
        f"TTFT p50 {_ms(cluster.ttft_p50_ms)} p95 {_ms(cluster.ttft_p95_ms)}, "
        f"TPOT p50 {_ms(cluster.tpot_p50_ms)} p95 {_ms(cluster.tpot_p95_ms)}"
    )
    mark = "" if width >= WIDE else "; in the last minute:"
    happened = f"{cluster.refused} refused, {cluster.moved} moved, {cluster.recovered} recovered"
    lines += [
        Text(f"{cluster.running} requests, {cluster.waiting} in line, {_rate(cluster.tokens_per_s)} tokens/s{mark}"),
        *([Text(f"last minute: {times}; {happened}")] if width >= WIDE else [Text(times), Text(happened)]),
    ]
    if cluster.not_ready:
        lines.append(Text(f"not ready: {cluster.not_ready}", style="red", no_wrap=True, overflow="ellipsis"))
    if shown.trouble:
        lines.append(Text(shown.trouble, style="bold red", no_wrap=True, overflow="ellipsis"))
    if shown.paused:
        lines.append(Text("paused: what is shown stands still", style="bold yellow"))
    lines += [Text(note, style="yellow", no_wrap=True, overflow="ellipsis") for note in view.notes]
    return Group(*lines)


def footing(shown: Shown) -> RenderableType:
    """What the keys do."""
    text = f"q quit  s sort ({shown.sort})  p {'go on' if shown.paused else 'pause'}  arrows scroll"
    return Text(text, style="reverse", no_wrap=True, overflow="ellipsis")


def tables(view: View, sort: Sort, options: ConsoleOptions) -> RenderableType:
    """Workers, moves, requests: what may be long comes last."""
    width, ascii_only = options.max_width, options.ascii_only
    parts: list[RenderableType] = [_table(worker_columns(width, ascii_only=ascii_only), view.workers, width)]
    if view.moves:
        parts += ["", _table(MOVES, view.moves[:MOVES_SHOWN], width)]
    if view.requests:
        parts += ["", _table(REQUESTS, sort_requests(view.requests, sort), width)]
    return Group(*parts)


def worker_columns(width: int, *, ascii_only: bool) -> list[Column[WorkerRow]]:
    """Of the table of workers, whose bars are as wide as there is room."""
    size = BAR_CHARACTERS_WIDE if width >= WIDE else BAR_CHARACTERS
    marks = ASCII_MARKS if ascii_only else MARKS
    return [
        Column("worker", lambda row: row.id, right=False),
        Column("role", _role, right=False),
        Column("state", lambda row: Text(row.state, style=STATE_COLOURS.get(row.state, "")), right=False),
        Column("inc", lambda row: str(row.incarnation)),
        Column("run", lambda row: str(row.running)),
        Column("wait", lambda row: str(row.waiting)),
        Column("swap", lambda row: str(row.swapped), least=100),
        Column("KV", lambda row: bar(row.blocks, row.blocks_total, size, marks), right=False),
        Column("held", lambda row: str(_held(row)), least=100),
        Column("blocks", lambda row: str(row.blocks_total), least=100),
        Column("step", lambda row: _ms(row.step_ms)),
        Column("in/s", lambda row: _rate(row.tokens_read_per_s), least=70),
        Column("out/s", lambda row: _rate(row.tokens_written_per_s)),
        Column("", _worry, right=False, least=WIDE),
    ]


REQUESTS: list[Column[RequestRow]] = [
    Column("request", lambda row: row.id[-ID_CHARACTERS:], right=False),
    Column("state", lambda row: row.state, right=False),
    Column("prefill", lambda row: row.prefill_worker, right=False),
    Column("decode", lambda row: row.decode_worker + (f" > {row.moving_to}" if row.moving_to else ""), right=False),
    Column("prompt", lambda row: str(row.prompt_tokens), least=100),
    Column("tokens", lambda row: str(row.tokens)),
    Column("out/s", lambda row: _rate(row.tokens_per_s), least=100),
    Column("TTFT", lambda row: _ms(row.ttft_ms)),
    Column("age", lambda row: _seconds(row.age_ms / 1000)),
    Column("moves", lambda row: f"{row.num_moves} {row.last_move}".rstrip() if row.num_moves else "", right=False),
    Column("priority", lambda row: str(row.priority) if row.priority else "", least=WIDE),
    Column("why there", lambda row: row.reason, right=False, least=WIDE + 20),
]
MOVES: list[Column[MoveRow]] = [
    Column("move of", lambda row: row.request[-ID_CHARACTERS:], right=False),
    Column("ago", lambda row: _seconds(row.ago_s)),
    Column("from", lambda row: row.source, right=False),
    Column("to", lambda row: row.target, right=False),
    Column("outcome", lambda row: row.outcome, right=False),
    Column("pause", lambda row: _ms(row.pause_ms), least=70),
    Column("reason", lambda row: row.reason, right=False),
    Column("why", lambda row: row.error or row.why, right=False, least=100),
]


def bar(blocks: dict[str, int], total: int, size: int, marks: dict[str, str]) -> Text:
    """The states of a worker's blocks as shares of `size` characters: each that has a block gets one, while they do."""
    text = Text()
    cells = shares(blocks, total, size)
    for state, num in cells.items():
        text.append(marks[state] * num, style=COLOURS[state])
    return text


def shares(blocks: dict[str, int], total: int, size: int) -> dict[str, int]:
    """How many characters each state gets: `size` in all, at least one for a state that is there."""
    if total <= 0:
        return {}
    present = {state: num for state, num in blocks.items() if num}
    cells = {state: max(1, num * size // total) for state, num in present.items()}
    while sum(cells.values()) > size:
        largest = max(cells, key=lambda state: cells[state])
        cells[largest] -= 1
    if cells and sum(cells.values()) < size:  # what rounding left over is the largest's
        cells[max(present, key=lambda state: present[state])] += size - sum(cells.values())
    return cells


def _table(columns: Sequence[Column[_Row]], rows: Sequence[_Row], width: int) -> Table:
    shown = [column for column in columns if width >= column.least]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for column in shown:
        table.add_column(
            column.name, no_wrap=True, overflow="ellipsis", justify="right" if column.right else "left"
        )  # fmt: skip
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell := column.cell(row), str) else cell for column in shown))
    return table


def _role(row: WorkerRow) -> Text:
    if row.was and row.was != row.role:
        return Text(f"{row.was} > {row.role}", style="yellow")
    return Text(row.role)


def _held(row: WorkerRow) -> int:
    return row.blocks_total - row.blocks["free"] - row.blocks["cached"]


def _worry(row: WorkerRow) -> Text:
    if row.audit:
        return Text(f"audit: {row.audit[0]}", style="red")
    return Text("" if row.state == "ready" else row.reason)


def _ms(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1000:.1f} s"


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def _rate(per_s: float | None) -> str:
    if per_s is None:
        return "-"
    return f"{per_s:.1f}" if 0 < per_s < 10 else f"{per_s:.0f}"
