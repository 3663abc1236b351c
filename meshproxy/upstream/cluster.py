"""A cluster: the hosts of one service, how one of them is chosen, and what all connections to them share.

Made lazily by the cluster manager when a request first wants it. Hosts, health and endpoints come from main (discovery, health checks) and from here
(outlier detection); each change makes new host sets and lets the balancer rebuild its picker, so that `cluster.pick` itself has nothing left to decide.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from meshproxy.api import durations, errors
from meshproxy.api.metadata import metadata_dict
from meshproxy.codec.h1 import header_case
from meshproxy.net.address import canonical_ip
from meshproxy.upstream import balance, discovery, endpoints, health, limits, options, original_dst, outlier
from meshproxy.upstream import host as hosts
from meshproxy.upstream.balance import Balancer, Deps, LbContext, Picker
from meshproxy.upstream.balance import config as balance_config
from meshproxy.upstream.balance.cluster_provided import ClusterProvided
from meshproxy.upstream.balance.hashing import HashBalancer, check_weights
from meshproxy.upstream.endpoints import Assignment, Policy
from meshproxy.upstream.host import Host, HostSet, Locality
from meshproxy.upstream.http1_pool import Http1Pool, RawPool
from meshproxy.upstream.options import LOGICAL_DNS, ORIGINAL_DST, ClusterOptions
from meshproxy.upstream.original_dst import OriginalDst
from meshproxy.upstream.stats import ClusterStats

if TYPE_CHECKING:
    from meshproxy.codec.headers import RequestHead
    from meshproxy.context import Context
    from meshproxy.net.address import Address
    from meshproxy.upstream.pool import Pool
    from meshproxy.upstream.proxy_protocol import Ends

_MAX_NAMES = 1024  # that are remembered

__all__ = ["HONOURS", "Cluster", "Host", "LbContext"]

HONOURS = {
    **options.HONOURS,
    **endpoints.HONOURS,
    **limits.HONOURS,
    **balance_config.HONOURS,
    **original_dst.HONOURS,
    **outlier.HONOURS,
    **discovery.HONOURS,
    **health.HONOURS,
}

Drops = Callable[[random.Random], "str | None"]


class Cluster:
    """One upstream cluster.

    Hot: `pick(LbContext | None) -> Host | None`, `limits[priority]`, `stats`. `needs_context`: whether `pick` makes any use of its argument.
    `observes_latency`: whether `observe(host, seconds)` wants to hear of response times. `outlier` is None unless passive health checks are configured.
    `drops(random)` is None unless requests may have to be dropped; else it returns None, "maintenance", "drop_overload" or "unconditional".
    `rq_dropped`, `rq_drop_overload`: requests that were refused by a limit or dropped, and those of them by the endpoints' policy, for load reports.
    """

    __slots__ = (
        "_assignment_policy",
        "_balancer",
        "_by_priority",
        "_close_on_change",
        "_dry_run",
        "_h2_options",
        "_ignores_health_on_removal",
        "_local_locality",
        "_locality_weights",
        "_metadata",
        "_names",
        "_original_dst",
        "_preconnect",
        "_pool_kind",
        "_warm_hosts",
        "_way",
        "auto_san_validation",
        "auto_sni",
        "auto_sni_header",
        "checks_health",
        "connect_timeout",
        "context",
        "dial_options",
        "drops",
        "follows_names",
        "h1_options",
        "header_case",
        "host_sets",
        "idle_timeout",
        "limits",
        "local_zone",
        "max_connection_duration",
        "max_requests_per_connection",
        "max_stream_duration",
        "name",
        "needs_context",
        "needs_hash",
        "observability_name",
        "observe",
        "observes_latency",
        "on_hosts_changed",
        "on_immediate_failure",
        "one_pool",
        "options",
        "outlier",
        "per_connection_buffer_limit",
        "pick",
        "preconnect_ratio",
        "proto",
        "rq_drop_overload",
        "rq_dropped",
        "stats",
        "tcp_pool_idle_timeout",
        "transport",
        "via_api",
    )

    def __init__(
        self,
        proto: Any,
        context: Context,
        *,
        via_api: bool = False,
        default_bind: Any = None,
        local_hosts: Callable[[], HostSet | None] = lambda: None,
        dry_run: bool = False,
    ) -> None:
        """Compile an envoy.config.cluster.v3.Cluster. Raises ConfigError with everything that is wrong with it.

        `dry_run`: only to look at it or to find its mistakes; it balances nothing and shares nothing.
        """
        self._dry_run = dry_run
        self.name: str = proto.name
        self.observability_name: str = proto.alt_stat_name or proto.name
        self.proto = proto
        self.context = context
        self.via_api = via_api
        scope = context.stats.scope(f"cluster.{self.observability_name}.")
        self.stats = ClusterStats(scope)
        self.on_hosts_changed: Callable[[], None] | None = None  # a cluster that others look at (zone-aware routing)
        self.on_immediate_failure: Callable[[Host], None] | None = None  # tells main's health checker
        self._metadata: dict[str, Any] | None = None
        problems = errors.Collector()
        compiled = ClusterOptions(type=options.STRICT_DNS if proto.HasField("cluster_type") else proto.type)
        with problems.under(""):
            compiled = options.compile_options(proto, scope, context.secrets, default_bind)
        self._preconnect: Any = None  # upstream.preconnect.Preconnect
        self._take(compiled)
        with problems.under("circuit_breakers"):
            self.limits = limits.compile_limits(proto.circuit_breakers, self.name, context, share=not dry_run)
        deps = Deps(self.stats, scope, context.random, context.clock, active=self._active_requests, runtime=context.runtime, local_hosts=local_hosts)
        self._balancer: Balancer = ClusterProvided()  # so that endpoints are checked as well when the policy is wrong
        with problems.under(""):
            self._balancer = balance.compile_balancer(proto, deps)
        if compiled.predictive_ratio > 1.0 and self._balancer.looks_ahead:
            from meshproxy.upstream.preconnect import Preconnect  # few clusters have it

            self._preconnect = Preconnect(compiled.predictive_ratio)
            self.one_pool = False
        self._compile_outlier(proto, problems)
        if proto.health_checks and dry_run:
            with problems.under(""):
                health.check_config(proto.health_checks, speaks_http2=compiled.protocol != options.HTTP1)
        common = proto.common_lb_config
        self.checks_health = bool(proto.health_checks)
        self._warm_hosts: bool = self.checks_health and common.ignore_new_hosts_until_first_hc
        self._close_on_change: bool = common.close_connections_on_host_set_change
        self._ignores_health_on_removal: bool = proto.ignore_health_on_host_removal
        self._local_locality = _node_locality(context.node)
        self.local_zone = self._local_locality.zone if self._local_locality is not None else ""
        self._by_priority: list[list[Host]] = [[]]
        self._locality_weights: list[dict[Locality, int]] = [{}]
        self._assignment_policy = Policy()
        self._original_dst: OriginalDst | None = None
        self.host_sets: Sequence[HostSet] = ()
        self.drops: Drops | None = None
        self.rq_dropped = self.rq_drop_overload = 0
        with problems.under("load_assignment"):
            self._start(proto)
        problems.raise_any()

    def _take(self, compiled: ClusterOptions) -> None:
        self.options = compiled
        self.connect_timeout = compiled.connect_timeout
        self.per_connection_buffer_limit = compiled.per_connection_buffer_limit
        self.max_requests_per_connection = compiled.max_requests_per_connection
        self.max_connection_duration = compiled.max_connection_duration
        self.max_stream_duration = compiled.max_stream_duration
        self.idle_timeout = compiled.idle_timeout
        self.tcp_pool_idle_timeout = compiled.tcp_pool_idle_timeout
        self.h1_options = compiled.h1_options
        self.dial_options = compiled.dial_options
        self.transport = compiled.transport
        self._way = compiled.transport, compiled.proxy_protocol
        self.auto_sni = compiled.auto_sni
        self.follows_names = compiled.auto_sni or compiled.auto_san_validation
        self._names: dict[bytes, tuple[str | None, str | None]] = {}
        # A host has one HTTP pool a priority, whose key is the priority.
        self.one_pool = not self.follows_names and compiled.protocol != options.DOWNSTREAM and self._preconnect is None and not compiled.tells_callers
        self._h2_options: Any = None
        self._pool_kind: type[Pool] = Http1Pool
        if compiled.protocol != options.HTTP1:
            from meshproxy.upstream import http2_pool

            self._pool_kind = http2_pool.AutoPool if compiled.protocol == options.AUTO else http2_pool.Http2Pool
        self.preconnect_ratio = compiled.preconnect_ratio
        self.auto_san_validation = compiled.auto_san_validation
        self.auto_sni_header = compiled.auto_sni_header.encode() or b":authority"
        self.header_case = header_case.compile(compiled.header_style)

    def _compile_outlier(self, proto: Any, problems: errors.Collector) -> None:
        self.outlier: outlier.Detector | None = None
        if proto.HasField("outlier_detection"):
            with problems.under("outlier_detection"):
                self.outlier = outlier.Detector(proto.outlier_detection, self)

    def _start(self, proto: Any) -> None:
        """The hosts that the configuration itself names (names to resolve come later, from main)."""
        balancer = self._balancer
        self.needs_hash = balancer.needs_hash
        self.needs_context = balancer.needs_hash
        self.observes_latency = balancer.observes_latency
        self.observe = balancer.observe
        self.pick: Picker = balance.nobody
        if self.options.type == ORIGINAL_DST:
            self._original_dst = OriginalDst(proto, self)
            self.needs_context = True
            self._rebuild()
        elif self.options.type == options.STATIC:
            assignment = endpoints.parse(proto.load_assignment, self)
            if self.checks_health:
                for host in endpoints.all_hosts(assignment.hosts):
                    if not (host.health_check is not None and host.health_check.disable_active_health_check):
                        host.health_flags |= hosts.FAILED_ACTIVE_HC
            self._by_priority = assignment.hosts
            self._adopt_policy(assignment)
            self._admit(endpoints.all_hosts(assignment.hosts))
            self.stats.membership_change.n += sum(1 for group in assignment.hosts if group)
            self._rebuild()
        else:
            self._adopt_policy(Assignment([[]], [{}], endpoints.parse_policy(proto.load_assignment)))
            self._rebuild()

    # -- for the hot path

    @property
    def plannable(self) -> bool:
        """Whether choosing a host looks at nothing of the request, and forwarding to it needs nothing special (see http.plan)."""
        special = self.follows_names or self.needs_context or self.observes_latency or self.header_case is not None or self.options.tells_callers
        return (
            not special
            and self.preconnect_ratio <= 1.0
            and self._preconnect is None
            and self.drops is None
            and not self.max_stream_duration
            and not (self.max_requests_per_connection and self.options.protocol != options.HTTP1)
        )

    def speaks_http2(self, version: int) -> bool:
        """Whether requests that came by that version of HTTP surely go on by HTTP/2."""
        return self.options.protocol == options.HTTP2 or (self.options.protocol == options.DOWNSTREAM and version == 20)

    def pool_key(self, priority: int, version: int) -> Any:
        """What `Host.pools` knows a pool by that depends on nothing else. `version`: of HTTP downstream."""
        return (priority, "h2") if self.options.protocol == options.DOWNSTREAM and version == 20 else priority

    def pool_for(self, host: Host, priority: int, head: RequestHead, *, raw: bool = False, ends: Ends | None = None) -> Pool:
        """The pool of `host` for a request of `priority` that is about to take a connection. `raw`: what that carries is not HTTP. `ends`: who calls, for
        clusters whose hosts are told (`options.tells_callers`)."""
        if self._preconnect is not None:
            healthy = sum(len(host_set.healthy) for host_set in self.host_sets)
            self._preconnect.before_request(self.hosts, healthy, lambda host: self._pool_of(host, priority, head, raw, ends))
        return self._pool_of(host, priority, head, raw, ends)

    def _pool_of(self, host: Host, priority: int, head: RequestHead, raw: bool, ends: Ends | None) -> Pool:
        """Made when it is first needed."""
        pools = host.pools
        if pools is None:
            pools = host.pools = {}
        server_name = san = None
        kind: type[Pool] = RawPool if raw else self._pool_kind
        if raw:
            key: Any = (priority, "tcp")
        else:
            key = self.pool_key(priority, head.version)
            if self.options.protocol == options.DOWNSTREAM and head.version < 20:
                kind = Http1Pool
            if self.follows_names:
                names = server_name, san = self._names_for(head)
                key = key, *(name and name.lower() for name in names)
        if ends is not None and host.proxy_protocol:
            key = key, ends[0].text, ends[1].text
        pool: Pool | None = pools.get(key)
        if pool is None:
            pool = pools[key] = kind(self, host, priority, self.context, server_name)
            pool.san = san
            if host.proxy_protocol:
                from meshproxy.upstream.proxy_protocol import preamble  # few clusters have it

                pool.preamble = preamble(host, ends)
        return pool

    @property
    def h2_options(self) -> Any:
        """The codec's options (codec.h2.settings.Options) for HTTP/2; made, with its statistics, when the first connection is."""
        made = self._h2_options
        if made is None:
            from meshproxy.codec.h2.settings import Options
            from meshproxy.observe.http2_stats import Http2Stats

            scope = self.context.stats.scope(f"cluster.{self.observability_name}.http2.")
            made = self._h2_options = Options(**self.options.http2, stats=Http2Stats.of(scope, self.context.shared))
        return made

    def _names_for(self, head: RequestHead) -> tuple[str | None, str | None]:
        """For a request the SNI (`auto_sni`) and the name that the certificate must be for (`auto_san_validation`): those of its Host, or of the header that
        `override_auto_sni_header` names if it has that, without a port. An address is no SNI.
        """
        value = head.get(self.auto_sni_header) or head.authority
        found = self._names.get(value)
        if found is None:
            if len(self._names) >= _MAX_NAMES:
                self._names.clear()
            name = _without_port(value.decode("latin-1")) or None
            found = name if self.auto_sni and name and not _is_address(name) else None, name if self.auto_san_validation else None
            self._names[value] = found
        return found

    def fail_immediately(self, host: Host) -> None:
        """A response of `host` said `x-envoy-immediate-health-check-fail`: out at once, without counting for panic, until a health check passes."""
        if host.health_flags & hosts.EXCLUDED_VIA_IMMEDIATE_HC_FAIL:
            return
        self.set_flags(host, hosts.FAILED_ACTIVE_HC | hosts.EXCLUDED_VIA_IMMEDIATE_HC_FAIL)
        if self.on_immediate_failure is not None:
            self.on_immediate_failure(host)

    def _active_requests(self) -> int:
        return sum(limit.rq for limit in self.limits)

    # -- hosts and their health

    @property
    def hosts(self) -> list[Host]:
        """All hosts, by priority."""
        return endpoints.all_hosts(self._by_priority)

    @property
    def metadata(self) -> dict[str, Any]:
        """The cluster's metadata as plain data."""
        if self._metadata is None:
            self._metadata = metadata_dict(self.proto.metadata)
        return self._metadata

    def update_endpoints(self, proto: Any) -> bool:
        """Replace the endpoints by those of a ClusterLoadAssignment with resolved addresses; whether anything changed.

        Raises ConfigError and changes nothing when the assignment is wrong.
        """
        assignment = endpoints.parse(proto, self)
        if self.options.type == LOGICAL_DNS and self._move_logical_host(assignment):
            return True
        reached = [] if self.options.choose_transport is None else [(host, host.metadata, host.locality_metadata) for host in self.hosts]
        result = endpoints.merge(
            self._by_priority,
            assignment,
            keep_healthy=self.checks_health and not self._ignores_health_on_removal,
            checked=self.checks_health,
            pending=self._warm_hosts,
        )
        changed_weights = assignment.locality_weights != self._locality_weights
        changed_policy = assignment.policy != self._assignment_policy
        if not (result.changed or changed_weights or changed_policy):
            self.stats.update_no_rebuild.n += 1
            return False
        members: Iterable[tuple[list[Host], list[Host]]] = itertools.zip_longest(self._by_priority, result.hosts, fillvalue=[])
        moved = sum(set(map(id, before)) != set(map(id, after)) for before, after in members)
        self._by_priority = result.hosts
        self._adopt_policy(assignment)
        self.stats.max_host_weight.n = max((host.weight for host in self.hosts), default=1)
        self._admit(result.added)
        self._choose_again(reached)
        self.stats.membership_change.n += moved  # priorities that are others than before
        self._rebuild()
        self._dismiss(result.removed)
        return True

    def _move_logical_host(self, assignment: Assignment) -> bool:
        """A LOGICAL_DNS cluster has one host whose address changes under it: new connections go there, the others stay."""
        old, new = self.hosts, endpoints.all_hosts(assignment.hosts)
        if len(old) != 1 or len(new) != 1:
            return False
        old[0].address = new[0].address
        return True

    def adopt(self, added: Iterable[Host], removed: Iterable[Host]) -> None:
        """Take hosts in and out of priority 0 (ORIGINAL_DST)."""
        gone = set(map(id, removed))
        self._by_priority[0] = [host for host in self._by_priority[0] if id(host) not in gone]
        self._by_priority[0] += added
        self._admit(added)
        self.stats.membership_change.n += 1
        self._rebuild()
        self._dismiss(removed)

    def set_health(self, flags: Mapping[str, int]) -> None:
        """Results of active health checks: address text -> active health flags (`host.ACTIVE_FLAGS`). Unknown addresses are ignored."""
        changed = False
        gone: list[Host] = []
        for host in self.hosts:
            new = flags.get(host.address.text)
            if new is None:
                continue
            before = host.health_flags
            host.health_flags = (before & ~hosts.ACTIVE_FLAGS) | (new & hosts.ACTIVE_FLAGS)
            if host.health_flags & hosts.PENDING_DYNAMIC_REMOVAL and host.health_flags & hosts.FAILED_ACTIVE_HC:
                gone.append(host)
            changed |= self._health_changed(host, before)
            if self.outlier is not None and not host.health_flags & hosts.FAILED_ACTIVE_HC:
                self.outlier.on_health_check_passed(host)
        for group in self._by_priority if gone else ():
            group[:] = [host for host in group if host not in gone]
        if changed or gone:
            self._rebuild()
            self._dismiss(gone)

    def set_flags(self, host: Host, set_bits: int = 0, clear_bits: int = 0) -> None:
        """Change a host's health flags, and the host sets if that changes its health."""
        before = host.health_flags
        host.health_flags = (before | set_bits) & ~clear_bits
        if self._health_changed(host, before):
            self._rebuild()

    def _health_changed(self, host: Host, before: int) -> bool:
        after = host.health_flags
        if after == before:
            return False
        if before & hosts.FAILED_ACTIVE_HC and not after & hosts.FAILED_ACTIVE_HC:
            host.last_healthy = self.context.clock()
        elif after & hosts.FAILED_ACTIVE_HC and not before & hosts.FAILED_ACTIVE_HC:
            drain(host)  # as Envoy: no further request on connections to a host that fails its checks
        elif after & hosts.FAILED_OUTLIER_CHECK and not before & hosts.FAILED_OUTLIER_CHECK:
            drain(host)  # or was ejected
        return True

    def _admit(self, added: Iterable[Host]) -> None:
        choose = self.options.choose_transport
        count = 0
        for host in added:
            host.transport, host.proxy_protocol = self._way if choose is None else choose(host.metadata, host.locality_metadata)
            count += 1
            if self.outlier is not None:
                self.outlier.add(host)
        if choose is None and count:
            self.stats.scope.counter("default.total_match_count", shared=True).n += count

    def _choose_again(self, before: Iterable[tuple[Host, dict[str, Any] | None, dict[str, Any] | None]]) -> None:
        """Hosts whose metadata says something else than `before` may have to be reached another way: then no request goes on over their connections."""
        choose = self.options.choose_transport
        for host, metadata, locality_metadata in before:
            if choose is not None and (host.metadata != metadata or host.locality_metadata != locality_metadata):
                chosen = choose(host.metadata, host.locality_metadata)
                if chosen[0] is not host.transport or chosen[1] != host.proxy_protocol:
                    host.transport, host.proxy_protocol = chosen
                    drain(host)

    def _dismiss(self, removed: Iterable[Host]) -> None:
        for host in removed:
            if self.outlier is not None:
                self.outlier.remove(host)
            drain(host)

    @property
    def drop_category(self) -> str:
        """Why requests are dropped, in the words of whoever gave the endpoints."""
        return self._assignment_policy.drop_category

    def _adopt_policy(self, assignment: Assignment) -> None:
        self._locality_weights = assignment.locality_weights
        self._assignment_policy = assignment.policy
        self._compile_drops(assignment.policy.drop_ratio)
        self.context.changes.n += 1

    def _compile_drops(self, ratio: float) -> None:
        runtime = self.context.runtime
        key = f"upstream.maintenance_mode.{self.name}"
        if runtime is not None:
            ratio = min(ratio, runtime.integer("load_balancing_policy.drop_overload_limit", 100) / 100.0)
        maintained = runtime is not None and runtime.integer(key, 0) > 0
        if not maintained and ratio <= 0.0:
            self.drops = None
            return

        def drops(generator: random.Random) -> str | None:
            if maintained and generator.random() * 100 < runtime.integer(key, 0):
                return "maintenance"
            if ratio >= 1.0:
                return "unconditional"
            return "drop_overload" if ratio > 0.0 and generator.random() < ratio else None

        self.drops = drops

    def _rebuild(self) -> None:
        """Sort the hosts by health and locality again and let the balancer decide again."""
        policy = self._assignment_policy
        weights = self._locality_weights
        self.host_sets = [
            HostSet(
                priority,
                group,
                locality_weights=weights[priority] if priority < len(weights) else None,
                local=self._local_locality,
                overprovisioning_factor=policy.overprovisioning_factor,
                weighted_health=policy.weighted_priority_health,
            )
            for priority, group in enumerate(self._by_priority)
        ]
        if isinstance(self._balancer, HashBalancer):
            check_weights(self.host_sets)
        if self._dry_run:
            return
        picker = self._balancer.rebuild(self.host_sets)
        if self._preconnect is not None:
            picker = self._preconnect.follow(picker)
        self.pick = picker if self._original_dst is None else self._original_dst.pick
        stats = self.stats
        stats.membership_total.n = sum(len(host_set.hosts) for host_set in self.host_sets)
        stats.membership_healthy.n = sum(len(host_set.healthy) for host_set in self.host_sets)
        stats.membership_degraded.n = sum(len(host_set.degraded) for host_set in self.host_sets)
        stats.membership_excluded.n = sum(len(host_set.excluded) for host_set in self.host_sets)
        if self._close_on_change:
            for host in self.hosts:
                drain(host)
        if self.on_hosts_changed is not None:
            self.on_hosts_changed()

    def runtime_changed(self) -> None:
        """Runtime values may say something else about dropping requests now."""
        self._compile_drops(self._assignment_policy.drop_ratio)

    def rebalance(self) -> None:
        """Decide again with the same hosts: something else that load balancing looks at has changed."""
        self._rebuild()

    # -- housekeeping

    def sweep(self) -> None:
        """Drop ORIGINAL_DST hosts that nothing uses any more. Called every `cleanup_interval`."""
        if self._original_dst is not None:
            self._original_dst.sweep()

    @property
    def sweep_interval(self) -> float:
        """Seconds between sweeps; 0 when there is nothing to sweep."""
        if self._original_dst is None:
            return 0.0
        return durations.seconds_of(self.proto, "cleanup_interval", original_dst.CLEANUP_INTERVAL)

    def publish(self) -> None:
        """Bring metrics up to date that are not kept per request."""
        self.stats.settle()
        self.stats.upstream_rq_active.n = self._active_requests()
        for limit in self.limits:
            limit.publish(self.stats.scope)

    def close(self) -> None:
        """The cluster is removed: its connections end when they are idle."""
        for host in self.hosts:
            drain(host)

    def find(self, address: Address) -> Host | None:
        """The host at `address`."""
        return next((host for host in self.hosts if host.address == address), None)

    def __repr__(self) -> str:
        return f"<Cluster {self.name}: {len(self.hosts)} hosts, {sum(len(host_set.healthy) for host_set in self.host_sets)} healthy>"


def drain(host: Host) -> None:
    """Let the host's connections end after what they are doing; new requests open new ones."""
    pools, host.pools = host.pools, None
    for pool in pools.values() if pools else ():
        pool.drain()


def _is_address(name: str) -> bool:
    try:
        canonical_ip(name)
    except ValueError:
        return False
    return True


def _without_port(authority: str) -> str:
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.rpartition(":")[0] if authority.count(":") == 1 else authority


def _node_locality(node: Any) -> Locality | None:
    if node is None or not node.HasField("locality"):
        return None
    return Locality(node.locality.region, node.locality.zone, node.locality.sub_zone)
