"""Listeners with real sockets: accepting, inspecting, matching, TLS, network filters, limits, stats."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from types import SimpleNamespace
from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.net import filter_chain, sockets
from meshproxy.net.address import Address
from meshproxy.net.inspect import HttpInspector, Inspection, ListenerFilter, ProxyProtocol, http_protocol
from meshproxy.net.listener import Listener, ListenerRegistry
from tests.unit.net_help import (
    DOWNSTREAM_TLS,
    HTTP_INSPECTOR,
    PROXY_PROTOCOL,
    TLS_INSPECTOR,
    client_context,
    connect_to,
    context,
    downstream_tls,
    listener_proto,
    reset,
    run,
    start,
    tcp_proxy,
    until,
    value,
)


class Say(asyncio.Protocol):
    """Says what it knows of its connection, then echoes."""

    def __init__(self, conn: Any) -> None:
        self.conn = conn

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        conn = self.conn
        transport.write(f"{conn.filter_chain.name} {conn.server_name} {','.join(conn.application_protocols)} {conn.remote} {conn.local}\n".encode())

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Terminal:
    """A terminal filter in place of the real ones."""

    terminal = True

    def __init__(self) -> None:
        self.connections: list[Any] = []
        self.missing: list[tuple[str | None, bool]] = []

    def missed(self, conn: Any, *, secure: bool) -> None:
        self.missing.append((conn.local_close_reason, secure))

    def create_protocol(self, conn: Any) -> asyncio.Protocol:
        self.connections.append(conn)
        return Say(conn)


@pytest.fixture
def filters(monkeypatch):
    """Network filters for the chains that are compiled next, the terminal one last; the typed configuration does not matter."""
    chain: list[Any] = [Terminal()]
    monkeypatch.setattr(filter_chain, "_compile_filters", lambda *_: (chain[:-1], chain[-1]))
    return chain


def chain(name: str = "", match: dict[str, Any] | None = None, tls: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name, "filters": [tcp_proxy()], **fields}
    if match is not None:
        made["filter_chain_match"] = match
    if tls is not None:
        made["transport_socket"] = {"name": "tls", "typed_config": {"@type": DOWNSTREAM_TLS, **tls}}
    return made


def inspector(type_url: str, **fields: Any) -> dict[str, Any]:
    return {"name": "x", "typed_config": {"@type": type_url, **fields}}


async def connect(listener: Any, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await connect_to(listener.addresses[0].port, **options)


async def first_line(listener: Any, data: bytes = b"", **options: Any) -> str:
    """What a connection that sends `data` is told; '' when it is closed."""
    reader, writer = await connect(listener, **options)
    writer.write(data)
    try:
        return (await reader.readline()).decode().rstrip()
    except OSError:
        return ""
    finally:
        writer.transport.abort()


def test_plain(filters):
    async def main():
        made = context()
        listener = await start(made, listener_proto(chain("only")))
        assert listener.direct
        reader, writer = await connect(listener)
        line = (await reader.readline()).decode().split()
        assert line[0] == "only"
        assert line[-1] == listener.addresses[0].text
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert listener.active == 1
        assert [value(made, name) for name in ("downstream_cx_total", "downstream_cx_active", "worker_0.downstream_cx_active")] == [1, 1, 1]
        conn = filters[0].connections[0]
        assert conn.listener is listener
        assert conn.remote.text == "{}:{}".format(*writer.get_extra_info("sockname"))
        writer.close()
        await until(lambda: not listener.active)
        assert [value(made, name) for name in ("downstream_cx_destroy", "downstream_cx_active", "worker_0.downstream_cx_total")] == [1, 0, 1]
        listener.close()

    run(main)


def test_unix_socket(filters, tmp_path):
    async def main():
        path = str(tmp_path / "x.sock")
        listener = await start(context(), listener_proto(chain(), address={"pipe": {"path": path}}))
        reader, writer = await connect_to(path)
        assert (await reader.readline()).decode().split()[-1] == path
        writer.close()
        listener.close()

    run(main)


def test_stat_prefix_and_address(filters):
    async def main():
        made = context()
        listener = await start(made, listener_proto(chain(), stat_prefix="mine"))
        await first_line(listener)
        assert made.stats.value("listener.mine.downstream_cx_total") == 1
        listener.close()
        listener = await start(made, listener_proto(chain(), address={"socket_address": {"address": "::1", "port_value": 0}}))
        assert made.stats.find("listener.[__1]_0.downstream_cx_total") is not None
        listener.close()

    run(main)


@pytest.mark.parametrize("fields", [{}, {"listener_filters": [inspector(HTTP_INSPECTOR)]}])
def test_stopped_before_it_has_started(filters, fields):
    async def main():
        bound = sockets.bind(listener_proto(chain(), **fields), 1)[0]
        listener = Listener(listener_proto(chain(), **fields), bound, context())
        listener.stop_accepting()
        await listener.start()
        with pytest.raises(ConnectionRefusedError):
            await connect(listener)

    run(main)


def test_stop_accepting_keeps_connections(filters):
    async def main():
        listener = await start(context(), listener_proto(chain()))
        reader, writer = await connect(listener)
        await reader.readline()
        listener.stop_accepting()
        listener.stop_accepting()
        with pytest.raises(OSError):
            await connect(listener)
        writer.write(b"still here")
        assert await reader.readexactly(10) == b"still here"
        listener.close()
        assert await reader.read() == b""
        await until(lambda: not listener.active)

    run(main)


def test_connection_limit(filters):
    async def main():
        for fields in ({}, {"listener_filters": [inspector(HTTP_INSPECTOR)]}):
            made = context({"envoy.resource_limits.listener.l.connection_limit": "1"})
            listener = await start(made, listener_proto(chain(), **fields))
            reader, writer = await connect(listener)
            writer.write(b"\x00")
            assert await reader.readline()
            assert await first_line(listener, b"\x00") == ""
            assert value(made, "downstream_cx_overflow") == 1
            writer.close()
            await until(lambda listener=listener: not listener.active)
            assert await first_line(listener, b"\x00") != ""
            listener.close()

    run(main)


def test_limit_is_shared_out_among_workers(filters):
    async def main():
        shares = []
        for worker in range(3):
            made = context({"envoy.resource_limits.listener.l.connection_limit": "8"})
            made.concurrency, made.worker_id = 3, worker
            listener = await start(made, listener_proto(chain()))
            shares.append(listener._limit)
            listener.close()
        assert shares == [3, 3, 2]

    run(main)


def test_no_filter_chain(filters):
    async def main():
        for fields in ({}, {"listener_filters": [inspector(HTTP_INSPECTOR)]}):
            made = context()
            listener = await start(made, listener_proto(chain(match={"destination_port": 1}), **fields))
            assert await first_line(listener, b"\x00") == ""
            assert value(made, "no_filter_chain_match") == 1
            assert value(made, "downstream_cx_total") == 0
            listener.close()
            listener = await start(context(), listener_proto(chain(match={"destination_port": 1}), default_filter_chain=chain("default"), **fields))
            assert (await first_line(listener, b"\x00")).startswith("default ")
            listener.close()

    run(main)


def test_tls(filters):
    async def main():
        made = context()
        proto = listener_proto(
            chain("a", {"server_names": ["server.example.com"]}, downstream_tls("server", alpn_protocols=["h2"])),
            chain("b", {"server_names": ["*.example.com"]}, downstream_tls("other")),
            chain("plain", {"transport_protocol": "raw_buffer"}),
            listener_filters=[inspector(TLS_INSPECTOR)],
        )
        listener = await start(made, proto)
        assert not listener.direct
        line = await first_line(listener, ssl=client_context(alpn=("h2",)), server_hostname="server.example.com")
        assert line.startswith("a server.example.com h2 127.0.0.1:")
        line = await first_line(listener, ssl=client_context(), server_hostname="other.example.com")
        assert line.startswith("b other.example.com ")
        assert (await first_line(listener, b"\x00")).startswith("plain None ")
        assert made.stats.value("tls_inspector.tls_found") == 2
        assert made.stats.value("tls_inspector.sni_found") == 2
        assert made.stats.value("tls_inspector.tls_not_found") == 1
        assert value(made, "ssl.handshake") == 2
        conn = filters[0].connections[0]
        assert conn.tls.alpn == "h2"
        assert conn.tls.version == "TLSv1.3"
        assert conn.transport_protocol == "tls"
        await until(lambda: not listener.active)
        assert value(made, "downstream_cx_destroy") == 3
        listener.close()

    run(main)


def test_no_inspector_is_added(filters, caplog):
    async def main():
        by_name = chain("named", {"server_names": ["server.example.com"]}, downstream_tls("server"))
        listener = await start(context(), listener_proto(by_name, chain("rest", None, downstream_tls("server"))))
        assert "it is not among the listener filters" in caplog.text
        line = await first_line(listener, ssl=client_context(), server_hostname="server.example.com")
        assert line.startswith("rest None ")  # as in Envoy: nobody has learnt the name
        listener.close()

    run(main)


def test_tls_without_inspector(filters):
    async def main():
        made = context()
        listener = await start(made, listener_proto(chain(tls=downstream_tls())))
        line = await first_line(listener, ssl=client_context(), server_hostname="server.example.com")
        assert line.startswith(" None  ")  # as in Envoy: only the inspector learns the name
        listener.close()

    run(main)


def test_failed_handshake(filters, caplog):
    async def main():
        caplog.set_level("INFO")
        made = context()
        validation = {"match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": "spiffe://nobody"}}]}
        tls = chain("tls", {"transport_protocol": "tls"}, downstream_tls(validation=validation))
        listener = await start(made, listener_proto(tls, listener_filters=[inspector(TLS_INSPECTOR)]))
        reader, writer = await connect(listener, ssl=client_context("client"), server_hostname="server.example.com")
        with contextlib.suppress(OSError):
            assert await reader.read() == b""
        await until(lambda: not listener.active)
        assert filters[0].connections == []
        assert filters[0].missing == [(None, True)]
        assert value(made, "ssl.fail_verify_san") == 1
        assert value(made, "downstream_cx_destroy") == 1
        assert "SNI server.example.com" in caplog.text
        assert "SAN matcher" in caplog.text
        writer.close()
        # One that is told why.
        with pytest.raises(ssl.SSLError) as caught:
            reader, _ = await connect(listener, ssl=client_context("rogue"), server_hostname="server.example.com")
            await reader.read()
        assert "ALERT_UNKNOWN_CA" in caught.value.reason
        listener.close()

    run(main)


def test_handshake_timeout(filters):
    async def main():
        made = context()
        listener = await start(made, listener_proto(chain(tls=downstream_tls(), transport_socket_connect_timeout="0.05s")))
        assert await first_line(listener) == ""
        assert value(made, "downstream_cx_transport_socket_connect_timeout") == 1
        assert filters[0].missing == [("transport_socket_timeout", True)]
        assert not listener.active
        listener.close()

    run(main)


def test_terminal_filter_hears_of_connections_that_others_close(filters):
    class Refuse:
        def on_connection(self, conn: Any) -> bool:
            conn.local_close_reason = "full"
            return False

    async def main():
        filters.insert(0, Refuse())
        listener = await start(context(), listener_proto(chain()))
        assert await first_line(listener) == ""
        await until(lambda: not listener.active)
        assert filters[1].missing == [("full", False)]
        assert filters[1].connections == []
        listener.close()

    run(main)


def test_http_inspector(filters):
    async def main():
        made = context()
        proto = listener_proto(
            chain("h1", {"application_protocols": ["http/1.1", "http/1.0"]}),
            chain("h2", {"application_protocols": ["h2c"]}),
            chain("rest"),
            listener_filters=[inspector(HTTP_INSPECTOR)],
        )
        listener = await start(made, proto)
        assert (await first_line(listener, b"GET / HTTP/1.1\r\n")).startswith("h1 None http/1.1 ")
        assert (await first_line(listener, b"GET / HTTP/1.0\r\n")).startswith("h1 None http/1.0 ")
        assert (await first_line(listener, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")).startswith("h2 ")
        assert (await first_line(listener, b"\x00\x01")).startswith("rest ")
        assert [made.stats.value(f"http_inspector.{name}_found") for name in ("http11", "http10", "http2", "http_not")] == [1, 1, 1, 1]
        listener.close()

    run(main)


@pytest.mark.parametrize(
    ("data", "protocol"),
    [
        (b"GET / HTTP/1.1\r\nrest", "http/1.1"),
        (b"GET / HTTP/1.1\n", "http/1.1"),
        (b"X-y http://a/ HTTP/1.2\r\n", "http/1.0"),
        (b"GET /\r\n", ""),
        (b"GET / HTTP/1.1 x\r\n", ""),
        (b"\r\nGET / HTTP/1.1\r\n", ""),
        (b"GET / HTTP/1.1", None),
        (b"P", None),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "h2c"),
        (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", "http/1.0"),
        (b"\x16\x03\x01", ""),
    ],
)
def test_http_protocol(data, protocol):
    assert http_protocol(data) == protocol


def sizes_shown(kind: type[ListenerFilter], monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """How many bytes listener filters of a kind have been shown at once, from now on."""
    sizes = set()

    def on_data(self: Any, conn: Any, data: bytes) -> Any:
        sizes.add(len(data))
        return shown(self, conn, data)

    shown = kind.on_data
    monkeypatch.setattr(kind, "on_data", on_data)
    return sizes


def test_proxy_protocol(filters, monkeypatch):
    async def main():
        made = context()
        rules = [{"tlv_type": 2, "on_tlv_present": {"key": "who"}}, {"tlv_type": 0xE0, "on_tlv_present": {"key": "x", "metadata_namespace": "ns"}}]
        fields = {"rules": rules, "pass_through_tlvs": {"match_type": "INCLUDE", "tlv_type": [2]}, "stat_prefix": "p"}
        listener = await start(made, listener_proto(chain(), listener_filters=[inspector(PROXY_PROTOCOL, **fields)]))
        assert (await first_line(listener, b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 2000\r\n")).endswith("1.2.3.4:1000 5.6.7.8:2000")
        from tests.unit.test_proxy_protocol import addresses, tlv, v2

        # What follows the header is the connection's, to the byte.
        reader, writer = await connect(listener)
        header = v2(addresses() + tlv(2, b"me") + tlv(0xE0, b"\xff") + tlv(5, b"z"))
        sizes = sizes_shown(ProxyProtocol, monkeypatch)
        writer.write(header[:20])
        await until(lambda: 20 in sizes)
        writer.write(header[20:] + b"hel")
        assert (await reader.readline()).endswith(b"1.2.3.4:1000 5.6.7.8:2000\n")
        writer.write(b"lo")
        assert await reader.readexactly(5) == b"hello"
        conn = filters[0].connections[1]
        assert conn.metadata == {"envoy.filters.listener.proxy_protocol": {"who": "me"}, "ns": {"x": "!"}}
        assert conn.proxy_tlvs == {2: b"me"}
        assert conn.direct_remote.ip == "127.0.0.1"
        writer.close()
        for bad in (b"GET / HTTP/1.1\r\n\r\n", b"PROXY TCP4 1.2.3.4\r\n", v2(b"", command=3)):
            assert await first_line(listener, bad) == ""
        assert made.stats.value("proxy_proto.p.versions.v1.found") == 1
        assert made.stats.value("proxy_proto.p.versions.v2.found") == 1
        assert made.stats.value("proxy_proto.p.versions.v1.error") == 1
        assert made.stats.value("proxy_proto.p.versions.v2.error") == 1
        assert made.stats.value("proxy_proto.p.not_found_disallowed") == 1
        assert made.stats.value("downstream_cx_proxy_proto_error") == 3
        assert value(made, "downstream_pre_cx_active") == 0
        listener.close()

    run(main)


def test_proxy_protocol_may_be_missing(filters):
    async def main():
        made = context()
        fields = {"allow_requests_without_proxy_protocol": True, "disallowed_versions": ["V1"]}
        listener = await start(made, listener_proto(chain(), listener_filters=[inspector(PROXY_PROTOCOL, **fields)]))
        for data in (b"GET / HTTP/1.1\r\n", b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 2000\r\n"):
            reader, writer = await connect(listener)
            writer.write(data)
            assert b"127.0.0.1" in await reader.readline()
            assert await reader.readexactly(len(data)) == data
            writer.close()
        assert made.stats.value("proxy_proto.not_found_allowed") == 2
        listener.close()

    run(main)


def test_deprecated_use_proxy_proto(filters):
    async def main():
        listener = await start(context(), listener_proto(chain(use_proxy_proto=True)))
        assert (await first_line(listener, b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 2000\r\n")).endswith("1.2.3.4:1000 5.6.7.8:2000")
        listener.close()

    run(main)


def test_filters_in_a_row(filters):
    async def main():
        proto = listener_proto(
            chain("tls", {"transport_protocol": "tls"}, downstream_tls()),
            chain("http", {"application_protocols": ["http/1.1"]}),
            listener_filters=[inspector(PROXY_PROTOCOL), inspector(TLS_INSPECTOR), inspector(HTTP_INSPECTOR)],
        )
        listener = await start(context(), proto)
        line = await first_line(listener, b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 2000\r\nGET / HTTP/1.1\r\n")
        assert line == "http None http/1.1 1.2.3.4:1000 5.6.7.8:2000"
        sock = socket.create_connection(listener.addresses[0].sockaddr)
        sock.sendall(b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 2000\r\n")
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock, ssl=client_context(), server_hostname="server.example.com")
        assert await reader.readline() == b"tls server.example.com  1.2.3.4:1000 5.6.7.8:2000\n"
        writer.close()
        listener.close()

    run(main)


def test_filter_disabled(filters):
    async def main():
        disabled = inspector(PROXY_PROTOCOL) | {"filter_disabled": {"not_match": {"destination_port_range": {"start": 1, "end": 2}}}}
        listener = await start(context(), listener_proto(chain(), listener_filters=[disabled]))
        assert "127.0.0.1" in await first_line(listener, b"x")
        listener.close()

    run(main)


def test_slow_bytes(filters, monkeypatch):
    async def main():
        made = context()
        proto = listener_proto(chain("h", {"application_protocols": ["http/1.1"]}), chain("rest"), listener_filters=[inspector(HTTP_INSPECTOR)])
        listener = await start(made, proto)
        reader, writer = await connect(listener)
        sizes = sizes_shown(HttpInspector, monkeypatch)
        for size, byte in enumerate(b"GET / HTTP/1.1", 1):
            writer.write(bytes((byte,)))
            await until(lambda size=size: size in sizes)
        assert value(made, "downstream_pre_cx_active") == 1
        writer.write(b"\r\n")
        assert (await reader.readline()).startswith(b"h ")
        assert await reader.readexactly(16) == b"GET / HTTP/1.1\r\n"
        writer.close()
        listener.close()

    run(main)


def test_slow_bytes_on_a_unix_socket(filters, tmp_path, monkeypatch):
    async def main():
        path = str(tmp_path / "x.sock")
        listener = await start(context(), listener_proto(chain(), address={"pipe": {"path": path}}, listener_filters=[inspector(HTTP_INSPECTOR)]))
        reader, writer = await connect_to(path)
        sizes = sizes_shown(HttpInspector, monkeypatch)
        for part, size in ((b"GET /", 5), (b" HTTP/1.1", 14), (b"\r\n", 16)):
            writer.write(part)
            await until(lambda size=size: size in sizes)
        assert b"http/1.1" in await reader.readline()
        writer.close()
        listener.close()

    run(main)


def test_waiting_costs_nothing(filters, monkeypatch):
    async def main():
        looks, look = [], Inspection._look
        monkeypatch.setattr(Inspection, "_look", lambda self: looks.append(self) or look(self))
        listener = await start(context(), listener_proto(chain(), listener_filters=[inspector(HTTP_INSPECTOR)]))
        _, writer = await connect(listener)
        writer.write(b"GET")
        await until(lambda: bool(listener._inspections))
        inspection = next(iter(listener._inspections.values()))
        await until(lambda: inspection._seen == 3)
        # While another connection comes, is inspected and goes, nobody looks at this one, and no timer is there to do it later.
        looks.clear()
        await first_line(listener, b"GET / HTTP/1.1\r\n")
        assert looks
        assert inspection not in looks
        assert inspection._timer is None
        writer.close()
        await until(lambda: not listener._inspections)
        listener.close()

    run(main)


def test_peer_leaves_while_it_is_inspected(filters):
    async def main():
        made = context()
        listener = await start(made, listener_proto(chain(), listener_filters=[inspector(HTTP_INSPECTOR)]))
        for data in (b"", b"GET "):
            _, writer = await connect(listener)
            writer.write(data)
            await until(lambda: value(made, "downstream_pre_cx_active") == 1)
            writer.close()
            await until(lambda: value(made, "downstream_pre_cx_active") == 0)
        assert value(made, "downstream_listener_filter_remote_close") == 2
        assert value(made, "downstream_cx_total") == 0
        listener.close()

    run(main)


def test_inspection_timeout(filters):
    async def main():
        for go_on, line in ((False, ""), (True, "only")):
            made = context()
            proto = listener_proto(
                chain("only"), listener_filters=[inspector(TLS_INSPECTOR)], listener_filters_timeout="0.05s", continue_on_listener_filters_timeout=go_on
            )
            listener = await start(made, proto)
            assert (await first_line(listener)).partition(" ")[0] == line
            assert value(made, "downstream_pre_cx_timeout") == 1
            assert value(made, "downstream_pre_cx_active") == 0
            listener.close()

    run(main)


def test_close_while_inspecting(filters):
    async def main():
        listener = await start(context(), listener_proto(chain(), listener_filters=[inspector(TLS_INSPECTOR)]))
        reader, _ = await connect(listener)
        await until(lambda: bool(listener._inspections))
        listener.close()
        with contextlib.suppress(OSError):
            assert await reader.read() == b""

    run(main)


def test_original_dst_hand_off(filters, monkeypatch):
    async def main():
        registry = ListenerRegistry()
        made = context()
        monkeypatch.setattr("meshproxy.net.inspect.original_destination", lambda _sock: Address("10.1.2.3", 80))
        original = {"name": "o", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"}}
        front = await start(made, listener_proto(chain("front"), use_original_dst=True, listener_filters=[original]), registry)
        assert (await first_line(front)).endswith(" 10.1.2.3:80")
        behind = listener_proto(chain("behind"), address={"socket_address": {"address": "0.0.0.0", "port_value": 80}}, bind_to_port=False, stat_prefix="behind")
        listener = await start(made, behind, registry)
        assert await first_line(front) == f"behind None  {filters[0].connections[-1].remote} 10.1.2.3:80"
        assert made.stats.value("listener.behind.downstream_cx_total") == 1
        listener.stop_accepting()
        assert (await first_line(front)).startswith("front ")
        front.close()

    run(main)


# -- network filters in front of the terminal one


class Gate:
    """A network filter that answers as it is told."""

    def __init__(self, **hooks: Any) -> None:
        self.closed: list[Any] = []
        for name, answer in hooks.items():
            setattr(self, name, answer)

    def on_close(self, conn: Any) -> None:
        self.closed.append(conn)


async def later(answer: Any) -> Any:
    await asyncio.sleep(0.01)
    return answer


@pytest.mark.parametrize("hook", ["on_connection", "on_first_data"])
@pytest.mark.parametrize("tls", [None, downstream_tls()], ids=["plain", "tls"])
@pytest.mark.parametrize(
    ("answer", "passes"), [(lambda _: None, True), (lambda _: False, False), (lambda _: later(None), True), (lambda _: later(False), False)]
)
def test_network_filters(filters, hook, tls, answer, passes):
    async def main():
        gate = Gate(**{hook: answer})
        filters.insert(0, gate)
        made = context()
        listener = await start(made, listener_proto(chain(tls=tls)))
        options = {"ssl": client_context(), "server_hostname": "server.example.com"} if tls else {}
        reader, writer = await connect(listener, **options)
        writer.write(b"first ")
        await asyncio.sleep(0)
        writer.write(b"second")
        if passes:
            await reader.readline()
            assert await reader.readexactly(12) == b"first second"
            writer.close()
        else:
            with contextlib.suppress(OSError):
                assert b"second" not in await reader.read()
            writer.transport.abort()
        await until(lambda: not listener.active)
        assert len(gate.closed) == 1
        assert value(made, "downstream_cx_destroy") == 1
        listener.close()

    run(main)


def test_all_filters_are_asked(filters):
    async def main():
        asked = []
        gates = [
            Gate(on_connection=lambda _: asked.append(1) or later(None), on_first_data=lambda _: asked.append(4)),
            Gate(on_connection=lambda _: asked.append(2)),
            Gate(on_connection=lambda _: asked.append(3) or later(None), on_first_data=lambda _: asked.append(5) or later(None)),
        ]
        filters[:-1] = gates
        listener = await start(context(), listener_proto(chain()))
        reader, writer = await connect(listener)
        await reader.readline()
        assert asked == [1, 2, 3]  # a server that speaks first is not held up
        writer.write(b"x")
        writer.write_eof()
        assert await reader.read() == b"x"
        assert asked == [1, 2, 3, 4, 5]
        writer.close()
        listener.close()

    run(main)


def test_client_leaves_while_filters_think(filters):
    async def main():
        decided = asyncio.Event()
        thinking = []

        async def think() -> None:
            thinking.append(asyncio.current_task())
            await decided.wait()

        filters.insert(0, Gate(on_connection=lambda _: think()))
        listener = await start(context(), listener_proto(chain()))
        _, writer = await connect(listener)
        await until(lambda: bool(thinking))
        reset(writer)
        await until(lambda: not listener.active)
        decided.set()
        await until(thinking[0].done)
        assert not filters[-1].connections
        listener.close()

    run(main)


def test_buffer_limit(filters):
    async def main():
        listener = await start(context(), listener_proto(chain(), per_connection_buffer_limit_bytes=1234))
        reader, writer = await connect(listener)
        await reader.readline()
        assert filters[0].connections[0].buffer_limit == 1234
        transport = next(iter(listener._connections.values()))
        assert transport.get_write_buffer_limits() == (617, 1234)
        writer.close()
        listener.close()

    run(main)


def test_out_of_descriptors(filters, monkeypatch):
    async def main():
        made = context()
        listener = await start(made, listener_proto(chain(), max_connections_to_accept_per_socket_event=1))
        assert not listener.direct
        real = listener.sockets[0]
        calls = []

        def accept() -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise OSError(24, "Too many open files")
            return real.accept()

        monkeypatch.setattr("meshproxy.net.listener._ACCEPT_PAUSE", 0.01)
        made.loop.remove_reader(real.fileno())
        listener.sockets = [SimpleNamespace(accept=accept, fileno=real.fileno, close=real.close)]
        listener._watch()
        assert (await first_line(listener)) != ""
        assert len(calls) >= 2
        listener.close()

    run(main)


@pytest.mark.parametrize(
    ("proto", "path"),
    [
        (listener_proto(chain(), chain()), "filter_chains[1]"),
        (listener_proto(chain(tls={"common_tls_context": {}})), "filter_chains[0].transport_socket.typed_config.common_tls_context.tls_certificates"),
        (
            listener_proto(chain(), listener_filters=[inspector(TLS_INSPECTOR, max_client_hello_size=99999)]),
            "listener_filters[0].typed_config.max_client_hello_size",
        ),
        (listener_proto(chain(), listener_filters=[{"name": "x"}]), "listener_filters[0].typed_config"),
        (listener_proto(chain(), default_filter_chain=chain(tls={"common_tls_context": {}})), "default_filter_chain.transport_socket"),
    ],
)
def test_refused(filters, proto, path):
    async def main():
        with pytest.raises(ConfigError) as caught:
            await start(context(), proto)
        assert caught.value.problems[0].path.startswith(path)

    run(main)


def test_no_chains_at_all(filters):
    async def main():
        proto = listener_proto(chain())
        proto.ClearField("filter_chains")
        with pytest.raises(ConfigError, match="no filter chains specified"):
            await start(context(), proto)

    run(main)


def test_terminal_filters_only_at_the_end():
    async def main():
        rbac = {"name": "r", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC", "stat_prefix": "r"}}
        for filters, path in (
            ([tcp_proxy(), tcp_proxy()], "filter_chains[0].filters[0]"),
            ([rbac], "filter_chains[0].filters[0]"),
            ([{"name": "x"}], "filter_chains[0].filters[0].typed_config"),
        ):
            with pytest.raises(ConfigError) as caught:
                await start(context(), listener_proto({"filters": filters}))
            assert caught.value.problems[0].path == path

    run(main)


def test_empty_chain_closes():
    async def main():
        listener = await start(context(), listener_proto({"filters": []}))
        assert await first_line(listener) == ""
        await until(lambda: not listener.active)
        listener.close()

    run(main)
