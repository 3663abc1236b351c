"""The service behind the proxies: nginx if it is installed, else a small one on uvloop. Pinned to the load's core.

As a program (`python -m benchmarks.backend PORT`) it is that small one.
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
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Backend:
    """The running service; a context manager that ends it. `name` says which of the two it is."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # nginx's worker is another user when root starts it
        (folder / "blob").write_bytes(BLOB)
        self.port = processes.free_port()
        nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        self.name = "nginx" if nginx else "uvloop"
        if nginx:
            file = folder / "backend.conf"
            file.write_text(configs.backend(folder, self.port, BODY.decode()))
            command = [nginx, "-c", str(file), "-e", str(folder / "early.log")]
        else:
            command = [sys.executable, "-m", "benchmarks.backend", str(self.port)]
        self._process = Process(command, folder / "output", [processes.LOAD_CPU])
        try:
            processes.wait_until(self._accepts, self._process, 10, "the backend")
        except BaseException:
            self._process.stop()
            raise

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
            del received[:total]
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Service, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(int(sys.argv[1])))
