"""Listeners with real sockets: accepting, matching, TLS, limits, stats, what is refused."""

from __future__ import annotations

import contextlib
import ssl
from types import SimpleNamespace
from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.net import sockets
from meshproxy.net.listener import Listener
from tests.polling import until
from tests.unit.listener_help import chain, connect, first_line, inspector
from tests.unit.listener_help import filters as filters
from tests.unit.net_help import (
    HTTP_INSPECTOR,
    TLS_INSPECTOR,
    client_context,
    connect_to,
    context,
    downstream_tls,
    listener_proto,
    run,
    start,
    tcp_proxy,
    value,
)


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
        for chained, path in (
            ([tcp_proxy(), tcp_proxy()], "filter_chains[0].filters[0]"),
            ([rbac], "filter_chains[0].filters[0]"),
            ([{"name": "x"}], "filter_chains[0].filters[0].typed_config"),
        ):
            with pytest.raises(ConfigError) as caught:
                await start(context(), listener_proto({"filters": chained}))
            assert caught.value.problems[0].path == path

    run(main)


def test_empty_chain_closes():
    async def main():
        listener = await start(context(), listener_proto({"filters": []}))
        assert await first_line(listener) == ""
        await until(lambda: not listener.active)
        listener.close()

    run(main)
