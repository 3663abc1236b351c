"""Active health checks, which main runs for all workers: one `Session` a host decides, a probe of `health_probe` asks.

A session is told how a check went and keeps the host's health flags by Envoy's rules: thresholds, the first check that counts alone, statuses that
condemn at once, immediate failure. Workers hear only of changes.

Source: envoy.config.core.v3.HealthCheck; behaviour: Envoy's health checkers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.api.durations import seconds_of
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.net import tasks
from meshproxy.net.address import Address
from meshproxy.record import Record
from meshproxy.upstream import host as hosts
from meshproxy.upstream.options import LOGICAL_DNS, number

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope

_CORE = "envoy.config.core.v3."
HONOURS = {
    _CORE + "HealthCheck": (
        "timeout interval initial_jitter interval_jitter interval_jitter_percent unhealthy_threshold healthy_threshold reuse_connection http_health_check"
        " tcp_health_check grpc_health_check"
        " no_traffic_interval no_traffic_healthy_interval unhealthy_interval unhealthy_edge_interval healthy_edge_interval tls_options"
        " transport_socket_match_criteria"
    ),
    _CORE + "HealthCheck.Payload": "text binary",
    _CORE + "HealthCheck.HttpHealthCheck": (
        "host path send receive response_buffer_size request_headers_to_add request_headers_to_remove expected_statuses retriable_statuses"
        " codec_client_type service_name_matcher method"
    ),
    _CORE + "HealthCheck.TcpHealthCheck": "send receive",
    _CORE + "HealthCheck.GrpcHealthCheck": "service_name authority initial_metadata",
    _CORE + "HealthCheck.TlsOptions": "alpn_protocols",
    "envoy.type.v3.Int64Range": "start end",
}

COUNTERS = tuple(f"health_check.{name}" for name in ("attempt", "success", "failure", "passive_failure", "network_failure", "verify_cluster"))
GAUGES = ("health_check.healthy", "health_check.degraded")
NO_TRAFFIC_INTERVAL = 60.0


class Outcome(Enum):
    """How one check went."""

    SUCCESS = "success"
    DEGRADED = "degraded"
    FAILED = "failed"  # an answer that condemns at once
    RETRIABLE = "retriable"  # an answer that counts towards the threshold
    NETWORK = "network"  # no answer
    TIMEOUT = "timeout"
    PASSIVE = "passive"  # seen by a worker in a response to a real request


class Settings(Record, frozen=True):
    """Times in seconds."""

    timeout: float
    interval: float
    unhealthy_threshold: int
    healthy_threshold: int
    no_traffic_interval: float
    no_traffic_healthy_interval: float
    unhealthy_interval: float
    unhealthy_edge_interval: float
    healthy_edge_interval: float
    initial_jitter: float
    interval_jitter: float
    interval_jitter_percent: int
    reuse_connection: bool

    @classmethod
    def from_proto(cls, proto: Any) -> Settings:
        """From a HealthCheck message."""
        interval = seconds_of(proto, "interval", 0.0)
        no_traffic = seconds_of(proto, "no_traffic_interval", NO_TRAFFIC_INTERVAL)
        unhealthy = seconds_of(proto, "unhealthy_interval", interval)
        return cls(
            timeout=seconds_of(proto, "timeout", 0.0),
            interval=interval,
            unhealthy_threshold=number(proto, "unhealthy_threshold", 0),
            healthy_threshold=number(proto, "healthy_threshold", 0),
            no_traffic_interval=no_traffic,
            no_traffic_healthy_interval=seconds_of(proto, "no_traffic_healthy_interval", no_traffic),
            unhealthy_interval=unhealthy,
            unhealthy_edge_interval=seconds_of(proto, "unhealthy_edge_interval", unhealthy),
            healthy_edge_interval=seconds_of(proto, "healthy_edge_interval", interval),
            initial_jitter=seconds_of(proto, "initial_jitter", 0.0),
            interval_jitter=seconds_of(proto, "interval_jitter", 0.0),
            interval_jitter_percent=proto.interval_jitter_percent,
            reuse_connection=proto.reuse_connection.value if proto.HasField("reuse_connection") else True,
        )


class Session:
    """The health of one host. `flags` are active health flags (`host.ACTIVE_FLAGS`)."""

    __slots__ = ("_healthy", "_settings", "_unhealthy", "first", "flags", "pending")

    def __init__(self, settings: Settings, flags: int) -> None:
        self._settings = settings
        self.flags = flags
        self.first = True  # no check is done yet
        self.pending = False  # the last check pointed the other way, without deciding
        self._healthy = 0
        self._unhealthy = 0

    def record(self, outcome: Outcome, excluded: bool = False) -> bool:
        """Take one outcome; whether the flags changed. `excluded`: the answer said x-envoy-immediate-health-check-fail."""
        before = self.flags
        self.pending = False
        if excluded:
            self.flags |= hosts.EXCLUDED_VIA_IMMEDIATE_HC_FAIL
        if outcome in (Outcome.SUCCESS, Outcome.DEGRADED):
            self._succeed(outcome is Outcome.DEGRADED)
        else:
            self._fail(outcome)
        self.flags &= ~hosts.PENDING_ACTIVE_HC
        self.first = False
        return self.flags != before

    def _succeed(self, degraded: bool) -> None:
        self._unhealthy = 0
        if self.flags & hosts.FAILED_ACTIVE_HC:
            self._healthy += 1
            # The very first check alone is enough: start-up is worth more than certainty.
            if self.first or self._healthy == self._settings.healthy_threshold:
                self.flags &= ~(hosts.FAILED_ACTIVE_HC | hosts.ACTIVE_HC_TIMEOUT | hosts.EXCLUDED_VIA_IMMEDIATE_HC_FAIL)
                self._healthy = 0
            else:
                self.pending = True
        if degraded:
            self.flags |= hosts.DEGRADED_ACTIVE_HC
        else:
            self.flags &= ~hosts.DEGRADED_ACTIVE_HC

    def _fail(self, outcome: Outcome) -> None:
        self._healthy = 0
        if not self.flags & hosts.FAILED_ACTIVE_HC:
            self._unhealthy += 1
            at_once = outcome in (Outcome.FAILED, Outcome.PASSIVE)
            if at_once or self._unhealthy == self._settings.unhealthy_threshold:
                self.flags |= hosts.FAILED_ACTIVE_HC
                self._unhealthy = 0
            else:
                self.pending = True
        if outcome is Outcome.TIMEOUT and self.flags & hosts.FAILED_ACTIVE_HC:
            self.flags |= hosts.ACTIVE_HC_TIMEOUT
        else:
            self.flags &= ~hosts.ACTIVE_HC_TIMEOUT

    def interval(self, last: Outcome, *, traffic: bool) -> float:
        """Seconds until the next check, without jitter. `traffic`: a connection was ever made to the cluster."""
        settings = self._settings
        passed = last in (Outcome.SUCCESS, Outcome.DEGRADED)
        if not traffic:
            return settings.no_traffic_healthy_interval if passed and not self.pending else settings.no_traffic_interval
        if passed:
            return settings.healthy_edge_interval if self.pending else settings.interval
        return settings.unhealthy_edge_interval if self.pending else settings.unhealthy_interval


class Target(Record, frozen=True):
    """Where a host is checked: `address` of the host names it, `check_address` is asked, `hostname` is the Host of HTTP and gRPC checks."""

    address: Address
    check_address: Address
    hostname: str
    metadata: Any = None  # of the endpoint, for transport socket matches


class Checker:
    """The health checks of one cluster. `on_changed(address text -> flags)` hears of every change. `known`: the health of hosts that others have checked."""

    def __init__(
        self, proto: Any, context: Context, scope: Scope, on_changed: Callable[[Mapping[str, int]], None], known: Mapping[str, int] | None = None
    ) -> None:
        from meshproxy.upstream import health_probe

        check = proto.health_checks[0]
        self._proto = proto
        self._context = context
        self._settings = Settings.from_proto(check)
        self._prober = health_probe.compile_prober(proto, context, scope)
        self._on_changed = on_changed
        self._known = known or {}
        self._sessions: dict[str, Session] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._targets: dict[str, Target] = {}
        self._report: set[str] = set()
        self._leaving: set[str] = set()  # not in the assignment any more
        pending = proto.common_lb_config.ignore_new_hosts_until_first_hc and proto.type != 0
        self._initial_flags = hosts.FAILED_ACTIVE_HC | (hosts.PENDING_ACTIVE_HC if pending else 0)
        self._first_round = asyncio.Event()
        self._traffic = f"cluster.{proto.alt_stat_name or proto.name}.upstream_cx_total"
        scope.declare("counter", COUNTERS)
        scope.declare("gauge", GAUGES)
        self._scope = scope

    def update(self, assignment: Any) -> None:
        """Check the hosts of a ClusterLoadAssignment with resolved addresses. A host that left it while healthy is checked on, until it fails."""
        targets = {target.address.text: target for target in targets_of(self._proto, assignment)}
        gone = [key for key, target in self._targets.items() if targets.get(key) != target]
        moved = self._take_logical_session(gone, targets)
        for key in gone:
            keeps = key not in targets and not self._sessions[key].flags & hosts.FAILED_ACTIVE_HC and not self._proto.ignore_health_on_host_removal
            if keeps and moved is None:
                self._leaving.add(key)
            else:
                self._stop(key)
        for key, target in targets.items():
            self._leaving.discard(key)
            if key not in self._targets:
                self._targets[key] = target
                self._sessions[key] = moved or Session(self._settings, self._known.get(key, self._initial_flags))
                self._tasks[key] = tasks.spawn(f"check {self._proto.name} {key}", self._run(key, target))
        self._note_first_round()

    def _take_logical_session(self, gone: list[str], targets: Mapping[str, Target]) -> Session | None:
        """The one host of a LOGICAL_DNS cluster stays the same host when its address changes."""
        if self._proto.type == LOGICAL_DNS and len(gone) == len(targets) == len(self._targets) == 1:
            return self._sessions[gone[0]]
        return None

    def _stop(self, key: str) -> None:
        del self._targets[key], self._sessions[key]
        self._tasks.pop(key).cancel()
        self._report.discard(key)
        self._leaving.discard(key)
        self._count_states()

    def close(self) -> None:
        """Stop all checks."""
        for key in list(self._targets):
            self._stop(key)
        self._first_round.set()

    async def wait_first_round(self) -> None:
        """Wait until every present host was checked once."""
        await self._first_round.wait()

    def _note_first_round(self) -> None:
        if not any(session.first for session in self._sessions.values()):
            self._first_round.set()

    async def _run(self, key: str, target: Target) -> None:
        probe = self._prober.probe(target)
        random = self._context.random.random
        if self._settings.initial_jitter:
            await asyncio.sleep(self._settings.initial_jitter * random())
        try:
            while True:
                self._count("attempt")
                try:
                    async with asyncio.timeout(self._settings.timeout):
                        outcome, excluded = await probe.check()
                except TimeoutError:
                    outcome, excluded = Outcome.TIMEOUT, False
                    probe.close()
                session = self._sessions[key]
                self._record(key, outcome, excluded)
                await asyncio.sleep(self._jittered(session.interval(outcome, traffic=self._has_traffic())))
        finally:
            probe.close()

    def _has_traffic(self) -> bool:
        metric = self._context.stats.find(self._traffic)
        return metric is not None and metric.used

    def _jittered(self, interval: float) -> float:
        settings, random = self._settings, self._context.random.random
        interval += interval * settings.interval_jitter_percent / 100 * random() + settings.interval_jitter * random()
        runtime = self._context.runtime
        if runtime is not None:
            interval = min(interval, runtime.integer("health_check.max_interval", 1 << 40) / 1000)
            interval = max(interval, runtime.integer("health_check.min_interval", 0) / 1000)
        return max(interval, 0.001)

    def _record(self, key: str, outcome: Outcome, excluded: bool = False) -> None:
        session = self._sessions[key]
        changed = session.record(outcome, excluded)
        if outcome in (Outcome.SUCCESS, Outcome.DEGRADED):
            self._count("success")
        else:
            self._count("failure")
            if outcome in (Outcome.NETWORK, Outcome.TIMEOUT):
                self._count("network_failure")
            elif outcome is Outcome.PASSIVE:
                self._count("passive_failure")
        if changed:
            self._count_states()
        passed = not session.flags & hosts.FAILED_ACTIVE_HC and outcome in (Outcome.SUCCESS, Outcome.DEGRADED)
        if changed or (passed and key in self._report):
            self._report.discard(key)
            self._on_changed({key: session.flags})
        if key in self._leaving and session.flags & hosts.FAILED_ACTIVE_HC:
            self._stop(key)
        self._note_first_round()

    def fail_immediately(self, address: str) -> None:
        """A worker saw x-envoy-immediate-health-check-fail in a response of that host."""
        if address in self._sessions:
            self._record(address, Outcome.PASSIVE, excluded=True)

    def report_next_success(self, address: str) -> None:
        """Report the next check of that host that passes, even if its health does not change."""
        if address in self._sessions:
            self._report.add(address)

    def flags(self) -> dict[str, int]:
        """The health of every host."""
        return {key: session.flags for key, session in self._sessions.items()}

    def _count(self, name: str) -> None:
        self._scope.counter(f"health_check.{name}").n += 1

    def _count_states(self) -> None:
        states = [session.flags for session in self._sessions.values()]
        self._scope.gauge("health_check.healthy").n = sum(not flags & hosts.FAILED_ACTIVE_HC for flags in states)
        self._scope.gauge("health_check.degraded").n = sum(bool(flags & hosts.DEGRADED_ACTIVE_HC) for flags in states)


def targets_of(proto: Any, assignment: Any) -> list[Target]:
    """What to check of a ClusterLoadAssignment with resolved addresses."""
    check = proto.health_checks[0]
    default = check.http_health_check.host or check.grpc_health_check.authority or proto.name
    targets = []
    for group in assignment.endpoints:
        for endpoint in group.lb_endpoints:
            inner = endpoint.endpoint
            config = inner.health_check_config
            if config.disable_active_health_check:
                continue
            address = Address.from_proto(inner.address)
            targets.append(
                Target(address, _check_address(address, config), config.hostname or default, endpoint.metadata if endpoint.HasField("metadata") else None)
            )
    return targets


def _check_address(address: Address, config: Any) -> Address:
    if config.HasField("address"):
        address = Address.from_proto(config.address)
    return address.with_port(config.port_value) if config.port_value and address.kind == "ip" else address


def check_config(protos: Any, *, speaks_http2: bool) -> None:
    """Find mistakes in a cluster's `health_checks`. `speaks_http2`: its protocol can be that. Raises ConfigError with paths relative to the cluster."""
    from meshproxy.upstream import health_probe

    if len(protos) != 1:
        errors.fail("health_checks", "Multiple health checks not supported", UNSUPPORTED)
    with errors.under("health_checks[0]"):
        health_probe.check_config(protos[0], speaks_http2=speaks_http2)
