"""Settings: precedence, origins, and messages that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ClusterConfig, ConfigError, MiB, default_run_dir, load


def test_defaults_are_one_prefill_and_two_decode() -> None:
    effective = load({}, {})
    config = effective.config
    assert (config.model, config.port, config.grpc_port) == ("smollm2-135m-instruct", 8000, 50051)
    assert (config.prefill, config.decode, config.mixed) == (1, 2, 0)
    assert (config.dtype, config.exact, config.kv_memory) == ("float32", True, 512 * MiB)
    assert set(effective.origins.values()) == {"default"}
    assert set(effective.origins) == set(ClusterConfig.model_fields)


def test_flags_beat_variables_beat_the_file_beat_defaults(tmp_path: Path) -> None:
    file = tmp_path / "tandem.yaml"
    file.write_text("port: 1\ndecode: 3\nkv-memory: 64MiB\nexact: false\n")
    effective = load({"port": 3}, {"TANDEM_PORT": "2", "TANDEM_DECODE": "4", "TANDEM_EXACT": ""}, file)
    assert (effective.config.port, effective.origins["port"]) == (3, "flag --port")
    assert (effective.config.decode, effective.origins["decode"]) == (4, "TANDEM_DECODE")
    assert (effective.config.kv_memory, effective.origins["kv_memory"]) == (64 * MiB, str(file))
    assert (effective.config.exact, effective.origins["exact"]) == (False, str(file))


def test_the_file_may_come_from_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("prefill: 2\n")
    assert load({}, {"TANDEM_CONFIG": str(file)}).config.prefill == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": 70000}, r"port: 70000: .*65535 \(from flag --port\)"),
        ({"grpc_port": -1}, r"grpc_port: -1: .*0 \(from"),
        ({"dtype": "int3"}, r"dtype: 'int3': .*'float32' or 'bfloat16'"),
        ({"kv_memory": "12 parsecs"}, r"kv_memory: '12 parsecs': "),
        ({"kv_memory": "1KiB"}, r"kv_memory: '1KiB': .*16384"),
        ({"prefill": 0}, r"prefill: 0 workers can read prompts"),
        ({"decode": 0}, r"decode: 0 workers can write tokens"),
        ({"block_size": 0}, r"block_size: 0: "),
        ({"chunk_tokens": 100}, r"chunk_tokens: 100 is no multiple of block_size, 16"),
        ({"max_tokens_per_step": 16}, r"max_tokens_per_step: 16 is less than chunk_tokens, 256"),
        ({"port": 9000, "grpc_port": 9000}, r"grpc_port: 9000 is the HTTP port too"),
        ({"routers": 17}, r"routers: 17: .*16 \(from flag --routers\)"),
        ({"routers": 0}, r"routers: 0: .*1 \(from"),
        ({"routers": 2}, r"routers: 2 routers share their state; give redis a URL, or routers 1"),
        ({"worker_host": "0.0.0.0"}, r"worker_host: 0.0.0.0 is no address that others reach"),
        ({"transport": "pigeon"}, r"transport: 'pigeon': "),
        ({"prefil": 1}, r"--prefil: there is no such setting; did you mean prefill\?"),
        ({"threads": "many"}, r"threads: 'many': .*integer"),
    ],
)
def test_bad_values_are_named(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(flags, {})


def test_bad_variables_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"port: 'x': .* \(from TANDEM_PORT\)"):
        load({}, {"TANDEM_PORT": "x"})
    with pytest.raises(ConfigError, match=r"config: cannot read .*nowhere.yaml: No such file"):
        load({}, {}, tmp_path / "nowhere.yaml")
    for content, message in (
        ("- 1\n", "holds a list"),
        ("port: [\n", "is not YAML"),
        ("prot: 1\n", r"prot: there is no such setting; did you mean port\? \(from"),
    ):
        file = tmp_path / "c.yaml"
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            load({}, {}, file)


def test_a_misspelled_variable_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^TANDEM_DECODER: there is no such variable; did you mean TANDEM_DECODE\?$"):
        load({}, {"TANDEM_DECODER": "3"})
    with pytest.raises(ConfigError, match=r"^TANDEM_XYZZY: there is no such variable; unset it$"):
        load({}, {"TANDEM_XYZZY": ""})
    assert load({}, {"TANDEM_KERNELS": "torch", "TANDEM_REQUIRE": "model", "PORT": "1"}).config == load({}, {}).config


def test_an_empty_file_is_fine(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("")
    assert load({}, {}, file).config == load({}, {}).config


def test_mixed_workers_alone_are_enough() -> None:
    assert load({"prefill": 0, "decode": 0, "mixed": 1}, {}).config.num_workers == 1


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (8, 2), (96, 32)])
def test_workers_share_the_cores(cores: int, threads: int) -> None:
    assert load({}, {}).config.threads_per_worker(cores) == threads
    assert load({"threads": 5}, {}).config.threads_per_worker(cores) == 5


def test_run_dir(tmp_path: Path) -> None:
    assert default_run_dir({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "tandem"
    assert default_run_dir({"XDG_RUNTIME_DIR": "/nonexistent"}).parts[-3:] == (".cache", "tandem", "run")
