"""What the tests of net/ and of the TCP proxy share: certificates, a worker's context on a real loop, an echo server, small clients."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import ipaddress
import random
import socket
import ssl
import struct
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from meshproxy.api.runtime import Layer, Runtime, parse_entry
from meshproxy.context import Context
from meshproxy.net import sockets
from meshproxy.net.drain import Drain
from meshproxy.net.listener import Listener, ListenerRegistry
from meshproxy.net.timers import Timers
from meshproxy.observe.stats import Store
from meshproxy.upstream.cluster_manager import ClusterManager
from tests.polling import PATIENCE
from tests.unit.filter_help import proto

NOW = dt.datetime.now(dt.UTC)
TCP_PROXY = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
DOWNSTREAM_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
UPSTREAM_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
TLS_INSPECTOR = "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"
PROXY_PROTOCOL = "type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol"
HTTP_INSPECTOR = "type.googleapis.com/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector"
STDOUT_LOG = "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog"


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test on the event loop that workers use."""

    async def whole() -> None:
        try:
            await asyncio.wait_for(main(), 2 * PATIENCE)
        finally:
            for writer in _opened:
                writer.close()
                writer.transport.abort()
            for closable in _started:
                closable.close()
            await asyncio.sleep(0.001)
            _opened.clear()
            _started.clear()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(whole())


_opened: list[asyncio.StreamWriter] = []  # by the present test
_started: list[Any] = []  # listeners and servers of the present test: uvloop hangs in close while one is open


async def connect_to(port: int | str, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client of a port of 127.0.0.1 or of a Unix socket, closed at the end of the test."""
    if isinstance(port, str):
        reader, writer = await asyncio.open_unix_connection(port)
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    _opened.append(writer)
    return reader, writer


@dataclass
class Pki:
    """Paths of PEM files: an authority, certificates of it by name (`server.pem`, `server.key`), and one of nobody (`rogue.pem`)."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


@functools.cache
def pki() -> Pki:
    """Made once for all tests."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.x509.oid import NameOID

    folder = Path(tempfile.mkdtemp(prefix="net-test-"))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()

    def name(**parts: str) -> x509.Name:
        oids = {"cn": NameOID.COMMON_NAME, "o": NameOID.ORGANIZATION_NAME, "ou": NameOID.ORGANIZATIONAL_UNIT_NAME, "c": NameOID.COUNTRY_NAME}
        return x509.Name([x509.NameAttribute(oids[key], value) for key, value in parts.items()])

    def write(file: str, certificate: Any, key: Any, password: bytes = b"") -> None:
        protection = serialization.BestAvailableEncryption(password) if password else plain
        (folder / f"{file}.pem").write_bytes(certificate.public_bytes(pem))
        (folder / f"{file}.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, protection))

    def make(subject: Any, issuer: Any, key: Any, signer: Any, sans: list[Any], *, authority: bool = False, days: int = 365) -> Any:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(NOW - dt.timedelta(days=400))
        builder = builder.not_valid_after(NOW + dt.timedelta(days=days)).add_extension(x509.BasicConstraints(authority, None), critical=True)
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        return builder.sign(signer, hashes.SHA256())

    dns, uri, ip = x509.DNSName, x509.UniformResourceIdentifier, lambda text: x509.IPAddress(ipaddress.ip_address(text))
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = name(cn="Test CA", o="Test")
    ca = make(ca_name, ca_name, ca_key, ca_key, [], authority=True)
    write("ca", ca, ca_key)
    leaves = {
        "server": (name(cn="server"), [dns("server.example.com"), dns("*.wild.example.com"), ip("127.0.0.1"), uri("spiffe://mesh/ns/a/sa/server")], 365),
        "other": (name(cn="other"), [dns("other.example.com")], 365),
        "client": (name(c="DE", o="Exa, mple", cn="client"), [uri("spiffe://mesh/ns/c/sa/client"), dns("client.example.com")], 365),
        "expired": (name(cn="expired"), [uri("spiffe://mesh/ns/c/sa/client")], -1),
    }
    for file, (subject, sans, days) in leaves.items():
        key = ec.generate_private_key(ec.SECP256R1())
        write(file, make(subject, ca_name, key, ca_key, sans, days=days), key)
    rsa_key = rsa.generate_private_key(65537, 2048)
    write("rsa", make(name(cn="rsa"), ca_name, rsa_key, ca_key, [dns("server.example.com")]), rsa_key)
    locked = ec.generate_private_key(ec.SECP256R1())
    write("locked", make(name(cn="locked"), ca_name, locked, ca_key, [dns("server.example.com")]), locked, b"secret")
    rogue_key = ec.generate_private_key(ec.SECP256R1())
    write("rogue", make(name(cn="rogue"), name(cn="rogue"), rogue_key, rogue_key, [uri("spiffe://mesh/ns/c/sa/client")]), rogue_key)
    client = x509.load_pem_x509_certificate((folder / "client.pem").read_bytes())
    revoked = x509.RevokedCertificateBuilder().serial_number(client.serial_number).revocation_date(NOW - dt.timedelta(days=1)).build()
    crl = x509.CertificateRevocationListBuilder().issuer_name(ca_name).last_update(NOW - dt.timedelta(days=2))
    crl = crl.next_update(NOW + dt.timedelta(days=30)).add_revoked_certificate(revoked).sign(ca_key, hashes.SHA256())
    (folder / "crl.pem").write_bytes(crl.public_bytes(pem))
    return Pki(folder)


def own(name: str) -> dict[str, Any]:
    """A `TlsCertificate` of the test files, as a document."""
    return {"certificate_chain": {"filename": pki()[f"{name}.pem"]}, "private_key": {"filename": pki()[f"{name}.key"]}}


def downstream_tls(*certificates: str, validation: dict[str, Any] | None = None, params: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A `DownstreamTlsContext` as a document; client certificates are verified when there is a `validation`."""
    common: dict[str, Any] = {"tls_certificates": [own(name) for name in certificates or ("server",)]}
    common |= {key: fields.pop(key) for key in ("alpn_protocols",) if key in fields}
    if validation is not None:
        common["validation_context"] = {"trusted_ca": {"filename": pki()["ca.pem"]}, **validation}
    if params is not None:
        common["tls_params"] = params
    return {"common_tls_context": common, **fields}


def upstream_tls(
    *, certificate: str | None = None, validation: dict[str, Any] | None = None, params: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    """An `UpstreamTlsContext` as a document."""
    common: dict[str, Any] = {"validation_context": {"trusted_ca": {"filename": pki()["ca.pem"]}, **(validation or {})}}
    if certificate is not None:
        common["tls_certificates"] = [own(certificate)]
    if params is not None:
        common["tls_params"] = params
    return {"common_tls_context": common, **fields}


def client_context(certificate: str | None = None, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
    """What a well-behaved client uses."""
    context = ssl.create_default_context(cafile=pki()["ca.pem"])
    if certificate is not None:
        context.load_cert_chain(pki()[f"{certificate}.pem"], pki()[f"{certificate}.key"])
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def context(runtime: dict[str, str] | None = None, *, seed: int = 1, clock: Callable[[], float] | None = None) -> Context:
    """A worker's context on the running loop."""
    loop = asyncio.get_running_loop()
    clock = clock or loop.time
    made = Context(loop=loop, stats=Store(), timers=Timers(loop, clock), clock=clock, random=random.Random(seed))
    made.runtime = Runtime([Layer("static", {key: parse_entry(value) for key, value in (runtime or {}).items()})])
    made.drain = Drain(made.clock, made.random)
    made.clusters = ClusterManager(made)
    return made


def tcp_proxy(**fields: Any) -> dict[str, Any]:
    """A `Filter` with a TCP proxy to cluster `c`."""
    fields = {"stat_prefix": "t", **fields}
    if "weighted_clusters" not in fields:
        fields.setdefault("cluster", "c")
    return {"name": "tcp", "typed_config": {"@type": TCP_PROXY, **fields}}


def add_cluster(made: Context, *ports: int, name: str = "c", **fields: Any) -> None:
    """A static cluster with these ports of 127.0.0.1."""
    hosts = [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}} for port in ports]
    document = {"name": name, "connect_timeout": "30s", "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": hosts}]}, **fields}
    made.clusters.add(message("envoy.config.cluster.v3.Cluster", document))


def message(name: str, document: dict[str, Any]) -> Any:
    """A message of the Envoy API."""
    import json

    return proto(name, json.dumps(document))


def listener_proto(*chains: dict[str, Any], address: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A `Listener` on 127.0.0.1, port 0."""
    chains = chains or ({"filters": [tcp_proxy()]},)
    place = address or {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    return message("envoy.config.listener.v3.Listener", {"name": "l", "address": place, "filter_chains": list(chains), **fields})


async def start(made: Context, proto: Any, registry: ListenerRegistry | None = None) -> Listener:
    """Bind, compile, start."""
    bound = sockets.bind(proto, 1)[0]
    try:
        listener = Listener(proto, bound, made, registry)
    except BaseException:
        for sock in bound:
            sock.close()
        raise
    await listener.start()
    _started.append(listener)
    return listener


def value(made: Context, name: str) -> int:
    """A counter or gauge; names may leave out the listener's prefix."""
    store = made.stats
    if store.find(name) is None:
        name = next((known for known in list(store.metrics) if known.startswith("listener.") and known.endswith("." + name)), name)
    return store.value(name)


class Echo(asyncio.Protocol):
    """Sends back what comes; half-closes when the peer does. `seen` collects what came."""

    def __init__(self, seen: bytearray | None = None) -> None:
        self.seen = seen

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.seen is not None:
            self.seen += data
        self.transport.write(data)


async def serve(factory: Callable[[], asyncio.Protocol] = Echo, **options: Any) -> tuple[asyncio.Server, int]:
    """A server on a free port."""
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0, **options)
    _started.append(server)
    return server, server.sockets[0].getsockname()[1]


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection the hard way, so that the peer gets a reset."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]
