"""Asks a service whether a connection may go on (envoy.extensions.filters.network.ext_authz.v3.ExtAuthz).

It is asked when the first bytes arrive, so that what TLS and the listener filters found out is known; a connection that it does not let pass is closed, and so
is one that could not be checked, unless `failure_mode_allow`. The parts: `http.ext_authz`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, matchers
from meshproxy.http.ext_authz.attributes import Attributes, add_metadata, bootstrap_labels
from meshproxy.http.ext_authz.grpc_service import GrpcService, check_version
from meshproxy.http.ext_authz.verdict import DENIED, ERROR, OK, Verdict
from meshproxy.observe import flags
from meshproxy.observe.stream_info import StreamInfo

if TYPE_CHECKING:
    from envoy.extensions.filters.network.ext_authz.v3.ext_authz_pb2 import ExtAuthz as Proto

    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.net.filter_chain import NetworkContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.network.ext_authz.v3.ExtAuthz"
HONOURS = {
    "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz": (
        "stat_prefix grpc_service failure_mode_allow include_peer_certificate transport_api_version filter_enabled_metadata bootstrap_metadata_labels_key "
        "include_tls_session metadata_context_namespaces"
    ),
    **matchers.HONOURS,
}

METADATA = "envoy.filters.network.ext_authz"
_STATS = ("cx_closed", "denied", "error", "failure_mode_allowed", "ok", "total", "disabled")


class _View(StreamInfo):
    """A connection as initial metadata of the call is made of it."""

    def __init__(self, connection: ConnectionInfo) -> None:
        self.connection = connection
        self._metadata = connection.metadata
        self._filter_state = connection.filter_state


class ExtAuthz:
    """The filter. Holds the tasks in which the service is asked, by connection."""

    def __init__(self, proto: Proto, context: NetworkContext) -> None:
        inner = context.context
        scope = context.scope.scope(f"ext_authz.{proto.stat_prefix}.")
        scope.declare("counter", _STATS)
        self._stats = {name: scope.counter(name) for name in _STATS}
        self._active = scope.gauge("active")
        with errors.under("grpc_service"):
            self._service = GrpcService(proto.grpc_service, inner)
        check_version(proto)
        self._enabled = None
        if proto.HasField("filter_enabled_metadata"):
            with errors.under("filter_enabled_metadata"):
                self._enabled = matchers.compile_metadata(proto.filter_enabled_metadata, inner.runtime)
        self._allows_failures = proto.failure_mode_allow
        self._namespaces = tuple(proto.metadata_context_namespaces)
        self._clock = inner.clock
        self._attributes = Attributes(
            certificate=proto.include_peer_certificate,
            session=proto.include_tls_session,
            labels=bootstrap_labels(proto.bootstrap_metadata_labels_key, inner.node),
        )
        self._asking: dict[int, asyncio.Task[Any] | None] = {}

    def on_first_data(self, conn: ConnectionInfo) -> Awaitable[bool | None] | None:
        """Let the connection pass, or hold it until the service has answered."""
        if self._enabled is not None and not self._enabled(conn.metadata or {}):
            self._stats["disabled"].n += 1
            return None
        return self._check(conn)

    def on_close(self, conn: ConnectionInfo) -> None:
        """Whoever waits for a connection that is gone waits no more."""
        task = self._asking.pop(conn.id, None)
        if task is not None:
            task.cancel()

    async def _check(self, conn: ConnectionInfo) -> bool | None:
        request = self._attributes.of_connection(conn)
        request.attributes.metadata_context.SetInParent()
        add_metadata(request.attributes.metadata_context, self._namespaces, (conn.metadata,))
        self._stats["total"].n += 1
        self._active.n += 1
        self._asking[conn.id] = asyncio.current_task()
        started = self._clock()
        try:
            verdict = await self._service.check(request, _View(conn))
        finally:
            self._active.n -= 1
            self._asking.pop(conn.id, None)
        return self._decide(conn, verdict, self._clock() - started)

    def _decide(self, conn: ConnectionInfo, verdict: Verdict, took: float) -> bool | None:
        self._stats[verdict.outcome].n += 1
        metadata = verdict.metadata
        if verdict.outcome == OK:
            metadata["ext_authz_duration"] = float(int(took * 1000))
        if metadata:
            if conn.metadata is None:
                conn.metadata = {}
            conn.metadata[METADATA] = conn.metadata.get(METADATA, {}) | metadata
        if verdict.outcome == DENIED or (verdict.outcome == ERROR and not self._allows_failures):
            self._stats["cx_closed"].n += 1
            conn.local_close_reason = "ext_authz_close"
            conn.flags |= flags.UAEX
            if conn.stream is not None:
                conn.stream.flags |= flags.UAEX
                conn.stream.details = f"ext_authz_{verdict.outcome}"
            return False
        if verdict.outcome == ERROR:
            self._stats["failure_mode_allowed"].n += 1
        return None


def compile(proto: Proto, context: NetworkContext) -> ExtAuthz:
    """The filter for an ExtAuthz proto. Raises ConfigError."""
    if not proto.stat_prefix:
        errors.fail("stat_prefix", "must not be empty")
    if not proto.HasField("grpc_service"):
        errors.fail("grpc_service", "is required")
    return ExtAuthz(proto, context)
