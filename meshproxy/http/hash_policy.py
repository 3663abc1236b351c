"""Hash policies: the number by which consistent-hash load balancing, and weighted clusters that ask for it, choose for a request.

Bit-exact with Envoy: xxHash64 of each policy's input, combined by rotating the old value left by one bit and XORing the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import ConfigError, under
from meshproxy.api.matchers import compile_substitution, parse_query

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2

    from meshproxy.codec.headers import Headers
    from meshproxy.observe.stream_info import StreamInfo

_P = "envoy.config.route.v3.RouteAction.HashPolicy"
HONOURS = {
    _P: "header cookie connection_properties query_parameter filter_state terminal",
    f"{_P}.Header": "header_name regex_rewrite",
    f"{_P}.Cookie": "name ttl path attributes",
    f"{_P}.CookieAttribute": "name value",
    f"{_P}.ConnectionProperties": "source_ip",
    f"{_P}.QueryParameter": "name",
    f"{_P}.FilterState": "key",
}

_MASK = (1 << 64) - 1

Method = Callable[["StreamInfo"], "int | None"]


class HashPolicy:
    """The hash policies of a route; callable: the hash of a stream's request, or None when no policy applies to it."""

    __slots__ = ("_methods", "cookies")

    def __init__(self, methods: list[tuple[Method, bool]], cookies: tuple[CookieMethod, ...]) -> None:
        self._methods = methods
        self.cookies = cookies  # those that generate a cookie: the response needs it

    def __call__(self, stream: StreamInfo) -> int | None:
        result: int | None = None
        for method, terminal in self._methods:
            new = method(stream)
            if new is not None:
                result = new if result is None else ((result << 1 | result >> 63) & _MASK) ^ new
            if terminal and result is not None:
                break
        return result

    def without_cookies(self, stream: StreamInfo) -> int | None:
        """The same hash, but no cookie is generated: weighted clusters choose by it before there is a request to answer."""
        stream.__dict__["_no_cookies"] = True
        try:
            return self(stream)
        finally:
            del stream.__dict__["_no_cookies"]


def compile_hash_policy(protos: Iterable[route_components_pb2.RouteAction.HashPolicy], runtime: Any = None) -> HashPolicy | None:
    """`hash_policy` of a RouteAction; None when it is empty. Error paths start with the index."""
    methods: list[tuple[Method, bool]] = []
    for index, proto in enumerate(protos):
        with under(f"[{index}]"):
            method = _compile(proto, runtime)
        if method is not None:
            methods.append((method, proto.terminal))
    if not methods:
        return None
    return HashPolicy(methods, tuple(method for method, _ in methods if isinstance(method, CookieMethod) and method.ttl is not None))


def _compile(proto: route_components_pb2.RouteAction.HashPolicy, runtime: Any) -> Method | None:
    which = proto.WhichOneof("policy_specifier")
    if which == "header":
        return _header(proto.header, runtime)
    if which == "cookie":
        return CookieMethod(proto.cookie)
    if which == "connection_properties":
        return _source_ip if proto.connection_properties.source_ip else None
    if which == "query_parameter":
        return _query_parameter(proto.query_parameter.name.encode())
    if which == "filter_state":
        return _filter_state(proto.filter_state.key)
    raise ConfigError.at("policy_specifier", "value is required")


def _hash(data: bytes, seed: int = 0) -> int:
    # Routes without hash policies do not need the library.
    from xxhash import xxh64_intdigest

    return xxh64_intdigest(data, seed)


def _header(proto: route_components_pb2.RouteAction.HashPolicy.Header, runtime: Any) -> Method:
    name = proto.header_name.lower().encode()
    rewrite: Callable[[bytes], bytes] | None = None
    if proto.HasField("regex_rewrite"):
        with under("header.regex_rewrite"):
            rewrite = compile_substitution(proto.regex_rewrite, runtime)

    def method(stream: StreamInfo) -> int | None:
        head = stream.request
        assert head is not None
        values = head.get_all(name)
        if not values:
            return None
        if rewrite is not None:
            values = [rewrite(value) for value in values]
        # Sorted, so that the order of the header lines does not matter; each digest seeds the next.
        result = 0
        for value in sorted(values):
            result = _hash(value, result)
        return result

    return method


def _source_ip(stream: StreamInfo) -> int | None:
    address = stream.remote or stream.connection.remote
    return _hash(address.ip.encode()) if address.ip else None


def _query_parameter(name: bytes) -> Method:
    def method(stream: StreamInfo) -> int | None:
        head = stream.request
        assert head is not None
        value = parse_query(head.path).get(name)
        return None if value is None else _hash(value)

    return method


def _filter_state(key: str) -> Method:
    def method(stream: StreamInfo) -> int | None:
        value = stream.filter_state.get(key)
        if isinstance(value, str):
            value = value.encode()
        return _hash(value) if isinstance(value, bytes) else None

    return method


class CookieMethod:
    """The value of a cookie; with a `ttl` one is generated for requests that have none, and set on the response."""

    __slots__ = ("_tail", "name", "ttl")

    def __init__(self, proto: route_components_pb2.RouteAction.HashPolicy.Cookie) -> None:
        self.name = proto.name.encode()
        self.ttl: int | None = proto.ttl.seconds if proto.HasField("ttl") else None
        tail = f"; Max-Age={self.ttl}" if self.ttl else ""
        if proto.path:
            tail += f"; Path={proto.path}"
        for attribute in proto.attributes:
            tail += f"; {attribute.name}={attribute.value}" if attribute.value else f"; {attribute.name}"
        self._tail = f"{tail}; HttpOnly".encode()

    def __call__(self, stream: StreamInfo) -> int | None:
        assert stream.request is not None
        value = cookie_value(stream.request, self.name)
        if value:
            return _hash(value)
        if self.ttl is None or "_no_cookies" in stream.__dict__:
            return None
        return _hash(self._generate(stream))

    def _generate(self, stream: StreamInfo) -> bytes:
        """The new cookie's value; it stays the same for this stream, whatever is asked again by a retry."""
        pending: dict[bytes, tuple[bytes, bytes]] = stream.__dict__.setdefault("new_cookies", {})
        known = pending.get(self.name)
        if known is not None:
            return known[0]
        # The same for all requests of a connection, so that several at once get the same cookie.
        connection = stream.connection
        value = b"%016x" % _hash(f"{connection.remote.text}{connection.local.text}".encode())
        pending[self.name] = value, self.name + b'="' + value + b'"' + self._tail
        return value


def set_new_cookies(stream: StreamInfo, head: Headers) -> None:
    """Add the `set-cookie` headers of cookies that were generated for this stream to its response."""
    pending = stream.__dict__.get("new_cookies")
    if pending:
        for _, cookie in pending.values():
            head.add(b"set-cookie", cookie)


def cookie_value(head: Headers, name: bytes) -> bytes:
    """The value of the first cookie called `name`, unquoted; empty when there is none."""
    for line in head.get_all(b"cookie"):
        if name not in line:
            continue
        for part in line.split(b";"):
            key, equals, value = part.partition(b"=")
            if equals and key.lstrip(b" ") == name:
                if len(value) >= 2 and value[:1] == value[-1:] == b'"':
                    return value[1:-1]
                return value
    return b""
