"""The handshake of a WebSocket (RFC 6455 4) where the other side has none, for HTTP/2 does without it (RFC 8441 5): a key, and the answer to it.

Envoy leaves both out, and then neither a server that speaks HTTP/1 nor a client that does can accept the connection (envoyproxy/envoy#8547).
"""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha1
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

    from meshproxy.codec.headers import RequestHead

KEY = b"sec-websocket-key"
_VERSION = b"sec-websocket-version"
_PROTOCOL = b"websocket"
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def lacks_key(head: RequestHead, upgrade: bytes) -> bool:
    """Whether `head` came by HTTP/2 and asks for a WebSocket as RFC 8441 has it."""
    return head.version >= 20 and upgrade.lower() == _PROTOCOL and _VERSION in head and KEY not in head


def make_key(random: Random) -> bytes:
    """A new key; it is no secret."""
    return b64encode(random.randbytes(16))


def answer_to(key: bytes) -> bytes:
    """What a server says to a key."""
    return b64encode(sha1(key + _GUID, usedforsecurity=False).digest())
