"""Moves bytes between two transports, both ways: the form of `net.splice` for connections with TLS on either side.

Back-pressure is the transports': when one cannot write (above its high-water mark, the buffer limit of its connection), the other is not read.

A peer that closes only its sending side is passed on as such: to a plaintext connection by a FIN, to a TLS one by a close_notify. A reset is passed on as a
reset.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from meshproxy.net.splice import linger_zero

if TYPE_CHECKING:
    from meshproxy.net.splice import Observer


class Side(asyncio.Protocol):
    """One of the two connections. What comes before there is a `peer` is kept, one read of it, and reading paused; `release` lets it go on."""

    __slots__ = ("_eof", "_held", "_observer", "_upstream", "lost", "peer", "transport")

    def __init__(self, observer: Observer, upstream: bool, peer: Side | None = None) -> None:
        self._observer = observer
        self._upstream = upstream
        self._eof = False
        self._held = b""
        self.peer = peer
        self.transport: Any = None
        self.lost = False
        if peer is not None:
            peer.peer = self

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def release(self) -> None:
        """The peer is connected: pass on what was kept and go on reading."""
        held, self._held = self._held, b""
        if self.lost:
            return
        if held:
            self.transport.resume_reading()
            self.data_received(held)
        if self._eof and not self.eof_received():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        peer = self.peer
        if peer is None or peer.transport is None:
            self._held += data
            self.transport.pause_reading()
            return
        if peer.lost:
            return
        count = len(data)
        self._observer.received(self._upstream, count)
        peer.transport.write(data)
        self._observer.sent(not self._upstream, count)

    def eof_received(self) -> bool:
        self._eof = True
        peer = self.peer
        if peer is None or peer.transport is None:
            return True  # again in `release`
        if peer.lost or peer._eof:
            return False  # both have said all: close
        peer.transport.write_eof()
        return True

    def pause_writing(self) -> None:
        self._pause_peer(True)

    def resume_writing(self) -> None:
        self._pause_peer(False)

    def _pause_peer(self, pause: bool) -> None:
        peer = self.peer
        if peer is None or peer.lost or peer.transport is None or peer.transport.is_closing():
            return
        self._observer.blocked(not self._upstream, pause)
        if pause:
            peer.transport.pause_reading()
        else:
            peer.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        peer = self.peer
        if peer is not None and peer.transport is not None and not peer.lost:
            if isinstance(error, ConnectionResetError):
                peer.reset()
            else:
                peer.transport.close()  # what it was sent is still flushed
        self._observer.ended(self._upstream, error if isinstance(error, OSError) else None)

    def reset(self) -> None:
        """Drop the connection with a reset."""
        if self.transport is not None and not self.lost:
            linger_zero(self.transport.get_extra_info("socket"))
            self.transport.abort()

    def abort(self) -> None:
        """Drop the connection at once."""
        if self.transport is not None and not self.lost:
            self.transport.abort()
