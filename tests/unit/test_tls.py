"""TLS and mutual TLS on HTTP, on gRPC and among members: who gets in, who does not, and what is found before."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import psutil
import pytest
from certificates import Authority, Certificate
from edge import MODEL, saying, service_over

from cluster.run_file import RunFile, write
from router.api_keys import KeyEntry, KeyRing, digest_of
from router.door import Door
from router.grpc_api import build_grpc_server
from router.http_server import serve_http
from router.listener import listen
from router.openai_api import build_app
from tandem.client import AsyncClient, Client
from tandem.errors import Unavailable
from tandem.tls import TlsError, check_members, load_tls, server_context

DEADLINE_S = 20
TEXT = "The sea is calm."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def other(folder: Path) -> Authority:
    return Authority(folder, "other")


@pytest.fixture(scope="module")
def member(authority: Authority) -> Certificate:
    return authority.sign("member")


Case = Callable[[str, str], Awaitable[None]]


def run(member: Certificate, client_ca: Path | None, case: Case) -> None:
    """Both APIs over TLS; `case` gets the HTTP address and the gRPC target."""

    async def main() -> None:
        service = service_over(saying(TEXT))
        tls = load_tls(ca=client_ca, cert=member.cert, key=member.key)
        grpc_server = build_grpc_server(service)
        grpc_port = await grpc_server.start("127.0.0.1", 0, tls.server_credentials(tls.ca))
        context = server_context(cert=member.cert, key=member.key, client_ca=client_ca)
        server = await serve_http(build_app(service), listener=listen("127.0.0.1", 0), grace_s=1, tls=context)
        try:
            await case(f"https://127.0.0.1:{server.port}", f"127.0.0.1:{grpc_port}")
        finally:
            await server.stop()
            await grpc_server.stop(0.2)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def trusting(ca: Path, own: Certificate | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    return context


async def health(url: str, context: ssl.SSLContext) -> int:
    async with httpx.AsyncClient(base_url=url, verify=context, timeout=DEADLINE_S) as client:
        return (await client.get("/live")).status_code


def test_both_apis_speak_tls(authority: Authority, member: Certificate) -> None:
    async def case(url: str, target: str) -> None:
        assert await health(url, trusting(authority.cert)) == 200
        async with AsyncClient(target, timeout_s=DEADLINE_S, ca=authority.cert) as client:
            assert (await client.generate("x", max_tokens=64)).text == TEXT

        def plain() -> str:
            with Client(target, timeout_s=DEADLINE_S, ca=authority.cert) as client:
                return client.generate("x", max_tokens=64).text

        assert await asyncio.to_thread(plain) == TEXT

    run(member, None, case)


def test_a_client_that_trusts_another_authority_does_not_talk(other: Authority, member: Certificate) -> None:
    async def case(url: str, target: str) -> None:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await health(url, trusting(other.cert))
        async with AsyncClient(target, timeout_s=1, resume_s=0, ca=other.cert) as client:
            with pytest.raises(Unavailable):
                await client.models()

    run(member, None, case)


def test_plain_clients_get_nowhere_and_harm_nobody(authority: Authority, member: Certificate) -> None:
    async def case(url: str, target: str) -> None:
        with pytest.raises(httpx.HTTPError):
            async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
                await client.get(url.replace("https", "http") + "/live")
        async with AsyncClient(target, timeout_s=1, resume_s=0) as client:
            with pytest.raises(Unavailable):
                await client.models()
        assert await health(url, trusting(authority.cert)) == 200

    run(member, None, case)


def test_with_a_client_authority_only_its_clients_get_in(authority: Authority, other: Authority) -> None:
    good, wrong = authority.sign("client"), other.sign("stranger")
    expired = authority.sign("old-client", days=-1)

    async def case(url: str, target: str) -> None:
        assert await health(url, trusting(authority.cert, good)) == 200
        async with AsyncClient(target, ca=authority.cert, cert=good.cert, key=good.key) as client:
            assert await client.models()
        for bad in (None, wrong, expired):
            with pytest.raises((httpx.HTTPError, ssl.SSLError)):
                await health(url, trusting(authority.cert, bad))
            files = {} if bad is None else {"cert": bad.cert, "key": bad.key}
            async with AsyncClient(target, timeout_s=1, resume_s=0, ca=authority.cert, **files) as client:  # type: ignore[arg-type]
                with pytest.raises(Unavailable):
                    await client.models()

    run(authority.sign("server"), authority.cert, case)


def test_an_expired_certificate_of_the_server_is_not_taken(authority: Authority) -> None:
    async def case(url: str, target: str) -> None:
        with pytest.raises(httpx.ConnectError, match="expired"):
            await health(url, trusting(authority.cert))
        async with AsyncClient(target, timeout_s=1, resume_s=0, ca=authority.cert) as client:
            with pytest.raises(Unavailable):
                await client.models()

    run(authority.sign("old", days=-1), None, case)


def test_a_client_that_never_finishes_its_handshake_is_cut_off(
    authority: Authority, member: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.http_server._HANDSHAKE_TIMEOUT_S", 0.3)

    async def case(url: str, target: str) -> None:
        host, port = url.removeprefix("https://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x16\x03\x01")
        assert await reader.read() == b"", "the server hangs up"
        writer.close()
        assert await health(url, trusting(authority.cert)) == 200

    run(member, None, case)


def test_certificates_that_do_not_go_together_are_found_before_anything_listens(
    authority: Authority, other: Authority, member: Certificate, tmp_path: Path
) -> None:
    check_members(ca=authority.cert, cert=member.cert, key=member.key)
    expired, stranger = authority.sign("late", days=-1), other.sign("far")
    servers_only = authority.sign("servers-only", usage="serverAuth")
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
    for ca, cert, key, words in (
        (authority.cert, expired.cert, expired.key, "certificate has expired"),
        (authority.cert, stranger.cert, stranger.key, "unable to get local issuer|self.signed"),
        (authority.cert, member.cert, stranger.key, "KEY_VALUES_MISMATCH|key values mismatch"),
        (authority.cert, servers_only.cert, servers_only.key, "purpose"),
        (authority.cert, junk, member.key, "junk.pem"),
        (authority.cert, tmp_path / "none.pem", member.key, "none.pem"),
        (tmp_path / "none.pem", member.cert, member.key, "none.pem"),
    ):
        with pytest.raises(TlsError, match=words):
            check_members(ca=ca, cert=cert, key=key)
    with pytest.raises(TlsError, match="go together"):
        load_tls(ca=None, cert=member.cert, key=None)
    with pytest.raises(TlsError, match="No such file"):
        load_tls(ca=tmp_path / "none.pem", cert=None, key=None)
    assert "PRIVATE" not in repr(load_tls(ca=authority.cert, cert=member.cert, key=member.key))


def test_bench_shows_the_key_of_its_environment_and_trusts_the_clusters_authority(
    authority: Authority, tmp_path: Path
) -> None:
    key = "tandem_a-key-of-many-characters"
    named = authority.sign("named", names="DNS:tandem.test")  # to a name that is not the address

    def bench(**more: str) -> subprocess.CompletedProcess[str]:
        words = ["bench", "--requests", "2", "--rate", "50", "--prompt-tokens", "8", "--output-tokens", "4", "--json"]
        arguments = [sys.executable, "-m", "cli.main", *words, "--run-dir", str(tmp_path)]
        return subprocess.run(arguments, env={**os.environ, **more}, capture_output=True, text=True, timeout=60)

    async def main() -> None:
        service = service_over(saying(TEXT))
        service.door = Door(KeyRing([KeyEntry(name="alice", digest=digest_of(key))]))
        tls = load_tls(ca=authority.cert, cert=named.cert, key=named.key)
        server = build_grpc_server(service)
        port = await server.start("127.0.0.1", 0, tls.server_credentials(tls.ca))
        run = RunFile(
            pid=os.getpid(), started_s=psutil.Process().create_time(), host="127.0.0.1", port=1, grpc_port=port,
            model=MODEL, log_dir="", tls_ca=str(authority.cert), tls_cert=str(named.cert), tls_key=str(named.key),
            tls_name="tandem.test",
        )  # fmt: skip
        write(tmp_path, run)
        good = await asyncio.to_thread(bench, TANDEM_API_KEY=key)
        assert good.returncode == 0, good.stderr
        assert json.loads(good.stdout)["completed"] == 2, good.stdout
        without = await asyncio.to_thread(bench)
        assert (without.returncode, "error: authorization: is missing" in without.stderr) == (1, True), without.stderr
        await server.stop(0.2)

    asyncio.run(asyncio.wait_for(main(), 120))
