"""The lines of all log files: as text or as JSON, and back. Neither has a prompt or an answer in it."""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import dataclass
from enum import StrEnum

# What a message says of whom it is about, wherever it says it as name=value; JSON has these as fields, too.
NAMES = ("request", "worker", "router", "incarnation", "session", "transfer", "reason")
TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_FIELD = re.compile(rf"\b({'|'.join(NAMES)})=([^\s,;]+)")
_LINE = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d),(\d{3}) ([A-Z]+) (\S+) (.*)", re.DOTALL)


class LogFormat(StrEnum):
    """How log files are written."""

    TEXT = "text"
    JSON = "json"


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, pid, message, the fields of NAMES, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        message = record.getMessage()
        content: dict[str, object] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": message,
            **dict(_FIELD.findall(message)),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)


def formatter(log_format: LogFormat) -> logging.Formatter:
    """What a handler is to be given."""
    return JsonLines() if log_format is LogFormat.JSON else logging.Formatter(TEXT)


def log_by(handler: logging.Handler, level: str, log_format: LogFormat) -> None:
    """All logging of this process from that level on goes there, whatever was set before."""
    handler.setFormatter(formatter(log_format))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One entry, with the lines that belong to it. `time` sorts; `request` is empty where it is about none."""

    time: str
    level: str
    logger: str
    message: str
    request: str = ""


def parse(text: str) -> LogLine | None:
    """An entry of either format; None: no entry begins with this line."""
    if text.startswith("{"):
        return _parse_json(text)
    found = _LINE.fullmatch(text)
    if found is None:
        return None
    day, clock, millis, level, logger, message = found.groups()
    fields = dict(_FIELD.findall(message))
    local_s = time.mktime(time.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S")) + int(millis) / 1000
    return LogLine(
        time=_utc(local_s),
        level=level.lower(),
        logger=logger,
        message=message,
        request=fields.get("request", ""),
    )


def _parse_json(text: str) -> LogLine | None:
    try:
        content = json.loads(text)
        message = str(content["message"])
        if content.get("traceback"):
            message += f"\n{content['traceback']}"
        return LogLine(
            time=str(content["time"]),
            level=str(content["level"]),
            logger=str(content["logger"]),
            message=message,
            request=str(content.get("request", "")),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _utc(at_s: float) -> str:
    millis = round(at_s * 1000) % 1000
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(round(at_s * 1000) // 1000)) + f".{millis:03d}Z"
