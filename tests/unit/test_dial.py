"""Dialling: success, and each way to fail."""

from __future__ import annotations

import asyncio
import socket

import pytest

from meshproxy.net import dial, tls
from meshproxy.net.address import Address
from meshproxy.observe.stats import Store
from tests.polling import PATIENCE
from tests.unit.net_help import Echo, free_port, message, pki, run, serve, upstream_tls

UPSTREAM = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"


class Client(asyncio.Protocol):
    """Remembers what it got."""

    def __init__(self) -> None:
        self.data = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.data.set_result(data)


def server_context():
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki()["server.pem"], pki()["server.key"])
    return context


def upstream(**fields):
    store = Store()
    return tls.compile_upstream(message(UPSTREAM, upstream_tls(**fields)), store.scope("cluster.c.")), store


async def fails(address, **options):
    with pytest.raises(dial.DialError) as caught:
        await dial.connect(address, Client, **{"timeout": PATIENCE, **options})
    return caught.value


def test_plain():
    async def main():
        server, port = await serve()
        address = Address("127.0.0.1", port)
        transport, client = await dial.connect(address, Client, timeout=PATIENCE)
        client.transport.write(b"hi")
        assert await client.data == b"hi"
        info = dial.describe(transport, address)
        assert info.remote is address
        assert info.local.ip == "127.0.0.1"
        assert info.tls is None
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        transport.abort()
        server.close()

    run(main)


def test_unix_socket(tmp_path):
    async def main():
        path = str(tmp_path / "x.sock")
        server = await asyncio.get_running_loop().create_unix_server(Echo, path)
        transport, client = await dial.connect(Address.pipe(path), Client, timeout=PATIENCE)
        transport.write(b"hi")
        assert await client.data == b"hi"
        transport.abort()
        sock = await dial.connect_socket(Address.pipe(path), timeout=PATIENCE)
        sock.close()
        server.close()
        error = await fails(Address.pipe(str(tmp_path / "nope")))
        assert error.failure == f"immediate connect error: No such file or directory|remote address:{tmp_path}/nope"

    run(main)


def test_refused():
    async def main():
        address = Address("127.0.0.1", free_port())
        error = await fails(address)
        assert (error.reason, error.failure) == ("connect_failure", "delayed connect error: Connection refused")
        with pytest.raises(dial.DialError, match="Connection refused"):
            await dial.connect_socket(address, timeout=PATIENCE)

    run(main)


def test_timeout():
    async def main():
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            address = Address("127.0.0.1", full.getsockname()[1])
            with socket.create_connection(address.sockaddr):  # fills the backlog
                error = await fails(address, timeout=0.05)
                assert (error.reason, error.failure) == ("connect_timeout", "")
                with pytest.raises(dial.DialError, match="connect_timeout"):
                    await dial.connect_socket(address, timeout=0.05)

    run(main)


def test_tls():
    async def main():
        server, port = await serve(ssl=server_context())
        client_tls, store = upstream(sni="server.example.com")
        address = Address("127.0.0.1", port)
        transport, client = await dial.connect(address, Client, timeout=PATIENCE, transport=client_tls)
        transport.write(b"hi")
        assert await client.data == b"hi"
        info = dial.describe(transport, address)
        assert info.tls.version == "TLSv1.2"
        assert info.tls.peer_certificate.subject == "CN=server"
        assert info.server_name == "server.example.com"
        assert store.value("cluster.c.ssl.handshake") == 1
        transport.abort()
        server.close()

    run(main)


def test_tls_without_server_name():
    async def main():
        server, port = await serve(ssl=server_context())
        address = Address("127.0.0.1", port)
        transport, _ = await dial.connect(address, Client, timeout=PATIENCE, transport=upstream()[0])
        assert not dial.describe(transport, address).server_name
        transport.abort()
        server.close()

    run(main)


def test_rejected_peer_gets_no_byte():
    async def main():
        seen = bytearray()
        server, port = await serve(lambda: Echo(seen), ssl=server_context())
        client_tls, store = upstream(validation={"match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": "nobody"}}]})
        made = []

        class Eager(Client):
            def connection_made(self, transport):
                made.append(transport)
                transport.write(b"secret")

        with pytest.raises(dial.DialError) as caught:
            await dial.connect(Address("127.0.0.1", port), Eager, timeout=PATIENCE, transport=client_tls)
        assert caught.value.reason == "tls"
        assert "SAN matcher" in caught.value.failure
        assert not made
        assert not seen
        assert store.value("cluster.c.ssl.fail_verify_san") == 1
        server.close()

    run(main)


def test_untrusted_peer_is_told_why():
    async def main():
        lines = []

        async def handshake(reader, writer):
            pass

        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: lines.append(str(context)))
        raw = socket.create_server(("127.0.0.1", 0))
        raw.setblocking(False)
        client_tls, _ = upstream(validation={"trusted_ca": {"filename": pki()["rogue.pem"]}}, params={"tls_maximum_protocol_version": "TLSv1_2"})

        async def accept():
            sock, _ = await loop.sock_accept(raw)
            import ssl

            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            server = server_context().wrap_bio(incoming, outgoing, server_side=True)
            try:
                while True:
                    incoming.write(await loop.sock_recv(sock, 65536))
                    try:
                        server.do_handshake()
                    except ssl.SSLWantReadError:
                        await loop.sock_sendall(sock, outgoing.read())
            except ssl.SSLError as error:
                return error.reason
            finally:
                sock.close()

        told = asyncio.ensure_future(accept())
        error = await fails(Address("127.0.0.1", raw.getsockname()[1]), transport=client_tls)
        assert "CERTIFICATE_VERIFY_FAILED" in error.failure
        assert await told == "TLSV1_ALERT_UNKNOWN_CA"
        raw.close()

    run(main)


def test_peer_hangs_up_in_the_handshake():
    async def main():
        class Rude(asyncio.Protocol):
            def connection_made(self, transport):
                transport.abort()

        server, port = await serve(Rude)
        error = await fails(Address("127.0.0.1", port), transport=upstream()[0])
        assert error.reason == "connect_failure"
        server.close()

    run(main)


def test_peer_that_speaks_no_tls():
    async def main():
        server, port = await serve()
        client_tls, store = upstream()
        error = await fails(Address("127.0.0.1", port), transport=client_tls)
        assert error.reason == "tls"
        assert error.failure.startswith("TLS_error:|")
        assert store.value("cluster.c.ssl.connection_error") == 1
        server.close()

    run(main)


def test_handshake_counts_as_connecting():
    async def main():
        server, port = await serve(asyncio.Protocol)
        error = await fails(Address("127.0.0.1", port), transport=upstream()[0], timeout=0.05)
        assert error.reason == "connect_timeout"
        server.close()

    run(main)
