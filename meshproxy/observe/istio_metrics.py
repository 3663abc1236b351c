"""Istio's standard metrics: what a request or a connection counts, under which labels (docs/metrics.md).

Source: stats.PluginConfig (contrib/istio in Envoy) and Istio's list of standard metrics. The HTTP and the network filter of that name find out who is
concerned and how it ended, and ask here for a `Request` or a `Connection`, in which they count. Those are remembered: a request whose like was there before
costs a look-up and three additions to dicts, which become metrics when statistics are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary, finalize

from meshproxy.api import attributes
from meshproxy.api.errors import fail, under
from meshproxy.observe import flags as response_flags
from meshproxy.observe import peers
from meshproxy.observe.peers import NOBODY, Peer
from meshproxy.observe.stats import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.observe.stats import Store, Tag

HONOURS = {
    "stats.PluginConfig": "disable_host_header_fallback tcp_reporting_duration metrics reporter",
    "stats.MetricConfig": "dimensions name tags_to_remove drop",
}

INBOUND = 1  # envoy.config.core.v3.TrafficDirection
_PREFIX = "istiocustom.istio_"
_HTTP = ("requests_total", "request_duration_milliseconds", "request_bytes", "response_bytes")
_GRPC = ("request_messages_total", "response_messages_total")
_TCP = ("tcp_connections_opened_total", "tcp_connections_closed_total", "tcp_sent_bytes_total", "tcp_received_bytes_total")
METRICS = (*_HTTP, *_GRPC, *_TCP)
LABELS = frozenset(
    (
        "reporter", "source_workload", "source_workload_namespace", "source_principal", "source_app", "source_version", "source_canonical_service",
        "source_canonical_revision", "source_cluster", "destination_workload", "destination_workload_namespace", "destination_principal", "destination_app",
        "destination_version", "destination_service", "destination_service_name", "destination_service_namespace", "destination_canonical_service",
        "destination_canonical_revision", "destination_cluster", "request_protocol", "response_flags", "connection_security_policy", "response_code",
        "grpc_response_status",
    )
)  # fmt: skip
_UNKNOWN = "unknown"
_LATEST = "latest"
NO_PRINCIPALS = "", ""
# Peers say who they are themselves. From here on they are not told apart: nobody shall fill memory with names.
_MAX_LABEL_SETS = 4096
_MAX_REMEMBERED = 8192
_MAX_VALUE = 256  # characters of a label's value
# Clusters that are no services, after which destinations are named.
_NO_SERVICES = frozenset(
    ("BlackHoleCluster", "PassthroughCluster", "InboundPassthroughCluster", "InboundPassthroughClusterIpv4", "InboundPassthroughClusterIpv6")
)
_NAMED_ROUTES = {"block_all": "BlackHoleCluster", "allow_any": "PassthroughCluster"}

Value = Callable[[Any], str]


class Ends(NamedTuple):
    """Who speaks to whom, as far as it is known. `peer`: from metadata; `principals`: of the peer and of ourselves, by certificates; `upstream`: who a gateway
    of a set of workloads sent the request to; `host`: what the request says."""

    peer: Peer | None
    principals: tuple[str, str]
    cluster: Any  # upstream.cluster.Cluster, None
    route_name: str
    host: str
    upstream: Peer | None = None


class _Override:
    """What a configuration says of one metric: labels that go, and labels with values of their own (None: what the stream says, by `Value`)."""

    __slots__ = ("dropped", "removed", "values")

    def __init__(self) -> None:
        self.dropped = False
        self.removed: set[str] = set()
        self.values: dict[str, Value] = {}


class Request:
    """Requests that are alike in all labels, until they are settled. Count one by adding to `times` (milliseconds), `received` and `sent` (bytes)."""

    __slots__ = ("_metrics", "received", "sent", "times")

    def __init__(self, metrics: tuple[Any, Any, Any, Any]) -> None:
        self._metrics = metrics
        self.times: dict[int, int] = {}
        self.received: dict[int, int] = {}
        self.sent: dict[int, int] = {}

    def settle(self) -> None:
        """Bring the metrics up to date."""
        total, *histograms = self._metrics
        if total is not None:
            total.n += sum(self.times.values())
        for histogram, values in zip(histograms, (self.times, self.received, self.sent), strict=True):
            if histogram is not None:
                histogram.count(values)
            values.clear()


class Connection(NamedTuple):
    """The counters of connections that are alike in all labels; None for those that are not wanted."""

    opened: Counter | None
    closed: Counter | None
    sent: Counter | None
    received: Counter | None


class IstioMetrics:
    """The metrics of all listeners that have the same configuration and are of the same side. Raises ConfigError relative to `proto`."""

    def __init__(self, proto: Any, store: Store, local: Peer, *, inbound: bool, node: Any = None) -> None:
        self._store = store
        self._local = local
        self._node = node
        self.gateway = proto.reporter == 1
        self.inbound = inbound or self.gateway
        self._reporter = "waypoint" if self.gateway else "destination" if inbound else "source"
        self.uses_host = not proto.disable_host_header_fallback
        self._overrides = self._compile(proto)
        # Whether labels depend on more than `Ends` and the outcome: then each request is looked at as a whole.
        self._values = {value for one in self._overrides.values() for value in one.values.values()}
        self.dynamic = bool(self._values)
        self.remembered: dict[Any, Request] = {}  # by whatever a filter finds at hand
        self._requests: dict[tuple[tuple[Tag, ...], ...], Request] = {}
        self._label_sets: set[tuple[Any, ...]] = set()
        self.busy: list[Request] = []  # that have something to settle
        # What remains of metrics that no filter has any more is counted when they go.
        settle = partial(_settle, self.busy)
        store.collectors.append(settle)
        finalize(self, _drop, store.collectors, settle).atexit = False
        store.tagged(Gauge, f"{_PREFIX}build", (("component", "proxy"), ("tag", _version(node))), shared=True).n = 1

    @classmethod
    def of(cls, proto: Any, context: Context, listener: Any) -> IstioMetrics:
        """Those of a filter of a listener (its proto, or None); the same for all that are alike. Raises ConfigError relative to `proto`."""
        inbound = listener is not None and listener.traffic_direction == INBOUND
        known: WeakValueDictionary[Any, IstioMetrics] = context.shared.setdefault("istio metrics", WeakValueDictionary())
        key = inbound, proto.SerializeToString(deterministic=True), peers.of_local(context.node, listener)
        made = known.get(key)
        if made is None:
            made = known[key] = cls(proto, context.stats, key[-1], inbound=inbound, node=context.node)
        return made

    def forget(self) -> None:
        """What was remembered may hold what is no more."""
        self.remembered.clear()

    # -- what is counted

    def request(self, ends: Ends, *, status: int, flags: int, grpc: bool, grpc_status: str, stream: Any = None) -> Request:
        """Where requests with this outcome are counted. `stream`: for labels that ask more of it."""
        labels, stream = self._limited(ends, stream)
        if not self.inbound:
            security = _UNKNOWN
        else:
            security = "mutual_tls" if all(ends.principals) else "none"
        tags = (
            *labels,
            ("request_protocol", "grpc" if grpc else "http"),
            ("response_code", str(status)),
            ("grpc_response_status", grpc_status if grpc else ""),
            ("response_flags", response_flags.short(flags)),
            ("connection_security_policy", security),
        )
        every = tuple(self._override(name, tags, stream) for name in _HTTP)
        found = self._requests.get(every)
        if found is None:
            store = self._store
            kinds = (Counter, Histogram, Histogram, Histogram)
            metrics: Any = tuple(
                None if self._is_dropped(name) else store.tagged(kind, _PREFIX + name, own) for name, kind, own in zip(_HTTP, kinds, every, strict=True)
            )
            found = self._requests[every] = Request(metrics)
        return found

    def remember(self, key: Any, request: Request) -> None:
        """Let `remembered` know it."""
        if len(self.remembered) >= _MAX_REMEMBERED:
            self.remembered.clear()
        self.remembered[key] = request

    def count(self, request: Request, milliseconds: int, received: int, sent: int) -> None:
        """One more request."""
        times = request.times
        if not times:
            self.busy.append(request)
        times[milliseconds] = times.get(milliseconds, 0) + 1
        sizes = request.received
        sizes[received] = sizes.get(received, 0) + 1
        sizes = request.sent
        sizes[sent] = sizes.get(sent, 0) + 1

    def count_messages(self, ends: Ends, requests: int, responses: int, stream: Any = None) -> None:
        """Messages of a gRPC request."""
        labels, stream = self._limited(ends, stream)
        for name, count in zip(_GRPC, (requests, responses), strict=True):
            if not self._is_dropped(name):
                self._store.tagged(Counter, _PREFIX + name, self._override(name, labels, stream)).n += count

    def connection(self, ends: Ends, flags: int, stream: Any = None) -> Connection:
        """Where a plain connection is counted."""
        security = _UNKNOWN if not self.inbound else "mutual_tls" if all(ends.principals) else "none"
        labels, stream = self._limited(ends, stream)
        tags = (
            *labels,
            ("request_protocol", "tcp"),
            ("response_flags", response_flags.short(flags)),
            ("connection_security_policy", security),
        )
        return Connection(
            *(None if self._is_dropped(name) else self._store.tagged(Counter, _PREFIX + name, self._override(name, tags, stream)) for name in _TCP)
        )

    # -- labels

    def _limited(self, ends: Ends, stream: Any) -> tuple[tuple[Tag, ...], Any]:
        """The labels of who speaks to whom; and the stream, None where it is not to be asked for more of them."""
        labels = self._labels(ends)
        known = self._label_sets
        key = (*labels, *(_text(value, stream) for value in self._values)) if self._values else labels
        if key not in known:
            if len(known) >= _MAX_LABEL_SETS:
                return self._labels(ends._replace(peer=None, upstream=None, host="", principals=NO_PRINCIPALS)), None
            known.add(key)
        return labels, stream

    def _labels(self, ends: Ends) -> tuple[Tag, ...]:
        """Of who speaks to whom."""
        service, service_name, service_namespace = self._service(ends)
        local, peer = self._local, ends.peer or NOBODY
        peer_san, local_san = ends.principals
        namespace = _namespace_of(peer_san) or peer.namespace
        if self.gateway:
            other = ends.upstream or NOBODY
            source = _side("source", peer, namespace, peer_san)
            destination = _side("destination", other, other.namespace, other.identity, revision=_UNKNOWN)
            service, service_name, service_namespace = service or _UNKNOWN, service_name or _UNKNOWN, service_namespace or _UNKNOWN
        elif self.inbound:
            source = _side("source", peer, namespace, peer_san)
            destination = _own_side("destination", local, local_san)
            service, service_name = service or local.canonical_name, service_name or local.canonical_name
            service_namespace = local.namespace
        else:
            source = _own_side("source", local, local_san)
            destination = _side("destination", peer, namespace, peer_san)
            service, service_name = service or _UNKNOWN, service_name or _UNKNOWN
            service_namespace = service_namespace or namespace or _UNKNOWN
        return (
            ("reporter", self._reporter),
            *source,
            *destination,
            ("destination_service", service[:_MAX_VALUE]),
            ("destination_service_name", service_name[:_MAX_VALUE]),
            ("destination_service_namespace", service_namespace),
        )

    def _service(self, ends: Ends) -> tuple[str, str, str]:
        """Host, name and namespace of the service, as far as they are known."""
        host = ends.host if self.uses_host else ""
        named = _NAMED_ROUTES.get(ends.route_name)
        if named is not None:
            return host, named, ""
        cluster = ends.cluster
        if cluster is None:
            return host, host, ""
        if cluster.name in _NO_SERVICES:
            return host, cluster.name, ""
        services = cluster.metadata.get("istio", {}).get("services")
        if not isinstance(services, list) or not services or not isinstance(services[0], dict):
            return host, host, ""
        first = services[0]
        host = str(first.get("host", host))
        return host, str(first.get("name", host.partition(".")[0])), str(first.get("namespace", ""))

    # -- what the configuration says

    def _compile(self, proto: Any) -> dict[str, _Override]:
        found: dict[str, _Override] = {}
        for at, metric in enumerate(proto.metrics):
            with under(f"metrics[{at}]"):
                if metric.name and metric.name not in METRICS:
                    fail("name", f"{metric.name!r} is not one of {', '.join(METRICS)}")
                names: Iterable[str] = (metric.name,) if metric.name else METRICS
                values: dict[str, Value] = {}
                for label, text in sorted(metric.dimensions.items()):
                    with under(f'dimensions["{label}"]'):
                        values[label] = _value_of(attributes.parse(text), self._node)
                for name in names:
                    one = found.setdefault(name, _Override())
                    if metric.drop:
                        one.dropped |= bool(metric.name)  # as Envoy: of all at once, none is dropped
                        continue
                    one.removed.update(metric.tags_to_remove)
                    one.values.update(values)
        return found

    def _is_dropped(self, metric: str) -> bool:
        one = self._overrides.get(metric)
        return one is not None and one.dropped

    def _override(self, metric: str, tags: tuple[Tag, ...], stream: Any) -> tuple[Tag, ...]:
        """The labels of one metric."""
        one = self._overrides.get(metric)
        if one is None:
            return tags
        values = {name: _text(value, stream) for name, value in one.values.items()}
        made = [(name, values.pop(name, value)) for name, value in tags if name not in one.removed or name in values]
        return (*made, *((name, value) for name, value in values.items() if name not in LABELS))


def _settle(busy: list[Request]) -> None:
    """Before statistics are collected."""
    for one in busy:
        one.settle()
    busy.clear()


def _drop(collectors: list[Callable[[], None]], settle: Callable[[], None]) -> None:
    settle()
    collectors.remove(settle)


def _side(side: str, peer: Peer, namespace: str, principal: str, *, revision: str = _LATEST) -> tuple[Tag, ...]:
    """The labels of the other end."""
    return (
        (f"{side}_workload", peer.workload or _UNKNOWN),
        (f"{side}_canonical_service", peer.canonical_name or _UNKNOWN),
        (f"{side}_canonical_revision", peer.canonical_revision or revision),
        (f"{side}_workload_namespace", namespace or _UNKNOWN),
        (f"{side}_principal", principal[:_MAX_VALUE] or _UNKNOWN),
        (f"{side}_app", peer.app or _UNKNOWN),
        (f"{side}_version", peer.version or _UNKNOWN),
        (f"{side}_cluster", peer.cluster or _UNKNOWN),
    )


def _own_side(side: str, local: Peer, principal: str) -> tuple[Tag, ...]:
    """The labels of this end, as the node says them."""
    return (
        (f"{side}_workload", local.workload),
        (f"{side}_canonical_service", local.canonical_name),
        (f"{side}_canonical_revision", local.canonical_revision),
        (f"{side}_workload_namespace", local.namespace),
        (f"{side}_principal", principal or _UNKNOWN),
        (f"{side}_app", local.app),
        (f"{side}_version", local.version),
        (f"{side}_cluster", local.cluster),
    )


def _namespace_of(principal: str) -> str:
    """`default` of `spiffe://cluster.local/ns/default/sa/web`."""
    _, found, rest = principal.partition("/ns/")
    return rest.partition("/")[0] if found else ""


def _version(node: Any) -> str:
    value = "" if node is None else node.metadata.fields["ISTIO_VERSION"].string_value if "ISTIO_VERSION" in node.metadata.fields else ""
    return value or _UNKNOWN


def _text(value: Value, stream: Any) -> str:
    try:
        return value(stream)[:_MAX_VALUE] or _UNKNOWN
    except (AttributeError, TypeError, ValueError):  # there is no such thing here, as a request of a plain connection
        return _UNKNOWN


def _value_of(attribute: attributes.Attribute, node: Any) -> Value:
    """What says the value of an attribute for a stream; it may raise where there is none."""
    name, key = attribute
    if not name:
        return lambda _: key
    if name.startswith("node."):
        return _constant(name, key, node)
    wanted = key.lower().encode()
    if name == "request.headers":
        return lambda stream: stream.request.get(wanted).decode("latin-1")
    if name == "response.headers":
        return lambda stream: stream.response.get(wanted).decode("latin-1")
    return _VALUES[name]


def _constant(name: str, key: str, node: Any) -> Value:
    if node is None:
        return lambda _: ""
    fields = node.metadata.fields
    text = {"node.id": node.id, "node.cluster": node.cluster}.get(name) or (fields[key].string_value if key in fields else "")
    return lambda _: text


_VALUES: dict[str, Value] = {
    "request.method": lambda stream: stream.request.method.decode("latin-1"),
    "request.host": lambda stream: stream.request.authority.decode("latin-1"),
    "request.path": lambda stream: stream.request.path.decode("latin-1"),
    "request.url_path": lambda stream: stream.request.path.partition(b"?")[0].decode("latin-1"),
    "request.scheme": lambda stream: stream.request.scheme.decode("latin-1"),
    "request.useragent": lambda stream: stream.request.get(b"user-agent").decode("latin-1"),
    "request.protocol": lambda stream: stream.protocol,
    "response.code": lambda stream: str(stream.status),
    "response.code_details": lambda stream: stream.details or "",
    "response.flags": lambda stream: str(stream.flags),
    "source.address": lambda stream: stream.connection.remote.text,
    "source.port": lambda stream: str(stream.connection.remote.port),
    "destination.address": lambda stream: stream.connection.local.text,
    "destination.port": lambda stream: str(stream.connection.local.port),
    "upstream.address": lambda stream: stream.host.address.text,
    "upstream.port": lambda stream: str(stream.host.address.port),
    "connection.requested_server_name": lambda stream: stream.connection.server_name or "",
    "xds.cluster_name": lambda stream: stream.cluster.name,
    "xds.route_name": lambda stream: stream.route.name,
}
