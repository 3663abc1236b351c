"""All clusters of a process: known by name from the start, compiled when first used.

A sidecar in a large mesh knows a thousand clusters and calls ten. The others stay what they came as, serialised messages, which costs a few hundred bytes
each; what is learnt about them meanwhile (endpoints, health) is kept with them and applied when they are compiled.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, messages
from meshproxy.api.secrets import innermost
from meshproxy.observe.stats import Store, sanitise
from meshproxy.upstream import endpoints, outlier, stats
from meshproxy.upstream.cluster import Cluster
from meshproxy.upstream.options import STATIC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from meshproxy.context import Context
    from meshproxy.observe.stats import Counter, Scope
    from meshproxy.upstream.host import Host, HostSet


_Cluster = messages.known("envoy.config.cluster.v3.Cluster")
_UPSTREAM_TLS = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
_Assignment = messages.known("envoy.config.endpoint.v3.ClusterLoadAssignment")

# Envoy's; those that are about merging stay at zero: nothing of that kind is delayed here.
_COUNTERS = (
    "cluster_added", "cluster_modified", "cluster_removed", "cluster_updated", "cluster_updated_via_merge", "update_merge_cancelled",
    "update_out_of_merge_window",
)  # fmt: skip


# What main's statistics say of the members of a cluster that it has not compiled.
_UNSHOWN, _STALE, _SHOWN, _USED = range(4)


class _Known:
    """A cluster by its message. `assignment`, `health` and `ejected`: what was learnt since, while it was not compiled."""

    __slots__ = ("assignment", "cluster", "health", "members", "serialised", "shown", "timers", "via_api")

    def __init__(self, serialised: bytes, via_api: bool) -> None:
        self.serialised = serialised
        self.via_api = via_api
        self.cluster: Cluster | None = None
        self.assignment: bytes | None = None
        self.health: dict[str, int] | None = None
        self.timers: list[asyncio.TimerHandle] | None = None
        self.members: Counter | None = None  # what tells main that a worker uses it: membership_total, or what there is instead
        self.shown = _UNSHOWN

    @property
    def proto(self) -> Any:
        return _Cluster.FromString(self.serialised)


class ClusterManager:
    """Clusters by name. One for each process; main's also knows every cluster but compiles only those that it checks or talks to itself."""

    def __init__(self, context: Context, config: Any = None) -> None:
        """`config`: envoy.config.bootstrap.v3.ClusterManager or None."""
        self.context = context
        self._known: dict[str, _Known] = {}
        self._local_name: str = config.local_cluster_name if config is not None else ""
        self._bind = config.upstream_bind_config if config is not None and config.HasField("upstream_bind_config") else None
        # Tells main what only a worker can see: (cluster, host address).
        self.on_immediate_failure: Callable[[str, str], None] | None = None
        self.on_eject: Callable[[str, str], None] | None = None
        self.waiting: set[str] = set()  # clusters that discovery has not heard of yet
        self._warm = asyncio.Event()
        self._declares = True  # the statistics of clusters that nobody uses
        scope = context.stats.scope("cluster_manager.")
        scope.declare("counter", _COUNTERS)
        self.warming = scope.gauge("warming_clusters")  # main's: clusters of which it does not know the hosts yet
        self._active = scope.gauge("active_clusters", shared=True)
        self._added = scope.counter("cluster_added", shared=True)
        self._modified = scope.counter("cluster_modified", shared=True)
        self._removed = scope.counter("cluster_removed", shared=True)
        self.updated = scope.counter("cluster_updated")  # main's: hosts have come or gone since the first answer

    def add(self, proto: Any, via_api: bool = False, *, counted: bool = True) -> bool:
        """Add or replace a cluster (a message or its serialised form); False when it is the same as before. `counted`: among those that came; otherwise that
        was done when it began to warm (`announce`).

        The message is kept serialised and not looked at: main has validated it (`validate`).
        """
        if isinstance(proto, bytes):
            serialised, proto = proto, _Cluster.FromString(proto)
        else:
            serialised = proto.SerializeToString(deterministic=True)
        name = proto.name
        old = self._known.get(name)
        if old is not None and old.serialised == serialised:
            return False
        self.replace(name, serialised, via_api, counted=counted)
        scope = self.context.stats.scope(f"cluster.{proto.alt_stat_name or name}.")
        stats.declare(scope)
        if proto.HasField("outlier_detection"):
            outlier.declare(scope)
        if proto.HasField("transport_socket") or proto.transport_socket_matches:
            _declare_tls(proto, scope)
        return True

    def announce(self, *, known: bool) -> None:
        """Count a cluster that came, or another version of one that is known."""
        (self._modified if known else self._added).n += 1

    def renounce(self) -> None:
        """Count a cluster that went before it was in use."""
        self._removed.n += 1

    def replace(self, name: str, serialised: bytes, via_api: bool = True, *, counted: bool = True) -> None:
        """Add a cluster, or put it into the place of one of that name, without a look at its message: main has seen it, and declares its statistics.

        What is known of endpoints and health is forgotten; what the old one counted is not. Its connections end when they are idle.
        """
        old = self._known.get(name)
        if counted:
            self.announce(known=old is not None)
        if old is not None:
            self._retire(old)
        self._known[name] = _Known(serialised, via_api)
        self.context.changes.n += 1
        self._active.n = len(self._known)

    def take(self, name: str, serialised: bytes, assignment: bytes | None, health: dict[str, int]) -> None:
        """In a worker: what main says of a cluster that is new or has changed. One that is in use is compiled at once."""
        old = self._known.get(name)
        self.replace(name, serialised)
        known = self._known[name]
        known.assignment = assignment
        known.health = health or None
        if old is not None and old.cluster is not None:
            self._compile(known)

    def inherit(self, main: ClusterManager) -> None:
        """In a worker: know every cluster that main knew when it forked. Only main declares their statistics, as only main shows them."""
        self._declares = False
        for name, known in main._known.items():
            self._known[name] = _Known(known.serialised, known.via_api)
        self._added.n += len(main._known)
        self._active.n = len(self._known)

    def remove(self, *names: str) -> bool:
        """Forget clusters; their connections end when they are idle. False when there is none of these names."""
        gone = [self._known.pop(name) for name in names if name in self._known]
        if not gone:
            return False
        prefixes = []
        for known in gone:
            self._retire(known)
            if known.cluster is not None or self._declares:  # else there are no statistics here
                proto = known.proto
                prefixes.append(f"cluster.{proto.alt_stat_name or proto.name}.")
        if prefixes:
            self.context.stats.remove(*map(sanitise, prefixes))
        for known in gone:
            if known.cluster is not None:
                known.cluster.stats.scope.store = Store()  # what its last connections still count concerns nobody
        self._removed.n += len(gone)
        self.context.changes.n += 1
        self._active.n = len(self._known)
        return True

    def _retire(self, known: _Known) -> None:
        for timer in known.timers or ():
            timer.cancel()
        if known.cluster is not None:
            known.cluster.close()

    def runtime_changed(self) -> None:
        """Tell the clusters in use."""
        for known in self._known.values():
            if known.cluster is not None:
                known.cluster.runtime_changed()

    def get(self, name: str) -> Cluster | None:
        """The cluster of that name, compiled now if this is its first use."""
        known = self._known.get(name)
        if known is None:
            return None
        return known.cluster or self._compile(known)

    def _compile(self, known: _Known) -> Cluster:
        proto = known.proto
        cluster = known.cluster = Cluster(proto, self.context, via_api=known.via_api, default_bind=self._bind, local_hosts=self._local_hosts(proto.name))
        if known.assignment is not None:
            cluster.update_endpoints(_Assignment.FromString(known.assignment))
        if known.health is not None:
            cluster.set_health(known.health)
        cluster.on_immediate_failure = self._report_failure
        if cluster.outlier is not None:
            cluster.outlier.on_eject = self._report_ejection
        if cluster.name == self._local_name:
            cluster.on_hosts_changed = self._local_changed
        self._schedule(known, cluster)
        return cluster

    def _report_failure(self, host: Host) -> None:
        if self.on_immediate_failure is not None:
            self.on_immediate_failure(host.cluster.name, host.address.text)

    def _report_ejection(self, host: Host) -> None:
        if self.on_eject is not None:
            self.on_eject(host.cluster.name, host.address.text)

    # -- periodic work

    def _schedule(self, known: _Known, cluster: Cluster) -> None:
        known.timers = []
        if cluster.sweep_interval:
            self._every(known, cluster.sweep_interval, cluster.sweep)
        if cluster.outlier is not None:
            outlier = cluster.outlier
            self._every(known, outlier.interval, lambda: outlier.sweep(self.context.clock()))

    def _every(self, known: _Known, seconds: float, work: Callable[[], None]) -> None:
        loop = self.context.loop
        if loop is None:
            return  # validation, and tests that sweep by hand
        timers = known.timers
        assert timers is not None
        index = len(timers)

        def tick() -> None:
            timers[index] = loop.call_later(seconds, tick)
            work()

        timers.append(loop.call_later(seconds, tick))

    # -- the cluster that this proxy belongs to

    def _local_hosts(self, name: str) -> Callable[[], HostSet | None]:
        if not self._local_name or name == self._local_name:
            return lambda: None
        return self._local_host_set

    def _local_host_set(self) -> HostSet | None:
        local = self.get(self._local_name)
        return local.host_sets[0] if local is not None else None

    def _local_changed(self) -> None:
        for known in self._known.values():
            if known.cluster is not None and known.cluster.name != self._local_name:
                known.cluster.rebalance()

    # -- what main tells workers

    def update_endpoints(self, name: str, assignment: Any) -> None:
        """New endpoints with resolved addresses (ClusterLoadAssignment or its serialised form). Ignored for an unknown cluster."""
        known = self._known.get(name)
        if known is None:
            return
        known.assignment = assignment if isinstance(assignment, bytes) else assignment.SerializeToString()
        if known.shown == _SHOWN:
            known.shown = _STALE
        if known.cluster is not None:
            known.cluster.update_endpoints(_Assignment.FromString(known.assignment))

    def set_health(self, name: str, flags: Mapping[str, int]) -> None:
        """Results of active health checks, see `Cluster.set_health`. Ignored for an unknown cluster."""
        known = self._known.get(name)
        if known is None:
            return
        known.health = {**(known.health or {}), **flags}
        if known.cluster is not None:
            known.cluster.set_health(flags)

    def eject(self, name: str, address: str) -> None:
        """Another worker's outlier detection has ejected a host. Ignored when it is not known here."""
        known = self._known.get(name)
        cluster = known.cluster if known is not None else None
        if cluster is not None and cluster.outlier is not None:
            for host in cluster.hosts:
                if host.address.text == address:
                    cluster.outlier.adopt(host)

    # -- warming, in main

    def waiting_for(self) -> set[str]:
        """The clusters whose names are not resolved, or whose hosts are not checked, for the first time."""
        return set(self.waiting)

    def warmed(self, name: str) -> None:
        """There is a first answer for that cluster."""
        self.waiting.discard(name)
        if not self.waiting:
            self._warm.set()

    async def wait_warm(self) -> None:
        """Wait until no cluster is waiting."""
        while self.waiting:
            self._warm.clear()
            await self._warm.wait()

    # -- looking

    def names(self) -> list[str]:
        """The names of all clusters, in the order in which they were added."""
        return list(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __len__(self) -> int:
        return len(self._known)

    def proto(self, name: str) -> Any:
        """The configuration of a cluster, or None."""
        known = self._known.get(name)
        return None if known is None else known.cluster.proto if known.cluster is not None else known.proto

    def serialised(self, name: str) -> bytes:
        """The same as it is kept; empty when there is no such cluster."""
        known = self._known.get(name)
        return known.serialised if known is not None else b""

    def compiled(self) -> Iterator[Cluster]:
        """The clusters that have been used."""
        for known in list(self._known.values()):
            if known.cluster is not None:
                yield known.cluster

    def inspect(self, name: str, context: Context) -> Cluster:
        """A throw-away copy of a cluster of that name, with what is known of its endpoints and their health, compiled in another context."""
        known = self._known[name]
        cluster = Cluster(known.proto, context, via_api=known.via_api, default_bind=self._bind, dry_run=True)
        if known.assignment is not None:
            cluster.update_endpoints(_Assignment.FromString(known.assignment))
        if known.health is not None:
            cluster.set_health(known.health)
        return cluster

    def via_api(self, name: str) -> bool:
        """Whether a cluster came by an API rather than with the bootstrap."""
        return self._known[name].via_api

    def load_assignments(self) -> Iterator[tuple[Any, bool]]:
        """The present endpoints of every cluster as ClusterLoadAssignment messages, each with whether the cluster came by an API."""
        for name, known in self._known.items():
            if known.assignment is not None:
                yield _Assignment.FromString(known.assignment), known.via_api
                continue
            assignment = known.proto.load_assignment
            assignment.cluster_name = assignment.cluster_name or name
            yield assignment, known.via_api

    def publish(self) -> None:
        """Bring all gauges up to date. Call it before statistics are collected or shown."""
        for known in list(self._known.values()):
            if known.cluster is not None:
                known.cluster.publish()

    def publish_unused(self) -> Iterator[None]:
        """In main, before statistics are shown: the membership of clusters that no worker has used. In steps, for there may be very many of them."""
        for known in list(self._known.values()):
            if known.cluster is not None or known.shown == _USED:
                continue
            members = known.members
            if members is not None and members.seen:
                self._leave_to_workers(known)
                yield
            elif known.shown != _SHOWN:
                self._show_members(known)
                yield

    def _show_members(self, known: _Known) -> None:
        proto = known.proto
        scope = self.context.stats.scope(f"cluster.{proto.alt_stat_name or proto.name}.")
        members = scope.gauge("membership_total", shared=True)
        known.members = members
        if self.context.stats.find(members.name) is None:  # of statistics that the configuration refuses main hears nothing
            others = [scope.counter(name, shared=True) for name in ("membership_change", "default.total_match_count")]
            known.members = next((other for other in others if self.context.stats.find(other.name)), others[0])
        if known.members.seen:
            self._leave_to_workers(known)
            return
        assignment = proto.load_assignment if proto.type == 0 else _Assignment()
        if known.assignment is not None:
            assignment = _Assignment.FromString(known.assignment)
        rows = endpoints.count(assignment)
        total = sum(row[0] for row in rows)
        changed = total != members.n
        members.n = total
        if changed or total:
            healthy = 0 if proto.health_checks else sum(row[1] for row in rows)
            scope.gauge("membership_healthy", shared=True).n = healthy
            scope.gauge("membership_degraded", shared=True).n = 0 if proto.health_checks else sum(row[2] for row in rows)
            scope.gauge("membership_excluded", shared=True).n = sum(row[3] for row in rows)
            # Counted once: counters may be reset.
            first = known.shown == _UNSHOWN
            scope.counter("membership_change", shared=True).n += sum(1 for row in rows if row[0]) if first else changed
            scope.counter("default.total_match_count", shared=True).n += total if first else 0
        known.shown = _SHOWN

    def _leave_to_workers(self, known: _Known) -> None:
        """A worker uses it and says so itself; of what it has not mentioned it has nothing."""
        known.shown = _USED
        scope = self.context.stats.scope(f"cluster.{known.proto.alt_stat_name or known.proto.name}.")
        for name in ("membership_healthy", "membership_degraded", "membership_excluded"):
            gauge = scope.gauge(name, shared=True)
            if not gauge.seen:
                gauge.n = 0

    def close(self) -> None:
        """The process ends: stop periodic work and drain all connections."""
        for known in self._known.values():
            for timer in known.timers or ():
                timer.cancel()
            if known.cluster is not None:
                known.cluster.close()


class Validator:
    """Finds the mistakes in Cluster messages by compiling them. Of clusters that differ only in their names and endpoints the first one is compiled."""

    def __init__(self, context: Context, config: Any = None) -> None:
        """`context` should have statistics of its own. `config`: envoy.config.bootstrap.v3.ClusterManager or None."""
        self._context = context
        self._local_name: str = config.local_cluster_name if config is not None else ""
        self._bind = config.upstream_bind_config if config is not None and config.HasField("upstream_bind_config") else None
        self._good: set[bytes] = set()

    def check(self, proto: Any) -> None:
        """Raises ConfigError with everything that is wrong with the cluster."""
        if self._local_name and proto.name == self._local_name:
            for index, group in enumerate(proto.load_assignment.endpoints):
                if group.priority > 0:
                    errors.fail(f"load_assignment.endpoints[{index}].priority", f"Unexpected non-zero priority for local cluster '{proto.name}'.")
        static = proto.type == STATIC and not proto.HasField("cluster_type")
        kind = _without_names(proto, static)
        if kind not in self._good:
            Cluster(proto, self._context, default_bind=self._bind, dry_run=True)
            self._good.add(kind)
        elif static:
            with errors.under("load_assignment"):
                endpoints.check(proto.load_assignment)


def _without_names(proto: Any, static: bool) -> bytes:
    """What clusters must have in common for one of them to stand for all when they are validated."""
    kind = _Cluster()
    kind.CopyFrom(proto)
    kind.ClearField("name")
    if kind.transport_socket.typed_config.type_url.endswith(_UPSTREAM_TLS):
        _hide_server_names(kind.transport_socket.typed_config)
    if kind.HasField("eds_cluster_config"):
        kind.eds_cluster_config.ClearField("service_name")
    if kind.HasField("load_assignment"):
        assignment = kind.load_assignment
        assignment.ClearField("cluster_name")
        if static:
            assignment.ClearField("endpoints")
        for group in assignment.endpoints:
            for endpoint in group.lb_endpoints:
                endpoint.endpoint.ClearField("address")  # a name to resolve; only their number can be wrong
    return kind.SerializeToString(deterministic=True)


def _hide_server_names(packed: Any) -> None:
    """Of a packed UpstreamTlsContext: whom to ask for, and the names that its certificate must have. One takes as long to compile as the other."""
    tls = messages.known(_UPSTREAM_TLS).FromString(packed.value)
    if "\0" not in tls.sni:
        tls.sni = "any" if tls.sni else ""
    common = tls.common_tls_context
    which = common.WhichOneof("validation_context_type")
    context: Any = getattr(common, which) if which is not None else None
    if which == "combined_validation_context":
        context = context.default_validation_context
    for one in getattr(context, "match_typed_subject_alt_names", ()):
        if one.matcher.exact:
            one.matcher.exact = "any"
    packed.value = tls.SerializeToString(deterministic=True)


def validate(proto: Any, context: Context, config: Any = None) -> None:
    """Compile a Cluster message and throw the result away: a `Validator` for only one."""
    Validator(context, config).check(proto)


def _declare_tls(proto: Any, scope: Scope) -> None:
    sockets = [proto.transport_socket, *(match.transport_socket for match in proto.transport_socket_matches)]
    if any(innermost(socket).typed_config.type_url.endswith(".UpstreamTlsContext") for socket in sockets):
        from meshproxy.net import tls_stats

        tls_stats.declare(scope, server_side=False)
