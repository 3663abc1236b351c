"""Access log filters: whether an entry is written at all.

Source: envoy.config.accesslog.v3.AccessLogFilter.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import eq, ge, le, ne
from typing import TYPE_CHECKING, Any

from meshproxy.api import matchers, messages, runtime
from meshproxy.api.errors import UNSUPPORTED, fail, under
from meshproxy.codec.headers import RequestHead
from meshproxy.observe import flags
from meshproxy.observe.stream_values import dynamic_metadata, grpc_code

if TYPE_CHECKING:
    from envoy.config.accesslog.v3 import accesslog_pb2

    from meshproxy.context import Context
    from meshproxy.observe.stream_info import StreamInfo

Predicate = Callable[["StreamInfo"], bool]

_A = "envoy.config.accesslog.v3."
HONOURS = {
    _A + "AccessLogFilter": (
        "status_code_filter duration_filter not_health_check_filter traceable_filter runtime_filter and_filter or_filter header_filter response_flag_filter"
        " grpc_status_filter metadata_filter log_type_filter"
    ),
    _A + "ComparisonFilter": "op value",
    _A + "StatusCodeFilter": "comparison",
    _A + "DurationFilter": "comparison",
    _A + "NotHealthCheckFilter": "",
    _A + "TraceableFilter": "",
    _A + "RuntimeFilter": "runtime_key percent_sampled use_independent_randomness",
    _A + "AndFilter": "filters",
    _A + "OrFilter": "filters",
    _A + "HeaderFilter": "header",
    _A + "ResponseFlagFilter": "flags",
    _A + "GrpcStatusFilter": "statuses exclude",
    _A + "MetadataFilter": "matcher match_if_key_not_found",
    _A + "LogTypeFilter": "types exclude",
}

_NO_REQUEST = RequestHead(b"", b"")
_OPERATORS = (eq, ge, le, ne)  # ComparisonFilter.Op
_UNKNOWN_GRPC_STATUS = 2


def compile(proto: accesslog_pb2.AccessLogFilter, context: Context) -> Predicate:
    """A predicate of the stream that is to be logged. ConfigError relative to `proto`."""
    kind = proto.WhichOneof("filter_specifier")
    if kind is None:
        fail("filter_specifier", "is required")
    make = _MAKERS.get(kind)
    if make is None:
        fail(kind, "access log filter extensions are not supported", UNSUPPORTED)
    with under(kind):
        return make(getattr(proto, kind), context)


def _comparison(proto: accesslog_pb2.ComparisonFilter, context: Context) -> Callable[[int], bool]:
    compare = _OPERATORS[proto.op]
    key, default = proto.value.runtime_key, proto.value.default_value
    settings = context.runtime
    if not key or settings is None:
        return lambda number: compare(number, default)
    if not settings.mutable:
        fixed = settings.integer(key, default)
        return lambda number: compare(number, fixed)
    return lambda number: compare(number, settings.integer(key, default))


def _status_code(proto: accesslog_pb2.StatusCodeFilter, context: Context) -> Predicate:
    test = _comparison(proto.comparison, context)
    return lambda stream: test(stream.status)


def _duration(proto: accesslog_pb2.DurationFilter, context: Context) -> Predicate:
    test = _comparison(proto.comparison, context)
    clock = context.clock
    return lambda stream: test(int(((stream.end or clock()) - stream.start) * 1000))


def _not_health_check(proto: accesslog_pb2.NotHealthCheckFilter, context: Context) -> Predicate:
    return lambda stream: not getattr(stream, "health_check", False)


def _traceable(proto: accesslog_pb2.TraceableFilter, context: Context) -> Predicate:
    return lambda stream: getattr(stream, "traced", False)


def _runtime(proto: accesslog_pb2.RuntimeFilter, context: Context) -> Predicate:
    fraction = messages.known("envoy.config.core.v3.RuntimeFractionalPercent")(default_value=proto.percent_sampled, runtime_key=proto.runtime_key)
    chance = runtime.compile_chance(fraction, context.runtime or runtime.Runtime([]))
    if isinstance(chance, bool):
        fixed = chance
        return lambda stream: fixed
    independent = proto.use_independent_randomness
    bits = context.random.getrandbits

    def sampled(stream: StreamInfo) -> bool:
        number = None if independent else _request_number(stream)
        return chance(bits(64) if number is None else number)

    return sampled


def _request_number(stream: StreamInfo) -> int | None:
    """The request id as a number, so that all proxies on its way decide alike; None when it is no UUID."""
    value = None if stream.request is None else stream.request.get(b"x-request-id")
    if value is None or len(value) < 8:
        return None
    try:
        return int(value[:8], 16)
    except ValueError:
        return None


def _and(proto: accesslog_pb2.AndFilter, context: Context) -> Predicate:
    tests = _several(proto, context)
    return lambda stream: all(test(stream) for test in tests)


def _or(proto: accesslog_pb2.OrFilter, context: Context) -> Predicate:
    tests = _several(proto, context)
    return lambda stream: any(test(stream) for test in tests)


def _several(proto: accesslog_pb2.AndFilter | accesslog_pb2.OrFilter, context: Context) -> tuple[Predicate, ...]:
    if len(proto.filters) < 2:
        fail("filters", "value must contain at least 2 item(s)")
    tests = []
    for index, one in enumerate(proto.filters):
        with under(f"filters[{index}]"):
            tests.append(compile(one, context))
    return tuple(tests)


def _header(proto: accesslog_pb2.HeaderFilter, context: Context) -> Predicate:
    with under("header"):
        test = matchers.compile_header(proto.header, context.runtime)
    return lambda stream: test(_NO_REQUEST if stream.request is None else stream.request)


def _response_flag(proto: accesslog_pb2.ResponseFlagFilter, context: Context) -> Predicate:
    mask = 0
    for index, name in enumerate(proto.flags):
        bit = flags.BY_NAME.get(name)
        if bit is None:
            fail(f"flags[{index}]", f"{name!r} is not a response flag; known are {' '.join(flags.BY_NAME)}")
        mask |= bit
    mask = mask or -1
    return lambda stream: stream.flags & mask != 0


def _grpc_status(proto: accesslog_pb2.GrpcStatusFilter, context: Context) -> Predicate:
    statuses = frozenset(proto.statuses)
    exclude = proto.exclude

    def matches(stream: StreamInfo) -> bool:
        code = grpc_code(stream)
        return ((_UNKNOWN_GRPC_STATUS if code is None else code) in statuses) != exclude

    return matches


def _metadata(proto: accesslog_pb2.MetadataFilter, context: Context) -> Predicate:
    namespace = proto.matcher.filter
    path = tuple(segment.key for segment in proto.matcher.path)
    missing = proto.match_if_key_not_found.value if proto.HasField("match_if_key_not_found") else True
    test: Callable[[Any], bool] = _never
    if proto.HasField("matcher"):
        with under("matcher.value"):
            test = matchers.compile_value(proto.matcher.value, context.runtime)

    def matches(stream: StreamInfo) -> bool:
        found = dynamic_metadata(stream, namespace)
        value = matchers.MISSING if found is None else matchers.metadata_value({namespace: found}, namespace, path)
        return missing if value is matchers.MISSING else test(value)

    return matches


def _never(value: Any) -> bool:
    return False


def _log_type(proto: accesslog_pb2.LogTypeFilter, context: Context) -> Predicate:
    names = proto.DESCRIPTOR.fields_by_name["types"].enum_type.values_by_number
    wanted = frozenset(names[number].name for number in proto.types)
    exclude = proto.exclude
    return lambda stream: (stream.access_log_type in wanted) != exclude


_MAKERS: dict[str, Callable[[Any, Context], Predicate]] = {
    "status_code_filter": _status_code,
    "duration_filter": _duration,
    "not_health_check_filter": _not_health_check,
    "traceable_filter": _traceable,
    "runtime_filter": _runtime,
    "and_filter": _and,
    "or_filter": _or,
    "header_filter": _header,
    "response_flag_filter": _response_flag,
    "grpc_status_filter": _grpc_status,
    "metadata_filter": _metadata,
    "log_type_filter": _log_type,
}
