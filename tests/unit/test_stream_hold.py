"""Filters that keep heads and pieces of bodies, and give data back where trailers come."""

from __future__ import annotations

import asyncio
from typing import Any

from meshproxy.codec.headers import Headers, ResponseHead
from meshproxy.http.filter_chain import HOLD
from meshproxy.http.replies import Reply
from tests.polling import PATIENCE
from tests.unit.stream_help import make

TRAILERS = [(b"grpc-status", b"0")]


class Collector:
    """Keeps a response until its end; then says how long it is, and doubles it."""

    def __init__(self) -> None:
        self.body = b""

    def response_headers(self, stream: Any, end_stream: bool) -> Any:
        return None if end_stream else HOLD

    def response_data(self, stream: Any, data: bytes, end_stream: bool) -> Any:
        self.body += data
        return self._end(stream) if end_stream else HOLD

    def response_trailers(self, stream: Any, trailers: Headers) -> Any:
        return self._end(stream)

    def _end(self, stream: Any) -> bytes:
        stream.response.set(b"x-length", b"%d" % len(self.body))
        stream.release_headers()
        return self.body * 2


class Witness:
    """Sees what passes, and answers what it is told to."""

    def __init__(self, **answers: Any) -> None:
        self.seen: list[Any] = []
        self.answers = answers

    def _answer(self, name: str, what: Any) -> Any:
        self.seen.append(what)
        return self.answers.get(name)

    def response_headers(self, stream: Any, end_stream: bool) -> Any:
        return self._answer("headers", (stream.response.status, end_stream))

    def response_data(self, stream: Any, data: bytes, end_stream: bool) -> Any:
        return self._answer("data", (data, end_stream))

    def response_trailers(self, stream: Any, trailers: Headers) -> Any:
        return self._answer("trailers", trailers.items.copy())

    request_data = response_data
    request_trailers = response_trailers


def respond(stream: Any, *pieces: bytes, trailers: list[tuple[bytes, bytes]] | None = None) -> None:
    stream.send_headers(ResponseHead(200, []), False)
    for position, piece in enumerate(pieces):
        stream.send_data(piece, trailers is None and position == len(pieces) - 1)
    if trailers is not None:
        stream.send_trailers(Headers(trailers.copy()))


def head(length: int, status: int = 200) -> tuple[Any, ...]:
    return ("head", status, [(b"x-length", b"%d" % length)], False)


def test_a_kept_head_goes_when_the_filter_lets_it() -> None:
    before, after = Witness(), Witness()
    stream, codec, _ = make(after, Collector(), before)
    stream.go(True)
    respond(stream, b"ab", b"", b"c")
    assert codec.out == [head(3), ("data", b"abcabc", True), ("done",)]
    assert before.seen == [(200, False), (b"ab", False), (b"", False), (b"c", True)]
    assert after.seen == [(200, False), (b"abcabc", True)]


def test_data_comes_before_trailers() -> None:
    before, after = Witness(), Witness()
    stream, codec, _ = make(after, Collector(), before)
    stream.go(True)
    respond(stream, b"ab", b"c", trailers=TRAILERS)
    assert codec.out == [head(3), ("data", b"abcabc", False), ("trailers", TRAILERS), ("done",)]
    assert before.seen == [(200, False), (b"ab", False), (b"c", False), TRAILERS]
    assert after.seen == [(200, False), (b"abcabc", False), TRAILERS]
    assert stream.bytes_sent == 6


def test_two_that_keep() -> None:
    stream, codec, _ = make(Collector(), Collector())
    stream.go(True)
    respond(stream, b"a", b"b", trailers=TRAILERS)
    assert codec.out == [("head", 200, [(b"x-length", b"4")], False), ("data", b"abababab", False), ("trailers", TRAILERS), ("done",)]


def test_trailers_that_were_taken_away_end_the_body() -> None:
    class Emptying:
        def response_trailers(self, stream: Any, trailers: Headers) -> bytes:
            for name, _ in trailers.items.copy():
                trailers.remove(name)
            return b"end"

    stream, codec, _ = make(Emptying())
    stream.go(True)
    respond(stream, b"a", trailers=TRAILERS)
    assert codec.out == [("head", 200, [], False), ("data", b"a", False), ("data", b"end", False), ("data", b"", True), ("done",)]


def test_a_reply_in_place_of_a_kept_head_is_not_filtered() -> None:
    after = Witness()
    stream, codec, forwarding = make(after, Collector())
    stream.go(True)
    stream.send_headers(ResponseHead(200, []), False)
    stream.local_reply(Reply(503, b"gone", details="why"))
    assert codec.out == [("head", 503, [(b"content-length", b"4"), (b"content-type", b"text/plain")], False), ("data", b"gone", True), ("done",)]
    assert after.seen == []
    assert forwarding.done


def test_a_filter_may_reply_instead_of_what_it_keeps() -> None:
    class Limited(Collector):
        def response_data(self, stream: Any, data: bytes, end_stream: bool) -> Any:
            self.body += data
            return Reply(500, b"long", details="too_long") if len(self.body) > 3 else HOLD

    before = Witness()
    stream, codec, _ = make(Limited(), before)
    stream.go(True)
    respond(stream, b"ab", b"cd")
    assert [part[:2] for part in codec.out] == [("head", 500), ("data", b"long"), ("done",)]
    assert before.seen == [(200, False), (b"ab", False), (b"cd", True)]


async def test_a_head_that_is_let_go_may_have_to_wait_for_a_later_filter() -> None:
    for trailers in (None, TRAILERS):
        gate = asyncio.get_running_loop().create_future()
        after = Witness(headers=gate)
        stream, codec, _ = make(after, Collector())
        stream.go(True)
        respond(stream, b"a", b"b", trailers=trailers)
        assert codec.out == []
        gate.set_result(None)
        while stream._response_hold is not None:
            await asyncio.sleep(0)
        end = [("data", b"abab", True)] if trailers is None else [("data", b"abab", False), ("trailers", TRAILERS)]
        assert codec.out == [head(2), *end, ("done",)]
        assert after.seen == [(200, False), (b"abab", trailers is None), *([] if trailers is None else [TRAILERS])]


async def test_data_before_trailers_may_have_to_wait() -> None:
    gate = asyncio.get_running_loop().create_future()
    after = Witness(data=gate)
    stream, codec, _ = make(after, Witness(trailers=b"late"))
    stream.go(True)
    respond(stream, trailers=TRAILERS)
    assert codec.out == [("head", 200, [], False)]
    gate.set_result(b"later")
    while stream._response_hold is not None:
        await asyncio.sleep(0)
    assert codec.out == [("head", 200, [], False), ("data", b"later", False), ("trailers", TRAILERS), ("done",)]


async def test_an_awaitable_may_give_data_before_trailers() -> None:
    gate = asyncio.get_running_loop().create_future()
    stream, codec, _ = make(Witness(trailers=gate))
    stream.go(True)
    respond(stream, trailers=TRAILERS)
    gate.set_result(b"late")
    while stream._response_hold is not None:
        await asyncio.sleep(0)
    assert codec.out == [("head", 200, [], False), ("data", b"late", False), ("trailers", TRAILERS), ("done",)]


def test_pieces_of_a_request_can_be_kept() -> None:
    class Whole:
        body = b""

        def request_data(self, stream: Any, data: bytes, end_stream: bool) -> Any:
            self.body += data
            return self.body if end_stream else HOLD

        def request_trailers(self, stream: Any, trailers: Headers) -> bytes:
            return self.body

    for trailers in (False, True):
        before, after = Witness(), Witness()
        stream, _, forwarding = make(before, Whole(), after)
        stream.go(False)
        stream.on_data(b"a", False)
        stream.on_data(b"b", not trailers)
        if trailers:
            stream.on_trailers(Headers([(b"x", b"1")]))
            assert forwarding.out == [("head", [], False), ("data", b"ab", False), ("trailers", [(b"x", b"1")])]
            assert after.seen == [(b"ab", False), [(b"x", b"1")]]
        else:
            assert forwarding.out == [("head", [], False), ("data", b"ab", True)]
            assert before.seen == [(b"a", False), (b"b", True)]
            assert after.seen == [(b"ab", True)]


async def test_data_before_request_trailers_may_have_to_wait() -> None:
    gate = asyncio.get_running_loop().create_future()
    stream, _, forwarding = make(Witness(trailers=b"late"), Witness(data=gate))
    stream.go(False)
    stream.on_trailers(Headers([(b"x", b"1")]))
    assert forwarding.out == [("head", [], False)]
    gate.set_result(None)
    while stream._request_hold is not None:
        await asyncio.sleep(0)
    assert forwarding.out == [("head", [], False), ("data", b"late", False), ("trailers", [(b"x", b"1")])]


class Adding:
    """Ends every response with trailers; a response without a body gets one."""

    empty = False

    def response_headers(self, stream: Any, end_stream: bool) -> Any:
        self.empty = end_stream
        return HOLD if end_stream else None

    def response_data(self, stream: Any, data: bytes, end_stream: bool) -> Any:
        if self.empty:
            stream.release_headers()
            data = b"made up"
        if end_stream:
            stream.response_trailers = Headers(TRAILERS.copy())
        return data


def test_trailers_can_be_added() -> None:
    before, after = Witness(), Witness()
    stream, codec, _ = make(after, Adding(), before)
    stream.go(True)
    respond(stream, b"a", b"b")
    assert codec.out == [("head", 200, [], False), ("data", b"a", False), ("data", b"b", False), ("trailers", TRAILERS), ("done",)]
    assert before.seen == [(200, False), (b"a", False), (b"b", True)]
    assert after.seen == [(200, False), (b"a", False), (b"b", False), TRAILERS]


def test_a_response_without_a_body_can_get_one() -> None:
    before, after = Witness(), Witness()
    stream, codec, _ = make(after, Adding(), before)
    stream.go(True)
    stream.send_headers(ResponseHead(204, []), True)
    assert codec.out == [("head", 204, [], False), ("data", b"made up", False), ("trailers", TRAILERS), ("done",)]
    assert before.seen == [(204, True)]
    assert after.seen == [(204, False), (b"made up", False), TRAILERS]


async def test_added_trailers_wait_for_what_goes_before_them() -> None:
    for answers in ({"data": b"later"}, {"headers": None}):
        ((kind, value),) = answers.items()
        gate = asyncio.get_running_loop().create_future()
        stream, codec, _ = make(Witness(**{kind: gate}), Adding())
        stream.go(True)
        stream.send_headers(ResponseHead(204, []), True)
        assert ("trailers", TRAILERS) not in codec.out
        gate.set_result(value)
        while stream._response_hold is not None:
            await asyncio.sleep(0)
        assert codec.out == [("head", 204, [], False), ("data", value or b"made up", False), ("trailers", TRAILERS), ("done",)]


def test_added_trailers_reach_a_filter_that_keeps_the_body() -> None:
    stream, codec, _ = make(Collector(), Adding())
    stream.go(True)
    respond(stream, b"a", b"b")
    assert codec.out == [head(2), ("data", b"abab", False), ("trailers", TRAILERS), ("done",)]


async def test_a_filter_that_buffers_goes_on_reading_where_the_one_before_it_had_enough() -> None:
    asked = asyncio.get_running_loop().create_future()

    class Asks:
        async def request_headers(self, stream: Any, end_stream: bool) -> None:
            await asked

    class Buffers:
        whole: bool | None = None

        async def request_headers(self, stream: Any, end_stream: bool) -> None:
            self.whole = await stream.buffered_request(100)
            assert stream.buffered_body(4) == (b"xxxx", True)

    buffers = Buffers()
    stream, codec, _ = make(Asks(), buffers, buffer_limit=10)
    stream.go(False)
    stream.on_data(b"x" * 20, False)
    assert codec.paused
    asked.set_result(None)
    async with asyncio.timeout(PATIENCE):
        while codec.paused:
            await asyncio.sleep(0)
    stream.on_data(b"y" * 20, True)
    async with asyncio.timeout(PATIENCE):
        while buffers.whole is None:
            await asyncio.sleep(0)
    assert buffers.whole


async def test_a_filter_that_wants_the_beginning_alone() -> None:
    class Peeks:
        seen: Any = None

        async def request_headers(self, stream: Any, end_stream: bool) -> None:
            assert await stream.buffered_request(4, partly=True)
            self.seen = stream.buffered_body(4)

    peeks = Peeks()
    stream, _, forwarding = make(peeks)
    stream.go(False)
    stream.on_data(b"ab", False)
    await asyncio.sleep(0)
    assert peeks.seen is None
    stream.on_data(b"cde", False)
    async with asyncio.timeout(PATIENCE):
        while stream._request_hold is not None:
            await asyncio.sleep(0)
    assert peeks.seen == (b"abcd", True)
    assert [entry[1] for entry in forwarding.out if entry[0] == "data"] == [b"ab", b"cde"]
