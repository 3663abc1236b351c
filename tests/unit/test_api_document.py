"""YAML and JSON: scalars mean what they mean to Envoy (checked against the binary), and nothing hostile costs more than an error."""

from __future__ import annotations

import json

import pytest

from meshproxy.api import document
from meshproxy.api.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1", 1),
        ("a: '1'", "1"),
        ("a: -5", -5),
        ("a: 0x10", 16),
        ("a: 010", 8),
        ("a: 08", "08"),
        ("a: 1_000", "1_000"),
        ("a: 0.5", "0.5"),
        ("a: 5s", "5s"),
        ("a: 2147483647", 2147483647),
        ("a: 2147483648", "2147483648"),
        ("a: 99999999999999999999", "99999999999999999999"),
        ("a: yes", True),
        ("a: 'yes'", "yes"),
        ("a: Off", False),
        ("a: oFF", "oFF"),
        ("a: ~", None),
        ("a:", None),
        ("a: ''", ""),
        ("a: 2030-01-01", "2030-01-01"),
        ("a: !!str true", "true"),
        ("a: |\n  true\n", "true\n"),
        ("a: [1, {b: c}]", [1, {"b": "c"}]),
        ("a: 192.0.2.1", "192.0.2.1"),
        ('{"a": 0.5}', "0.5"),
        ('{"a": 4294967296}', "4294967296"),
        ("{a: 1,}", 1),
    ],
)
def test_values(text, value):
    assert document.parse(text) == {"a": value}


def test_json_only_keeps_numbers():
    assert document.parse('{"a": [0.5, 4294967296]}', json_only=True) == {"a": [0.5, 4294967296]}


def test_json_and_yaml_agree():
    value = {"clusters": [{"name": f"c{i}", "weight": i, "flag": True, "none": None} for i in range(20)]}
    assert document.parse(json.dumps(value)) == document.parse(" " + json.dumps(value).replace("{", "{ ")) == value


def test_anchors_merges_and_ignored_keys():
    text = "!ignore base: &base {type: STATIC, name: x}\nclusters:\n- {<<: *base, name: a}\n- *base\n- <<: [{name: b}, *base]\n"
    assert document.parse(text) == {
        "clusters": [{"name": "a", "type": "STATIC"}, {"name": "x", "type": "STATIC"}, {"name": "b", "type": "STATIC"}],
    }


def test_empty_documents():
    assert document.parse("") is None
    assert document.parse("# nothing\n") is None
    assert document.parse("---\n") is None


def test_byte_order_mark():
    assert document.parse(b"\xef\xbb\xbfa: b") == {"a": "b"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: duplicate key 'a'"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ("a: b\n---\nc: d", "second document"),
        ("a: *nope", "line 1, column 4: the anchor 'nope' is not defined"),
        ("a: &a [*a]", "the anchor 'a' is not defined"),
        ("a: [", "line 2, column 1"),
        ("a:\n\tb: c", "line 2, column 1"),
        ("[a]: b", "a key must be a scalar"),
        ("? {a: b}\n: c", "a key must be a scalar"),
        ("a: &x b\n*x : c", "a key must be a scalar"),
        ("<<: 5", "merge key"),
        ("\0", "control characters"),
        (b"a: \xff", "not UTF-8: byte 3 is 0xff"),
        ('{"a": NaN}', "NaN is not a JSON value"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 5000, "nested too deeply"),
        ("- " * 5000, "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"),
        ("\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'x'}]" for i in range(12)), "aliases expand to more than"),
    ],
)
def test_errors(text, why):
    with pytest.raises(ConfigError) as caught:
        document.parse(text)
    assert why in str(caught.value)


def test_json_only_reports_json_errors():
    with pytest.raises(ConfigError, match=r"line 1, column 2: Expecting property name"):
        document.parse("{a: b}", json_only=True)
    with pytest.raises(ConfigError, match="nested too deeply"):
        document.parse("[" * 200_000, json_only=True)
