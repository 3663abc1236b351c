"""A load generator for HTTP/2 on a bare epoll loop: exact numbers of requests, many at once on each connection, whose heads may all be different.

As a program it reads a job as JSON from standard input (port, fields, body, connections, streams, requests, tls) and prints the outcome. Heads are encoded
beforehand, as a common client would (the `hpack` package: dynamic table and Huffman code), so that sending costs next to nothing.
"""

from __future__ import annotations

import json
import random
import select
import socket
import ssl
import sys
from struct import Struct
from time import monotonic
from typing import Any

import hpack

from benchmarks.sender import SenderError, percentile

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_WINDOW = (1 << 31) - 1
_STALL_S = 60.0
_CHUNK = 1 << 18
_head = Struct(">BHBBI")


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _head.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


class Connection:
    """One connection with up to `streams` requests under way. `requests`: how many it is to send in all."""

    def __init__(self, job: dict[str, Any], requests: int) -> None:
        self.sock: Any = socket.create_connection(("127.0.0.1", job["port"]), timeout=_STALL_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if job.get("tls"):
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.set_alpn_protocols(["h2"])
            self.sock = context.wrap_socket(self.sock, server_hostname="mesh.test")
        settings = (4).to_bytes(2, "big") + _WINDOW.to_bytes(4, "big")
        hello = _PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, (_WINDOW - 65535).to_bytes(4, "big"))
        self.sock.sendall(hello + _frame(_SETTINGS, _ACK, 0))
        self._ready = self._encode(job, requests)
        self._next = 0
        self._received = b""
        self._decoder = hpack.Decoder()
        self._checked = False
        self._since: dict[int, float] = {}
        self._latencies: list[float] = []

    @staticmethod
    def _encode(job: dict[str, Any], requests: int) -> list[bytes]:
        encoder = hpack.Encoder()
        fields = [tuple(field) for field in job["fields"]]
        body = b"x" * job.get("body", 0)
        number = random.getrandbits(40)
        frames = []
        for position in range(requests):
            number += 1
            block = encoder.encode([(name, value.replace("$n", f"{number:012x}")) for name, value in fields])
            stream = 2 * position + 1
            frame = _frame(_HEADERS, _END_HEADERS | (0 if body else _END_STREAM), stream, block)
            frames.append(frame + _frame(_DATA, _END_STREAM, stream, body) if body else frame)
        return frames

    def send(self, count: int) -> None:
        """Begin up to `count` more requests."""
        frames = self._ready[self._next : self._next + count]
        if frames:
            now = monotonic()
            for position in range(self._next, self._next + len(frames)):
                self._since[2 * position + 1] = now
            self._next += len(frames)
            self.sock.sendall(b"".join(frames))

    def receive(self, latencies: list[float]) -> int:
        """Read what there is; how many responses are complete."""
        data = self.sock.recv(_CHUNK)
        if not data:
            raise SenderError("the proxy closed a connection")
        if self._received:
            data = self._received + data
        position, size, done = 0, len(data), 0
        now = monotonic()
        while size - position >= 9:
            high, low, kind, flags, stream = _head.unpack_from(data, position)
            end = position + 9 + (high << 16 | low)
            if end > size:
                break
            if kind == _HEADERS and not self._checked:
                self._checked = True
                found = dict(self._decoder.decode(data[position + 9 : end]))
                if found.get(":status") != "200":
                    raise SenderError(f"unexpected response: {found}")
            if kind <= _HEADERS:
                if flags & _END_STREAM:
                    done += 1
                    latencies.append(now - self._since.pop(stream))
            elif kind == _PING and not flags & _ACK:
                self.sock.sendall(_frame(_PING, _ACK, 0, data[position + 9 : end]))
            elif kind in (_RST_STREAM, _GOAWAY):
                raise SenderError(f"the proxy sent {'RST_STREAM' if kind == _RST_STREAM else 'GOAWAY'}: {data[position + 9 : end]!r}")
            position = end
        self._received = data[position:]
        return done


def run(job: dict[str, Any]) -> dict[str, float]:
    """Send `requests` requests, `streams` at once on each of `connections`."""
    count, streams = job["connections"], job["streams"]
    shares = [job["requests"] // count + (position < job["requests"] % count) for position in range(count)]
    connections = {connection.sock.fileno(): connection for connection in (Connection(job, share) for share in shares)}
    epoll = select.epoll()
    for fd in connections:
        epoll.register(fd, select.EPOLLIN)
    latencies: list[float] = []
    start = monotonic()
    for connection in connections.values():
        connection.send(streams)
    while len(latencies) < job["requests"]:
        events = epoll.poll(_STALL_S)
        if not events:
            raise SenderError(f"nothing happened for {_STALL_S:.0f} s")
        for fd, _ in events:
            connection = connections[fd]
            connection.send(connection.receive(latencies))
            while isinstance(connection.sock, ssl.SSLSocket) and connection.sock.pending():
                connection.send(connection.receive(latencies))
    seconds = monotonic() - start
    for connection in connections.values():
        connection.sock.close()
    latencies.sort()
    p50, p99 = (percentile(latencies, share) * 1e6 for share in (0.5, 0.99))
    return {"requests": len(latencies), "seconds": seconds, "p50_us": p50, "p99_us": p99}


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
