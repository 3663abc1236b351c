"""Route tables against the plainest possible reading of the rules."""

from __future__ import annotations

from envoy.config.route.v3 import route_components_pb2 as pb
from envoy.type.matcher.v3 import regex_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.api import matchers
from meshproxy.codec.headers import RequestHead
from meshproxy.http import retry, timeouts
from meshproxy.http.route_index import PathIndex
from meshproxy.http.route_match import EXACT, OTHER, PREFIX
from meshproxy.http.weighted_clusters import parse_uint64
from tests.unit.route_help import cluster_of, table, to

QUICK = settings(max_examples=60)
PATH = st.text("/ab;", min_size=0, max_size=6).map(lambda text: "/" + text)


# -- virtual hosts

LABEL = st.text("abAB-.:", min_size=1, max_size=5)
DOMAIN = st.one_of(LABEL, LABEL.map(lambda text: "*" + text), LABEL.map(lambda text: text + "*"), st.just("*"))


def expected_host(domains: list[str], host: str) -> str | None:
    host = host.lower()
    if set(domains) <= {"*"}:
        return domains[0] if domains else None
    if not host:
        return None
    lower = {domain.lower(): domain for domain in domains}
    if host in lower:
        return lower[host]
    for pattern in sorted((one for one in lower if one.startswith("*") and one != "*"), key=len, reverse=True):
        if host.endswith(pattern[1:]) and len(host) >= len(pattern):
            return lower[pattern]
    for pattern in sorted((one for one in lower if not one.startswith("*") and one.endswith("*")), key=len, reverse=True):
        if host.startswith(pattern[:-1]) and len(host) >= len(pattern):
            return lower[pattern]
    return lower.get("*")


@QUICK
@given(st.lists(DOMAIN, min_size=1, max_size=12, unique_by=str.lower), st.lists(st.text("abAB-.:", max_size=7), max_size=8))
def test_virtual_hosts(domains, hosts):
    routes = table({"virtual_hosts": [{"name": domain, "domains": [domain], "routes": [to(domain)]} for domain in domains]})
    for host in hosts:
        found = expected_host(domains, host)
        assert cluster_of(routes, host=host.encode()) == found, host
        assert cluster_of(routes, host=host.encode()) == found, host


# -- routes


def fits(match: dict, path: str) -> bool:
    bare = path.partition("?")[0]
    kind, operand = next(iter(match.items()))
    if match.get("case_sensitive") is False:
        bare, operand = bare.lower(), operand.lower()
    if kind == "path":
        return bare == operand
    if kind == "prefix":
        return bare.startswith(operand)
    if kind == "path_separated_prefix":
        return bare == operand or bare.startswith(operand + "/")
    return bool(matchers.compile_regex(regex_pb2.RegexMatcher(regex=operand["regex"]))(bare.encode()))


MATCH = st.one_of(
    PATH.map(lambda text: {"path": text}),
    PATH.map(lambda text: {"prefix": text}),
    PATH.filter(lambda text: text[-1] != "/").map(lambda text: {"path_separated_prefix": text}),
    PATH.map(lambda text: {"safe_regex": {"regex": text + "[ab]*"}}),
    PATH.map(lambda text: {"prefix": text.upper(), "case_sensitive": False}),
)
CONDITION = st.sampled_from([None, "x", "y"])


@QUICK
@given(
    st.lists(st.tuples(MATCH, CONDITION), min_size=1, max_size=15),
    st.lists(st.tuples(PATH, st.sampled_from(["", "?a=/b"]), st.sets(st.sampled_from("xy"))), min_size=1, max_size=10),
)
def test_first_matching_route_wins(routes, requests):
    config = [to(str(number), {**match, **({"headers": [{"name": condition}]} if condition else {})}) for number, (match, condition) in enumerate(routes)]
    built = table({"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": config}]})
    for path, query, headers in requests:
        expected = next(
            (str(number) for number, (match, condition) in enumerate(routes) if fits(match, path + query) and (condition is None or condition in headers)), None
        )
        items = [(name.encode(), b"1") for name in sorted(headers)]
        assert cluster_of(built, (path + query).encode(), *items) == expected


@given(st.lists(st.tuples(st.sampled_from([EXACT, PREFIX, OTHER]), PATH.map(str.encode)), max_size=30), PATH.map(str.encode))
def test_index_finds_all_that_may_match_in_order(keys, path):
    expected = [
        order
        for order, (kind, operand) in enumerate(keys)
        if kind == OTHER or (kind == EXACT and path == operand) or (kind == PREFIX and path.startswith(operand))
    ]
    assert list(PathIndex(keys).candidates(path)) == expected


# -- matchers

VALUE = st.text("ab,", max_size=4)


@given(st.sampled_from(["exact", "prefix", "suffix", "contains"]), VALUE, st.booleans(), st.lists(VALUE, max_size=3))
def test_header_values_are_tested_one_by_one(kind, operand, invert, values):
    proto = pb.HeaderMatcher(name="a", invert_match=invert)
    setattr(proto.string_match, kind, operand)
    tests = {
        "exact": lambda value: value == operand,
        "prefix": lambda value: value.startswith(operand),
        "suffix": lambda value: value.endswith(operand),
        "contains": lambda value: operand in value,
    }
    expected = bool(values) and any(map(tests[kind], values)) != invert
    items = [(b"other", b"1"), *((b"a", value.encode()) for value in values)]
    assert matchers.compile_header(proto)(RequestHead(b"GET", b"/", b"h", items)) is expected


@given(st.binary(max_size=8))
def test_any_bytes_match_a_dot_star(text):
    assert matchers.compile_regex(regex_pb2.RegexMatcher(regex="(?s).*"))(text)


@given(st.text("ab?&=#/", max_size=12))
def test_query_parsing(text):
    path = ("/" + text).encode()
    query = matchers.parse_query(path)
    expected: dict[bytes, bytes] = {}
    for part in path.partition(b"?")[2].split(b"&") if b"?" in path else []:
        expected.setdefault(part.split(b"=")[0], b"=".join(part.split(b"=")[1:]))
    assert query == expected


@given(st.one_of(st.integers(-(1 << 66), 1 << 66).map(lambda number: b"%d" % number), st.binary(max_size=6)))
def test_integers(text):
    signed, unsigned = matchers.parse_int64(text), parse_uint64(text)
    assert signed is None or -(1 << 63) <= signed < 1 << 63
    assert unsigned is None or 0 <= unsigned < 1 << 64
    try:
        number = int(text) if b"_" not in text else None
    except ValueError:
        number = None
    assert signed == (number if number is not None and -(1 << 63) <= number < 1 << 63 else None)
    assert unsigned == (number if number is not None and 0 <= number < 1 << 64 else None) or text.strip().startswith(b"-")


# -- timeouts and retries


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 20_000), st.booleans())
def test_expected_timeouts_never_exceed_what_is_left(global_ms, per_try_ms, elapsed_ms, hedging):
    expected = timeouts.expected_ms(global_ms, per_try_ms, elapsed_ms, hedging=hedging)
    if global_ms and expected:
        assert 1 <= expected <= max(global_ms - elapsed_ms, 1)
    if not expected:
        assert not global_ms


@given(st.text(max_size=30))
def test_any_retry_on_is_understood_or_ignored(text):
    bits, valid = retry.parse_retry_on(text)
    assert 0 <= bits < 1 << 16
    assert valid or any(part.strip() for part in text.split(","))


@QUICK
@given(st.lists(st.integers(0, 8), min_size=1, max_size=20).filter(any))
def test_weights_divide_the_numbers(weights):
    clusters = [{"name": str(index), "weight": weight} for index, weight in enumerate(weights)]
    action = {"weighted_clusters": {"header_name": "n", "clusters": clusters}}
    routes = table({"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": action}]}]})
    spread = [str(index) for index, weight in enumerate(weights) for _ in range(weight)]
    for value in range(0, 3 * len(spread), max(1, len(spread) // 5)):
        assert cluster_of(routes, b"/", (b"n", b"%d" % value)) == spread[value % len(spread)]
