"""The command line: verbs, flags made from the settings, errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import drain, migrate
from cli.main import VERBS, app, main
from cli.status import move_table
from cluster.config import ClusterConfig, flag_of
from cluster.documents import plain
from cluster.draining import DrainState
from tandem.v1 import admin_pb2 as pb

RUNNER = CliRunner()


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tandem", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_every_verb_has_help() -> None:
    for verb in VERBS:
        done = RUNNER.invoke(app, [verb, "--help"])
        assert done.exit_code == 0, done.output
        assert "Usage" in done.output


def test_serve_has_a_flag_for_every_setting() -> None:
    output = RUNNER.invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for key in ClusterConfig.model_fields:
        assert flag_of(key) in output
    assert "--no-exact" in output
    assert "(default: 8000)" in output


def test_config_shows_values_and_origins(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("decode: 5\n")
    arguments = ["config", "--config", str(file), "--port", "1234", "--no-exact", "--kv-memory", "64MiB"]
    done = RUNNER.invoke(app, arguments, env={"TANDEM_PREFILL": "3", "TANDEM_REDIS": "redis://:secret@host/0"})
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line.split()[1:] for line in done.output.splitlines() if line.strip()}
    assert rows["port"] == ["1234", "flag", "--port"]
    assert rows["exact"] == ["False", "flag", "--exact"]
    assert rows["prefill"] == ["3", "TANDEM_PREFILL"]
    assert rows["decode"][0] == "5"
    assert rows["kv_memory"][0] == "64.0MiB"
    assert rows["host"] == ["127.0.0.1", "default"]
    assert rows["redis"] == ["redis://:***@host/0", "TANDEM_REDIS"]


def test_a_wrong_setting_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "config", "--port", "99999") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: port: 99999")
    assert error.count("\n") == 1


def test_no_cluster_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for verb in (["status"], ["top"], ["top", "--json"], ["down"], ["migrate", "r"], ["drain", "w"]):
        assert run_main(monkeypatch, *verb, "--run-dir", str(tmp_path)) == 1
        assert capsys.readouterr().err.startswith("error: no cluster runs here")


def test_the_run_dir_may_come_from_a_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TANDEM_RUN_DIR", str(tmp_path))
    assert run_main(monkeypatch, "status") == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_status_as_json_names_every_field_and_keeps_numbers() -> None:
    worker = pb.WorkerStatus(id="decode-0", incarnation=2**40, kv_blocks=pb.BlockCountsStatus(total=8, free=8))
    document = plain(pb.StatusResponse(workers=[worker], requests=[pb.RequestStatus(id="r")]))
    document = json.loads(json.dumps(document))
    [told] = document["workers"]
    assert told["incarnation"] == 2**40
    assert told["running"] == told["waiting"] == 0
    assert told["exact"] is False
    assert told["kv_blocks"] == {
        "total": 8, "free": 8, "cached": 0, "owned": 0, "exported": 0, "granted": 0, "quarantined": 0,
    }  # fmt: skip
    [request] = document["requests"]
    assert {request[key] for key in ("state", "prefill_worker", "decode_worker")} == {""}
    assert {request[key] for key in ("tokens", "blocks_moved", "tokens_recomputed")} == {0}


def move_from(source: str, **fields: Any) -> pb.MoveStatus:
    move = pb.MoveStatus(**fields)
    setattr(move, "from", source)
    return move


MOVE = move_from(
    "decode-0", request="req-1", to="decode-1", reason="balance", why="w", outcome="moved", rounds=2, blocks=9,
    bytes=2**40, precopy_ms=30, pause_ms=12, at_ms=2**41,
)  # fmt: skip


def test_moves_are_shown_as_json_and_as_a_table() -> None:
    document = json.loads(json.dumps(plain(pb.StatusResponse(moves=[MOVE]))))
    assert document["moves"] == [
        {
            "request": "req-1", "from": "decode-0", "to": "decode-1", "reason": "balance", "why": "w",
            "outcome": "moved", "error": "", "rounds": 2, "blocks": 9, "blocks_reused": 0, "bytes": 2**40,
            "precopy_ms": 30, "fence_ms": 0, "pause_ms": 12, "at_ms": 2**41,
        }
    ]  # fmt: skip
    console = Console(width=80)
    with console.capture() as capture:
        console.print(move_table(pb.StatusResponse(moves=[MOVE])))
    heads, row = capture.get().splitlines()
    assert heads.split() == ["move", "of", "from", "to", "reason", "outcome", "rounds", "MB", "pause"]
    assert row.split() == ["req-1", "decode-0", "decode-1", "balance", "moved", "2", "1099511.6", "12", "ms"]


def test_how_a_move_went_is_one_sentence() -> None:
    assert migrate.sentence(MOVE).startswith("req-1 moved from decode-0 to decode-1: 9 blocks in 2 rounds, ")
    failed = move_from("a", request="r", to="b", outcome="failed", error="no room")
    assert migrate.sentence(failed) == "r was not moved to b and runs on at a: no room"
    ended = move_from("a", request="r", to="b", outcome="ended", error="cancelled")
    assert migrate.sentence(ended) == "r was not moved to b and ended at a: cancelled"


@pytest.mark.parametrize("state", [each.value for each in DrainState if each is not DrainState.FAILED])
def test_each_state_of_a_drain_has_words(state: str) -> None:
    progress = pb.DrainProgress(worker="decode-0", incarnation=2**40, state=state, elapsed_ms=1500)
    assert drain.sentence(progress).startswith("    1.5 s  decode-0 ")
    assert plain(progress)["incarnation"] == 2**40


def test_a_wrong_deadline_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    done = RUNNER.invoke(app, ["drain", "decode-0", "--deadline", "0"])
    assert done.exit_code == 2
    assert "--deadline" in done.output


def test_quick_commands_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from importlib import import_module; from cli.main import VERBS;"
        "[import_module(module) for module, _ in VERBS.values()];"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_verb_does_without_the_modules_of_the_others() -> None:
    code = (
        "import sys; from cli.main import app; app(['config'], standalone_mode=False);"
        "print(sorted(each for each in sys.modules if each.startswith('cli.')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "['cli.configuration', 'cli.main', 'cli.options', 'cli.sentences', 'cli.settings']"


def test_the_router_process_imports_neither_torch_nor_ray() -> None:
    code = "import sys, cluster.router_process; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
