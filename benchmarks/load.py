"""Requests, and the programs that send them: wrk for saturation, `sender` for exact numbers of requests and for fixed rates, `h2_sender` for HTTP/2."""

from __future__ import annotations

import functools
import json
import random
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.errors import BenchmarkError, Missing
from benchmarks.processes import ROOT
from benchmarks.proxies import HOST

SCRIPT = ROOT / "benchmarks" / "wrk.lua"
_HTTP2_RATE = 15_000  # requests that stand for a second of saturation: heads are encoded beforehand, so the number is fixed and not the time
_MESSAGE_RATE = 100_000  # the same for messages of streams: CPU time is counted in hundredths of a second
_GRPC = "content-type: application/grpc"

# Eleven headers as a browser behind an authenticating gateway sends them; with their values, 600 bytes.
ELEVEN_HEADERS = (
    f"Host: {HOST}",
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
    "Accept: application/json, text/plain, */*",
    "Accept-Encoding: gzip, deflate, br",
    "Accept-Language: en-GB,en;q=0.9,de;q=0.8",
    "Authorization: Bearer eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJib29raW5nIn0.c2lnbmF0dXJlLW9mLXNpeHR5LWZvdXItYnl0ZXMtaW4tYmFzZTY0LXVybA",
    "Cookie: session=4f1c2a9e7b604d1f9c3e; theme=dark; consent=all",
    "Content-Type: application/json",
    "X-Tenant: acme",
    "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "Cache-Control: no-cache",
)


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of request, over `connections` keep-alive connections (new ones for every request if it says `Connection: close`).

    In `path` and `headers`, `$n` is a number of twelve hexadecimal digits that never comes twice, and `$r` goes through all
    numbers below `limit` in leaps, each printed by `digits`.

    With `streams` it is HTTP/2, so many requests at once on each connection; `$r` is for HTTP/1.1 only. `indexed`: values with `$n` go into the header table
    as all others do, which moves those and pushes them out in the end. The body of a gRPC call is one message. With
    `messages`, each of the streams stays and carries messages of `body_bytes`, so many under way on each, which the service sends back: what is counted
    as a request is then a message.
    """

    path: str = "/"
    headers: tuple[str, ...] = (f"Host: {HOST}",)
    method: str = "GET"
    body_bytes: int = 0
    connections: int = 64
    limit: int = 1
    digits: str = "%d"
    streams: int = 0
    messages: int = 0
    indexed: bool = True

    @property
    def service(self) -> str:
        """What has to be behind the proxy: "http1", "http2" or "grpc"."""
        return "http1" if not self.streams else "grpc" if _GRPC in self.headers else "http2"

    def fields(self) -> list[tuple[str, str]]:
        """The request as HTTP/2 has it, with `$n` still in it."""
        (_, authority), *rest = (line.split(": ", 1) for line in self.headers)
        pseudo = [(":method", self.method), (":scheme", "http"), (":authority", authority), (":path", self.path)]
        return pseudo + [(name.lower(), value) for name, value in rest]

    def template(self) -> bytes:
        """The request, with `$n` and `$r` still in it."""
        lines = [f"{self.method} {self.path} HTTP/1.1", *self.headers]
        if self.body_bytes:
            lines.append(f"Content-Length: {self.body_bytes}")
        return "\r\n".join([*lines, "", ""]).encode() + b"x" * self.body_bytes


MINIMAL = Load()
ELEVEN = Load(path="/api/orders", headers=ELEVEN_HEADERS)
VARYING = Load(
    path="/api/orders/$n?page=1",
    headers=(
        *(line for line in ELEVEN_HEADERS if not line.startswith("traceparent")),
        "X-Request-Id: 7f1c2d3e-4b5a-4c6d-8e9f-$n",
        "traceparent: 00-0af7651916cd43dd8448$n-b7ad6b7169203331-01",
    ),
)
REPEATED_H2 = replace(ELEVEN, connections=8, streams=16)
VARYING_H2 = replace(VARYING, connections=8, streams=16)
VARYING_LITERALS_H2 = replace(VARYING_H2, indexed=False)
TAGGED = replace(VARYING, path="/tagged/$n?page=1")  # every answer has a tag of its own
TAGGED_H2 = replace(VARYING_LITERALS_H2, path=TAGGED.path)
BULK_H2 = Load(path="/bulk", connections=1, streams=1)
IDLE_H2 = Load(connections=1000, streams=1)
_CALL = (
    f"Host: {HOST}",
    _GRPC,
    "te: trailers",
    "user-agent: grpc-python/1.85.1 grpc-c/54.0.0 (linux; chttp2)",
    "grpc-accept-encoding: identity, deflate, gzip",
)
UNARY = Load("/mesh.Echo/Unary", _CALL, "POST", body_bytes=128, connections=8, streams=16)
STREAMING = Load("/mesh.Echo/Stream", _CALL, "POST", body_bytes=1024, connections=8, streams=8, messages=4)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a load generator saw. Times are microseconds, `seconds` how long it ran, `bytes` those of the responses' bodies where they are counted."""

    requests: int
    seconds: float
    p50_us: float
    p99_us: float
    bytes: int = 0


@functools.cache
def _wrk() -> str:
    path = shutil.which("wrk")
    if path is None:
        raise Missing("wrk is not installed (Debian: apt-get install wrk)")
    return path


def saturate(load: Load, port: int, seconds: float, folder: Path, *, tls: bool = False) -> Outcome:
    """As many requests as the proxy takes, for so many seconds (at least one: wrk counts whole ones). Raises BenchmarkError if any failed."""
    if load.streams:
        return exactly(load, port, round(seconds * (_MESSAGE_RATE if load.messages else _HTTP2_RATE)), seconds * 10 + 60)
    file = folder / "request"
    file.write_bytes(load.template())
    url = f"http{'s' if tls else ''}://127.0.0.1:{port}"
    duration = max(1, round(seconds))
    command = [_wrk(), "-t1", f"-c{load.connections}", f"-d{duration}s", "--timeout", "10s", "-s", str(SCRIPT), url, "--"]
    output = processes.run([*command, str(file), str(random.getrandbits(40)), str(load.limit), load.digits], limit_s=duration + 30)
    line = next((line for line in output.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise BenchmarkError(f"wrk said nothing that we understand:\n{output}")
    result = json.loads(line.removeprefix("RESULT "))
    failed = {kind: count for kind, count in result.pop("errors").items() if count}
    if failed or not result["requests"]:
        raise BenchmarkError(f"requests failed: {failed or 'none was answered'}")
    return Outcome(**result)


def exactly(load: Load, port: int, requests: int, limit_s: float) -> Outcome:
    """So many requests, not one more, each connection sending its next one as soon as it has its answer."""
    if load.streams:
        job = http2_job(load, port) | {"requests": requests}
        return Outcome(**json.loads(processes.run([sys.executable, "-m", "benchmarks.h2_sender"], limit_s=limit_s, input=json.dumps(job))))
    return _sender(load, port, limit_s, requests=requests)


def http2_job(load: Load, port: int) -> dict[str, Any]:
    """What `h2_sender` wants to know; the number of requests is the caller's."""
    job = {"port": port, "fields": load.fields(), "body": load.body_bytes, "grpc": load.service == "grpc"}
    return job | {"connections": load.connections, "streams": load.streams, "messages": load.messages, "indexed": load.indexed}


def at_rate(load: Load, port: int, rate: float, seconds: float) -> Outcome:
    """So many requests a second at even intervals, whatever the proxy does; latencies count from when a request was due.

    A proxy that cannot keep up has latencies that grow and grow; if the sender itself cannot, BenchmarkError is raised.
    """
    return _sender(load, port, seconds + 30, rate=rate, seconds=seconds)


def _sender(load: Load, port: int, limit_s: float, **what: float) -> Outcome:
    job = {"port": port, "template": load.template().decode(), "connections": load.connections, "limit": load.limit, "digits": load.digits, **what}
    output = processes.run([sys.executable, "-m", "benchmarks.sender"], limit_s=limit_s, input=json.dumps(job))
    return Outcome(**json.loads(output))
