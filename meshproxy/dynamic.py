"""Main's dynamic configuration, put together: what is subscribed to, how an answer is checked, and what then changes here and in the workers.

Imported only when a bootstrap asks for something that is not in it. The parts are in `meshproxy.xds`; docs/decisions/0010-updates.md says how an update
reaches workers.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import marshal
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy import worker
from meshproxy.api import errors, messages, semantics
from meshproxy.api import secrets as api_secrets
from meshproxy.api.errors import ConfigError
from meshproxy.channel import Kind
from meshproxy.http import demand, extension_configs, route_configs
from meshproxy.http import manager as managers
from meshproxy.http.filters import on_demand
from meshproxy.net.filter_chain import NetworkContext
from meshproxy.net.listener import Listener
from meshproxy.scheduling import turns
from meshproxy.upstream.cluster_manager import Validator
from meshproxy.upstream.loads import Loads
from meshproxy.upstream.options import EDS
from meshproxy.xds import identity, sources
from meshproxy.xds.cache import Cache
from meshproxy.xds.client import Api
from meshproxy.xds.clusters import Clusters, Tell
from meshproxy.xds.endpoints import Eds
from meshproxy.xds.extensions import Extensions, ExtensionSubscription
from meshproxy.xds.listeners import ListenerUpdates
from meshproxy.xds.loads import LoadReporter
from meshproxy.xds.needs import Needs
from meshproxy.xds.on_demand import OnDemandClusters
from meshproxy.xds.resources import CLUSTER, LISTENER, WILDCARD
from meshproxy.xds.routes import Routes, RouteSubscription
from meshproxy.xds.runtime import RuntimeLayer
from meshproxy.xds.secrets import Secrets, SecretSubscription
from meshproxy.xds.subscription import Rules

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.listeners import Listeners
    from meshproxy.upstream.discovery import Discovery
    from meshproxy.workers import Pool
    from meshproxy.xds.health import HealthReporter
    from meshproxy.xds.subscription import Subscription

log = logging.getLogger("meshproxy.config")

# Allocations before the collector looks at the youngest objects, and how many such runs until it looks at older ones. An update makes very many objects that
# stay, and what it replaces leaves few cycles behind; the defaults (700, 10, 10) would look at all of it with every second update. The second number is small
# so that such a run, in which main does not give way, is short.
GC_THRESHOLDS = (1_000, 5, 200)
GC_AFTER_CHECKS = 64  # surroundings for checks, which are full of cycles, until the collector looks at everything
LOADS_DEADLINE = 1.0  # seconds that a load report waits for the workers


class Dynamic:
    """All subscriptions of the process. Construction makes those of the bootstrap, and starts none. Raises ConfigError.

    `clusters` and `listeners` are None where the bootstrap has no source for them. `forget(cluster)`, `remember(cluster, assignment, health)`: for workers
    that start later.
    """

    def __init__(self, bootstrap: Any, plan: worker.Plan, context: Context, pool: Pool, discovery: Discovery, listeners: Listeners, remember: Tell) -> None:
        self._bootstrap = bootstrap
        self._plan = plan
        self._context = context
        self._pool = pool
        self._discovery = discovery
        self._listeners = listeners
        self._remember = remember
        options = plan.options
        unknown = context.stats.counter("server.dynamic_unknown_fields")
        self._rules = Rules(
            options.unsupported,
            options.reject_unknown_dynamic_fields,
            lambda: setattr(unknown, "n", unknown.n + 1),
            warn_unknown=not options.ignore_unknown_dynamic_fields,
        )
        resources = bootstrap.dynamic_resources
        ads = resources.ads_config if resources.HasField("ads_config") else None
        workload = identity.find(bootstrap)
        local = identity.LocalIdentity(workload, context) if workload is not None else None
        cache = Cache(options.config_cache, context.loop) if options.config_cache else None
        self._sources = sources.Sources(context, self._rules, ads, _static_clusters(bootstrap, workload).__contains__, local, cache)
        self._scratches = 0  # that were made
        self.generation = 0  # another one with every change of clusters or secrets
        self._first_clusters = asyncio.Event()
        self._first_listeners = asyncio.Event()
        assert plan.routes is not None
        self._route_configs = plan.routes
        self.needs = Needs()
        self._routes = Routes(self._sources, context, self._rules, self._check_routes, self._tell_routes, self._answer_host)
        self._on_demand: dict[bytes, OnDemandClusters] = {}  # by serialised ConfigSource
        self._secrets = Secrets(self._sources, context, self._rules, self._tell_secret)
        self._extensions = Extensions(self._sources, context, self._rules, self._compile_manager, self._tell_extension)
        discovery.make_eds = lambda cluster, scope, on_changed: Eds(cluster, scope, on_changed, self._sources, context, self._rules)
        listeners.acquire = self._acquire
        self._layers: list[RuntimeLayer] = []
        self._first_layers: list[asyncio.Event] = []
        for at, layer in enumerate(bootstrap.layered_runtime.layers):
            if layer.HasField("rtds_layer"):
                first = asyncio.Event()
                with errors.under(f"layered_runtime.layers[{at}].rtds_layer.rtds_config"):
                    self._layers.append(RuntimeLayer(layer, self._sources, context, self._tell_layer, first.set))
                self._first_layers.append(first)
        self._loads: LoadReporter | None = None
        self._own_loads = Loads(context.clusters)
        self._reported: Counter[str] = Counter()  # clusters with an lrs_server, by the number of their versions
        is_static = _static_clusters(bootstrap, workload).__contains__
        if bootstrap.cluster_manager.HasField("load_stats_config"):
            with errors.under("cluster_manager.load_stats_config"):
                self._loads = LoadReporter(Api(bootstrap.cluster_manager.load_stats_config, is_static), context, self._gather_loads)
        elif (api := _control_plane(resources)) is not None:
            self._loads = LoadReporter(Api(api, is_static), context, self._gather_loads, self._reported.__contains__)
        self._health: HealthReporter | None = None
        if bootstrap.HasField("hds_config"):
            from meshproxy.xds.health import HealthReporter  # few need health checks in memory

            with errors.under("hds_config"):
                self._health = HealthReporter(Api(bootstrap.hds_config, is_static), context, self._rules, self._acquire_secrets)
        self.clusters: Clusters | None = None
        self.listeners: ListenerUpdates | None = None
        self._cds: Subscription | None = None
        self._lds: Subscription | None = None
        if resources.HasField("cds_config"):
            self.clusters = self._make_clusters()
            with errors.under("dynamic_resources.cds_config"):
                self._cds = self._sources.subscribe(resources.cds_config, CLUSTER, WILDCARD, self.clusters, context.stats.scope("cluster_manager.cds."))
        if resources.HasField("lds_config"):
            self.listeners = ListenerUpdates(listeners, context, self._check_listener, self._first_listeners.set)
            with errors.under("dynamic_resources.lds_config"):
                self._lds = self._sources.subscribe(resources.lds_config, LISTENER, WILDCARD, self.listeners, context.stats.scope("listener_manager.lds."))

    def _make_clusters(self) -> Clusters:
        tell = Tell(self._tell_cluster, self._tell_clusters_removed)
        context = self._context
        made = Clusters(context.clusters, self._discovery, context, self._rules, self._new_cluster_check, tell, self._first_clusters.set)
        made.acquire = self._acquire_for_cluster
        made.on_active = self._cluster_is_active
        return made

    # -- what requests wait for

    def demand(self, what: tuple[str, bytes, str], timeout: float) -> None:
        """A request in a worker needs something: see http.demand."""
        kind, key, name = what
        if kind == demand.HOST:
            routes = self.needs.known.get(b"routes:" + key)
            hosts = routes.hosts if isinstance(routes, RouteSubscription) else None
            if hosts is None:
                self._answer(what, found=False)
            else:
                hosts.demand(name)
            return
        try:
            source = self._on_demand_source(messages.known("envoy.config.core.v3.ConfigSource").FromString(key))
        except ConfigError as error:  # of a route, which is not looked at so closely
            log.warning("clusters on demand: %s", error)
            self._answer(what, found=False)
            return
        source.demand(name, timeout)

    def _on_demand_source(self, source: Any) -> OnDemandClusters:
        """Where clusters come from on demand. Raises ConfigError."""
        key = source.SerializeToString(deterministic=True)
        found = self._on_demand.get(key)
        if found is None:
            if self.clusters is None:
                self.clusters = self._make_clusters()
            found = self._on_demand[key] = OnDemandClusters(
                source, self._sources, self.clusters, self._context, lambda name, found: self._answer((demand.CLUSTER, key, name), found=found)
            )
        return found

    def _cluster_is_active(self, name: str) -> None:
        for source in self._on_demand.values():
            source.settle(name, True)

    def _answer_host(self, key: bytes, host: str) -> None:
        self._answer((demand.HOST, key, host), found=True)

    def _answer(self, what: tuple[str, bytes, str], *, found: bool) -> None:
        self._pool.broadcast(Kind.DEMANDED, marshal.dumps((what, found)))

    # -- the start, in Envoy's order

    async def initialise(self) -> None:
        """Ask for clusters and wait until they are warm, then for routes and listeners. What does not come in time is gone without."""
        turns.lengthen()
        gc.set_threshold(*GC_THRESHOLDS)
        if self._sources.ads is not None:
            self._sources.ads.start()
        if self._loads is not None and self._bootstrap.cluster_manager.HasField("load_stats_config"):
            self._loads.start()
        for layer in self._layers:
            layer.subscription.start()
        for first in self._first_layers:
            await first.wait()
        if self._layers:
            self._count_runtime_load()  # as Envoy, which loads once more when all layers are there
        if self._health is not None:
            self._health.start()
        await _all_ready(self._acquire_for_cluster, self._bootstrap.static_resources.clusters)
        self._discovery.start(eds=True)
        await self._discovery.wait_initialised()
        if self._cds is not None:
            self._cds.start()
            await self._first_clusters.wait()
            await self._discovery.wait_initialised()
        await _all_ready(self._acquire, self._bootstrap.static_resources.listeners)
        if self._lds is not None:
            self._lds.start()
            await self._first_listeners.wait()
        await self._listeners.wait_warm()

    def close(self) -> None:
        """Watch nothing any more."""
        if self._loads is not None:
            self._loads.close()
        if self._health is not None:
            self._health.close()
        self._sources.close()

    # -- checks, in surroundings of their own

    def _scratch(self) -> Context:
        self._scratches += 1
        if not self._scratches % GC_AFTER_CHECKS:
            self._context.loop.call_soon(gc.collect)
        return worker.make_context(None, self._bootstrap, self._plan, worker_id=0)

    def _new_cluster_check(self) -> Callable[[Any], None]:
        bootstrap = self._bootstrap
        return Validator(self._scratch(), bootstrap.cluster_manager if bootstrap.HasField("cluster_manager") else None).check

    def _check_listener(self, proto: Any) -> None:
        self._rules.check(proto)
        semantics.check_listener(proto, self._context.clusters)
        Listener(proto, [], self._scratch())

    def _check_routes(self, manager: Any, routes: Any) -> None:
        """Compile a connection manager with a route configuration, for what only that shows."""
        whole = type(manager)()
        whole.CopyFrom(manager)
        whole.route_config.CopyFrom(routes)
        whole.route_config.ClearField("vhds")  # they come on their own, and are among the others here
        self._compile_manager(whole)

    def _compile_manager(self, manager: Any) -> None:
        scratch = self._scratch()
        managers.compile(manager, NetworkContext(scratch, scratch.stats.scope("")))

    def _acquire(self, listener: Any, ready: Callable[[], None]) -> Callable[[], None]:
        for source in on_demand.sources(listener):
            self._on_demand_source(source)
        wanted = [*self._routes.wanted(listener), *self._secrets.wanted(listener), *self._extensions.wanted(listener, self.needs)]
        return self.needs.acquire(wanted, ready)

    def _acquire_secrets(self, cluster: Any, ready: Callable[[], None]) -> Callable[[], None]:
        return self.needs.acquire(list(self._secrets.wanted(cluster)), ready)

    def _acquire_for_cluster(self, cluster: Any, ready: Callable[[], None]) -> Callable[[], None]:
        release = self._acquire_secrets(cluster, ready)
        if not cluster.HasField("lrs_server") or self._loads is None:
            return release
        self._reported[cluster.name] += 1
        self._loads.start()
        return lambda: self._let_go(cluster.name, release)

    def _let_go(self, name: str, release: Callable[[], None]) -> None:
        """A version of a cluster with an lrs_server is gone."""
        self._reported[name] -= 1
        if not self._reported[name]:
            del self._reported[name]
        release()

    async def _gather_loads(self) -> list[dict[str, Any]]:
        """What all processes have counted since the last time (upstream.loads)."""
        answers = await self._pool.gather(Kind.COLLECT, b"loads", timeout=LOADS_DEADLINE)
        return [self._own_loads.take(), *map(marshal.loads, answers)]

    @property
    def known_secrets(self) -> api_secrets.Secrets:
        """Those of the bootstrap, and what has come by discovery."""
        return self._context.secrets

    @property
    def subscriptions(self) -> list[Subscription]:
        """Everything that is asked for, of files and of control planes."""
        return self._sources.subscriptions

    @property
    def routes(self) -> list[RouteSubscription]:
        """Every route configuration that somebody needs."""
        return [one for one in self.needs.known.values() if isinstance(one, RouteSubscription)]

    @property
    def extensions(self) -> list[ExtensionSubscription]:
        """Every configuration of a filter that somebody needs."""
        return [one for one in self.needs.known.values() if isinstance(one, ExtensionSubscription)]

    @property
    def secrets(self) -> list[SecretSubscription]:
        """Every secret that somebody needs."""
        return [one for one in self.needs.known.values() if isinstance(one, SecretSubscription)]

    # -- to the workers

    def _tell_cluster(self, name: str, serialised: bytes, assignment: bytes | None, health: dict[str, int]) -> None:
        self.generation += 1
        self._remember.changed(name, serialised, assignment, health)
        self._pool.broadcast(Kind.CLUSTER, marshal.dumps((name, serialised, assignment, health)))

    def _tell_clusters_removed(self, names: list[str]) -> None:
        self.generation += 1
        self._remember.removed(names)
        self._pool.broadcast(Kind.CLUSTER_REMOVED, marshal.dumps(names))

    def _tell_routes(self, key: bytes, serialised: bytes) -> None:
        if serialised:
            self._route_configs.serialised[key] = serialised
        else:
            self._route_configs.forget(key)
        self._pool.broadcast(Kind.ROUTES, marshal.dumps((key, serialised)))

    def _tell_extension(self, key: bytes, serialised: bytes) -> None:
        inherited = self._plan.extensions
        assert inherited is not None
        if serialised:
            inherited[key] = serialised
        else:
            inherited.pop(key, None)
        self._pool.broadcast(Kind.EXTENSION, marshal.dumps((key, serialised)))

    def _tell_layer(self, layer: str, struct: bytes) -> None:
        self._plan.runtime_layers[layer] = struct
        self._context.runtime.replace_layer(layer, struct)
        self._context.clusters.runtime_changed()
        self._count_runtime_load()
        self._pool.broadcast(Kind.RUNTIME_LAYER, marshal.dumps((layer, struct)))

    def _count_runtime_load(self) -> None:
        for name in ("load_success", "override_dir_not_exists"):
            self._context.stats.counter(f"runtime.{name}").n += 1

    def _tell_secret(self, key: bytes, serialised: bytes) -> None:
        self.generation += 1
        inherited = self._plan.secrets
        assert inherited is not None
        if serialised:
            inherited[key] = serialised
        else:
            inherited.pop(key, None)
        self._context.secrets.update(key, serialised)
        self._pool.broadcast(Kind.SECRET, marshal.dumps((key, serialised)))


def check_sources(bootstrap: Any, problems: errors.Collector) -> None:
    """Note the config sources of a bootstrap that can be none."""
    resources = bootstrap.dynamic_resources
    workload = None
    with problems.under(""):
        workload = identity.find(bootstrap)
    if workload is not None:
        with problems.under("bootstrap_extensions: meshproxy.identity.v1.Workload"):
            identity.check(workload, _static_clusters(bootstrap, None).__contains__)
    is_static = _static_clusters(bootstrap, workload).__contains__
    has_ads = resources.HasField("ads_config")

    def check(path: str, source: Any) -> None:
        with problems.under(path):
            sources.check(source, is_static, has_ads=has_ads)

    if has_ads:
        with problems.under("dynamic_resources.ads_config"):
            Api(resources.ads_config, is_static)
    if bootstrap.cluster_manager.HasField("load_stats_config"):
        with problems.under("cluster_manager.load_stats_config"):
            Api(bootstrap.cluster_manager.load_stats_config, is_static)
    if bootstrap.HasField("hds_config"):
        with problems.under("hds_config"):
            Api(bootstrap.hds_config, is_static)
    for name in ("cds_config", "lds_config"):
        if resources.HasField(name):
            check(f"dynamic_resources.{name}", getattr(resources, name))
    for at, cluster in enumerate(bootstrap.static_resources.clusters):
        if cluster.eds_cluster_config.HasField("eds_config"):
            check(f"static_resources.clusters[{at}].eds_cluster_config.eds_config", cluster.eds_cluster_config.eds_config)
    for at, listener in enumerate(bootstrap.static_resources.listeners):
        for manager in route_configs.managers(listener):
            check(f"static_resources.listeners[{at}]: rds.config_source", manager.rds.config_source)
        for source in on_demand.sources(listener):
            check(f"static_resources.listeners[{at}]: odcds.source", source)
        for user in extension_configs.filters(listener):
            source = extension_configs.at(*user).config_discovery.config_source
            check(f"static_resources.listeners[{at}]: {extension_configs.path(user[1])}.config_discovery.config_source", source)
    for at, layer in enumerate(bootstrap.layered_runtime.layers):
        if layer.HasField("rtds_layer"):
            check(f"layered_runtime.layers[{at}].rtds_layer.rtds_config", layer.rtds_layer.rtds_config)
    for kind in ("clusters", "listeners"):
        for at, holder in enumerate(getattr(bootstrap.static_resources, kind)):
            for reference, _ in api_secrets.references(holder):
                check(f"static_resources.{kind}[{at}]: {reference.name}: sds_config", reference.sds_config)


async def _all_ready(acquire: Callable[[Any, Callable[[], None]], Callable[[], None]], holders: Any) -> None:
    """Acquire what all of these need, and wait for it: all at the same time, so that what does not come is waited for once."""
    events = []
    for one in holders:
        ready = asyncio.Event()
        acquire(one, ready.set)
        events.append(ready)
    for ready in events:
        await ready.wait()


def _control_plane(resources: Any) -> Any:
    """The ApiConfigSource that clusters come from: what `lrs_server: self` means. None where there is none."""
    source = resources.cds_config
    if source.WhichOneof("config_source_specifier") == "api_config_source":
        return source.api_config_source
    return resources.ads_config if source.HasField("ads") else None


def _static_clusters(bootstrap: Any, workload: Any) -> set[str]:
    """The clusters that need no control plane: those that may lead to one. With them is the one in whose place our own identity answers."""
    found = {cluster.name for cluster in bootstrap.static_resources.clusters if cluster.type != EDS}
    if workload is not None:
        found.add(identity.serves(workload))
    return found
