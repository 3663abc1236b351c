"""The service behind the proxies: nginx if it is installed, else a small one on uvloop; for gRPC, always a small one. Pinned to the load's core.

As a program (`python -m benchmarks.backend PORT`) it is the small one for HTTP/1.1; the others are `h2_service`.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Self, cast

from benchmarks import configs, processes
from benchmarks.processes import Process

BODY = b"0123456789abcdef" * 8
BLOB = BODY * 512  # 64 KiB
BULK_BYTES = 1 << 30
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def find_nginx() -> str | None:
    """The program, if it is installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


class Backend:
    """The running service; a context manager that ends it. `service` is "http1", or one of those of `h2_service`.

    `small`: not nginx, even if it is installed. `goaway_after` is for `h2_service`.
    """

    def __init__(self, folder: Path, service: str = "http1", *, small: bool = False, goaway_after: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # nginx's worker is another user when root starts it
        (folder / "blob").write_bytes(BLOB)
        with (folder / "bulk").open("wb") as bulk:
            bulk.truncate(BULK_BYTES)
        self.port = processes.free_port()
        nginx = find_nginx() if service in ("http1", "http2") and not small else None
        if nginx:
            file = folder / "backend.conf"
            file.write_text(configs.backend(folder, self.port, BODY.decode(), http2=service == "http2"))
            command = [nginx, "-c", str(file), "-e", str(folder / "early.log")]
        elif service == "http1":
            command = [sys.executable, "-m", "benchmarks.backend", str(self.port)]
        else:
            command = [sys.executable, "-m", "benchmarks.h2_service", str(self.port), service, str(goaway_after)]
        self._process = Process(command, folder / "output", [processes.LOAD_CPU])
        self._process.wait(self._accepts, 60, "the backend")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class _Service(asyncio.Protocol):
    """Answers every request when all of it is there; understands content-length only, as our own loads send nothing else."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._tags = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by inheritance

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        while (end := received.find(b"\r\n\r\n") + 4) > 3:
            length = _CONTENT_LENGTH.findall(received, 0, end)
            total = end + (int(length[0]) if length else 0)
            if len(received) < total:
                return
            body = BLOB if received.find(b" /blob ", 0, end) >= 0 else BODY
            tag = b""
            if received.find(b" /tagged", 0, end) >= 0:
                self._tags += 1
                tag = b'etag: "%016x%016x"\r\n' % (id(self), self._tags)
            del received[:total]
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n%bcontent-length: %d\r\n\r\n%b" % (tag, len(body), body))


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Service, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(int(sys.argv[1])))
