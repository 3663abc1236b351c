"""Health reports (HDS): each sidecar asks the application beside it, as its workload's document says, and reports whether that is ready. Sans-IO.

What nobody reports on, here or to a replica that tells us, is as the documents have it: it may be that its sidecar does not report at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from google.protobuf.message import DecodeError

from control.ads.session import ProtocolError
from control.model.service import Workload
from control.model.snapshot import Key, MeshSnapshot
from control.translate.health import cluster_of, nothing, specifier
from control.translate.proxy import ProxyKey, of_node
from meshproxy.api import messages

GRACE_S = 10.0  # that a report is remembered for after its stream has ended: sidecars come back, to this control plane or another
MAX_ENDPOINTS = 1000  # of one report, which has one to tell of
BURST, PER_S = 10.0, 1.0  # changes of one workload that are heard at once, and a second: each of them is work for everybody
URL = "type.googleapis.com/envoy.service.health.v3.EndpointHealthResponse"
_H = "envoy.service.health.v3."
_HEALTHY = 1


class HealthStream:
    """One sidecar. `key`: who it is, None before the first message; `report`: EndpointHealthResponse, the last one. `wake`: there may be an answer."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.wake = wake
        self.key: ProxyKey | None = None
        self.node: Any = None
        self.report: Any = None
        self._told = b""
        self._over = False  # it was told to ask nothing any more: what it still reports was on its way

    @property
    def workload(self) -> Key | None:
        return (self.key.namespace, self.key.name) if self.key is not None else None

    def receive(self, data: bytes) -> None:
        """A message of the client. Raises ProtocolError."""
        try:
            message = messages.known(f"{_H}HealthCheckRequestOrEndpointHealthResponse").FromString(data)
        except DecodeError as error:
            raise ProtocolError("not a serialised HealthCheckRequestOrEndpointHealthResponse") from error
        which = message.WhichOneof("request_type")
        if self.key is None:
            if which != "health_check_request":
                raise ProtocolError("the first message must be a health_check_request")
            self.node = message.health_check_request.node
            self.key = of_node(self.node)
        elif which != "health_check_request":
            report = message.endpoint_health_response  # empty if nothing is set
            groups = [group for cluster in report.cluster_endpoints_health for group in cluster.locality_endpoints_health]
            if max(sum(len(group.endpoints_health) for group in groups), len(groups), len(report.endpoints_health)) > MAX_ENDPOINTS:
                raise ProtocolError(f"a report of more than {MAX_ENDPOINTS} endpoints")
            self.report = None if self._over else report

    def ready(self, workload: Workload) -> bool | None:
        """What the last report says of it; None when it does not."""
        name = cluster_of(workload)
        for cluster in self.report.cluster_endpoints_health if self.report is not None else ():
            if cluster.cluster_name == name:
                found = [one.health_status for group in cluster.locality_endpoints_health for one in group.endpoints_health]
                return bool(found) and all(status == _HEALTHY for status in found)
        return None

    def answer(self, workload: Workload | None) -> bytes | None:
        """What it is to be told now, if that is something else than before."""
        wanted = specifier(workload, bool(self.ready(workload))) if workload is not None else b""
        if wanted == self._told:
            return None
        self._told = wanted
        self._over = not wanted
        if not wanted:
            self.report = None
        return wanted or nothing()


class Health:
    """All streams, and what is known by them. `changed` is called when that is something else. `clock`: monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, changed: Callable[[], None] = lambda: None) -> None:
        self.changed = changed
        self.streams: list[HealthStream] = []
        self.unready: frozenset[Key] = frozenset()
        self._clock = clock
        self._known: dict[Key, bool] = {}
        self._elsewhere: Mapping[Key, bool] = {}  # what replicas are told
        self._left: dict[Key, float] = {}  # when the last stream of a workload ended
        self._late: dict[Key, bool] = {}  # what is known after all those changes, and not told yet
        self._budget: dict[Key, tuple[float, float]] = {}  # changes that may be heard, as it was at a time

    def open(self, wake: Callable[[], None]) -> HealthStream:
        """A stream has begun."""
        stream = HealthStream(wake)
        self.streams.append(stream)
        return stream

    def close(self, stream: HealthStream) -> None:
        """It has ended: what it said counts for a while."""
        self.streams.remove(stream)
        key = stream.workload
        if key in self._known and all(one.workload != key for one in self.streams):
            self._left[key] = self._clock()

    def heard(self, stream: HealthStream, snapshot: MeshSnapshot) -> None:
        """A message has come."""
        key = stream.workload
        workload = snapshot.workloads.get(key) if key is not None else None
        ready = stream.ready(workload) if workload is not None else None
        if key is not None and ready is not None:
            self._left.pop(key, None)
            self._hear(key, ready)
            self._settle()
        stream.wake()

    def published(self, snapshot: MeshSnapshot) -> None:
        """There are other documents: of workloads that nobody is to ask any more, nothing is known."""
        for key in list(self._known):
            workload = snapshot.workloads.get(key)
            if workload is None or not cluster_of(workload):
                self._forget(key)
        self._settle()
        for stream in self.streams:
            stream.wake()

    def tidy(self) -> None:
        """To be called now and then: forget who has been away for long."""
        before = self._clock() - GRACE_S
        for key in [key for key, when in self._left.items() if when <= before]:
            self._forget(key)
        for key, ready in list(self._late.items()):
            self._hear(key, ready)
        for key in [key for key in self._budget if self._left_of_budget(key) >= BURST]:
            del self._budget[key]
        self._settle()

    def reported(self) -> dict[Key, bool]:
        """What is known by streams that are open, for replicas."""
        there = {one.workload for one in self.streams}
        return {key: ready for key, ready in self._known.items() if key in there}

    def elsewhere(self, ready: Mapping[Key, bool]) -> None:
        """What replicas are told. It counts for workloads that have no stream here."""
        if ready != self._elsewhere:
            self._elsewhere = dict(ready)
            self._settle()

    def of(self, node_id: str) -> Iterator[HealthStream]:
        """The streams of the proxy of that node id."""
        return (stream for stream in self.streams if stream.node is not None and stream.node.id == node_id)

    def is_ready(self, key: Key) -> bool | None:
        """What is known of a workload; None: nothing."""
        return self._known.get(key)

    def _hear(self, key: Key, ready: bool) -> None:
        """Know it now, or, of somebody who changes all the time, later."""
        if self._known.get(key) is not ready:
            left = self._left_of_budget(key)
            if left < 1.0:
                self._late[key] = ready
                return
            self._budget[key] = left - 1.0, self._clock()
            self._known[key] = ready
        self._late.pop(key, None)

    def _left_of_budget(self, key: Key) -> float:
        left, when = self._budget.get(key, (BURST, 0.0))
        return min(BURST, left + (self._clock() - when) * PER_S)

    def _forget(self, key: Key) -> None:
        self._late.pop(key, None)
        self._known.pop(key, None)
        self._left.pop(key, None)

    def _settle(self) -> None:
        known = {**self._known, **self._elsewhere, **self.reported()} if self._elsewhere else self._known
        unready = frozenset(key for key, ready in known.items() if not ready)
        if unready != self.unready:
            self.unready = unready
            self.changed()
