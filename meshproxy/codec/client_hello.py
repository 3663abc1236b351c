"""The first message of a TLS client: which server name and application protocols it asks for. Sans-IO.

The bytes are only looked at; whoever terminates TLS gets them again. RFC 8446 section 4.1.2 (which is also the format of TLS 1.2), RFC 6066 section 3
(server_name), RFC 7301 section 3.1 (ALPN).
"""

from __future__ import annotations

from meshproxy.record import Record

MAX_SIZE = 16 * 1024  # Envoy's and BoringSSL's limit of a ClientHello, in bytes
_HANDSHAKE = 22
_CLIENT_HELLO = 1
_SERVER_NAME, _ALPN = 0, 16


class NotClientHelloError(ValueError):
    """The bytes are not a TLS ClientHello."""


class TooLargeError(ValueError):
    """It begins like a ClientHello, but does not end within the limit."""


class ClientHello(Record, frozen=True):
    """`server_name` is lower case, None when there is none. `size`: bytes that the message took, record headers included."""

    server_name: str | None
    alpn: tuple[str, ...]
    size: int


def parse(data: bytes, max_size: int = MAX_SIZE) -> ClientHello | None:
    """The ClientHello at the start of `data`, None when more bytes are needed.

    Raises NotClientHelloError as soon as the bytes cannot be one, and TooLargeError when `max_size` bytes are there and the message is not over.
    """
    message = bytearray()
    declared = at = 0  # bytes that the records so far say they carry; where the next one begins
    needed = 4
    while len(message) < needed:
        header = data[at : at + 5]
        if (header and header[0] != _HANDSHAKE) or (len(header) > 1 and header[1] != 3):
            raise NotClientHelloError("not a TLS handshake record")
        if len(header) < 5:
            break
        length = header[3] << 8 | header[4]
        if not 0 < length <= 1 << 14:
            raise NotClientHelloError("a record's length is out of range")
        message += data[at + 5 : at + 5 + length]
        declared += length
        at += 5 + length
        if message and message[0] != _CLIENT_HELLO:
            raise NotClientHelloError("not a ClientHello")
        if len(message) >= 4:
            needed = 4 + int.from_bytes(message[1:4], "big")
            if needed > 4 + MAX_SIZE:
                raise NotClientHelloError("the message is larger than any ClientHello")
            if declared > needed:
                raise NotClientHelloError("more than the ClientHello in its record")
        if at > len(data):
            break
    else:
        server_name, alpn = _body(_Reader(bytes(message[4:])))
        return ClientHello(server_name, alpn, at)
    if len(data) >= max_size:
        raise TooLargeError(f"the ClientHello is larger than {max_size} bytes")
    return None


class _Reader:
    """Reads length-prefixed fields; NotClientHelloError where one is cut short."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise NotClientHelloError("a field is cut short")
        self._at += size
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self, prefix: int) -> bytes:
        return self.take(self.number(prefix))

    @property
    def empty(self) -> bool:
        return self._at >= len(self._data)


def _body(reader: _Reader) -> tuple[str | None, tuple[str, ...]]:
    if reader.number(2) < 0x0301:
        raise NotClientHelloError("older than TLS 1.0")
    reader.take(32)  # random
    if len(reader.block(1)) > 32:
        raise NotClientHelloError("the session id is too long")
    ciphers = reader.block(2)
    if not ciphers or len(ciphers) % 2:
        raise NotClientHelloError("the list of cipher suites is malformed")
    if not reader.block(1):
        raise NotClientHelloError("no compression method")
    if reader.empty:
        return None, ()
    extensions = _Reader(reader.block(2))
    if not reader.empty:
        raise NotClientHelloError("bytes after the extensions")
    server_name: str | None = None
    alpn: tuple[str, ...] = ()
    seen: set[int] = set()
    while not extensions.empty:
        kind = extensions.number(2)
        content = extensions.block(2)
        if kind in seen:
            raise NotClientHelloError("an extension is there twice")
        seen.add(kind)
        if kind == _SERVER_NAME:
            server_name = _server_name(content)
        elif kind == _ALPN:
            alpn = _protocols(content)
    return server_name, alpn


def _server_name(content: bytes) -> str:
    outer = _Reader(content)
    names = _Reader(outer.block(2))
    kind = names.number(1)
    name = names.block(2)
    # One host name and nothing else, as BoringSSL has it; other types of name do not exist.
    if kind or not names.empty or not outer.empty or not 0 < len(name) <= 255 or b"\0" in name:
        raise NotClientHelloError("the server name is malformed")
    return name.decode("latin-1").lower()


def _protocols(content: bytes) -> tuple[str, ...]:
    """Malformed lists are left to the TLS stack, which will refuse them."""
    try:
        outer = _Reader(content)
        reader = _Reader(outer.block(2))
        protocols = []
        while not reader.empty:
            name = reader.block(1)
            if not name:
                return ()
            protocols.append(name.decode("latin-1"))
        return tuple(protocols) if outer.empty else ()
    except NotClientHelloError:
        return ()
