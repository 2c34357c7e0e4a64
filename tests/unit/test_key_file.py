"""The file of API keys: read whole or not at all, taken when it is still, changed by `tandem keys` one at a time."""

from __future__ import annotations

import datetime
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cli.keys import expiry
from cluster.config import ConfigError
from cluster.key_file import KeyFile, KeyFileError, changing, read_keys, ring_of
from cluster.secret_files import SecretError, read_secret, write_secret
from router.api_keys import KeyEntry, KeyRing, bearer, digest_of
from tandem.errors import Unauthenticated

KEY = "tandem_a-key-of-many-characters"
DIGEST = digest_of(KEY).hex()
GOOD = f"keys:\n- name: alice\n  sha256: {DIGEST}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keys.yaml"
    file.write_text(GOOD)
    return file


BAD = [
    ("", "must hold a list named `keys`"),
    ("keys", "must hold a list named `keys`"),
    ("keys: 5", "must hold a list named `keys`"),
    ("keys: [5]", "keys\\[0\\]"),
    (GOOD + "other: 1\n", "and nothing else"),
    ("keys: [", "is not YAML"),
    ("\x00", "is not YAML"),
    (GOOD.replace(DIGEST, DIGEST[:63]), "'alice': sha256"),
    (GOOD.replace(DIGEST, KEY), "'alice': sha256"),
    (GOOD + "  limit: 5\n", "'alice': limit: Extra inputs"),
    (GOOD + "  requests_per_minute: 0\n", "requests_per_minute: .*greater than or equal to 1"),
    (GOOD + "  expires: soon\n", "expires"),
    (GOOD + "  expires: 2027-13-01\n", "is not YAML: ValueError: month must be in 1..12"),
    (GOOD + "  expires: 2027-01-01 00:00:00+99:00\n", "is not YAML: ValueError: offset must be"),
    (GOOD + "  revoked: !!bool x\n", "is not YAML"),
    (GOOD + f"  concurrent: !!int {KEY}\n", "is not YAML: ValueError"),
    (GOOD + "  revoked: !!int ''\n", "is not YAML"),
    (GOOD + "  expires: !!timestamp x\n", "is not YAML"),
    (GOOD + "  limit: " + 5000 * "[", "is not YAML"),
    (GOOD + f"  tenant: {KEY}: x\n", "is not YAML: line 4, column 42: mapping values are not allowed here"),
    (GOOD.replace("alice", "al ice"), "name: .*letter or digit"),
    (GOOD.replace("alice", "''"), "name: .*must not be empty"),
    (GOOD + GOOD.removeprefix("keys:\n"), "two entries are named 'alice'"),
    (GOOD + GOOD.removeprefix("keys:\n").replace("alice", "bob"), "'alice' and 'bob' have the same sha256"),
]


@pytest.mark.parametrize(("content", "words"), BAD)
def test_bad_content_names_file_entry_and_field_and_never_a_key(path: Path, content: str, words: str) -> None:
    path.write_text(content)
    with pytest.raises(KeyFileError, match=words) as caught:
        ring_of(path)
    assert str(path) in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_file_that_is_not_there_or_too_large_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"none.yaml: No such file"):
        ring_of(tmp_path / "none.yaml")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (9 << 20))
    with pytest.raises(KeyFileError, match="has more than 8388608 bytes"):
        ring_of(large)


def test_a_change_is_taken_when_two_looks_find_the_file_the_same(path: Path) -> None:
    file = KeyFile(path)
    assert set(file.load().entries) == {"alice"}
    assert file.look() is None
    more = GOOD + GOOD.removeprefix("keys:\n").replace("alice", "bob").replace(DIGEST, "ab" * 32)
    path.write_text(more)
    assert file.look() is None, "it may still be written"
    path.write_text(more + "  tenant: b\n")
    assert file.look() is None, "it is still written"
    ring = file.look()
    assert ring is not None
    assert ring.entries["bob"].tenant == "b"
    assert file.look() is None


def test_a_file_half_written_is_refused_once_and_the_whole_one_taken(path: Path) -> None:
    file = KeyFile(path)
    file.load()
    path.write_text(GOOD[:40])
    assert file.look() is None
    with pytest.raises(KeyFileError):
        file.look()
    assert file.look() is None
    path.unlink()
    assert file.look() is None
    with pytest.raises(KeyFileError, match="No such file"):
        file.look()
    path.write_text(GOOD)
    assert [file.look() is None for _ in range(3)] == [True, False, True]


def test_changes_are_whole_private_and_one_at_a_time(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.key_file import KeySpec, changing\n"
        "with changing(Path(sys.argv[1])) as specs: specs.append(KeySpec(name=sys.argv[2], sha256=sys.argv[3] * 64))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), f"n{digit}", digit]) for digit in "123456789"]
    assert [writer.wait(60) for writer in writers] == [0] * 9
    assert {spec.name for spec in read_keys(path)} == {"alice", *(f"n{digit}" for digit in "123456789")}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with pytest.raises(KeyFileError, match="have the same sha256"), changing(path) as specs:
        specs.append(specs[0].model_copy(update={"name": "twin"}))
    assert "twin" not in path.read_text()
    assert {each.name for each in path.parent.iterdir()} == {"keys.yaml", "keys.yaml.lock"}


def test_a_file_that_waits_where_the_draft_is_written_gets_nothing(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("theirs")
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.symlink_to(other)
    with changing(path) as specs:
        specs[0] = specs[0].model_copy(update={"tenant": "a"})
    assert other.read_text() == "theirs"
    assert not path.is_symlink()
    assert read_keys(path)[0].tenant == "a"


def test_keys_are_created_listed_and_revoked(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"

    def keys(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cli.main", "keys", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, "TANDEM_API_KEYS": str(path)}
        )

    made = keys("create", "alice", "--expires", "2d", "--requests-per-minute", "60", "--tenant", "a", "--operator")
    key = made.stdout.splitlines()[0].rsplit(" ", 1)[1]
    assert re.fullmatch(r"tandem_[A-Za-z0-9_-]{43}", key)
    assert key not in path.read_text()
    entry = ring_of(path).caller(key, 0).entry
    assert entry is not None
    assert (entry.name, entry.requests_per_minute, entry.tenant, entry.operator) == ("alice", 60, "a", True)
    twice = keys("create", "alice")
    assert (twice.returncode, "'alice' has a key" in twice.stderr) == (2, True)
    assert keys("create", "a b").returncode == 2
    assert "alice" in keys("list").stdout
    assert keys("revoke", "nobody").returncode == 2
    assert keys("revoke", "alice").returncode == 0
    with pytest.raises(Unauthenticated, match="is revoked"):
        ring_of(path).caller(key, 0)
    assert "revoked" in keys("list").stdout

    made = json.loads(keys("create", "bob", "--priority-max", "1", "--json").stdout)
    assert (made["file"], made["entry"]["name"], made["entry"]["priority_max"]) == (str(path), "bob", 1)
    assert ring_of(path).caller(made["key"], 0).name == "bob"
    assert json.loads(keys("revoke", "bob", "--json").stdout) == {"revoked": "bob", "file": str(path)}
    assert keys("create", "eve", "--priority-max", "4").returncode == 2


@pytest.mark.parametrize("text", ["tomorrow", "5", "5m", "-1d", "2026-13-01", "9999999d", "999999w"])
def test_an_expiry_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expires: "):
        expiry(text)


def test_expiries_are_in_utc() -> None:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    assert expiry("12h", now) == now + datetime.timedelta(hours=12)
    assert expiry("2026-01-02") == datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    assert expiry("") is None
    entry = KeyEntry(name="a", digest=digest_of(KEY), expires_s=100.0)
    assert KeyRing([entry]).caller(KEY, 99.9).entry == entry
    with pytest.raises(Unauthenticated, match="has expired"):
        KeyRing([entry]).caller(KEY, 100.0)


@pytest.mark.parametrize("value", ["Bearer k", "bearer k", "BEARER   k "])
def test_the_scheme_is_read_as_http_has_it(value: str) -> None:
    assert bearer([value]) == "k"


def test_secret_files_are_private_whole_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "token"
    write_secret(path, "s" * 20)
    assert read_secret(path) == "s" * 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(SecretError, match="has mode 0640, others may read it"):
        read_secret(path)
    for content in (b"", b"short", b"two words that are long enough", b"\xff" * 20, b"x" * 600):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(SecretError, match="must hold one word"):
            read_secret(path)
    with pytest.raises(SecretError, match="No such file"):
        read_secret(tmp_path / "none")
