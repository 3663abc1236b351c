"""The first message of a TLS client: which server name and application protocols it asks for. Sans-IO.

The bytes are only looked at; whoever terminates TLS gets them again. RFC 8446 section 4.1.2 (which is also the format of TLS 1.2), RFC 6066 section 3
(server_name), RFC 7301 section 3.1 (ALPN).
"""

from __future__ import annotations

import struct

from meshproxy.record import Record

MAX_SIZE = 16 * 1024  # Envoy's and BoringSSL's limit of a ClientHello, in bytes
_HANDSHAKE = 22
_CLIENT_HELLO = 1
_SERVER_NAME, _ALPN = 0, 16
_FIXED = struct.Struct(">H32xB")  # version, random, length of the session id
_U16 = struct.Struct(">H")
_EXTENSION = struct.Struct(">HH")  # type, length
_NAME = struct.Struct(">HBH")  # length of the list, type of the name, its length


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
    if len(data) > max_size:  # what comes after it does not count, even when it is there already
        data = data[:max_size]
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
        server_name, alpn = _body(bytes(message[4:]))
        return ClientHello(server_name, alpn, at)
    if len(data) >= max_size:
        raise TooLargeError(f"the ClientHello is larger than {max_size} bytes")
    return None


def _body(data: bytes) -> tuple[str | None, tuple[str, ...]]:
    # By position, without an object or a call for each field: every inspected connection comes here.
    try:
        version, length = _FIXED.unpack_from(data)
        if version < 0x0301:
            raise NotClientHelloError("older than TLS 1.0")
        if length > 32:
            raise NotClientHelloError("the session id is too long")
        at = _FIXED.size + length
        (length,) = _U16.unpack_from(data, at)
        if not length or length & 1:
            raise NotClientHelloError("the list of cipher suites is malformed")
        at += 2 + length
        if not data[at]:
            raise NotClientHelloError("no compression method")
        at += 1 + data[at]
        end = len(data)
        if at == end:
            return None, ()
        (length,) = _U16.unpack_from(data, at)
        at += 2
        if at + length != end:
            raise NotClientHelloError("the extensions are not what remains")
        extensions: dict[int, bytes] = {}
        count = 0
        while at < end:
            kind, length = _EXTENSION.unpack_from(data, at)
            at += 4
            extensions[kind] = data[at : at + length]
            at += length
            count += 1
    except (IndexError, struct.error):
        raise NotClientHelloError("a field is cut short") from None
    if at != end:
        raise NotClientHelloError("a field is cut short")
    if len(extensions) < count:
        raise NotClientHelloError("an extension is there twice")
    name, protocols = extensions.get(_SERVER_NAME), extensions.get(_ALPN)
    return None if name is None else _server_name(name), () if protocols is None else _protocols(protocols)


def _server_name(content: bytes) -> str:
    name = content[_NAME.size :]
    size = len(name)
    # One host name and nothing else, as BoringSSL has it; other types of name do not exist.
    if not 0 < size <= 255 or content[: _NAME.size] != _NAME.pack(size + 3, 0, size) or b"\0" in name:
        raise NotClientHelloError("the server name is malformed")
    return name.decode("latin-1").lower()


def _protocols(content: bytes) -> tuple[str, ...]:
    """Malformed lists are left to the TLS stack, which will refuse them."""
    protocols = []
    at, end = 2, len(content)
    if end < 2 or int.from_bytes(content[:2]) != end - 2:
        return ()
    while at < end:
        following = at + 1 + content[at]
        name = content[at + 1 : following]
        if not name or following > end:
            return ()
        protocols.append(name.decode("latin-1"))
        at = following
    return tuple(protocols)
