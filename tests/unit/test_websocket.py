"""Handshakes of WebSockets between HTTP/2 and HTTP/1."""

from __future__ import annotations

import base64
import random

import pytest

from meshproxy.codec import websocket
from meshproxy.codec.headers import RequestHead

VERSION, KEY = (b"sec-websocket-version", b"13"), (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ==")


def test_keys_and_their_answer():
    assert websocket.answer_to(KEY[1]) == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # the example of RFC 6455 1.3
    key = websocket.make_key(random.Random(1))
    assert len(base64.b64decode(key, validate=True)) == 16
    assert websocket.make_key(random.Random(2)) != key


@pytest.mark.parametrize(
    ("version", "upgrade", "fields", "lacks"),
    [
        (20, b"websocket", [VERSION], True),
        (20, b"WebSocket", [VERSION], True),
        (20, b"websocket", [VERSION, KEY], False),  # a sidecar that had it from a client that speaks HTTP/1
        (20, b"websocket", [], False),  # no WebSocket by the book: as it came
        (20, b"foo", [VERSION], False),
        (11, b"websocket", [VERSION], False),  # the server will tell the client
    ],
)
def test_whose_key_is_lacking(version: int, upgrade: bytes, fields: list[tuple[bytes, bytes]], lacks: bool):
    assert websocket.lacks_key(RequestHead(b"GET", b"/", b"a.test", fields, version=version), upgrade) is lacks
