"""Clusters for tests: from YAML, with a clock and a random of their own."""

from __future__ import annotations

import random
from typing import Any

import yaml
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import base_pb2

from meshproxy.api import convert
from meshproxy.context import Context
from meshproxy.observe.stats import Store
from meshproxy.upstream.cluster import Cluster
from meshproxy.upstream.cluster_manager import ClusterManager


class Clock:
    """Seconds, moved by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def context(*, seed: int = 1, clock: Clock | None = None, zone: str = "", **more: Any) -> Context:
    node = base_pb2.Node()
    if zone:
        node.locality.zone = zone
    return Context(loop=None, stats=Store(), timers=None, random=random.Random(seed), clock=clock or Clock(), node=node, **more)


def proto(text: str | dict[str, Any]) -> Any:
    return convert.to_message(yaml.safe_load(text) if isinstance(text, str) else text, cluster_pb2.Cluster)


def endpoint(address: str, **more: Any) -> dict[str, Any]:
    ip, _, port = address.rpartition(":")
    inner: dict[str, Any] = {"address": {"socket_address": {"address": ip.strip("[]"), "port_value": int(port)}}}
    for key in ("hostname", "health_check_config"):
        if key in more:
            inner[key] = more.pop(key)
    return {"endpoint": inner, **more}


def group(*endpoints: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    """A LocalityLbEndpoints of endpoints, which are addresses or dicts."""
    return {"lb_endpoints": [endpoint(one) if isinstance(one, str) else one for one in endpoints], **more}


def static(*groups: dict[str, Any], name: str = "c", policy: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A STATIC cluster as a dict."""
    assignment: dict[str, Any] = {"cluster_name": name, "endpoints": list(groups)}
    if policy:
        assignment["policy"] = policy
    return {"name": name, "type": "STATIC", "load_assignment": assignment, **fields}


def cluster(config: str | dict[str, Any], ctx: Context | None = None, **options: Any) -> Cluster:
    return Cluster(proto(config), ctx or context(), **options)


def manager(*configs: str | dict[str, Any], ctx: Context | None = None, config: Any = None) -> ClusterManager:
    made = ClusterManager(ctx or context(), config)
    for one in configs:
        made.add(proto(one))
    return made


def addresses(count: int, *, port: int = 80, start: int = 1) -> list[str]:
    """Different addresses that nobody listens on."""
    return [f"127.8.{index // 250}.{index % 250 + 1}:{port}" for index in range(start, start + count)]
