"""What one worker (or main, for its own listeners) shares among its parts: wired once, in `worker.py` or `supervisor.py`, then passed down.

Nothing here is global: tests build a `Context` with a fake clock and a seeded random.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.record import Record, field

if TYPE_CHECKING:
    import asyncio

    from meshproxy.net.timers import Timers
    from meshproxy.observe.stats import Store
    from meshproxy.upstream.cluster_manager import ClusterManager


class Changes:
    """How often something changed that decides how requests are handled (clusters, runtime, draining): plans (http.plan) of before are void."""

    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Context(Record):
    """The surroundings of a compiled configuration. Attributes are set before anything is compiled and never replaced."""

    loop: asyncio.AbstractEventLoop
    stats: Store
    timers: Timers
    clusters: ClusterManager = None  # type: ignore[assignment]  # set by the worker right after; clusters need the context themselves
    runtime: Any = None  # api.runtime.Runtime
    secrets: Any = None  # api.secrets.Secrets; None where there are none
    routes: Any = None  # http.route_configs.RouteConfigs; None where nothing comes by discovery
    extensions: Any = None  # http.extension_configs.ExtensionConfigs; None where nothing comes by discovery
    demand: Any = None  # http.demand.Demand; None where nothing comes by discovery
    access_logs: Any = None  # observe.access_log.Sinks: shared open files
    drain: Any = None  # net.listener.Drain
    node: Any = None  # envoy.config.core.v3.Node
    cells: Any = None  # net.shared.Cells: numbers that all workers share; None where there is one worker
    tls_contexts: Any = None  # see net.tls.compile_downstream; None where there is one worker
    ticket_seed: bytes = b""  # see net.tickets; empty where no listener comes after the fork
    shared: dict[Any, Any] = field(default_factory=dict)  # objects that several filters have in common, each under a key of its own
    changes: Changes = field(default_factory=Changes)
    worker_id: int = 0
    concurrency: int = 1
    random: random.Random = field(default_factory=random.Random)
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
