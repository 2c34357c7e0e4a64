"""What a cluster says of itself to people: what it starts, and how to use it once it is ready."""

from __future__ import annotations

import json

from cluster.config import ClusterConfig
from cluster.own_secrets import curl_flags
from cluster.run_file import reachable


def described(config: ClusterConfig, threads: int) -> str:
    """Model, mode and workers."""
    counts = [(config.prefill, "prefill"), (config.decode, "decode"), (config.mixed, "mixed")]
    workers = " + ".join(f"{count} {role}" for count, role in counts if count)
    exact = "exact" if config.exact else "fast"
    return f"{config.model} ({config.dtype}, {exact}) on {workers} workers of {threads} thread{'s' * (threads > 1)}"


def greeting(config: ClusterConfig, *, model: str, after_s: float) -> tuple[str, str]:
    """Where it is, and a command that works."""
    url = f"{config.scheme}://{reachable(config.host)}:{config.port}"
    grpc = f"{reachable(config.host)}:{config.grpc_port}"
    question = {"role": "user", "content": "What is the capital of France?"}
    body = json.dumps({"model": model, "messages": [question], "max_tokens": 32, "temperature": 0})
    return (
        f"Tandem is ready at {url} (gRPC {grpc}) after {after_s:.1f} s. Ctrl-C or `tandem down` stops it. Try:",
        f"  curl -s{curl_flags(config)} {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
    )
