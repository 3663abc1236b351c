"""A worker process: compiles the configuration that it inherited from main, moves traffic, does what main says.

A worker holds no truth. It can be killed at any time: main forks another, which compiles the same configuration and is told what has changed since.
`dry_run` is the same compilation in main, without sockets, to find every mistake before anything listens.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import marshal
import socket
from typing import TYPE_CHECKING, Any

from meshproxy import process
from meshproxy.api import errors, messages, secrets
from meshproxy.api.errors import ConfigError
from meshproxy.api.runtime import Runtime
from meshproxy.channel import Channel, Kind
from meshproxy.context import Context
from meshproxy.http import extension_configs, route_configs
from meshproxy.http.demand import Demand
from meshproxy.http.extension_configs import ExtensionConfigs
from meshproxy.http.route_configs import RouteConfigs
from meshproxy.net.drain import Drain
from meshproxy.net.listener import Listener, ListenerRegistry
from meshproxy.net.tasks import spawn
from meshproxy.net.timers import Timers
from meshproxy.observe.access_log import Sinks
from meshproxy.observe.stats import Store
from meshproxy.record import Record, field, replace
from meshproxy.upstream import cluster_manager

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy import server
    from meshproxy.cli import Options
    from meshproxy.logs import Handler, Levels
    from meshproxy.net.filter_chain import FilterChain
    from meshproxy.net.shared import Cells
    from meshproxy.upstream.loads import Loads

log = logging.getLogger("meshproxy.main")

_LISTENER = "envoy.config.listener.v3.Listener"
STATS_INTERVAL = 1.0  # seconds between frames of what was counted
LAST_SPANS_LIMIT = 1.0  # seconds that a process that is to end waits for a collector
STOP_SPANS_LIMIT = 0.5  # when the process is to end at once
IDLE_CHECK_INTERVAL = 0.02  # seconds, while leaving
# Allocations before the collector looks at the youngest objects, and how many such runs until it looks at older ones. Requests leave no cycles behind, so
# the collector finds little; the defaults (700, 10, 10) would look seventy times more often.
GC_THRESHOLDS = (50_000, 20, 100)
# Bytes of configuration, as it came, that may be replaced until the collector looks at everything: what was made of it is old by then, and full of cycles.
GC_AFTER_UPDATES = 512 << 10


class Plan(Record):
    """What a worker inherits from main by being forked. `listeners` are main's, with each worker's sockets."""

    options: Options
    concurrency: int
    levels: Levels
    log_handler: Handler
    bootstrap: bytes = b""  # serialised envoy.config.bootstrap.v3.Bootstrap
    node: Any = None  # envoy.config.core.v3.Node
    cells: Cells | None = None
    unknown_fields: int = 0  # of the bootstrap, where they are allowed
    deprecated_fields: int = 0
    tls_contexts: dict[bytes, Any] | None = None  # the contexts of listeners: workers share their session tickets
    ticket_seed: bytes = b""  # from which the ticket keys of contexts follow that workers make themselves
    listeners: list[server.Listener] = field(default_factory=list)
    routes: RouteConfigs | None = None  # main's; None where nothing comes by discovery
    secrets: dict[bytes, bytes] | None = None  # those that came by discovery, as api.secrets.Secrets has them; None where none can
    extensions: dict[bytes, bytes] | None = None  # of HTTP filters, as http.extension_configs has them; None where none can come
    runtime_layers: dict[str, bytes] = field(default_factory=dict)  # those by discovery, as google.protobuf.Struct
    clusters: cluster_manager.ClusterManager | None = None  # main's

    def sockets(self, index: int) -> list[list[socket.socket]]:
        """The listening sockets of one worker: a list per listener, none for a listener that was stopped."""
        return [listener.sockets[index] for listener in self.listeners]

    def descriptors(self, index: int) -> set[int]:
        """What that worker keeps open."""
        return {sock.fileno() for own in self.sockets(index) for sock in own} | ({self.cells.fileno()} if self.cells is not None else set())


def make_context(loop: asyncio.AbstractEventLoop | None, bootstrap: Any, plan: Plan, worker_id: int) -> Context:
    """The surroundings of a compilation. Raises ConfigError."""
    accepts = None
    if bootstrap.HasField("stats_config"):
        from meshproxy.observe.tags import StatsConfig

        with errors.under("stats_config"):
            accepts = StatsConfig(bootstrap.stats_config).accepts
    stats = Store(accepts)
    context = Context(loop=loop, stats=stats, timers=None, worker_id=worker_id, concurrency=plan.concurrency, node=plan.node)  # type: ignore[arg-type]
    context.timers = Timers(loop, context.clock)  # type: ignore[arg-type]  # a dry run has no loop, and starts no timer
    context.cells = plan.cells
    context.tls_contexts = plan.tls_contexts
    context.ticket_seed = plan.ticket_seed if worker_id >= 0 else b""
    if bootstrap.static_resources.secrets or plan.secrets is not None:
        with errors.under("static_resources.secrets"):
            context.secrets = secrets.Secrets(bootstrap.static_resources.secrets, plan.secrets)
    with errors.under("layered_runtime"):
        context.runtime = Runtime.from_proto(bootstrap.layered_runtime, plan.node.cluster)
    for layer in plan.runtime_layers.items():
        context.runtime.replace_layer(*layer)
    options = plan.options
    context.access_logs = Sinks(context, flush_interval=options.file_flush_interval_msec / 1000, min_size=options.file_flush_min_size_kb * 1024)
    context.drain = Drain(context.clock, context.random, options.drain_time_s, immediate=options.drain_strategy == "immediate")
    context.clusters = cluster_manager.ClusterManager(context, bootstrap.cluster_manager if bootstrap.HasField("cluster_manager") else None)
    return context


def dry_run(bootstrap: Any, plan: Plan) -> None:
    """Compile everything and throw it away. Raises ConfigError with every problem found."""
    context = make_context(None, bootstrap, plan, worker_id=0)
    config = bootstrap.cluster_manager if bootstrap.HasField("cluster_manager") else None
    validator = cluster_manager.Validator(context, config)
    problems = errors.Collector()
    for at, cluster in enumerate(bootstrap.static_resources.clusters):
        with problems.under(f"static_resources.clusters[{at}]"):
            context.clusters.add(cluster)
            validator.check(cluster)
    for at, listener in enumerate(bootstrap.static_resources.listeners):
        with problems.under(f"static_resources.listeners[{at}]"):
            Listener(listener, [], context)
    if needs_discovery(bootstrap, bootstrap.SerializeToString()):
        from meshproxy import dynamic

        dynamic.check_sources(bootstrap, problems)
    problems.raise_any()


_EDS = 3


def needs_discovery(bootstrap: Any, serialised: bytes) -> bool:
    """Whether a bootstrap asks for anything that is not in it. `serialised`: the same bootstrap."""
    return (
        bootstrap.HasField("dynamic_resources")
        or bootstrap.cluster_manager.HasField("load_stats_config")
        or bootstrap.HasField("hds_config")
        or len(bootstrap.bootstrap_extensions) > 0  # the only one that there is gets secrets
        or any(layer.HasField("rtds_layer") for layer in bootstrap.layered_runtime.layers)
        or any(cluster.type == _EDS for cluster in bootstrap.static_resources.clusters)
        or any(True for listener in bootstrap.static_resources.listeners for _ in route_configs.managers(listener))
        or any(True for listener in bootstrap.static_resources.listeners for _ in extension_configs.filters(listener))
        or (
            secrets.TLS in serialised
            and any(True for holder in (*bootstrap.static_resources.listeners, *bootstrap.static_resources.clusters) for _ in secrets.references(holder))
        )
    )


def run(plan: Plan, index: int, channel_socket: socket.socket) -> None:
    """The life of a worker process, from just after the fork to its end."""
    process.name_process(f"meshproxy:{index}")
    import uvloop  # the supervisor has imported it: workers share its pages

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    gc.disable()
    Worker(plan, index, channel_socket, loop)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    gc.enable()
    loop.run_forever()


class Worker:
    """Wires one worker together and obeys main. Ends the loop on STOP, or when main is gone."""

    def __init__(self, plan: Plan, index: int, channel_socket: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._plan = plan
        self._loop = loop
        bootstrap = messages.known("envoy.config.bootstrap.v3.Bootstrap").FromString(plan.bootstrap)
        context = self._context = make_context(loop, bootstrap, plan, index)
        # Only inbound listeners are told of a drain of inbound listeners.
        self._inbound = replace(context, drain=Drain(context.clock, context.random, context.drain.seconds, immediate=context.drain.immediate))
        assert plan.clusters is not None
        context.clusters.inherit(plan.clusters)
        if plan.routes is not None:
            context.routes = RouteConfigs(plan.routes.serialised)
            context.extensions = ExtensionConfigs(plan.extensions)
            context.demand = Demand(lambda what, timeout: self._channel.send(Kind.DEMAND, marshal.dumps((what, timeout))))
            self._inbound.routes, self._inbound.extensions, self._inbound.demand = context.routes, context.extensions, context.demand
        self._registry = ListenerRegistry()
        self._accepting = self._left = False
        self._last_spans = 0.0  # when there was nothing else to wait for
        self._replaced = 0
        self._loads: Loads | None = None  # made when main first asks
        self._listeners: dict[int, Listener] = {}  # by main's keys
        self._past: list[Listener] = []  # replaced or removed, and still with connections
        self._retired: dict[int, list[FilterChain]] = {}  # key of a listener -> its filter chains that take no new connections
        for known, sockets in zip(plan.listeners, plan.sockets(index), strict=True):
            proto = messages.known(_LISTENER).FromString(known.serialised)
            self._listeners[known.key] = Listener(proto, sockets, self._context_for(proto), self._registry)
        self._channel = Channel(channel_socket, loop, self._on_message, self._stop)
        self._handlers: dict[Kind, Callable[[bytes], object]] = {
            Kind.START: self._start,
            Kind.ENDPOINTS: self._endpoints,
            Kind.HEALTH: self._health,
            Kind.DRAIN: self._drain,
            Kind.STOP_LISTENERS: self._stop_listeners,
            Kind.LEAVE: self._leave,
            Kind.STOP: lambda body: self._stop(),
            Kind.HEALTHCHECK_FAIL: self._fail_health_checks,
            Kind.LOG_LEVEL: lambda body: plan.levels.update(marshal.loads(body)),
            Kind.RUNTIME: self._modify_runtime,
            Kind.RUNTIME_LAYER: self._replace_runtime_layer,
            Kind.REOPEN_LOGS: self._reopen_logs,
            Kind.EJECTED: lambda body: context.clusters.eject(*marshal.loads(body)),
            Kind.CLUSTER: self._cluster,
            Kind.CLUSTER_REMOVED: lambda body: context.clusters.remove(*marshal.loads(body)),
            Kind.LISTENER_REMOVED: self._remove_listener,
            Kind.LISTENER_DRAINED: self._close_drained,
            Kind.ROUTES: self._routes,
            Kind.EXTENSION: lambda body: context.extensions.update(*marshal.loads(body)),
            Kind.DEMANDED: self._demanded,
            Kind.SECRET: lambda body: context.secrets.update(*marshal.loads(body)),
        }
        context.clusters.on_immediate_failure = lambda cluster, address: self._channel.send(Kind.FAILED, marshal.dumps((cluster, address)))
        context.clusters.on_eject = lambda cluster, address: self._channel.send(Kind.EJECTED, marshal.dumps((cluster, address)))
        self._channel.send(Kind.READY)
        self._loop.call_later(STATS_INTERVAL, self._tick)

    def _on_message(self, kind: Kind, body: bytes, fds: list[int], request_id: int) -> None:
        if kind is Kind.STATS:
            self._send_stats()
            self._channel.reply(request_id)
        elif kind is Kind.LISTENER:
            self._listener(body, fds)
        elif kind is Kind.COLLECT:
            self._channel.reply(request_id, marshal.dumps(self._collect(body.decode())))
        else:
            self._handlers[kind](body)

    # -- what main says

    def _modify_runtime(self, body: bytes) -> None:
        self._context.runtime.modify(marshal.loads(body))
        self._runtime_changed()

    def _replace_runtime_layer(self, body: bytes) -> None:
        self._context.runtime.replace_layer(*marshal.loads(body))
        self._runtime_changed()

    def _runtime_changed(self) -> None:
        self._context.clusters.runtime_changed()
        self._context.changes.n += 1

    def _start(self, body: bytes) -> None:
        self._accepting = True
        for listener in self._listeners.values():
            spawn(f"start {listener.name}", listener.start())

    def _endpoints(self, body: bytes) -> None:
        name, assignment = marshal.loads(body)
        self._context.clusters.update_endpoints(name, assignment)

    def _health(self, body: bytes) -> None:
        name, flags = marshal.loads(body)
        self._context.clusters.set_health(name, flags)

    # -- what main says of dynamic configuration: docs/decisions/0010-updates.md

    def _updated(self, size: int) -> None:
        """So much configuration, in bytes, is in the place of other."""
        self._replaced += size
        if self._replaced >= GC_AFTER_UPDATES:
            self._replaced = 0
            self._loop.call_soon(gc.collect)

    def _cluster(self, body: bytes) -> None:
        self._updated(len(body))
        self._context.clusters.take(*marshal.loads(body))

    def _routes(self, body: bytes) -> None:
        self._updated(len(body))
        key, serialised = marshal.loads(body)
        if serialised:
            self._context.routes.update(key, serialised)
        else:
            self._context.routes.forget(key)

    def _demanded(self, body: bytes) -> None:
        what, found = marshal.loads(body)
        self._context.demand.answered(what, found=found)

    def _context_for(self, proto: Any) -> Context:
        return self._inbound if proto.traffic_direction == 1 else self._context

    def _listener(self, body: bytes, fds: list[int]) -> None:
        """A new listener, or one in the place of another: its sockets may be the same, then connections that wait there are accepted by this one."""
        key, serialised, replaces, same_but_chains = marshal.loads(body)
        proto = messages.known(_LISTENER).FromString(serialised)
        old = self._listeners.get(replaces)
        own = [socket.socket(fileno=fd) for fd in fds]
        try:
            listener = Listener(proto, own, self._context_for(proto), self._registry, old if same_but_chains else None)
        except ConfigError as error:  # what main has found right: files have changed since
            log.error("listener %s: it stays as it was: %s", proto.name, error)
            for sock in own:
                sock.close()
            return
        self._listeners[key] = listener
        if old is not None:
            del self._listeners[replaces]
            self._retire(replaces, old, listener.chains)
        if self._accepting and not self._left:
            spawn(f"start {listener.name}", listener.start())

    def _retire(self, key: int, listener: Listener, kept: list[FilterChain]) -> None:
        """A listener takes no more connections; those whose filter chains are not kept by another one are told to end."""
        listener.stop_accepting()
        gone = self._retired[key] = [chain for chain in listener.chains if chain not in kept]
        for chain in gone:
            chain.retire()
        self._past = [past for past in self._past if past.active]
        self._past.append(listener)

    def _remove_listener(self, body: bytes) -> None:
        key = marshal.loads(body)
        listener = self._listeners.pop(key, None)
        if listener is not None:
            self._retire(key, listener, [])

    def _close_drained(self, body: bytes) -> None:
        key, scopes, size = marshal.loads(body)
        self._updated(size)
        gone = self._retired.pop(key, [])
        for listener in (*self._past, *self._listeners.values()):
            listener.close_connections(gone)
        self._loop.call_soon(self._dispose, gone, scopes)

    def _dispose(self, chains: list[FilterChain], scopes: list[str]) -> None:
        """The last connections of these filter chains are closed, and have been counted."""
        for chain in chains:
            chain.dispose()
        self._past = [past for past in self._past if past.active]
        if scopes:
            self._context.stats.remove(*scopes)

    # -- what main says of the end

    def _drain(self, body: bytes) -> None:
        self._inbound.drain.start()
        if not marshal.loads(body)["inbound_only"]:
            self._context.drain.start()

    def _stop_listeners(self, body: bytes) -> None:
        inbound_only = marshal.loads(body)["inbound_only"]
        for listener in self._listeners.values():
            if listener.inbound or not inbound_only:
                listener.stop_accepting()

    def _leave(self, body: bytes) -> None:
        """Accept no more, close what is idle, and say so when nothing is left."""
        for drain in (self._inbound.drain, self._context.drain):
            drain.start()
        self._left = True
        for listener in (*self._past, *self._listeners.values()):
            listener.stop_accepting()
            listener.drain()
        self._wait_idle()

    def _wait_idle(self) -> None:
        if any(listener.active for listener in (*self._past, *self._listeners.values())) or self._sends_spans(LAST_SPANS_LIMIT):
            self._loop.call_later(IDLE_CHECK_INTERVAL, self._wait_idle)
        else:
            self._channel.send(Kind.IDLE)

    def _sends_spans(self, limit: float) -> bool:
        """Whether spans of the last requests are still on their way, for `limit` seconds at most; those that wait are sent now."""
        batches = self._context.shared.get("span batches", ())
        for batch in batches:
            batch.flush()
        self._last_spans = self._last_spans or self._loop.time()
        return any(batch.busy for batch in batches) and self._loop.time() < self._last_spans + limit

    def _fail_health_checks(self, body: bytes) -> None:
        for drain in (self._inbound.drain, self._context.drain):
            drain.set_health_failed(marshal.loads(body))

    def _reopen_logs(self, body: bytes) -> None:
        self._plan.log_handler.reopen()
        self._context.access_logs.reopen()

    def _stop(self) -> None:
        """Flush what is buffered, tell main the last figures, and end."""
        if not self._channel.closed and self._sends_spans(STOP_SPANS_LIMIT):
            self._loop.call_later(IDLE_CHECK_INTERVAL, self._stop)
            return
        self._context.access_logs.flush()
        if not self._channel.closed:
            self._send_stats()
            self._channel.flush_blocking(1.0)
        self._loop.stop()

    # -- what main wants to know

    def _tick(self) -> None:
        # A main that does not read is busy; what was counted waits here, not in its queue.
        if self._channel.writable:
            self._send_stats()
        self._loop.call_later(STATS_INTERVAL, self._tick)

    def _send_stats(self) -> None:
        self._context.clusters.publish()
        self._channel.send(Kind.STATS, self._context.stats.deltas())

    def _collect(self, what: str) -> Any:
        if what == "clusters":
            from meshproxy.upstream import status

            return status.snapshot(self._context.clusters)
        if what == "loads":
            if self._loads is None:
                from meshproxy.upstream.loads import Loads

                self._loads = Loads(self._context.clusters)
            return self._loads.take()
        if what == "memory":
            from meshproxy.admin.info import memory_of_self

            return memory_of_self()
        raise ValueError(what)
