"""The main process: reads the configuration, starts the workers, answers admin, ends in order.

`run` is the whole life: check everything, bind, fork, wait until clusters are initialised, serve, drain. Main moves no traffic itself (admin aside), so
nothing that it does (parsing, resolving names, health checks, scrapes) delays a request. See docs/decisions/0001-process-model.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import marshal
import os
import signal
from typing import TYPE_CHECKING, Any

import uvloop  # noqa: F401  for the workers, which share the pages of what main has imported

from meshproxy import process, worker
from meshproxy.admin import certs
from meshproxy.admin.listener import AdminListener
from meshproxy.api import errors
from meshproxy.api.durations import seconds
from meshproxy.api.errors import ConfigError
from meshproxy.channel import Kind
from meshproxy.http import http2_connection  # noqa: F401  for the workers
from meshproxy.http.route_configs import RouteConfigs
from meshproxy.listeners import Listeners
from meshproxy.net.filter_chain import share_tls
from meshproxy.net.tasks import spawn
from meshproxy.server import Server
from meshproxy.server_stats import ServerStats
from meshproxy.upstream.discovery import Discovery
from meshproxy.workers import Events, Pool, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from meshproxy.dynamic import Dynamic


log = logging.getLogger("meshproxy.main")

FLUSH_INTERVAL = 5.0  # seconds of a histogram interval, unless the bootstrap says otherwise
START_ATTEMPTS = 3  # crashes in a row of a worker that never got ready, after which a start is given up


class Supervisor:
    """Main. Construction binds every socket (raises ConfigError with nothing left bound); `serve` runs until it is told to end."""

    def __init__(self, bootstrap: Any, plan: worker.Plan) -> None:
        options = plan.options
        self._options = options
        self._plan = plan
        self._loop = asyncio.new_event_loop()
        self._status = 0
        self._ending = False
        self._endpoints: dict[str, bytes] = {}  # cluster -> the last frame, for workers that start later
        self._health: dict[str, dict[str, int]] = {}  # cluster -> address -> flags
        self._all_ready = asyncio.Event()
        plan.tls_contexts = {} if plan.concurrency > 1 else None
        if worker.needs_discovery(bootstrap, plan.bootstrap):
            plan.routes, plan.secrets, plan.extensions, plan.ticket_seed = RouteConfigs(), {}, {}, os.urandom(32)
        self._context = worker.make_context(self._loop, bootstrap, plan, worker_id=-1)
        self._pool = Pool(
            plan.concurrency,
            self._loop,
            lambda index, channel_socket: worker.run(plan, index, channel_socket),
            plan.descriptors,
            Events(on_ready=self._on_ready, on_stats=self._on_stats, on_gone=self._on_gone, on_message=self._on_message, replay=self._replay),
        )
        self._listeners = Listeners(plan.listeners, self._pool, self._loop, self._context.stats, self._context.wall, plan.options.drain_time_s)
        clusters = plan.clusters = self._context.clusters
        for cluster in bootstrap.static_resources.clusters:
            clusters.add(cluster)
        self._server = Server(
            options=options,
            bootstrap_bytes=plan.bootstrap,
            node=plan.node,
            stats=self._context.stats,
            levels=plan.levels,
            log_handler=plan.log_handler,
            workers=self._pool,
            shut_down=self._exit,
            runtime=self._context.runtime,
            clusters=self._context.clusters,
            certificates=certs.Certificates(bootstrap, plan.bootstrap),
            listeners=plan.listeners,
            concurrency=plan.concurrency,
        )
        self._stats = ServerStats(self._server)
        self._stats.configured(plan.unknown_fields, plan.deprecated_fields)
        self._server.prepare_scrape = self._prepare_scrape
        self._flush_interval = seconds(bootstrap.stats_flush_interval) or FLUSH_INTERVAL
        self._discovery = Discovery(self._context.clusters, self._context, on_endpoints=self._on_endpoints, on_health=self._on_health)
        self._dynamic: Dynamic | None = None
        if plan.routes is not None:
            from meshproxy.dynamic import Dynamic
            from meshproxy.xds.clusters import Tell

            remember = Tell(self._cluster_changed, self._clusters_removed)
            self._dynamic = Dynamic(bootstrap, plan, self._context, self._pool, self._discovery, self._listeners, remember)
            self._server.dynamic = self._dynamic
            self._server.listeners_manager = self._listeners
        self._admin = self._bind(bootstrap)

    def _bind(self, bootstrap: Any) -> AdminListener | None:
        """Bind admin and every listener: all of them, or none."""
        problems = errors.Collector()
        admin = None
        if bootstrap.HasField("admin") and bootstrap.admin.HasField("address"):
            with problems.under("admin"):
                admin = AdminListener(bootstrap.admin, self._context)
        for at, listener in enumerate(bootstrap.static_resources.listeners):
            with problems.under(f"static_resources.listeners[{at}]"):
                self._listeners.add_static(listener)
        try:
            problems.raise_any()
            if self._plan.tls_contexts is not None:
                share_tls(bootstrap.static_resources.listeners, self._context)
        except ConfigError:
            self._close_listeners()
            if admin is not None:
                admin.close()
            raise
        return admin

    def _close_listeners(self) -> None:
        for listener in self._plan.listeners:
            listener.stop()
            for address in listener.addresses:
                if address.kind == "pipe" and not address.path.startswith("@"):
                    with contextlib.suppress(OSError):
                        os.unlink(address.path)

    # -- start -------------------------------------------------------------------------------------------------------------------------------------------

    def serve(self) -> int:
        """Start, and run until told to end; returns the exit status."""
        loop = self._loop
        asyncio.set_event_loop(loop)
        # Envoy ignores a hang-up too: a sidecar outlives the terminal that started it.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        loop.add_signal_handler(signal.SIGTERM, self._drain)
        loop.add_signal_handler(signal.SIGINT, self._exit)
        loop.add_signal_handler(signal.SIGUSR1, self._server.reopen_logs)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        loop.call_soon(self._start)
        try:
            loop.run_forever()
        finally:
            self._close_listeners()
            if self._dynamic is not None:
                self._dynamic.close()
            self._context.access_logs.flush()
        return self._status

    def _start(self) -> None:
        process.name_process("meshproxy")
        self._pool.start()
        self._stats.listeners_added(len(self._server.listeners))
        if self._admin is not None:
            self._admin.start(self._server)
            log.info("admin address: %s", self._admin.address.text)
            self._write_admin_address(self._admin.address.text)
        spawn("initialise", self._initialise())

    def _write_admin_address(self, address: str) -> None:
        path = self._options.admin_address_path
        if not path:
            return
        try:
            # Whole or not at all: somebody may be waiting for the file.
            with open(f"{path}.tmp", "w") as file:
                file.write(address)
            os.replace(f"{path}.tmp", path)
        except OSError as error:
            log.critical("cannot open admin address output file %s for writing: %s", path, error.strerror)

    async def _initialise(self) -> None:
        """Wait for what must be there before traffic: workers that have compiled, first answers of DNS, first health checks."""
        self._discovery.start()
        await self._all_ready.wait()
        await self._discovery.wait_initialised()
        if self._dynamic is not None:
            await self._dynamic.initialise()
        self._pool.broadcast(Kind.START)
        self._server.initialized = True
        self._stats.initialized()
        log.info("all clusters are initialised, %d workers accept connections", self._plan.concurrency)
        self._loop.call_later(self._flush_interval, self._flush_stats)
        if self._options.mode == "init_only":
            self._exit()

    def _flush_stats(self) -> None:
        self._server.stats.flush()
        self._loop.call_later(self._flush_interval, self._flush_stats)

    def _prepare_scrape(self) -> Iterator[None]:
        self._context.clusters.publish()
        yield from self._context.clusters.publish_unused()
        self._stats.update()

    # -- workers -----------------------------------------------------------------------------------------------------------------------------------------

    def _on_ready(self, one: Worker) -> None:
        self._server.workers_ready = sum(each.ready for each in self._pool.workers)
        if self._server.workers_ready == self._plan.concurrency:
            self._all_ready.set()

    def _on_stats(self, one: Worker, frame: bytes) -> None:
        self._server.stats.merge(one.index, frame)

    def _on_gone(self, one: Worker) -> None:
        self._server.stats.drop_worker(one.index)
        self._server.workers_ready = sum(each.ready for each in self._pool.workers)
        if self._ending:
            return
        self._stats.worker_restarts.n += 1
        if not self._server.initialized and one.crashes + 1 >= START_ATTEMPTS:
            log.critical("worker %d cannot start; giving up", one.index)
            self._status = 1
            self._exit()

    def _replay(self, one: Worker) -> None:
        """Tell a new worker what happened before it."""
        channel, server = one.channel, self._server
        assert channel is not None
        for frame in self._endpoints.values():
            channel.send(Kind.ENDPOINTS, frame)
        for entry in self._health.items():
            channel.send(Kind.HEALTH, marshal.dumps(entry))
        if server.runtime.overrides:
            channel.send(Kind.RUNTIME, marshal.dumps(server.runtime.overrides))
        if server.health_failed:
            channel.send(Kind.HEALTHCHECK_FAIL, marshal.dumps(True))
        if server.drain_inbound_since is not None or server.drain_all_since is not None:
            channel.send(Kind.DRAIN, marshal.dumps({"inbound_only": server.drain_all_since is None}))
        if server.initialized:
            channel.send(Kind.START)
        if server.terminating:
            channel.send(Kind.LEAVE)

    def _on_message(self, one: Worker, kind: Kind, body: bytes) -> None:
        if kind is Kind.IDLE:
            one.idle = True
            if all(each.idle or not each.pid for each in self._pool.workers):
                log.info("drained")
                self._exit()
        elif kind is Kind.FAILED:
            self._discovery.failed_immediately(*marshal.loads(body))
        elif kind is Kind.EJECTED:
            self._pool.broadcast(kind, body, but=one)
            self._discovery.ejected(*marshal.loads(body))
        elif kind is Kind.DEMAND:
            assert self._dynamic is not None
            self._dynamic.demand(*marshal.loads(body))

    # -- what main finds out -----------------------------------------------------------------------------------------------------------------------------

    def _on_endpoints(self, cluster: str, assignment: bytes) -> None:
        frame = self._endpoints[cluster] = marshal.dumps((cluster, assignment))
        self._pool.broadcast(Kind.ENDPOINTS, frame)

    def _on_health(self, cluster: str, flags: Mapping[str, int]) -> None:
        self._health.setdefault(cluster, {}).update(flags)
        self._pool.broadcast(Kind.HEALTH, marshal.dumps((cluster, dict(flags))))

    def _cluster_changed(self, name: str, serialised: bytes, assignment: bytes | None, health: Mapping[str, int]) -> None:
        """A cluster is new, or another version of it is in use: what was found out about the old one is void."""
        self._clusters_removed([name])
        if assignment is not None:
            self._endpoints[name] = marshal.dumps((name, assignment))
        if health:
            self._health[name] = dict(health)

    def _clusters_removed(self, names: list[str]) -> None:
        for name in names:
            self._endpoints.pop(name, None)
            self._health.pop(name, None)

    # -- the end -----------------------------------------------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        for pid, code in process.reap():
            self._pool.on_exit(pid, code)
        if self._ending and not self._pool.alive:
            self._loop.stop()

    def _drain(self) -> None:
        """SIGTERM: accept no more, let requests finish, end when no connection is left or the drain time is over. A second SIGTERM ends at once."""
        server = self._server
        if server.terminating or not server.initialized:
            self._exit()
            return
        log.warning("caught SIGTERM: draining for up to %d s", self._options.drain_time_s)
        server.terminating = True
        self._pool.broadcast(Kind.LEAVE)
        for listener in server.listeners:
            listener.stop()
        self._loop.call_later(self._options.drain_time_s, self._exit)

    def _exit(self) -> None:
        """SIGINT, /quitquitquit, the end of a drain: stop the workers, then main."""
        if self._ending:
            return
        self._ending = True
        log.info("exiting")
        # Later, so that whoever asked (an admin request) gets its answer.
        self._loop.call_later(0.01, self._pool.stop)
        if not self._pool.alive:
            self._loop.call_later(0.02, self._loop.stop)
