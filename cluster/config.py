"""The settings of a cluster: one tree from flags, TANDEM_* variables, a YAML file and defaults, in that precedence."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from tandem.errors import CommandError
from tandem.near_miss import did_you_mean

ENVIRONMENT_PREFIX = "TANDEM_"
# Variables that are no settings of a cluster: the settings file, the kernels' choice, a client's key, two of tests.
OTHER_VARIABLES = frozenset({"CONFIG", "KERNELS", "REQUIRE", "HANDOFF_SEEDS", "API_KEY"})
MiB = 1 << 20
REDIS_SCHEMES = ("redis", "rediss", "unix")
WILDCARDS = ("0.0.0.0", "::")
KV_MEMORY_LEAST = 16 << 10  # far too little for a real model, which then says how large one block is
DEFAULT_MODEL = "smollm2-135m-instruct"
FAKE_MODEL = "fake"  # next token = hash of the prefix: no weights, for tests of everything but the numbers
FAKE_CONTEXT_TOKENS = 8192
FAKE_VOCAB_SIZE = 256  # one token a byte


class ConfigError(CommandError, ValueError):
    """A setting cannot be used; the message names its key, its value, where it came from and the limit."""

    exit_status = 2


class ClusterConfig(BaseModel):
    """What `tandem serve` runs. Each key is a flag, a TANDEM_ variable and a key of the YAML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(DEFAULT_MODEL, min_length=1, description="model folder, GGUF file, Hugging Face id or name")
    host: str = Field("127.0.0.1", min_length=1, description="address that HTTP and gRPC listen on")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 picks a free one")
    grpc_port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 picks a free one")

    prefill: int = Field(1, ge=0, le=64, description="number of prefill workers")
    decode: int = Field(2, ge=0, le=64, description="number of decode workers")
    mixed: int = Field(0, ge=0, le=64, description="number of workers that do both")
    routers: int = Field(1, ge=1, le=16, description="router processes behind the one address; several need redis")

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="data type of weights and KV")
    exact: bool = Field(True, description="the same tokens whatever happens to a request")
    kv_memory: ByteSize = Field(
        ByteSize(512 * MiB), ge=KV_MEMORY_LEAST, description="KV memory of each worker, e.g. 512MiB"
    )
    swap_memory: ByteSize | None = Field(
        None, description="memory of each worker that KV is swapped out to; 0: none; default: a quarter of kv_memory"
    )
    block_size: int = Field(16, ge=1, le=256, description="token slots of a KV block")
    chunk_tokens: int = Field(256, ge=1, le=65536, description="tokens of a prefill chunk")
    max_tokens_per_step: int = Field(512, ge=1, le=65536, description="token budget of one step")
    max_rows: int = Field(64, ge=1, le=4096, description="sequences in one step")
    threads: int = Field(0, ge=0, le=1024, description="compute threads of a worker; 0: its share of the cores")
    transport: Literal["auto", "shm", "gloo"] = Field("auto", description="how KV blocks move between workers")
    frame_tags: Literal["auto", "always", "never"] = Field(
        "auto", description="keyed tags on KV bytes between agents; auto: where they leave the host"
    )
    prefix_cache: bool = Field(True, description="keep KV blocks for requests that begin alike")
    local_prefill_tokens: int = Field(
        256, ge=0, le=1 << 20, description="a decode worker that knows a prompt best prefills a rest this short itself"
    )
    fence_blocks: int = Field(
        0, ge=0, le=1 << 20, description="full blocks that are copied while a moved request stands still, at most"
    )
    rebalance: bool = Field(True, description="running requests move between workers where that helps them or others")

    api_keys: Path | None = Field(None, description="YAML file of API keys; without it everybody may ask")
    tls_cert: Path | None = Field(None, description="PEM certificate of HTTP and gRPC, and of the members' own gRPC")
    tls_key: Path | None = Field(None, description="PEM key of tls_cert")
    tls_ca: Path | None = Field(None, description="PEM authority of tls_cert, by which members know each other")
    tls_client_ca: Path | None = Field(None, description="PEM authority; only clients that it signed may connect")
    tls_name: str = Field("", description="name in the members' certificates; empty: the address that is dialled")
    join_token_file: Path | None = Field(
        None, description="file with the token that workers join with; without it each start makes one"
    )

    redis: str = Field(
        "",
        description="Redis in which routers keep their streams, e.g. redis://127.0.0.1:6379/0; empty: nothing is kept",
    )
    redis_prefix: str = Field(
        "tandem", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="what the keys in Redis begin with: one a cluster"
    )

    address: str = Field("", description="address of a running Ray cluster; empty: start a local one")
    worker_host: str = Field("", description="address that workers are reached at; empty: chosen")
    heartbeat_ms: int = Field(1000, ge=50, le=60_000, description="time between a worker's heartbeats")
    dead_after_misses: int = Field(3, ge=2, le=100, description="heartbeats missed until a worker is dead")
    stall_ms: int = Field(3500, ge=100, le=600_000, description="a worker with work that gets nowhere so long is dead")
    max_restarts: int = Field(5, ge=0, le=1000, description="restarts of one worker, or of one router, in ten minutes")
    start_timeout_s: int = Field(120, ge=1, le=3600, description="time until all must be ready")
    stop_timeout_s: int = Field(10, ge=1, le=600, description="time for an orderly stop")
    restart_delay_max_ms: int = Field(
        30_000, ge=500, le=600_000, description="the longest wait before what dies again and again is started again"
    )
    allow_faults: bool = Field(False, description="workers take faults over gRPC, for `tandem chaos`: never in earnest")
    fake_step_ms: int = Field(0, ge=0, le=10_000, description="time of one step of the model `fake`")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="level of the log files")
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://[^/\s]+(:\d+)?)?$",
        description="OpenTelemetry collector that spans go to over HTTP, e.g. http://127.0.0.1:4318; empty: nowhere",
    )
    trace_share: float = Field(1.0, ge=0, le=1, description="share of the requests without a trace that get one")
    log_format: Literal["text", "json"] = Field("text", description="lines of the log files")
    run_dir: Path = Field(
        default_factory=lambda: default_run_dir(os.environ), description="folder of run files and logs"
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("api_keys", "tls_cert", "tls_key", "tls_ca", "tls_client_ca", "join_token_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.absolute()  # processes of the cluster have folders of their own

    @model_validator(mode="after")
    def _secure(self) -> ClusterConfig:
        given = [name for name in ("tls_cert", "tls_key", "tls_ca") if getattr(self, name) is not None]
        if len(given) in (1, 2):
            missing = ", ".join(sorted({"tls_cert", "tls_key", "tls_ca"} - set(given)))
            raise ValueError(f"{missing}: missing, {' and '.join(given)} alone cannot be used")
        if self.tls_client_ca is not None and not given:
            raise ValueError(
                "tls_client_ca: asks for certificates of clients, which needs tls_cert, tls_key and tls_ca"
            )
        return self

    @field_validator("redis")
    @classmethod
    def _is_redis(cls, value: str) -> str:
        return check_url(value) if value else value

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterConfig:
        if self.mixed == 0 and self.prefill == 0:
            raise ValueError("prefill: 0 workers can read prompts; give prefill or mixed at least 1")
        if self.mixed == 0 and self.decode == 0:
            raise ValueError("decode: 0 workers can write tokens; give decode or mixed at least 1")
        if self.chunk_tokens % self.block_size:
            raise ValueError(f"chunk_tokens: {self.chunk_tokens} is no multiple of block_size, {self.block_size}")
        if self.max_tokens_per_step < self.chunk_tokens:
            raise ValueError(
                f"max_tokens_per_step: {self.max_tokens_per_step} is less than chunk_tokens, {self.chunk_tokens}"
            )
        if self.worker_host in WILDCARDS:
            raise ValueError(
                f"worker_host: {self.worker_host} is no address that others reach; leave it empty or name one"
            )
        if self.routers > 1 and not self.redis:
            raise ValueError(f"routers: {self.routers} routers share their state; give redis a URL, or routers 1")
        if self.port == self.grpc_port != 0:
            raise ValueError(f"grpc_port: {self.grpc_port} is the HTTP port too")
        return self

    def without_store(self) -> ClusterConfig:
        """For parts that have nothing to do with the store: none of them needs its password."""
        return self.model_copy(update={"routers": 1, "redis": ""})

    @property
    def swap_bytes(self) -> int:
        """Host memory of each worker that KV is swapped out to: a quarter of its KV memory unless it is set."""
        return int(self.kv_memory) // 4 if self.swap_memory is None else int(self.swap_memory)

    @property
    def num_workers(self) -> int:
        """Workers of all roles."""
        return self.prefill + self.decode + self.mixed

    @property
    def scheme(self) -> str:
        """Of the HTTP address."""
        return "http" if self.tls_cert is None else "https"

    def threads_per_worker(self, cores: int) -> int:
        """Compute threads of one worker on a machine of `cores` cores: never more busy threads than cores in all."""
        return self.threads or max(1, cores // self.num_workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """A validated configuration and where each of its keys came from."""

    config: ClusterConfig
    origins: dict[str, str]  # key -> "flag --port", "TANDEM_PORT", the file's name or "default"


def default_run_dir(environ: Mapping[str, str]) -> Path:
    """Where run files live: XDG_RUNTIME_DIR/tandem, else ~/.cache/tandem/run."""
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "tandem"
    return Path.home() / ".cache" / "tandem" / "run"


def flag_of(key: str) -> str:
    """The command-line flag of a key."""
    return "--" + key.replace("_", "-")


def load(flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None = None) -> Effective:
    """Composes the settings. `flags` holds only those given; `file` falls back to TANDEM_CONFIG.

    Raises ConfigError naming the key, its value, its origin and the limit.
    """
    known = ClusterConfig.model_fields
    refuse_unknown_variables(environ)
    values: dict[str, object] = {}
    origins = dict.fromkeys(known, "default")
    if file is None and environ.get(ENVIRONMENT_PREFIX + "CONFIG"):
        file = Path(environ[ENVIRONMENT_PREFIX + "CONFIG"])
    if file is not None:
        for key, value in read_file(file).items():
            values[key], origins[key] = value, str(file)
    for key in known:
        variable = ENVIRONMENT_PREFIX + key.upper()
        if environ.get(variable, "") != "":
            values[key], origins[key] = environ[variable], variable
    for key, value in flags.items():
        if key not in known:
            raise ConfigError(f"{flag_of(key)}: there is no such setting{did_you_mean(key, known)}")
        values[key], origins[key] = value, f"flag {flag_of(key)}"
    try:
        return Effective(config=ClusterConfig.model_validate(values), origins=origins)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(dict(detail), origins) for detail in error.errors())) from None


def read_file(file: Path) -> dict[str, object]:
    """The keys of a YAML file. Raises ConfigError when it cannot be read, is no mapping or has an unknown key."""
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"config: cannot read {file}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {file} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config: {file} holds a {type(content).__name__}, not keys and values")
    result = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in result:
        if key not in ClusterConfig.model_fields:
            raise ConfigError(
                f"{key}: there is no such setting{did_you_mean(key, ClusterConfig.model_fields)} (from {file})"
            )
    return result


def refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """A misspelled variable would have no effect, silently. Raises ConfigError."""
    known = {key.upper() for key in ClusterConfig.model_fields} | OTHER_VARIABLES
    for name in sorted(each for each in environ if each.startswith(ENVIRONMENT_PREFIX)):
        key = name.removeprefix(ENVIRONMENT_PREFIX)
        if key not in known:
            hint = did_you_mean(key, sorted(known), prefix=ENVIRONMENT_PREFIX) or "; unset it"
            raise ConfigError(f"{name}: there is no such variable{hint}")


def _sentence(detail: dict[str, Any], origins: Mapping[str, str]) -> str:
    """One line of a validation error: key, value, what is wrong, origin."""
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not detail["loc"]:
        return message  # a rule over several keys names them itself
    key = str(detail["loc"][0])
    shown = (
        without_password(detail["input"]) if key == "redis" and isinstance(detail["input"], str) else detail["input"]
    )
    hint = did_you_mean(str(shown), _choices(key))
    return f"{key}: {shown!r}: {message[0].lower()}{message[1:]}{hint} (from {origins[key]})"


def _choices(key: str) -> tuple[str, ...]:
    """The words that a setting takes; none where it takes others than words."""
    return tuple(each for each in get_args(ClusterConfig.model_fields[key].annotation) if isinstance(each, str))


def check_url(url: str) -> str:
    """The address, when it is one of Redis. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in REDIS_SCHEMES or not (parts.netloc or parts.path):
        raise ValueError(f"must be redis://host:port/database, rediss:// or unix://, is {without_password(url)!r}")
    return url


def without_password(url: str) -> str:
    """The address as it may be shown and logged, also where it is none: a password may hold what no address may."""
    scheme, mark, rest = url.partition("://")
    user, at, place = rest.rpartition("@")
    if ":" in user:
        user = f"{user.partition(':')[0]}:***"
    return scheme + mark + re.sub(r"(?i)(password=)[^&]*", r"\1***", user + at + place)
