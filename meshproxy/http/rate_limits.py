"""Rate limit actions (envoy.config.route.v3.RateLimit): which descriptors a request has.

Each RateLimit gives at most one descriptor: the entries that its actions make of the request, or none when an action finds nothing to make one of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, matchers
from meshproxy.api.errors import UNSUPPORTED

if TYPE_CHECKING:
    from envoy.config.route.v3.route_components_pb2 import RateLimit

    from meshproxy.context import Context

_ACTION = "envoy.config.route.v3.RateLimit.Action"
HONOURS = {
    "envoy.config.route.v3.RateLimit": "stage disable_key actions hits_addend",
    "envoy.config.route.v3.RateLimit.HitsAddend": "number format",
    _ACTION: (
        "source_cluster destination_cluster request_headers query_parameters remote_address generic_key header_value_match dynamic_metadata metadata "
        "masked_remote_address query_parameter_value_match"
    ),
    f"{_ACTION}.SourceCluster": "",
    f"{_ACTION}.DestinationCluster": "",
    f"{_ACTION}.RequestHeaders": "header_name descriptor_key skip_if_absent",
    f"{_ACTION}.QueryParameters": "query_parameter_name descriptor_key skip_if_absent",
    f"{_ACTION}.RemoteAddress": "",
    f"{_ACTION}.MaskedRemoteAddress": "v4_prefix_mask_len v6_prefix_mask_len",
    f"{_ACTION}.GenericKey": "descriptor_value descriptor_key",
    f"{_ACTION}.HeaderValueMatch": "descriptor_key descriptor_value expect_match headers",
    f"{_ACTION}.DynamicMetaData": "descriptor_key metadata_key default_value",
    f"{_ACTION}.MetaData": "descriptor_key metadata_key default_value source skip_if_absent",
    f"{_ACTION}.QueryParameterValueMatch": "descriptor_key descriptor_value expect_match query_parameters",
    "envoy.type.metadata.v3.MetadataKey": "key path",
    "envoy.type.metadata.v3.MetadataKey.PathSegment": "key",
}

Entry = tuple[bytes, bytes]
_SKIP: tuple[()] = ()  # this action adds no entry, the others go on
Action = Callable[[Any], "Entry | tuple[()] | None"]  # None: no descriptor at all
_MAX_HITS = 1_000_000_000


# What is limited: its entries in order, and how many hits this request counts for (None: not said).
Descriptor = tuple[tuple[Entry, ...], int | None]


class RateLimitPolicy:
    """The compiled RateLimits of a filter, route or virtual host. `disabled` ones (with a disable_key) are for the global rate limit only."""

    __slots__ = ("_by_stage",)

    def __init__(self, protos: Iterable[RateLimit], context: Context, *, of_filter: bool = False) -> None:
        """`of_filter`: they stand in a filter's own configuration, where there are no stages. Raises ConfigError; paths start with the index."""
        found = errors.Collector()
        self._by_stage: dict[int, list[Callable[[Any], Descriptor | None]]] = {}
        for index, proto in enumerate(protos):
            with found.under(f"[{index}]"):
                if of_filter and (proto.HasField("stage") or proto.disable_key):
                    errors.fail("stage" if proto.HasField("stage") else "disable_key", "is not supported here")
                if not proto.disable_key:
                    self._by_stage.setdefault(proto.stage.value, []).append(_compile(proto, context, counts=of_filter))
        found.raise_any()

    def descriptors(self, stream: Any, stage: int = 0) -> list[Descriptor]:
        """The descriptors of a request."""
        found = []
        for make in self._by_stage.get(stage, ()):
            descriptor = make(stream)
            if descriptor is not None:
                found.append(descriptor)
        return found

    def __bool__(self) -> bool:
        return bool(self._by_stage)


def _compile(proto: RateLimit, context: Context, *, counts: bool) -> Callable[[Any], Descriptor | None]:
    """`counts`: its `hits_addend` is used; that of a route or virtual host must be right, but says nothing to the local rate limit filter."""
    actions = []
    for index, action in enumerate(proto.actions):
        with errors.under(f"actions[{index}]"):
            actions.append(_compile_action(action, context))
    if not actions:
        errors.fail("actions", "at least one is needed")
    hits: Callable[[Any], int | None] | None = None
    if proto.HasField("hits_addend"):
        with errors.under("hits_addend"):
            addend = _compile_hits(proto.hits_addend)
        hits = addend if counts else None

    def make(stream: Any) -> Descriptor | None:
        entries = []
        for action in actions:
            entry = action(stream)
            if entry is None:
                return None
            if entry and entry[0]:
                entries.append(entry)
        if hits is None:
            return tuple(entries), None
        count = hits(stream)
        return None if count is None else (tuple(entries), count)

    return make


def _compile_hits(proto: Any) -> Callable[[Any], int | None]:
    if bool(proto.format) == proto.HasField("number"):
        errors.fail("", "must contain either a format or a number")
    if not proto.format:
        number = proto.number.value
        return lambda _: number
    from meshproxy.observe.format import compile_header_value  # few configurations need it

    with errors.under("format"):
        value = compile_header_value(proto.format)
        if isinstance(value, bytes):
            errors.fail("", "must contain exactly one substitution")

    def hits(stream: Any) -> int | None:
        try:
            addend = float(value(stream))
        except ValueError:
            return None
        return int(addend) if 0 <= addend <= _MAX_HITS else None

    return hits


# -- actions ---------------------------------------------------------------------------------------------------------------------------------------------


def _compile_action(proto: Any, context: Context) -> Action:
    kind = proto.WhichOneof("action_specifier")
    if kind is None:
        errors.fail("", "one kind of action must be set")
    make = _ACTIONS.get(kind)
    if make is None:
        errors.fail(kind, "is not supported", UNSUPPORTED)
    with errors.under(kind):
        return make(getattr(proto, kind), context)


def _source_cluster(proto: Any, context: Context) -> Action:
    entry = (b"source_cluster", context.node.cluster.encode() if context.node is not None else b"")
    return lambda _: entry


def _destination_cluster(proto: Any, context: Context) -> Action:
    def action(stream: Any) -> Entry | None:
        route = stream.route
        if route is None or route.action != "forward":
            return None
        return b"destination_cluster", route.cluster_name.encode()

    return action


def _request_headers(proto: Any, context: Context) -> Action:
    name = proto.header_name.lower().encode()
    key = proto.descriptor_key.encode()
    absent = _SKIP if proto.skip_if_absent else None

    def action(stream: Any) -> Entry | tuple[()] | None:
        value = stream.request.get(name)
        return absent if value is None else (key, value)

    return action


def _query_parameters(proto: Any, context: Context) -> Action:
    name = proto.query_parameter_name.encode()
    key = (proto.descriptor_key or "query_param").encode()
    absent = _SKIP if proto.skip_if_absent else None

    def action(stream: Any) -> Entry | tuple[()] | None:
        value = _decoded_query(stream).get(name)
        return absent if value is None else (key, value)

    return action


def _decoded_query(stream: Any) -> dict[bytes, bytes]:
    from urllib.parse import unquote_to_bytes

    query: dict[bytes, bytes] = {}
    for name, value in matchers.parse_query(stream.request.path).items():
        query.setdefault(unquote_to_bytes(name), unquote_to_bytes(value))
    return query


def _remote(stream: Any) -> Any:
    return stream.remote or stream.connection.remote


def _remote_address(proto: Any, context: Context) -> Action:
    def action(stream: Any) -> Entry | None:
        remote = _remote(stream)
        return (b"remote_address", remote.ip.encode()) if remote.kind == "ip" else None

    return action


def _masked_remote_address(proto: Any, context: Context) -> Action:
    v4 = proto.v4_prefix_mask_len.value if proto.HasField("v4_prefix_mask_len") else 32
    v6 = proto.v6_prefix_mask_len.value if proto.HasField("v6_prefix_mask_len") else 128
    if v4 > 32:
        errors.fail("v4_prefix_mask_len", "must be at most 32")
    if v6 > 128:
        errors.fail("v6_prefix_mask_len", "must be at most 128")
    import ipaddress

    def action(stream: Any) -> Entry | None:
        remote = _remote(stream)
        if remote.kind != "ip":
            return None
        ip = remote.ip.partition("%")[0]
        network = ipaddress.ip_network((ip, v6 if ":" in ip else v4), strict=False)
        return b"masked_remote_address", str(network).encode()

    return action


def _generic_key(proto: Any, context: Context) -> Action:
    entry = ((proto.descriptor_key or "generic_key").encode(), proto.descriptor_value.encode())
    return lambda _: entry


def _header_value_match(proto: Any, context: Context) -> Action:
    with errors.under("headers"):
        matches = matchers.compile_headers(proto.headers)
    entry = ((proto.descriptor_key or "header_match").encode(), proto.descriptor_value.encode())
    expected = _expected(proto)
    return lambda stream: entry if (matches is None or matches(stream.request)) == expected else None


def _query_parameter_value_match(proto: Any, context: Context) -> Action:
    tests: list[Callable[[dict[bytes, bytes]], bool]] = []
    for index, matcher in enumerate(proto.query_parameters):
        with errors.under(f"query_parameters[{index}]"):
            tests.append(matchers.compile_query(matcher))
    entry = ((proto.descriptor_key or "query_match").encode(), proto.descriptor_value.encode())
    expected = _expected(proto)

    def action(stream: Any) -> Entry | None:
        query = _decoded_query(stream)
        return entry if all(test(query) for test in tests) == expected else None

    return action


def _expected(proto: Any) -> bool:
    return proto.expect_match.value if proto.HasField("expect_match") else True


def _dynamic_metadata(proto: Any, context: Context) -> Action:
    return _compile_metadata(proto, of_route=False, absent=None)


def _metadata(proto: Any, context: Context) -> Action:
    return _compile_metadata(proto, of_route=proto.source == 1, absent=_SKIP if proto.skip_if_absent else None)


def _compile_metadata(proto: Any, *, of_route: bool, absent: tuple[()] | None) -> Action:
    namespace = proto.metadata_key.key
    path: Sequence[str] = tuple(segment.key for segment in proto.metadata_key.path)
    key = proto.descriptor_key.encode()
    default = proto.default_value

    def action(stream: Any) -> Entry | tuple[()] | None:
        metadata = (stream.route.metadata if stream.route is not None else None) if of_route else stream.metadata
        value = matchers.metadata_value(metadata or {}, namespace, path)
        text = value if isinstance(value, str) and value else default
        return (key, text.encode()) if text else absent

    return action


_ACTIONS: dict[str, Callable[[Any, Any], Action]] = {
    "source_cluster": _source_cluster,
    "destination_cluster": _destination_cluster,
    "request_headers": _request_headers,
    "query_parameters": _query_parameters,
    "remote_address": _remote_address,
    "masked_remote_address": _masked_remote_address,
    "generic_key": _generic_key,
    "header_value_match": _header_value_match,
    "query_parameter_value_match": _query_parameter_value_match,
    "dynamic_metadata": _dynamic_metadata,
    "metadata": _metadata,
}
