"""Load reports (LRS): what proxies say of the requests that they sent, added up for as long as their streams last. Sans-IO."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from google.protobuf.message import DecodeError

from control.ads.session import ProtocolError
from meshproxy.api import messages

MAX_CLUSTERS = 20_000  # of one proxy
INTERVAL_S = 10  # between the reports of a proxy
URL = "type.googleapis.com/envoy.service.load_stats.v3.LoadStatsRequest"
_L = "envoy.service.load_stats.v3."
_SUMS = ("total_successful_requests", "total_error_requests", "total_issued_requests")


class LoadStream:
    """One proxy's reports. `node`: who it is, None before the first message. `total`: LoadStatsRequest with everything since then, but for what is under
    way, which is as in the last report."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.node: Any = None
        self.total: Any = messages.known(f"{_L}LoadStatsRequest")()
        self._clusters: dict[str, Any] = {}
        self._clock = clock
        self.since = clock()
        self.used: dict[str, float] = {}  # cluster -> when there was a request, by `clock`

    def receive(self, data: bytes) -> bytes | None:
        """A message of the client; returns the answer to the first one. Raises ProtocolError."""
        try:
            report = messages.known(f"{_L}LoadStatsRequest").FromString(data)
        except DecodeError as error:
            raise ProtocolError("not a serialised LoadStatsRequest") from error
        first = self.node is None
        if first:
            self.node = report.node
            self.total.node.CopyFrom(report.node)
        for stats in report.cluster_stats:
            self._add(stats)
        return self._answer() if first else None

    def _answer(self) -> bytes:
        response = messages.known(f"{_L}LoadStatsResponse")(report_endpoint_granularity=True, send_all_clusters=True)
        response.load_reporting_interval.FromSeconds(INTERVAL_S)
        return bytes(response.SerializeToString())

    def _add(self, stats: Any) -> None:
        if any(group.total_issued_requests or group.total_requests_in_progress for group in stats.upstream_locality_stats):
            self.used[stats.cluster_name] = self._clock()
        total = self._clusters.get(stats.cluster_name)
        if total is None:
            if not stats.upstream_locality_stats and not stats.total_dropped_requests:
                return  # nobody uses it
            if len(self._clusters) >= MAX_CLUSTERS:
                raise ProtocolError(f"reports of more than {MAX_CLUSTERS} clusters")
            total = self.total.cluster_stats.add(cluster_name=stats.cluster_name, cluster_service_name=stats.cluster_service_name)
            self._clusters[stats.cluster_name] = total
        for group in total.upstream_locality_stats:
            for one in (group, *group.upstream_endpoint_stats):
                one.total_requests_in_progress = 0
        for group in stats.upstream_locality_stats:
            known = _find(total.upstream_locality_stats, lambda one, group=group: one.locality == group.locality and one.priority == group.priority)
            if known is None:
                known = total.upstream_locality_stats.add(locality=group.locality, priority=group.priority)
            _sum(known, group)
            for endpoint in group.upstream_endpoint_stats:
                one = _find(known.upstream_endpoint_stats, lambda one, endpoint=endpoint: one.address == endpoint.address)
                _sum(one if one is not None else known.upstream_endpoint_stats.add(address=endpoint.address), endpoint)
        total.total_dropped_requests += stats.total_dropped_requests
        for drop in stats.dropped_requests:
            one = _find(total.dropped_requests, lambda one, drop=drop: one.category == drop.category)
            (one if one is not None else total.dropped_requests.add(category=drop.category)).dropped_count += drop.dropped_count
        interval = total.load_report_interval.ToTimedelta() + stats.load_report_interval.ToTimedelta()
        total.load_report_interval.FromTimedelta(interval)


def _find(entries: Iterable[Any], matches: Any) -> Any:
    return next(filter(matches, entries), None)


def _sum(total: Any, one: Any) -> None:
    for name in _SUMS:
        setattr(total, name, getattr(total, name) + getattr(one, name))
    total.total_requests_in_progress = one.total_requests_in_progress


class Loads:
    """All streams of load reports."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.streams: set[LoadStream] = set()
        self._clock = clock

    def open(self) -> LoadStream:
        """A stream has begun."""
        stream = LoadStream(self._clock)
        self.streams.add(stream)
        return stream

    def close(self, stream: LoadStream) -> None:
        """It has ended."""
        self.streams.discard(stream)

    def of(self, node_id: str) -> Iterator[Any]:
        """What the proxy of that node id has reported: LoadStatsRequest."""
        return (stream.total for stream in self.streams if stream.node is not None and stream.node.id == node_id)

    def used(self, node_id: str, since: float) -> dict[str, float] | None:
        """When the proxy of that node id has used each cluster last, by the clock; None if it was not reporting all the time `since` then."""
        streams = [stream for stream in self.streams if stream.node is not None and stream.node.id == node_id]
        if not streams or min(stream.since for stream in streams) > since:
            return None
        used: dict[str, float] = {}
        for stream in streams:
            for name, when in stream.used.items():
                used[name] = max(when, used.get(name, when))
        return used
