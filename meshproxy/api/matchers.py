"""Matchers of the Envoy API -> plain predicates, built once from configuration and called on every request.

Every `compile_*` takes a proto and returns a callable without side effects, or raises ConfigError with the path of the field. What the predicates take:
strings are bytes, heads are `codec.headers.Headers`, metadata and values are plain JSON-like Python objects. `runtime` is an optional
`api.runtime.Runtime`, needed only for the limit of regular expressions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from meshproxy.api import cidr, regex
from meshproxy.api.cidr import compile_cidr
from meshproxy.api.errors import UNSUPPORTED, ConfigError, fail, under
from meshproxy.api.regex import BytesPredicate, compile_regex, compile_substitution

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2
    from envoy.type.matcher.v3 import filter_state_pb2, metadata_pb2, number_pb2, path_pb2, string_pb2, value_pb2

    from meshproxy.codec.headers import Headers

__all__ = [
    "MISSING",
    "compile_cidr",
    "compile_double",
    "compile_filter_state",
    "compile_header",
    "compile_headers",
    "compile_metadata",
    "compile_path",
    "compile_query",
    "compile_query_parameters",
    "compile_regex",
    "compile_string",
    "compile_substitution",
    "compile_value",
    "metadata_value",
    "parse_int64",
    "parse_query",
    "strip_query",
]

HeaderPredicate = Callable[["Headers"], bool]
QueryPredicate = Callable[[dict[bytes, bytes]], bool]

HONOURS = {
    **regex.HONOURS,
    **cidr.HONOURS,
    "envoy.type.matcher.v3.StringMatcher": "exact prefix suffix safe_regex contains ignore_case",
    "envoy.type.matcher.v3.ListStringMatcher": "patterns",
    "envoy.type.matcher.v3.PathMatcher": "path",
    "envoy.type.matcher.v3.MetadataMatcher": "filter path value invert",
    "envoy.type.matcher.v3.MetadataMatcher.PathSegment": "key",
    "envoy.type.matcher.v3.ValueMatcher": "null_match double_match string_match bool_match present_match list_match or_match",
    "envoy.type.matcher.v3.ValueMatcher.NullMatch": "",
    "envoy.type.matcher.v3.ListMatcher": "one_of",
    "envoy.type.matcher.v3.OrMatcher": "value_matchers",
    "envoy.type.matcher.v3.DoubleMatcher": "range exact",
    "envoy.type.matcher.v3.FilterStateMatcher": "key string_match address_match",
    "envoy.type.matcher.v3.AddressMatcher": "ranges",
    "envoy.type.v3.DoubleRange": "start end",
    "envoy.type.v3.Int64Range": "start end",
    "envoy.config.route.v3.HeaderMatcher": (
        "name exact_match safe_regex_match range_match present_match prefix_match suffix_match contains_match string_match invert_match"
        " treat_missing_header_as_empty"
    ),
    "envoy.config.route.v3.QueryParameterMatcher": "name string_match present_match",
    "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig": "path_template",
}

MISSING: Any = object()  # a metadata value that is not there; None is JSON's null

_INT64 = range(-(1 << 63), 1 << 63)


# -- strings ------------------------------------------------------------------------------------------------------------------------------------------


def compile_string(proto: string_pb2.StringMatcher, runtime: Any = None) -> BytesPredicate:
    """`StringMatcher` -> predicate on bytes. `ignore_case` folds ASCII letters only."""
    which = proto.WhichOneof("match_pattern")
    if which == "safe_regex":
        if proto.ignore_case:
            fail("ignore_case", "ignore_case has no effect for safe_regex.")
        with under("safe_regex"):
            return compile_regex(proto.safe_regex, runtime)
    if which == "custom":
        fail("custom", "custom string matchers are not supported", UNSUPPORTED)
    if which is None:
        fail("match_pattern", "Configuration must define a matcher")
    operand: bytes = getattr(proto, which).encode()
    if proto.ignore_case:
        return _ignoring_case(which, operand.lower())
    return _case_sensitive(which, operand)


def _case_sensitive(which: str, operand: bytes) -> BytesPredicate:
    # Callables made of C only: the interpreter's own frame would cost more than the comparison.
    if which == "exact":
        return operand.__eq__
    if which == "prefix":
        return methodcaller("startswith", operand)
    if which == "suffix":
        return methodcaller("endswith", operand)
    return methodcaller("__contains__", operand)


def _ignoring_case(which: str, operand: bytes) -> BytesPredicate:
    if which == "exact":
        return lambda value: value.lower() == operand
    if which == "prefix":
        return lambda value: value.lower().startswith(operand)
    if which == "suffix":
        return lambda value: value.lower().endswith(operand)
    return lambda value: operand in value.lower()


def parse_int64(text: bytes) -> int | None:
    """A whole number as absl::SimpleAtoi reads it: white space around and a sign are allowed. None when it is not one or does not fit 64 bits."""
    text = text.strip()
    digits = text[1:] if text[:1] in (b"+", b"-") else text
    if not digits.isdigit():
        return None
    digits = digits.lstrip(b"0") or b"0"
    if len(digits) > 19:  # also keeps Python from refusing, or labouring on, thousands of digits
        return None
    number = -int(digits) if text[:1] == b"-" else int(digits)
    return number if number in _INT64 else None


# -- headers ------------------------------------------------------------------------------------------------------------------------------------------


def compile_header(proto: route_components_pb2.HeaderMatcher, runtime: Any = None) -> HeaderPredicate:
    """`HeaderMatcher` -> predicate on a head.

    Each value of a header that occurs several times is tested by itself (Envoy's `match_headers_individually`, the default since 1.39): one that
    matches is enough, and with `invert_match` none may. A header that is not there matches nothing, inverted or not, except `present_match: false` and
    with `treat_missing_header_as_empty`.
    """
    if not proto.name:
        fail("name", "value length must be at least 1 characters")
    name = proto.name.encode().lower()
    invert = proto.invert_match
    which = proto.WhichOneof("header_match_specifier")
    if which is None or which == "present_match":
        present = which is None or proto.present_match
        found = present != invert
        return _present(name, found, found if proto.treat_missing_header_as_empty else invert == present)
    test = _value_test(proto, which, runtime)
    missing = test(b"") != invert if proto.treat_missing_header_as_empty else False
    return _value(name, test, not invert, missing)


def _value_test(proto: route_components_pb2.HeaderMatcher, which: str, runtime: Any) -> BytesPredicate:
    if which == "string_match":
        with under("string_match"):
            return compile_string(proto.string_match, runtime)
    if which == "safe_regex_match":
        with under("safe_regex_match"):
            return compile_regex(proto.safe_regex_match, runtime)
    if which == "range_match":
        return _in_range(proto.range_match.start, proto.range_match.end)
    operand: bytes = getattr(proto, which).encode()
    if which == "exact_match" and not operand:
        return lambda value: True  # as Envoy: an empty exact_match is a presence test
    return _case_sensitive(which.removesuffix("_match"), operand)


def _in_range(start: int, end: int) -> BytesPredicate:
    def in_range(value: bytes) -> bool:
        number = parse_int64(value)
        return number is not None and start <= number < end

    return in_range


def _present(name: bytes, found: bool, missing: bool) -> HeaderPredicate:
    def present(head: Headers) -> bool:
        return missing if head.get(name) is None else found

    return present


def _value(name: bytes, test: BytesPredicate, hit: bool, missing: bool) -> HeaderPredicate:
    pseudo = name[:1] == b":" or name == b"host"

    def matches(head: Headers) -> bool:
        # HOT: a dictionary's own `get` costs a quarter of a Python method.
        index = head._index
        value = head.get(name) if pseudo or index is None else index.get(name)
        if value is None:
            return missing
        if test(value):
            return hit
        # The index has one entry a name: equal lengths mean that no header occurs twice, which is nearly always so.
        if len(head._index) == len(head.items):  # type: ignore[arg-type]  # `get` built it
            return not hit
        for key, value in head.items:
            if key == name and test(value):
                return hit
        return not hit

    return matches


def compile_headers(protos: Iterable[route_components_pb2.HeaderMatcher], runtime: Any = None) -> HeaderPredicate | None:
    """Header matchers that must all match; None when there is none. Error paths start with the index."""
    tests = []
    for index, proto in enumerate(protos):
        with under(f"[{index}]"):
            tests.append(compile_header(proto, runtime))
    if len(tests) <= 1:
        return tests[0] if tests else None
    if len(tests) == 2:
        first, second = tests
        return lambda head: first(head) and second(head)

    def all_match(head: Headers) -> bool:
        for test in tests:  # noqa: SIM110  # a generator would cost more than the tests
            if not test(head):
                return False
        return True

    return all_match


# -- paths and queries --------------------------------------------------------------------------------------------------------------------------------


def strip_query(path: bytes) -> bytes:
    """A `:path` without its query and fragment."""
    if QUESTION_MARK in path:
        path = path[: path.find(b"?")]
    return path[: path.find(b"#")] if HASH in path else path


# HOT code asks for these numbers: for bytes, `in` first fails to take its operand for one.
QUESTION_MARK, HASH = b"?#"


def compile_path(proto: path_pb2.PathMatcher, runtime: Any = None) -> BytesPredicate:
    """`PathMatcher` -> predicate on a `:path`, whose query and fragment do not count."""
    if proto.WhichOneof("rule") is None:
        fail("path", "value is required")
    with under("path"):
        test = compile_string(proto.path, runtime)

    def matches(path: bytes) -> bool:
        return test(strip_query(path) if QUESTION_MARK in path or HASH in path else path)

    return matches


def parse_query(path: bytes) -> dict[bytes, bytes]:
    """The query parameters of a `:path`, not decoded, the first value of each name; a parameter without `=` has an empty value."""
    start = path.find(b"?")
    if start < 0:
        return {}
    found: dict[bytes, bytes] = {}
    for part in path[start + 1 :].split(b"&"):
        name, _, value = part.partition(b"=")
        found.setdefault(name, value)
    return found


def compile_query(proto: route_components_pb2.QueryParameterMatcher, runtime: Any = None) -> QueryPredicate:
    """`QueryParameterMatcher` -> predicate on what `parse_query` returns."""
    if not proto.name:
        fail("name", "value length must be at least 1 characters")
    name = proto.name.encode()
    which = proto.WhichOneof("query_parameter_match_specifier")
    if which == "string_match":
        with under("string_match"):
            test = compile_string(proto.string_match, runtime)

        def matches(query: dict[bytes, bytes]) -> bool:
            value = query.get(name)
            return value is not None and test(value)

        return matches
    if which == "present_match" and not proto.present_match:
        return lambda query: name not in query
    return lambda query: name in query


def compile_query_parameters(protos: Iterable[route_components_pb2.QueryParameterMatcher], runtime: Any = None) -> BytesPredicate | None:
    """Query parameter matchers that must all match -> predicate on a `:path`; None when there is none. Error paths start with the index."""
    tests = []
    for index, proto in enumerate(protos):
        with under(f"[{index}]"):
            tests.append(compile_query(proto, runtime))
    if not tests:
        return None

    def all_match(path: bytes) -> bool:
        query = parse_query(path)
        return all(test(query) for test in tests)

    return all_match


# -- metadata, values and filter state ----------------------------------------------------------------------------------------------------------------


def metadata_value(metadata: dict[str, dict[str, Any]], namespace: str, path: Iterable[str]) -> Any:
    """The value at `path` inside a filter's metadata, or MISSING."""
    value: Any = metadata.get(namespace, MISSING)
    for key in path:
        if not isinstance(value, dict):
            return MISSING
        value = value.get(key, MISSING)
    return value


def compile_metadata(proto: metadata_pb2.MetadataMatcher, runtime: Any = None) -> Callable[[dict[str, dict[str, Any]]], bool]:
    """`MetadataMatcher` -> predicate on dynamic metadata (filter namespace -> JSON-like object). A missing value matches only through `invert`."""
    if not proto.filter:
        fail("filter", "value length must be at least 1 characters")
    if not proto.path:
        fail("path", "value must contain at least 1 item(s)")
    namespace = proto.filter
    path = tuple(segment.key for segment in proto.path)
    with under("value"):
        test = compile_value(proto.value, runtime)
    invert = proto.invert
    return lambda metadata: test(metadata_value(metadata, namespace, path)) != invert


def compile_value(proto: value_pb2.ValueMatcher, runtime: Any = None) -> Callable[[Any], bool]:
    """`ValueMatcher` -> predicate on a JSON-like value, or MISSING, which matches nothing."""
    which = proto.WhichOneof("match_pattern")
    if which == "null_match":
        return lambda value: value is None
    if which == "bool_match":
        wanted = proto.bool_match
        return lambda value: value is wanted
    if which == "present_match":
        present = proto.present_match
        return lambda value: present and value is not MISSING
    if which == "double_match":
        with under("double_match"):
            number = compile_double(proto.double_match)
        return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and number(value)
    if which == "string_match":
        with under("string_match"):
            text = compile_string(proto.string_match, runtime)
        return lambda value: isinstance(value, str) and text(value.encode("utf-8", "surrogateescape"))
    if which == "list_match":
        with under("list_match.one_of"):
            item = compile_value(proto.list_match.one_of, runtime)
        return lambda value: isinstance(value, list | tuple) and any(map(item, value))
    if which == "or_match":
        tests = []
        for index, alternative in enumerate(proto.or_match.value_matchers):
            with under(f"or_match.value_matchers[{index}]"):
                tests.append(compile_value(alternative, runtime))
        if len(tests) < 2:
            fail("or_match.value_matchers", "value must contain at least 2 item(s)")
        return lambda value: any(test(value) for test in tests)
    raise ConfigError.at("match_pattern", "value is required")


def compile_double(proto: number_pb2.DoubleMatcher) -> Callable[[float], bool]:
    """`DoubleMatcher` -> predicate on a number; ranges are half open."""
    which = proto.WhichOneof("match_pattern")
    if which == "exact":
        exact = proto.exact
        return lambda value: value == exact
    if which == "range":
        start, end = proto.range.start, proto.range.end
        return lambda value: start <= value < end
    raise ConfigError.at("match_pattern", "value is required")


def compile_filter_state(proto: filter_state_pb2.FilterStateMatcher, runtime: Any = None) -> Callable[[dict[str, Any]], bool]:
    """`FilterStateMatcher` -> predicate on filter state (name -> object). Text objects are str or bytes, addresses `net.address.Address`."""
    if not proto.key:
        fail("key", "value length must be at least 1 characters")
    key = proto.key
    which = proto.WhichOneof("matcher")
    if which == "address_match":
        with under("address_match.ranges"):
            contains = compile_cidr(proto.address_match.ranges)

        def address_matches(state: dict[str, Any]) -> bool:
            value: Any = state.get(key)
            return hasattr(value, "ip_bytes") and contains(value)

        return address_matches
    if which == "string_match":
        with under("string_match"):
            text = compile_string(proto.string_match, runtime)

        def text_matches(state: dict[str, Any]) -> bool:
            value = state.get(key)
            if isinstance(value, str):
                value = value.encode("utf-8", "surrogateescape")
            return isinstance(value, bytes) and text(value)

        return text_matches
    raise ConfigError.at("matcher", "value is required")
