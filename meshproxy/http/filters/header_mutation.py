"""Changes headers, trailers and query parameters (envoy.extensions.filters.http.header_mutation.v3.HeaderMutation).

The filter's own mutations run first, then those of the route configuration, virtual host and route: the most specific first, or last with
`most_specific_header_mutations_wins`. Only the hooks that some mutation needs exist.

Query parameters: after a mutation they are sorted by name, as Envoy has them. New values are percent-encoded; parameters that no mutation touches keep
their own encoding, where Envoy 1.40 forwards them decoded, which can make a different or broken request of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes

from meshproxy.api import errors, matchers
from meshproxy.api.errors import ConfigError
from meshproxy.http import header_mutations
from meshproxy.http.header_mutations import ADD_IF_ABSENT, APPEND, OVERWRITE, OVERWRITE_IF_EXISTS

if TYPE_CHECKING:
    from envoy.config.common.mutation_rules.v3.mutation_rules_pb2 import HeaderMutation as MutationProto
    from envoy.config.core.v3.base_pb2 import HeaderValueOption, KeyValueMutation
    from envoy.extensions.filters.http.header_mutation.v3.header_mutation_pb2 import HeaderMutation as HeaderMutationProto
    from envoy.extensions.filters.http.header_mutation.v3.header_mutation_pb2 import HeaderMutationPerRoute, Mutations

    from meshproxy.codec.headers import Headers
    from meshproxy.http.filters import FilterContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation"
ROUTE_TYPE_URLS = ("type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute",)
HONOURS = {
    "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation": "mutations most_specific_header_mutations_wins",
    "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute": "mutations",
    "envoy.extensions.filters.http.header_mutation.v3.Mutations": (
        "request_mutations query_parameter_mutations response_mutations response_trailers_mutations request_trailers_mutations"
    ),
    "envoy.config.core.v3.KeyValueMutation": "append remove",
    "envoy.config.core.v3.KeyValueAppend": "record action",
    "envoy.config.core.v3.KeyValuePair": "key value",
    **header_mutations.HONOURS,
}

Mutate = Callable[["Headers", Any], object]  # (what to change, stream)
Value = bytes | Callable[[Any], bytes]

# name (decoded) -> the values, percent-encoded, each with the name as it is written
Parameters = dict[bytes, list[tuple[bytes, bytes]]]
MutateQuery = Callable[[Parameters, Any], object]


class Compiled:
    """One Mutations message."""

    __slots__ = ("query", "request", "request_trailers", "response", "response_trailers")

    def __init__(self, proto: Mutations) -> None:
        found = errors.Collector()
        self.request = self.request_trailers = self.response = self.response_trailers = ()  # type: tuple[Mutate, ...]
        self.query: tuple[MutateQuery, ...] = ()
        with found.under("request_mutations"):
            self.request = compile_mutations(proto.request_mutations, request=True)
        with found.under("query_parameter_mutations"):
            self.query = _compile_queries(proto.query_parameter_mutations)
        with found.under("response_mutations"):
            self.response = compile_mutations(proto.response_mutations)
        with found.under("request_trailers_mutations"):
            self.request_trailers = compile_mutations(proto.request_trailers_mutations, request=True)
        with found.under("response_trailers_mutations"):
            self.response_trailers = compile_mutations(proto.response_trailers_mutations)
        found.raise_any()


class HeaderMutation:
    """The filter: several Mutations in the order in which they run. `base` is the filter's own, `specific_last` its order for those of routes."""

    __slots__ = ("base", "name", "request_headers", "request_trailers", "response_headers", "response_trailers", "specific_last")

    def __init__(self, base: Compiled, parts: Sequence[Compiled], *, specific_last: bool) -> None:
        self.base = base
        self.specific_last = specific_last
        parts = (base, *parts)
        # An attribute that is not set is a hook that does not exist.
        if any(part.request or part.query for part in parts):
            self.request_headers = _request_hook(parts)
        if response := tuple(mutate for part in parts for mutate in part.response):
            self.response_headers = _response_hook(response)
        if request_trailers := tuple(mutate for part in parts for mutate in part.request_trailers):
            self.request_trailers = _trailers_hook(request_trailers)
        if response_trailers := tuple(mutate for part in parts for mutate in part.response_trailers):
            self.response_trailers = _trailers_hook(response_trailers)


def compile(proto: HeaderMutationProto, context: FilterContext) -> HeaderMutation:
    """The filter for a HeaderMutation proto. Raises ConfigError."""
    with errors.under("mutations"):
        base = Compiled(proto.mutations)
    return HeaderMutation(base, (), specific_last=proto.most_specific_header_mutations_wins)


def specialise(base: HeaderMutation | None, overrides: list[HeaderMutationPerRoute], context: FilterContext) -> HeaderMutation:
    """The filter for a route: its own mutations, and those of every override."""
    assert base is not None
    parts = []
    for override in overrides:
        with errors.under("mutations"):
            parts.append(Compiled(override.mutations))
    if not base.specific_last:
        parts.reverse()
    return HeaderMutation(base.base, parts, specific_last=base.specific_last)


def _request_hook(parts: Sequence[Compiled]) -> Callable[[Any, bool], None]:
    def request_headers(stream: Any, end_stream: bool) -> None:
        head = stream.request
        for part in parts:
            for mutate in part.request:
                mutate(head, stream)
            if part.query:
                head.path = mutate_query(head.path, part.query, stream)

    return request_headers


def _response_hook(mutations: tuple[Mutate, ...]) -> Callable[[Any, bool], None]:
    def response_headers(stream: Any, end_stream: bool) -> None:
        response = stream.response
        for mutate in mutations:
            mutate(response, stream)

    return response_headers


def _trailers_hook(mutations: tuple[Mutate, ...]) -> Callable[[Any, Headers], None]:
    def trailers_hook(stream: Any, trailers: Headers) -> None:
        for mutate in mutations:
            mutate(trailers, stream)

    return trailers_hook


# -- headers ---------------------------------------------------------------------------------------------------------------------------------------------


def compile_mutations(protos: Sequence[MutationProto], *, request: bool = False) -> tuple[Mutate, ...]:
    compiled = []
    for index, proto in enumerate(protos):
        with errors.under(f"[{index}]"):
            compiled.append(_compile_mutation(proto, request))
    return tuple(compiled)


def _compile_mutation(proto: MutationProto, request: bool) -> Mutate:
    kind = proto.WhichOneof("action")
    if kind == "append":
        with errors.under("append"):
            return _compile_append(proto.append, request)
    if kind == "remove":
        name = proto.remove.lower().encode()
        return lambda headers, _: headers.remove(name)
    if kind == "remove_on_match":
        with errors.under("remove_on_match.key_matcher"):
            matches = matchers.compile_string(proto.remove_on_match.key_matcher)
        return lambda headers, _: _remove_matching(headers, matches)
    raise ConfigError.at("", "one of append, remove and remove_on_match must be set")


def _compile_append(proto: HeaderValueOption, request: bool) -> Mutate:
    # Not header_mutations.compile_mutation: here each mutation sees what the one before it did.
    if not header_mutations.is_modifiable(proto.header.key):
        errors.fail("header.key", ":-prefixed or host headers may not be modified")
    action = proto.append_action
    if proto.HasField("append"):
        if action != APPEND:
            errors.fail("append", "must not be set together with append_action")
        action = APPEND if proto.append.value else OVERWRITE
    name = proto.header.key.lower().encode()
    with errors.under("header.value"):
        value = bytes(proto.header.raw_value) or _compile_value(proto.header.value)
    keep_empty = proto.keep_empty_value

    def mutate(headers: Headers, stream: Any) -> None:
        text = value if isinstance(value, bytes) else value(stream)
        if not text and not keep_empty:
            return
        exists = name in headers
        if action == APPEND or (action == ADD_IF_ABSENT and not exists):
            header_mutations.append_header(headers, name, text, request=request)
        elif action == OVERWRITE or (action == OVERWRITE_IF_EXISTS and exists):
            headers.set(name, text)

    return mutate


def _compile_value(text: str) -> Value:
    if "%" not in text:
        return text.encode()
    from meshproxy.observe.format import compile_header_value  # only configurations with commands need it

    return compile_header_value(text)


def _remove_matching(headers: Headers, matches: Callable[[bytes], bool]) -> None:
    headers.items = [pair for pair in headers.items if not matches(pair[0])]
    headers.touch()


# -- query parameters ------------------------------------------------------------------------------------------------------------------------------------


def mutate_query(path: bytes, mutations: Sequence[MutateQuery], stream: Any) -> bytes:
    """`path` with its query parameters changed."""
    bare, _, query = path.partition(b"?")
    parameters: Parameters = {}
    for part in query.split(b"&") if query else ():
        name, _, value = part.partition(b"=")
        parameters.setdefault(unquote_to_bytes(name), []).append((name, value))
    for mutate in mutations:
        mutate(parameters, stream)
    pairs = [b"%b=%b" % pair for name in sorted(parameters) for pair in parameters[name]]
    return b"%b?%b" % (bare, b"&".join(pairs)) if pairs else bare


def _compile_queries(protos: Sequence[KeyValueMutation]) -> tuple[MutateQuery, ...]:
    compiled = []
    for index, proto in enumerate(protos):
        with errors.under(f"[{index}]"):
            compiled.append(_compile_query(proto))
    return tuple(compiled)


def _compile_query(proto: KeyValueMutation) -> MutateQuery:
    if not proto.HasField("append"):
        if not proto.remove:
            errors.fail("", "one of append and remove must be set")
        removed = proto.remove.encode()
        return lambda parameters, _: parameters.pop(removed, None)
    if proto.remove:
        errors.fail("", "only one of append and remove may be set")
    if not proto.append.HasField("record"):
        errors.fail("append.record", "must be set")
    record = proto.append.record
    if record.value.WhichOneof("kind") != "string_value":
        errors.fail("append.record.value", "only a string is allowed")
    with errors.under("append.record.value"):
        value = _compile_value(record.value.string_value)
    key = record.key.encode()
    written = quote(key, safe="!$'()*,;:@/?~").encode()  # what may stand in a query as it is
    action = proto.append.action

    def mutate(parameters: Parameters, info: Any) -> None:
        exists = key in parameters
        if action == APPEND or (action == ADD_IF_ABSENT and not exists):
            parameters.setdefault(key, []).append((written, _encode(value, info)))
        elif action == OVERWRITE or (action != ADD_IF_ABSENT and exists):
            parameters[key] = [(written, _encode(value, info))]

    return mutate


def _encode(value: Value, info: Any) -> bytes:
    return quote(value if isinstance(value, bytes) else value(info), safe="*-._").replace("~", "%7E").encode()
