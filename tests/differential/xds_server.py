"""A small control plane over grpcio: resources by name and version, answered as the protocol has it, with every request on record."""

from __future__ import annotations

import asyncio
import os
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # its threads do not survive the fork of a proxy, nor do they have to
import grpc
from google.protobuf import any_pb2

from meshproxy.api import convert, messages
from tests.differential.xds_rig import KINDS

_D = "envoy.service.discovery.v3."
_Request, _Response = messages.known(f"{_D}DiscoveryRequest"), messages.known(f"{_D}DiscoveryResponse")
_DeltaRequest, _DeltaResponse = messages.known(f"{_D}DeltaDiscoveryRequest"), messages.known(f"{_D}DeltaDiscoveryResponse")
_URLS = {url: kind for kind, url in KINDS.items()}
_ALL = frozenset({"*"})
_COMPLETE = ("cluster", "listener")  # kinds of which an answer of the state of the world has all there are


class ControlPlane:
    """Serves one site. `resources[kind][name]` is (version, message); `log[kind]` is what was asked, as text; `complaints[kind]`: why answers were refused.

    `hold`: kinds that are not answered until it is emptied and `push` is called. `port` is kept over `stop` and `start`. `prefetch`: whoever asks for virtual
    hosts gets all at once, and not only those that it names.
    """

    def __init__(self) -> None:
        self.resources: dict[str, dict[str, tuple[str, Any]]] = {kind: {} for kind in KINDS}
        self.versions: dict[str, str] = {}  # of kinds, in answers of the state of the world
        self.log: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self.complaints: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self.hold: set[str] = set()
        self.lives: dict[str, float] = {}
        self.port = 0
        self.streams = 0
        self.handlers: list[Any] = []  # of other services
        self.prefetch = False
        self._changed = asyncio.Condition()
        self._server: Any = None

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
        self._server.add_generic_rpc_handlers(self.handlers)
        aggregated = {"StreamAggregatedResources": self._sotw, "DeltaAggregatedResources": self._delta}
        self._serve("envoy.service.discovery.v3.AggregatedDiscoveryService", aggregated)
        for service, kind in (
            ("cluster", "Clusters"),
            ("listener", "Listeners"),
            ("route", "Routes"),
            ("route", "VirtualHosts"),
            ("endpoint", "Endpoints"),
            ("secret", "Secrets"),
            ("extension", "ExtensionConfigs"),
            ("runtime", "Runtime"),
        ):
            methods = {f"Stream{kind}": self._sotw, f"Delta{kind}": self._delta}
            name = kind.removesuffix("s")
            self._serve(f"envoy.service.{service}.v3.{name}DiscoveryService", methods)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    def _serve(self, service: str, methods: dict[str, Any]) -> None:
        handlers = {}
        for name, handler in methods.items():
            request = _DeltaRequest if name.startswith("Delta") else _Request
            handlers[name] = grpc.stream_stream_rpc_method_handler(
                handler, request_deserializer=request.FromString, response_serializer=lambda message: message.SerializeToString()
            )
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    # -- what there is

    def put(self, kind: str, version: str, *messages: dict[str, Any], ttl: float = 0.0) -> None:
        """Replace all resources of a kind. `messages`: as JSON. `ttl`: seconds that they live, or 0.0 for ever."""
        self.lives[kind] = ttl
        known = {}
        for one in messages:
            known[one.get("name") or one["cluster_name"]] = (version, self.pack(kind, one))
        before = self.resources[kind]
        # What has not changed keeps its version, as control planes do it in delta.
        self.resources[kind] = {name: before[name] if name in before and before[name][1] == entry[1] else entry for name, entry in known.items()}
        self.versions[kind] = version

    def pack(self, kind: str, message: dict[str, Any]) -> Any:
        """A resource, from JSON."""
        return convert.to_message({"@type": KINDS[kind], **message}, any_pb2.Any)

    async def push(self) -> None:
        """Tell every stream that something may have changed."""
        async with self._changed:
            self._changed.notify_all()

    async def until_asked(self, kind: str, part: str, count: int = 1) -> None:
        """Wait for so many requests with that in their records."""
        async with asyncio.timeout(60), self._changed:
            while sum(part in line for line in self.log[kind]) < count:
                await self._changed.wait()

    def _with_life(self, kind: str, name: str, entry: tuple[str, Any]) -> Any:
        """A resource of an answer of the state of the world, in an envelope if it does not live for ever."""
        if not self.lives[kind]:
            return entry[1]
        envelope = messages.known(f"{_D}Resource")(name=name, version=entry[0], resource=entry[1])
        envelope.ttl.FromMilliseconds(int(self.lives[kind] * 1000))
        packed = any_pb2.Any()
        packed.Pack(envelope)
        return packed

    # -- streams

    async def _read(self, requests: Any, take: Any) -> None:
        async for request in requests:
            async with self._changed:
                take(request)
                self._changed.notify_all()

    async def _sotw(self, requests: Any, context: Any) -> Any:
        self.streams += 1
        wanted: dict[str, frozenset[str]] = {}
        sent: dict[str, tuple[Any, ...]] = {}
        nonces: dict[str, str] = {}
        due: set[str] = set()

        def take(request: Any) -> None:
            kind = _URLS[request.type_url]
            names = frozenset(request.resource_names) or (_ALL if kind in _COMPLETE else frozenset())
            if request.response_nonce and request.response_nonce != nonces.get(kind):
                self.log[kind].append("stale")
                return
            what = "nack" if request.HasField("error_detail") else "ack" if request.response_nonce and names == wanted.get(kind) else "ask"
            self.complaints[kind] += [request.error_detail.message] if what == "nack" else []
            self.log[kind].append(f"{what} {request.version_info or '-'} {' '.join(sorted(names))}")
            if names != wanted.get(kind) or not request.response_nonce:
                due.add(kind)
            wanted[kind] = names

        reader = asyncio.ensure_future(self._read(requests, take))
        count = 0
        try:
            while not reader.done():
                ready: list[Any] = []
                async with self._changed:
                    for kind, names in wanted.items():
                        if kind in self.hold:
                            continue
                        chosen = {name: entry for name, entry in self.resources[kind].items() if name in names or names == _ALL}
                        state = (self.versions.get(kind, "0"), tuple(sorted((name, entry[0]) for name, entry in chosen.items())))
                        if (kind in due or sent.get(kind) != state) and (chosen or kind in _COMPLETE):
                            due.discard(kind)
                            sent[kind] = state
                            count += 1
                            nonces[kind] = str(count)
                            answer = _Response(type_url=KINDS[kind], version_info=state[0], nonce=str(count))
                            answer.control_plane.identifier = "the test"
                            answer.resources.extend(self._with_life(kind, name, entry) for name, entry in chosen.items())
                            ready.append(answer)
                    if not ready:
                        await self._changed.wait()
                for answer in ready:
                    await context.write(answer)
        finally:
            reader.cancel()

    async def _delta(self, requests: Any, context: Any) -> Any:
        self.streams += 1
        wanted: dict[str, set[str]] = {}
        known: dict[str, dict[str, str]] = {}  # what the client has
        absent: dict[str, set[str]] = {}  # asked for, and said not to be there
        again: dict[str, set[str]] = {}
        greeted = {"vhost"}  # but for those that wait for a first answer, whatever is in it

        def take(request: Any) -> None:
            kind = _URLS[request.type_url]
            first = kind not in wanted
            names = wanted.setdefault(kind, set())
            subscribe, unsubscribe = set(request.resource_names_subscribe), set(request.resource_names_unsubscribe)
            if first and not subscribe and kind in _COMPLETE:
                subscribe.add("*")
            if first and not subscribe and kind == "vhost":
                greeted.discard(kind)
                subscribe.update({"*"} if self.prefetch else ())
            known.setdefault(kind, {}).update(request.initial_resource_versions)
            names |= subscribe
            names -= unsubscribe
            for name in unsubscribe:
                known[kind].pop(name, None)
                absent.setdefault(kind, set()).discard(name)
            if not first:
                again.setdefault(kind, set()).update(subscribe - {"*"})
            absent.setdefault(kind, set()).difference_update(subscribe)
            what = "nack" if request.HasField("error_detail") else "ack" if request.response_nonce else "ask"
            self.complaints[kind] += [request.error_detail.message] if what == "nack" else []
            versions = ",".join(f"{name}={version}" for name, version in sorted(request.initial_resource_versions.items()))
            self.log[kind].append(f"{what} +{' '.join(sorted(subscribe))} -{' '.join(sorted(unsubscribe))} {versions}".strip())

        reader = asyncio.ensure_future(self._read(requests, take))
        count = 0
        try:
            while not reader.done():
                ready = []
                async with self._changed:
                    for kind, names in wanted.items():
                        if kind in self.hold:
                            continue
                        chosen = {name: entry for name, entry in self.resources[kind].items() if name in names or "*" in names}
                        asked = again.pop(kind, set())
                        news = {name: entry for name, entry in chosen.items() if known[kind].get(name) != entry[0] or name in asked}
                        gone = {name for name in known[kind] if name not in chosen}
                        missing = {name for name in names - {"*"} if name not in chosen and name not in absent[kind]}
                        if not (news or gone or missing or kind == "vhost" not in greeted):
                            continue
                        if kind not in greeted:
                            greeted.add(kind)
                            absent[kind] |= {"routes/"}  # Envoy does not take an answer without any resource for one
                            missing |= {"routes/"}
                        for name in gone | missing:
                            known[kind].pop(name, None)
                            absent[kind].add(name)
                        count += 1
                        answer = _DeltaResponse(type_url=KINDS[kind], system_version_info=self.versions.get(kind, "0"), nonce=str(count))
                        answer.removed_resources.extend(sorted(gone if kind == "vhost" else gone | missing))
                        if kind == "vhost":  # what is not there has an empty place
                            for name in missing - gone:
                                answer.resources.add(name=name, aliases=[name], version="none")
                        for name, (version, packed) in news.items():
                            known[kind][name] = version
                            one = answer.resources.add(name=name, version=version, resource=packed)
                            if self.lives[kind]:
                                one.ttl.FromMilliseconds(int(self.lives[kind] * 1000))
                        ready.append(answer)
                    if not ready:
                        await self._changed.wait()
                for answer in ready:
                    await context.write(answer)
        finally:
            reader.cancel()
