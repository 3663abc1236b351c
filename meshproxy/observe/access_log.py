"""Access loggers: format, filter and sink of one AccessLog, as one call per entry.

Source: envoy.config.accesslog.v3.AccessLog with the file, stdout and stderr loggers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import registry
from meshproxy.api.errors import UNSUPPORTED, fail, under
from meshproxy.codec import metering
from meshproxy.observe import access_filters, events
from meshproxy.observe.format import DEFAULT, Compiler, Format, compile_substitution_format, default_format
from meshproxy.observe.sinks import Sink, Sinks

if TYPE_CHECKING:
    from envoy.config.accesslog.v3 import accesslog_pb2

    from meshproxy.context import Context
    from meshproxy.observe.stream_info import StreamInfo

__all__ = ["HONOURS", "AccessLog", "Sinks", "compile"]

HONOURS = {
    "envoy.config.accesslog.v3.AccessLog": "name filter typed_config",
    "envoy.extensions.access_loggers.file.v3.FileAccessLog": "path format json_format typed_json_format log_format",
    "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog": "log_format",
    "envoy.extensions.access_loggers.stream.v3.StderrAccessLog": "log_format",
    **access_filters.HONOURS,
}


class AccessLog:
    """A compiled AccessLog: `log(stream)` writes one entry, if the filter lets it.

    `event` says what the entry is for; by default the end of an HTTP stream or TCP connection. `metered`: it shows bytes on the wire that are only counted
    for logs. `response_headers`: those that it shows, in lower case; None where that is not known.
    """

    __slots__ = ("log", "metered", "response_headers", "sink")

    log: Callable[..., None]

    def __init__(self, render: Format, sink: Sink, accepts: access_filters.Predicate | None, *, typed: bool = False, metered: bool = False) -> None:
        """`typed`: the format or the filter ask what an entry is for, which few do."""
        self.sink = sink
        self.metered = metered
        self.response_headers: frozenset[bytes] | None = getattr(render, "response_headers", None)
        self.log = _typed(render, sink.write, accepts) if typed else _plain(render, sink.write, accepts)

    def __repr__(self) -> str:
        return f"<access log to {self.sink.path or 'a standard stream'}>"


def _plain(render: Format, write: Callable[[bytes], None], accepts: access_filters.Predicate | None) -> Callable[..., None]:
    """HOT: what most access logs do for every stream."""
    if accepts is None:
        return lambda stream, event="": write(render(stream))

    def log(stream: StreamInfo, event: str = "") -> None:
        if accepts(stream):
            write(render(stream))

    return log


def _typed(render: Format, write: Callable[[bytes], None], accepts: access_filters.Predicate | None) -> Callable[..., None]:
    plain = _plain(render, write, accepts)

    def log(stream: StreamInfo, event: str = "") -> None:
        stream.access_log_type = event or (events.TCP_END if stream.protocol is None else events.DOWNSTREAM_END)
        plain(stream)

    return log


def compile(proto: accesslog_pb2.AccessLog, context: Context) -> AccessLog:
    """An AccessLog of the configuration. ConfigError relative to `proto`."""
    with under("typed_config"):
        logger = registry.unpack(proto.typed_config)
        name = logger.DESCRIPTOR.full_name
        make = _LOGGERS.get(name)
        if make is None:
            fail("", f"the access logger {name} is not supported", UNSUPPORTED)
        render, sink = make(logger, context)
    accepts = None
    if proto.HasField("filter"):
        with under("filter"):
            accepts = access_filters.compile(proto.filter, context)
    config = proto.typed_config.value
    return AccessLog(render, sink, accepts, typed=b"ACCESS_LOG_TYPE" in config or _asks_type(proto.filter), metered=metering.METERED(config) is not None)


def _asks_type(proto: accesslog_pb2.AccessLogFilter) -> bool:
    kind = proto.WhichOneof("filter_specifier")
    if kind in ("and_filter", "or_filter"):
        return any(map(_asks_type, getattr(proto, kind).filters))
    return kind == "log_type_filter"


def _file(proto: Any, context: Context) -> tuple[Format, Sink]:
    if not proto.path:
        fail("path", "value length must be at least 1 characters")
    render = _file_format(proto, context)
    with under("path"):
        return render, _sinks(context).file(proto.path)


def _file_format(proto: Any, context: Context) -> Format:
    kind = proto.WhichOneof("access_log_format")
    if kind in (None, "log_format"):
        return _format(proto, context)
    compiler = Compiler(clock=context.clock, wall=context.wall)
    with under(kind):
        if kind != "format":
            return compiler.json(getattr(proto, kind))
        compiled = compiler.text(proto.format or DEFAULT)
    return compiled if not isinstance(compiled, bytes) else lambda _: compiled


def _format(proto: Any, context: Context) -> Format:
    if not proto.HasField("log_format"):
        return default_format(context.clock)
    with under("log_format"):
        return compile_substitution_format(proto.log_format, clock=context.clock, wall=context.wall)


def _stdout(proto: Any, context: Context) -> tuple[Format, Sink]:
    return _format(proto, context), _sinks(context).stream(1)


def _stderr(proto: Any, context: Context) -> tuple[Format, Sink]:
    return _format(proto, context), _sinks(context).stream(2)


def _sinks(context: Context) -> Sinks:
    sinks: Sinks | None = context.access_logs
    if sinks is None:
        sinks = context.access_logs = Sinks(context)
    return sinks


_LOGGERS: dict[str, Callable[[Any, Context], tuple[Format, Sink]]] = {
    "envoy.extensions.access_loggers.file.v3.FileAccessLog": _file,
    "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog": _stdout,
    "envoy.extensions.access_loggers.stream.v3.StderrAccessLog": _stderr,
}
