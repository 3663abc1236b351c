"""Clients that people use, against a running proxy: curl, http.client, openssl, and the websockets library at both ends."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.proxy import ADMIN, HELLO, PATIENCE, Proxy, cluster, listener


def config(routes: str, *, clusters: str = "", extra: str = "") -> str:
    """A bootstrap with one listener."""
    text = listener(0, routes)
    if extra:
        text = text.replace("          stat_prefix: l1\n", f"          stat_prefix: l1\n          {extra}\n")
    return f"{ADMIN}static_resources:\n  listeners:{text}  clusters:{clusters or ' []'}\n"


@pytest.fixture
def hello(tmp_path: Path):
    """A proxy that answers everything with `hello`; its port."""
    with Proxy(tmp_path, config(HELLO), "--concurrency", "1") as proxy:
        yield proxy.port()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_reuses_its_connection_and_sees_head_and_http_10(hello: int):
    url = f"http://127.0.0.1:{hello}/"
    out = subprocess.run(["curl", "-sv", url, url], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert out.stdout == "hellohello"
    assert "Re-using existing connection" in out.stderr
    head = subprocess.run(["curl", "-sI", url], capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    assert head.startswith("HTTP/1.1 200 OK")
    assert "content-length: 5" in head
    old = subprocess.run(["curl", "-s0", "-o", "/dev/null", "-w", "%{http_code}", url], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert old.stdout == "426"


def test_http_client_stays_on_one_connection(hello: int):
    connection = http.client.HTTPConnection("127.0.0.1", hello, timeout=PATIENCE)
    for number in range(3):
        connection.request("GET", f"/{number}")
        sock = connection.sock
        response = connection.getresponse()
        assert (response.status, response.read(), response.getheader("server")) == (200, b"hello", "envoy")
        assert connection.sock is sock
    connection.close()


def test_websockets_through_the_proxy(tmp_path: Path):
    websockets = pytest.importorskip("websockets.asyncio.client")
    server_module = pytest.importorskip("websockets.asyncio.server")

    async def echo(connection) -> None:
        async for message in connection:
            await connection.send(message)

    async def run() -> list[object]:
        async with server_module.serve(echo, "127.0.0.1", 0) as server:
            upstream = server.sockets[0].getsockname()[1]
            text = config("{match: {prefix: /}, route: {cluster: c}}", clusters=cluster("c", upstream), extra="upgrade_configs: [{upgrade_type: websocket}]")
            loop = asyncio.get_running_loop()
            proxy = await loop.run_in_executor(None, lambda: Proxy(tmp_path, text, "--concurrency", "1"))
            with proxy:
                port = await loop.run_in_executor(None, proxy.port)
                async with websockets.connect(f"ws://127.0.0.1:{port}/chat", proxy=None) as client:
                    answers = []
                    for message in ("short", b"\x00\x01", "x" * 200_000):
                        await client.send(message)
                        answers.append(await client.recv())
                    return answers

    assert asyncio.run(run()) == ["short", b"\x00\x01", "x" * 200_000]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_s_client_speaks_tls_13(tmp_path: Path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost"]
        + ["-keyout", str(key), "-out", str(cert), "-days", "2"],
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    tls = (
        "      transport_socket:\n        name: tls\n        typed_config:\n"
        '          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext\n'
        f"          common_tls_context: {{tls_certificates: [{{certificate_chain: {{filename: {cert}}}, private_key: {{filename: {key}}}}}]}}\n"
    )
    text = config(HELLO)
    text = text.replace("  clusters:", tls + "  clusters:", 1)
    request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with Proxy(tmp_path, text, "--concurrency", "1") as proxy:
        out = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{proxy.port()}", "-servername", "localhost", "-ign_eof", "-tls1_3"],
            input=request,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    assert b"HTTP/1.1 200 OK" in out.stdout
    assert b"\r\n\r\nhello" in out.stdout
    assert b"TLSv1.3" in out.stdout
