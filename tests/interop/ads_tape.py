"""Sessions of somebody else's control plane: recorded between it and our sidecar, and played to our sidecar again.

A `Tape` is a list of events: ["step", name], ["request", the request as a mapping], ["response", its bytes as base64], ["cut"]. Requests are kept without
the node (only whether they had one) and without the words of a refusal. `Tap` records, `Player` is the control plane of a tape.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format

from meshproxy.api import messages

_D = "envoy.service.discovery.v3."
SERVICE = f"{_D}AggregatedDiscoveryService"
LIMIT_S = 20.0
PAUSE_S = 0.1  # between responses that are recorded


def readable(data: bytes, delta: bool) -> dict[str, Any]:
    """A request as it is kept."""
    request = messages.known(f"{_D}DeltaDiscoveryRequest" if delta else f"{_D}DiscoveryRequest").FromString(data)
    has_node = request.HasField("node")
    request.ClearField("node")
    request.error_detail.message = ""
    if not request.error_detail.code:
        request.ClearField("error_detail")
    found: dict[str, Any] = json_format.MessageToDict(request, preserving_proto_field_name=True)
    return found | ({"node": True} if has_node else {})


def nonce_of(data: bytes, delta: bool) -> str:
    """The nonce of a response."""
    return str(messages.known(f"{_D}DeltaDiscoveryResponse" if delta else f"{_D}DiscoveryResponse").FromString(data).nonce)


class Server:
    """ADS with a handler of raw messages, on a port of its own."""

    def __init__(self) -> None:
        self.port = 0
        self.changed = asyncio.Condition()
        self._server = grpc.aio.server()

    async def start(self) -> None:
        async def sotw(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for data in self.serve(requests, context, delta=False):
                yield data

        async def delta(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for data in self.serve(requests, context, delta=True):
                yield data

        methods = {
            "StreamAggregatedResources": grpc.stream_stream_rpc_method_handler(sotw),
            "DeltaAggregatedResources": grpc.stream_stream_rpc_method_handler(delta),
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, methods)])
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    def serve(self, requests: AsyncIterator[bytes], context: Any, *, delta: bool) -> AsyncIterator[bytes]:
        """One stream."""
        raise NotImplementedError

    async def tell(self) -> None:
        """Something has changed."""
        async with self.changed:
            self.changed.notify_all()

    async def until(self, enough: Any) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(LIMIT_S), self.changed:
            while not enough():
                await self.changed.wait()


class Tap(Server):
    """Passes everything on to the control plane at `port`, and records it.

    But for one thing: it keeps refusals of the state of the world back until `release`. go-control-plane answers each of them at once with what was refused.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self.events: list[list[Any]] = []
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._call: Any = None
        self._waiting: set[str] = set()  # nonces
        self._held: list[bytes] = []
        self._forward: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def stop(self) -> None:
        await super().stop()
        await self._channel.close()

    def step(self, name: str) -> None:
        """What follows is another part of the story."""
        self.events.append(["step", name])

    def release(self) -> None:
        """Pass the refusals on that were kept back."""
        for data in self._held:
            self._forward.put_nowait(data)
        self._held.clear()

    async def cut(self) -> None:
        """End the stream."""
        self.events.append(["cut"])
        self._waiting.clear()
        self._call.cancel()

    async def settled(self) -> None:
        """Wait until every response has been answered."""
        try:
            await self.until(lambda: not self._waiting)
        except TimeoutError:
            raise AssertionError(f"never answered: {self._waiting}; {self.events[-6:]}") from None

    async def serve(self, requests: AsyncIterator[bytes], context: Any, *, delta: bool) -> AsyncIterator[bytes]:  # type: ignore[override]
        forward = self._forward = asyncio.Queue()

        async def read() -> None:
            async for data in requests:
                seen = readable(data, delta)
                self.events.append(["request", seen])
                self._waiting.discard(seen.get("response_nonce", ""))
                if "error_detail" in seen and not delta:
                    self._held.append(data)
                else:
                    forward.put_nowait(data)
                await self.tell()
            forward.put_nowait(None)

        async def passed() -> AsyncIterator[bytes]:
            while (data := await forward.get()) is not None:
                yield data

        reader = asyncio.create_task(read())
        name = f"/{SERVICE}/{'Delta' if delta else 'Stream'}AggregatedResources"
        self._call = self._channel.stream_stream(name)(passed())
        try:
            async for data in self._call:
                self.events.append(["response", base64.b64encode(data).decode()])
                nonce = nonce_of(data, delta)
                self._waiting.add(nonce)
                yield data
                # One after the other, each with all that follows from it: what is asked must not depend on how much came at once. That nothing more follows
                # shows only in time.
                await self.until(lambda nonce=nonce: nonce not in self._waiting)
                await asyncio.sleep(PAUSE_S)
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream was cut")
        finally:
            reader.cancel()


class Player(Server):
    """The control plane of a recording: says what was said, byte for byte, once it has heard what had been heard. `wrong`: what it heard instead."""

    def __init__(self, events: list[list[Any]]) -> None:
        super().__init__()
        self._events = events
        self._at = 0
        self._step = ""
        self._heard: dict[str, list[dict[str, Any]]] = {}
        self._taken: dict[str, int] = {}
        self.wrong: list[str] = []

    @property
    def over(self) -> bool:
        """Whether all of it was played, or it cannot go on."""
        return bool(self.wrong) or self._at == len(self._events)

    async def begin(self, name: str) -> None:
        """Let the part of that name be played."""
        self._step = name
        await self.tell()

    async def finished(self) -> None:
        """Wait until the part is over."""
        await self.until(lambda: self.over or (self._events[self._at][0] == "step" and self._events[self._at][1] != self._step))
        assert not self.wrong, self.wrong

    async def _read(self, requests: AsyncIterator[bytes], delta: bool) -> None:
        async for data in requests:
            seen = readable(data, delta)
            self._heard.setdefault(seen["type_url"], []).append(seen)
            await self.tell()

    def _expect(self, wanted: dict[str, Any]) -> bool:
        """Whether the next request of a type has come; what is another one is noted. Which type is asked for first is nobody's business."""
        url = wanted["type_url"]
        at = self._taken.get(url, 0)
        heard = self._heard.get(url, [])
        if at == len(heard):
            return False
        self._taken[url] = at + 1
        if heard[at] != wanted:
            self.wrong.append(f"{url}: request {at}: {json.dumps(heard[at])} instead of {json.dumps(wanted)}")
        return True

    async def serve(self, requests: AsyncIterator[bytes], context: Any, *, delta: bool) -> AsyncIterator[bytes]:  # type: ignore[override]
        reader = asyncio.create_task(self._read(requests, delta))
        try:
            while not self.over:
                kind, *what = self._events[self._at]
                if kind == "step":
                    await self.until(lambda name=what[0]: self._step == name)
                elif kind == "request":
                    with contextlib.suppress(TimeoutError):
                        await self.until(lambda wanted=what[0]: self._expect(wanted))
                        self._at += 1
                        await self.tell()
                        continue
                    self.wrong.append(f"never asked: {json.dumps(what[0])}")
                elif kind == "response":
                    yield base64.b64decode(what[0])
                self._at += 1
                await self.tell()
                if kind == "cut":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream was cut")
            await self.tell()
            await reader  # the client ends it
        finally:
            reader.cancel()


def save(path: Path, note: str, events: list[list[Any]]) -> None:
    """Write a tape."""
    lines = ",\n".join("  " + json.dumps(event) for event in events)
    path.write_text(f'{{\n "note": {json.dumps(note)},\n "events": [\n{lines}\n ]\n}}\n')


def load(path: Path) -> list[list[Any]]:
    """Read a tape."""
    found: list[list[Any]] = json.loads(path.read_text())["events"]
    return found
