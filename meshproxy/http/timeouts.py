"""The timeouts of one request: what the route says, unless its `x-envoy-*` and `grpc-timeout` headers say otherwise.

Pure functions of a route and a head, after Envoy's FilterUtility::finalTimeout. Times are seconds here and whole milliseconds in headers; 0 is no timeout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api.matchers import parse_int64
from meshproxy.codec.grpc import format_timeout, parse_timeout
from meshproxy.http import retry
from meshproxy.http.replies import Reply
from meshproxy.observe import flags

if TYPE_CHECKING:
    from meshproxy.codec.headers import RequestHead
    from meshproxy.http.routes import Route
    from meshproxy.http.stream import Stream

_TIMEOUT = b"x-envoy-upstream-rq-timeout-ms"
_PER_TRY = b"x-envoy-upstream-rq-per-try-timeout-ms"
EXPECTED = b"x-envoy-expected-rq-timeout-ms"
_ALT_RESPONSE = b"x-envoy-upstream-rq-timeout-alt-response"
_STREAM_DURATION = b"x-envoy-upstream-stream-duration-ms"
_ALT_STAT_NAME = b"x-envoy-upstream-alt-stat-name"

# A head without any of these gets its route's constants.
CONTROL_HEADERS = retry.REQUEST_HEADERS | {_ALT_STAT_NAME, _TIMEOUT, _PER_TRY, EXPECTED, _ALT_RESPONSE, _STREAM_DURATION, b"grpc-timeout"}


def prepare(route: Route, stream: Stream, router: Any) -> tuple[float, float]:
    """The global and the per-try timeout of a request, in seconds. Consumes its timeout headers and sets the expected-timeout header.

    `router` gives `suppress` (no `x-envoy-` headers to be set) and `respect_expected`. What the other headers ask for is left on the stream:
    `locals["timeout_204"]`, `locals["alt_stat"]`, and `locals["stream_duration"]` in seconds.
    """
    head = stream.request
    assert head is not None
    if head.get(_TIMEOUT) is None and CONTROL_HEADERS.isdisjoint(head._index or ()) and not (route.max_grpc_timeout_ms is not None and stream.is_grpc):
        if not router.suppress and route.expected_timeout is not None:
            head.add(EXPECTED, route.expected_timeout)
        return route.timeout, route.per_try_timeout
    grpc = stream.is_grpc
    global_ms, per_try_ms = final_timeouts(route, head, grpc, respect_expected=router.respect_expected)
    set_expected(route, head, global_ms, per_try_ms, 0, grpc=grpc, hedging=retry.hedges(route, head), insert=not router.suppress)
    if head.remove(_ALT_RESPONSE):
        stream.locals["timeout_204"] = True
    alternative = head.get(_ALT_STAT_NAME)
    if alternative:
        stream.locals["alt_stat"] = alternative.decode("latin-1")
        head.remove(_ALT_STAT_NAME)
    duration = head.get(_STREAM_DURATION)
    if duration is not None:
        milliseconds = _unsigned(duration)
        if milliseconds is not None:
            stream.locals["stream_duration"] = milliseconds / 1000
        head.remove(_STREAM_DURATION)
    if route.retry is None and head.get(b"x-envoy-retry-on") is None and head.get(b"x-envoy-retry-grpc-on") is None:
        # There will be no retry state to consume these.
        for name in retry.REQUEST_HEADERS:
            head.remove(name)
    return global_ms / 1000, per_try_ms / 1000


def final_timeouts(route: Route, head: RequestHead, grpc: bool, *, respect_expected: bool = False) -> tuple[int, int]:
    """The global and the per-try timeout in milliseconds, 0 for none. Consumes the headers that it reads, except the hop's own expectation."""
    global_ms = route.timeout_ms
    if grpc and route.max_grpc_timeout_ms is not None and not route.uses_stream_duration:
        global_ms = _grpc_timeout_ms(route.max_grpc_timeout_ms, route.grpc_timeout_offset_ms, head)
    asked = head.get(EXPECTED) if respect_expected else None
    if asked is None:
        asked = head.get(_TIMEOUT)
        head.remove(_TIMEOUT)
    if asked is not None:
        global_ms = _or_default(asked, global_ms)
    per_try_ms = route.per_try_timeout_ms
    asked = head.get(_PER_TRY)
    if asked:
        per_try_ms = _or_default(asked, per_try_ms)
        head.remove(_PER_TRY)
    if global_ms and per_try_ms >= global_ms:
        per_try_ms = 0
    return global_ms, per_try_ms


def _grpc_timeout_ms(maximum: int, offset: int | None, head: RequestHead) -> int:
    """What a gRPC client allows, less the offset, at most the maximum; 0 stands for for ever in all three."""
    timeout = parse_timeout(head.get(b"grpc-timeout")) or 0
    if offset is not None and offset < timeout:
        timeout -= offset
    return maximum if maximum and (timeout == 0 or timeout > maximum) else timeout


def expected_ms(global_ms: int, per_try_ms: int, elapsed_ms: int, *, hedging: bool = False) -> int:
    """How long the upstream has for this try: the per-try timeout, at most what is left of the global one; at least 1. 0: for ever."""
    expected = global_ms if hedging or not per_try_ms else per_try_ms
    if expected and global_ms:
        # Nothing left is 1, because 0 would be for ever; the timer will fire at any moment.
        expected = 1 if elapsed_ms >= global_ms else min(expected, global_ms - elapsed_ms)
    return expected


def set_expected(route: Route, head: RequestHead, global_ms: int, per_try_ms: int, elapsed_ms: int, *, grpc: bool, hedging: bool, insert: bool = True) -> None:
    """Tell the upstream how long this try has, in `x-envoy-expected-rq-timeout-ms` and, for gRPC with a maximum, in `grpc-timeout`."""
    expected = expected_ms(global_ms, per_try_ms, elapsed_ms, hedging=hedging)
    if not expected:
        return
    if insert:
        head.set(EXPECTED, b"%d" % expected)
    if grpc and route.max_grpc_timeout_ms is not None and not route.uses_stream_duration:
        head.set(b"grpc-timeout", format_timeout(expected))


def refresh_expected(head: RequestHead, forwarding: Any, now: float) -> None:
    """Before a retry: what is left of the timeouts of `forwarding` (its `timeout`, `per_try_timeout`, `hedges` and `stream`) at `now`."""
    stream, route = forwarding.stream, forwarding.route
    elapsed_ms = int((now - stream.request_end) * 1000) if stream.request_end else 0
    set_expected(route, head, _whole_ms(forwarding.timeout), _whole_ms(forwarding.per_try_timeout), elapsed_ms, grpc=stream.is_grpc, hedging=forwarding.hedges)


def stream_duration(route: Route, head: RequestHead, default: float | None, grpc: bool) -> float | None:
    """The longest life of a stream in seconds, from the route or the connection manager's `default`; None for no limit, 0.0 for none left.

    Adjusts `grpc-timeout` when the route has `max_stream_duration`.
    """
    milliseconds: int | None
    asked = parse_timeout(head.get(b"grpc-timeout"))
    maximum = route.grpc_timeout_header_max_ms
    if asked is None or maximum is None:
        milliseconds = route.max_stream_duration_ms
        if milliseconds is None:
            milliseconds = _whole_ms(default or 0.0)
        if milliseconds == 0:
            return None
    else:
        milliseconds = min(asked, maximum) if maximum else asked
        offset = route.grpc_timeout_header_offset_ms
        if milliseconds and offset is not None:
            milliseconds = max(milliseconds - offset, 0)
    if grpc and route.uses_stream_duration:
        head.set(b"grpc-timeout", format_timeout(milliseconds))
    return milliseconds / 1000


def check_strict(head: RequestHead, names: tuple[bytes, ...]) -> Reply | None:
    """`strict_check_headers` of the router: a 400 for the first of these headers that has no valid value."""
    for name in names:
        value = head.get(name)
        if value is not None and not _valid(name, value):
            text = name.decode()
            body = b"invalid header '" + name + b"' with value '" + value + b"'"
            return Reply(400, body, details=f"request_headers_failed_strict_check{{{text}}}", flag=flags.IH)
    return None


def _valid(name: bytes, value: bytes) -> bool:
    if name == b"x-envoy-retry-on":
        return retry.parse_retry_on(value.decode("latin-1"))[1]
    if name == b"x-envoy-retry-grpc-on":
        return retry.parse_retry_grpc_on(value.decode("latin-1"))[1]
    return _unsigned(value) is not None


def _unsigned(text: bytes) -> int | None:
    number = parse_int64(text)
    return number if number is not None and number >= 0 else None


def _or_default(text: bytes, default: int) -> int:
    number = _unsigned(text)
    return default if number is None else number


def _whole_ms(seconds: float) -> int:
    return round(seconds * 1000)
