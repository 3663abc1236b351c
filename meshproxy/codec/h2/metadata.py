"""METADATA frames, Envoy's extension of HTTP/2: maps of strings that go with a stream, and are no part of its messages.

A map is a header block with tables of its own, cut into frames anywhere; END_METADATA ends it. Names and values may be anything. No window covers them: how
much of them comes on a stream is limited by `Options.max_metadata_size`, and more of it costs the peer the connection, as does a block that cannot be decoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.codec.h2 import errors, frames
from meshproxy.codec.h2.errors import Http2Error
from meshproxy.codec.h2.frames import DEFAULT_FRAME_SIZE, METADATA
from meshproxy.codec.hpack.decoder import Decoder
from meshproxy.codec.hpack.encoder import encode_literal
from meshproxy.codec.hpack.tables import HpackError

if TYPE_CHECKING:
    from meshproxy.codec.h2.session import Session

_END_METADATA = 4
_EXPANSION = 8  # how many times its size a block may take when it is decoded, 32 bytes a field included: Envoy has no limit, but a map is small


class Incoming:
    """What has come of the maps of a stream."""

    __slots__ = ("block", "size")

    def __init__(self) -> None:
        self.block = bytearray()  # of the map that has not ended
        self.size = 0  # of all maps of the stream, in bytes as they came


def receive(session: Session, flags: int, stream_id: int, payload: bytes) -> None:
    """A frame. Those of streams that are not there, or whose peer has ended them, are passed over. Raises Http2Error."""
    stream = session.streams.get(stream_id)
    if stream is None or stream.remote_closed:
        return
    incoming = stream.metadata
    if incoming is None:
        incoming = stream.metadata = Incoming()
    incoming.size += len(payload)
    most = session.options.max_metadata_size
    if incoming.size > most:
        raise _failure("more metadata than allowed")
    incoming.block += payload
    if flags & _END_METADATA:
        block = bytes(incoming.block)
        incoming.block.clear()
        fields = _decode(block, most) if block else {}
        if fields:
            stream.on_metadata(fields)
        else:
            session.stats.metadata_empty_frames.n += 1


def _decode(block: bytes, most: int) -> dict[bytes, bytes]:
    try:
        decoded = Decoder(max_list_size=_EXPANSION * most, max_fields=most).decode(block)
    except HpackError as failure:
        raise _failure(str(failure)) from failure
    if decoded.over:
        raise _failure("a map of metadata is too large")
    return dict(reversed(decoded.items))  # of equal names the first counts


def _failure(message: str) -> Http2Error:
    error = Http2Error(errors.INTERNAL_ERROR, message)
    error.silent = True
    return error


def encode(stream_id: int, fields: dict[bytes, bytes]) -> list[bytes]:
    """The frames of one map: each counts where a peer that does not read lets them pile up."""
    block = b"".join([encode_literal(name, value) for name, value in fields.items()])
    last = (len(block) - 1) // DEFAULT_FRAME_SIZE * DEFAULT_FRAME_SIZE
    return [
        frames.encode(METADATA, _END_METADATA if start == last else 0, stream_id, block[start : start + DEFAULT_FRAME_SIZE])
        for start in range(0, len(block), DEFAULT_FRAME_SIZE)
    ]
