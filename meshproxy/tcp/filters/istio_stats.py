"""Istio's standard metrics of plain connections (stats.PluginConfig, the network filter `istio.stats`); docs/metrics.md says what they are.

Peers are known by their certificates and by the metadata of endpoints; Istio's exchange of metadata at the beginning of a connection is not spoken. Every
`tcp_reporting_duration` (5 s), and when it ends, what a connection has moved is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api.durations import seconds
from meshproxy.observe import istio_metrics, peers
from meshproxy.observe.istio_metrics import NO_PRINCIPALS, Connection, Ends, IstioMetrics

if TYPE_CHECKING:
    import asyncio

    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.net.filter_chain import NetworkContext

TYPE_URL = "type.googleapis.com/stats.PluginConfig"
HONOURS = istio_metrics.HONOURS
_REPORT_S = 5.0


class _Open:
    """A connection, and what was counted of it."""

    __slots__ = ("counters", "info", "received", "sent")

    def __init__(self, info: ConnectionInfo) -> None:
        self.info = info
        self.counters: Connection | None = None
        self.sent = self.received = 0


class IstioStats:
    """The filter. Holds the connections that are open."""

    def __init__(self, metrics: IstioMetrics, proto: Any, context: NetworkContext) -> None:
        self._metrics = metrics
        self._loop = context.context.loop
        duration = proto.tcp_reporting_duration
        self._every = seconds(duration) if proto.HasField("tcp_reporting_duration") else _REPORT_S
        self._open: dict[int, _Open] = {}
        self._timer: asyncio.TimerHandle | None = None

    def on_connection(self, conn: ConnectionInfo) -> None:
        self._open[conn.id] = _Open(conn)
        if self._every and self._timer is None:
            self._timer = self._loop.call_later(self._every, self._report_all)

    def on_close(self, conn: ConnectionInfo) -> None:
        one = self._open.pop(conn.id, None)
        if one is not None:
            closed = self._report(one).closed
            if closed is not None:
                closed.n += 1

    def _report_all(self) -> None:
        self._timer = None
        for one in self._open.values():
            stream = one.info.stream
            if stream is not None and stream.upstream is not None:  # it is known who is concerned
                self._report(one)
        if self._open:
            self._timer = self._loop.call_later(self._every, self._report_all)

    def _report(self, one: _Open) -> Connection:
        """Count what a connection did since the last time."""
        stream = one.info.stream
        counters = one.counters
        if counters is None:
            counters = one.counters = self._metrics.connection(_ends(one.info, stream, inbound=self._metrics.inbound), stream.flags if stream else 0, stream)
            if counters.opened is not None:
                counters.opened.n += 1
        if stream is not None:
            if counters.sent is not None:
                counters.sent.n += stream.bytes_sent - one.sent
            if counters.received is not None:
                counters.received.n += stream.bytes_received - one.received
            one.sent, one.received = stream.bytes_sent, stream.bytes_received
        return counters


def _ends(info: ConnectionInfo, stream: Any, *, inbound: bool) -> Ends:
    upstream = None if stream is None else stream.upstream
    tls = info.tls if inbound else None if upstream is None else upstream.tls
    peer = None if inbound or stream is None else peers.of_host(stream.host)
    return Ends(peer, NO_PRINCIPALS if tls is None else tls.principals, None if stream is None else stream.cluster, "", "")


def compile(proto: Any, context: NetworkContext) -> IstioStats:
    """The filter for a PluginConfig. Equal ones count together."""
    return IstioStats(IstioMetrics.of(proto, context.context, context.listener), proto, context)
