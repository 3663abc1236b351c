"""What main knows and can do, as the admin endpoints see it: state, configuration, workers, stats. `supervisor.py` builds and drives it."""

from __future__ import annotations

import asyncio
import marshal
import socket
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.api import messages
from meshproxy.channel import Kind
from meshproxy.record import Record, field

if TYPE_CHECKING:
    from meshproxy.admin.certs import Certificates
    from meshproxy.cli import Options
    from meshproxy.logs import Handler, Levels
    from meshproxy.net.address import Address
    from meshproxy.observe.stats import Store
    from meshproxy.observe.tags import StatsConfig

SLICE = 0.005  # seconds that one request to admin may take of main's event loop before others have their turn
SCRAPE_DEADLINE = 1.0  # seconds that a scrape waits for the workers, which say everything once a second anyway


class State(IntEnum):
    """Numbers and names of envoy.admin.v3.ServerInfo.State; the number is the value of the gauge server.state."""

    LIVE = 0
    DRAINING = 1
    PRE_INITIALIZING = 2
    INITIALIZING = 3


class Listener(Record, eq=False):
    """One listener: `addresses` are the ones bound, `sockets` main's own copies of each worker's listening sockets, which keep the queue of new connections
    alive while a worker is being replaced.

    `key`: what main and workers call it, another one for each version of it. `version` and `updated` (Unix time): of what came by an API.
    """

    name: str
    addresses: list[Address]
    inbound: bool
    sockets: list[list[socket.socket]]
    stopped: bool = False
    serialised: bytes = b""  # envoy.config.listener.v3.Listener
    key: int = 0
    via_api: bool = False
    version: str = ""
    updated: float = 0.0

    def stop(self) -> None:
        """Close main's copies; workers close theirs."""
        self.stopped = True
        for sock in {sock for own in self.sockets for sock in own}:
            sock.close()
        self.sockets = [[] for _ in self.sockets]


class Workers(Protocol):
    """The part of the supervisor that the server needs."""

    def broadcast(self, kind: Kind, body: bytes = b"") -> None:
        """Tell every worker."""

    async def gather(self, kind: Kind, body: bytes = b"", *, timeout: float) -> list[bytes]:
        """Ask every worker; answers that do not come in time are left out."""


class Server(Record):
    """One per main process. Attributes are filled in by the supervisor while it starts."""

    options: Options
    bootstrap_bytes: bytes  # kept serialised: admin alone needs it again
    node: Any  # envoy.config.core.v3.Node, with the command line merged in
    stats: Store
    levels: Levels
    log_handler: Handler
    workers: Workers
    shut_down: Callable[[], None]
    runtime: Any = None  # api.runtime.Runtime, main's own copy
    clusters: Any = None  # upstream.cluster.ClusterManager, main's own: names, configuration, health as discovered
    certificates: Certificates = None  # type: ignore[assignment]  # set by the supervisor
    listeners: list[Listener] = field(default_factory=list)
    listeners_manager: Any = None  # listeners.Listeners, with dynamic
    dynamic: Any = None  # dynamic.Dynamic, what came by files or a control plane; None where there is nothing of that kind
    concurrency: int = 1
    started: float = field(default_factory=time.monotonic)
    started_wall: float = field(default_factory=time.time)
    initialized: bool = False
    health_failed: bool = False
    terminating: bool = False
    drain_all_since: float | None = None
    drain_inbound_since: float | None = None
    workers_ready: int = 0  # of `concurrency`
    prepare_scrape: Callable[[], Iterator[None]] = lambda: iter(())  # brings main's own gauges up to date, step by step
    _stats_config: StatsConfig | None = None

    @property
    def stats_config(self) -> StatsConfig:
        """The bootstrap's and the command line's. Compiled when first asked for, which is after the start."""
        if self._stats_config is None:
            from meshproxy.observe.tags import StatsConfig

            bootstrap = self.bootstrap
            fixed = [(name, value) for name, _, value in (tag.partition(":") for tag in self.options.stats_tag)]
            self._stats_config = StatsConfig(bootstrap.stats_config if bootstrap.HasField("stats_config") else None, fixed)
        return self._stats_config

    @property
    def state(self) -> State:
        """What /ready, /server_info and server.state say."""
        if not self.initialized:
            return State.INITIALIZING
        return State.DRAINING if self.health_failed or self.terminating else State.LIVE

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def bootstrap(self) -> Any:
        """The configuration as an envoy.config.bootstrap.v3.Bootstrap, parsed anew."""
        return messages.known("envoy.config.bootstrap.v3.Bootstrap").FromString(self.bootstrap_bytes)

    # -- changes -----------------------------------------------------------------------------------------------------------------------------------------

    def drain_listeners(self, *, inbound_only: bool, graceful: bool, keep_listeners: bool) -> None:
        """Tell connections of all (or of inbound) listeners that they are to end; close the listeners at once, after the drain time, or never.

        A drain that covers no more than one already under way changes nothing.
        """
        now = time.monotonic()
        covered = self.drain_all_since is not None or (inbound_only and self.drain_inbound_since is not None)
        if not covered:
            if inbound_only:
                self.drain_inbound_since = now
            else:
                self.drain_all_since = now
            self._broadcast(Kind.DRAIN, {"inbound_only": inbound_only})
        elif graceful:
            return
        if keep_listeners:
            return
        if graceful:
            asyncio.get_running_loop().call_later(self.options.drain_time_s, self.stop_listeners, inbound_only)
        else:
            self.stop_listeners(inbound_only)

    def stop_listeners(self, inbound_only: bool) -> None:
        """Accept no more connections, in any worker."""
        for listener in self.listeners:
            if listener.inbound or not inbound_only:
                listener.stop()
        self._broadcast(Kind.STOP_LISTENERS, {"inbound_only": inbound_only})

    def fail_health_checks(self, failed: bool) -> None:
        """Fail, or pass again, the health checks that the health_check filter and /ready answer."""
        self.health_failed = failed
        self._broadcast(Kind.HEALTHCHECK_FAIL, failed)

    def change_log_levels(self, changes: dict[str, str]) -> None:
        """Set the level of some of Envoy's loggers, everywhere."""
        self.levels.update(changes)
        self._broadcast(Kind.LOG_LEVEL, changes)

    def override_runtime(self, changes: dict[str, str]) -> None:
        """Change the admin layer of the runtime, everywhere. Raises ConfigError when there is none."""
        self.runtime.modify(changes)
        self._broadcast(Kind.RUNTIME, changes)

    def reset_counters(self) -> None:
        """Set all counters to zero."""
        self.stats.reset_counters()

    def reopen_logs(self) -> None:
        """Open log files again, after a rotation."""
        self.log_handler.reopen()
        self.workers.broadcast(Kind.REOPEN_LOGS)

    def _broadcast(self, kind: Kind, value: Any) -> None:
        self.workers.broadcast(kind, marshal.dumps(value))

    # -- questions ---------------------------------------------------------------------------------------------------------------------------------------

    async def collect_stats(self) -> None:
        """Bring `stats` up to date with every worker. Their frames arrive as they are sent; an answer only says that they have been."""
        await self.workers.gather(Kind.STATS, timeout=SCRAPE_DEADLINE)
        until = time.monotonic() + SLICE
        for _ in self.prepare_scrape():
            if time.monotonic() > until:
                await asyncio.sleep(0)
                until = time.monotonic() + SLICE

    async def collect(self, what: str) -> list[Any]:
        """What each worker says about `what` (see `worker.Worker.collect`)."""
        return [marshal.loads(answer) for answer in await self.workers.gather(Kind.COLLECT, what.encode(), timeout=SCRAPE_DEADLINE)]
