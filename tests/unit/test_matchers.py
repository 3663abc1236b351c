"""Matchers: expectations were taken from a running Envoy 1.40."""

from __future__ import annotations

import pytest
from envoy.config.core.v3 import address_pb2
from envoy.config.route.v3 import route_components_pb2 as route_pb
from envoy.type.matcher.v3 import filter_state_pb2, metadata_pb2, path_pb2, regex_pb2, string_pb2, value_pb2
from google.protobuf import json_format

from meshproxy.api import matchers
from meshproxy.api.errors import ConfigError
from meshproxy.codec.headers import RequestHead, ResponseHead
from meshproxy.net.address import Address


def make(cls, **fields):
    return json_format.ParseDict(fields, cls())


def string(**fields):
    return matchers.compile_string(make(string_pb2.StringMatcher, **fields))


def header(**fields):
    return matchers.compile_header(make(route_pb.HeaderMatcher, **fields))


def head(*items: tuple[bytes, bytes], path: bytes = b"/", host: bytes = b"h") -> RequestHead:
    return RequestHead(b"GET", path, host, list(items))


def a(*values: bytes) -> RequestHead:
    return head(*((b"a", value) for value in values))


@pytest.mark.parametrize(
    ("fields", "yes", "no"),
    [
        ({"exact": "ab"}, [b"ab"], [b"a", b"AB", b"abc", b""]),
        ({"exact": ""}, [b""], [b"a"]),
        ({"prefix": "ab"}, [b"ab", b"abc"], [b"a", b"xab"]),
        ({"suffix": "ab"}, [b"ab", b"xab"], [b"abx"]),
        ({"contains": "ab"}, [b"xaby", b"ab"], [b"a-b"]),
        ({"exact": "aB", "ignoreCase": True}, [b"Ab", b"ab"], [b"abc"]),
        ({"prefix": "aB", "ignoreCase": True}, [b"ABx"], [b"xab"]),
        ({"suffix": "aB", "ignoreCase": True}, [b"xAB"], [b"abx"]),
        ({"contains": "aB", "ignoreCase": True}, [b"xABy"], [b"a"]),
        ({"exact": "é"}, ["é".encode()], [b"\xe9"]),
        ({"exact": "É", "ignoreCase": True}, ["É".encode()], ["é".encode()]),
        ({"safeRegex": {"regex": "a.c"}}, [b"abc"], [b"abcd", b"xabc"]),
    ],
)
def test_strings(fields, yes, no):
    test = string(**fields)
    assert [test(value) for value in yes] == [True] * len(yes)
    assert [test(value) for value in no] == [False] * len(no)


@pytest.mark.parametrize(
    ("fields", "path"),
    [({}, "match_pattern"), ({"safeRegex": {"regex": "a"}, "ignoreCase": True}, "ignore_case"), ({"safeRegex": {"regex": "("}}, "safe_regex.regex")],
)
def test_string_errors(fields, path):
    with pytest.raises(ConfigError) as error:
        string(**fields)
    assert [problem.path for problem in error.value.problems] == [path]


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("...", [b"\xc3\xa9\x80", b"\xff\xc3\xa9", b"\xc3\xa9x"]),
        ("..", [b"\x80\x81", b"\xe9x"]),
        ("é.", [b"\xc3\xa9\x80", b"\xc3\xa9x"]),
        ("[é].*", [b"\xc3\xa9a\x80", b"\xc3\xa9\x80", b"\xc3\xa9x"]),
        ("[^x]*", [b"\xc3\xa9a\x80", b"\xc3\xa9\x80", b"\x80\x81", b"\x80", b"\xff\xc3\xa9"]),
    ],
)
def test_regular_expressions_see_bytes(pattern, matching):
    texts = [b"\xc3\xa9a\x80", b"\xc3\xa9\x80", b"\x80\x81", b"\x80", b"\xff\xc3\xa9", b"\xc3\xa9x", b"\xe9x"]
    test = matchers.compile_regex(make(regex_pb2.RegexMatcher, regex=pattern))
    assert [text for text in texts if test(text)] == matching


class FakeRuntime:
    def __init__(self, values):
        self.values = values

    def integer(self, key, default):
        return self.values.get(key, default)


def test_program_size_limit():
    big = make(regex_pb2.RegexMatcher, regex="a" * 110)
    with pytest.raises(ConfigError, match=r"RE2 program size of 114 > max program size of 100 set for the error level threshold\."):
        matchers.compile_regex(big)
    with pytest.raises(ConfigError, match="RE2 program size of 124"):
        matchers.compile_regex(make(regex_pb2.RegexMatcher, regex="(a)" * 40))
    assert matchers.compile_regex(big, FakeRuntime({"re2.max_program_size.error_level": 200}))(b"a" * 110)
    assert matchers.compile_regex(make(regex_pb2.RegexMatcher, regex="a" * 110, google_re2={"maxProgramSize": 114}))(b"a" * 110)
    with pytest.raises(ConfigError, match=r"> max program size of 113\."):
        matchers.compile_regex(make(regex_pb2.RegexMatcher, regex="a" * 110, google_re2={"maxProgramSize": 113}))


@pytest.mark.parametrize(
    ("pattern", "substitution", "text", "result"),
    [
        ("^/a/([^/]+)(/.*)$", r"\2/x/\1", b"/a/1/b", b"/b/x/1"),
        ("b+", r"<\0>", b"abbabc", b"a<bb>a<b>c"),
        ("b*", "-", b"abb", b"-a-"),
        ("x", "y", b"abc", b"abc"),
        ("a", "\\\\", b"a", b"\\"),
        ("z*", ".", b"ab", b".a.b."),
        ("(a)|(b)", r"[\1\2]", b"ab", b"[a][b]"),
    ],
)
def test_substitution(pattern, substitution, text, result):
    proto = make(regex_pb2.RegexMatchAndSubstitute, pattern={"regex": pattern}, substitution=substitution)
    assert matchers.compile_substitution(proto)(text) == result


@pytest.mark.parametrize("substitution", [r"\2", "\\x", "\\"])
def test_bad_substitution(substitution):
    with pytest.raises(ConfigError) as error:
        matchers.compile_substitution(make(regex_pb2.RegexMatchAndSubstitute, pattern={"regex": "(a)"}, substitution=substitution))
    assert error.value.problems[0].path == "substitution"


@pytest.mark.parametrize(
    ("fields", "several", "joined"),
    [
        ({"stringMatch": {"exact": "foo"}}, True, False),
        ({"stringMatch": {"exact": "bar"}}, True, False),
        ({"stringMatch": {"exact": "foo,bar"}}, False, True),
        ({"stringMatch": {"exact": "foo"}, "invertMatch": True}, False, True),
        ({"stringMatch": {"exact": "foo,bar"}, "invertMatch": True}, True, False),
        ({"stringMatch": {"exact": "zzz"}, "invertMatch": True}, True, True),
        ({"stringMatch": {"prefix": "bar"}}, True, False),
        ({"stringMatch": {"contains": "o,b"}}, False, True),
        ({"stringMatch": {"safeRegex": {"regex": "bar"}}}, True, False),
        ({"presentMatch": True}, True, True),
        ({"presentMatch": False}, False, False),
        ({"exactMatch": "bar"}, True, False),
        ({"exactMatch": ""}, True, True),
        ({"prefixMatch": "bar"}, True, False),
        ({"suffixMatch": "foo"}, True, False),
        ({"containsMatch": "o,b"}, False, True),
        ({"safeRegexMatch": {"regex": "foo,bar"}}, False, True),
    ],
)
def test_each_value_of_a_repeated_header_counts(fields, several, joined):
    test = header(name="A", **fields)
    assert test(a(b"foo", b"bar")) is several
    assert test(a(b"foo,bar")) is joined


@pytest.mark.parametrize(
    ("fields", "missing", "empty", "x"),
    [
        ({}, False, True, True),
        ({"invertMatch": True}, True, False, False),
        ({"presentMatch": True}, False, True, True),
        ({"presentMatch": False}, True, False, False),
        ({"presentMatch": False, "invertMatch": True}, False, True, True),
        ({"presentMatch": True, "treatMissingHeaderAsEmpty": True}, True, True, True),
        ({"presentMatch": False, "treatMissingHeaderAsEmpty": True}, False, False, False),
        ({"stringMatch": {"exact": "x"}}, False, False, True),
        ({"stringMatch": {"exact": "x"}, "invertMatch": True}, False, True, False),
        ({"stringMatch": {"exact": "x"}, "invertMatch": True, "treatMissingHeaderAsEmpty": True}, True, True, False),
        ({"stringMatch": {"exact": ""}, "treatMissingHeaderAsEmpty": True}, True, True, False),
    ],
)
def test_missing_headers(fields, missing, empty, x):
    test = header(name="a", **fields)
    assert (test(a()), test(a(b"")), test(a(b"x"))) == (missing, empty, x)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"1", True),
        (b"20", False),
        (b"19", True),
        (b"+5", True),
        (b" 7 ", True),
        (b"05", True),
        (b"0x3", False),
        (b"1_0", False),
        (b"5a", False),
        (b"", False),
        (b"-1", False),
        (b"1" * 5000, False),
        (b"0" * 5000 + b"7", True),
    ],
)
def test_ranges(value, found):
    assert header(name="a", rangeMatch={"start": 1, "end": 20})(a(value)) is found


def test_range_takes_any_value_of_several():
    assert header(name="a", rangeMatch={"start": 5, "end": 6})(a(b"9", b"5"))


def test_int64_limits():
    assert matchers.parse_int64(b"9223372036854775807") == 2**63 - 1
    assert matchers.parse_int64(b"9223372036854775808") is None
    assert matchers.parse_int64(b"-9223372036854775808") == -(2**63)
    assert matchers.parse_int64("٣".encode()) is None


def test_pseudo_headers():
    request = RequestHead(b"POST", b"/p?q", b"host:80", scheme=b"https")
    for name, value in ((":method", "POST"), (":path", "/p?q"), (":authority", "host:80"), ("Host", "host:80"), (":scheme", "https")):
        assert header(name=name, stringMatch={"exact": value})(request), name
        assert header(name=name, stringMatch={"exact": value}, invertMatch=True)(request) is False, name
    assert header(name=":status", rangeMatch={"start": 500, "end": 600})(ResponseHead(503))


def test_all_headers_must_match():
    protos = [make(route_pb.HeaderMatcher, name=name, presentMatch=True) for name in "abc"]
    assert matchers.compile_headers([]) is None
    for count in (1, 2, 3):
        test = matchers.compile_headers(protos[:count])
        items = [(name, b"") for name in (b"a", b"b", b"c")[:count]]
        assert test(head(*items)) is True
        assert test(head(*items[1:])) is False


def test_header_errors_name_the_index():
    with pytest.raises(ConfigError) as error:
        matchers.compile_headers([make(route_pb.HeaderMatcher, name="a"), make(route_pb.HeaderMatcher)])
    assert error.value.problems[0].path == "[1].name"


def test_path_matcher_ignores_query_and_fragment():
    test = matchers.compile_path(make(path_pb2.PathMatcher, path={"exact": "/a"}))
    assert test(b"/a")
    assert test(b"/a?b")
    assert test(b"/a#b?c")
    assert test(b"/a?b#c")
    assert not test(b"/ab")


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (b"/", {}),
        (b"/?k", {b"k": b""}),
        (b"/?k=1&k=2&a", {b"k": b"1", b"a": b""}),
        (b"/?a=b=c?d", {b"a": b"b=c?d"}),
        (b"/?%6b=%31", {b"%6b": b"%31"}),
    ],
)
def test_parse_query(path, query):
    assert matchers.parse_query(path) == query


@pytest.mark.parametrize(
    ("fields", "yes", "no"),
    [
        ({}, [b"/?k", b"/?a&k=1"], [b"/", b"/?kk"]),
        ({"presentMatch": True}, [b"/?k"], [b"/"]),
        ({"presentMatch": False}, [b"/"], [b"/?k"]),
        ({"stringMatch": {"exact": "1"}}, [b"/?k=1", b"/?k=1&k=2"], [b"/?k=2&k=1", b"/?k", b"/"]),
    ],
)
def test_query_parameters(fields, yes, no):
    test = matchers.compile_query_parameters([make(route_pb.QueryParameterMatcher, name="k", **fields)])
    assert all(test(path) for path in yes)
    assert not any(test(path) for path in no)


def test_query_parameters_must_all_match():
    protos = [make(route_pb.QueryParameterMatcher, name=name) for name in "ab"]
    test = matchers.compile_query_parameters(protos)
    assert test(b"/?a&b")
    assert not test(b"/?a")
    assert matchers.compile_query_parameters([]) is None


VALUE = {"null": None, "true": True, "number": 1.5, "text": "abc", "list": ["a", 1], "struct": {}}


@pytest.mark.parametrize(
    ("fields", "matching"),
    [
        ({"nullMatch": {}}, {"null"}),
        ({"boolMatch": True}, {"true"}),
        ({"boolMatch": False}, set()),
        ({"presentMatch": True}, set(VALUE)),
        ({"presentMatch": False}, set()),
        ({"doubleMatch": {"exact": 1.5}}, {"number"}),
        ({"doubleMatch": {"range": {"start": 0, "end": 1.5}}}, set()),
        ({"doubleMatch": {"range": {"start": 1.5, "end": 2}}}, {"number"}),
        ({"stringMatch": {"prefix": "a"}}, {"text"}),
        ({"listMatch": {"oneOf": {"stringMatch": {"exact": "a"}}}}, {"list"}),
        ({"orMatch": {"valueMatchers": [{"nullMatch": {}}, {"boolMatch": True}]}}, {"null", "true"}),
    ],
)
def test_values(fields, matching):
    test = matchers.compile_value(make(value_pb2.ValueMatcher, **fields))
    assert {name for name, value in VALUE.items() if test(value)} == matching
    assert test(matchers.MISSING) is False


def test_metadata():
    fields = {"filter": "f", "path": [{"key": "a"}, {"key": "b"}], "value": {"stringMatch": {"exact": "x"}}}
    test = matchers.compile_metadata(make(metadata_pb2.MetadataMatcher, **fields))
    inverted = matchers.compile_metadata(make(metadata_pb2.MetadataMatcher, invert=True, **fields))
    for metadata, found in (({"f": {"a": {"b": "x"}}}, True), ({"f": {"a": {"b": "y"}}}, False), ({"f": {"a": "x"}}, False), ({}, False)):
        assert test(metadata) is found
        assert inverted(metadata) is not found


def test_filter_state():
    text = matchers.compile_filter_state(make(filter_state_pb2.FilterStateMatcher, key="k", stringMatch={"exact": "x"}))
    assert text({"k": "x"})
    assert text({"k": b"x"})
    assert not text({"k": 1})
    assert not text({})
    ranges = {"ranges": [{"addressPrefix": "10.0.0.0", "prefixLen": 8}]}
    address = matchers.compile_filter_state(make(filter_state_pb2.FilterStateMatcher, key="k", addressMatch=ranges))
    assert address({"k": Address("10.1.2.3", 80)})
    assert not address({"k": Address("11.1.2.3", 80)})
    assert not address({"k": "10.1.2.3"})
    assert not address({})


def ranges(*texts: str):
    protos = []
    for text in texts:
        prefix, _, length = text.partition("/")
        protos.append(make(address_pb2.CidrRange, addressPrefix=prefix, prefixLen=int(length)))
    return matchers.compile_cidr(protos)


def test_cidr():
    test = ranges("10.0.0.0/8", "192.168.1.77/24", "::1/128", "2001:db8::/32", "1.2.3.4/64")
    for ip in ("10.255.0.1", "192.168.1.1", "::1", "2001:db8:1::", "1.2.3.4"):
        assert test(Address(ip, 1)) is True, ip
        assert test(Address(ip, 2)) is True, ip
    for ip in ("11.0.0.1", "192.168.2.1", "::2", "2001:db9::", "1.2.3.5"):
        assert test(Address(ip, 1)) is False, ip
    assert test(Address.pipe("/x")) is False
    assert ranges("0.0.0.0/0")(Address("9.9.9.9", 1))
    assert not ranges("0.0.0.0/0")(Address("::1", 1))
    assert not ranges()(Address("9.9.9.9", 1))


def test_cidr_error():
    with pytest.raises(ConfigError) as error:
        ranges("10.0.0.0/8", "10.0.0/8")
    assert error.value.problems[0].path == "[1].address_prefix"
