"""What the tests of routes share: tables from plain values, and streams that are only attributes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from envoy.config.route.v3 import route_pb2

from meshproxy.api import convert
from meshproxy.api.errors import ConfigError
from meshproxy.api.runtime import Layer, Runtime, parse_entry
from meshproxy.codec.headers import RequestHead, ResponseHead
from meshproxy.context import Context
from meshproxy.http.routes import Route, RouteTable
from meshproxy.net.address import Address
from meshproxy.observe.stats import Store
from meshproxy.observe.stream_info import StreamInfo


def context(runtime: dict[str, str] | None = None, *, mutable: bool = False, clusters: Any = None, seed: int = 1) -> Context:
    made = Context(loop=None, stats=Store(), timers=None, random=random.Random(seed))
    made.runtime = Runtime(
        [Layer("static", {key: parse_entry(text) for key, text in (runtime or {}).items()}), *([Layer("admin", admin=True)] if mutable else [])]
    )
    made.clusters = clusters
    return made


def proto(config: dict[str, Any]) -> route_pb2.RouteConfiguration:
    return convert.to_message(config, route_pb2.RouteConfiguration)


def table(config: dict[str, Any], ctx: Context | None = None, **options: Any) -> RouteTable:
    """A table that has been checked as a whole, so that every test also tests `check`."""
    made = RouteTable(proto({"name": "table", **config}), ctx or context(), **options)
    made.check()
    return made


def one_host(*routes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"virtual_hosts": [{"name": "host", "domains": ["*"], "routes": list(routes), **fields}]}


def to(cluster: str, match: dict[str, Any] | str = "/", **fields: Any) -> dict[str, Any]:
    """A route to a cluster; fields in `route` go to its RouteAction."""
    action = {"cluster": cluster, **fields.pop("route", {})}
    return {"match": {"prefix": match} if isinstance(match, str) else match, "route": action, **fields}


def stream(path: bytes = b"/", *items: tuple[bytes, bytes], host: bytes = b"host", method: bytes = b"GET", **attributes: Any) -> StreamInfo:
    made = StreamInfo()
    made.request = RequestHead(method, path, host, list(items))
    made.response = ResponseHead(200, [])
    made.connection = SimpleNamespace(tls=None, remote=Address("10.0.0.1", 1234), local=Address("10.0.0.2", 80))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def cluster_of(routes: RouteTable, *args: Any, **kwargs: Any) -> str | None:
    found = routes.match(stream(*args, **kwargs))
    return None if found is None else found.cluster_name


def only_route(*args: Any, ctx: Context | None = None, **fields: Any) -> Route:
    """The single route of a table made of `to(...)` arguments."""
    found = table(one_host(to(*args, **fields)), ctx).match(stream())
    assert found is not None
    return found


def problems(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Paths and reasons of what is wrong with a table."""
    with pytest.raises(ConfigError) as error:
        table(config)
    return [(problem.path, problem.why) for problem in error.value.problems]
