"""A load generator on a bare epoll loop: exact numbers of requests, or a fixed rate, both of which wrk cannot do.

As a program it reads a job as JSON from standard input (port, template, connections, and either `requests` or `rate` and `seconds`) and prints the outcome.
One request at a time on each connection. With a rate it is open-loop: a request is due when its time comes, waits for a connection if none is free, and
its latency counts from when it was due, so that a proxy that stalls cannot hide the requests that it delayed.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import select
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from time import monotonic, process_time
from typing import Any

_PLACE = re.compile(r"\$([nr])")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNK = 1 << 18
_STALL_S = 60.0  # without any event
_CLOCK_MONOTONIC = 1
_LEAP = 7919  # a prime, so that leaps of it modulo any limit that it does not divide reach every number before one comes again
_BUSY = 0.9  # of a core: a sender that needs more measures itself


class SenderError(Exception):
    """A request failed, or the sender could not do what it was told."""


def renderer(template: str, limit: int, digits: str) -> Callable[[], bytes]:
    """A function that makes the next request: see `Load` for what `$n` and `$r` stand for."""
    if not _PLACE.search(template):
        constant = template.encode()
        return lambda: constant
    parts = _PLACE.sub(lambda place: {"n": "%(n)012x", "r": "%(r)" + digits[1:]}[place[1]], template.replace("%", "%%"))
    counter = random.getrandbits(40)
    leaping = 0

    def render() -> bytes:
        nonlocal counter, leaping
        counter += 1
        leaping = (leaping + _LEAP) % limit
        return (parts % {"n": counter, "r": leaping}).encode()

    return render


class Connection:
    """One keep-alive connection with at most one request under way. `due` is when that request was due."""

    __slots__ = ("_received", "_size", "due", "sock")

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=_STALL_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self._received = b""
        self._size = 0  # of the whole response; 0: its head is not complete yet
        self.due = 0.0

    def send(self, request: bytes, due: float) -> None:
        """Start a request; small ones always fit into the socket's buffer."""
        self.due = due
        if self.sock.send(request) != len(request):
            raise SenderError("the request is too big for this sender")

    def receive(self) -> bool:
        """Read what there is; whether the response is complete. Raises SenderError if it is not a 200."""
        data = self.sock.recv(_CHUNK)
        if not data:
            raise SenderError("the proxy closed a connection")
        received = self._received = self._received + data if self._received else data
        if not self._size:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                return False
            length = _LENGTH.search(received, 0, end)
            if length is None or not received.startswith(b"HTTP/1.1 200"):
                raise SenderError(f"unexpected response: {received[:end].decode('latin-1')}")
            self._size = end + 4 + int(length[1])
        if len(received) < self._size:
            return False
        self._received, self._size = b"", 0
        return True


class Sender:
    """The connections and their loop. `latencies` are seconds."""

    def __init__(self, port: int, connections: int, render: Callable[[], bytes]) -> None:
        self._render = render
        self._epoll = select.epoll()
        self._connections = {connection.sock.fileno(): connection for connection in (Connection(port) for _ in range(connections))}
        for fd in self._connections:
            self._epoll.register(fd, select.EPOLLIN)
        self.latencies: list[float] = []

    def close(self) -> None:
        """Close everything."""
        for connection in self._connections.values():
            connection.sock.close()
        self._epoll.close()

    def _poll(self) -> list[tuple[int, int]]:
        events = self._epoll.poll(_STALL_S)
        if not events:
            raise SenderError(f"nothing happened for {_STALL_S:.0f} s")
        return events

    def send_exactly(self, requests: int) -> None:
        """Closed loop: `requests` requests, every connection busy until they run out."""
        render, connections, latencies = self._render, self._connections, self.latencies
        left = requests
        for connection in connections.values():
            if left:
                connection.send(render(), monotonic())
                left -= 1
        while len(latencies) < requests:
            for fd, _ in self._poll():
                connection = connections[fd]
                if connection.receive():
                    now = monotonic()
                    latencies.append(now - connection.due)
                    if left:
                        connection.send(render(), now)
                        left -= 1

    def send_at(self, rate: float, seconds: float) -> None:
        """Open loop: `rate` requests a second, evenly."""
        render, connections, latencies = self._render, self._connections, self.latencies
        interval = 1 / rate
        total = int(rate * seconds)
        timer = _Timer(interval)
        self._epoll.register(timer.fd, select.EPOLLIN)
        free = deque(connections.values())
        waiting: deque[float] = deque()
        start = monotonic()
        issued = 0
        while len(latencies) < total:
            for fd, _ in self._poll():
                connection = connections.get(fd)
                if connection is None:
                    timer.clear()
                elif connection.receive():
                    latencies.append(monotonic() - connection.due)
                    free.append(connection)
            now = monotonic()
            while issued < total and start + issued * interval <= now:
                waiting.append(start + issued * interval)
                issued += 1
            while waiting and free:
                free.popleft().send(render(), waiting.popleft())
        timer.close()


class _Timer:
    """A periodic timerfd: epoll's own timeout counts whole milliseconds, in which several requests are due."""

    def __init__(self, interval_s: float) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        nanoseconds = int(interval_s * 1e9)
        period = divmod(nanoseconds, 1_000_000_000)
        if self.fd < 0 or libc.timerfd_settime(self.fd, 0, struct.pack("4q", *period, *period), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd")

    def clear(self) -> None:
        os.read(self.fd, 8)

    def close(self) -> None:
        os.close(self.fd)


def percentile(values: list[float], share: float) -> float:
    """The value below which that share of the sorted values is."""
    return values[min(len(values) - 1, int(len(values) * share))]


def main() -> None:
    """Do the job that standard input describes."""
    job: dict[str, Any] = json.load(sys.stdin)
    sender = Sender(job["port"], job["connections"], renderer(job["template"], job["limit"], job["digits"]))
    start = monotonic()
    if "requests" in job:
        sender.send_exactly(job["requests"])
    else:
        sender.send_at(job["rate"], job["seconds"])
    seconds = monotonic() - start
    sender.close()
    if "rate" in job and process_time() > _BUSY * seconds:
        raise SenderError(f"{job['rate']:.0f} requests a second are too many for this sender")
    latencies = sorted(sender.latencies)
    p50, p99 = (percentile(latencies, share) * 1e6 for share in (0.5, 0.99))
    print(json.dumps({"requests": len(latencies), "seconds": seconds, "p50_us": p50, "p99_us": p99}))


if __name__ == "__main__":
    main()
