"""A grpcio service on bytes, in all four shapes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc


class Service:
    """Answers by what the method is called; remembers what it was sent."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.remaining: float | None = None
        self.cancelled = asyncio.Event()
        self.begun = asyncio.Event()
        self.taken = 0

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        _, _, name = details.method.rpartition("/")
        handler = getattr(self, name, None)
        kind = {"u": grpc.unary_unary_rpc_method_handler, "s": grpc.unary_stream_rpc_method_handler}
        stream = {"u": grpc.stream_unary_rpc_method_handler, "s": grpc.stream_stream_rpc_method_handler}
        shape = name.partition("_")[0]
        return None if handler is None else (kind if shape[0] == "u" else stream)[shape[1]](handler)

    async def uu_echo(self, request: bytes, context: Any) -> bytes:
        self.metadata = dict(context.invocation_metadata())
        self.remaining = context.time_remaining()
        await context.send_initial_metadata((("x-first", "1"), ("x-raw-bin", b"\0\xff")))
        context.set_trailing_metadata((("x-last", "2"),))
        return request

    async def uu_fail(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\x08\x05"), ("x-why", "tired")))
        await context.abort(grpc.StatusCode.NOT_FOUND, "100 % naïve\n")

    async def uu_wait(self, request: bytes, context: Any) -> bytes:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b""

    async def uu_large(self, request: bytes, context: Any) -> bytes:
        return bytes(int(request))

    async def us_count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number

    async def us_flood(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(int(request)):
            self.taken += 1
            yield bytes(100_000)

    async def us_fail(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no more")

    async def su_sum(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"%d" % sum([len(request) async for request in requests])

    async def su_refuse(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")

    async def ss_echo(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    async def ss_burst(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Ends when it has said what it had to say, whatever the caller still wants."""
        async for request in requests:
            for _ in range(int(request)):
                yield bytes(100_000)
            return
