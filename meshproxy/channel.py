"""The line between main and a worker: framed messages, with file descriptors, over a Unix socket pair.

A frame is a head of eight bytes (body length, kind, number of descriptors, request id) and its body: serialised protobuf, `marshal`led plain data, or
text. Descriptors travel as SCM_RIGHTS with the first byte of their frame. Both sides are asyncio protocols of the simplest kind: a reader and a writer
callback on a non-blocking socket, because neither asyncio's nor uvloop's transports pass descriptors.

Only the two processes of one program speak here, so a malformed frame is a bug: it closes the channel, which ends the worker.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum

MAX_BODY = 1 << 30
MAX_FDS = 64  # a frame; well under the kernel's SCM_MAX_FD of 253
HIGH_WATER = 4 << 20  # bytes queued above which `writable` turns false: a worker then keeps its statistics for later
READ_SIZE = 16 << 10  # a worker handles so much at a time, and then looks after its traffic
BATCH = 16 << 10  # bytes queued that are sent at once; the first frame does not wait, and fewer behind it wait for the end of what runs
MAX_TOGETHER = 256  # frames in one call; well under the kernel's IOV_MAX of 1024
_HEAD = struct.Struct("<IBBH")
_FD_SPACE = socket.CMSG_SPACE(MAX_FDS * array("i").itemsize)


class Kind(IntEnum):
    """What a frame says. Main -> worker unless noted."""

    READY = 1  # worker -> main: configuration compiled
    START = 2  # clusters are initialised: accept connections
    STATS = 3  # worker -> main: Store.deltas(); main -> worker with an id: send them now
    ENDPOINTS = 4  # ClusterLoadAssignment: a cluster's hosts as discovered
    HEALTH = 5  # marshal (cluster, [(address text, flags)]): verdicts of active health checks
    DRAIN = 6  # marshal {inbound_only}: connections are to end
    STOP_LISTENERS = 7  # marshal {inbound_only}: accept no more
    LEAVE = 8  # seconds as text: accept no more, end connections as they get idle, say IDLE when none is left
    IDLE = 9  # worker -> main, after LEAVE
    STOP = 10  # flush and exit now
    HEALTHCHECK_FAIL = 11  # marshal bool
    LOG_LEVEL = 12  # marshal {component: level}
    RUNTIME = 13  # marshal {key: value; "" removes}: the admin layer
    REOPEN_LOGS = 14
    COLLECT = 15  # text: what to report; answered with marshalled data
    FAILED = 16  # worker -> main: marshal (cluster, address text): a response said that its host is out of service
    EJECTED = 17  # worker -> main -> the other workers: marshal (cluster, address text): outlier detection ejected a host
    REPLY = 18  # answer to the request with the same id
    CLUSTER = 19  # marshal (name, Cluster, ClusterLoadAssignment or None, {address text: health flags}): added, or in place of the one of that name
    CLUSTER_REMOVED = 20  # marshal [name]
    LISTENER = 21  # marshal (key, Listener, key of the one that it replaces or 0, only filter chains differ); with its sockets
    LISTENER_REMOVED = 22  # marshal key: accept no more, tell connections to end
    LISTENER_DRAINED = 23  # marshal (key, prefixes of statistics to forget, size of its message): what was replaced or removed has had its time
    ROUTES = 24  # marshal (key, RouteConfiguration; empty: nobody needs it any more)
    EXTENSION = 27  # marshal (key, google.protobuf.Any; empty: there is none any more): the configuration of an HTTP filter
    RUNTIME_LAYER = 26  # marshal (name, google.protobuf.Struct): what a layer by discovery holds now
    DEMAND = 28  # worker -> main: marshal (what, seconds): a request needs something, see http.demand
    DEMANDED = 29  # marshal (what, whether it is there): after all that this means
    SECRET = 25  # marshal (key, Secret; empty: nobody needs it any more)


class ChannelClosed(Exception):
    """The peer is gone; requests that wait for it end with this."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, non-blocking and closed on exec."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


class Channel:
    """One end. Owns its socket.

    `on_message(kind, body, fds, request_id)` is called for each frame; it owns the descriptors. A frame with a request id expects
    `reply(request_id, body)`. `on_close()` is called once, when the peer is gone or `close` was called.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[Kind, bytes, list[int], int], None],
        on_close: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = loop
        self._on_message = on_message
        self._on_close = on_close
        self._out: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._queued = 0
        self._scheduled = self._writing = False  # a flush is to come: soon, or when the peer has read
        self._in = bytearray()
        self._in_fds: deque[int] = deque()
        self._requests: dict[int, asyncio.Future[bytes]] = {}
        self._next_id = 1
        self.closed = False
        loop.add_reader(self._fd, self._on_readable)

    def __repr__(self) -> str:
        return f"<Channel fd={self._fd} queued={self._queued} waiting={len(self._requests)}{' closed' if self.closed else ''}>"

    # -- sending ---------------------------------------------------------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """Whether less than HIGH_WATER bytes wait for the peer."""
        return self._queued < HIGH_WATER

    def send(self, kind: Kind, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Queue one frame; never blocks, and does nothing once the channel is closed. The descriptors are duplicated, so the caller keeps its own."""
        self._send(kind, body, fds, 0)

    def reply(self, request_id: int, body: bytes = b"") -> None:
        """Answer the peer's request."""
        self._send(Kind.REPLY, body, (), request_id)

    async def request(self, kind: Kind, body: bytes = b"", *, timeout: float) -> bytes:
        """Send one frame and wait up to `timeout` seconds for its answer. Raises TimeoutError or ChannelClosed."""
        if self.closed:
            raise ChannelClosed
        request_id = self._next_id
        # 0 means that no answer is expected; ids come round after 65,535 requests, long after the deadline of any.
        self._next_id = request_id % 0xFFFF + 1
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._requests[request_id] = future
        self._send(kind, body, (), request_id)
        try:
            async with asyncio.timeout(timeout):
                return await future
        finally:
            self._requests.pop(request_id, None)

    def _send(self, kind: Kind, body: bytes, fds: Sequence[int], request_id: int) -> None:
        if self.closed:
            return
        if len(fds) > MAX_FDS or len(body) > MAX_BODY:
            raise ValueError(f"a frame holds at most {MAX_FDS} descriptors and {MAX_BODY} bytes")
        data = memoryview(_HEAD.pack(len(body), kind, len(fds), request_id) + body)
        # The queue outlives the caller's interest in its descriptors.
        self._out.append((data, [os.dup(fd) for fd in fds]))
        self._queued += len(data)
        if self._writing:
            pass
        elif self._queued >= BATCH:
            self._flush()
        elif not self._scheduled:
            # The first goes at once: a change is with the workers before an admin endpoint answers. Others mostly come by the dozen, and each of its own would
            # wake the peer for each.
            self._flush()
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if self.closed:
            return
        out = self._out
        try:
            while out:
                data, fds = out[0]
                if fds:
                    sent = self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])
                    _close_all(fds)
                    out[0] = (data, ())
                else:
                    sent = self._sock.sendmsg(self._together())
                self._sent(sent)
        except (BlockingIOError, InterruptedError):
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._flush)
            return
        except OSError:
            self.close()
            return
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)

    def _together(self) -> list[memoryview]:
        """Frames that may go in one piece: those before the next with descriptors, which travel with the first byte of theirs."""
        found: list[memoryview] = []
        for data, fds in self._out:
            if fds or len(found) == MAX_TOGETHER:
                break
            found.append(data)
        return found

    def _sent(self, count: int) -> None:
        out = self._out
        self._queued -= count
        while count:
            data, _ = out[0]
            if count < len(data):
                out[0] = (data[count:], ())
                return
            count -= len(data)
            out.popleft()

    # -- receiving -------------------------------------------------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            data, ancillary, _, _ = self._sock.recvmsg(READ_SIZE, _FD_SPACE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, ancillary = b"", []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._in_fds.extend(fds)
        if not data:
            self.close()
            return
        self._in += data
        self._dispatch()

    def _dispatch(self) -> None:
        buffer = self._in
        offset = 0
        while len(buffer) - offset >= _HEAD.size and not self.closed:
            length, kind, fd_count, request_id = _HEAD.unpack_from(buffer, offset)
            end = offset + _HEAD.size + length
            if length > MAX_BODY or fd_count > MAX_FDS:
                self.close()
                return
            if len(buffer) < end:
                break
            body = bytes(memoryview(buffer)[offset + _HEAD.size : end])
            offset = end
            if kind == Kind.REPLY:
                future = self._requests.get(request_id)
                if future is not None and not future.done():
                    future.set_result(body)
            else:
                fds = [self._in_fds.popleft() for _ in range(fd_count)]
                self._on_message(Kind(kind), body, fds, request_id)
        del buffer[:offset]

    def close(self) -> None:
        """Close this end; frames not yet sent are lost. Calls `on_close` the first time."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._sock.close()
        for _, fds in self._out:
            _close_all(fds)
        _close_all(self._in_fds)
        self._out.clear()
        self._in_fds.clear()
        for future in self._requests.values():
            if not future.done():
                future.set_exception(ChannelClosed())
        self._on_close()

    def flush_blocking(self, timeout: float) -> None:
        """Send what is queued before the process ends, waiting up to `timeout` seconds for the peer to take it."""
        self._loop.remove_writer(self._fd)
        self._writing = False
        self._sock.settimeout(timeout)
        try:
            while self._out:
                data, _ = self._out[0]
                self._sock.sendall(data)
                self._out.popleft()
        except OSError:
            return  # the peer is gone: nobody is left to tell


def _close_all(fds: Sequence[int] | deque[int]) -> None:
    for fd in fds:
        os.close(fd)
