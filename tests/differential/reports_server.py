"""A gRPC server that a proxy sends reports to: it hears all of them, and says what a test has it say."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from meshproxy.api import messages
from tests.differential.config import Config
from tests.polling import PATIENCE

_HTTP2 = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {"@": "http_options", "explicit_http_config": {"http2_protocol_options": {}}}}


class ReportsServer:
    """`first`: the first message of each stream; `reports`: all others, of all streams. `method` of `service` takes messages of the type `kind`."""

    def __init__(self, service: str, method: str, kind: str) -> None:
        self.port = 0
        self.first: list[Any] = []
        self.reports: list[Any] = []
        handler = grpc.stream_stream_rpc_method_handler(self._serve, request_deserializer=messages.known(kind).FromString)
        self.handlers = [grpc.method_handlers_generic_handler(service, {method: handler})]
        self._heard = asyncio.Condition()
        self._said: asyncio.Queue[Any] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(handlers=self.handlers)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    def config(self, name: str) -> tuple[Config, Config]:
        """How a bootstrap names it: the source of a service, and the cluster of that name."""
        source = {"api_type": "GRPC", "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": name}}]}
        endpoint = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": self.port}}}}
        assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]}
        return source, {"name": name, "connect_timeout": "1s", "typed_extension_protocol_options": _HTTP2, "load_assignment": assignment}

    async def _serve(self, requests: Any, context: Any) -> None:
        async def read() -> None:
            first = True
            async for request in requests:
                async with self._heard:
                    (self.first if first else self.reports).append(request)
                    first = False
                    self._heard.notify_all()

        reader = asyncio.ensure_future(read())
        try:
            while (said := await self._said.get()) is not None:
                if isinstance(said, grpc.StatusCode):
                    await context.abort(said, "the test says so")
                await context.write(said)
        finally:
            reader.cancel()

    def say(self, what: Any) -> None:
        """Send bytes; or end the stream, with a status, or well (None)."""
        self._said.put_nowait(what)

    async def until(self, enough: Any) -> None:
        """Wait until what was heard is enough."""
        async with asyncio.timeout(PATIENCE), self._heard:
            while not enough():
                await self._heard.wait()
