"""What the tests of filters share: a context with a fake clock, a stream that is only attributes, configuration from YAML."""

from __future__ import annotations

import random
from typing import Any

from meshproxy.api import convert, document, messages
from meshproxy.api.runtime import Layer, Runtime, parse_entry
from meshproxy.codec.headers import RequestHead, ResponseHead
from meshproxy.context import Context
from meshproxy.http.filters import FilterContext
from meshproxy.net.address import Address
from meshproxy.net.connection import ConnectionInfo
from meshproxy.net.filter_chain import NetworkContext
from meshproxy.observe.stats import Store
from meshproxy.observe.stream_info import StreamInfo


class Clock:
    """Time stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Drain:
    health_failed = False


class Stream(StreamInfo):
    """A stream as filters see it. `body` is what `buffered_request` finds."""

    def __init__(self, path: bytes = b"/", headers: Any = (), *, method: bytes = b"GET", body: bytes = b"", route: Any = None) -> None:
        self.request = RequestHead(method, path, b"example.com", list(headers))
        self.response = ResponseHead(200, [])
        self.connection = connection()
        self.locals: dict[Any, Any] = {}
        self.health_check = False
        self.body = body
        self.bytes_received = len(body)
        self.route = route

    async def buffered_request(self, limit: int) -> bool:
        return len(self.body) <= limit


class Route:
    """A route as filters see it."""

    action = "forward"
    cluster_name: str | None = "up"
    metadata: Any = None
    include_vh_rate_limits = False

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def connection(id: int = 1, remote: str = "10.0.0.1:1234", local: str = "10.0.0.2:80") -> ConnectionInfo:
    return ConnectionInfo(id, Address.parse(remote), Address.parse(local), 0.0)


def proto(name: str, text: str = "{}") -> Any:
    """A message of the Envoy API from YAML."""
    cls = messages.message_class(name)
    assert cls is not None, name
    return convert.to_message(document.parse(text), cls)


def context(runtime: dict[str, str] | None = None, *, mutable: bool = False, concurrency: int = 1, clusters: Any = None) -> FilterContext:
    """A filter context. `runtime`: keys of a static layer; `mutable`: with an admin layer after it."""
    layers = [Layer("static", {key: parse_entry(value) for key, value in (runtime or {}).items()})]
    if mutable:
        layers.append(Layer("admin", admin=True))
    store = Store()
    made = Context(
        loop=None,  # type: ignore[arg-type]
        stats=store,
        timers=None,  # type: ignore[arg-type]
        clusters=clusters,
        runtime=Runtime(layers),
        drain=Drain(),
        node=proto("envoy.config.core.v3.Node", "{id: node, cluster: local}"),
        clock=Clock(),
        random=random.Random(1),
        concurrency=concurrency,
    )
    return FilterContext(made, store.scope("http.ing."), "ing")


def network_context(base: FilterContext | None = None) -> NetworkContext:
    made = (base or context()).context
    return NetworkContext(made, made.stats.scope(""), None, "listener.l.")


def counters(ctx: Any) -> dict[str, int]:
    """Every counter and gauge that is not 0, by name."""
    return {name: metric.n for name, metric in ctx.context.stats._metrics.items() if getattr(metric, "n", 0)}


def run(awaitable: Any) -> Any:
    """The result of a coroutine that never really waits."""
    try:
        awaitable.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")
