"""What one worker process is told when it starts, and the environment that it must be started in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from cluster.config import ClusterConfig
from tandem.messages import Role
from tandem.request import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """One start of a worker: who it is, what it runs, where its routers are."""

    worker_id: WorkerId
    incarnation: int  # which start of this worker it is, from 1
    role: Role
    config: ClusterConfig
    threads: int
    registries: dict[str, str]  # host:port of each router's registry, by the router's name
    bind_host: str  # that its own services listen on
    log_file: str
    advertised_host: str = ""  # that its router and peers reach it at; empty: bind_host
    join_token: str = field(default="", repr=False)  # that it shows to router and peers, and asks of them
    router_gone_s: int = 60  # without a word from any registry the worker ends

    @property
    def reachable_host(self) -> str:
        """The address that others dial."""
        return self.advertised_host or self.bind_host

    def to_json(self) -> str:
        """The settings as text, for the way through an actor's arguments."""
        content = {name: getattr(self, name) for name in self.__slots__ if name != "config"}
        return json.dumps({**content, "config": self.config.model_dump(mode="json")})

    @classmethod
    def from_json(cls, text: str) -> WorkerSettings:
        """Reads `to_json` back."""
        content = json.loads(text)
        content["role"] = Role(content["role"])
        content["config"] = ClusterConfig.model_validate(content["config"])
        return cls(**content)


def workers_of(config: ClusterConfig) -> list[tuple[WorkerId, Role]]:
    """Every worker of the cluster with its role: prefill-0, decode-0, decode-1, ..."""
    counts = {Role.PREFILL: config.prefill, Role.DECODE: config.decode, Role.MIXED: config.mixed}
    return [(WorkerId(f"{role.value}-{number}"), role) for role, count in counts.items() for number in range(count)]


def worker_environment(threads: int) -> dict[str, str]:
    """Variables that must be set before a worker imports torch.

    Threads that wait must not spin: several workers share the cores (passive OpenMP threads, one pool each).
    """
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": "1",  # numpy's; nothing large runs there
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }
