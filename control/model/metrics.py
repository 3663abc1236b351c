"""Telemetry of requests beside traces: Istio's metrics, and access logs. What policies say of them, put together for one side of a proxy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PROMETHEUS = "prometheus"  # the provider of metrics that is always there
STDOUT = "envoy"  # that of access logs
METRICS = {
    "REQUEST_COUNT": "requests_total",
    "REQUEST_DURATION": "request_duration_milliseconds",
    "REQUEST_SIZE": "request_bytes",
    "RESPONSE_SIZE": "response_bytes",
    "TCP_OPENED_CONNECTIONS": "tcp_connections_opened_total",
    "TCP_CLOSED_CONNECTIONS": "tcp_connections_closed_total",
    "TCP_SENT_BYTES": "tcp_sent_bytes_total",
    "TCP_RECEIVED_BYTES": "tcp_received_bytes_total",
    "GRPC_REQUEST_MESSAGES": "request_messages_total",
    "GRPC_RESPONSE_MESSAGES": "response_messages_total",
}
ALL = tuple(sorted(METRICS.values()))
MESSAGES = frozenset((METRICS["GRPC_REQUEST_MESSAGES"], METRICS["GRPC_RESPONSE_MESSAGES"]))


class Override(NamedTuple):
    """What a policy says of some metrics, all of them if it names none. `tags`: names and values; None for one that goes."""

    client: bool = True
    server: bool = True
    metrics: tuple[str, ...] = ()
    disabled: bool | None = None
    tags: tuple[tuple[str, str | None], ...] = ()


class Metrics(NamedTuple):
    """One entry of `metrics` of a Telemetry. `providers` empty: those of the policy around it."""

    providers: tuple[str, ...] = ()
    interval_s: float | None = None
    overrides: tuple[Override, ...] = ()


class Metric(NamedTuple):
    """What becomes of one metric."""

    name: str
    dropped: bool
    removed: tuple[str, ...]
    values: tuple[tuple[str, str], ...]


class MetricsSettings(NamedTuple):
    """What one side of a proxy counts: all metrics, but for what is said of some. `messages`: those of gRPC are asked for by name."""

    interval_s: float | None = None
    metrics: tuple[Metric, ...] = ()
    messages: bool = False


class LogProvider(NamedTuple):
    """Where access logs go: a file. `text`: the format, "" for Istio's; `labels`: names and values of JSON instead of it."""

    path: str = "/dev/stdout"
    text: str = ""
    labels: tuple[tuple[str, str], ...] | None = None


class Condition(NamedTuple):
    """When an entry is written: if the response's code compares so. `op`: EQ, GE or LE."""

    op: str
    code: int


class Logging(NamedTuple):
    """One entry of `accessLogging` of a Telemetry. `conditions`: all of one inner tuple must hold, of any of them; empty for always."""

    client: bool = True
    server: bool = True
    providers: tuple[str, ...] = ()
    disabled: bool = False
    conditions: tuple[tuple[Condition, ...], ...] = ()


class LogSettings(NamedTuple):
    """One access log of one side of a proxy."""

    provider: LogProvider
    conditions: tuple[tuple[Condition, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the MeshConfig says. `metrics`, `logs`: names of providers where no policy says any; `log_providers` by name; `log_file`: where there is neither."""

    metric_providers: frozenset[str] = frozenset((PROMETHEUS,))
    metrics: tuple[str, ...] = (PROMETHEUS,)
    log_providers: tuple[tuple[str, LogProvider], ...] = ((STDOUT, LogProvider()),)
    logs: tuple[str, ...] = ()
    log_file: LogProvider | None = None


def metrics_of(entries: Sequence[Metrics], defaults: Defaults, *, client: bool) -> MetricsSettings | None:
    """What a side counts by the entries of all its policies, the widest first; None: nothing.

    As in Istio: the last providers that are named are the only ones; to switch all metrics off goes until one is spoken of again.
    """
    in_scope = next((one.providers for one in reversed(entries) if one.providers), defaults.metrics)
    wanted = [name for name in in_scope if name in defaults.metric_providers]
    if not wanted:
        return None
    provider = wanted[0]  # they are all the same to a proxy that is scraped
    around, concerned, off, interval, named = defaults.metrics, not entries, False, None, False
    found: dict[str, tuple[bool, dict[str, str | None]]] = {}
    for entry in entries:
        around = entry.providers or around
        if provider not in around:
            continue
        concerned = True
        interval = interval if entry.interval_s is None else entry.interval_s
        for one in entry.overrides:
            if not (one.client if client else one.server):
                continue
            if one.disabled and not one.metrics:
                off = True
                continue
            off = False
            named |= not one.disabled and not MESSAGES.isdisjoint(one.metrics)
            for name in one.metrics or ALL:
                dropped, tags = found.get(name, (False, {}))
                found[name] = dropped if one.disabled is None else one.disabled, {**tags, **dict(one.tags)}
    if off or not concerned:
        return None
    made = []
    for name, (dropped, tags) in sorted(found.items()):
        removed = tuple(sorted(tag for tag, value in tags.items() if value is None))
        values = tuple(sorted((tag, value) for tag, value in tags.items() if value is not None))
        if dropped or removed or values:
            made.append(Metric(name, dropped, removed, values))
    return MetricsSettings(interval, tuple(made), named)


def logs_of(levels: Sequence[Iterable[Logging]], defaults: Defaults, *, client: bool) -> tuple[LogSettings, ...]:
    """The access logs of a side by the entries of its policies that have some, the widest first."""
    providers: Mapping[str, LogProvider] = dict(defaults.log_providers)
    if not levels:
        if not defaults.logs:
            return () if defaults.log_file is None else (LogSettings(defaults.log_file),)
        return tuple(LogSettings(providers[name]) for name in sorted(defaults.logs) if name in providers)
    in_scope = defaults.logs
    conditions: dict[str, tuple[tuple[Condition, ...], ...]] = {}
    for level in levels:
        named: list[str] = []
        for one in level:
            if one.client if client else one.server:
                named += one.providers
                conditions.update(dict.fromkeys(one.providers, one.conditions))
        in_scope = tuple(named) or in_scope
    found: dict[str, LogSettings | None] = {}
    around = defaults.logs
    for level in levels:
        for one in level:
            around = one.providers or around
            for name in around:
                if name in in_scope and name in providers and (one.client if client else one.server):
                    found[name] = None if one.disabled else LogSettings(providers[name], conditions.get(name, ()))
    return tuple(one for _, one in sorted(found.items()) if one is not None)
