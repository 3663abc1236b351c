"""Many xDS clients in one process: delta ADS as a sidecar speaks it, over gRPC, a connection for each; what comes is acknowledged and forgotten.

Each asks for all clusters and listeners, for the endpoints of every cluster that came, and for the routes of the HTTP proxy. As a program
(`python -m benchmarks.mesh.clients`) it obeys lines of JSON on standard input, and prints one for each when everybody has acknowledged:

- `{"connect": ADDRESS, "clients": N}`: connect all at once, until each has what it asked for;
- `{"expect": NAME}`: until the resource of that name has come to each once more. It says `"armed"` before, so that nothing can come too early.

Times are those of CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import grpc.aio

from meshproxy.api import messages

_TYPE = "type.googleapis.com/envoy.config."
CLUSTER, LISTENER = f"{_TYPE}cluster.v3.Cluster", f"{_TYPE}listener.v3.Listener"
ENDPOINTS, ROUTES = f"{_TYPE}endpoint.v3.ClusterLoadAssignment", f"{_TYPE}route.v3.RouteConfiguration"
METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
HTTP_PROXY_ROUTES = "http_proxy"
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # channels to one address would share a connection
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
)
_DISCOVERY = "envoy.service.discovery.v3."


class Crowd:
    """All clients. `bytes`: of all responses so far."""

    def __init__(self) -> None:
        self.clients: list[Client] = []
        self.bytes = 0
        self.responses = 0
        self.last = 0.0  # when the last acknowledgement was written
        self.expected = ""
        self._waiting = 0
        self._done = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._names: dict[tuple[str, ...], bytes] = {}

    async def connect(self, address: str, count: int) -> None:
        """Until each has everything."""
        self._wait_for(count)
        self.clients = [Client(self, f"proxy-{number:04d}") for number in range(count)]
        self._tasks = [asyncio.create_task(client.run(address), name=client.name) for client in self.clients]
        await self.settled()

    def expect(self, name: str) -> None:
        """From now on this is what is waited for."""
        self.expected = name
        self._wait_for(len(self.clients))

    async def settled(self) -> None:
        """Until every client has what it waits for; raises what went wrong with any."""
        done = asyncio.create_task(self._done.wait(), name="settled")
        ended, _ = await asyncio.wait([done, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        if done not in ended:
            done.cancel()
            for task in ended:
                task.result()
            raise RuntimeError("a stream has ended")

    def _wait_for(self, count: int) -> None:
        self._waiting = count
        self._done.clear()

    def has(self) -> None:
        """A client has what it waited for, and has said so."""
        self.last = time.monotonic()
        self._waiting -= 1
        if not self._waiting:
            self._done.set()

    def subscription(self, url: str, names: tuple[str, ...]) -> bytes:
        """A request for resources by name: the same for thousands of streams, so it is made once."""
        key = (url, *names)
        if key not in self._names:
            self._names[key] = _request(type_url=url, resource_names_subscribe=names)
        return self._names[key]


class Client:
    """One stream."""

    def __init__(self, crowd: Crowd, name: str) -> None:
        self.name = name
        self._crowd = crowd
        self._missing = {CLUSTER, LISTENER, ENDPOINTS, ROUTES}
        self._unknown: set[str] = set()  # endpoints that were asked for
        self._connected = False  # it has had everything once

    async def run(self, address: str) -> None:
        """Until the stream ends."""
        async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
            call = channel.stream_stream(METHOD)()
            await call.write(_request(type_url=CLUSTER, node={"id": f"{self.name}.default", "cluster": self.name}))
            await call.write(_request(type_url=LISTENER))
            while True:
                data = await call.read()
                if data is grpc.aio.EOF:
                    raise RuntimeError(f"the stream of {self.name} has ended: {await call.code()} {await call.details()}")
                answers, names = self._answers(data)
                for answer in answers:
                    await call.write(answer)
                self._tell(names)

    def _answers(self, data: bytes) -> tuple[list[bytes], list[str]]:
        """What to say to a response, and the names that were in it."""
        crowd = self._crowd
        crowd.bytes += len(data)
        crowd.responses += 1
        response = messages.known(f"{_DISCOVERY}DeltaDiscoveryResponse").FromString(data)
        url = response.type_url
        answers = [_request(type_url=url, response_nonce=response.nonce)]
        names = [resource.name for resource in response.resources]
        if url in self._missing:
            self._missing.discard(url)
            if url == CLUSTER:
                asked = tuple(name for name in names if name.startswith("outbound|"))
                self._unknown = set(asked)
                answers.append(crowd.subscription(ENDPOINTS, asked))
            elif url == LISTENER:
                answers.append(crowd.subscription(ROUTES, (HTTP_PROXY_ROUTES,)))
        if url == ENDPOINTS:
            self._unknown.difference_update(names)
        return answers, names

    def _tell(self, names: list[str]) -> None:
        """Whether what is waited for has come."""
        if self._connected:
            if self._crowd.expected in names:
                self._crowd.has()
        elif not self._missing and not self._unknown:
            self._connected = True
            self._crowd.has()


def _request(**fields: Any) -> bytes:
    return bytes(messages.known(f"{_DISCOVERY}DeltaDiscoveryRequest")(**fields).SerializeToString())


async def main() -> None:
    """Do what standard input says."""
    crowd = Crowd()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        job: dict[str, Any] = json.loads(line)
        start = time.monotonic()
        if "connect" in job:
            await crowd.connect(job["connect"], job["clients"])
        else:
            crowd.expect(job["expect"])
            print(json.dumps("armed"), flush=True)
            await crowd.settled()
        print(json.dumps({"start": start, "last": crowd.last, "bytes": crowd.bytes, "responses": crowd.responses}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
