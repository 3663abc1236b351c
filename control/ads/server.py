"""xDS over gRPC: ADS, one service for each type, LRS, HDS, and CSDS, with serialised messages: what proxies share is never parsed or built again here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from control.ads.hub import Connection, Hub, NotPermitted
from control.ads.session import ProtocolError
from control.ads.status import client_status
from control.peers import good_until, proven
from control.translate.proxy import of_node
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ROUTES
from meshproxy.api import messages
from meshproxy.api.spiffe import SpiffeId

# Who calls by TLS; it ends calls of nobody that it knows.
Identify = Callable[[grpc.aio.ServicerContext], Awaitable[SpiffeId]]

_log = logging.getLogger("meshctl.ads")
_ADS = "envoy.service.discovery.v3.AggregatedDiscoveryService"
_LRS = "envoy.service.load_stats.v3.LoadReportingService"
_HDS = "envoy.service.health.v3.HealthDiscoveryService"
_EXTENSION = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
_CSDS = "envoy.service.status.v3.ClientStatusDiscoveryService"
_SERVICES = (
    ("envoy.service.cluster.v3.ClusterDiscoveryService", "Clusters", CLUSTER),
    ("envoy.service.endpoint.v3.EndpointDiscoveryService", "Endpoints", ENDPOINTS),
    ("envoy.service.listener.v3.ListenerDiscoveryService", "Listeners", LISTENER),
    ("envoy.service.route.v3.RouteDiscoveryService", "Routes", ROUTES),
    ("envoy.service.extension.v3.ExtensionConfigDiscoveryService", "ExtensionConfigs", _EXTENSION),  # there are none, and that is said
)
# A proxy's requests are small; but those that begin a delta stream name every resource that it has.
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)

MAX_GRACE_S = 10.0  # for streams whose connection is to end

# Responses are made when they are sent: this bounds what is in memory while everybody connects at once.
_AT_ONCE = 16
_TURN_S = 0.25


class Turns:
    """At most `count` may be at something at a time. Who takes longer than `limit_s` counts no more: who does not read holds up nobody for long."""

    def __init__(self, count: int, limit_s: float) -> None:
        self._free = asyncio.Semaphore(count)
        self._limit_s = limit_s

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for a turn, and have it until the end of the block."""
        await self._free.acquire()
        over = False

        def give_back() -> None:
            nonlocal over
            if not over:
                over = True
                self._free.release()

        timer = asyncio.get_running_loop().call_later(self._limit_s, give_back)
        try:
            yield
        finally:
            timer.cancel()
            give_back()


class XdsServer:
    """The gRPC server over a hub. `handlers` are further services on the same ports.

    Who calls in the clear is believed, since that is for one machine; by TLS, one must be somebody whom `identify` knows, and gets one's own configuration, for
    as long as the certificate is good that proved it. `max_age_s`: no connection is older, 0.0 for any age; `clock`: seconds since 1970.
    """

    def __init__(
        self,
        hub: Hub,
        handlers: Sequence[grpc.GenericRpcHandler] = (),
        identify: Identify | None = None,
        max_age_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._hub = hub
        self._turns = Turns(_AT_ONCE, _TURN_S)
        self._identify = identify
        self._clock = clock
        self._server = grpc.aio.server(options=(*_OPTIONS, *_ageing(max_age_s)))
        self._server.add_generic_rpc_handlers((*self._handlers(), *handlers))

    def listen(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Bind an address, before `start`; returns the port. Raises RuntimeError when it is taken."""
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    async def start(self) -> None:
        """Serve."""
        await self._server.start()

    async def stop(self, grace_s: float = 0.5) -> None:
        """End all streams, in order if they can within `grace_s`. Proxies go on with what they have and look for another server."""
        for connection in self._hub.connections:
            connection.close()
        await self._server.stop(grace_s)

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        made = [_service(_ADS, {"StreamAggregatedResources": self._stream(delta=False), "DeltaAggregatedResources": self._stream(delta=True)})]
        for service, kind, url in _SERVICES:
            made.append(_service(service, {f"Stream{kind}": self._stream(delta=False, only=url), f"Delta{kind}": self._stream(delta=True, only=url)}))
        made.append(_service(_LRS, {"StreamLoadStats": grpc.stream_stream_rpc_method_handler(self._load_stats)}))
        made.append(_service(_HDS, {"StreamHealthCheck": grpc.stream_stream_rpc_method_handler(self._stream_health)}))
        made.append(
            _service(
                _CSDS,
                {
                    "FetchClientStatus": grpc.unary_unary_rpc_method_handler(self._fetch_status),
                    "StreamClientStatus": grpc.stream_stream_rpc_method_handler(self._stream_status),
                },
            )
        )
        return made

    def _stream(self, *, delta: bool, only: str = "") -> grpc.RpcMethodHandler:
        async def handle(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            identity = await self._caller(context)
            connection = self._hub.open(delta=delta, only=only)
            connection.identity, connection.peer = identity, context.peer()
            connection.proven = frozenset([str(identity)]) if identity is not None else proven(connection.peer, context.auth_context())
            reader = asyncio.create_task(_read(connection, requests), name=f"xds stream {connection.number}")
            expiry = self._at_the_end_of(context, lambda: connection.key, connection.close)
            try:
                while await connection.wait():
                    async with self._turns.take():
                        for response in connection.responses():
                            await context.write(response)
                            del response  # hundreds of streams would each keep the last megabyte that they sent
                if reader.done():
                    await _end(reader, context)
            finally:
                if expiry is not None:
                    expiry.cancel()
                reader.cancel()
                self._hub.close(connection)
                _log.info("%s has left (%s)", connection.key, connection.peer)

        return grpc.stream_stream_rpc_method_handler(handle)

    def _at_the_end_of(self, context: grpc.aio.ServicerContext, who: Callable[[], object], close: Callable[[], object]) -> asyncio.TimerHandle | None:
        """Ends a stream when the certificate of its caller does."""
        left = good_until(context.auth_context()) - self._clock()
        if left == math.inf:
            return None

        def end() -> None:
            _log.info("the certificate of %s has expired: its stream is ended (%s)", who(), context.peer())
            close()

        return asyncio.get_running_loop().call_later(max(0.0, left), end)

    async def _caller(self, context: grpc.aio.ServicerContext) -> SpiffeId | None:
        """Who calls, None for somebody of this machine. Ends calls of nobody."""
        if not _by_tls(context):
            return None
        if self._identify is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "nobody can be known here without an authority")
            raise AssertionError
        return await self._identify(context)

    async def _load_stats(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        identity = await self._caller(context)
        stream = self._hub.loads.open()
        try:
            async for data in requests:
                answer = stream.receive(data)
                if answer is not None:
                    self._hub.check(identity, of_node(stream.node))
                    yield answer
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except NotPermitted as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        finally:
            self._hub.loads.close(stream)

    async def _stream_health(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        identity = await self._caller(context)
        wake = asyncio.Event()
        stream = self._hub.health.open(wake.set)

        async def read() -> None:
            async for data in requests:
                new = stream.key is None
                stream.receive(data)
                if new and stream.key is not None:
                    self._hub.check(identity, stream.key)
                self._hub.health.heard(stream, self._hub.snapshot)

        reader = asyncio.create_task(read(), name="health reports")
        reader.add_done_callback(lambda _: wake.set())
        expiry = self._at_the_end_of(context, lambda: stream.key, reader.cancel)
        try:
            while not reader.done():
                await wake.wait()
                wake.clear()
                workload = self._hub.snapshot.workloads.get(stream.workload) if stream.workload is not None else None
                answer = stream.answer(workload) if not reader.done() else None
                if answer is not None:
                    await context.write(answer)
            await _end(reader, context)
        finally:
            if expiry is not None:
                expiry.cancel()
            reader.cancel()
            self._hub.health.close(stream)

    # --- CSDS

    async def _fetch_status(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return await self._status(data, context)

    async def _stream_status(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        async for data in requests:
            yield await self._status(data, context)

    async def _status(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        if _by_tls(context):  # it tells what all proxies have
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "status is told on this machine only, in the clear")
        try:
            request = messages.known("envoy.service.status.v3.ClientStatusRequest").FromString(data)
            matches = _node_matcher(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        response = client_status(self._hub.connections, matches, not request.exclude_resource_contents, self._hub.loads, self._hub.health)
        return bytes(response.SerializeToString())


async def _read(connection: Connection, requests: AsyncIterator[bytes]) -> None:
    """Requests of the client, until there are no more. Its end ends the stream."""
    known = False
    try:
        async for data in requests:
            connection.receive(data)
            if not known:
                known = True
                _log.info("%s has come (%s)", connection.key, connection.peer)
    finally:
        connection.close()


async def _end(reader: asyncio.Task[None], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    try:
        await reader
    except (ProtocolError, NotPermitted) as error:
        _log.warning("a stream of %s is ended: %s", context.peer(), error)
        code = grpc.StatusCode.PERMISSION_DENIED if isinstance(error, NotPermitted) else grpc.StatusCode.INVALID_ARGUMENT
        await context.abort(code, str(error))
    except asyncio.CancelledError:  # the client went away
        pass


def _ageing(max_age_s: float) -> tuple[tuple[str, int], ...]:
    """Options by which connections end: gRPC spreads the ends by a tenth, so that not all come back at once."""
    if not max_age_s:
        return ()
    return ("grpc.max_connection_age_ms", int(max_age_s * 1000)), ("grpc.max_connection_age_grace_ms", int(min(max_age_s, MAX_GRACE_S) * 1000))


def _by_tls(context: grpc.aio.ServicerContext) -> bool:
    return b"ssl" in context.auth_context().get("transport_security_type", ())


def _service(name: str, methods: dict[str, grpc.RpcMethodHandler]) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(name, methods)


def _node_matcher(request: Any) -> Callable[[str], bool]:
    """Whether a node id is asked for: any of the matchers, which must be exact or a prefix. Raises ValueError for others."""
    tests: list[Callable[[str], bool]] = []
    for matcher in request.node_matchers:
        kind = matcher.node_id.WhichOneof("match_pattern")
        if kind == "exact":
            tests.append(matcher.node_id.exact.__eq__)
        elif kind == "prefix":
            prefix = matcher.node_id.prefix
            tests.append(lambda text, prefix=prefix: text.startswith(prefix))  # type: ignore[misc]
        else:
            raise ValueError("node_matchers: only node_id with exact or prefix is served")
    return (lambda text: any(test(text) for test in tests)) if tests else (lambda text: True)
