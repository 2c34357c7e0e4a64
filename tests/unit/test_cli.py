"""The command line: verbs, flags made from the settings, errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app, main
from cli.status import to_document
from cluster.config import ClusterConfig, flag_of
from tandem.v1 import admin_pb2 as pb

RUNNER = CliRunner()


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tandem", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_every_verb_has_help() -> None:
    for verb in ("serve", "status", "down", "config"):
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
    done = RUNNER.invoke(app, arguments, env={"TANDEM_PREFILL": "3"})
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line.split()[1:] for line in done.output.splitlines() if line.strip()}
    assert rows["port"] == ["1234", "flag", "--port"]
    assert rows["exact"] == ["False", "flag", "--exact"]
    assert rows["prefill"] == ["3", "TANDEM_PREFILL"]
    assert rows["decode"][0] == "5"
    assert rows["kv_memory"][0] == "64.0MiB"
    assert rows["host"] == ["127.0.0.1", "default"]


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
    for verb in ("status", "down"):
        assert run_main(monkeypatch, verb, "--run-dir", str(tmp_path)) == 1
        assert capsys.readouterr().err.startswith("error: no cluster runs here")


def test_the_run_dir_may_come_from_a_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TANDEM_RUN_DIR", str(tmp_path))
    assert run_main(monkeypatch, "status") == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_status_as_json_names_every_field_and_keeps_numbers() -> None:
    worker = pb.WorkerStatus(id="decode-0", incarnation=2**40, kv_blocks=pb.BlockCountsStatus(total=8, free=8))
    document = to_document(pb.StatusResponse(workers=[worker], requests=[pb.RequestStatus(id="r")]))
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


def test_quick_commands_import_neither_torch_nor_ray() -> None:
    code = "import sys, cli.main; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_router_process_imports_neither_torch_nor_ray() -> None:
    code = "import sys, cluster.router_process; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
