"""Where an API server is and who we are there, by TLS: service accounts of pods, certificates, tokens, plugins and proxies, in memory and with the real one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import ssl
import sys

import pytest

from control.access import proxy_for
from control.api_server import Access, ApiServer, Refused, Unreachable
from tests.differential.pki import Authority
from tests.kube.client import Client, kubeconfig
from tests.kube.memory import MemoryApiServer
from tests.kube.real import WHY_NOT, RealApiServer, assets

SOMEBODY = "somebody"


def of_server(folder, name="kubernetes"):
    """Of an API server whose authority is `name`, and who takes certificates of `clients`."""
    Authority(folder, name).issue(f"{name}-server", "127.0.0.1", "kubernetes.default.svc")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "clients.pem")
    tls.load_cert_chain(folder / f"{name}-server.pem", folder / f"{name}-server.key")
    tls.verify_mode = ssl.CERT_OPTIONAL
    return tls


@pytest.fixture(scope="module", params=["memory", pytest.param("real", marks=pytest.mark.slow)])
def server(request, tmp_path_factory):
    if request.param == "real" and assets() is None:
        pytest.skip(WHY_NOT)
    folder = tmp_path_factory.mktemp("kubernetes")
    if request.param == "memory":
        clients = Authority(folder, "clients")
        made = MemoryApiServer(of_server(folder), folder / "kubernetes.pem")
        made.clients = clients
    else:
        made = RealApiServer(folder)
    made.clients.issue(SOMEBODY)
    yield made
    made.close()


@pytest.fixture
def somebody(server):
    """Files of a certificate and its key."""
    return server.clients.folder / f"{SOMEBODY}.pem", server.clients.folder / f"{SOMEBODY}.key"


@contextlib.asynccontextmanager
async def opened(access):
    made = ApiServer(access)
    try:
        yield made
    finally:
        await made.close()


async def who(api):
    """Who the API server says that we are."""
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    return (await api.send("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review))["status"]["userInfo"]["username"]


async def ask(path):
    async with opened(Access(str(path))) as api:
        return await who(api)


def base(data):
    return base64.b64encode(data).decode()


def plugin(tmp_path, **status):
    credential = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
    (tmp_path / "credential.json").write_text(json.dumps(credential))
    code = f"print(open({str(tmp_path / 'credential.json')!r}).read())"
    return {"exec": {"apiVersion": credential["apiVersion"], "command": sys.executable, "args": ["-c", code], "interactiveMode": "Never"}}


async def test_tokens(server, tmp_path):
    (tmp_path / "token").write_text("admin-token\n")
    for user in ({"token": "admin-token"}, {"tokenFile": str(tmp_path / "token")}, {"tokenFile": "token"}, plugin(tmp_path, token="admin-token")):
        assert await ask(kubeconfig(tmp_path, server, user)) == "admin"
    with pytest.raises(Refused, match="401"):
        await ask(kubeconfig(tmp_path, server, {"token": "nobody's"}))


async def test_certificates(server, somebody, tmp_path):
    certificate, key = (file.read_bytes() for file in somebody)
    (tmp_path / "beside.pem").write_bytes(certificate)
    (tmp_path / "beside.key").write_bytes(key)
    for user in (
        {"client-certificate": str(somebody[0]), "client-key": str(somebody[1])},
        {"client-certificate": "beside.pem", "client-key": "beside.key"},
        {"client-certificate-data": base(certificate), "client-key-data": base(key)},
        plugin(tmp_path, clientCertificateData=certificate.decode(), clientKeyData=key.decode()),
    ):
        assert await ask(kubeconfig(tmp_path, server, user)) == SOMEBODY


async def test_certificates_that_are_renewed(server, somebody, tmp_path):
    """The first is of an authority that the API server does not know."""
    Authority(tmp_path, "rogue").issue("us")
    path = kubeconfig(tmp_path, server, {"client-certificate": "us.pem", "client-key": "us.key"})
    async with opened(Access(str(path))) as api:
        with pytest.raises((Refused, Unreachable)):
            await who(api)
        for name, found in zip(("us.pem", "us.key"), somebody, strict=True):
            (tmp_path / name).write_bytes(found.read_bytes())
        assert await who(api) == SOMEBODY


@pytest.mark.parametrize("cut", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
async def test_certificates_that_are_none(server, tmp_path, cut):
    user = {"client-certificate-data": base(cut.encode() or b"x"), "client-key-data": base(b"x")}
    with pytest.raises(Unreachable, match="the certificates for the API server"):
        await ask(kubeconfig(tmp_path, server, user))


async def test_whom_we_trust(server, tmp_path):
    data = {"certificate-authority": None, "certificate-authority-data": base(server.authority.read_bytes())}
    assert await ask(kubeconfig(tmp_path, server, **data)) == "admin"
    assert await ask(kubeconfig(tmp_path, server, **data, **{"tls-server-name": "kubernetes.default.svc"})) == "admin"
    with pytest.raises(Unreachable, match="certificate"):
        await ask(kubeconfig(tmp_path, server, **data, **{"tls-server-name": "other.test"}))
    with pytest.raises(Unreachable, match="certificate"):
        await ask(kubeconfig(tmp_path, server, **{"certificate-authority": None}))  # by the system's authorities
    assert await ask(kubeconfig(tmp_path, server, **{"certificate-authority": None, "insecure-skip-tls-verify": True})) == "admin"


async def test_nothing_is_left_of_connections(server, tmp_path):
    """Also of those on which something was under way: sockets are closed when we are, whatever the other end says."""
    before = connections(server.port)
    async with opened(Access(str(kubeconfig(tmp_path, server)))) as api:
        begun = asyncio.Event()

        async def watch():
            async with api.events("/api/v1/services", {}) as events:
                begun.set()
                async for _ in events:
                    pass

        watching = [asyncio.create_task(watch()) for _ in range(3)]
        await begun.wait()
        asking = [asyncio.create_task(who(api)) for _ in range(3)]
        await who(api)
        for one in (*watching, *asking):
            one.cancel()
        await asyncio.wait([*watching, *asking])
        assert connections(server.port) > before
    assert connections(server.port) == before


def connections(port):
    """Those that this process has to a port, by file descriptor."""
    return {one for one in map(int, os.listdir("/proc/self/fd")) if _peer(one) == ("127.0.0.1", port)}


def _peer(descriptor):
    try:
        with socket.socket(fileno=os.dup(descriptor)) as found:
            return found.getpeername()
    except OSError:  # none, or not connected
        return None


async def test_passwords_for_other_programs_do_not_matter(server, somebody, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert await ask(kubeconfig(tmp_path, server)) == "admin"
    assert await ask(kubeconfig(tmp_path, server, {"client-certificate": str(somebody[0]), "client-key": str(somebody[1])})) == SOMEBODY


# --- in a pod


@pytest.fixture
def mount(server, tmp_path, monkeypatch):
    """The folder of a service account, without its token."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    (tmp_path / "ca.crt").write_bytes(server.authority.read_bytes())
    return tmp_path


async def test_a_service_account(server, mount):
    """Its token is another one from time to time."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "meshctl", "namespace": "default"}}
    if isinstance(server, MemoryApiServer):
        old, new, expected = "old", "new", "system:serviceaccount:default:meshctl"
        server.tokens = {"admin-token": "admin", "new": expected}
    else:
        client = Client(server)
        client.create(account)
        old = client.token(account, "of-others")
        new, expected = client.token(account), "system:serviceaccount:default:meshctl"
        client.close()
    (mount / "token").write_text(old)
    async with opened(Access(mount=str(mount))) as api:
        with pytest.raises(Refused, match="401"):
            await who(api)
        (mount / "token").write_text(new)
        assert await who(api) == expected


async def test_an_authority_that_is_renewed(server, mount):
    """What we have is of no use any longer, until the file says what is."""
    if not isinstance(server, MemoryApiServer):
        pytest.skip("the real one keeps its certificate")
    (mount / "token").write_text("admin-token")
    before = server.tls
    async with opened(Access(mount=str(mount))) as api:
        assert await who(api) == "admin"
        server.stop()
        (mount / "clients.pem").write_bytes((server.clients.folder / "clients.pem").read_bytes())
        server.tls = of_server(mount, "renewed")
        await asyncio.to_thread(server.start)
        try:
            with pytest.raises(Unreachable, match="certificate"):
                await who(api)
            (mount / "ca.crt").write_bytes((mount / "renewed.pem").read_bytes())
            assert await who(api) == "admin"
        finally:
            server.stop()
            server.tls = before
            server.start()


# --- proxies


class Proxy:
    """Takes CONNECT, to whatever it is asked for. `asked`: its requests, as they came."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head)
        host, _, port = head.split()[1].rpartition(":")
        above, below = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(_copy(reader, below), _copy(above, writer))


async def _copy(reader, writer):
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


async def test_by_way_of_a_proxy(server, tmp_path):
    async with Proxy() as proxy:
        assert await ask(kubeconfig(tmp_path, server, **{"proxy-url": f"http://us:secret@127.0.0.1:{proxy.port}"})) == "admin"
        (asked,) = proxy.asked
        assert asked.startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n")
        assert f"Proxy-Authorization: Basic {base(b'us:secret')}\r\n" in asked
        assert "Bearer" not in asked
        named = {"proxy-url": f"http://127.0.0.1:{proxy.port}", "tls-server-name": "kubernetes.default.svc"}
        assert await ask(kubeconfig(tmp_path, server, **named)) == "admin"


async def test_proxies_that_we_cannot_use(server, tmp_path):
    with pytest.raises(Unreachable, match=r"socks5://127\.0\.0\.1:1: only those of http and https are served"):
        await ask(kubeconfig(tmp_path, server, **{"proxy-url": "socks5://127.0.0.1:1"}))
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1"):
        await ask(kubeconfig(tmp_path, server, **{"proxy-url": "http://127.0.0.1:1"}))


@pytest.mark.parametrize(
    ("url", "environment", "expected"),
    [
        ("https://k8s.test", {}, ""),
        ("https://k8s.test", {"HTTPS_PROXY": "http://p:3128"}, "http://p:3128"),
        ("https://k8s.test", {"https_proxy": "p:3128"}, "http://p:3128"),
        ("https://k8s.test", {"HTTP_PROXY": "http://p:3128"}, ""),
        ("http://k8s.test", {"HTTP_PROXY": "http://p:3128"}, "http://p:3128"),
        ("https://127.0.0.1:6443", {"HTTPS_PROXY": "http://p:3128"}, ""),
        ("https://[::1]:6443", {"HTTPS_PROXY": "http://p:3128"}, ""),
        ("https://localhost:6443", {"HTTPS_PROXY": "http://p:3128"}, ""),
    ],
)
def test_the_environment_has_a_proxy(url, environment, expected):
    assert proxy_for(url, environment) == expected


@pytest.mark.parametrize(
    ("host", "entry", "spared"),
    [
        ("10.96.0.1", "10.96.0.0/12", True),
        ("10.96.0.1", "10.0.0.0/16", False),
        ("10.96.0.1", "10.96.0.1", True),
        ("10.96.0.1", "10.96.0.1:443", True),
        ("10.96.0.1", "10.96.0.1:6443", False),
        ("[fd00::1]", "fd00::/8", True),
        ("[fd00::1]", "[fd00::1]:443", True),
        ("10.96.0.1", "10.96.0.0/nonsense", False),
        ("k8s.test", "10.96.0.0/12", False),
        ("k8s.test", "other.test, K8S.test", True),
        ("a.k8s.test", "k8s.test", True),
        ("a.k8s.test", "k8s.test:8443", False),
        ("ak8s.test", "k8s.test", False),
        ("a.k8s.test", ".k8s.test", True),
        ("k8s.test", ".k8s.test", False),
        ("a.k8s.test", "*.k8s.test", True),
        ("k8s.test", "*", True),
        ("k8s.test", ",", False),
    ],
)
def test_what_goes_without_it(host, entry, spared):
    assert proxy_for(f"https://{host}", {"HTTPS_PROXY": "http://p", "NO_PROXY": entry}) == ("" if spared else "http://p")
