"""The header mutation filter."""

from __future__ import annotations

from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.codec.headers import Headers
from meshproxy.http.filters import header_mutation
from tests.unit.filter_help import Stream, context, proto

FILTER = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation"
PER_ROUTE = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute"


def make(text: str, *routes: str, wins: bool = False) -> Any:
    base = header_mutation.compile(proto(FILTER, f"{{mutations: {{{text}}}, most_specific_header_mutations_wins: {str(wins).lower()}}}"), context())
    if not routes:
        return base
    return header_mutation.specialise(base, [proto(PER_ROUTE, f"{{mutations: {{{route}}}}}") for route in routes], context())


def set_header(key: str, value: str, action: str = "APPEND_IF_EXISTS_OR_ADD") -> str:
    return f"{{append: {{header: {{key: {key}, value: '{value}'}}, append_action: {action}}}}}"


def request(filter: Any, *headers: tuple[bytes, bytes], path: bytes = b"/") -> Any:
    stream = Stream(path, headers)
    filter.request_headers(stream, True)
    return stream.request


@pytest.mark.parametrize(
    ("mutation", "before", "after"),
    [
        (set_header("X-A", "n"), [], [(b"x-a", b"n")]),
        (set_header("x-a", "n"), [(b"x-a", b"o")], [(b"x-a", b"o"), (b"x-a", b"n")]),
        (set_header("accept", "n"), [(b"accept", b"o")], [(b"accept", b"o,n")]),  # one line only, as in Envoy
        (set_header("x-a", "n", "ADD_IF_ABSENT"), [(b"x-a", b"o")], [(b"x-a", b"o")]),
        (set_header("x-a", "n", "ADD_IF_ABSENT"), [], [(b"x-a", b"n")]),
        (set_header("x-a", "n", "OVERWRITE_IF_EXISTS_OR_ADD"), [(b"x-a", b"o"), (b"x-a", b"p")], [(b"x-a", b"n")]),
        (set_header("x-a", "n", "OVERWRITE_IF_EXISTS_OR_ADD"), [], [(b"x-a", b"n")]),
        (set_header("x-a", "n", "OVERWRITE_IF_EXISTS"), [(b"x-a", b"o")], [(b"x-a", b"n")]),
        (set_header("x-a", "n", "OVERWRITE_IF_EXISTS"), [], []),
        ("{append: {header: {key: x-a, value: 'n'}, append: false}}", [(b"x-a", b"o")], [(b"x-a", b"n")]),
        (set_header("x-a", ""), [], []),  # an empty value changes nothing
        ("{append: {header: {key: x-a}, keep_empty_value: true}}", [], [(b"x-a", b"")]),
        ("{remove: X-A}", [(b"x-a", b"o"), (b"x-b", b"o"), (b"x-a", b"p")], [(b"x-b", b"o")]),
        ("{remove: x-z}", [(b"x-a", b"o")], [(b"x-a", b"o")]),
        ("{remove_on_match: {key_matcher: {prefix: x-p}}}", [(b"x-p1", b"1"), (b"x-a", b"o"), (b"x-p2", b"2")], [(b"x-a", b"o")]),
    ],
)
def test_request_headers(mutation: str, before: list[tuple[bytes, bytes]], after: list[tuple[bytes, bytes]]) -> None:
    assert request(make(f"request_mutations: [{mutation}]"), *before).items == after


def test_each_mutation_sees_what_the_one_before_did() -> None:
    filter = make(f"request_mutations: [{set_header('x-a', '1')}, {set_header('x-a', '2', 'OVERWRITE_IF_EXISTS')}, {{remove: x-b}}]")
    head = request(filter, (b"x-b", b"1"))
    assert head.items == [(b"x-a", b"2")]
    assert head.get(b"x-b") is None


def test_hooks_that_nothing_needs_do_not_exist() -> None:
    hooks = ("request_headers", "response_headers", "request_trailers", "response_trailers")
    assert [name for name in hooks if hasattr(make(""), name)] == []
    assert [name for name in hooks if hasattr(make(f"response_mutations: [{set_header('a', 'b')}]"), name)] == ["response_headers"]
    assert [name for name in hooks if hasattr(make("", f"request_trailers_mutations: [{set_header('a', 'b')}]"), name)] == ["request_trailers"]


def test_response_and_trailers() -> None:
    filter = make(
        f"response_mutations: [{set_header('x-r', '1')}, {set_header('vary', 'n')}], request_trailers_mutations: [{set_header('x-q', '2')}], "
        f"response_trailers_mutations: [{{remove: x-t}}]"
    )
    stream = Stream()
    stream.response.add(b"vary", b"o")
    filter.response_headers(stream, False)
    assert stream.response.items == [(b"vary", b"o,n"), (b"x-r", b"1")]
    trailers = Headers([(b"x-t", b"1")])
    filter.request_trailers(stream, trailers)
    assert trailers.items == [(b"x-t", b"1"), (b"x-q", b"2")]
    filter.response_trailers(stream, trailers)
    assert trailers.items == [(b"x-q", b"2")]


@pytest.mark.parametrize(("wins", "order"), [(False, [b"base", b"route", b"vhost", b"table"]), (True, [b"base", b"table", b"vhost", b"route"])])
def test_levels(wins: bool, order: list[bytes]) -> None:
    levels = [f"request_mutations: [{set_header('x-l', name)}]" for name in ("base", "table", "vhost", "route")]
    assert [value for _, value in request(make(*levels, wins=wins)).items] == order


def change(key: str, value: str, action: str = "APPEND_IF_EXISTS_OR_ADD") -> str:
    return f"{{append: {{record: {{key: '{key}', value: '{value}'}}, action: {action}}}}}"


@pytest.mark.parametrize(
    ("mutations", "before", "after"),
    [
        (change("b", "new v&x"), b"/p?c=3&a=1", b"/p?a=1&b=new%20v%26x&c=3"),  # sorted by name, as Envoy does
        (change("a", "2"), b"/p?a=1", b"/p?a=1&a=2"),
        (change("a", "2", "ADD_IF_ABSENT"), b"/p?a=1", b"/p?a=1"),
        (change("a", "2", "ADD_IF_ABSENT"), b"/p", b"/p?a=2"),
        (change("a", "9", "OVERWRITE_IF_EXISTS_OR_ADD"), b"/p?a=1&a=2", b"/p?a=9"),
        (change("a", "9", "OVERWRITE_IF_EXISTS"), b"/p", b"/p"),
        (change("a", "9", "OVERWRITE_IF_EXISTS"), b"/p?%61=1", b"/p?a=9"),  # names are compared decoded
        ("{remove: gone}", b"/p?gone=1", b"/p"),
        ("{remove: gone}", b"/p?x&gone=1&gone=2", b"/p?x="),
        ("{remove: gone}", b"/p?s=%20%0d%0a&gone", b"/p?s=%20%0d%0a"),  # what is not touched stays as it was
        (change("a", "!~*-._ "), b"/p", b"/p?a=%21%7E*-._%20"),
    ],
)
def test_query_parameters(mutations: str, before: bytes, after: bytes) -> None:
    assert request(make(f"query_parameter_mutations: [{mutations}]"), path=before).path == after


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (f"request_mutations: [{{remove: a}}, {set_header('host', 'b')}]", "mutations.request_mutations[1].append.header.key"),
        (f"response_mutations: [{set_header('''':status' '''.strip(), '1')}]", "mutations.response_mutations[0].append.header.key"),
        ("request_mutations: [{append: {header: {key: a}, append: true, append_action: ADD_IF_ABSENT}}]", "mutations.request_mutations[0].append.append"),
        ("request_mutations: [{}]", "mutations.request_mutations[0]"),
        ("query_parameter_mutations: [{}]", "mutations.query_parameter_mutations[0]"),
        ("query_parameter_mutations: [{append: {}}]", "mutations.query_parameter_mutations[0].append.record"),
        ("query_parameter_mutations: [{append: {record: {key: a, value: 1}}}]", "mutations.query_parameter_mutations[0].append.record.value"),
        (f"query_parameter_mutations: [{change('a', 'b')[:-1]}, remove: c}}]", "mutations.query_parameter_mutations[0]"),
    ],
)
def test_errors(text: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(text)
    assert caught.value.problems[0].path == path
