"""A real cluster with API keys, mutual TLS and a join token: who gets in, who does not, and what the logs tell."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from certificates import Authority, Certificate
from served import Served, tandem, wait_until

from router.api_keys import digest_of
from tandem.client import Client
from tandem.cluster_access import PROTOCOL_VERSION, TOKEN_KEY, VERSION_KEY, ClusterAccess
from tandem.errors import Cancelled, RateLimited, Unauthenticated, Unavailable
from tandem.tls import load_tls
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ALICE, BOB, FEW = (f"tandem_{name}-secret-of-many-characters" for name in ("alice", "bob", "few"))
MARK = "xyzzy-marked-prompt-plugh"
KEYS = f"""
keys:
- name: alice
  sha256: {digest_of(ALICE).hex()}
  tenant: a
- name: bob
  sha256: {digest_of(BOB).hex()}
  tenant: b
- name: few
  sha256: {digest_of(FEW).hex()}
  requests_per_minute: 1
"""


class Secured(Served):
    """A fake cluster of one prefill and one decode worker with everything on."""

    def __init__(self, folder: Path) -> None:
        self.authority, self.strangers = Authority(folder), Authority(folder, "strangers")
        self.member, self.client_cert = self.authority.sign("member"), self.authority.sign("client")
        self.keys = folder / "keys.yaml"
        self.keys.write_text(KEYS)
        super().__init__(
            [
                "--model", "fake", "--prefill", "1", "--decode", "1", "--fake-step-ms", "20", "--transport", "gloo",
                "--log-level", "debug", "--api-keys", str(self.keys),
                "--tls-cert", str(self.member.cert), "--tls-key", str(self.member.key),
                "--tls-ca", str(self.authority.cert), "--tls-client-ca", str(self.authority.cert),
            ],
            run_dir=folder / "run",
        )  # fmt: skip

    @property
    def grpc_address(self) -> str:
        [line] = [line for line in self.lines if "is ready at" in line]
        return line.split("(gRPC ", 1)[1].split(")", 1)[0]

    def client(self, key: str, own: Certificate | None = None) -> Client:
        own = own or self.client_cert
        return Client(
            self.grpc_address, timeout_s=30, resume_s=0, api_key=key, ca=self.authority.cert, cert=own.cert, key=own.key
        )

    def http(self, key: str, own: Certificate | None = None) -> httpx.Client:
        own = own or self.client_cert
        context = ssl.create_default_context(cafile=self.authority.cert)
        context.load_cert_chain(own.cert, own.key)
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, verify=context, headers=headers, timeout=30)

    def generate(self, key: str, prompt: str, **fields: Any) -> Any:
        with self.client(key) as client:
            return client.generate(prompt, **{"max_tokens": 8, "temperature": 0.0, **fields})

    @property
    def token(self) -> str:
        return (self.run_dir / f"{self.port}.join-token").read_text().strip()

    def access_as(self, token: str, own: Certificate | None = None) -> ClusterAccess:
        own = own or self.member
        return ClusterAccess(token=token, tls=load_tls(ca=self.authority.cert, cert=own.cert, key=own.key))

    def logs(self) -> dict[str, str]:
        return {str(path): path.read_text(errors="replace") for path in self.run_dir.glob("*.logs/*")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    served = Secured(tmp_path_factory.mktemp("secured"))
    with served:
        yield served


def test_a_key_is_served_over_mutual_tls_by_both_apis(cluster: Secured) -> None:
    assert cluster.url.startswith("https://")
    text = cluster.generate(ALICE, "The sea is").text
    with cluster.http(BOB) as http:
        body = {"prompt": "The sea is", "max_tokens": 8, "temperature": 0}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == text


def test_nobody_gets_in_without_key_or_certificate(cluster: Secured) -> None:
    with pytest.raises(Unauthenticated, match="is not known here"):
        cluster.generate("tandem_of-nobody-at-all", "x")
    stranger = cluster.strangers.sign("client")
    with cluster.client(ALICE, stranger) as client, pytest.raises(Unavailable):
        client.models()
    with cluster.http(ALICE, stranger) as http, pytest.raises((httpx.HTTPError, ssl.SSLError)):
        http.get("/v1/models")


def test_over_its_limit_a_key_is_told_when_to_come_again(cluster: Secured) -> None:
    cluster.generate(FEW, "x")
    with pytest.raises(RateLimited, match="requests_per_minute") as caught:
        cluster.generate(FEW, "x")
    assert 1000 < caught.value.retry_after_ms <= 60_000


def test_tenants_share_no_prefix_and_get_the_same_tokens(cluster: Secured) -> None:
    """What is cached for one is neither used for the other nor seen in its usage; tokens are the same."""
    prompt = "A prefix of several blocks that only Alice has asked about before, at length. " * 2
    first, again, others, theirs = (cluster.generate(key, prompt) for key in (ALICE, ALICE, BOB, BOB))
    assert [each.usage.cached_tokens > 0 for each in (first, again, others, theirs)] == [False, True, False, True]
    assert len({each.token_ids for each in (first, again, others, theirs)}) == 1
    with cluster.http(ALICE) as http:
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "cache_salt": "own"}
        cached = [
            http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            for _ in range(2)
        ]
    assert cached[0] == 0 < cached[1]


def test_commands_of_this_user_reach_the_cluster_and_others_need_an_operators_key(cluster: Secured) -> None:
    assert {worker["state"] for worker in cluster.status_printed()["workers"]} == {"ready"}
    refused = tandem("status", "--port", str(cluster.port), "--run-dir", str(cluster.run_dir), TANDEM_API_KEY=ALICE)
    assert refused.returncode == 1
    assert "key 'alice' is no operator's" in refused.stderr
    assert stat.S_IMODE(os.stat(cluster.run_dir / f"{cluster.port}.join-token").st_mode) == 0o600


STRANGER = pb.RegisterRequest(
    worker_id="stranger-0", role="decode", control="127.0.0.1:1", endpoint="e", pid=1, agent_pid=1, model="fake",
    namespace="fake", fingerprint="fake", dtype="float32", block_size=16, total_blocks=8, context_tokens=9,
    block_bytes=10, incarnation=1,
)  # fmt: skip


def registering(cluster: Secured, access: ClusterAccess, request: pb.RegisterRequest, **metadata: str) -> Any:
    """What the registry answers, or the error that the call ends with."""
    internal = cluster.status()["routers"][0]["address"]

    async def ask() -> Any:
        shown = [(key, metadata.get(key, value)) for key, value in access.metadata if metadata.get(key) != ""]
        async with access.dial(internal) as channel:
            stub = worker_pb2_grpc.RegistryStub(channel)  # type: ignore[no-untyped-call]
            try:
                return await stub.Register(request, metadata=shown, timeout=5)
            except grpc.aio.AioRpcError as error:
                return error

    return asyncio.run(ask())


def test_a_worker_that_does_not_belong_is_refused_by_name(cluster: Secured) -> None:
    known = {worker["id"] for worker in cluster.status()["workers"]}
    good = cluster.access_as(cluster.token)
    for access, changed, code, words in (
        (cluster.access_as("of-another-cluster-0000"), {}, "UNAUTHENTICATED", "is not the one of this cluster"),
        (good, {TOKEN_KEY: ""}, "UNAUTHENTICATED", "is missing; only members"),
        (good, {VERSION_KEY: ""}, "FAILED_PRECONDITION", "tandem-protocol: is missing"),
        (good, {VERSION_KEY: "999"}, "FAILED_PRECONDITION", f"is '999', this member speaks {PROTOCOL_VERSION}"),
        (cluster.access_as(cluster.token, cluster.strangers.sign("worker")), {}, "UNAVAILABLE", ""),
    ):
        error = registering(cluster, access, STRANGER, **changed)
        assert (error.code().name, words in str(error.details())) == (code, True), error
    for field, value, words in (
        ("model", "other", "runs the model 'other', this cluster serves 'fake'"),
        ("namespace", "other", "one cluster serves one model"),
        ("block_bytes", 10, "has block_bytes 10, but"),
    ):
        request = pb.RegisterRequest()
        request.CopyFrom(STRANGER)
        setattr(request, field, value)
        assert words in registering(cluster, good, request).refused, field
    assert {worker["id"] for worker in cluster.status()["workers"]} == known
    with cluster.http(BOB) as http:
        page = http.get("/metrics").text
    assert 'tandem_router_refused_strangers_requests_total{router="router-0"} 4.0' in page


def test_a_stranger_can_neither_assign_nor_offer_to_a_worker(cluster: Secured) -> None:
    control = control_of(cluster, "decode-0")

    async def ask(access: ClusterAccess, method: str) -> grpc.StatusCode:
        async with access.dial(control) as channel:
            bare: Any = channel  # the type hints want serializers, gRPC does not
            call = bare.stream_stream(method)(metadata=access.metadata, timeout=5)
            code: grpc.StatusCode = await call.code()
            return code

    for method in ("/tandem.v1.Worker/Connect", "/tandem.v1.Transfer/Exchange"):
        code = asyncio.run(ask(cluster.access_as("of-another-cluster-0000"), method))
        assert code is grpc.StatusCode.UNAUTHENTICATED, method
        unsigned = cluster.access_as(cluster.token, cluster.strangers.sign("peer"))
        assert asyncio.run(ask(unsigned, method)) is grpc.StatusCode.UNAVAILABLE, method
    assert cluster.generate(ALICE, "still served").finish is not None


def control_of(cluster: Secured, worker_id: str) -> str:
    """Where a worker's gRPC services listen: the port that its process holds."""
    import psutil

    pid = cluster.workers()[worker_id]["pid"]
    ports = [each.laddr.port for each in psutil.Process(pid).net_connections("tcp") if each.status == "LISTEN"]

    async def is_ours(port: int) -> bool:
        access = cluster.access_as(cluster.token)
        async with access.dial(f"127.0.0.1:{port}") as channel:
            try:
                await asyncio.wait_for(channel.channel_ready(), 2)
            except TimeoutError:
                return False
            return True

    [port] = [port for port in ports if asyncio.run(is_ours(port))]
    return f"127.0.0.1:{port}"


def test_a_key_that_is_revoked_ends_its_streams_and_a_new_one_works_within_seconds(cluster: Secured) -> None:
    made = tandem("keys", "create", "carol", "--file", str(cluster.keys))
    assert made.returncode == 0, made.stderr
    carol = made.stdout.splitlines()[0].rsplit(" ", 1)[1]
    wait_until(lambda: serves(cluster, carol), 15)
    with cluster.client(carol) as client:
        stream = client.stream("Once upon a time", max_tokens=4000, ignore_eos=True)
        next(stream)
        assert tandem("keys", "revoke", "carol", "--file", str(cluster.keys)).returncode == 0
        with pytest.raises(Cancelled, match="the API key 'carol' is revoked"):
            for _ in stream:
                pass
    assert not serves(cluster, carol)
    assert serves(cluster, ALICE)


def serves(cluster: Secured, key: str) -> bool:
    try:
        cluster.generate(key, "x", max_tokens=1)
    except Unauthenticated:
        return False
    return True


def test_a_key_file_half_written_takes_no_key_from_anybody(cluster: Secured) -> None:
    whole = cluster.keys.read_text()
    cluster.keys.write_text(whole[: whole.index("sha256") + 20])
    wait_until(lambda: any("the API keys stay as they were" in text for text in cluster.logs().values()), 15)
    assert serves(cluster, ALICE)
    assert serves(cluster, BOB)
    cluster.keys.write_text(whole)


def test_logs_hold_no_prompt_no_answer_no_key_and_no_token(cluster: Secured) -> None:
    """Even at level debug. The prompt travels as text and as ids, over both APIs, and through a handoff."""
    answer = cluster.generate(ALICE, MARK, max_tokens=24)
    with cluster.http(BOB) as http:
        http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": MARK}], "max_tokens": 4})
        http.post("/v1/completions", json={"prompt": MARK, "max_tokens": -1})  # refused, with an error
        http.post("/v1/completions", content=b'{"prompt": "' + MARK.encode())
    with pytest.raises(Unauthenticated):
        cluster.generate("tandem_wrong-" + MARK, MARK)
    ids = ", ".join(str(each) for each in MARK.encode()[:6])
    secrets = [MARK, ids, ALICE, BOB, cluster.token, ", ".join(map(str, answer.token_ids[:6]))]
    logs = {**cluster.logs(), "terminal": "\n".join(cluster.lines)}
    assert len(logs) >= 5
    assert any("request=" in text or "worker=" in text for text in logs.values()), "the logs say nothing at all"
    for secret in secrets:
        assert len(secret) > 8
        assert [name for name, text in logs.items() if secret in text] == []
    for process in cluster.tree():
        shown = " ".join(process.cmdline())
        assert not [secret for secret in secrets if secret in shown], "a secret is on a command line"
    json.dumps(cluster.status())
