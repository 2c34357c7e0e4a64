"""The times of gRPC between router and workers: both ends notice a peer that vanished, and allow each other's pings."""

from __future__ import annotations

import inspect

import pytest

from cluster.worker_host import SERVER_OPTIONS
from router.clients import CHANNEL_OPTIONS
from router.grpc_api import _OPTIONS
from tandem.client import AsyncClient

GONE_WITHIN_MS = 20_000


@pytest.mark.parametrize("options", [SERVER_OPTIONS, CHANNEL_OPTIONS], ids=["worker", "router"])
def test_a_peer_that_vanished_is_noticed(options: list[tuple[str, int]]) -> None:
    """keepalive_timeout_ms alone leaves a ping a minute."""
    times = dict(options)
    assert times["grpc.http2.ping_timeout_ms"] == times["grpc.keepalive_timeout_ms"]
    assert times["grpc.keepalive_time_ms"] + times["grpc.http2.ping_timeout_ms"] <= GONE_WITHIN_MS
    assert times["grpc.keepalive_permit_without_calls"] == 1
    assert times["grpc.http2.max_pings_without_data"] == 0


def test_the_workers_server_allows_the_routers_pings_and_bounds_a_handshake() -> None:
    server, channel = dict(SERVER_OPTIONS), dict(CHANNEL_OPTIONS)
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < channel["grpc.keepalive_time_ms"]
    assert server["grpc.server_handshake_timeout_ms"] <= GONE_WITHIN_MS


def test_the_routers_server_gives_up_no_call_before_its_client_does() -> None:
    """gRPC's own default ends one that nobody has taken for 30 s."""
    clients_s = inspect.signature(AsyncClient).parameters["timeout_s"].default
    assert dict(_OPTIONS)["grpc.server_max_unrequested_time_in_server"] > clients_s
