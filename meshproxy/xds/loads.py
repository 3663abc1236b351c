"""Load reports (LRS): how many requests went to which endpoints, told to a server as often as it wants.

As Envoy's reporter: one stream, begun anew five seconds after it has ended; the first message says who we are, the server's answer which clusters it wants
to hear of, and how often. Numbers are those since a cluster was asked for or reported last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from meshproxy.api import messages
from meshproxy.api.durations import seconds
from meshproxy.codec import grpc
from meshproxy.net.tasks import spawn
from meshproxy.record import Record, field
from meshproxy.upstream.grpc_client import GrpcClient
from meshproxy.upstream.grpc_stream import GrpcError
from meshproxy.upstream.loads import HostKey, Tally

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.upstream.grpc_stream import GrpcStream
    from meshproxy.xds.client import Api

log = logging.getLogger("meshproxy.config")

METHOD = "/envoy.service.load_stats.v3.LoadReportingService/StreamLoadStats"
FEATURE = "envoy.lrs.supports_send_all_clusters"
RETRY_DELAY = 5.0  # seconds
MIN_INTERVAL = 0.01  # seconds: a server that wants reports all the time must not keep this process busy
_L = "envoy.service.load_stats.v3."
_NOTHING = Tally()


class _Cluster(Record):
    """What a report says of one cluster. `since`: when it was reported last, by the monotonic clock."""

    since: float
    dropped: int = 0
    overload: int = 0
    category: str = ""
    hosts: dict[HostKey, Tally] = field(default_factory=dict)

    def begin(self, now: float) -> None:
        """Everything was reported."""
        self.since = now
        self.dropped = self.overload = 0
        self.hosts = {}


class LoadReporter:
    """`gather()` takes what all processes have counted (upstream.loads); `eligible`: the clusters that may be reported, by default all.

    `start` it inside the running loop.
    """

    def __init__(
        self, api: Api, context: Context, gather: Callable[[], Awaitable[list[dict[str, Any]]]], eligible: Callable[[str], bool] = lambda name: True
    ) -> None:
        self._client = GrpcClient(context.clusters, api.cluster, authority=api.authority, metadata=api.metadata)
        self._context = context
        self._gather = gather
        self._eligible = eligible
        self._answer: Any = None  # LoadStatsResponse, the last one
        self._tracked: dict[str, _Cluster] = {}
        self._services: dict[str, tuple[bytes, str]] = {}  # cluster -> its message, the service name in it
        self._task: asyncio.Task[None] | None = None
        self._node = type(context.node)()
        self._node.CopyFrom(context.node)
        self._node.client_features.append(FEATURE)
        locality = self._node.locality
        self._local = (locality.region, locality.zone, locality.sub_zone)
        scope = context.stats.scope("load_reporter.")
        scope.declare("counter", ("errors", "requests", "responses", "retries"))
        self._scope = scope

    def start(self) -> None:
        """Begin, unless that was done."""
        if self._task is None:
            self._task = spawn(f"load reports to {self._client.cluster_name}", self._run())

    def close(self) -> None:
        """End for good."""
        if self._task is not None:
            self._task.cancel()

    def _count(self, name: str) -> None:
        self._scope.counter(name).n += 1

    # -- the stream

    async def _run(self) -> None:
        while True:
            try:
                async with self._client.stream(METHOD) as stream:
                    await self._talk(stream)
            except GrpcError as error:
                log.warning("load reports to %s ended: %s", self._client.cluster_name, error)
                self._count("errors")
            except Exception:  # a defect shall not be the end of all reports
                log.exception("load reports to %s failed", self._client.cluster_name)
                self._count("errors")
            await asyncio.sleep(RETRY_DELAY)
            self._count("retries")

    async def _talk(self, stream: GrpcStream) -> None:
        """Report until the server ends the stream. Raises GrpcError."""
        await self._report(stream)
        incoming = asyncio.ensure_future(stream.read())
        try:
            due = self._next_report()
            while True:
                done, _ = await asyncio.wait((incoming,), timeout=max(0.0, due - self._context.clock()) if due is not None else None)
                if not done:
                    await self._report(stream)
                else:
                    data = incoming.result()
                    if data is None:
                        return
                    incoming = asyncio.ensure_future(stream.read())
                    await self._received(data)
                due = self._next_report()
        finally:
            incoming.cancel()

    def _next_report(self) -> float | None:
        if self._answer is None:
            return None
        interval = self._answer.load_reporting_interval
        return self._context.clock() + max(MIN_INTERVAL, seconds(interval))

    async def _received(self, data: bytes) -> None:
        try:
            self._answer = messages.known(f"{_L}LoadStatsResponse").FromString(data)
        except DecodeError as error:
            raise GrpcError(grpc.INTERNAL, "not a serialised LoadStatsResponse") from error
        await self._take()
        self._track()
        self._count("requests")

    async def _report(self, stream: GrpcStream) -> None:
        request = messages.known(f"{_L}LoadStatsRequest")(node=self._node)
        if self._tracked:
            await self._take()
            now = self._context.clock()
            for name, tracked in sorted(self._tracked.items()):
                if name in self._context.clusters:
                    self._put(request.cluster_stats.add(cluster_name=name), tracked, now)
                    tracked.begin(now)
        self._count("responses")
        await stream.send(request.SerializeToString())
        if self._answer is not None:
            self._track()

    # -- what is reported

    async def _take(self) -> None:
        """Add what was counted since the last time to what will be reported."""
        taken = await self._gather()
        for tracked in self._tracked.values():
            for tally in tracked.hosts.values():
                tally.active = 0  # it is said anew
        for process in taken:
            for name, (dropped, overload, category, hosts) in process.items():
                known = self._tracked.get(name)
                if known is None:
                    continue
                known.dropped += dropped
                known.overload += overload
                known.category = category or known.category
                for key, numbers in hosts:
                    known.hosts.setdefault(key, Tally()).add(*numbers)

    def _track(self) -> None:
        """A period begins: clusters that are new in it have counted nothing so far."""
        wanted: Iterable[str] = self._context.clusters.names() if self._answer.send_all_clusters else self._answer.clusters
        now = self._context.clock()
        before = self._tracked
        self._tracked = {name: before.get(name) or _Cluster(now) for name in wanted if self._eligible(name)}

    def _put(self, stats: Any, tracked: _Cluster, now: float) -> None:
        """Fill in a ClusterStats."""
        stats.cluster_service_name = self._service(stats.cluster_name)
        groups: dict[tuple[int, bool, tuple[str, str, str]], list[tuple[HostKey, Tally]]] = {}
        for entry in tracked.hosts.items():
            _, priority, locality = entry[0]
            groups.setdefault((priority, locality != self._local or not any(locality), locality), []).append(entry)
        for (priority, _, locality), hosts in sorted(groups.items()):
            if any(tally != _NOTHING for _, tally in hosts):
                self._put_locality(stats.upstream_locality_stats.add(priority=priority), locality, hosts)
        stats.total_dropped_requests = tracked.dropped
        if tracked.overload:
            stats.dropped_requests.add(category=tracked.category, dropped_count=tracked.overload)
        stats.load_report_interval.FromMicroseconds(int((now - tracked.since) * 1e6))

    def _put_locality(self, stats: Any, locality: tuple[str, str, str], hosts: list[tuple[HostKey, Tally]]) -> None:
        stats.locality.SetInParent()
        stats.locality.region, stats.locality.zone, stats.locality.sub_zone = locality
        total = Tally()
        for ((ip, port, path), _, _), tally in sorted(hosts, key=_address):
            if tally == _NOTHING:
                continue
            total.add(tally.success, tally.error, tally.issued, tally.active)
            if self._answer is not None and self._answer.report_endpoint_granularity:
                one = stats.upstream_endpoint_stats.add()
                if path:
                    one.address.pipe.path = path
                else:
                    one.address.socket_address.address = ip
                    one.address.socket_address.port_value = port
                _numbers(one, tally)
        _numbers(stats, total)

    def _service(self, name: str) -> str:
        """What the endpoints of a cluster are asked for by, if it is not the name of the cluster."""
        serialised = self._context.clusters.serialised(name)
        known = self._services.get(name)
        if known is None or known[0] is not serialised:
            known = self._services[name] = serialised, self._context.clusters.proto(name).eds_cluster_config.service_name
        return known[1]


def _address(entry: tuple[HostKey, Tally]) -> tuple[str, int, str]:
    return entry[0][0]


def _numbers(stats: Any, tally: Tally) -> None:
    stats.total_successful_requests = tally.success
    stats.total_error_requests = tally.error
    stats.total_requests_in_progress = tally.active
    stats.total_issued_requests = tally.issued
