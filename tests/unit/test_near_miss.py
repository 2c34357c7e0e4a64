"""A word that is nearly right is refused with the right one: verbs, flags, values, workers, requests, variables."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app, main
from cli.scale import sizes
from cluster.chaos_plan import parse_kinds
from cluster.config import ConfigError, load
from cluster.operations import Named, find_request
from cluster.scaling import parse_sizes
from tandem.errors import InvalidRequest, UnknownRequest
from tandem.near_miss import GIVEN_MAX, KNOWN_MAX, did_you_mean, nearest

RUNNER = CliRunner()


def test_only_a_near_word_is_proposed() -> None:
    assert nearest("PREFIL", ["prefill", "decode"]) == "prefill"
    assert did_you_mean("decode-00", ["decode-0", "prefill-0"]) == "; did you mean decode-0?"
    assert did_you_mean("xyz", ["decode-0", "prefill-0"]) == ""
    assert did_you_mean("", []) == ""
    many = [f"request-{number:04}" for number in range(KNOWN_MAX + 1)]
    assert nearest("request0199", many) == "request-0199"
    assert nearest("request-0200x", many) != "request-0200", "it is one too many to be looked at"
    assert nearest("x" * (GIVEN_MAX + 1), ["x" * (GIVEN_MAX + 2)]) == ""


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["statsu"], "status"),
        (["status", "--prot", "1"], "--port"),
        (["keys", "creat"], "create"),
        (["logs", "--level", "wraning"], "warning"),
    ],
)
def test_a_mistyped_verb_flag_or_value_names_the_right_one(arguments: list[str], hint: str) -> None:
    done = RUNNER.invoke(app, arguments)
    assert done.exit_code == 2
    assert hint in done.output
    assert arguments[-1] in done.output or arguments[1] in done.output


def test_a_value_of_a_setting() -> None:
    with pytest.raises(ConfigError, match=r"transport: 'gluo': .*; did you mean gloo\? \(from flag --transport\)"):
        load({"transport": "gluo"}, {})
    with pytest.raises(
        ConfigError, match=r"log_level: 'wanring': .*; did you mean warning\? \(from TANDEM_LOG_LEVEL\)"
    ):
        load({}, {"TANDEM_LOG_LEVEL": "wanring"})


def test_a_mistyped_variable_is_refused_by_every_command_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(os.environ, "TANDEM_RUNDIR", str(tmp_path))
    for verb in ("status", "top", "down"):
        monkeypatch.setattr(sys, "argv", ["tandem", verb])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert "TANDEM_RUNDIR: there is no such variable; did you mean TANDEM_RUN_DIR?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("decode:4", r"; did you mean decode=4\?$"),
        ("4 decode", r"; did you mean decode=4\?$"),
        ("Prefil=2", r"; did you mean prefill=2\?$"),
        ("lots", r"is not like decode=4$"),
    ],
)
def test_a_size_of_a_pool(word: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        sizes([word])


def test_roles_faults_and_requests() -> None:
    with pytest.raises(InvalidRequest, match=r"there is no role 'decod'; .*; did you mean decode\?$"):
        parse_sizes({"decod": 1})
    with pytest.raises(ValueError, match=r"there is no fault 'corupt'; .*; did you mean corrupt\?$"):
        parse_kinds("kill,corupt")
    known = [Named("chatcmpl-67aca8ff14ba", "finished"), Named("go", "decoding")]
    with pytest.raises(UnknownRequest, match=r"no request of id '67aca8ff14bx' is known; did you mean 67aca8ff14ba\?"):
        find_request("67aca8ff14bx", known)
    with pytest.raises(UnknownRequest, match=r"did you mean chatcmpl-67aca8ff14ba\?"):
        find_request("chatcmpl-67acaff14ba", known)
    with pytest.raises(UnknownRequest, match=r"is known$"):
        find_request("zzz", known)
