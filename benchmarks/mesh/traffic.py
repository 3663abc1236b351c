"""Steady requests of which every one counts: whatever is not a whole 200 has failed, also when a connection ends that might have been opened again.

As a program (`python -m benchmarks.mesh.traffic`) it reads `{"targets": {LABEL: PORT}, "rate": R, "connections": N}`, sends to each port so many requests a
second over N connections, says `"begun"` when each has answered once, and at the next line of input stops and prints what became of the requests.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from typing import Any

_PATIENCE_S = 15.0
_REQUEST = b"GET / HTTP/1.1\r\nHost: mesh.test\r\n\r\n"


class Failed(Exception):
    """A request got no answer, or another than it should."""


class Target:
    """One port. `failed`: reason -> how many."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.served = 0
        self.failed: Counter[str] = Counter()
        self.first = asyncio.Event()

    async def run(self, interval_s: float, offset_s: float, ended: asyncio.Event) -> None:
        """One connection at a time, a request in every interval."""
        loop = asyncio.get_running_loop()
        due = loop.time() + offset_s
        connection = None
        while not ended.is_set():
            await asyncio.sleep(max(due - loop.time(), 0))
            due = max(due + interval_s, loop.time())
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    connection = connection or await asyncio.open_connection("127.0.0.1", self.port)
                    stays = await _ask(*connection)
                self.served += 1
                self.first.set()
            except (Failed, OSError, EOFError) as error:
                self.failed[str(error) or type(error).__name__] += 1
                stays = False
            if not stays and connection is not None:
                connection[1].close()
                connection = None
        if connection is not None:
            connection[1].close()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """One request; whether the connection may carry another. Raises Failed, OSError or EOFError."""
    writer.write(_REQUEST)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    body = await reader.readexactly(int(lines[b"content-length"]))
    if not head.startswith(b"http/1.1 200"):
        raise Failed(f"{head[9:12].decode()} {body[:200].decode(errors='replace')}")
    return lines.get(b"connection") != b"close"


async def main() -> None:
    """Do the job that standard input describes."""
    loop = asyncio.get_running_loop()
    job: dict[str, Any] = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    targets = {label: Target(port) for label, port in job["targets"].items()}
    ended = asyncio.Event()
    interval_s = job["connections"] / job["rate"]
    tasks = [
        asyncio.create_task(target.run(interval_s, interval_s * number / job["connections"], ended), name=f"{label} {number}")
        for label, target in targets.items()
        for number in range(job["connections"])
    ]
    for target in targets.values():
        await target.first.wait()
    print(json.dumps("begun"), flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    ended.set()
    await asyncio.gather(*tasks)
    print(json.dumps({label: {"served": target.served, "failed": target.failed} for label, target in targets.items()}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
