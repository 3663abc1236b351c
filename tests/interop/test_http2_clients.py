"""Clients and servers that people use, over HTTP/2: curl, nghttp, nghttpd, h2load, httpx, and the websockets library through a bridge."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.proxy import PATIENCE, Proxy, refused, wait_until
from tests.interop.http2_proxy import BODY, start


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command's output; it has to end, and well."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert not check or done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def nghttpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """nghttp2's server over plaintext HTTP/2; its port, and the folder that it serves and takes uploads for."""
    if shutil.which("nghttpd") is None:
        pytest.skip("not installed: nghttpd")
    folder = tmp_path_factory.mktemp("htdocs")
    (folder / "small").write_text("small\n")
    (folder / "large").write_bytes(bytes(range(256)) * 40_000)
    port = free_port()
    # More streams than any test sends at once: before the SETTINGS of a new connection are known, we send it, as Envoy does, more than its usual 100.
    server = subprocess.Popen(
        ["nghttpd", "--no-tls", "--max-concurrent-streams", "1000", "-d", str(folder), "--trailer", "x-check: sum", "--echo-upload", str(port)],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: not refused(port))
        yield port, folder
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def hello(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy that answers /hello."""
    with start(tmp_path_factory.mktemp("hello")) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory, nghttpd: tuple[int, Path]) -> Iterator[Proxy]:
    """A proxy in front of nghttpd."""
    with start(tmp_path_factory.mktemp("proxied"), port=nghttpd[0]) as proxy:
        yield proxy


@needs("curl")
@pytest.mark.parametrize("how", [["--http2-prior-knowledge"], ["--http2", "-k"], ["--http1.1", "-k"]], ids=["prior_knowledge", "alpn", "alpn_http1"])
def test_curl(hello: Proxy, how: list[str]):
    """Over plaintext by prior knowledge, over TLS by ALPN; there two requests on one connection (curl 7.88 cannot with prior knowledge)."""
    url = f"https://127.0.0.1:{hello.port('tls')}/hello" if "-k" in how else f"http://127.0.0.1:{hello.port()}/hello"
    urls = [url] * (2 if "-k" in how else 1)
    done = run("curl", "-sv", *how, "-w", "%{http_version} %{num_connects}\n", *urls)
    version = "1.1" if "--http1.1" in how else "2"
    assert done.stdout == f"{BODY}{version} 1\n" + (f"{BODY}{version} 0\n" if "-k" in how else "")


@needs("curl")
def test_curl_that_would_upgrade_stays_on_http1(hello: Proxy):
    """`Upgrade: h2c` is not taken up: the answer comes over HTTP/1.1, as from Envoy."""
    done = run("curl", "-s", "--http2", "-w", "%{http_version}\n", f"http://127.0.0.1:{hello.port()}/hello")
    assert done.stdout == f"{BODY}1.1\n"


@needs("curl")
@pytest.mark.parametrize("how", ["--http2-prior-knowledge", "--http1.1"])
def test_curl_posts_and_gets_much(proxied: Proxy, nghttpd: tuple[int, Path], tmp_path: Path, how: str):
    """Ten megabytes each way, from either version to HTTP/2."""
    large = nghttpd[1] / "large"
    got = tmp_path / "got"
    run("curl", "-sf", how, "-o", got, f"http://127.0.0.1:{proxied.port()}/large")
    assert got.read_bytes() == large.read_bytes()
    run("curl", "-sf", how, "-o", got, "--data-binary", f"@{large}", f"http://127.0.0.1:{proxied.port()}/echo")
    assert got.read_bytes() == large.read_bytes()


@needs("nghttp")
def test_nghttp_prints_frames(hello: Proxy):
    """SETTINGS are exchanged and acknowledged, the answer has its status, and nothing else is sent."""
    done = run("nghttp", "-v", f"http://127.0.0.1:{hello.port()}/hello")
    assert ":status: 200" in done.stdout
    assert BODY in done.stdout
    kinds = re.findall(r"recv (\w+) frame", done.stdout)
    assert set(kinds) <= {"SETTINGS", "WINDOW_UPDATE", "HEADERS", "DATA"}
    assert kinds.count("SETTINGS") == 2


@needs("nghttp")
@pytest.mark.parametrize(
    "options", [["--continuation"], ["--no-dep"], ["-w", "1"], ["-W", "1"], ["-b", "255"], ["--header-table-size=0"], ["--hexdump"], ["-y"]], ids=" ".join
)
def test_nghttp_in_many_ways(proxied: Proxy, options: list[str]):
    """CONTINUATION, small windows, padding, no table: the answer is the same."""
    if options == ["-y"]:
        options = ["--no-content-length", "-d", "/etc/hostname"]
    done = run("nghttp", *options, f"http://127.0.0.1:{proxied.port()}/small")
    assert "small" in done.stdout or "-d" in options


@needs("nghttp")
def test_nghttp_trailers_both_ways(proxied: Proxy, tmp_path: Path):
    """Trailers of a request reach the upstream, those of the response the client."""
    body = tmp_path / "body"
    body.write_text("x" * 1000)
    done = run("nghttp", "-v", "-d", body, "--trailer", "x-sent: 1", f"http://127.0.0.1:{proxied.port()}/echo")
    assert ":status: 200" in done.stdout
    assert re.search(r"recv \(stream_id=\d+\) x-check: sum", done.stdout)


@needs("nghttp")
def test_nghttp_many_at_once(proxied: Proxy):
    """Fifty requests in one go, on one connection."""
    done = run("nghttp", "-n", "-s", "-m", "50", f"http://127.0.0.1:{proxied.port()}/small")
    assert len(re.findall(r" 200 +\d+ /small", done.stdout)) == 50


@needs("h2load")
@pytest.mark.parametrize("path", ["/hello", "/small", "/large"])
def test_h2load(proxied: Proxy, path: str):
    """Many streams on several connections; all are answered with 2xx."""
    count = "40" if path == "/large" else "2000"
    done = run("h2load", "-n", count, "-c", "4", "-m", "100", f"http://127.0.0.1:{proxied.port()}{path}")
    assert f"{count} succeeded, 0 failed, 0 errored, 0 timeout" in done.stdout
    assert f"status codes: {count} 2xx" in done.stdout


def test_httpx(proxied: Proxy, nghttpd: tuple[int, Path]):
    """The `h2` package behind a client that people use."""

    async def run_client() -> None:
        async with httpx.AsyncClient(http1=False, http2=True, base_url=f"http://127.0.0.1:{proxied.port()}", timeout=PATIENCE) as client:
            answers = await asyncio.gather(*(client.get("/small") for _ in range(50)))
            assert {(answer.status_code, answer.http_version, answer.text) for answer in answers} == {(200, "HTTP/2", "small\n")}
            large = (nghttpd[1] / "large").read_bytes()
            assert (await client.get("/large")).content == large
            assert (await client.post("/echo", content=large[:1_000_000])).content == large[:1_000_000]
            async with client.stream("GET", "/large") as left:  # and goes away in the middle
                await anext(left.aiter_bytes(1000))
            assert (await client.get("/small")).text == "small\n"

    asyncio.run(run_client())


def test_websockets_over_tls_beside_http2(tmp_path: Path):
    """The websockets library at both ends, its client over TLS, on a listener that also speaks HTTP/2."""
    client_module = pytest.importorskip("websockets.asyncio.client")
    server_module = pytest.importorskip("websockets.asyncio.server")

    async def echo(connection) -> None:
        async for message in connection:
            await connection.send(message)

    async def talk() -> list[object]:
        async with server_module.serve(echo, "127.0.0.1", 0, max_size=None) as server:
            loop = asyncio.get_running_loop()
            upstream = server.sockets[0].getsockname()[1]
            proxy = await loop.run_in_executor(None, lambda: start(tmp_path, port=upstream, http2=False))
            with proxy:
                port = await loop.run_in_executor(None, lambda: proxy.port("tls"))
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
                answers = []
                async with client_module.connect(f"wss://127.0.0.1:{port}/chat", ssl=context, proxy=None, max_size=None) as client:
                    for message in ("short", b"\x00\x01", "x" * 3_000_000):
                        await client.send(message)
                        answers.append(await client.recv())
                return answers

    assert asyncio.run(talk()) == ["short", b"\x00\x01", "x" * 3_000_000]
