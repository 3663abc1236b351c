"""`meshproxy.identity.calls.Calls` with the gRPC library, for agents that are processes of the control plane's own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from meshproxy.identity.calls import CallFailed, Metadata


class GrpcCalls:
    """Over one channel, which is closed by whoever made it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout: float) -> bytes:
        """See Calls."""
        try:
            return bytes(await self._channel.unary_unary(method)(request, metadata=list(metadata), timeout=timeout))
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from error

    async def stream(self, method: str, request: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        """See Calls."""
        call = self._channel.unary_stream(method)(request, metadata=list(metadata))
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from error
        finally:
            call.cancel()


def _failure(error: grpc.aio.AioRpcError) -> CallFailed:
    return CallFailed(error.code().value[0], error.details() or error.code().name)
