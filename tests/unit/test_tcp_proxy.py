"""The TCP proxy: from a listener to real servers, plaintext and TLS."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.net.address import Address
from meshproxy.net.connection import ConnectionInfo
from meshproxy.net.filter_chain import NetworkContext
from meshproxy.observe import flags
from meshproxy.tcp.proxy import TcpProxy
from meshproxy.tcp.session import Session
from tests.polling import quiet, until
from tests.unit.net_help import (
    DOWNSTREAM_TLS,
    UPSTREAM_TLS,
    Echo,
    add_cluster,
    client_context,
    connect_to,
    context,
    downstream_tls,
    free_port,
    listener_proto,
    message,
    pki,
    reset,
    run,
    serve,
    start,
    tcp_proxy,
    upstream_tls,
    value,
)

TCP_PROXY = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
NETWORK_RATE_LIMIT = "type.googleapis.com/envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit"


class Log:
    """An access log that remembers."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log(self, stream: Any, event: str = "") -> None:
        names = ("flags", "bytes_received", "bytes_sent", "upstream_bytes_sent", "upstream_bytes_received", "upstream_failure", "attempts", "end")
        line = {name: getattr(stream, name) for name in names}
        self.lines.append(line | {"host": stream.host.address if stream.host else None, "upstream": stream.upstream})


@pytest.fixture
def log(monkeypatch):
    """The access log of every TCP proxy and listener of the test."""
    made = Log()
    monkeypatch.setattr(TcpProxy, "_compile_logs", _with_logs(made))
    return made


def _with_logs(log: Log) -> Any:
    real = TcpProxy._compile_logs

    def compile_logs(self: TcpProxy, proto: Any) -> None:
        real(self, proto)
        self.logs = (log,)

    return compile_logs


def server_context() -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(pki()["server.pem"], pki()["server.key"])
    return made


def chain(*, tls: bool = False, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"filters": [tcp_proxy(**fields)]}
    if tls:
        made["transport_socket"] = {"name": "tls", "typed_config": {"@type": DOWNSTREAM_TLS, **downstream_tls()}}
    return made


MODES = [(False, False), (False, True), (True, False), (True, True)]


async def setup(downstream: bool, upstream: bool, factory: Any = Echo, *, clock: Callable[[], float] | None = None, **fields: Any) -> tuple[Any, Any, Any]:
    """A context, a listener and options for its clients; `downstream`, `upstream`: with TLS."""
    made = context(clock=clock)
    _, port = await serve(factory, **({"ssl": server_context()} if upstream else {}))
    socket_ = {"transport_socket": {"name": "tls", "typed_config": {"@type": UPSTREAM_TLS, **upstream_tls()}}} if upstream else {}
    add_cluster(made, port, **socket_)
    listener = await start(made, listener_proto(chain(tls=downstream, **fields)))
    return made, listener, {"ssl": client_context(), "server_hostname": "server.example.com"} if downstream else {}


@pytest.mark.parametrize(("downstream", "upstream"), MODES)
def test_bytes_both_ways(log, downstream, upstream):
    async def main():
        made, listener, options = await setup(downstream, upstream)
        reader, writer = await connect_to(listener.addresses[0].port, **options)
        data = os.urandom(2_000_000)
        for part in (b"hello", data):
            writer.write(part)
            assert await reader.readexactly(len(part)) == part
        assert made.stats.value("cluster.c.upstream_cx_active") == 1
        assert made.stats.value("cluster.c.upstream_rq_active") == 1
        assert made.clusters.get("c").limits[0].cx == 1
        writer.close()
        await until(lambda: not listener.active)
        total = 2_000_005
        line = log.lines[0]
        assert (line["bytes_received"], line["bytes_sent"], line["upstream_bytes_sent"], line["upstream_bytes_received"]) == (total,) * 4
        assert line["flags"] == 0
        assert line["upstream"].local.ip == "127.0.0.1"
        assert (line["upstream"].tls is not None) is upstream
        await until(lambda: made.stats.value("cluster.c.upstream_cx_active") == 0)
        values = {
            name: made.stats.value(f"cluster.c.upstream_{name}")
            for name in ("cx_total", "cx_destroy", "rq_total", "rq_active", "cx_rx_bytes_total", "cx_tx_bytes_total")
        }
        assert values == {"cx_total": 1, "cx_destroy": 1, "rq_total": 1, "rq_active": 0, "cx_rx_bytes_total": total, "cx_tx_bytes_total": total}
        assert made.stats.value("tcp.t.downstream_cx_total") == 1
        assert made.stats.value("tcp.t.downstream_cx_rx_bytes_total") == total
        assert made.clusters.get("c").limits[0].cx == 0
        host = made.clusters.get("c").pick(None)
        assert (host.cx_total, host.cx_active, host.rq_total, host.rq_active) == (1, 0, 1, 0)
        assert value(made, "downstream_cx_destroy") == 1

    run(main)


@pytest.mark.parametrize(("downstream", "upstream"), MODES)
def test_a_server_that_speaks_first(downstream, upstream):
    class Greeter(asyncio.Protocol):
        def connection_made(self, transport):
            transport.write(b"welcome")

    async def main():
        _, listener, options = await setup(downstream, upstream, Greeter)
        reader, _ = await connect_to(listener.addresses[0].port, **options)
        assert await reader.readexactly(7) == b"welcome"

    run(main)


@pytest.mark.parametrize(("downstream", "upstream"), MODES)
def test_a_server_that_hangs_up_after_its_answer(downstream, upstream):
    class Once(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            self.transport.write(b"z" * 300_000)
            self.transport.close()

    async def main():
        made, listener, options = await setup(downstream, upstream, Once)
        reader, writer = await connect_to(listener.addresses[0].port, **options)
        writer.write(b"go")
        assert len(await reader.read()) == 300_000
        writer.close()
        await until(lambda: not listener.active)
        assert made.stats.value("cluster.c.upstream_cx_destroy_with_active_rq") == 1

    run(main)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_half_close_towards_tls(version, size):
    """The server hears of the end by a close_notify, and its answer still comes."""

    def answer(sock):
        with server_context().wrap_socket(sock.accept()[0], server_side=True) as tls:
            count = 0
            while part := tls.recv(65536):
                count += len(part)
            tls.sendall(b"%d " % count + b"z" * size)

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            made = context()
            transport_socket = {"name": "tls", "typed_config": {"@type": UPSTREAM_TLS, **upstream_tls(params={"tls_maximum_protocol_version": version})}}
            add_cluster(made, server.getsockname()[1], transport_socket=transport_socket)
            listener = await start(made, listener_proto(chain()))
            done = asyncio.get_running_loop().run_in_executor(None, answer, server)
            reader, writer = await connect_to(listener.addresses[0].port)
            writer.write(bytes(size))
            writer.write_eof()
            assert await reader.read() == b"%d " % size + b"z" * size
            await done
            await until(lambda: not listener.active)

    run(main)


@pytest.mark.parametrize("late_client", [False, True])
def test_half_close(late_client):
    """A client that has said all still gets its answer."""

    class Counter_(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport
            self.count = 0

        def data_received(self, data):
            self.count += len(data)

        def eof_received(self):
            self.transport.write(b"%d" % self.count)
            self.transport.close()

    async def main():
        _, listener, _ = await setup(False, False, Counter_)
        reader, writer = await connect_to(listener.addresses[0].port)
        if late_client:
            await until(lambda: listener.active == 1)
        writer.write(bytes(100_000))
        writer.write_eof()
        assert await reader.read() == b"100000"
        await until(lambda: not listener.active)

    run(main)


@pytest.mark.parametrize(("downstream", "upstream"), MODES)
def test_back_pressure(downstream, upstream):
    servers = []

    class Slow(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport
            servers.append(transport)

        def data_received(self, data):
            self.transport.pause_reading()

    async def main():
        made, listener, options = await setup(downstream, upstream, Slow)
        _reader, writer = await connect_to(listener.addresses[0].port, **options)
        writer.transport.set_write_buffer_limits(0)
        writer.write(bytes(40_000_000))
        await until(lambda: made.stats.value("tcp.t.downstream_flow_control_paused_reading_total") > 0)
        await quiet(lambda: made.stats.value("tcp.t.downstream_cx_rx_bytes_total"))
        assert made.stats.value("tcp.t.downstream_cx_rx_bytes_total") < 25_000_000
        listener.close()
        await until(lambda: not listener.active)
        servers[0].abort()

    run(main)


@pytest.mark.parametrize(("downstream", "upstream"), MODES)
@pytest.mark.parametrize("side", ["client", "server"])
def test_reset(log, downstream, upstream, side):
    servers = []

    class Remember(Echo):
        def connection_made(self, transport):
            super().connection_made(transport)
            servers.append(transport)

    async def main():
        made, listener, options = await setup(downstream, upstream, Remember)
        reader, writer = await connect_to(listener.addresses[0].port, **options)
        writer.write(b"x")
        await reader.readexactly(1)
        if side == "client":
            reset(writer)
        else:
            servers[0].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            servers[0].abort()
            with pytest.raises((asyncio.IncompleteReadError, OSError)):
                await reader.readexactly(1)
            writer.close()
        await until(lambda: not listener.active)
        await until(lambda: made.stats.value("cluster.c.upstream_cx_active") == 0)
        assert made.stats.value(f"cluster.c.upstream_cx_destroy_{'local' if side == 'client' else 'remote'}") == 1
        if side == "server":
            assert log.lines[0]["flags"] == flags.UR
        assert made.clusters.get("c").limits[0].cx == 0
        assert len(log.lines) == 1

    run(main)


@pytest.mark.parametrize("tls", [False, True])
def test_refused(log, tls):
    async def main():
        made = context()
        add_cluster(made, free_port())
        listener = await start(made, listener_proto(chain(tls=tls, max_connect_attempts=3)))
        options = {"ssl": client_context(), "server_hostname": "server.example.com"} if tls else {}
        reader, writer = await connect_to(listener.addresses[0].port, **options)
        assert await reader.read() == b""
        writer.close()
        await until(lambda: bool(log.lines))
        line = log.lines[0]
        assert line["flags"] == flags.UF | flags.URX_LAST
        assert line["upstream_failure"] == "delayed connect error: Connection refused"
        assert line["attempts"] == 3
        stats = {
            name: made.stats.value(f"cluster.c.upstream_{name}")
            for name in ("cx_total", "cx_connect_fail", "cx_connect_attempts_exceeded", "cx_destroy_remote", "rq_pending_failure_eject")
        }
        assert stats == {"cx_total": 3, "cx_connect_fail": 3, "cx_connect_attempts_exceeded": 1, "cx_destroy_remote": 3, "rq_pending_failure_eject": 3}
        assert made.clusters.get("c").pick(None).cx_connect_fail == 3
        assert made.clusters.get("c").limits[0].cx == 0
        assert not listener.active

    run(main)


def test_another_attempt_finds_another_host(log):
    async def main():
        made = context()
        _, port = await serve()
        add_cluster(made, free_port(), port)
        listener = await start(made, listener_proto(chain(max_connect_attempts=5, backoff_options={"base_interval": "0.001s"})))
        for _ in range(4):
            reader, writer = await connect_to(listener.addresses[0].port)
            writer.write(b"hi")
            assert await reader.readexactly(2) == b"hi"
            writer.close()
        await until(lambda: len(log.lines) == 4)
        assert made.stats.value("cluster.c.upstream_cx_connect_fail") > 0
        assert {line["host"].port for line in log.lines} == {port}

    run(main)


def test_connect_timeout(log):
    async def main():
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            with socket.create_connection(full.getsockname()):
                made = context()
                add_cluster(made, full.getsockname()[1], connect_timeout="0.05s")
                listener = await start(made, listener_proto(chain()))
                reader, _ = await connect_to(listener.addresses[0].port)
                assert await reader.read() == b""
                assert log.lines[0]["flags"] == flags.UF | flags.URX_LAST
                assert made.stats.value("cluster.c.upstream_cx_connect_timeout") == 1
                assert made.stats.value("cluster.c.upstream_cx_destroy_local") == 1

    run(main)


def test_client_leaves_before_the_connection_is_made():
    async def main():
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            with socket.create_connection(full.getsockname()):
                made = context()
                add_cluster(made, full.getsockname()[1], connect_timeout="60s")
                listener = await start(made, listener_proto(chain(tls=True)))
                _, writer = await connect_to(listener.addresses[0].port, ssl=client_context(), server_hostname="server.example.com")
                await until(lambda: made.stats.value("cluster.c.upstream_cx_active") == 1)
                reset(writer)  # a FIN alone would be half a close
                await until(lambda: not listener.active)
                await until(lambda: made.stats.value("cluster.c.upstream_rq_cancelled") == 1)
                assert made.stats.value("cluster.c.upstream_cx_active") == 0
                assert made.stats.value("cluster.c.upstream_rq_pending_active") == 0
                assert made.clusters.get("c").limits[0].pending == 0

    run(main)


@pytest.mark.parametrize(
    ("cluster", "fields", "flag", "counter"),
    [
        (None, {}, flags.NC, "tcp.t.downstream_cx_no_route"),
        ({}, {}, flags.UH, "cluster.c.upstream_cx_none_healthy"),
        ({"circuit_breakers": {"thresholds": [{"max_connections": 0}]}}, {}, flags.UO, "cluster.c.upstream_cx_overflow"),
    ],
)
def test_no_upstream(log, cluster, fields, flag, counter):
    async def main():
        made = context()
        if cluster is not None:
            add_cluster(made, *([free_port()] if cluster else []), **cluster)
        listener = await start(made, listener_proto(chain(**fields)))
        reader, _ = await connect_to(listener.addresses[0].port)
        assert await reader.read() == b""
        assert log.lines[0]["flags"] == flag
        assert made.stats.value(counter) == 1

    run(main)


def test_connection_that_a_filter_in_front_closes(log):
    async def main():
        limit = {"@type": NETWORK_RATE_LIMIT, "stat_prefix": "l", "token_bucket": {"max_tokens": 1, "fill_interval": "600s"}}
        made = context()
        _, port = await serve(Echo)
        add_cluster(made, port)
        proto = chain()
        proto["filters"].insert(0, {"name": "limit", "typed_config": limit})
        listener = await start(made, listener_proto(proto))
        _, first = await connect_to(listener.addresses[0].port)
        await until(lambda: listener.active == 1)
        reader, _ = await connect_to(listener.addresses[0].port)
        assert await reader.read() == b""
        assert [(line["flags"], line["upstream"], line["attempts"]) for line in log.lines] == [(flags.URX, None, 0)]
        assert made.stats.value("tcp.t.downstream_cx_total") == 2
        first.close()

    run(main)


@pytest.mark.parametrize("tls", [False, True])
def test_idle_timeout(log, tls):
    async def main():
        now = 1000.0
        made, listener, options = await setup(tls, False, clock=lambda: now, idle_timeout="0.01s")
        reader, writer = await connect_to(listener.addresses[0].port, **options)
        queue = made.timers.queue(0.01, Session.idle_expired)
        for _ in range(5):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            now += 0.008  # each time nearly idle for too long
            timer = queue.handle
            await until(lambda timer=timer: queue.handle is not timer)
        assert listener.active == 1
        now += 0.003
        assert await reader.read() == b""
        assert made.stats.value("tcp.t.idle_timeout") == 1
        await until(lambda: len(log.lines) == 1)
        assert made.stats.value("cluster.c.upstream_cx_active") == 0

    run(main)


def test_maximum_duration(log):
    async def main():
        made, listener, _ = await setup(False, False, max_downstream_connection_duration="0.05s")
        reader, _ = await connect_to(listener.addresses[0].port)
        assert await reader.read() == b""
        assert made.stats.value("tcp.t.max_downstream_connection_duration") == 1
        assert log.lines[0]["flags"] == flags.DT

    run(main)


def test_logs_while_connected(log):
    async def main():
        options = {"flush_access_log_on_connected": True, "access_log_flush_interval": "0.02s"}
        _, listener, _ = await setup(False, False, access_log_options=options)
        _, writer = await connect_to(listener.addresses[0].port)
        await until(lambda: len(log.lines) >= 3)
        assert log.lines[0]["end"] == 0.0
        writer.close()
        await until(lambda: not listener.active)
        assert log.lines[-1]["end"] > 0
        # The next connection's lines show that time goes on; the first one's have come to an end.
        count, over = len(log.lines), log.lines[-1]["upstream"]
        await connect_to(listener.addresses[0].port)
        await until(lambda: len(log.lines) >= count + 3)
        assert over
        assert all(line["upstream"] is not over for line in log.lines[count:])

    run(main)


def test_closing_the_listener_ends_sessions(log):
    async def main():
        for tls in (False, True):
            made, listener, options = await setup(tls, False)
            reader, writer = await connect_to(listener.addresses[0].port, **options)
            writer.write(b"x")
            await reader.readexactly(1)
            listener.close()
            with pytest.raises((asyncio.IncompleteReadError, OSError)):
                await reader.readexactly(1)
            await until(lambda listener=listener: not listener.active)
            await until(lambda made=made: made.stats.value("cluster.c.upstream_cx_active") == 0)
        assert len(log.lines) == 2

    run(main)


def test_upstream_tls_that_fails(log):
    async def main():
        made = context()
        _, port = await serve()
        add_cluster(made, port, transport_socket={"name": "tls", "typed_config": {"@type": UPSTREAM_TLS, **upstream_tls()}})
        listener = await start(made, listener_proto(chain()))
        reader, writer = await connect_to(listener.addresses[0].port)
        writer.write(b"early")
        with pytest.raises((asyncio.IncompleteReadError, OSError)):
            await reader.readexactly(1)
        await until(lambda: bool(log.lines))
        assert log.lines[0]["upstream_failure"].startswith("TLS_error:")
        assert log.lines[0]["flags"] == flags.UF | flags.URX_LAST

    run(main)


# -- without sockets


def proxy(**fields: Any) -> TcpProxy:
    made = context()
    return TcpProxy(message(TCP_PROXY, {"stat_prefix": "t", **fields}), NetworkContext(made, made.stats.scope("")))


def connection() -> ConnectionInfo:
    return ConnectionInfo(1, Address("10.1.2.3", 4), Address("10.0.0.1", 80), 0.0)


def test_weighted_clusters():
    async def main():
        clusters = [{"name": "a", "weight": 1}, {"name": "b", "weight": 3, "metadata_match": {"filter_metadata": {"envoy.lb": {"x": "y"}}}}]
        made = proxy(weighted_clusters={"clusters": clusters}, metadata_match={"filter_metadata": {"envoy.lb": {"z": 1}}})
        counts = Counter(made.pick_target(connection()).cluster for _ in range(4000))
        assert 800 < counts["a"] < 1200
        assert made._targets[1].metadata_match == {"z": 1, "x": "y"}
        assert made._targets[0].metadata_match == {"z": 1}

    run(main)


def test_cluster_by_filter_state():
    async def main():
        conn = connection()
        conn.filter_state = {"envoy.tcp_proxy.cluster": "special"}
        assert proxy(cluster="c").pick_target(conn).cluster == "special"

    run(main)


def test_hash_policies():
    async def main():
        from xxhash import xxh64_intdigest

        assert proxy(cluster="c", hash_policy=[{"source_ip": {}}]).hash_of(connection()) == xxh64_intdigest(b"10.1.2.3")
        by_state = proxy(cluster="c", hash_policy=[{"filter_state": {"key": "k"}}])
        assert by_state.hash_of(connection()) is None
        conn = connection()
        conn.filter_state = {"k": "v"}
        assert by_state.hash_of(conn) == xxh64_intdigest(b"v")
        assert proxy(cluster="c").hash_of(conn) is None

    run(main)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "cluster"),
        ({"cluster": "c", "max_connect_attempts": 0}, "max_connect_attempts"),
        ({"cluster": "c", "backoff_options": {"base_interval": "2s", "max_interval": "1s"}}, "backoff_options.max_interval"),
        ({"cluster": "c", "flush_access_log_on_connected": True, "access_log_options": {}}, "access_log_options"),
        ({"cluster": "c", "access_log": [{"name": "x", "typed_config": {"@type": "type.googleapis.com/google.protobuf.Struct"}}]}, "access_log[0]"),
    ],
)
def test_configuration_refused(fields, path):
    async def main():
        with pytest.raises(ConfigError) as caught:
            proxy(**fields)
        assert caught.value.problems[0].path.startswith(path)

    run(main)
