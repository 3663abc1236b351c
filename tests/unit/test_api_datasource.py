"""Data sources, and what is said when they have nothing to give."""

from __future__ import annotations

import pytest
from envoy.config.core.v3.base_pb2 import DataSource

from meshproxy.api import datasource
from meshproxy.api.errors import ConfigError


def test_each_kind(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(b"from a file")
    assert datasource.read(DataSource(filename=str(file))) == b"from a file"
    assert datasource.read(DataSource(inline_bytes=b"\xff")) == b"\xff"
    assert datasource.read(DataSource(inline_string="h\u00e9")) == "h\u00e9".encode()
    assert datasource.read(DataSource(environment_variable="X"), environment={"X": "env"}) == b"env"
    assert datasource.read_text(DataSource(inline_string="h\u00e9")) == "h\u00e9"


def test_empty_is_allowed_on_request(tmp_path):
    (tmp_path / "empty").touch()
    for source in (DataSource(), DataSource(inline_string=""), DataSource(filename=str(tmp_path / "empty"))):
        assert datasource.read(source, allow_empty=True) == b""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (DataSource(), "filename or inline_bytes or inline_string or environment_variable must be set"),
        (DataSource(filename="/nonexistent/x"), "filename: cannot read /nonexistent/x: No such file or directory"),
        (DataSource(filename="/"), "filename: cannot read /: Is a directory"),
        (DataSource(filename="a\0b"), "filename: 'a\\x00b' is not a file name"),
        (DataSource(inline_string=""), "inline_string: must not be empty"),
        (DataSource(environment_variable="NOPE"), "environment_variable: the environment variable NOPE is not set"),
        (DataSource(environment_variable="EMPTY"), "environment_variable: EMPTY is empty"),
        (DataSource(inline_bytes=b"12345"), "inline_bytes: has 5 bytes; at most 4 are allowed"),
    ],
)
def test_errors(source, expected):
    with pytest.raises(ConfigError) as caught:
        datasource.read(source, max_size=4, environment={"EMPTY": ""})
    assert str(caught.value) == expected


def test_text_must_be_utf8():
    with pytest.raises(ConfigError, match="inline_bytes: not UTF-8"):
        datasource.read_text(DataSource(inline_bytes=b"\xff"))
