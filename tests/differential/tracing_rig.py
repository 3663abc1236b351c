"""A traced proxy with its collector and upstream: what the cases of tracing share.

A `Site` is one proxy, Envoy or ours, whose spans come to a collector of this process, by OTLP over gRPC or as Zipkin's JSON, and whose requests come to an
upstream that remembers what it saw of the trace. Ids are compared by where they come from: each gets a name when it is first seen.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.unknown_fields import UnknownFieldSet
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from tests.differential.config import Config, render
from tests.differential.proxy import Proxy

LIMIT_S = 90.0
OF_TRACES = (
    "x-request-id", "traceparent", "tracestate", "b3", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags",
    "x-client-trace-id", "x-envoy-force-trace", "x-envoy-decorator-operation", "baggage",
)  # fmt: skip
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LAST = "last-of-the-case"  # the host of a request whose span comes after all others
_RANDOM_ID = re.compile(r"\b(?:[0-9a-f]{32}|[0-9a-f]{16}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\b")

_PORT = re.compile(r"\b\d{4,5}\b")
_TIMES = ("timestamp", "duration")
_BY_THE_CLOCK = "x-envoy-expected-rq-timeout-ms"

Request = bytes | Sequence[bytes]


class Collector:
    """Receives spans. `received`: as they came, each with its resource.

    It has its port at once, and its threads from `start` on: they would be in the way of a fork.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.received: list[Config] = []
        self.calls: list[dict[str, str]] = []  # metadata
        self._loop = loop
        self._more = asyncio.Event()
        self._server: grpc.Server | None = None
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port: int = self._reserved.getsockname()[1]

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(1))  # one thread: in the order in which they were sent
        handler = grpc.unary_unary_rpc_method_handler(
            self._export, trace_service_pb2.ExportTraceServiceRequest.FromString, trace_service_pb2.ExportTraceServiceResponse.SerializeToString
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(EXPORT.split("/")[1], {"Export": handler}),))
        assert self._server.add_insecure_port(f"127.0.0.1:{self.port}") == self.port
        self._server.start()

    def _export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext) -> Any:
        spans = [
            {
                "resource": _attributes(of_resource.resource.attributes),
                "scope": f"{of_scope.instrumentation_library.name} {of_scope.instrumentation_library.version}".strip(),
                "schema": of_resource.schema_url,
                "trace": span.trace_id.hex(),
                "id": span.span_id.hex(),
                "parent": span.parent_span_id.hex(),
                "state": span.trace_state,
                "name": span.name,
                "kind": span.SpanKind.Name(span.kind)[10:].lower(),
                "more": {field.field_number: field.data for field in UnknownFieldSet(span)},
                "attributes": {name: _plain(value) for name, value in _attributes(span.attributes).items()},
                "status": f"{span.status.StatusCode.Name(span.status.code)[12:].lower()} {span.status.message}".strip(),
                "events": [event.name for event in span.events],
                "ended": span.end_time_unix_nano >= span.start_time_unix_nano > 1_500_000_000_000_000_000,
            }
            for of_resource in request.resource_spans
            for of_scope in of_resource.instrumentation_library_spans  # by now called scope_spans, with the same number
            for span in of_scope.spans
        ]
        self._loop.call_soon_threadsafe(self._add, spans, {str(key): str(value) for key, value in context.invocation_metadata()})
        return trace_service_pb2.ExportTraceServiceResponse()

    def _add(self, spans: list[Config], metadata: dict[str, str]) -> None:
        self.received += spans
        self.calls.append(metadata)
        self._more.set()

    async def until(self, seen: Any) -> None:
        """Wait until `seen(spans)`."""
        async with asyncio.timeout(LIMIT_S):
            while not seen(self.received):
                self._more.clear()
                await self._more.wait()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()
        self._reserved.close()


def _plain(value: str) -> Any:
    """What is JSON as what it says: objects have their keys in any order."""
    return json.loads(value) if value[:1] in ("{", "[") else value


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


class Upstream:
    """Answers as the path says: `/status/503`, `/once/503` (the first time), `/reset` closes, `/slow` never answers, `/grpc/14` ends with that status.

    Remembers what it saw.
    """

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.more = asyncio.Event()
        self._once: set[str] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                length = next((int(line.partition(":")[2]) for line in head if line.lower().startswith("content-length:")), 0)
                await reader.readexactly(length)
                path = head[0].split()[1].partition("?")[0]
                self.seen.append([line for line in head if line and not line.startswith(_BY_THE_CLOCK)])
                self.more.set()
                kind, _, value = path.strip("/").partition("/")
                status = 200
                if kind == "status" or (kind == "once" and path not in self._once):
                    status = int(value.partition("/")[0])
                self._once.add(path)
                if kind == "slow":
                    await reader.read()  # until the proxy gives up
                    writer.close()
                    return
                if kind == "reset":
                    writer.close()
                    return
                extra = f"content-type: application/grpc\r\ngrpc-status: {value}\r\ngrpc-message: why\r\n" if kind == "grpc" else ""
                if kind == "decorated":
                    extra = "x-envoy-decorator-operation: by-the-server\r\n"
                writer.write(f"HTTP/1.1 {status} X\r\n{extra}content-length: 2\r\n\r\nok".encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    @property
    def heard(self) -> list[Any]:
        """What `until` looks at."""
        return self.seen

    async def until(self, enough: Any) -> None:
        """Wait until `enough(heard)`."""
        async with asyncio.timeout(LIMIT_S):
            while not enough(self.heard):
                self.more.clear()
                await self.more.wait()

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()


def _otlp_spans(body: bytes, fields: dict[str, str]) -> list[Config]:
    """What comes as OTLP by HTTP, with what the request's head says."""
    request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
    said = {name: fields.get(name) for name in ("host", "x-added", "x-forwarded-for", "x-envoy-internal")}
    return [
        {"name": span.name, "traceId": span.trace_id.hex(), "id": span.span_id.hex(), "tags": _attributes(span.attributes), "head": said}
        for of_resource in request.resource_spans
        for of_scope in of_resource.instrumentation_library_spans
        for span in of_scope.spans
    ]


class Zipkin(Upstream):
    """A collector of Zipkin's, to which spans come as JSON lists; it takes OTLP by HTTP as well."""

    def __init__(self) -> None:
        super().__init__()
        self.posts: list[tuple[str, Any]] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                body = await self._body(head, reader)
                fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                if fields["content-type"] == "application/x-protobuf":
                    self.posts.append((head[0], _otlp_spans(body, fields)))
                else:
                    spans = json.loads(body)
                    for span in spans:
                        span["tags"] = {name: _plain(value) for name, value in span["tags"].items()}
                    self.posts.append((head[0], spans))
                self.more.set()
                writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    @staticmethod
    async def _body(head: list[str], reader: asyncio.StreamReader) -> bytes:
        length = next((int(line.partition(":")[2]) for line in head if line.lower().startswith("content-length:")), None)
        if length is not None:
            return await reader.readexactly(length)
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return body

    @property
    def heard(self) -> list[Any]:
        return self.posts


class Names:
    """What stands for ids: those that a client sent are themselves, others get names in the order in which they appear."""

    def __init__(self, given: str) -> None:
        self._given = given
        self._names: dict[str, str] = {}

    def of(self, text: str) -> str:
        return _RANDOM_ID.sub(lambda found: found[0] if found[0] in self._given else self._name(found[0]), text)

    def _name(self, value: str) -> str:
        if "-" in value:
            nibble = value[14]
            key = value[:14] + value[15:]
            return self._names.setdefault(key, f"request-id-{len(self._names)}") + f"({nibble})"
        return self._names.setdefault(value, f"id{len(value)}-{len(self._names)}")


def _named(value: Any, names: Names, known: dict[str, str]) -> Any:
    """The same with names for ids and ports, and without times."""
    if isinstance(value, dict):
        return {key: value[key] > 0 if key in _TIMES else _named(value[key], names, known) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_named(one, names, known) for one in value]
    if isinstance(value, str):
        return _PORT.sub(lambda found: known.get(found[0], found[0]), names.of(value))
    return known.get(str(value), value)


class Site:
    """One proxy. `ask` sends requests of a case and returns what came of them."""

    def __init__(self, command: list[str], label: str) -> None:
        self.label = label
        self._folder = tempfile.TemporaryDirectory(prefix=f"tracing-{label}-")
        self.proxy = Proxy(command, Path(self._folder.name))
        self.upstream = Upstream()
        self.zipkin = Zipkin()
        self.collector = Collector(asyncio.get_running_loop())

    async def start(self, config: Config) -> None:
        await self.upstream.start()
        await self.zipkin.start()
        ports = {"a": self.upstream.port, "otlp": self.collector.port, "zipkin": self.zipkin.port}
        await self.proxy.start(render(config, lambda kind, name: ports[name] if kind == "port" else str(Path(self._folder.name) / name)))

    def collect(self) -> None:
        """From here on there is a collector. Once no process is to be started any more."""
        self.collector.start()

    async def ask(self, listener: str, request: Request) -> Config:
        """Send requests, one after the other on one connection, and then one whose span is the last. Returns what everybody saw."""
        before = await self.proxy.stats()
        self.upstream.seen.clear()
        self.collector.received.clear()
        self.collector.calls.clear()
        self.zipkin.posts.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.ports[listener])
        requests = [request] if isinstance(request, bytes) else list(request)
        answers = []
        try:
            for one in requests:
                writer.write(one)
                answers.append(await self._answer(reader))
        finally:
            writer.close()
        if b"mirrored" in requests[0]:
            await self._copied(badly=b"badly" in requests[0], traced="off" not in listener)
        after, upstream = await self.proxy.stats(), sorted(self.upstream.seen, key=lambda seen: seen[:2])
        await self._last(listener)
        spans = sorted((span for span in self.collector.received if LAST not in str(span)), key=lambda span: str(span["name"]))
        names = Names(b"".join(requests).decode("latin-1"))
        known = {str(self.upstream.port): "A", str(self.collector.port): "OTLP"} | {str(port): name for name, port in self.proxy.ports.items()}
        seen = {
            "answers": answers,
            "upstream": upstream,
            "spans": spans,
            "posts": [post for post in self.zipkin.posts if LAST not in str(post)],
            "stats": {name: value - before.get(name, 0) for name, value in after.items() if ".tracing." in name and value != before.get(name, 0)},
        }
        return {part: _named(seen[part], names, known) for part in ("upstream", "answers", "spans", "posts", "stats")}

    async def _copied(self, *, badly: bool, traced: bool) -> None:
        """Wait for what becomes of a copy, of which the client does not hear."""
        if not badly:
            await self.upstream.until(lambda seen: len(seen) >= 2)
        if traced:
            await self.collector.until(lambda spans: any(span["name"] == "mirror" for span in spans))

    async def call(self, listener: str, method: str) -> Config:
        """A gRPC call, which the collector itself answers, and what is told of it."""
        self.collector.received.clear()

        def call() -> str:
            with grpc.insecure_channel(f"127.0.0.1:{self.proxy.ports[listener]}", options=[("grpc.primary_user_agent", "tests")]) as channel:
                try:
                    channel.unary_unary(method)(b"", metadata=[("traceparent", GIVEN)], timeout=LIMIT_S)
                except grpc.RpcError as error:
                    return str(error.code())  # type: ignore[attr-defined]  # all that clients raise have one
                return "OK"

        status = await asyncio.to_thread(call)
        await self.collector.until(lambda spans: any(span["attributes"].get("http.url", "").endswith(method) for span in spans))
        known = {str(self.collector.port): "OTLP"} | {str(port): name for name, port in self.proxy.ports.items()}
        spans = _named(self.collector.received, Names(GIVEN), known)
        for span in spans:
            for tag in ("user_agent", "grpc.timeout"):
                span["attributes"][tag] = bool(span["attributes"].get(tag))
        return {"status": status, "spans": spans, "stats": {}}

    async def _last(self, listener: str) -> None:
        to_zipkin = listener.startswith("zipkin")
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.ports["zipkin_last" if to_zipkin else "last"])
        writer.write(f"GET / HTTP/1.1\r\nhost: {LAST}\r\n\r\n".encode())
        try:
            await self._answer(reader)
        finally:
            writer.close()
        if to_zipkin:
            await self.zipkin.until(lambda posts: any(LAST in str(post) for post in posts))
        else:
            await self.collector.until(lambda spans: any(LAST in str(span) for span in spans))

    async def _answer(self, reader: asyncio.StreamReader) -> list[str]:
        async with asyncio.timeout(LIMIT_S):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            length = next((int(line.partition(":")[2]) for line in head if line.lower().startswith("content-length:")), 0)
            await reader.readexactly(length)
        return [head[0], *(line for line in head[1:] if line.partition(":")[0].lower() in OF_TRACES)]

    async def stop(self) -> None:
        self.proxy.stop()
        self.upstream.stop()
        self.zipkin.stop()
        self.collector.stop()
        await asyncio.sleep(0)
        self._folder.cleanup()
