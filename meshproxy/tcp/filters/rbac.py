"""Role based access control of connections (envoy.extensions.filters.network.rbac.v3.RBAC).

The rules are looked at when the first bytes arrive, so that what TLS and the listener filters found out is known; a connection that they do not allow is
closed, after `delay_deny`. Shadow rules only count and leave their verdict in the connection's metadata. With CONTINUOUS enforcement Envoy decides
anew for all data; the first decision is what is left of it for a terminal filter that takes over the bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, rbac_engine
from meshproxy.api.durations import seconds
from meshproxy.observe.stream_info import StreamInfo

if TYPE_CHECKING:
    from envoy.extensions.filters.network.rbac.v3.rbac_pb2 import RBAC

    from meshproxy.api.rbac_engine import Engine, TreeEngine
    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.net.filter_chain import NetworkContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC"
HONOURS = {
    "envoy.extensions.filters.network.rbac.v3.RBAC": (
        "rules matcher shadow_rules shadow_matcher shadow_rules_stat_prefix stat_prefix enforcement_type delay_deny"
    ),
    **rbac_engine.HONOURS,
}

METADATA = "envoy.filters.network.rbac"
LOG_METADATA = "envoy.common"


class _View(StreamInfo):
    """A connection as the policy engine looks at it."""

    def __init__(self, connection: ConnectionInfo) -> None:
        self.connection = connection
        self._metadata = connection.metadata
        self._filter_state = connection.filter_state


class Rbac:
    """The filter."""

    def __init__(self, proto: RBAC, context: NetworkContext, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        found = errors.Collector()
        self._rules = rbac_engine.compile_either(proto, "rules", "matcher", found, context.context.stats.counter, network=True)
        self._shadow = rbac_engine.compile_either(proto, "shadow_rules", "shadow_matcher", found, context.context.stats.counter, network=True)
        found.raise_any()
        self._sleep = sleep
        self._delay = seconds(proto.delay_deny)
        self._key_prefix = proto.shadow_rules_stat_prefix
        prefix = f"{proto.stat_prefix.removesuffix('.')}.rbac."
        shadow_prefix = f"{prefix}{self._key_prefix.removesuffix('.')}." if self._key_prefix else prefix
        scope = context.scope.scope(prefix)
        shadow_scope = context.scope.scope(shadow_prefix)
        self._allowed, self._denied = scope.counter("allowed"), scope.counter("denied")
        self._shadow_allowed, self._shadow_denied = shadow_scope.counter("shadow_allowed"), shadow_scope.counter("shadow_denied")

    def on_first_data(self, conn: ConnectionInfo) -> Awaitable[bool] | bool | None:
        view = _View(conn)
        if self._shadow is not None:
            self._decide_shadow(self._shadow, view, conn)
        rules = self._rules
        if rules is None:
            return None
        matched: Any = rules.match(view)
        hint = rules.hint(matched) if rules.logs else None
        if hint is not None:
            _metadata(conn, LOG_METADATA)["access_log_hint"] = hint
        if rules.allowed(matched):
            self._allowed.n += 1
            return None
        self._denied.n += 1
        conn.local_close_reason = "rbac_deny_close"
        conn.termination_details = rbac_engine.response_details(rules.name(matched))
        return self._deny_later() if self._delay else False

    def _decide_shadow(self, shadow: Engine | TreeEngine, view: _View, conn: ConnectionInfo) -> None:
        matched: Any = shadow.match(view)
        policy, allowed = shadow.name(matched), shadow.allowed(matched)
        (self._shadow_allowed if allowed else self._shadow_denied).n += 1
        metadata = _metadata(conn, METADATA)
        if policy:
            metadata[f"{self._key_prefix}shadow_effective_policy_id"] = policy
        metadata[f"{self._key_prefix}shadow_engine_result"] = "allowed" if allowed else "denied"

    async def _deny_later(self) -> bool:
        await self._sleep(self._delay)
        return False


def compile(proto: RBAC, context: NetworkContext) -> Rbac:
    """The filter for an RBAC proto. Raises ConfigError."""
    if not proto.stat_prefix:
        errors.fail("stat_prefix", "must not be empty")
    return Rbac(proto, context)


def _metadata(conn: ConnectionInfo, namespace: str) -> dict[str, Any]:
    if conn.metadata is None:
        conn.metadata = {}
    return conn.metadata.setdefault(namespace, {})
