"""A load generator for HTTP/2 on a bare epoll loop: exact numbers of requests, many at once on each connection, whose heads may all be different.

As a program it reads a job as JSON from standard input (`load.http2_job`) and prints the outcome. Heads are encoded beforehand, as a common client would
(the `hpack` package with the habits of nghttp2, which curl, h2load and Envoy have in common), so that sending costs next to nothing.
"""

from __future__ import annotations

import json
import random
import select
import socket
import ssl
import sys
from collections import deque
from time import monotonic
from typing import Any

import hpack

from benchmarks import h2_frames
from benchmarks.h2_frames import ACK, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, frame
from benchmarks.sender import SenderError, percentile

_STALL_S = 60.0
_CHUNK = 1 << 18
# nghttp2 (`hd_deflate_decide_indexing`): what it keeps out of the table, and what nobody on the way may put into one either. All else goes there, ids, too.
_NOT_INDEXED = frozenset(b":path age content-length etag if-modified-since if-none-match location set-cookie".split())
_SHORT_COOKIE = 20  # bytes
_CHECKED = 8  # header blocks of each connection that are looked at


class _Encoder(hpack.Encoder):
    """Indexes what nghttp2 does, and never what the package calls sensitive. Huffman codes all strings."""

    def add(self, to_add: tuple[bytes, bytes], sensitive: bool, huffman: bool = False) -> bytes:
        name, value = to_add
        never = name == b"authorization" or (name == b"cookie" and len(value) < _SHORT_COOKIE)
        field = super().add(to_add, sensitive or never or name in _NOT_INDEXED, huffman)
        if field[0] & 0xF0 == 0x10 and not never:  # what the package never indexes, others may
            field = bytes((field[0] & 0x0F,)) + field[1:]
        return field


class Connection:
    """One connection, `requests` of whose requests are to be sent. `latencies` (seconds) is where what is done is counted."""

    def __init__(self, job: dict[str, Any], requests: int, latencies: list[float]) -> None:
        self.sock: Any = socket.create_connection(("127.0.0.1", job["port"]), timeout=_STALL_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.bytes = 0
        self._requests = requests
        self._latencies = latencies
        self._streams: int = job["streams"]
        # What is sensitive is not indexed.
        self._fields = [(name, value, "$n" in value and not job["indexed"]) for name, value in job["fields"]]
        self._body = b"x" * job["body"]
        if job["grpc"]:
            self._body = b"\0" + len(self._body).to_bytes(4, "big") + self._body
        self._reader = h2_frames.Reader()
        self._decoder = hpack.Decoder()
        self._unchecked = _CHECKED
        if job.get("tls"):
            self._wrap()
        self.sock.sendall(h2_frames.PREFACE + h2_frames.hello({}))

    def _wrap(self) -> None:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        self.sock = context.wrap_socket(self.sock, server_hostname="mesh.test")

    def _heads(self, count: int, flags: int) -> list[bytes]:
        """The HEADERS frames of the first `count` streams."""
        encoder = _Encoder()
        alike = not any("$n" in value for _, value, _ in self._fields)
        number = random.getrandbits(40)
        blocks: list[bytes] = []
        for position in range(count):
            if alike and position > 1:  # the second one found all of the first one in the table
                blocks.append(blocks[1])
                continue
            number += 1
            blocks.append(encoder.encode([(name, value.replace("$n", f"{number:012x}"), sensitive) for name, value, sensitive in self._fields]))
        return [frame(HEADERS, END_HEADERS | flags, 2 * position + 1, block) for position, block in enumerate(blocks)]

    def start(self) -> None:
        """Begin as many requests as may be under way at once."""
        raise NotImplementedError

    def receive(self) -> None:
        """Read what there is, once, and go on."""
        data = self.sock.recv(_CHUNK)
        if not data:
            raise SenderError("the proxy closed a connection")
        answers: list[bytes] = []
        now = monotonic()
        for kind, flags, stream, payload in self._reader.frames(data):
            if kind == DATA:
                self.bytes += len(payload)
                self._on_data(stream, payload, now, answers)
            elif kind == HEADERS and self._unchecked:
                self._check(payload)
            elif kind == SETTINGS and not flags & ACK:
                answers.append(frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                answers.append(frame(PING, ACK, 0, payload))
            elif kind in (RST_STREAM, GOAWAY):
                raise SenderError(f"the proxy sent {'RST_STREAM' if kind == RST_STREAM else 'GOAWAY'}: {payload!r}")
            if kind <= HEADERS and flags & END_STREAM:
                self._on_end(stream, now, answers)
        if answers:
            self.sock.sendall(b"".join(answers))

    def _check(self, block: bytes) -> None:
        self._unchecked -= 1
        found = {str(name): str(value) for name, value in self._decoder.decode(block)}
        if found.get(":status", "200") != "200" or found.get("grpc-status", "0") != "0":
            raise SenderError(f"unexpected response: {found}")

    def _on_data(self, stream: int, payload: bytes, now: float, answers: list[bytes]) -> None:
        """Of what is received, `payload` goes to that stream; `answers` are written afterwards."""

    def _on_end(self, stream: int, now: float, answers: list[bytes]) -> None:
        """The stream's response is complete."""
        raise NotImplementedError


class Calls(Connection):
    """One request after another, `streams` at a time."""

    def __init__(self, job: dict[str, Any], requests: int, latencies: list[float]) -> None:
        super().__init__(job, requests, latencies)
        body = self._body
        heads = self._heads(requests, 0 if body else END_STREAM)
        self._ready = [head + frame(DATA, END_STREAM, 2 * position + 1, body) for position, head in enumerate(heads)] if body else heads
        self._next = 0
        self._since: dict[int, float] = {}

    def start(self) -> None:
        first: list[bytes] = []
        for _ in range(min(self._streams, len(self._ready))):
            self._begin(monotonic(), first)
        self.sock.sendall(b"".join(first))

    def _begin(self, now: float, answers: list[bytes]) -> None:
        self._since[2 * self._next + 1] = now
        answers.append(self._ready[self._next])
        self._next += 1

    def _on_end(self, stream: int, now: float, answers: list[bytes]) -> None:
        self._latencies.append(now - self._since.pop(stream))
        if self._next < len(self._ready):
            self._begin(now, answers)


class Streams(Connection):
    """Streams that stay and carry messages, `messages` of them under way on each; the service sends every byte back."""

    def __init__(self, job: dict[str, Any], requests: int, latencies: list[float]) -> None:
        super().__init__(job, requests, latencies)
        self._under_way: int = job["messages"]
        self._opening = self._heads(self._streams, 0)
        share = requests // self._streams
        ids = range(1, 2 * self._streams, 2)
        self._left = {stream: share + (position < requests % self._streams) for position, stream in enumerate(ids)}  # to be sent
        self._since: dict[int, deque[float]] = {stream: deque() for stream in ids}
        self._partial = dict.fromkeys(ids, 0)
        self._frames = {stream: frame(DATA, 0, stream, self._body) for stream in ids}

    def start(self) -> None:
        first = self._opening
        now = monotonic()
        for stream in self._left:
            for _ in range(self._under_way):
                self._message(stream, now, first)
        self.sock.sendall(b"".join(first))

    def _message(self, stream: int, now: float, answers: list[bytes]) -> None:
        if self._left[stream]:
            self._left[stream] -= 1
            self._since[stream].append(now)
            answers.append(self._frames[stream])

    def _on_data(self, stream: int, payload: bytes, now: float, answers: list[bytes]) -> None:
        complete, self._partial[stream] = divmod(self._partial[stream] + len(payload), len(self._body))
        for _ in range(complete):
            self._latencies.append(now - self._since[stream].popleft())
            self._message(stream, now, answers)
        if complete and not self._since[stream]:
            answers.append(frame(DATA, END_STREAM, stream))

    def _on_end(self, stream: int, now: float, answers: list[bytes]) -> None:
        if self._since[stream] or self._left[stream]:
            raise SenderError("a stream has ended before its time")


class Sender:
    """All connections of a job, and their loop."""

    def __init__(self, job: dict[str, Any]) -> None:
        count, self._requests = job["connections"], job["requests"]
        self._latencies: list[float] = []
        self._epoll = select.epoll()
        kind = Streams if job["messages"] else Calls
        self._connections: dict[int, Connection] = {}
        for position in range(count):
            connection = kind(job, self._requests // count + (position < self._requests % count), self._latencies)
            self._connections[connection.sock.fileno()] = connection
            self._epoll.register(connection.sock, select.EPOLLIN)

    def run(self) -> dict[str, float]:
        """Send everything; returns when everything is answered, and leaves the connections open."""
        start = monotonic()
        for connection in self._connections.values():
            connection.start()
        while len(self._latencies) < self._requests:
            events = self._epoll.poll(_STALL_S)
            if not events:
                raise SenderError(f"nothing happened for {_STALL_S:.0f} s")
            for fd, _ in events:
                connection = self._connections[fd]
                connection.receive()
                while isinstance(connection.sock, ssl.SSLSocket) and connection.sock.pending():
                    connection.receive()
        seconds = monotonic() - start
        latencies = sorted(self._latencies)
        p50, p99 = (percentile(latencies, share) * 1e6 for share in (0.5, 0.99))
        received = sum(connection.bytes for connection in self._connections.values())
        return {"requests": len(latencies), "seconds": seconds, "p50_us": p50, "p99_us": p99, "bytes": received}

    def close(self) -> None:
        """Close every connection."""
        for connection in self._connections.values():
            connection.sock.close()
        self._epoll.close()


def run(job: dict[str, Any]) -> dict[str, float]:
    """Do a job from beginning to end."""
    sender = Sender(job)
    outcome = sender.run()
    sender.close()
    return outcome


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
