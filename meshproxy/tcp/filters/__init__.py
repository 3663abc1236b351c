"""Network filters: what decides about a connection before, or instead of, HTTP. One file each, one line in `api/registry.py`.

A filter in front of the terminal one may have `on_connection(conn)`, `on_first_data(conn)` and `on_close(conn)`; the first two answer None (go on), False
(close; `conn.local_close_reason` says why in Envoy's words, and `conn.termination_details` what else there is to say) or an awaitable of one of them. The
terminal filter makes the protocol: `create_protocol(conn)`. A connection that ends before that (its TLS handshake failed, a filter closed it) it hears of by
`missed(conn, secure=...)`, if it has that: Envoy makes its terminal filter first, so such connections count and are logged there too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.record import Record

if TYPE_CHECKING:
    from envoy.config.listener.v3 import listener_pb2

    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope


class NetworkContext(Record, frozen=True):
    """What a network filter may use when it is compiled. `listener_prefix` is `listener.<address>.`, or "" where there is no listener (admin, tests)."""

    context: Context
    scope: Scope  # the root scope
    listener: listener_pb2.Listener | None = None
    listener_prefix: str = ""

    @property
    def buffer_limit(self) -> int:
        """The listener's per_connection_buffer_limit_bytes; 1 MiB by default."""
        listener = self.listener
        if listener is not None and listener.HasField("per_connection_buffer_limit_bytes"):
            return listener.per_connection_buffer_limit_bytes.value
        return 1024 * 1024
