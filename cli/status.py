"""`tandem status`: workers, requests and moves of a running cluster, as tables or as JSON."""

from __future__ import annotations

import json

from rich.table import Table

from cli.options import AsJson, Port, RunDir, running_cluster
from cli.reach import admin
from cli.shown import console
from cluster.documents import plain
from cluster.run_file import RunFile
from tandem.v1 import admin_pb2 as pb

TIMEOUT_S = 10.0
WIDTH = 160  # where there is no terminal
NEWEST = 20  # requests shown
ID_CHARACTERS = 12  # of a request id shown: its end tells it apart


def status(
    port: Port = None,
    as_json: AsJson = False,
    run_dir: RunDir = None,
) -> None:
    """Show the workers of a running cluster and its requests, also those of the last minutes."""
    answer = ask(running_cluster(run_dir, port))
    if as_json:
        print(json.dumps(plain(answer), indent=2))
        return
    out = console(WIDTH)
    out.print(
        f"{answer.model} at {answer.http_address}, gRPC {answer.grpc_address}, router pid {answer.router_pid}"
        + (f", state in {answer.store}" if answer.store else "")
    )
    if answer.not_ready:
        out.print(f"not ready: {answer.not_ready}")
    if len(answer.routers) > 1:
        out.print(router_table(answer))
        out.print()
    out.print(worker_table(answer))
    if answer.requests:
        out.print()
        out.print(request_table(answer))
    if answer.moves:
        out.print()
        out.print(move_table(answer))


def ask(run: RunFile) -> pb.StatusResponse:
    """What the first router that answers says. Raises NoCluster, grpc.RpcError."""
    with admin(run) as stub:
        answer: pb.StatusResponse = stub.Status(pb.StatusRequest(include_finished=True), timeout=TIMEOUT_S)
    return answer


def router_table(answer: pb.StatusResponse) -> Table:
    """Routers, for people."""
    table = _table("router", "up", "pid", "internal", "workers", "requests")
    for router in answer.routers:
        table.add_row(
            router.id,
            "yes" if router.up else "no",
            str(router.pid) if router.up else "",
            router.address,
            str(len(router.workers_ready)) if router.up else "",
            str(router.num_requests) if router.up else "",
        )
    return table


def worker_table(answer: pb.StatusResponse) -> Table:
    """Workers, for people."""
    table = _table(
        "worker", "role", "state", "pid", "agent", "inc", "run", "wait", "exact", "KV used", "cached", "total"
    )
    for worker in answer.workers:
        blocks = worker.kv_blocks
        table.add_row(
            worker.id,
            worker.role,
            worker.state,
            str(worker.pid),
            str(worker.agent_pid),
            str(worker.incarnation),
            str(worker.running),
            str(worker.waiting),
            "yes" if worker.exact else "no",
            str(blocks.total - blocks.free - blocks.cached),
            str(blocks.cached),
            str(blocks.total),
        )
    return table


def request_table(answer: pb.StatusResponse) -> Table:
    """The newest requests, for people."""
    table = _table("request", "state", "prefill", "decode", "prompt", "tokens", "blocks moved", "TTFT")
    for request in answer.requests[-NEWEST:]:
        table.add_row(
            request.id[-ID_CHARACTERS:],
            request.state,
            request.prefill_worker,
            request.decode_worker,
            str(request.prompt_tokens),
            str(request.tokens),
            str(request.blocks_moved),
            f"{request.ttft_ms} ms" if request.HasField("ttft_ms") else "",
        )
    return table


def move_table(answer: pb.StatusResponse) -> Table:
    """The newest moves, for people."""
    table = _table("move of", "from", "to", "reason", "outcome", "rounds", "MB", "pause")
    for move in answer.moves[-NEWEST:]:
        table.add_row(
            move.request[-ID_CHARACTERS:],
            getattr(move, "from"),
            move.to,
            move.reason,
            move.outcome,
            str(move.rounds),
            f"{move.bytes / 1e6:.1f}",
            f"{move.pause_ms} ms" if move.outcome == "moved" else "",
        )
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table
