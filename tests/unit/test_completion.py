"""A shell completes verbs, flags, and the names that a cluster knows; without one it completes nothing, silently."""

from __future__ import annotations

from pathlib import Path

import pytest
from operators_service import Telling, serving
from typer.testing import CliRunner

from cli.main import app
from tandem.v1 import admin_pb2 as pb

RUNNER = CliRunner()


def completed(line: str) -> list[str]:
    """What bash is told after the words of the line; an empty word at its end begins a new one."""
    words = line.split(" ")
    shell = {"_TANDEM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = RUNNER.invoke(app, [], prog_name="tandem", env=shell)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.stderr == ""
    return done.stdout.split()


def test_verbs_and_flags() -> None:
    assert completed("tandem dr") == ["drain"]
    assert {"status", "top", "bench"} < set(completed("tandem "))
    assert completed("tandem status --po") == ["--port"]
    assert completed("tandem keys cr") == ["create"]
    assert completed("tandem serve --no-ex") == ["--no-exact"]
    assert completed("tandem scale de") == ["decode="]
    assert set(completed("tandem logs --level ")) == {"debug", "info", "warning", "error"}


def test_names_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [pb.WorkerStatus(id=name, role="decode", state="ready") for name in ("decode-0", "decode-1", "prefill-0")]
    requests = [pb.RequestStatus(id="old", state="finished"), pb.RequestStatus(id="go", state="decoding")]
    telling = Telling(pb.StatusResponse(workers=workers, requests=requests))
    monkeypatch.setenv("TANDEM_RUN_DIR", str(tmp_path))
    with serving(telling, tmp_path):
        assert completed("tandem drain ") == ["decode-0", "decode-1", "prefill-0"]
        assert completed("tandem drain dec") == ["decode-0", "decode-1"]
        assert completed("tandem migrate go --to pre") == ["prefill-0"]
        assert completed("tandem migrate ") == ["go"]
        assert completed("tandem explain ") == ["go", "old"]
        assert completed("tandem drain --port 1 ") == [], "there is none at that port"
        (tmp_path / "logs" / "router-0.log").touch()
        assert completed("tandem logs ro") == ["router-0"]
    assert completed("tandem drain ") == [], "it does not answer"


def test_nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_RUN_DIR", str(tmp_path))
    for line in ("tandem drain ", "tandem migrate ", "tandem explain ", "tandem logs ", "tandem migrate x --to "):
        assert completed(line) == []
