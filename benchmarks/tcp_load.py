"""Bytes through a TCP proxy: this process is the sender on one side and the service on the other, so that one core carries both.

As a program: `python -m benchmarks.tcp_load bulk|small PROXY_PORT SERVICE_PORT SECONDS`; prints the outcome as JSON. `bulk` is one stream of big writes,
`small` are 64-byte messages answered by 64-byte messages on 64 connections, one under way on each.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
from time import monotonic
from typing import Any

CONNECTIONS = 64
MESSAGE = b"m" * 64
_BLOCK = bytes(1 << 20)


def _listen(port: int) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    listener.settimeout(10)
    return listener


def bulk(proxy_port: int, service_port: int, seconds: float) -> dict[str, Any]:
    """One stream for so many seconds; the bytes that arrived, and how long it took until the last of them had."""
    received = 0

    def drain() -> None:
        nonlocal received
        buffer = bytearray(1 << 20)
        accepted, _ = listener.accept()
        with accepted:
            while count := accepted.recv_into(buffer):
                received += count

    with _listen(service_port) as listener:
        service = threading.Thread(target=drain)
        service.start()
        start = monotonic()
        with socket.create_connection(("127.0.0.1", proxy_port)) as sock:
            while monotonic() - start < seconds:
                sock.sendall(_BLOCK)
            sock.shutdown(socket.SHUT_WR)
            service.join()
    return {"bytes": received, "seconds": monotonic() - start}


def small(proxy_port: int, service_port: int, seconds: float) -> dict[str, Any]:
    """Round trips of small messages for so many seconds."""
    with _listen(service_port) as listener:
        senders, services = {}, {}
        for _ in range(CONNECTIONS):
            sender = socket.create_connection(("127.0.0.1", proxy_port))
            sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sender.sendall(MESSAGE)  # a proxy may connect onwards only when something comes
            service, _ = listener.accept()
            service.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            senders[sender.fileno()], services[service.fileno()] = sender, service
        epoll = select.epoll()
        for fd in (*senders, *services):
            epoll.register(fd, select.EPOLLIN)
        trips = 0
        start = monotonic()
        while monotonic() - start < seconds:
            for fd, _ in epoll.poll(10):
                ours = fd in senders
                sock = senders[fd] if ours else services[fd]
                message = sock.recv(4096)
                if not message:
                    raise ConnectionError("the proxy closed a connection")
                trips += ours
                sock.send(message)
        took = monotonic() - start
        for sock in (*senders.values(), *services.values()):
            sock.close()
    return {"requests": trips, "seconds": took}


if __name__ == "__main__":
    print(json.dumps({"bulk": bulk, "small": small}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
