"""Discovery: what main finds out about clusters while workers move traffic, names to resolve (STRICT_DNS, LOGICAL_DNS), endpoints that a control plane
or a file says (EDS, by `meshproxy.xds`), and active health checks.

Results become ClusterLoadAssignment messages and health flags, which main's own cluster manager keeps (for admin, and to replay them to a new worker) and
which callbacks pass on to the workers.

Names are resolved by the system's resolver (`getaddrinfo`, in a thread), so /etc/hosts, search domains and nsswitch.conf count as they do for every other
program. It tells no time to live: with `respect_dns_ttl` a name is resolved again after 60 seconds, as Envoy does with its own getaddrinfo resolver.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.api import messages
from meshproxy.api.durations import seconds_of
from meshproxy.net import tasks
from meshproxy.net.address import canonical_ip
from meshproxy.upstream.options import EDS, LOGICAL_DNS, STRICT_DNS, ClusterOptions, discovery_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope
    from meshproxy.upstream.cluster_manager import ClusterManager
    from meshproxy.upstream.health import Checker

HONOURS = {
    "envoy.config.cluster.v3.Cluster.RefreshRate": "base_interval max_interval",
    "envoy.extensions.clusters.dns.v3.DnsCluster": (
        "dns_refresh_rate dns_failure_refresh_rate respect_dns_ttl dns_jitter dns_lookup_family typed_dns_resolver_config all_addresses_in_single_endpoint"
    ),
    "envoy.extensions.clusters.dns.v3.DnsCluster.RefreshRate": "base_interval max_interval",
    "envoy.extensions.network.dns_resolver.getaddrinfo.v3.GetAddrInfoDnsResolverConfig": "",
    "envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig": "",
}

log = logging.getLogger("meshproxy.upstream")

REFRESH_RATE = 5.0
SYSTEM_TTL = 60.0  # what respect_dns_ttl means with a resolver that tells no TTL
MIN_INTERVAL = 0.001

AUTO, V4_ONLY, V6_ONLY, V4_PREFERRED, ALL = range(5)  # envoy.config.cluster.v3.Cluster.DnsLookupFamily

# (name) -> IP addresses of both families, the best first. Raises OSError; an empty list means that the name exists without addresses or not at all.
Resolve = Callable[[str], Awaitable[list[str]]]
OnEndpoints = Callable[[str, bytes], None]  # cluster name, serialised ClusterLoadAssignment
OnHealth = Callable[[str, "Mapping[str, int]"], None]  # cluster name, address text -> active health flags


async def system_resolve(name: str) -> list[str]:
    """Ask the system's resolver."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
            return []  # an answer, and the answer is: nobody
        raise
    return [str(sockaddr[0]) for _, _, _, _, sockaddr in found]


def choose_family(addresses: list[str], family: int) -> list[str]:
    """The addresses that a lookup family wants, each once. AUTO: IPv6 if there is any, else IPv4; V4_PREFERRED the other way round."""
    addresses = list(dict.fromkeys(addresses))
    v4 = [address for address in addresses if ":" not in address]
    v6 = [address for address in addresses if ":" in address]
    return {AUTO: v6 or v4, V4_ONLY: v4, V6_ONLY: v6, V4_PREFERRED: v4 or v6, ALL: addresses}[family]


class Backoff:
    """Delays after failures: random below an interval that doubles up to a maximum; fixed when there is no `base`."""

    def __init__(self, proto: Any, refresh_rate: float, random: Callable[[], float]) -> None:
        configured = proto.HasField("dns_failure_refresh_rate")
        rate = proto.dns_failure_refresh_rate
        self._fixed = None if configured else refresh_rate
        self._base = seconds_of(rate, "base_interval", refresh_rate) if configured else refresh_rate
        self._max = seconds_of(rate, "max_interval", self._base * 10) if configured else refresh_rate
        self._random = random
        self._next = self._base

    def delay(self) -> float:
        """Seconds until the next attempt."""
        if self._fixed is not None:
            return self._fixed
        interval = self._next
        self._next = min(interval * 2, self._max)
        return interval * self._random()

    def reset(self) -> None:
        """There was a success."""
        self._next = self._base


class Target:
    """One name of a cluster and what it resolved to last; a literal address is its own result."""

    def __init__(self, group: Any, endpoint: Any) -> None:
        self.group = group
        self.endpoint = endpoint
        address = endpoint.endpoint.address.socket_address
        self.name: str = address.address
        self.port: int = address.port_value
        self.addresses: list[str] = []

    def lb_endpoints(self) -> list[Any]:
        """The endpoint once for each address."""
        result = []
        for ip in self.addresses:
            copy = type(self.endpoint)()
            copy.CopyFrom(self.endpoint)
            copy.endpoint.address.socket_address.address = ip
            if not copy.endpoint.hostname:
                copy.endpoint.hostname = self.name
            result.append(copy)
        return result


class DnsCluster:
    """Resolves the names of one cluster, each at its own pace."""

    def __init__(self, proto: Any, options: ClusterOptions, context: Context, resolve: Resolve, scope: Scope, on_changed: Callable[[Any], None]) -> None:
        self._proto = proto
        self._logical = options.type == LOGICAL_DNS
        dns = options.dns if options.dns is not None else proto
        self._family = _family(options, proto)
        self._refresh_rate = max(seconds_of(dns, "dns_refresh_rate", REFRESH_RATE), MIN_INTERVAL)
        self._jitter = seconds_of(dns, "dns_jitter", 0.0)
        self._respect_ttl: bool = dns.respect_dns_ttl
        self._dns = dns
        self._context = context
        self._resolve = resolve
        self._on_changed = on_changed
        self._attempt = scope.counter("update_attempt", shared=True)
        self._success = scope.counter("update_success", shared=True)
        self._failure = scope.counter("update_failure", shared=True)
        self._no_rebuild = scope.counter("update_no_rebuild", shared=True)
        self.resolved = asyncio.Event()  # a first answer, good or bad, is there
        self._targets = [Target(group, endpoint) for group in proto.load_assignment.endpoints for endpoint in group.lb_endpoints]
        self._tasks: list[asyncio.Task[None]] = []
        if not self._targets or (proto.HasField("wait_for_warm_on_init") and not proto.wait_for_warm_on_init.value):
            self.resolved.set()

    def start(self) -> None:
        """Begin to resolve."""
        self._tasks = [tasks.spawn(f"resolve {target.name}", self._run(target)) for target in self._targets]

    def close(self) -> None:
        """Stop."""
        for task in self._tasks:
            task.cancel()

    async def _run(self, target: Target) -> None:
        backoff = Backoff(self._dns, self._refresh_rate, self._context.random.random)
        while True:
            delay = await self._once(target, backoff)
            self.resolved.set()
            await asyncio.sleep(delay)

    async def _once(self, target: Target, backoff: Backoff) -> float:
        """Resolve once; the delay until the next time."""
        self._attempt.n += 1
        try:
            addresses = choose_family(await self._lookup(target.name), self._family)
        except (OSError, UnicodeError) as error:
            log.debug("resolving %s for cluster %s failed: %s", target.name, self._proto.name, error)
            self._failure.n += 1
            return backoff.delay()
        if self._logical:
            if not addresses:  # the last known address is better than none
                self._failure.n += 1
                return backoff.delay()
            addresses = addresses[:1]
        self._success.n += 1
        backoff.reset()
        if addresses == target.addresses:
            self._no_rebuild.n += 1
        elif set(addresses) == set(target.addresses):
            self._no_rebuild.n += 1  # resolvers rotate; the order means nothing
        else:
            target.addresses = addresses
            self._on_changed(self.assignment())
        delay = SYSTEM_TTL if self._respect_ttl and addresses else self._refresh_rate
        return delay + (self._jitter * self._context.random.random() if self._jitter else 0.0)

    async def _lookup(self, name: str) -> list[str]:
        try:
            return [canonical_ip(name)]
        except ValueError:
            return await self._resolve(name)

    def assignment(self) -> Any:
        """The cluster's endpoints as far as they are resolved."""
        original = self._proto.load_assignment
        message = messages.known("envoy.config.endpoint.v3.ClusterLoadAssignment")(cluster_name=self._proto.name)
        if original.HasField("policy"):
            message.policy.CopyFrom(original.policy)
        targets = iter(self._targets)
        for group in original.endpoints:
            copy = message.endpoints.add()
            copy.CopyFrom(group)
            del copy.lb_endpoints[:]
            if self._logical:
                copy.priority = 0
            for _ in group.lb_endpoints:
                copy.lb_endpoints.extend(next(targets).lb_endpoints())
        return message


def _family(options: ClusterOptions, proto: Any) -> int:
    if options.dns is None:
        return int(proto.dns_lookup_family)
    # envoy.extensions.clusters.common.dns.v3.DnsLookupFamily counts from UNSPECIFIED, which means AUTO.
    return max(int(options.dns.dns_lookup_family) - 1, 0)


class Source(Protocol):
    """Where the endpoints of a cluster come from: names to resolve, or a control plane."""

    resolved: asyncio.Event  # a first answer, good or bad, is there

    def start(self) -> None:
        """Begin to ask."""

    def close(self) -> None:
        """Stop."""


# (cluster, scope, on_changed) -> the source of the endpoints of an EDS cluster.
MakeEds = Callable[[Any, "Scope", Callable[[Any], None]], Source]


class Watch:
    """What is found out about one version of a cluster. Until it is `activate`d nobody hears of it: the version before may still be in use.

    `assignment`: serialised, None while nothing is known (or nothing is to be known) of endpoints. `health`: address text -> flags.
    """

    def __init__(self, proto: Any, discovery: Discovery) -> None:
        self.name: str = proto.name
        self.proto = proto
        self.assignment: bytes | None = None
        self.health: dict[str, int] = {}
        self._discovery = discovery
        self._active = False
        self.checker: Checker | None = None  # active health checks, if there are any
        self._source: Source | None = None
        context = discovery.context
        scope = context.stats.scope(f"cluster.{proto.alt_stat_name or proto.name}.")
        if proto.health_checks:
            from meshproxy.upstream.health import Checker

            self.checker = Checker(proto, context, scope, self._health_changed)
        options = discovery_options(proto)
        if options.type in (STRICT_DNS, LOGICAL_DNS):
            self._source = DnsCluster(proto, options, context, discovery.resolve, scope, self._endpoints_changed)
        elif options.type == EDS:
            assert discovery.make_eds is not None
            self._source = discovery.make_eds(proto, scope, self._endpoints_changed)

    @staticmethod
    def is_needed(proto: Any) -> bool:
        """Whether there is anything to find out about a cluster."""
        return bool(proto.health_checks) or proto.HasField("cluster_type") or proto.type in (STRICT_DNS, LOGICAL_DNS, EDS)

    def same_service(self, other: Watch) -> bool:
        """Whether both ask the same source for the same endpoints."""
        one, two = self.proto, other.proto
        named = one.eds_cluster_config.service_name == two.eds_cluster_config.service_name
        return bool(one.type == two.type == EDS and named and one.eds_cluster_config.eds_config == two.eds_cluster_config.eds_config)

    def start(self) -> None:
        """Begin to resolve, to ask and to check."""
        if self._source is not None:
            self._source.start()
        elif self.checker is not None:
            self.checker.update(self.proto.load_assignment)

    async def wait_warm(self) -> None:
        """Wait for a first answer about endpoints and a first health check of each."""
        if self._source is not None:
            await self._source.resolved.wait()
        if self.checker is not None and (self._source is None or self.assignment is not None):  # else there is nobody to check
            await self.checker.wait_first_round()

    def activate(self) -> None:
        """From now on changes are passed on. What was found out before is for whoever asks."""
        self._active = True

    def close(self) -> None:
        """Stop everything."""
        for part in (self._source, self.checker):
            if part is not None:
                part.close()
        self._source = self.checker = None  # they know us, and would wait for the collector

    def _endpoints_changed(self, assignment: Any) -> None:
        self.assignment = assignment.SerializeToString()
        if self._active:
            self._discovery.endpoints_changed(self.name, self.assignment)
        if self.checker is not None:
            self.checker.update(assignment)

    def _health_changed(self, flags: Mapping[str, int]) -> None:
        self.health.update(flags)
        if self._active:
            self._discovery.health_changed(self.name, flags)


class Discovery:
    """All of it, in main. `start` it inside the running loop."""

    def __init__(
        self,
        manager: ClusterManager,
        context: Context,
        *,
        on_endpoints: OnEndpoints,
        on_health: OnHealth,
        resolve: Resolve = system_resolve,
    ) -> None:
        self._manager = manager
        self.context = context
        self._on_endpoints = on_endpoints
        self._on_health = on_health
        self.resolve = resolve
        self.make_eds: MakeEds | None = None  # set when the configuration has dynamic resources
        self._watches: dict[str, Watch] = {}

    def start(self, *, eds: bool = False) -> None:
        """Begin with every cluster that the manager knows. Those by EDS come later (`eds`): they may be asked for over another one."""
        for name in self._manager.names():
            if (self._manager.proto(name).type == EDS) is eds:
                self.add(name)

    def add(self, name: str) -> None:
        """Begin with one cluster."""
        proto = self._manager.proto(name)
        if not Watch.is_needed(proto):
            return
        watch = self._watches[name] = Watch(proto, self)
        watch.activate()
        self._manager.waiting.add(name)
        watch.start()
        tasks.spawn(f"warm {name}", self._warm(watch))

    def adopt(self, name: str, watch: Watch | None) -> None:
        """A new version of a cluster is in use from now on, with what `watch` found out about it."""
        self.remove(name)
        if watch is not None:
            self._watches[name] = watch
            watch.activate()

    def remove(self, name: str) -> None:
        """A cluster is gone."""
        found = self._watches.pop(name, None)
        if found is not None:
            found.close()
        self._manager.warmed(name)

    async def _warm(self, watch: Watch) -> None:
        await watch.wait_warm()
        if self._watches.get(watch.name) is watch:
            self._manager.warmed(watch.name)

    async def wait_initialised(self) -> None:
        """Wait until every cluster has had a first answer for its names and a first health check of its hosts."""
        await self._manager.wait_warm()

    def endpoints_changed(self, name: str, serialised: bytes) -> None:
        """The endpoints of a cluster in use are others now."""
        if name not in self._manager.waiting:
            self._manager.updated.n += 1
        self._manager.update_endpoints(name, serialised)
        self._on_endpoints(name, serialised)

    def health_changed(self, name: str, flags: Mapping[str, int]) -> None:
        """So is the health of some of its hosts."""
        self._manager.set_health(name, flags)
        self._on_health(name, flags)

    def failed_immediately(self, name: str, address: str) -> None:
        """A worker saw a response that says that its host is out of service."""
        watch = self._watches.get(name)
        if watch is not None and watch.checker is not None:
            watch.checker.fail_immediately(address)

    def ejected(self, name: str, address: str) -> None:
        """A worker's outlier detection has ejected a host: the workers want to hear of its next passing check."""
        watch = self._watches.get(name)
        if watch is not None and watch.checker is not None:
            watch.checker.report_next_success(address)

    def close(self) -> None:
        """Stop everything."""
        for name in list(self._watches):
            self.remove(name)
