"""gRPC calls of our own over a cluster: what xDS, external authorisation and the like are built on. In workers and in main, without a gRPC library.

    client = GrpcClient(context.clusters, "xds")
    answer = await client.unary("/grpc.health.v1.Health/Check", request, timeout=1.0)
    async with client.stream("/pkg.Service/Method") as stream:  # `upstream.grpc_stream.GrpcStream`
        await stream.send(request)
        async for message in stream: ...

Messages are bytes. The cluster's TLS, balancing, pools, limits, keepalive and statistics apply as they do to proxied requests; it should speak HTTP/2.
Source: grpc/grpc doc/PROTOCOL-HTTP2.md; envoy.config.core.v3.GrpcService.EnvoyGrpc for the settings.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable
from typing import TYPE_CHECKING

from meshproxy.codec import grpc
from meshproxy.codec.headers import RequestHead
from meshproxy.upstream.grpc_stream import GrpcError, GrpcStream

if TYPE_CHECKING:
    from meshproxy.codec.headers import Pair
    from meshproxy.upstream.cluster_manager import ClusterManager

# Names in lower case; values of names that end in `-bin` are bytes, others are text.
Metadata = Iterable[tuple[str, str | bytes]]


class GrpcClient:
    """Calls to the services of one cluster.

    `authority`: default the cluster's name. `metadata`: of every call. `max_receive_message_length`: bytes of one message, 0 for no limit.
    """

    def __init__(
        self,
        clusters: ClusterManager,
        cluster_name: str,
        *,
        authority: str = "",
        metadata: Metadata = (),
        max_receive_message_length: int = 0,
    ) -> None:
        self._clusters = clusters
        self.cluster_name = cluster_name
        self._authority = (authority or cluster_name).encode()
        self._items = encode_metadata(metadata)
        self._max_receive = max_receive_message_length

    def stream(self, method: str, *, metadata: Metadata = (), timeout: float | None = None) -> GrpcStream:
        """Begin a call of any shape. `method`: `/service/method`; `timeout`: seconds for the whole call. Use it as a context manager, or see that it ends.

        What goes wrong is raised by the stream's methods.
        """
        items: list[Pair] = [(b"te", b"trailers")]
        if timeout is not None:
            items.append((b"grpc-timeout", grpc.format_timeout(max(1, round(timeout * 1000)))))
        items.append((b"content-type", grpc.CONTENT_TYPE))
        items += self._items
        items += encode_metadata(metadata)
        head = RequestHead(b"POST", method.encode(), self._authority, items, version=20)
        stream = GrpcStream(head, self._max_receive)
        stream.start(self._clusters.get(self.cluster_name), self.cluster_name, timeout)
        return stream

    async def unary(self, method: str, request: bytes, *, metadata: Metadata = (), timeout: float | None = None) -> bytes:
        """One message there, one back. Raises GrpcError. Cancelling the caller cancels the call."""
        async with self.stream(method, metadata=metadata, timeout=timeout) as stream:
            await stream.send(request, done=True)
            response = await stream.read()
            if response is None:
                raise GrpcError(grpc.INTERNAL, "the server gave no response and no error")
            if await stream.read() is not None:
                raise GrpcError(grpc.INTERNAL, "the server gave more than one response to a unary call")
            return response

    def __repr__(self) -> str:
        return f"<GrpcClient {self.cluster_name}>"


def encode_metadata(metadata: Metadata) -> list[Pair]:
    """Metadata as header fields: binary values as base64 without padding. Raises ValueError for what cannot be said in a header."""
    items: list[Pair] = []
    for name, value in metadata:
        key = name.lower().encode("ascii")
        if name.endswith("-bin"):
            raw = value.encode() if isinstance(value, str) else value
            items.append((key, binascii.b2a_base64(raw, newline=False).rstrip(b"=")))
            continue
        text = value if isinstance(value, bytes) else value.encode("ascii")
        if not all(0x20 <= byte < 0x7F for byte in text):
            raise ValueError(f"metadata {name!r} is not printable ASCII: binary values need a name that ends in -bin")
        items.append((key, text))
    return items
