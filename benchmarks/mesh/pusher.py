"""A control plane that does one thing, by delta: a thousand clusters that change every second. What it sends is made beforehand, and takes no time of others.

As a program (`python -m benchmarks.mesh.pusher CLUSTERS BACKEND_PORT`) it says its port, and obeys lines of JSON:
`{"push": KIND}` changes KIND once a second from now on, `{"push": ""}` nothing more; its answer is what became of the updates before: how many there were,
in how many responses (clusters that have changed want their endpoints again, and a client may ask for them besides), in how many seconds, and how many
responses were refused.

Cluster `backend`, to which traffic goes, is one of those that are sent, and stays as it is.

A control plane is on another machine, mostly: what this one does is done in the long turns of `meshproxy.scheduling`, so that it does not delay the load and
the service with which it shares a processor here.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import grpc.aio

from meshproxy.api import convert, messages
from meshproxy.scheduling import turns

CLUSTERS, ENDPOINTS = "clusters", "endpoints"
BACKEND = "backend"
_TYPES = {
    "type.googleapis.com/envoy.config.cluster.v3.Cluster": CLUSTERS,
    "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment": ENDPOINTS,
}
_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
_D = "envoy.service.discovery.v3."
_EVERY_S = 1.0
_LIMIT_S = 30.0


def _cluster(index: int, variant: int, backend_port: int) -> dict[str, Any]:
    name = f"service-{index}" if index else BACKEND
    source = {"ads": {}, "resource_api_version": "V3"}
    return {"name": name, "type": "EDS", "connect_timeout": f"{1 + variant}s", "eds_cluster_config": {"eds_config": source}}


def _assignment(index: int, variant: int, backend_port: int) -> dict[str, Any]:
    if index:
        places, name = [(f"10.{index >> 8}.{index & 255}.{host}", 8080) for host in range(1 + variant, 11 + variant)], f"service-{index}"
    else:
        places, name = [("127.0.0.1", backend_port)], BACKEND
    endpoints = [{"endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}}} for address, port in places]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints, "load_balancing_weight": 1, "locality": {"region": "r"}}]}


_MAKERS = {CLUSTERS: _cluster, ENDPOINTS: _assignment}


class Pusher:
    """What is sent, and the streams. `variant` of each kind is what it is like now: 0 or 1."""

    def __init__(self, count: int, backend_port: int) -> None:
        self.variant = dict.fromkeys((CLUSTERS, ENDPOINTS), 0)
        self.updates = 0
        self.responses = 0
        self.unanswered = 0
        self.settled = asyncio.Event()  # nothing is unanswered
        self.settled.set()
        self.refused = 0
        self.streams: set[_Stream] = set()
        self._bodies: dict[tuple[str, int], tuple[bytes, dict[str, bytes]]] = {}
        for url, kind in _TYPES.items():
            message = messages.known(messages.full_name(url))
            for variant in (0, 1):
                made = [convert.to_message(_MAKERS[kind](index, variant if index else 0, backend_port), message) for index in range(count)]
                self._bodies[kind, variant] = _response(url, variant, made)

    def body(self, kind: str, names: Iterable[str] = ()) -> bytes:
        """A response without its nonce: all of a kind as it is now, or only what is named."""
        head, resources = self._bodies[kind, self.variant[kind]]
        return head + b"".join([resources[name] for name in names if name in resources] if names else resources.values())

    def handler(self) -> grpc.GenericRpcHandler:
        """The service."""

        async def handle(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            await _Stream(self, context).run(requests)

        return grpc.method_handlers_generic_handler(_SERVICE, {"DeltaAggregatedResources": grpc.stream_stream_rpc_method_handler(handle)})

    def answered(self) -> None:
        """A client has answered one response."""
        self.unanswered -= 1
        if self.unanswered <= 0:
            self.settled.set()

    async def push(self, kind: str) -> None:
        """Change all of a kind, now and every second, until cancelled; clusters with their endpoints, which are told again once they are changed."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self.variant[kind] ^= 1
            self.updates += 1
            for stream in self.streams:
                await stream.send(kind)
                if kind == CLUSTERS:
                    await stream.send(ENDPOINTS)
            due += _EVERY_S
            await asyncio.sleep(due - loop.time())


class _Stream:
    """One client. Responses are sent whether or not the one before was answered: what lands every second lands every second."""

    def __init__(self, pusher: Pusher, context: Any) -> None:
        self._pusher = pusher
        self._context = context
        self._wanted: set[str] = set()
        self._nonce = 0

    async def run(self, requests: AsyncIterator[bytes]) -> None:
        """Until it ends."""
        request_type = messages.known(f"{_D}DeltaDiscoveryRequest")
        self._pusher.streams.add(self)
        try:
            async for data in requests:
                request = request_type.FromString(data)
                kind = _TYPES.get(request.type_url)
                if request.response_nonce:
                    self._pusher.answered()
                    if request.HasField("error_detail"):
                        self._pusher.refused += 1
                        print(request.error_detail.message[:500], file=sys.stderr, flush=True)
                if kind is None:
                    continue
                asks = [name for name in request.resource_names_subscribe if name != "*"]
                if kind not in self._wanted or asks:
                    self._wanted.add(kind)
                    if kind == CLUSTERS or asks:
                        await self.send(kind, asks)
        finally:
            self._pusher.streams.discard(self)

    async def send(self, kind: str, names: Iterable[str] = ()) -> None:
        """All of a kind, if it is asked for, or only what is named."""
        if kind not in self._wanted:
            return
        self._nonce += 1
        pusher = self._pusher
        pusher.responses += 1
        pusher.unanswered += 1
        pusher.settled.clear()
        await self._context.write(pusher.body(kind, names) + b"\x2a" + _length(str(self._nonce).encode()))


def _length(data: bytes) -> bytes:
    return bytes([len(data)]) + data


def _any(url: str, message: Any) -> Any:
    return messages.known("google.protobuf.Any")(type_url=url, value=message.SerializeToString())


def _name(message: Any) -> str:
    return str(message.name if message.DESCRIPTOR.name == "Cluster" else message.cluster_name)


def _response(url: str, variant: int, made: list[Any]) -> tuple[bytes, dict[str, bytes]]:
    """The head of a response, and its resources by name."""
    resource, response = messages.known(f"{_D}Resource"), messages.known(f"{_D}DeltaDiscoveryResponse")
    head = response(system_version_info=f"v{variant}", type_url=url).SerializeToString()
    resources = {}
    for number, one in enumerate(made):
        wrapped = resource(name=_name(one), version=f"v{variant if number else 0}", resource=_any(url, one))
        resources[wrapped.name] = response(resources=[wrapped]).SerializeToString()
    return head, resources


async def main() -> None:
    """Do what standard input says."""
    turns.lengthen()  # before gRPC has threads, which do as this one does
    pusher = Pusher(int(sys.argv[1]), int(sys.argv[2]))
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers([pusher.handler()])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    loop = asyncio.get_running_loop()
    pushing: asyncio.Task[None] | None = None
    begun = took = 0.0
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        kind = json.loads(line)["push"]
        if pushing is not None:
            pushing.cancel()
            pushing = None
            took = loop.time() - begun
            await asyncio.wait_for(pusher.settled.wait(), _LIMIT_S)
        print(json.dumps({"updates": pusher.updates, "responses": pusher.responses, "seconds": took, "refused": pusher.refused}), flush=True)
        pusher.updates = pusher.responses = pusher.refused = 0
        if kind:
            begun = loop.time()
            pushing = asyncio.create_task(pusher.push(kind), name=f"push {kind}")


if __name__ == "__main__":
    asyncio.run(main())
