"""Requests that wait for what they need: the virtual host of their host, where a route configuration gets such by VHDS, and the cluster of their route, by
ODCDS (envoy.extensions.filters.http.on_demand.v3.OnDemand). What has come is found when the request begins anew, with the filters of its route.

A request that finds both is not held up, and one that repeats itself (`http.plan`) not even looked at: it has a plan because it found them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, messages, registry
from meshproxy.api.durations import seconds
from meshproxy.http import demand
from meshproxy.http.filter_chain import SETTLED
from meshproxy.http.stream import ANEW

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator, Sequence

    from meshproxy.http.filters import FilterContext
    from meshproxy.http.stream import Stream

_P = "envoy.extensions.filters.http.on_demand.v3."
TYPE_URL = f"{registry.TYPE_PREFIX}{_P}OnDemand"
ROUTE_TYPE_URLS = (f"{registry.TYPE_PREFIX}{_P}PerRouteConfig",)
HONOURS = {f"{_P}OnDemand": "odcds", f"{_P}PerRouteConfig": "odcds", f"{_P}OnDemandCds": "source timeout"}

DEFAULT_TIMEOUT = 5.0  # seconds for a cluster
_DELTA_GRPC = 3  # envoy.config.core.v3.ApiConfigSource.ApiType
_HCM = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


def compile(proto: Any, context: FilterContext) -> OnDemand:
    """The filter. Raises ConfigError with paths relative to `proto`."""
    return OnDemand(proto, context)


def specialise(base: OnDemand, configs: Sequence[Any], context: FilterContext) -> OnDemand:
    """For a route: what the most specific configuration says."""
    return OnDemand(configs[-1], context)


class OnDemand:
    """The filter of a connection manager, or of a route. `source`: where clusters come from, serialised; empty: they do not come."""

    name = ""
    request_headers_repeated = SETTLED

    def __init__(self, proto: Any, context: FilterContext) -> None:
        self._context = context.context
        self._clusters = context.clusters
        self.source = b""
        self.timeout = DEFAULT_TIMEOUT
        if proto.HasField("odcds"):
            odcds = proto.odcds
            if not odcds.HasField("source"):
                errors.fail("odcds.source", "clusters by xdstp:// names are not supported", errors.UNSUPPORTED)
            with errors.under("odcds.source"):
                check_delta(odcds.source, "on-demand clusters")
            self.source = odcds.source.SerializeToString(deterministic=True)
            if odcds.HasField("timeout"):
                self.timeout = seconds(odcds.timeout)

    def request_headers(self, stream: Stream, end_stream: bool) -> Awaitable[Any] | None:
        """Go on if everything is there, else wait."""
        route = stream.route
        if route is None:
            key = stream.manager.asks_for_hosts
            authority = stream.request.authority  # type: ignore[union-attr]
            if key is None or not authority or self._context.demand is None:
                return None
            host = demand.name_of(authority.lower())
            return None if host is None else self._wait_for_host(stream, (demand.HOST, key, host))
        if not self.source or route.reply is not None:
            return None
        name = route.cluster_name
        if not name and route.select_cluster is not None:
            name = demand.name_of(route.select_cluster(stream) or b"")
        if not name or name in self._clusters or self._context.demand is None:
            return None
        return self._wait_for_cluster((demand.CLUSTER, self.source, name))

    async def _wait_for_host(self, stream: Stream, what: demand.What) -> Any:
        await self._context.demand.wait(what)
        return ANEW if stream.manager.match(stream) is not None else None

    async def _wait_for_cluster(self, what: demand.What) -> Any:
        return ANEW if await self._context.demand.wait(what, self.timeout) else None


def check_delta(source: Any, what: str) -> None:
    """Only delta streams can say of single resources that they are not there. Raises ConfigError for a ConfigSource that is none."""
    which = source.WhichOneof("config_source_specifier")
    if which != "ads" and (which != "api_config_source" or source.api_config_source.api_type != _DELTA_GRPC):
        errors.fail("", f"{what}: only 'DELTA_GRPC' or 'ADS' (which uses Delta xDS) is supported as a config source.")


def sources(listener: Any) -> Iterator[Any]:
    """The sources of clusters that a `Listener` names in its filters: ConfigSource messages."""
    for chain in (*listener.filter_chains, *([listener.default_filter_chain] if listener.HasField("default_filter_chain") else ())):
        for entry in chain.filters:
            if messages.full_name(entry.typed_config.type_url) == _HCM:
                manager = registry.unpack(entry.typed_config)
                for one in (*manager.http_filters, *(one for config in manager.upgrade_configs for one in config.filters)):
                    if one.HasField("typed_config") and registry.type_url(one.typed_config) == TYPE_URL:
                        config = registry.unpack(one.typed_config)
                        if config.odcds.HasField("source"):
                            yield config.odcds.source
