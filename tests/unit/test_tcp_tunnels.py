"""TCP proxies with a tunnel: what tests/differential/test_tcp_tunnels.py cannot ask of Envoy, or not without waiting for it."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.observe import flags
from tests.polling import until
from tests.unit.net_help import add_cluster, connect_to, context, listener_proto, reset, run, serve, start, tcp_proxy
from tests.unit.test_tcp_proxy import Log, _with_logs

HOST = "target.test:443"
OPEN = b"HTTP/1.1 200 OK\r\n\r\n"
POSTED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture
def log(monkeypatch):
    """The access log of every TCP proxy of the test."""
    from meshproxy.tcp.proxy import TcpProxy

    made = Log()
    monkeypatch.setattr(TcpProxy, "_compile_logs", _with_logs(made))
    return made


class Upstream(asyncio.Protocol):
    """Answers the first head with `answer`, and keeps what came; `made` are all connections."""

    made: list[Upstream]

    def __init__(self, answer: bytes, made: list[Upstream]) -> None:
        self.answer = answer
        self.got = b""
        self.over = False
        made.append(self)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        had = b"\r\n\r\n" in self.got
        self.got += data
        if not had and b"\r\n\r\n" in self.got and self.answer:
            self.transport.write(self.answer)

    def connection_lost(self, error: Exception | None) -> None:
        self.over = True


async def setup(answer: bytes, *, proxy: dict[str, Any] | None = None, seen: Any = None, **tunnel: Any) -> tuple[Any, Any, list[Upstream]]:
    """A context, a listener and the connections of its upstream. `seen`: is given each downstream connection."""
    made = context()
    connections: list[Upstream] = []
    _, port = await serve(lambda: Upstream(answer, connections))
    # Little is on its way to an upstream that does not read.
    small = {"source_address": {"address": "127.0.0.1", "port_value": 0}, "socket_options": [{"level": 1, "name": 7, "int_value": 4096}]}
    add_cluster(made, port, http_protocol_options={"enable_trailers": True}, upstream_bind_config=small)
    chain = {"filters": [tcp_proxy(tunneling_config={"hostname": HOST, **tunnel}, **(proxy or {}))]}
    listener = await start(made, listener_proto(chain))
    if seen is not None:
        terminal = listener.chains[0].terminal
        real = terminal.create_protocol
        terminal.create_protocol = lambda conn: seen(conn) or real(conn)
    return made, listener, connections


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        POSTED + b"5\r\nhello\r\n0\r\n\r\n",
        POSTED + b"5\r\nhello\r\n0\r\nx-end: 1\r\n\r\n",
    ],
)
def test_a_posted_tunnel_ends_with_its_response(answer):
    async def main():
        connections = []
        made, listener, upstreams = await setup(answer, seen=connections.append, use_post=True, propagate_response_trailers=True)
        reader, _ = await connect_to(listener.addresses[0].port)
        assert await reader.read() == b"hello"
        await until(lambda: not listener.active and upstreams[0].over)
        assert upstreams[0].got == b"POST / HTTP/1.1\r\nhost: target.test:443\r\ntransfer-encoding: chunked\r\n\r\n"
        told = (connections[0].filter_state or {}).get("envoy.tcp_proxy.propagate_response_trailers")
        assert told == ({"headers": [{"key": "x-end", "value": "1"}]} if b"x-end" in answer else None)
        assert made.stats.value("cluster.c.upstream_rq_active") == 0
        assert made.clusters.get("c").limits[0].rq == 0

    run(main)


def test_a_client_that_is_gone_is_not_asked_for():
    async def main():
        made, listener, upstreams = await setup(b"")
        _, writer = await connect_to(listener.addresses[0].port)
        await until(lambda: upstreams and b"\r\n\r\n" in upstreams[0].got)
        reset(writer)
        await until(lambda: upstreams[0].over and not listener.active)
        limits = made.clusters.get("c").limits[0]
        assert (limits.rq, limits.pending, limits.cx) == (0, 0, 0)
        assert made.stats.value("cluster.c.upstream_cx_destroy_local_with_active_rq") == 1

    run(main)


@pytest.mark.parametrize("hostname", ["a b:1", "a\r\nx-evil: 1", "\x7f"])
def test_a_name_that_would_split_the_request(log, hostname):
    async def main():
        made, listener, upstreams = await setup(OPEN, hostname=hostname)
        reader, _ = await connect_to(listener.addresses[0].port)
        assert await reader.read() == b""
        await until(lambda: log.lines)
        assert log.lines[0]["flags"] == flags.UF | flags.URX_LAST
        assert log.lines[0]["upstream_failure"] == "invalid_tunnel_hostname"
        assert not upstreams
        assert made.stats.value("cluster.c.upstream_cx_total") == 0

    run(main)


def test_a_client_that_hangs_up_has_said_all():
    """HTTP/1 has no half of a tunnel; but what the client said before it ended its side arrives, however slowly the upstream reads."""

    async def main():
        _, listener, upstreams = await setup(OPEN)
        reader, writer = await connect_to(listener.addresses[0].port)
        await until(lambda: upstreams and b"\r\n\r\n" in upstreams[0].got)
        upstreams[0].transport.pause_reading()
        data = b"x" * 1_000_000
        writer.write(data)
        writer.write_eof()
        assert await reader.read() == b""
        await until(lambda: not listener.active)
        assert len(upstreams[0].got) < len(data)
        upstreams[0].transport.resume_reading()
        await until(lambda: upstreams[0].over)
        assert upstreams[0].got.partition(b"\r\n\r\n")[2] == data

    run(main)


@pytest.mark.parametrize(("state", "asked"), [("true", False), ("false", True)])
def test_filter_state_has_a_connection_go_without(state, asked):
    async def main():
        def mark(conn: Any) -> None:
            conn.filter_state = {"envoy.tcp_proxy.disable_tunneling": state}

        _, listener, upstreams = await setup(OPEN, seen=mark)
        _, writer = await connect_to(listener.addresses[0].port)
        writer.write(b"hello")
        await until(lambda: upstreams and b"hello" in upstreams[0].got)
        assert upstreams[0].got.startswith(b"CONNECT") is asked

    run(main)


def test_request_ids(log):
    async def main():
        connections = []
        _, listener, upstreams = await setup(
            OPEN,
            seen=connections.append,
            request_id_extension={"typed_config": {"@type": "type.googleapis.com/envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig"}},
            request_id_header="X-Tunnel",
            request_id_metadata_key="id",
            headers_to_add=[{"header": {"key": "x-copy", "value": "%DYNAMIC_METADATA(envoy.filters.network.tcp_proxy:id)%"}}],
        )
        await connect_to(listener.addresses[0].port)
        await until(lambda: upstreams and b"\r\n\r\n" in upstreams[0].got)
        found = re.search(rb"\r\nx-tunnel: ([0-9a-f-]{36})\r\nx-copy: \1\r\n", upstreams[0].got)
        assert found
        assert connections[0].metadata == {"envoy.filters.network.tcp_proxy": {"id": found[1].decode()}}

    run(main)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"post_path": "/x"}, "post_path: Can't set a post path when POST method isn't used"),
        ({"hostname": "%NOTHING%"}, "hostname"),
        ({"headers_to_add": [{"header": {"key": ":path", "value": "x"}}]}, "headers_to_add[0].header.key"),
        ({"headers_to_add": [{"header": {"key": "Host", "value": "x"}}]}, "headers_to_add[0].header.key"),
    ],
)
def test_configuration_that_is_wrong(fields, path):
    async def main():
        with pytest.raises(ConfigError) as raised:
            await setup(OPEN, **fields)
        assert f"tunneling_config.{path}" in str(raised.value)

    run(main)
