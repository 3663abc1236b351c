"""Pools of HTTP/2 connections against the `h2` package: who gets which connection, and how requests and connections end."""

from __future__ import annotations

import asyncio

import h2.errors
import h2.events
import h2.settings
import pytest

from meshproxy.codec.headers import Headers, RequestHead
from meshproxy.net import dial
from meshproxy.upstream import pool as pools
from tests.polling import PATIENCE
from tests.unit.http2_upstream_help import Caller, Link

Codes = h2.settings.SettingCodes


def post(*items: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead(b"POST", b"/p", b"a.test", [*items])


async def test_requests_share_a_connection_and_wait_for_no_settings(monkeypatch):
    link = Link(monkeypatch)
    callers = [Caller().go(link.pool) for _ in range(3)]
    assert link.counts("upstream_rq_pending_active") == [3]
    await link.run()
    (server,) = link.servers
    assert sorted(server.heads()) == [1, 3, 5]
    assert server.heads()[1] == [(b":authority", b"a.test"), (b":path", b"/"), (b":method", b"GET"), (b":scheme", b"http")]
    for stream in (5, 1, 3):
        server.answer(stream, b"%d" % stream)
    assert [caller.log for caller in callers] == [[(200, []), ("data", body, True)] for body in (b"1", b"3", b"5")]
    assert link.idle()
    assert link.counts("upstream_cx_http2_total", "upstream_cx_total", "upstream_rq_total", "upstream_rq_pending_total") == [1, 1, 3, 3]
    assert link.counts("upstream_cx_tx_bytes_total", "upstream_cx_rx_bytes_total") > [100, 50]


async def test_bodies_and_trailers_both_ways(monkeypatch):
    link = Link(monkeypatch)
    (caller,) = await link.serve(Caller(post(), body=b"hello", trailers=Headers([(b"x-sum", b"5")])))
    (server,) = link.servers
    assert [event.data for event in server.seen(h2.events.DataReceived)] == [b"hello"]
    assert server.seen(h2.events.TrailersReceived)[0].headers == [(b"x-sum", b"5")]
    server.h2.send_headers(1, [(":status", "103"), ("link", "</a>")])
    server.answer(1, b"abc", ("x", "1"), end=False)
    server.h2.send_headers(1, [("grpc-status", "0")], end_stream=True)
    server.flush()
    assert caller.log == [(103, [(b"link", b"</a>")]), (200, [(b"x", b"1")]), ("data", b"abc", False), ("read",), ("trailers", [(b"grpc-status", b"0")])]
    assert caller.stream.upstream_bytes_sent
    assert link.idle()


async def test_bytes_on_the_wire_where_a_log_asks_for_them(monkeypatch):
    link = Link(monkeypatch, metered=True)
    (caller,) = await link.serve(Caller(post(), body=b"hello", trailers=Headers([(b"x-sum", b"5")])))
    (server,) = link.servers
    server.answer(1, b"abc", ("x", "1"), end=False)
    server.h2.send_headers(1, [("grpc-status", "0")], end_stream=True)
    server.flush()
    counts = caller.stream
    sent = sum(len(name) + len(value) for name, value in server.heads()[1])
    assert counts.upstream_decompressed_header_bytes_sent == sent + len("x-sum5")
    assert counts.upstream_bytes_sent == counts.upstream_header_bytes_sent + 9 + len("hello")
    assert 18 < counts.upstream_header_bytes_sent < 18 + counts.upstream_decompressed_header_bytes_sent
    assert counts.upstream_decompressed_header_bytes_received == len(":status200x1grpc-status0")
    assert counts.upstream_bytes_received == counts.upstream_header_bytes_received + 9 + len("abc")
    assert counts.upstream_body_first


async def test_more_connections_when_streams_run_out(monkeypatch):
    link = Link(monkeypatch, max_concurrent_streams=2)
    callers = await link.serve(*[Caller() for _ in range(5)])
    assert [len(server.heads()) for server in link.servers] == [2, 2, 1]
    link.servers[0].answer(1)
    assert callers[0].log[0] == (200, [])
    await link.serve(Caller(), Caller())
    assert sum(len(server.heads()) for server in link.servers) == 7
    assert len(link.servers) == 3, "streams that have ended make room"


async def test_the_servers_limit_is_learnt(monkeypatch):
    link = Link(monkeypatch, settings={Codes.MAX_CONCURRENT_STREAMS: 1})
    link.pool.learns = True
    await link.serve(Caller())
    waiting = Caller().go(link.pool)
    later = Caller().go(link.pool)
    await link.run()
    assert [sorted(server.heads()) for server in link.servers] == [[1], [1], [1]], "and expected of the connections that follow"
    for server in link.servers:
        server.answer(1)
    assert waiting.log[-1] == later.log[-1] == ("data", b"ok", True)


@pytest.mark.parametrize("before", [0, 1])
async def test_a_server_whose_settings_name_no_limit_has_none(monkeypatch, before):
    link = Link(monkeypatch)
    link.pool.learns = True
    await link.serve(Caller())
    (server,) = link.servers
    server.h2.update_settings({Codes.MAX_CONCURRENT_STREAMS: before})
    server.flush()
    server.hang_up()
    await link.serve(Caller(), Caller())
    link.servers[-1].flush()
    await link.serve(Caller())
    assert sum(len(server.heads()) for server in link.servers[1:]) == 3


async def test_a_limit_that_is_raised_lets_those_in_that_wait(monkeypatch):
    link = Link(monkeypatch, settings={Codes.MAX_CONCURRENT_STREAMS: 1})
    await link.serve(Caller())
    link.cluster.limits[0].max_cx = 1
    waiting = Caller().go(link.pool)
    await link.run()
    (server,) = link.servers
    assert link.counts("upstream_rq_pending_active", "upstream_cx_overflow") == [1, 1]
    server.h2.update_settings({Codes.MAX_CONCURRENT_STREAMS: 3})
    server.flush()
    await link.run()
    assert sorted(server.heads()) == [1, 3]
    assert waiting.exchange is not None


async def test_circuit_breakers(monkeypatch):
    link = Link(monkeypatch)
    limits = link.cluster.limits[0]
    limits.max_rq, limits.max_pending = 1, 2
    callers = [Caller().go(link.pool) for _ in range(3)]
    assert callers[2].log == [("no connection", pools.OVERFLOW)]
    await link.run()
    assert callers[1].log == [("no connection", pools.OVERFLOW)]
    assert Caller().go(link.pool).log == [("no connection", pools.OVERFLOW)]
    assert link.counts("upstream_rq_pending_overflow", "upstream_rq_active_overflow") == [1, 2]
    link.servers[0].answer(1)
    assert link.idle()


async def test_nobody_listens(monkeypatch):
    link = Link(monkeypatch)
    link.refuse = dial.DialError(dial.CONNECT_FAILURE, "delayed connect error: Connection refused")
    callers = [Caller().go(link.pool) for _ in range(2)]
    await link.run()
    assert [caller.log for caller in callers] == [[("no connection", pools.CONNECT_FAILURE)]] * 2
    assert link.counts("upstream_cx_connect_fail", "upstream_rq_pending_failure_eject", "upstream_cx_active") == [1, 2, 0]


@pytest.mark.parametrize(
    ("code", "reason", "counter"),
    [
        (h2.errors.ErrorCodes.REFUSED_STREAM, pools.REFUSED, None),
        (h2.errors.ErrorCodes.CONNECT_ERROR, pools.CONNECT_ERROR, None),
        (h2.errors.ErrorCodes.PROTOCOL_ERROR, pools.PROTOCOL_ERROR, "upstream_rq_tx_reset"),
        (h2.errors.ErrorCodes.CANCEL, pools.REMOTE_RESET, "upstream_rq_rx_reset"),
        (h2.errors.ErrorCodes.NO_ERROR, pools.REMOTE_RESET, "upstream_rq_rx_reset"),
        (h2.errors.ErrorCodes.ENHANCE_YOUR_CALM, pools.REMOTE_RESET, "upstream_rq_rx_reset"),
    ],
)
async def test_resets_of_the_server(monkeypatch, code, reason, counter):
    link = Link(monkeypatch)
    one, other = await link.serve(Caller(), Caller())
    (server,) = link.servers
    server.h2.reset_stream(1, code)
    server.flush()
    assert one.log == [("reset", reason)]
    assert [name for name in ("upstream_rq_tx_reset", "upstream_rq_rx_reset") if link.counts(name)[0]] == ([counter] if counter else [])
    server.answer(3)
    assert other.log[-1] == ("data", b"ok", True)
    assert link.idle()


async def test_goaway(monkeypatch):
    link = Link(monkeypatch)
    kept, refused, late = await link.serve(Caller(), Caller(), Caller())
    server = link.servers[0]
    server.h2.close_connection(last_stream_id=1)
    server.protocol.data_received(server.h2.data_to_send())
    assert (kept.log, refused.log, late.log) == ([], [("reset", pools.REFUSED)], [("reset", pools.REFUSED)])
    assert link.counts("upstream_cx_close_notify") == [1]
    again = Caller().go(link.pool)
    await link.run()
    assert len(link.servers) == 2, "no more requests for that one"
    # What a server that still answers sends: HEADERS with END_STREAM.
    server.protocol.data_received(bytes.fromhex("000001 01 05 00000001 88"))
    assert kept.log == [(200, [])]
    await link.run()
    assert server.closed
    link.servers[1].answer(1)
    assert again.log[-1] == ("data", b"ok", True)
    assert link.counts("upstream_cx_active", "upstream_cx_destroy_local") == [1, 1]
    assert link.idle()


async def test_goaway_of_an_idle_connection(monkeypatch):
    link = Link(monkeypatch)
    await link.serve(Caller())
    (server,) = link.servers
    server.answer(1)
    server.h2.close_connection()
    server.flush()
    await link.run()
    assert server.closed
    assert not link.pool.ready
    assert not link.pool.connections


async def test_the_connection_is_lost(monkeypatch):
    link = Link(monkeypatch)
    callers = await link.serve(Caller(), Caller(post(), body=b"x", ended=False))
    link.servers[0].answer(1, b"part", end=False)
    link.servers[0].hang_up()
    assert callers[0].log == [(200, []), ("data", b"part", False), ("read",), ("reset", pools.TERMINATION)]
    assert callers[1].log == [("reset", pools.TERMINATION)]
    assert link.idle()
    names = "upstream_cx_destroy_remote_with_active_rq", "upstream_rq_pending_failure_eject", "upstream_cx_active", "http2.pending_send_bytes"
    assert link.counts(*names) == [1, 2, 0, 0]


@pytest.mark.parametrize("whole", [True, False])
async def test_what_is_not_http2_ends_all_requests(monkeypatch, whole):
    link = Link(monkeypatch)
    callers = await link.serve(Caller(), Caller())
    (server,) = link.servers
    garbage = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    # What came before it is passed on.
    server.protocol.data_received(bytes.fromhex("000001 01 04 00000001 88") * whole + garbage)
    await link.run()
    assert callers[0].log == [(200, [])] * whole + [("reset", pools.PROTOCOL_ERROR)]
    assert callers[1].log == [("reset", pools.PROTOCOL_ERROR)]
    assert server.seen(h2.events.ConnectionTerminated)[0].error_code == h2.errors.ErrorCodes.FRAME_SIZE_ERROR
    assert link.counts("upstream_cx_protocol_error", "upstream_rq_tx_reset", "upstream_cx_destroy_with_active_rq") == [1, 2, 0]
    assert server.closed
    assert link.idle()


async def test_a_request_that_gives_up(monkeypatch):
    link = Link(monkeypatch)
    one, other = await link.serve(Caller(), Caller())
    (server,) = link.servers
    one.exchange.abort()
    await link.run()
    assert [(event.stream_id, event.error_code) for event in server.seen(h2.events.StreamReset)] == [(1, h2.errors.ErrorCodes.INTERNAL_ERROR)]
    server.answer(3)
    assert (one.log, other.log[-1]) == ([], ("data", b"ok", True))
    assert link.idle()
    waiting = Link(monkeypatch)
    caller = Caller().go(waiting.pool)
    waiting.pool.cancel(caller)
    await waiting.run()
    assert waiting.counts("upstream_rq_cancelled", "upstream_rq_pending_active") == [1, 0]
    assert caller.log == []


async def test_a_response_that_overtakes_its_request(monkeypatch):
    link = Link(monkeypatch)
    (caller,) = await link.serve(Caller(post(), body=b"he", ended=False))
    (server,) = link.servers
    server.answer(1)
    await link.run()
    assert caller.log[-1] == ("early",)
    assert [event.error_code for event in server.seen(h2.events.StreamReset)] == [h2.errors.ErrorCodes.INTERNAL_ERROR]
    assert link.idle()


async def test_a_body_waits_for_the_servers_window(monkeypatch):
    link = Link(monkeypatch, settings={Codes.INITIAL_WINDOW_SIZE: 10})
    (caller,) = await link.serve(Caller(post(), ended=False))
    caller.exchange.send_data(b"x" * 25, False)
    caller.exchange.send_data(b"", True)
    caller.ended = True
    await link.run()
    (server,) = link.servers
    assert sum(len(event.data) for event in server.seen(h2.events.DataReceived)) == 10
    assert link.counts("http2.pending_send_bytes") == [15]
    for _ in range(3):
        server.h2.increment_flow_control_window(10, 1)
        server.flush()
        await link.run()
    assert sum(len(event.data) for event in server.seen(h2.events.DataReceived)) == 25
    assert server.seen(h2.events.StreamEnded)
    server.answer(1)
    assert link.idle()


async def test_a_window_that_opens_wide_is_used_to_its_end(monkeypatch):
    """More than is sent in one turn: the server has nothing more to say, nor has the transport."""
    link = Link(monkeypatch, initial_stream_window_size=65535, settings={Codes.INITIAL_WINDOW_SIZE: 10})
    (caller,) = await link.serve(Caller(post(), ended=False))
    for _ in range(40):
        caller.exchange.send_data(b"x" * 10_000, False)
    await link.run()
    (server,) = link.servers
    server.h2.increment_flow_control_window(1 << 20)
    server.h2.increment_flow_control_window(1 << 20, 1)
    server.flush()
    await link.run()
    assert sum(len(event.data) for event in server.seen(h2.events.DataReceived)) == 400_000
    assert caller.log == [("writable", False), ("writable", True)]


async def test_a_transport_that_is_full_holds_all_requests_back(monkeypatch):
    link = Link(monkeypatch)
    (one,) = await link.serve(Caller(post(), ended=False))
    (server,) = link.servers
    connection = server.protocol
    connection.pause_writing()
    connection.pause_writing()
    assert one.log == [("writable", False)]
    other = Caller(post(), ended=False).go(link.pool)
    assert other.log == [("writable", False)], "new ones hear it, too"
    one.exchange.send_data(b"later", False)
    await link.run()
    assert not server.seen(h2.events.DataReceived)
    connection.resume_writing()
    await link.run()
    assert [event.data for event in server.seen(h2.events.DataReceived)] == [b"later"]
    assert one.log[-1] == other.log[-1] == ("writable", True)


async def test_a_reader_that_is_slow_lets_the_server_send_no_more_than_its_window(monkeypatch):
    link = Link(monkeypatch, initial_stream_window_size=65535, initial_connection_window_size=65535)
    (caller,) = await link.serve(Caller())
    (server,) = link.servers
    caller.exchange.pause_reading()
    server.h2.send_headers(1, [(":status", "200")])
    sent = 0
    while window := min(server.h2.local_flow_control_window(1), 16384):
        server.h2.send_data(1, b"y" * window)
        sent += window
        server.flush()
        await link.run(2)
    assert sent == 65535
    caller.exchange.resume_reading()
    await link.run()
    assert server.h2.local_flow_control_window(1) == 65535
    assert [event.delta for event in server.seen(h2.events.WindowUpdated) if event.stream_id] == [65535]


async def test_extended_connect(monkeypatch):
    link = Link(monkeypatch, settings={Codes.ENABLE_CONNECT_PROTOCOL: 1})
    head = RequestHead(b"GET", b"/chat", b"a.test", [(b"connection", b"upgrade"), (b"upgrade", b"websocket"), (b"x", b"1")])
    (caller,) = await link.serve(Caller(head, ended=False, upgrade=b"websocket"))
    (server,) = link.servers
    pseudo = {b":authority": b"a.test", b":path": b"/chat", b":method": b"CONNECT", b":scheme": b"http", b":protocol": b"websocket"}
    assert dict(server.heads()[1]) == {**pseudo, b"x": b"1"}
    server.answer(1, b"hi", ("x", "2"), end=False)
    assert caller.log[:2] == [(101, [(b"x", b"2"), (b"upgrade", b"websocket"), (b"connection", b"upgrade")]), ("data", b"hi", False)]
    head = RequestHead(b"CONNECT", b"", b"b.test:80", [])
    await link.serve(Caller(head, ended=False, upgrade=b"CONNECT"))
    assert server.heads()[3] == [(b":authority", b"b.test:80"), (b":method", b"CONNECT")]


async def test_a_websocket_key_that_http2_does_not_answer_is_answered(monkeypatch):
    link = Link(monkeypatch, settings={Codes.ENABLE_CONNECT_PROTOCOL: 1})
    key = (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ==")
    accept = (b"sec-websocket-accept", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
    for version, answered in ((11, [accept]), (20, [])):
        head = RequestHead(b"GET", b"/chat", b"a.test", [(b"upgrade", b"websocket"), key], version=version)
        (caller,) = await link.serve(Caller(head, ended=False, upgrade=b"websocket"))
        stream = max(link.servers[0].heads())
        assert key in link.servers[0].heads()[stream]  # whoever comes next may speak HTTP/1
        link.servers[0].answer(stream, b"hi", end=False)
        assert caller.log[0] == (101, [(b"upgrade", b"websocket"), (b"connection", b"upgrade"), *answered])


async def test_an_upgrade_that_ends_as_it_begins(monkeypatch):
    link = Link(monkeypatch)
    (caller,) = await link.serve(Caller(ended=False, upgrade=b"websocket"))
    link.servers[0].h2.send_headers(1, [(":status", "200")], end_stream=True)
    link.servers[0].flush()
    assert [entry[0] for entry in caller.log] == [101, "data", "early"]
    assert caller.log[1] == ("data", b"", True)


async def test_the_answer_to_head_has_no_body_whatever_its_length(monkeypatch):
    link = Link(monkeypatch)
    (caller,) = await link.serve(Caller(RequestHead(b"HEAD", b"/", b"a.test", [])))
    link.servers[0].h2.send_headers(1, [(":status", "200"), ("content-length", "7")], end_stream=True)
    link.servers[0].flush()
    assert caller.log == [(200, [(b"content-length", b"7")])]


async def test_max_requests(monkeypatch):
    link = Link(monkeypatch, common={"max_requests_per_connection": 2})
    await link.serve(Caller(), Caller(), Caller())
    assert [sorted(server.heads()) for server in link.servers] == [[1, 3], [1]]
    assert link.counts("upstream_cx_max_requests") == [1]
    link.servers[0].answer(1)
    await link.run()
    assert not link.servers[0].closed
    link.servers[0].answer(3)
    await link.run()
    assert link.servers[0].closed
    assert not link.servers[1].closed


async def test_draining(monkeypatch):
    link = Link(monkeypatch)
    (caller,) = await link.serve(Caller())
    link.pool.drain()
    (server,) = link.servers
    await link.run()
    assert not server.closed
    server.answer(1)
    await link.run()
    assert caller.log[-1] == ("data", b"ok", True)
    assert server.closed


async def test_draining_while_a_request_waits_for_its_connection(monkeypatch):
    link = Link(monkeypatch)
    caller = Caller().go(link.pool)
    link.pool.drain()
    await link.run()
    link.servers[0].answer(1)
    await link.run()
    assert caller.log[-1] == ("data", b"ok", True)
    assert [server.closed for server in link.servers] == [True]


async def test_a_ping_that_is_not_answered(monkeypatch):
    link = Link(monkeypatch, connection_keepalive={"interval": "0.01s", "timeout": "0.01s"})
    (caller,) = await link.serve(Caller())
    (server,) = link.servers
    server.reading = False
    await asyncio.wait_for(caller.reset.wait(), PATIENCE)
    assert caller.log == [("reset", pools.TERMINATION)]
    assert link.counts("http2.keepalive_timeout", "upstream_cx_destroy_local_with_active_rq") == [1, 1]


async def test_a_ping_ahead_of_a_request_on_a_connection_that_was_silent(monkeypatch):
    link = Link(monkeypatch, connection_keepalive={"timeout": "30s", "connection_idle_interval": "10s"})
    await link.serve(Caller())
    (server,) = link.servers
    server.answer(1)
    for seconds, pings in ((9, 0), (11, 1)):
        link.clock.advance(seconds)
        await link.serve(Caller())
        assert len(server.seen(h2.events.PingReceived)) == pings
        server.answer(max(server.heads()))


async def test_connections_ahead_of_need(monkeypatch):
    link = Link(monkeypatch, max_concurrent_streams=1)
    link.pool.ratio = 2.0
    await link.serve(Caller())
    assert len(link.servers) == 2
    await link.serve(Caller())
    assert len(link.servers) == 4
    assert sorted(len(server.heads()) for server in link.servers) == [0, 0, 1, 1]
