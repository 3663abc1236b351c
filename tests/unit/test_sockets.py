"""Binding, socket options, source addresses."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.net import dial, sockets
from meshproxy.net.address import Address
from tests.polling import PATIENCE
from tests.unit.net_help import Echo, free_port, listener_proto, message, run, serve

BIND = "envoy.config.core.v3.BindConfig"


@contextlib.contextmanager
def bound(proto, count=1):
    workers = sockets.bind(proto, count)
    try:
        yield workers
    finally:
        for sock in {sock for worker in workers for sock in worker}:
            sock.close()


def address(port=0, ip="127.0.0.1", **fields):
    return {"socket_address": {"address": ip, "port_value": port, **fields}}


def test_one_socket_for_each_worker():
    with bound(listener_proto(), 3) as workers:
        ports = {worker[0].getsockname()[1] for worker in workers}
        assert len(ports) == 1
        assert len({worker[0].fileno() for worker in workers}) == 3
        assert all(worker[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for worker in workers)


def test_shared_socket():
    with bound(listener_proto(enable_reuse_port=False), 2) as workers:
        assert workers[0][0] is workers[1][0]
        assert not workers[0][0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


def test_exact_balance_shares_a_socket():
    """That other processes may share the port, too, is another matter, as in Envoy."""
    with bound(listener_proto(connection_balance_config={"exact_balance": {}}), 2) as workers:
        assert workers[0][0] is workers[1][0]
        assert workers[0][0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


def test_additional_addresses():
    with bound(listener_proto(additional_addresses=[{"address": address(ip="::1")}]), 2) as workers:
        assert [sock.family for sock in workers[1]] == [socket.AF_INET, socket.AF_INET6]
    port = free_port()
    with pytest.raises(ConfigError) as caught:
        sockets.bind(listener_proto(address=address(port), additional_addresses=[{"address": address(port)}]), 1)
    assert caught.value.problems[0].path == "additional_addresses"


def test_port_in_use_closes_what_was_bound():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        port = free_port()
        with pytest.raises(ConfigError) as caught:
            sockets.bind(listener_proto(address=address(port), additional_addresses=[{"address": address(taken)}]), 2)
        problem = caught.value.problems[0]
        assert (problem.path, problem.why) == ("additional_addresses[0].address", f"cannot bind '127.0.0.1:{taken}': Address already in use")
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_unix_socket(tmp_path):
    path = str(tmp_path / "x.sock")
    proto = listener_proto(address={"pipe": {"path": path, "mode": 0o600}})
    with bound(proto, 2) as workers:
        assert workers[0][0] is workers[1][0]
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with bound(proto):  # what an earlier process left behind does not matter
        pass
    (tmp_path / "file").write_text("data")
    with pytest.raises(ConfigError, match="Address already in use"):
        sockets.bind(listener_proto(address={"pipe": {"path": str(tmp_path / "file")}}), 1)
    with pytest.raises(ConfigError):
        sockets.bind(listener_proto(address={"pipe": {"path": "/" + "x" * 200}}), 1)


def test_abstract_socket():
    with bound(listener_proto(address={"pipe": {"path": f"@meshproxy-test-{os.getpid()}"}})) as workers:
        assert workers[0][0].getsockname().startswith(b"\0")


def test_not_bound():
    assert sockets.bind(listener_proto(bind_to_port=False), 2) == [[], []]
    assert sockets.bind(listener_proto(deprecated_v1={"bind_to_port": False}), 1) == [[]]


def test_options_at_their_time():
    options = [
        {"level": socket.SOL_SOCKET, "name": socket.SO_KEEPALIVE, "int_value": 1, "state": "STATE_PREBIND"},
        {"level": socket.IPPROTO_TCP, "name": socket.TCP_DEFER_ACCEPT, "int_value": 5, "state": "STATE_LISTENING"},
        {"level": socket.SOL_SOCKET, "name": socket.SO_LINGER, "buf_value": "AQAAAAUAAAA=", "state": "STATE_BOUND"},
    ]
    with bound(listener_proto(socket_options=options, tcp_fast_open_queue_length=7, freebind=True)) as workers:
        sock = workers[0][0]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT) >= 5
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == b"\1\0\0\0\5\0\0\0"
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN) == 7
        assert sock.getsockopt(socket.IPPROTO_IP, sockets.IP_FREEBIND)
    with pytest.raises(ConfigError, match="Setting socket options failed"):
        sockets.bind(listener_proto(socket_options=[{"level": 1, "name": 99999, "int_value": 1}]), 1)


def test_dual_stack():
    for compat in (True, False):
        with bound(listener_proto(address=address(ip="::", ipv4_compat=compat))) as workers:
            assert bool(workers[0][0].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)) is not compat


def test_udp_is_refused():
    with pytest.raises(ConfigError) as caught:
        sockets.bind(listener_proto(address=address(protocol="UDP")), 1)
    assert caught.value.problems[0].path == "address.socket_address.protocol"


def test_keepalive():
    def compiled(**fields):
        return {option.name: option.value for option in sockets.compile_keepalive(message("envoy.config.core.v3.TcpKeepalive", fields))}

    assert compiled() == {socket.SO_KEEPALIVE: 1}
    assert compiled(keepalive_time=10, keepalive_probes=3) == {socket.SO_KEEPALIVE: 1, socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPCNT: 3}
    assert compiled(keepalive_time=0, keepalive_probes=0, keepalive_interval=0) == {}


def test_source_address_is_used():
    async def main():
        server, port = await serve()
        bind = message(
            BIND, {"source_address": {"address": "127.0.0.9", "port_value": 0}, "extra_source_addresses": [{"address": {"address": "::1", "port_value": 0}}]}
        )
        keepalive = message("envoy.config.core.v3.TcpKeepalive", {"keepalive_time": 33})
        options = sockets.compile_dial_options(bind, keepalive)
        transport, _ = await dial.connect(Address("127.0.0.1", port), Echo, timeout=PATIENCE, options=options)
        assert transport.get_extra_info("sockname")[0] == "127.0.0.9"
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 33
        assert options.source(socket.AF_INET6) == Address("::1", 0)
        transport.abort()
        server.close()

    run(main)


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"source_address": {"address": "x"}}, "source_address.address"),
        ({"extra_source_addresses": [{"address": {"address": "::1"}}]}, "source_address"),
        ({"source_address": {"address": "127.0.0.1"}, "extra_source_addresses": [{"address": {"address": "127.0.0.2"}}]}, "extra_source_addresses"),
        ({"source_address": {"address": "127.0.0.1"}, "socket_options": [{"level": 1, "name": 1}]}, "socket_options[0]"),
    ],
)
def test_bind_config_refused(document, path):
    with pytest.raises(ConfigError) as caught:
        sockets.compile_dial_options(message(BIND, document), None)
    assert caught.value.problems[0].path == path


def test_nothing_to_set():
    assert sockets.compile_dial_options(None, None) is None
