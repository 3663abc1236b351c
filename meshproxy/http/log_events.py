"""Access log entries for other events than the end of a stream (`access_log_options` of the connection manager)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.api.durations import seconds_of
from meshproxy.observe import events

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2

    from meshproxy.http.stream import Stream

_HCM = "envoy.extensions.filters.network.http_connection_manager.v3."
HONOURS = {
    _HCM + "HttpConnectionManager.HcmAccessLogOptions": (
        "access_log_flush_interval flush_access_log_on_new_request flush_log_on_tunnel_successfully_established"
    ),
}
_OLD = ("flush_access_log_on_new_request", "access_log_flush_interval")  # fields of the connection manager that say the same


class LogEvents:
    """Stands in front of the filters of every stream: the first to see a request, and the last to see a response. Times are seconds, 0.0 for none."""

    name = "access log"

    def __init__(self, logs: Iterable[Any], loop: asyncio.AbstractEventLoop, *, on_request: bool, on_tunnel: bool, interval: float) -> None:
        self._logs = tuple(logs)
        self._loop = loop
        self._on_request = on_request
        self._interval = interval
        if on_tunnel:
            self.response_headers = self._response_headers
        if interval:
            self.complete = self._complete

    def request_headers(self, stream: Stream, end_stream: bool) -> None:
        """A request has begun."""
        if self._on_request:
            self._log(stream, events.DOWNSTREAM_START)
        if self._interval:
            self._schedule(stream)

    def _response_headers(self, stream: Stream, end_stream: bool) -> None:
        if stream.tunnel:
            self._log(stream, events.DOWNSTREAM_TUNNEL)

    def _complete(self, stream: Stream) -> None:
        stream.locals.pop(self).cancel()

    def _schedule(self, stream: Stream) -> None:
        stream.locals[self] = self._loop.call_later(self._interval, self._due, stream)

    def _due(self, stream: Stream) -> None:
        self._schedule(stream)
        stream.codec.settle_relays()
        self._log(stream, events.DOWNSTREAM_PERIODIC)

    def _log(self, stream: Stream, event: str) -> None:
        for log in self._logs:
            log.log(stream, event)


def compile(proto: hcm_pb2.HttpConnectionManager, logs: Iterable[Any], loop: asyncio.AbstractEventLoop) -> LogEvents | None:
    """From an HttpConnectionManager; None when only the end of streams is logged. Raises ConfigError."""
    source: Any = proto
    if proto.HasField("access_log_options"):
        source = proto.access_log_options
        given = {field.name for field, _ in proto.ListFields()}
        for name in _OLD:
            if name in given:
                errors.fail(name, f"Only one of {name} or access_log_options can be specified.")
    on_request: bool = source.flush_access_log_on_new_request
    on_tunnel: bool = proto.access_log_options.flush_log_on_tunnel_successfully_established
    interval = seconds_of(source, "access_log_flush_interval", 0.0)
    if not logs or not (on_request or on_tunnel or interval):
        return None
    return LogEvents(logs, loop, on_request=on_request, on_tunnel=on_tunnel, interval=interval)
