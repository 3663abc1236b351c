"""`RouteMatch` -> tests of a request: one of its path, one of its other head fields, one of everything else about the stream."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from meshproxy.api import registry
from meshproxy.api.errors import ConfigError, under
from meshproxy.api.matchers import (
    compile_filter_state,
    compile_headers,
    compile_metadata,
    compile_query_parameters,
    compile_regex,
)
from meshproxy.api.runtime import Runtime, compile_chance
from meshproxy.api.uri_template import UriTemplate
from meshproxy.codec.grpc import is_content_type

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2

    from meshproxy.api.regex import BytesPredicate
    from meshproxy.codec.headers import Headers, RequestHead
    from meshproxy.context import Context
    from meshproxy.observe.stream_info import StreamInfo

_P = "envoy.config.route.v3.RouteMatch"
HONOURS = {
    _P: (
        "prefix path safe_regex connect_matcher path_separated_prefix path_match_policy case_sensitive runtime_fraction headers query_parameters grpc"
        " tls_context dynamic_metadata filter_state"
    ),
    f"{_P}.GrpcRouteMatchOptions": "",
    f"{_P}.TlsContextMatchOptions": "presented validated",
    f"{_P}.ConnectMatcher": "",
    "envoy.config.core.v3.TypedExtensionConfig": "name typed_config",
}

# How a route matches paths. EXACT and PREFIX can be looked up in an index.
EXACT, PREFIX, OTHER, CONNECT = range(4)

HeadTest = Callable[["RequestHead"], bool]
StreamTest = Callable[["StreamInfo"], bool]

_NO_RUNTIME = Runtime()


class PathMatch:
    """The path part of a route match. `matches` takes a path without query.

    `kind` with `operand` says it for an index. `matched_length` is how much of a matching path the route's `prefix_rewrite` replaces, None for all of it.
    """

    __slots__ = ("kind", "matched_length", "matches", "operand", "template")

    def __init__(self, kind: int, operand: bytes, matches: BytesPredicate, matched_length: int | None, template: UriTemplate | None = None) -> None:
        self.kind = kind
        self.operand = operand
        self.matches = matches
        self.matched_length = matched_length
        self.template = template


def path_key(proto: route_components_pb2.RouteMatch) -> tuple[int, bytes]:
    """How an index should file a route, without compiling it: kind and operand, in lower case when the case does not matter."""
    which = proto.WhichOneof("path_specifier")
    if which == "connect_matcher":
        return CONNECT, b""
    if which not in ("prefix", "path", "path_separated_prefix"):
        return OTHER, b""
    operand: bytes = getattr(proto, which).encode()
    if not _case_sensitive(proto):
        return OTHER, operand
    return (EXACT if which == "path" else PREFIX), operand


def _case_sensitive(proto: route_components_pb2.RouteMatch) -> bool:
    return proto.case_sensitive.value if proto.HasField("case_sensitive") else True


def compile_path_match(proto: route_components_pb2.RouteMatch, runtime: Any = None) -> PathMatch:
    """Raises ConfigError with paths relative to the match."""
    which = proto.WhichOneof("path_specifier")
    if which == "connect_matcher":
        return PathMatch(CONNECT, b"", _never, None)
    if which == "safe_regex":
        with under("safe_regex"):
            return PathMatch(OTHER, b"", compile_regex(proto.safe_regex, runtime), None)
    if which == "path_match_policy":
        return _uri_template(proto)
    if which is None:
        raise ConfigError.at("path_specifier", "value is required")
    operand: bytes = getattr(proto, which).encode()
    fold = not _case_sensitive(proto)
    if fold:
        operand = operand.lower()
    if which == "path":
        matches: BytesPredicate = operand.__eq__
        kind = EXACT
    elif which == "prefix":
        matches = methodcaller("startswith", operand)
        kind = PREFIX
    else:
        matches = _separated(operand)
        kind = PREFIX
    if fold:
        return PathMatch(OTHER, operand, _folding(matches), len(operand))
    return PathMatch(kind, operand, matches, len(operand))


def _never(path: bytes) -> bool:
    return False


def _separated(operand: bytes) -> BytesPredicate:
    longer = operand + b"/"
    return lambda path: path == operand or path.startswith(longer)


def _folding(matches: BytesPredicate) -> BytesPredicate:
    return lambda path: matches(path.lower())


def _uri_template(proto: route_components_pb2.RouteMatch) -> PathMatch:
    packed = proto.path_match_policy.typed_config
    with under("path_match_policy.typed_config"):
        registry.module(registry.type_url(packed), "path match")
        message: Any = registry.unpack(packed)
        with under("path_template"):
            template = UriTemplate(message.path_template)
    return PathMatch(OTHER, b"", template.matches, None, template)


def compile_head_test(proto: route_components_pb2.RouteMatch, runtime: Any = None) -> HeadTest | None:
    """gRPC, headers and query parameters; None when the match has none of them."""
    tests: list[HeadTest] = []
    if proto.HasField("grpc"):
        tests.append(is_grpc)
    with under("headers"):
        headers: Any = compile_headers(proto.headers, runtime)
    if headers is not None:
        tests.append(headers)
    with under("query_parameters"):
        query = compile_query_parameters(proto.query_parameters, runtime)
    if query is not None:
        tests.append(lambda head: query(head.path))
    return _all(tests)


def compile_stream_test(proto: route_components_pb2.RouteMatch, context: Context, draw: Callable[[StreamInfo], int]) -> StreamTest | None:
    """Runtime fraction, TLS, dynamic metadata and filter state; None when the match has none of them. `draw` gives a stream's stable random number."""
    tests: list[StreamTest] = []
    chance = True
    if proto.HasField("runtime_fraction"):
        chance = compile_chance(proto.runtime_fraction, context.runtime or _NO_RUNTIME)  # type: ignore[assignment]  # bool or callable
    if callable(chance):
        tests.append(lambda stream: chance(draw(stream)))
    elif not chance:
        tests.append(lambda stream: False)
    if proto.HasField("tls_context"):
        tests.append(_tls(proto.tls_context))
    for index, metadata in enumerate(proto.dynamic_metadata):
        with under(f"dynamic_metadata[{index}]"):
            tests.append(_on_metadata(compile_metadata(metadata, context.runtime)))
    for index, state in enumerate(proto.filter_state):
        with under(f"filter_state[{index}]"):
            tests.append(_on_filter_state(compile_filter_state(state, context.runtime)))
    return _all(tests)


def _all(tests: list[Any]) -> Any:
    if len(tests) <= 1:
        return tests[0] if tests else None
    return lambda subject: all(test(subject) for test in tests)


def _on_metadata(test: Callable[[dict[str, dict[str, Any]]], bool]) -> StreamTest:
    return lambda stream: test(stream.metadata)


def _on_filter_state(test: Callable[[dict[str, Any]], bool]) -> StreamTest:
    return lambda stream: test(stream.filter_state)


def _tls(proto: route_components_pb2.RouteMatch.TlsContextMatchOptions) -> StreamTest:
    presented = proto.presented.value if proto.HasField("presented") else None
    validated = proto.validated.value if proto.HasField("validated") else None

    def test(stream: StreamInfo) -> bool:
        tls = stream.connection.tls
        if presented is not None and presented != (tls is not None and tls.presented):
            return False
        return validated is None or validated == (tls is not None and tls.validated)

    return test


def is_grpc(head: Headers) -> bool:
    """Whether a head's content type says gRPC: `application/grpc`, alone or with `+` and a format."""
    return is_content_type(head.get(b"content-type"))
