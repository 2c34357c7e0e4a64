"""Log lines in both formats, and `tandem logs` over the files of a cluster."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from cli.logs import Tails
from cli.main import app
from cluster import run_file
from cluster.run_file import RunFile
from tandem.log_lines import LogFormat, formatter, parse

RUNNER = CliRunner()


def line(log_format: LogFormat, message: str, *arguments: object, level: int = logging.INFO, at_s: float = 0.0) -> str:
    record = logging.LogRecord("router.driver", level, "f", 1, message, arguments, None)
    record.created, record.msecs = at_s, at_s % 1 * 1000
    return formatter(log_format).format(record)


@pytest.mark.parametrize("log_format", LogFormat)
def test_a_line_is_read_back(log_format: LogFormat) -> None:
    written = line(log_format, "request=%s moved from=%s", "r-1", "decode-0", level=logging.WARNING, at_s=86_400.25)
    read = parse(written)
    assert read is not None
    assert (read.time, read.level, read.logger) == ("1970-01-02T00:00:00.250Z", "warning", "router.driver")
    assert (read.message, read.request) == ("request=r-1 moved from=decode-0", "r-1")


def test_json_has_the_names_as_fields_and_the_traceback() -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, 'worker=%s said "no"', ("d-0",), sys.exc_info())
    content = json.loads(formatter(LogFormat.JSON).format(record))
    assert (content["worker"], content["level"], content["pid"]) == ("d-0", "error", os.getpid())
    assert content["message"] == 'worker=d-0 said "no"'
    assert "RuntimeError: broken" in content["traceback"]


@pytest.mark.parametrize(
    "text", ["", "Traceback (most recent call last):", "{", '{"time": 1}', '["a"]', "2026-01-01 x"]
)
def test_what_is_no_entry_is_not_taken_for_one(text: str) -> None:
    assert parse(text) is None


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A run folder that says that this very process is a cluster, with logs."""
    folder = tmp_path / "8123.logs"
    folder.mkdir()
    (folder / "router-0.log").write_text(
        line(LogFormat.TEXT, "request=a-1 failed: gone", at_s=10.0) + "\n"
        + line(LogFormat.TEXT, "the router is broken", level=logging.CRITICAL, at_s=30.0)
        + "\nTraceback (most recent call last):\n  here\n"
    )  # fmt: skip
    (folder / "decode-0.log").write_text(
        line(LogFormat.JSON, "worker=decode-0 runs", at_s=20.0) + "\n"
        + line(LogFormat.JSON, "worker=decode-0 is slow", level=logging.WARNING, at_s=40.0) + "\n"
    )  # fmt: skip
    me = psutil.Process()
    run_file.write(
        tmp_path,
        RunFile(
            pid=me.pid, started_s=me.create_time(), host="h", port=8123, grpc_port=1, model="m", log_dir=str(folder)
        ),
    )
    return tmp_path


def shown(cluster: Path, *arguments: str) -> list[str]:
    done = RUNNER.invoke(app, ["logs", "--run-dir", str(cluster), *arguments])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_logs_of_all_parts_in_the_order_of_time(cluster: Path) -> None:
    lines = shown(cluster)
    assert [each.split()[1] for each in lines if each.startswith("1970")] == ["router-0", "decode-0"] * 2
    assert lines[3:5] == ["Traceback (most recent call last):", "  here"], "with what belongs to it"
    assert len(shown(cluster, "-n", "1")) == 1
    assert shown(cluster, "-n", "0") == []


def test_logs_of_one_part_of_one_request_and_of_what_matters(cluster: Path) -> None:
    assert all("decode-0" in each for each in shown(cluster, "decode-0"))
    [only] = shown(cluster, "--request", "-1")
    assert only.endswith("request=a-1 failed: gone")
    said = [json.loads(each) for each in shown(cluster, "--level", "warning", "--json")]
    assert [(each["part"], each["level"]) for each in said] == [("router-0", "critical"), ("decode-0", "warning")]


def test_a_part_that_there_is_not_is_named(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = RUNNER.invoke(app, ["logs", "decode-9", "--run-dir", str(cluster)])
    assert str(done.exception) == "'decode-9' has no log; there are decode-0, router-0; did you mean decode-0?"


def test_what_comes_later_is_read_once_and_whole(cluster: Path) -> None:
    folder = cluster / "8123.logs"
    tails = Tails(folder, None)
    assert len(tails.read()) == 4
    assert tails.read() == []
    half = line(LogFormat.TEXT, "the rest comes later", at_s=50.0)
    with (folder / "router-0.log").open("a") as file:
        file.write(half[:20])
        file.flush()
        assert tails.read() == []
        file.write(half[20:] + "\n")
    (folder / "prefill-7.log").write_text(line(LogFormat.TEXT, "a new worker", at_s=time.time()) + "\n")
    assert [(each.part, each.line.message) for each in tails.read()] == [
        ("router-0", "the rest comes later"), ("prefill-7", "a new worker")
    ]  # fmt: skip
