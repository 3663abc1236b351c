"""Listeners with real sockets: listener filters, which look at the first bytes, and the hand-off to other listeners."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from meshproxy.net.address import Address
from meshproxy.net.inspect import HttpInspector, Inspection, ListenerFilter, ProxyProtocol, http_protocol
from meshproxy.net.listener import ListenerRegistry
from tests.polling import until
from tests.unit.listener_help import chain, connect, first_line, inspector
from tests.unit.listener_help import filters as filters
from tests.unit.net_help import (
    HTTP_INSPECTOR,
    PROXY_PROTOCOL,
    TLS_INSPECTOR,
    client_context,
    connect_to,
    context,
    downstream_tls,
    listener_proto,
    run,
    start,
    value,
)


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


@pytest.mark.parametrize("named", [True, False])
def test_original_dst_hand_off(filters, monkeypatch, named):
    """The filter is there without being named, as in Envoy."""

    async def main():
        registry = ListenerRegistry()
        made = context()
        monkeypatch.setattr("meshproxy.net.inspect.original_destination", lambda _sock: Address("10.1.2.3", 80))
        original = {"name": "o", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"}}
        front = await start(made, listener_proto(chain("front"), use_original_dst=True, listener_filters=[original] if named else []), registry)
        assert (await first_line(front)).endswith(" 10.1.2.3:80")
        behind = listener_proto(chain("behind"), address={"socket_address": {"address": "0.0.0.0", "port_value": 80}}, bind_to_port=False, stat_prefix="behind")
        listener = await start(made, behind, registry)
        assert await first_line(front) == f"behind None  {filters[0].connections[-1].remote} 10.1.2.3:80"
        assert made.stats.value("listener.behind.downstream_cx_total") == 1
        listener.stop_accepting()
        assert (await first_line(front)).startswith("front ")
        front.close()

    run(main)
