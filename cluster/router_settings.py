"""What one router process is told when it starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from cluster.config import ClusterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """One router: who it is, what it serves, where it and the others are."""

    router_id: str
    config: ClusterConfig
    listener: int  # file descriptor of the HTTP socket, which all routers share
    join_token: str = field(repr=False)  # that members of the cluster show each other
    internal: dict[str, str]  # host:port for workers and routers, of each router by its name, this one among them

    @property
    def number(self) -> int:
        """Its place among the routers, from 0."""
        return list(self.internal).index(self.router_id)

    @property
    def internal_port(self) -> int:
        """The port of its own for workers and routers."""
        return int(self.internal[self.router_id].rsplit(":", 1)[1])

    def to_json(self) -> str:
        """The settings as one line."""
        content = {name: getattr(self, name) for name in self.__slots__ if name != "config"}
        return json.dumps({**content, "config": self.config.model_dump(mode="json")})

    @classmethod
    def from_json(cls, text: str | bytes) -> RouterSettings:
        """Reads `to_json` back."""
        content = json.loads(text)
        content["config"] = ClusterConfig.model_validate(content["config"])
        return cls(**content)
