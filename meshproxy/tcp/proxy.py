"""The TCP proxy network filter: every connection goes to a host of a cluster, bytes as they come.

Source: envoy.extensions.filters.network.tcp_proxy.v3 and Envoy's `tcp_proxy.cc`. `TcpProxy` is what the connections of one filter share; `session.py` is one
connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api.durations import seconds_of
from meshproxy.api.errors import ConfigError, fail, under
from meshproxy.net.splice import Pipes
from meshproxy.tcp.session import Session
from meshproxy.upstream.pool import METERED

if TYPE_CHECKING:
    import socket

    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.net.filter_chain import NetworkContext
    from meshproxy.net.relay import Side
    from meshproxy.observe.stats import Counter, Scope

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
_T = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
HONOURS = {
    _T: (
        "stat_prefix cluster weighted_clusters metadata_match idle_timeout access_log max_connect_attempts backoff_options hash_policy"
        " max_downstream_connection_duration max_downstream_connection_duration_jitter_percentage access_log_flush_interval"
        " flush_access_log_on_connected access_log_options tunneling_config"
    ),
    f"{_T}.TunnelingConfig": (
        "hostname use_post headers_to_add propagate_response_headers post_path propagate_response_trailers request_id_extension request_id_header"
        " request_id_metadata_key"
    ),
    "envoy.extensions.filters.network.http_connection_manager.v3.RequestIDExtension": "typed_config",
    f"{_T}.WeightedCluster": "clusters",
    f"{_T}.WeightedCluster.ClusterWeight": "name weight metadata_match",
    f"{_T}.TcpAccessLogOptions": "access_log_flush_interval flush_access_log_on_connected",
    "envoy.type.v3.HashPolicy": "source_ip filter_state",
    "envoy.type.v3.HashPolicy.SourceIp": "",
    "envoy.type.v3.HashPolicy.FilterState": "key",
    "envoy.config.core.v3.BackoffStrategy": "base_interval max_interval",
}

_COUNTERS = (
    "downstream_cx_drain_close",
    "downstream_cx_no_route",
    "downstream_cx_overload_close",
    "downstream_cx_rx_bytes_total",
    "downstream_cx_total",
    "downstream_cx_tx_bytes_total",
    "downstream_flow_control_paused_reading_total",
    "downstream_flow_control_resumed_reading_total",
    "early_data_received_count_total",
    "idle_timeout",
    "max_downstream_connection_duration",
    "route_delayed_total",
    "upstream_flush_total",
)
_GAUGES = ("downstream_cx_rx_bytes_buffered", "downstream_cx_tx_bytes_buffered", "upstream_flush_active")
_USED = (
    "downstream_cx_no_route",
    "downstream_cx_rx_bytes_total",
    "downstream_cx_total",
    "downstream_cx_tx_bytes_total",
    "downstream_flow_control_paused_reading_total",
    "downstream_flow_control_resumed_reading_total",
    "idle_timeout",
    "max_downstream_connection_duration",
)
_IDLE_TIMEOUT = 3600.0  # seconds
_CLUSTER_STATE = "envoy.tcp_proxy.cluster"  # filter state that names the cluster of a connection
_NO_TUNNEL_STATE = "envoy.tcp_proxy.disable_tunneling"  # and that has it go without one


class TcpProxyStats:
    """`tcp.<stat_prefix>.*` as attributes."""

    __slots__ = (*_USED, "_scope")

    downstream_cx_no_route: Counter
    downstream_cx_rx_bytes_total: Counter
    downstream_cx_total: Counter
    downstream_cx_tx_bytes_total: Counter
    downstream_flow_control_paused_reading_total: Counter
    downstream_flow_control_resumed_reading_total: Counter
    idle_timeout: Counter
    max_downstream_connection_duration: Counter

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        scope.declare("counter", _COUNTERS)
        scope.declare("gauge", _GAUGES)

    def __getattr__(self, name: str) -> Counter:
        # Only for a slot that is still empty.
        if name not in _USED:
            raise AttributeError(name)
        counter = self._scope.counter(name)
        setattr(self, name, counter)
        return counter


class Target:
    """A cluster that connections may go to, with the host metadata to match (`envoy.lb`) or None."""

    __slots__ = ("cluster", "metadata_match", "weight")

    def __init__(self, cluster: str, weight: int, metadata_match: dict[str, Any] | None) -> None:
        self.cluster = cluster
        self.weight = weight
        self.metadata_match = metadata_match


def compile(proto: Any, context: NetworkContext) -> TcpProxy:
    """The terminal filter. Raises ConfigError with paths relative to `proto`."""
    return TcpProxy(proto, context)


class TcpProxy:
    """What the connections of one TCP proxy share. Times are seconds, 0.0 for none."""

    terminal = True
    takes_socket = True
    reports_close = True

    def __init__(self, proto: Any, network: NetworkContext) -> None:
        context = self.context = network.context
        self.loop = context.loop
        self.stat_prefix: str = proto.stat_prefix
        self.stats = TcpProxyStats(context.stats.scope(f"tcp.{proto.stat_prefix}."))
        self.buffer_limit = network.buffer_limit
        self.pipes = Pipes()
        self._compile_targets(proto)
        self.idle_timeout = seconds_of(proto, "idle_timeout", _IDLE_TIMEOUT)
        self.idle = context.timers.queue(self.idle_timeout, Session.idle_expired) if self.idle_timeout else None
        self.max_connect_attempts: int = proto.max_connect_attempts.value if proto.HasField("max_connect_attempts") else 1
        if self.max_connect_attempts < 1:
            fail("max_connect_attempts", "value must be greater than or equal to 1")
        self._compile_backoff(proto)
        self.max_duration = seconds_of(proto, "max_downstream_connection_duration", 0.0)
        self.duration_jitter = (
            proto.max_downstream_connection_duration_jitter_percentage.value / 100
            if proto.HasField("max_downstream_connection_duration_jitter_percentage")
            else 0.0
        )
        self.needs_hash = bool(proto.hash_policy)
        self._hash = _compile_hash(proto.hash_policy)
        self._compile_logs(proto)
        self.tunneling: Any = None  # tcp.tunneling.Tunneling
        if proto.HasField("tunneling_config"):
            self._compile_tunneling(proto.tunneling_config)

    # -- compiling

    def _compile_targets(self, proto: Any) -> None:
        common = _metadata_match(proto)
        which = proto.WhichOneof("cluster_specifier")
        if which == "cluster":
            self._targets = [Target(proto.cluster, 1, common)]
        elif which == "weighted_clusters":
            self._targets = [
                Target(entry.name, entry.weight, {**(common or {}), **(_metadata_match(entry) or {})} or None) for entry in proto.weighted_clusters.clusters
            ]
        else:
            fail("cluster", "a cluster or weighted clusters are required")
        self._total_weight = sum(target.weight for target in self._targets)

    def _compile_backoff(self, proto: Any) -> None:
        self.backoff_base = self.backoff_max = 0.0
        if proto.HasField("backoff_options"):
            options = proto.backoff_options
            self.backoff_base = seconds_of(options, "base_interval", 0.0)
            self.backoff_max = seconds_of(options, "max_interval", 10 * self.backoff_base)
            if self.backoff_max < self.backoff_base:
                fail("backoff_options.max_interval", "max_backoff must be greater or equal to base_backoff")

    def _compile_logs(self, proto: Any) -> None:
        logs = []
        for at, entry in enumerate(proto.access_log):
            from meshproxy.observe import access_log  # workers that log nothing do not load it

            with under(f"access_log[{at}]"):
                logs.append(access_log.compile(entry, self.context))
        self.logs = tuple(logs)
        options = proto.access_log_options
        if proto.HasField("access_log_options") and (proto.HasField("access_log_flush_interval") or proto.flush_access_log_on_connected):
            fail("access_log_options", "Only one of deprecated access log options and access_log_options can be specified")
        self.log_on_connected: bool = proto.flush_access_log_on_connected or options.flush_access_log_on_connected
        source = options if proto.HasField("access_log_options") else proto
        self.log_interval = seconds_of(source, "access_log_flush_interval", 0.0)

    def _compile_tunneling(self, proto: Any) -> None:
        from meshproxy.tcp.tunnel import TunnelSession  # few workers have any HTTP here
        from meshproxy.tcp.tunneling import Tunneling

        with under("tunneling_config"):
            self.tunneling = Tunneling(proto, self.context)
        self._tunnel_session = TunnelSession
        self.takes_socket = False  # whatever carries a tunnel, it is no bare socket
        if any(getattr(log, "metered", False) for log in self.logs):
            self.context.shared[METERED] = True

    # -- for sessions

    def pick_target(self, conn: ConnectionInfo) -> Target:
        """Where a connection goes."""
        state = conn.filter_state
        if state is not None and _CLUSTER_STATE in state:
            return Target(str(state[_CLUSTER_STATE]), 1, None)
        targets = self._targets
        if len(targets) == 1:
            return targets[0]
        value = self.context.random.randrange(self._total_weight)
        for target in targets:
            if value < target.weight:
                return target
            value -= target.weight
        return targets[-1]

    def hash_of(self, conn: ConnectionInfo) -> int | None:
        """The hash of a connection for consistent hashing."""
        return self._hash(conn) if self._hash is not None else None

    # -- the contract of terminal filters

    def create_protocol(self, conn: ConnectionInfo) -> Side:
        """For a connection that has a transport (TLS, or a filter in front that wants to see bytes)."""
        if self.tunneling is None:
            return Session(self, conn).downstream_side()
        state = conn.filter_state
        if state is not None and str(state.get(_NO_TUNNEL_STATE)).lower() == "true":
            return Session(self, conn).downstream_side()
        return self._tunnel_session(self, conn).downstream_side()

    def accept_socket(self, conn: ConnectionInfo, sock: socket.socket) -> Session:
        """For a plaintext connection that is still a bare socket."""
        session = Session(self, conn)
        session.start_with_socket(sock)
        return session

    def missed(self, conn: ConnectionInfo, *, secure: bool) -> None:
        """A connection has ended before it came here: there is nothing but to count and to log it."""
        Session(self, conn).missed()

    def __repr__(self) -> str:
        return f"<tcp_proxy {self.stat_prefix}>"


def _metadata_match(proto: Any) -> dict[str, Any] | None:
    if not proto.HasField("metadata_match") or "envoy.lb" not in proto.metadata_match.filter_metadata:
        return None
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(proto.metadata_match.filter_metadata["envoy.lb"])


def _compile_hash(policies: Any) -> Any:
    if not policies:
        return None
    from xxhash import xxh64_intdigest

    policy = policies[0]  # the rules of the message allow one
    which = policy.WhichOneof("policy_specifier")
    if which == "source_ip":
        return lambda conn: xxh64_intdigest(conn.remote.ip.encode()) if conn.remote.kind == "ip" else None
    if which == "filter_state":
        key = policy.filter_state.key
        return lambda conn: xxh64_intdigest(str(conn.filter_state[key]).encode()) if conn.filter_state and key in conn.filter_state else None
    raise ConfigError.at("hash_policy[0]", "a policy is required")
