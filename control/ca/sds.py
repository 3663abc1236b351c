"""An SDS server: the secrets of one identity for a proxy that gets them over a Unix socket, as the real Envoy does beside an agent.

State of the world, delta, and single fetches. A stream is told of a secret when it asks and whenever the secret changes; a name that there is nothing of is
not answered, so that the proxy waits for it as it would for any slow authority. What a proxy refuses is logged and not sent again until it has changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from google.protobuf import any_pb2

from meshproxy.api import messages
from meshproxy.identity.provider import SECRET, Provider, Secret, Watch

log = logging.getLogger("meshctl.sds")

TYPE_URL = f"type.googleapis.com/{SECRET}"
_D = "envoy.service.discovery.v3."
_SERVICE = "envoy.service.secret.v3.SecretDiscoveryService"
_MAX_NAMES = 64  # of one stream: an identity has a handful


class SecretService:
    """Serves what a provider has."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self.streams = 0
        self.refused = 0

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """For `add_generic_rpc_handlers` of a grpc.aio server."""
        request, delta = (messages.known(f"{_D}{name}").FromString for name in ("DiscoveryRequest", "DeltaDiscoveryRequest"))
        methods = {
            "StreamSecrets": grpc.stream_stream_rpc_method_handler(self._stream, request_deserializer=request),
            "DeltaSecrets": grpc.stream_stream_rpc_method_handler(self._delta, request_deserializer=delta),
            "FetchSecrets": grpc.unary_unary_rpc_method_handler(self._fetch, request_deserializer=request),
        }
        return (grpc.method_handlers_generic_handler(_SERVICE, methods),)

    async def _fetch(self, request: Any, context: grpc.aio.ServicerContext) -> bytes:
        found = [secret for name in request.resource_names if (secret := self._provider.get(name)) is not None]
        if not found:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no secret {', '.join(request.resource_names)}")
        return _response(found, "0")

    async def _stream(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for answer in self._serve(_Stream(self._provider), requests, context):
            yield answer

    async def _delta(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for answer in self._serve(_DeltaStream(self._provider), requests, context):
            yield answer

    async def _serve(self, stream: _Stream, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        reader = asyncio.create_task(self._read(stream, requests), name="sds: requests")
        self.streams += 1
        try:
            while True:
                await stream.wake.wait()
                stream.wake.clear()
                if stream.error:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, stream.error)
                answer = stream.answer()
                if answer is not None:
                    yield answer
                elif stream.ended:
                    return
        finally:
            self.streams -= 1
            reader.cancel()
            stream.close()

    async def _read(self, stream: _Stream, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            if request.HasField("error_detail"):
                self.refused += 1
                log.warning("a proxy refused a secret: %s", request.error_detail.message[:1000])
            stream.asked(request)
        stream.ended = True
        stream.wake.set()


class _Stream:
    """One stream, state of the world: what it wants, and the version of each secret that it was sent."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._watches: dict[str, Watch] = {}
        self._sent: dict[str, str] = {}
        self._nonce = 0
        self._again = False  # an answer is due although no secret has changed
        self.wake = asyncio.Event()
        self.error = ""
        self.ended = False

    def asked(self, request: Any) -> None:
        """A request has come."""
        if not self._fits(request):
            return
        if request.response_nonce and request.response_nonce != str(self._nonce):
            return  # of an answer that is not the last one: what it says is out of date
        names = set(request.resource_names)
        if not request.response_nonce:
            self._again = True  # a first request is answered whatever version the proxy has: it may have been another server's
        self._want(names - self._watches.keys())
        self._drop(self._watches.keys() - names)

    def answer(self) -> bytes | None:
        """What is to be sent now: all that is wanted, if something of it is new."""
        found = self._found()
        if not found or not (self._again or self._news(found)):
            return None
        self._again = False
        self._sent = {secret.name: secret.version for secret in found}
        self._nonce += 1
        return _response(found, str(self._nonce))

    def close(self) -> None:
        """The stream is gone."""
        self._drop(list(self._watches))

    def _fits(self, request: Any) -> bool:
        if request.type_url not in ("", TYPE_URL):
            self.error = f"this serves {TYPE_URL} only"
        elif max(len(getattr(request, "resource_names", ())), len(self._watches) + len(getattr(request, "resource_names_subscribe", ()))) > _MAX_NAMES:
            self.error = f"more than {_MAX_NAMES} secrets are wanted"
        self.wake.set()
        return not self.error

    def _found(self) -> list[Secret]:
        return [secret for name in sorted(self._watches) if (secret := self._provider.get(name)) is not None]

    def _news(self, found: list[Secret]) -> list[Secret]:
        return [secret for secret in found if self._sent.get(secret.name) != secret.version]

    def _want(self, names: Iterable[str]) -> None:
        for name in names:
            self._watches[name] = self._provider.watch(name, lambda _: self.wake.set())

    def _drop(self, names: Iterable[str]) -> None:
        for name in list(names):
            self._watches.pop(name).close()
            self._sent.pop(name, None)


class _DeltaStream(_Stream):
    """One delta stream."""

    def asked(self, request: Any) -> None:
        """A request has come; an answer to an answer says nothing that matters here."""
        if not self._fits(request):
            return
        self._sent.update(request.initial_resource_versions)
        for name in request.resource_names_subscribe:
            if name in self._watches:
                self._sent.pop(name, None)  # asked for once more: it wants to be answered
        self._want(name for name in dict.fromkeys(request.resource_names_subscribe) if name not in self._watches)
        self._drop(name for name in dict.fromkeys(request.resource_names_unsubscribe) if name in self._watches)

    def answer(self) -> bytes | None:
        """What is new."""
        found = self._news(self._found())
        if not found:
            return None
        self._sent.update({secret.name: secret.version for secret in found})
        self._nonce += 1
        response = messages.known(f"{_D}DeltaDiscoveryResponse")(type_url=TYPE_URL, nonce=str(self._nonce), system_version_info=str(self._nonce))
        for secret in found:
            response.resources.add(name=secret.name, version=secret.version).resource.CopyFrom(_any(secret))
        return bytes(response.SerializeToString())


def _response(secrets: list[Secret], nonce: str) -> bytes:
    version = ".".join(secret.version for secret in secrets)
    response = messages.known(f"{_D}DiscoveryResponse")(type_url=TYPE_URL, nonce=nonce, version_info=version)
    for secret in secrets:
        response.resources.append(_any(secret))
    return bytes(response.SerializeToString())


def _any(secret: Secret) -> Any:
    return any_pb2.Any(type_url=TYPE_URL, value=secret.proto.SerializeToString())
