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
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.observe.stream_info import StreamInfo

if TYPE_CHECKING:
    from envoy.extensions.filters.network.rbac.v3.rbac_pb2 import RBAC

    from meshproxy.api.rbac_engine import Engine
    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.net.filter_chain import NetworkContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC"
HONOURS = {
    "envoy.extensions.filters.network.rbac.v3.RBAC": "rules shadow_rules shadow_rules_stat_prefix stat_prefix enforcement_type delay_deny",
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
        for field in ("matcher", "shadow_matcher"):
            if proto.HasField(field):
                found.add(field, "matcher trees are not supported in RBAC; use rules", UNSUPPORTED)
        self._rules = _compile(proto, "rules", found)
        self._shadow = _compile(proto, "shadow_rules", found)
        found.raise_any()
        self._sleep = sleep
        self._delay = proto.delay_deny.seconds + proto.delay_deny.nanos / 1e9
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
        policy = rules.match(view)
        if rules.action == rbac_engine.LOG:
            _metadata(conn, LOG_METADATA)["access_log_hint"] = policy is not None
        if rules.allowed(policy):
            self._allowed.n += 1
            return None
        self._denied.n += 1
        conn.local_close_reason = "rbac_deny_close"
        conn.termination_details = rbac_engine.response_details(policy)
        return self._deny_later() if self._delay else False

    def _decide_shadow(self, shadow: Engine, view: _View, conn: ConnectionInfo) -> None:
        policy = shadow.match(view)
        allowed = shadow.allowed(policy)
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


def _compile(proto: RBAC, field: str, found: errors.Collector) -> Engine | None:
    if not proto.HasField(field):
        return None
    with found.under(field):
        return rbac_engine.compile_rules(getattr(proto, field), network=True)
    return None


def _metadata(conn: ConnectionInfo, namespace: str) -> dict[str, Any]:
    if conn.metadata is None:
        conn.metadata = {}
    return conn.metadata.setdefault(namespace, {})
