"""Sessions and streams that count what frames take on the wire, their heads included: for logs that ask (see `codec.metering`).

A stream's owner mixes `MeteredStream` in, and hears of what is received before anybody hears of what is in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h2.frames import MAX_STREAM_ID
from meshproxy.codec.h2.session import Session
from meshproxy.codec.hpack.decoder import NOTHING_KNOWN, Decoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.codec.h2.output import Sink
    from meshproxy.codec.h2.settings import Options
    from meshproxy.codec.hpack.fields import Fields

FRAME_HEAD = 9
RESET = FRAME_HEAD + 4


class _MeteredDecoder(Decoder):
    """`known` is empty whenever its session looks at it, so that every block is asked for here; meanwhile `_blocks` keeps it."""

    __slots__ = ("_blocks", "decoded_bytes")

    _blocks: dict[bytes, Fields]
    decoded_bytes: int  # names and values of the last block

    def __init__(self, max_list_size: int, max_fields: int) -> None:
        super().__init__(max_list_size=max_list_size, max_fields=max_fields)
        self._blocks = NOTHING_KNOWN

    def decode_new(self, block: bytes) -> Fields:
        self.known = self._blocks
        fields = self.known.get(block) or super().decode_new(block)
        self._blocks = self.known
        self.known = NOTHING_KNOWN
        self.decoded_bytes = fields.size - 32 * len(fields.items)
        return fields

    def _forget(self) -> None:
        super()._forget()
        self._blocks = NOTHING_KNOWN


class MeteredSession(Session):
    """Tells its streams (`MeteredStream`) what their frames take."""

    __slots__ = ("_begun", "head_bytes")

    decoder: _MeteredDecoder

    def __init__(self, sink: Sink, options: Options, *, client: bool) -> None:
        super().__init__(sink, options, client=client)
        self.head_bytes = 0  # of the last header block
        self._begun = 0  # of one that is padded, has a priority or comes in pieces
        self.decoder = _MeteredDecoder(max_list_size=self.decoder.max_list_size, max_fields=self.decoder.max_fields)

    def _headers(self, flags: int, stream_id: int, block: bytes) -> None:
        self._begun = FRAME_HEAD + len(block)
        super()._headers(flags, stream_id, block)

    def _expected(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is not None:
            self._begun += len(payload)
        super()._expected(kind, flags, stream_id, payload)

    def _request(self, flags: int, stream_id: int, block: bytes) -> None:
        self.head_bytes = self._begun or FRAME_HEAD + len(block)
        self._begun = 0
        super()._request(flags, stream_id, block)

    def _fields(self, flags: int, stream_id: int, block: bytes, data: bytes = b"", position: int = 0) -> int:
        self.head_bytes = self._begun or FRAME_HEAD + len(block)
        stream = self.streams.get(stream_id & MAX_STREAM_ID)
        if stream is not None:
            stream.count_received(self.head_bytes, head=True)
            self._begun = 0
        super()._fields(flags, stream_id, block)  # without what follows, which is counted on its way
        return position

    def _data(self, flags: int, stream_id: int, length: int, data: bytes) -> None:
        self._count(stream_id, FRAME_HEAD + length)
        super()._data(flags, stream_id, length, data)

    def _more_data(self, data: bytes, position: int, size: int) -> int:
        self._count(self._data_stream, -FRAME_HEAD)  # it was counted with the frame's beginning
        return super()._more_data(data, position, size)

    def _count(self, stream_id: int, size: int) -> None:
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.count_received(size, head=False)


class MeteredStream:
    """Comes before a subclass of Http2Stream among the bases."""

    __slots__ = ()

    session: MeteredSession

    def count_received(self, size: int, *, head: bool) -> None:
        """A frame, or a part of one, takes `size` bytes. `head`: of a header block."""
        raise NotImplementedError

    def count_sent(self, size: int, *, head: bool) -> None:
        """The same of what is sent."""
        raise NotImplementedError

    def on_reset(self, code: int, details: str, remote: bool) -> None:
        if remote:
            self.count_received(RESET, head=False)
        super().on_reset(code, details, remote)  # type: ignore[misc]  # of the stream

    def send_block(self, block: bytes, end_stream: bool) -> None:
        self._sent(True, super().send_block, block, end_stream)  # type: ignore[misc]

    def send_whole_head(self, before: bytes, value: bytes, after: bytes) -> None:
        self.send_block(before + value + after, True)

    def send_message(self, before: bytes, value: bytes, after: bytes, data: bytes) -> None:
        self.send_block(before + value + after, False)
        self.send_data(data, True)

    def send_with_trailers(self, block: bytes, data: bytes, trailers: bytes) -> None:
        self.send_block(block, False)
        self.send_data(data, False)
        self.send_block(trailers, True)

    def send_data(self, data: bytes, end_stream: bool) -> None:
        self._sent(False, super().send_data, data, end_stream)  # type: ignore[misc]

    def send_some(self) -> bool:
        return bool(self._sent(False, super().send_some))  # type: ignore[misc]

    def _sent(self, head: bool, send: Callable[..., Any], *arguments: Any) -> Any:
        """Call `send`. Nothing else gets into the session's output meanwhile."""
        out = self.session.out
        before = len(out)
        result = send(*arguments)
        self.count_sent(sum(map(len, out[before:])), head=head)
        return result
