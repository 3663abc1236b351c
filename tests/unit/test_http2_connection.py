"""Downstream HTTP/2 connections, with the `h2` package as the client: flow control, ends of streams and connections, time."""

from __future__ import annotations

import gc
from typing import Any

import h2.errors
import h2.events
import h2.settings
import pytest

from meshproxy.codec.headers import Headers, ResponseHead
from meshproxy.http.http2_connection import Http2ServerConnection
from meshproxy.http.http2_exchange import Http2Exchange
from meshproxy.http.stream import Stream
from meshproxy.net.gates import Counted, FirstDataGate
from meshproxy.observe import flags
from meshproxy.observe.stream_info import StreamInfo
from tests.unit.http2_downstream_help import GET, POST, Client, answer

WINDOW = int(h2.settings.SettingCodes.INITIAL_WINDOW_SIZE)
SMALL = "http2_protocol_options: {initial_stream_window_size: 65535, initial_connection_window_size: 65535}"


def test_a_request_and_its_response() -> None:
    client = Client()
    stream = client.ask([*GET, ("x-a", "1")])
    assert (stream.request.method, stream.request.path, stream.request.authority, stream.request.version) == (b"GET", b"/", b"a.test", 20)
    assert stream.request_ended
    assert stream.protocol == "HTTP/2"
    answer(stream, b"hello")
    client.read()
    head = client.seen(h2.events.ResponseReceived)[0]
    assert dict(head.headers)[":status"] == "200"
    assert client.seen(h2.events.DataReceived)[0].data == b"hello"
    assert client.logged == [(200, 0, None)]
    counted = client.counters()
    assert (counted["downstream_rq_http2_total"], counted["downstream_cx_http2_active"], counted["downstream_rq_2xx"]) == (1, 1, 1)
    assert "downstream_rq_active" not in counted


def test_bodies_and_trailers_both_ways() -> None:
    client = Client()
    stream = client.ask(POST, end=False)
    client.h2.send_data(1, b"one")
    client.send()
    client.h2.send_data(1, b"two")
    client.h2.send_headers(1, [("x-end", "1")], end_stream=True)
    client.send()
    assert stream.forwarding.body == b"onetwo"
    assert stream.forwarding.trailer.items == [(b"x-end", b"1")]
    stream.send_headers(ResponseHead(200, []), False)
    stream.send_data(b"back", False)
    stream.send_trailers(Headers([(b"grpc-status", b"0")]))
    client.read()
    assert client.seen(h2.events.TrailersReceived)[0].headers == [("grpc-status", "0")]


def test_heads_and_bodies_of_many_streams_are_one_write() -> None:
    client = Client()
    for _ in range(3):
        client.ask()
    for stream in client.router.streams:
        answer(stream)
    assert client.written == b""
    client.loop.pass_()
    assert client.written.count(b"ok") == 3


def test_what_the_client_does_not_take_holds_the_upstream_back() -> None:
    client = Client(SMALL)
    stream = client.ask()
    stream.send_headers(ResponseHead(200, []), False)
    stream.send_data(b"x" * 65535, False)
    assert stream.forwarding.writable == []
    stream.send_data(b"y" * 70000, False)
    assert stream.forwarding.writable == [False]
    assert stream.codec.full
    client.read()
    client.h2.acknowledge_received_data(65535, 1)
    client.send()
    assert stream.forwarding.writable == [False, True]
    assert not stream.codec.full


@pytest.mark.parametrize("piece", [10_000, 400_000])
def test_a_window_that_opens_wide_is_used_to_its_end(piece: int) -> None:
    """More than is sent in one turn: the client has nothing more to say, nor has the transport."""
    client = Client(SMALL)
    stream = client.ask()
    stream.send_headers(ResponseHead(200, []), False)
    for _ in range(400_000 // piece):
        stream.send_data(b"x" * piece, False)
    client.read()
    client.h2.increment_flow_control_window(1 << 20)
    client.h2.increment_flow_control_window(1 << 20, 1)
    client.send()
    client.read()
    assert sum(len(event.data) for event in client.seen(h2.events.DataReceived)) == 400_000
    assert stream.forwarding.writable == [False, True]


@pytest.mark.parametrize("left", [1000, 40_000])
def test_only_frames_that_wait_count_as_such(left: int) -> None:
    """A client that takes what it is sent, but never all of it, is no flood by what it has taken; by what it has not, it is."""
    client = Client("http2_protocol_options: {max_outbound_frames: 1000}")
    stream = client.ask()
    stream.send_headers(ResponseHead(200, []), False)
    client.get_write_buffer_size = lambda: left  # type: ignore[method-assign]
    for _ in range(2000):
        stream.send_data(b"x" * 11, False)
        client.loop.pass_()
    client.protocol.pause_writing()
    client.h2.ping(b"are you?")
    client.protocol.data_received(client.h2.data_to_send())
    client.loop.pass_()
    assert client.protocol.session.stats.outbound_flood.n == (left == 40_000)
    assert client.closed == ("aborted" if left == 40_000 else "")
    frames = client.protocol.session.outbound[0]
    assert left // 20 <= frames <= left // 20 + 600  # each is of 20 bytes, and they are told apart by some hundreds


def early(client: Client) -> Any:
    """A response that is all there before its request has ended, and of which the client has not taken the end."""
    stream = client.ask(POST, end=False)
    stream.send_headers(ResponseHead(200, []), False)
    stream.send_data(b"x" * 100_000, False)
    stream.send_trailers(Headers([(b"grpc-status", b"0")]))
    client.read()
    assert stream.ended
    assert sum(len(event.data) for event in client.seen(h2.events.DataReceived)) == 65535
    assert not client.seen(h2.events.StreamReset)
    assert client.logged == []
    return stream


def test_an_early_response_is_sent_to_its_end_before_the_request_is_stopped() -> None:
    client = Client(SMALL)
    stream = early(client)
    client.h2.send_data(1, b"more")
    client.send()
    assert stream.bytes_received == 0  # nobody wants it
    client.h2.acknowledge_received_data(65535, 1)
    client.send()
    assert sum(len(event.data) for event in client.seen(h2.events.DataReceived)) == 100_000
    assert client.seen(h2.events.TrailersReceived)
    assert [event.error_code for event in client.seen(h2.events.StreamReset)] == [h2.errors.ErrorCodes.NO_ERROR]
    assert client.logged == [(200, 0, None)]
    assert not client.protocol.session.streams


def test_an_early_response_whose_request_ends_in_time() -> None:
    client = Client(SMALL)
    early(client)
    client.h2.end_stream(1)
    client.send()
    assert client.logged == []
    client.h2.acknowledge_received_data(65535, 1)
    client.send()
    assert client.seen(h2.events.StreamEnded)
    assert not client.seen(h2.events.StreamReset)
    assert client.logged == [(200, 0, None)]
    assert not client.protocol.session.streams


def test_an_early_response_that_nobody_wants() -> None:
    client = Client(SMALL)
    early(client)
    client.h2.reset_stream(1, h2.errors.ErrorCodes.CANCEL)
    client.send()
    assert client.logged == [(200, flags.DR, "http2.remote_reset")]
    other = Client(SMALL)
    early(other)
    other.protocol.connection_lost(None)
    assert other.logged == [(200, flags.DC, "downstream_remote_disconnect")]


def test_a_slow_transport_holds_all_upstreams_back() -> None:
    client = Client()
    first, second = client.ask(), client.ask()
    first.send_headers(ResponseHead(200, []), False)
    client.protocol.pause_writing()
    assert (first.forwarding.writable, second.forwarding.writable) == ([False], [False])
    second.send_headers(ResponseHead(200, []), False)
    first.send_data(b"later", True)
    client.read()
    assert not client.seen(h2.events.DataReceived)
    client.protocol.resume_writing()
    client.read()
    assert client.seen(h2.events.DataReceived)[0].data == b"later"
    assert second.forwarding.writable == [False, False, True]  # told again when its response began


def test_a_full_upstream_holds_its_client_back_and_no_other() -> None:
    client = Client(SMALL)
    first = client.ask(POST, end=False)
    second = client.ask(POST, end=False)
    first.pause_request()
    first.pause_request()
    client.h2.send_data(1, b"x" * 16384)
    client.h2.send_data(1, b"x" * 16384)
    client.h2.send_data(3, b"y" * 16384)
    client.h2.send_data(3, b"y" * 16382)
    updates = [event for event in client.send() if isinstance(event, h2.events.WindowUpdated)]
    assert {event.stream_id for event in updates} <= {0, 3}
    first.resume_request()
    assert 1 in {event.stream_id for event in client.read() if isinstance(event, h2.events.WindowUpdated)}
    assert client.counters()["downstream_flow_control_paused_reading_total"] == 1
    assert client.counters()["downstream_flow_control_resumed_reading_total"] == 1
    assert len(second.forwarding.body) == 32766


def test_a_stream_is_over_when_the_client_has_taken_its_response() -> None:
    client = Client(settings={WINDOW: 10})
    stream = client.ask()
    answer(stream, b"x" * 15)
    client.read()
    assert stream.ended
    assert client.logged == []
    assert client.counters()["downstream_rq_active"] == 1
    client.h2.increment_flow_control_window(10, 1)
    client.send()
    assert client.logged == [(200, 0, None)]
    assert "downstream_rq_active" not in client.counters()


@pytest.mark.parametrize(("code", "flag", "details"), [(8, flags.DR, "http2.remote_reset"), (7, flags.DR, "http2.remote_refuse"), (0, 0, None)])
def test_a_reset_of_what_was_not_taken(code: int, flag: int, details: str | None) -> None:
    client = Client(settings={WINDOW: 10})
    answer(client.ask(), b"x" * 15)
    client.read()
    client.h2.reset_stream(1, code)
    client.send()
    assert client.logged == [(200, flag, details)]
    assert client.counters()["downstream_rq_rx_reset"] == 1


def test_the_end_of_a_response_is_not_waited_for_for_ever() -> None:
    client = Client("stream_flush_timeout: 2s", settings={WINDOW: 10})
    answer(client.ask(), b"x" * 15)
    client.read(1.9)
    assert client.logged == []
    events = client.read(0.2)
    assert [event.error_code for event in events if isinstance(event, h2.events.StreamReset)] == [h2.errors.ErrorCodes.INTERNAL_ERROR]
    assert len(client.logged) == 1
    assert client.counters()["http2.tx_flush_timeout"] == 1


def test_a_response_before_the_request_is_complete_stops_the_request() -> None:
    client = Client()
    answer(client.ask(POST, end=False))
    client.read()
    assert client.seen(h2.events.StreamReset)[0].error_code == h2.errors.ErrorCodes.NO_ERROR
    assert client.counters()["downstream_rq_response_before_rq_complete"] == 1


def test_only_idle_streams_end() -> None:
    client = Client("stream_idle_timeout: 10s")
    idle = client.ask()
    client.read(6)
    busy = client.ask(POST, end=False)
    client.read(5)
    assert idle.ended
    assert not busy.ended
    client.h2.send_data(3, b"still here")
    client.send()
    client.read(9)
    assert not busy.ended
    client.read(2)
    assert busy.ended
    assert [status for status, _, _ in client.logged] == [504, 408]


def test_a_connection_without_requests_is_idle_from_the_end_of_the_last_one() -> None:
    client = Client("common_http_protocol_options: {idle_timeout: 10s}, drain_timeout: 1s")
    client.read(9)
    stream = client.ask()
    client.read(30)
    answer(stream)
    client.read(9.5)
    assert not client.seen(h2.events.ConnectionTerminated)
    client.loop.pass_(0.6)
    assert client.written
    client.loop.pass_(3)
    assert client.closed
    assert client.counters()["downstream_cx_idle_timeout"] == 1


def test_a_listener_that_drains_closes_an_idle_connection_at_once() -> None:
    client = Client()
    answer(client.ask())
    client.read()
    client.manager.drain_connections()
    assert client.closed
    client.read()
    assert client.seen(h2.events.ConnectionTerminated)


def test_a_listener_that_drains_closes_a_busy_connection_after_its_last_response() -> None:
    client = Client()
    first, second = client.ask(), client.ask()
    client.manager.drain_connections()
    answer(first)
    client.loop.pass_()
    assert not client.closed
    answer(second)
    client.loop.pass_()
    assert client.closed


def test_premature_resets_end_the_connection() -> None:
    client = Client(runtime={"overload.premature_reset_total_stream_count": 6})
    for stream_id in (1, 3, 5):
        client.ask()
        client.h2.reset_stream(stream_id)
        client.protocol.data_received(client.h2.data_to_send())
    assert client.closed == "aborted"
    assert client.counters()["downstream_rq_too_many_premature_resets"] == 1


def test_resets_of_requests_that_lived_are_not_premature() -> None:
    client = Client(runtime={"overload.premature_reset_total_stream_count": 6})
    for stream_id in (1, 3, 5, 7):
        client.ask()
        client.read(2)
        client.h2.reset_stream(stream_id)
        client.send()
    assert not client.closed


def test_the_end_of_a_connection_ends_its_streams_and_leaves_nothing() -> None:
    keepalive = "http2_protocol_options: {connection_keepalive: {interval: 10s, timeout: 1s}}"
    client = Client(f"common_http_protocol_options: {{max_connection_duration: 100s}}, {keepalive}")
    answered = client.ask()
    stream = client.ask(POST, end=False)
    answer(answered)
    client.read()
    gc.collect()
    gc.disable()
    try:
        client.protocol.connection_lost(None)
        client.protocol = None
        client.loop.pass_()
        assert stream.ended
        assert stream.forwarding is None
        assert client.logged[-1] == (0, flags.DC, "downstream_remote_disconnect")
        client.router.streams.clear()
        del stream, answered
        assert not [thing for thing in gc.get_objects() if type(thing) in (Http2ServerConnection, Http2Exchange, Stream)]
    finally:
        gc.enable()
    assert client.loop.waiting == 0
    counted = client.counters()
    assert counted["downstream_cx_destroy_remote_active_rq"] == 1
    assert "downstream_cx_http2_active" not in counted


def test_a_ping_that_is_not_answered() -> None:
    client = Client("http2_protocol_options: {connection_keepalive: {interval: 10s, timeout: 2s, interval_jitter: {value: 0}}}")
    client.loop.pass_(10.1)
    assert client.written
    client.loop.pass_(1.5)
    client.h2.send_headers(1, GET, end_stream=True)  # the answer may be behind it
    client.protocol.data_received(client.h2.data_to_send())
    client.loop.pass_(1.5)
    assert not client.closed
    client.loop.pass_(1)
    assert client.closed == "aborted"
    assert client.info.local_close_reason == "http2_ping_timeout"
    assert client.counters()["http2.keepalive_timeout"] == 1


def test_prior_knowledge_behind_gates() -> None:
    client = Client(begin=False)
    entry = StreamInfo()
    entry.connection = client.info
    counted = Counted(entry, client.protocol)
    gate = FirstDataGate(client.info, counted, (lambda info: None,), leaves=False)
    gate.connection_made(client)
    client.set_protocol(gate)
    client.h2.initiate_connection()
    client.send()
    client.ask()
    assert client.protocol is gate
    assert type(client.router.streams[0].codec).__name__ == "Http2Exchange"
    assert entry.protocol == "HTTP/2"
    assert client.counters()["downstream_cx_http2_total"] == 1
    assert "downstream_cx_http1_total" not in client.counters()
