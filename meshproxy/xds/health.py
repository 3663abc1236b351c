"""Health that is reported back (HDS): a server says which endpoints to check and how, main checks them, and says as often as it wants how they are.

As Envoy's delegate: one stream, begun anew when it has ended; the first message says who we are and what we can check. `Checks` is all but the stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from meshproxy.api import messages
from meshproxy.api.durations import seconds_of
from meshproxy.api.errors import ConfigError, under
from meshproxy.codec import grpc
from meshproxy.net.address import Address
from meshproxy.net.tasks import spawn
from meshproxy.observe.stats import sanitise
from meshproxy.upstream import health_probe, host, stats
from meshproxy.upstream.grpc_client import GrpcClient
from meshproxy.upstream.grpc_stream import GrpcError
from meshproxy.upstream.health import Checker
from meshproxy.upstream.options import compile_options
from meshproxy.xds.client import Backoff

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.upstream.grpc_stream import GrpcStream
    from meshproxy.xds.client import Api
    from meshproxy.xds.subscription import Rules

log = logging.getLogger("meshproxy.config")

_H = "envoy.service.health.v3."
HONOURS = {
    f"{_H}HealthCheckSpecifier": "cluster_health_checks interval",
    f"{_H}ClusterHealthCheck": "cluster_name health_checks locality_endpoints transport_socket_matches upstream_bind_config",
    f"{_H}LocalityEndpoints": "locality endpoints",
}

METHOD = f"/{_H}HealthDiscoveryService/StreamHealthCheck"
INTERVAL = 1.0  # seconds between reports, unless the server says otherwise
MIN_INTERVAL = 0.01  # seconds: a server that wants reports all the time must not keep this process busy
BASE_DELAY, MAX_DELAY = 1.0, 30.0  # seconds between streams
CONNECT_TIMEOUT = 1  # seconds
BUFFER_LIMIT = 32768  # bytes of a connection
_HEALTHY, _UNHEALTHY, _TIMEOUT = 1, 2, 4  # envoy.config.core.v3.HealthStatus
_HTTP, _TCP = 0, 1  # Capability.Protocol: all that can be said

Acquire = Callable[[Any, Callable[[], None]], Callable[[], None]]  # (Cluster message, ready) -> release: subscribes to secrets that its TLS needs


class _Checked:
    """The endpoints of one ClusterHealthCheck, and their checks: one checker for each HealthCheck. Construction raises ConfigError and has then done nothing.

    `before`: what was known under that name; checkers that are the same are taken over, and so is what others had found out of endpoints that stay.
    """

    def __init__(self, proto: Any, context: Context, acquire: Acquire, before: _Checked | None) -> None:
        self.name: str = proto.cluster_name
        self.proto = proto
        self._context = context
        self.release: Callable[[], None] = lambda: None
        cluster = _cluster(proto)
        self._assignment = cluster.load_assignment
        self.addresses = [_addresses(group, at) for at, group in enumerate(proto.locality_endpoints)]
        scope = context.stats.scope(f"cluster.{self.name}.")
        self._checkers: dict[bytes, tuple[Any, Checker | None]] = {}
        compile_options(cluster, scope, context.secrets)
        same = before is not None and _ways(before.proto) == _ways(proto)
        for at, check in enumerate(proto.health_checks):
            with under(f"health_checks[{at}]"):
                health_probe.check_config(check, speaks_http2=True)
            one = type(cluster)()
            one.CopyFrom(cluster)
            one.health_checks.add().CopyFrom(check)
            key = check.SerializeToString(deterministic=True)
            self._checkers[key] = one, before._checkers[key][1] if before is not None and same and key in before._checkers else None
        self._found = before.flags() if before is not None and same else {}
        self.release = acquire(cluster, lambda: None)

    def start(self) -> None:
        """Begin to check, or go on with other endpoints."""
        scope = self._context.stats.scope(f"cluster.{self.name}.")
        stats.declare(scope)
        for key, (proto, checker) in self._checkers.items():
            if checker is None:
                checker = Checker(proto, self._context, scope, lambda _: None, self._found)
                self._checkers[key] = proto, checker
            checker.update(self._assignment)
        self._found = {}

    def close(self, heir: _Checked | None = None) -> None:
        """Stop what `heir` has not taken over."""
        kept = {id(checker) for _, checker in heir._checkers.values()} if heir is not None else set()
        for _, checker in self._checkers.values():
            if checker is not None and id(checker) not in kept:
                checker.close()
        self.release()

    def flags(self) -> dict[str, int]:
        """The health of every endpoint: address text -> active health flags. Who is asked in several ways is well when all of them find so."""
        found: dict[str, int] = {}
        for _, checker in self._checkers.values():
            for address, flags in checker.flags().items() if checker is not None else ():
                found[address] = found.get(address, 0) | flags
        return found

    def put(self, response: Any) -> None:
        """Add to an EndpointHealthResponse."""
        found = self.flags()
        cluster = response.cluster_endpoints_health.add(cluster_name=self.name)
        for group, addresses in zip(self.proto.locality_endpoints, self.addresses, strict=True):
            if not addresses:
                continue
            locality = cluster.locality_endpoints_health.add(locality=group.locality)
            for address in addresses:
                one = locality.endpoints_health.add(health_status=_status(found.get(address.text, host.FAILED_ACTIVE_HC)))
                if address.kind == "pipe":
                    one.endpoint.address.pipe.path = address.path
                else:
                    one.endpoint.address.socket_address.address = address.ip
                    one.endpoint.address.socket_address.port_value = address.port
                response.endpoints_health.add().CopyFrom(one)


def _addresses(group: Any, at: int) -> list[Address]:
    """Of the endpoints that are to be checked."""
    found = []
    for number, endpoint in enumerate(group.endpoints):
        if not endpoint.health_check_config.disable_active_health_check:
            with under(f"locality_endpoints[{at}].endpoints[{number}].address"):
                found.append(Address.from_proto(endpoint.address))
    return found


def _ways(proto: Any) -> tuple[list[bytes], bytes]:
    """How endpoints are reached: when that changes, nothing is known of them any more."""
    sockets = [match.SerializeToString(deterministic=True) for match in proto.transport_socket_matches]
    return sockets, proto.upstream_bind_config.SerializeToString(deterministic=True)


def _status(flags: int) -> int:
    if flags & host.ACTIVE_HC_TIMEOUT:
        return _TIMEOUT
    return _UNHEALTHY if flags else _HEALTHY  # one that is degraded is not well either


def _cluster(proto: Any) -> Any:
    """The Cluster message that says the same as a ClusterHealthCheck, but for the checks."""
    cluster = messages.known("envoy.config.cluster.v3.Cluster")(name=proto.cluster_name)
    cluster.connect_timeout.seconds = CONNECT_TIMEOUT
    cluster.per_connection_buffer_limit_bytes.value = BUFFER_LIMIT
    cluster.ignore_health_on_host_removal = True
    cluster.transport_socket_matches.extend(proto.transport_socket_matches)
    if proto.HasField("upstream_bind_config"):
        cluster.upstream_bind_config.CopyFrom(proto.upstream_bind_config)
    cluster.load_assignment.cluster_name = proto.cluster_name
    for group in proto.locality_endpoints:
        endpoints = cluster.load_assignment.endpoints.add()
        if group.HasField("locality"):
            endpoints.locality.CopyFrom(group.locality)
        for endpoint in group.endpoints:
            endpoints.lb_endpoints.add().endpoint.CopyFrom(endpoint)
    return cluster


class Checks:
    """What is checked at present. `interval`: seconds between reports; None before the first specifier of a stream."""

    def __init__(self, context: Context, rules: Rules, acquire: Acquire) -> None:
        self.interval: float | None = None
        self._context = context
        self._rules = rules
        self._acquire = acquire
        self._checked: list[_Checked] = []
        self._specifier: bytes | None = None

    def begin(self) -> None:
        """Another stream: what its server says first is news, and reports wait for it. Checks go on."""
        self._specifier = self.interval = None

    def take(self, specifier: Any) -> bool:
        """Check what a HealthCheckSpecifier wants; whether it wants anything new. Raises ConfigError, and everything stays as it is."""
        serialised = specifier.SerializeToString(deterministic=True)
        if serialised == self._specifier:
            return False
        self._rules.check(specifier)
        before = {one.name: one for one in self._checked if one.name}
        checked: list[_Checked] = []
        names: set[str] = set()
        try:
            for at, proto in enumerate(specifier.cluster_health_checks):
                if proto.cluster_name in names:
                    log.warning("health checks of cluster %s come twice: the first ones count", proto.cluster_name)
                    continue
                with under(f"cluster_health_checks[{at}]"):
                    checked.append(_Checked(proto, self._context, self._acquire, before.get(proto.cluster_name)))
                names.add(proto.cluster_name)
                names.discard("")
        except ConfigError:
            for one in checked:
                one.release()
            raise
        old, self._checked = self._checked, checked
        for one in checked:
            one.start()
        heirs = {one.name: one for one in checked if one.name}
        for one in old:
            one.close(heirs.get(one.name))
        self._forget(one.name for one in old if one.name not in heirs)
        self.interval = seconds_of(specifier, "interval", INTERVAL)
        self._specifier = serialised
        return True

    def _forget(self, names: Iterator[str]) -> None:
        """Statistics of clusters that were only checked are gone with them."""
        present = {one.name for one in self._checked}
        prefixes = {sanitise(f"cluster.{name}.") for name in names if name not in present and name not in self._context.clusters}
        if prefixes:
            self._context.stats.remove(*prefixes)

    def response(self) -> Any:
        """How everything is: a HealthCheckRequestOrEndpointHealthResponse."""
        message = messages.known(f"{_H}HealthCheckRequestOrEndpointHealthResponse")()
        for one in self._checked:
            one.put(message.endpoint_health_response)
        return message

    def close(self) -> None:
        """Check nothing any more."""
        for one in self._checked:
            one.close()
        self._checked = []


class HealthReporter:
    """The stream, and those that replace it. `start` it inside the running loop."""

    def __init__(self, api: Api, context: Context, rules: Rules, acquire: Acquire) -> None:
        self._client = GrpcClient(context.clusters, api.cluster, authority=api.authority, metadata=api.metadata)
        self._context = context
        self._backoff = Backoff(context.random.random, BASE_DELAY, MAX_DELAY)
        self._task: asyncio.Task[None] | None = None
        self.checks = Checks(context, rules, acquire)
        scope = context.stats.scope("hds_delegate.")
        scope.declare("counter", ("errors", "requests", "responses", "updates"))
        self._scope = scope

    def start(self) -> None:
        """Begin, unless that was done."""
        if self._task is None:
            self._task = spawn(f"health reports to {self._client.cluster_name}", self._run())

    def close(self) -> None:
        """End for good."""
        if self._task is not None:
            self._task.cancel()
        self.checks.close()

    def _count(self, name: str) -> None:
        self._scope.counter(name).n += 1

    async def _run(self) -> None:
        while True:
            ended: object = "by the server"
            try:
                async with self._client.stream(METHOD) as stream:
                    await self._talk(stream)
            except GrpcError as error:
                ended = error
            except Exception as error:  # a defect shall not be the end of all reports
                log.exception("health reports to %s failed", self._client.cluster_name)
                ended = error
            self._count("errors")
            delay = self._backoff.delay()
            log.warning("health reports to %s ended: %s; again in %.3f s", self._client.cluster_name, ended, delay)
            await asyncio.sleep(delay)

    async def _talk(self, stream: GrpcStream) -> None:
        """Report until the server ends the stream. Raises GrpcError."""
        self.checks.begin()
        await self._send(stream, self._greeting())
        interval: float | None = None
        due: float | None = None
        incoming = asyncio.ensure_future(stream.read())
        try:
            while True:
                done, _ = await asyncio.wait((incoming,), timeout=None if due is None else max(0.0, due - self._context.clock()))
                if not done:
                    await self._send(stream, self.checks.response())
                else:
                    data = incoming.result()
                    if data is None:
                        return
                    incoming = asyncio.ensure_future(stream.read())
                    self._received(data)
                    if self.checks.interval == interval:
                        continue
                    interval = self.checks.interval
                due = self._context.clock() + max(MIN_INTERVAL, interval or 0.0)
        finally:
            incoming.cancel()

    async def _send(self, stream: GrpcStream, message: Any) -> None:
        self._count("responses")
        await stream.send(message.SerializeToString())

    def _greeting(self) -> Any:
        message = messages.known(f"{_H}HealthCheckRequestOrEndpointHealthResponse")()
        message.health_check_request.node.CopyFrom(self._context.node)
        message.health_check_request.capability.health_check_protocols.extend((_HTTP, _TCP))
        return message

    def _received(self, data: bytes) -> None:
        self._backoff.reset()
        try:
            specifier = messages.known(f"{_H}HealthCheckSpecifier").FromString(data)
        except DecodeError as error:
            raise GrpcError(grpc.INTERNAL, "not a serialised HealthCheckSpecifier") from error
        self._count("requests")
        try:
            if self.checks.take(specifier):
                self._count("updates")
        except ConfigError as error:
            self._count("errors")
            log.warning("the health check specifier is not usable: %s", error)
