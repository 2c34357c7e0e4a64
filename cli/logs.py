"""`tandem logs`: what the processes of a cluster have logged, in the order of time, and what they log now."""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.completion import log_parts
from cli.options import Port, RunDir, running_cluster
from cluster.config import ConfigError
from tandem.log_lines import LogLine, parse
from tandem.near_miss import did_you_mean

LOOK_S = 0.3
READ_BYTES_MAX = 8 << 20  # of the end of each file: logs may be large


class Level(StrEnum):
    """The least that is shown."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


RANKS = {each.value: rank for rank, each in enumerate(Level)} | {"critical": len(Level)}


@dataclass(frozen=True, slots=True)
class Said:
    """An entry, and the part of the cluster whose log it is in, such as decode-0."""

    part: str
    line: LogLine


def logs(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="such as decode-0, router-0 or ray; without: all", autocompletion=log_parts),
    ] = None,
    num: Annotated[int, typer.Option("-n", "--lines", help="the newest so many entries", min=0)] = 100,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on with what comes, until Ctrl-C")] = False,
    level: Annotated[Level, typer.Option(help="the least that is shown")] = Level.INFO,
    request: Annotated[str, typer.Option(help="only what is about the request whose id ends so")] = "",
    port: Port = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON object a line")] = False,
    run_dir: RunDir = None,
) -> None:
    """Print the logs of a running cluster."""
    folder = Path(running_cluster(run_dir, port).log_dir)
    unknown = [each for each in parts or () if not (folder / f"{each}.log").exists()]
    if unknown:
        known = sorted(path.stem for path in folder.glob("*.log"))
        raise ConfigError(f"{unknown[0]!r} has no log; there are {', '.join(known)}{did_you_mean(unknown[0], known)}")

    def wanted(said: Said) -> bool:
        fits = not request or said.line.request.endswith(request) or request in said.line.message
        return fits and RANKS.get(said.line.level, 0) >= RANKS[level.value]

    tails = Tails(folder, parts)
    newest = [each for each in tails.read() if wanted(each)]
    show = _as_json if as_json else _as_text
    for each in newest[len(newest) - min(num, len(newest)) :]:
        print(show(each))
    while follow:
        try:
            time.sleep(LOOK_S)
        except KeyboardInterrupt:
            return
        for each in filter(wanted, tails.read()):
            print(show(each), flush=True)


class Tails:
    """The log files of a folder, read on from where they were read to; also those that come later."""

    def __init__(self, folder: Path, parts: list[str] | None) -> None:
        self._folder = folder
        self._parts = set(parts or ())
        self._read: dict[Path, int] = {}

    def read(self) -> list[Said]:
        """What is new, in the order of time. An entry whose line is not whole yet is left for the next time."""
        paths = [path for path in sorted(self._folder.glob("*.log")) if not self._parts or path.stem in self._parts]
        return list(heapq.merge(*(list(self._entries(path)) for path in paths), key=lambda each: each.line.time))

    def _entries(self, path: Path) -> Iterator[Said]:
        size = path.stat().st_size
        begin = self._read.get(path)
        if begin is None:
            begin = max(0, size - READ_BYTES_MAX)
        with path.open("rb") as file:
            file.seek(min(begin, size))  # a file that was cut off is read anew
            content = file.read(READ_BYTES_MAX)
        whole = content[: content.rfind(b"\n") + 1]
        self._read[path] = min(begin, size) + len(whole)
        last: LogLine | None = None
        for text in whole.decode(errors="replace").splitlines():
            line = parse(text)
            if line is None and last is not None:
                last = replace(last, message=f"{last.message}\n{text}")  # of a traceback
            elif line is not None:
                if last is not None:
                    yield Said(path.stem, last)
                last = line
        if last is not None:
            yield Said(path.stem, last)


Show = Callable[[Said], str]


def _as_text(said: Said) -> str:
    line = said.line
    return f"{line.time} {said.part:<12} {line.level.upper():<7} {line.message}"


def _as_json(said: Said) -> str:
    return json.dumps({"part": said.part, **asdict(said.line)}, ensure_ascii=False)
