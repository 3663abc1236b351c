"""ORIGINAL_DST clusters: the host is the address that the client wanted to reach before its connection was redirected to us.

Hosts come into being when they are picked and are dropped when nothing has used them for one to two `cleanup_interval`s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.net.address import Address
from meshproxy.upstream.host import Host

if TYPE_CHECKING:
    from meshproxy.upstream.balance.base import LbContext
    from meshproxy.upstream.cluster import Cluster

HONOURS = {
    "envoy.config.cluster.v3.Cluster.OriginalDstLbConfig": "use_http_header http_header_name upstream_port_override metadata_key",
    "envoy.type.metadata.v3.MetadataKey": "key path",
    "envoy.type.metadata.v3.MetadataKey.PathSegment": "key",
}

CLEANUP_INTERVAL = 5.0
FILTER_STATE = "envoy.network.transport_socket.original_dst_address"
_HEADER = b"x-envoy-original-dst-host"


class OriginalDst:
    """Finds or makes the host of a request. Looks, in this order, at filter state, metadata, a header and the connection's restored address."""

    def __init__(self, proto: Any, cluster: Cluster) -> None:
        config = proto.original_dst_lb_config
        self._cluster = cluster
        self._hosts: dict[str, Host] = {}
        self._used: set[str] = set()
        self._header: bytes | None = None
        if config.use_http_header:
            self._header = config.http_header_name.lower().encode() or _HEADER
        self._port = config.upstream_port_override.value if config.HasField("upstream_port_override") else None
        self._metadata_key = config.metadata_key if config.HasField("metadata_key") else None

    def pick(self, context: LbContext | None = None) -> Host | None:
        """The host, or None when there is no original destination."""
        if context is None or context.stream is None:
            return None
        address = self._destination(context.stream)
        if address is None or address.kind != "ip":
            return None
        if self._port is not None:
            address = address.with_port(self._port)
        key = address.text
        self._used.add(key)
        host = self._hosts.get(key)
        if host is None:
            host = self._hosts[key] = Host(self._cluster, address, hostname=self._cluster.name + key)
            self._cluster.adopt([host], [])
        return host

    def _destination(self, stream: Any) -> Address | None:
        state = stream.filter_state.get(FILTER_STATE) if stream._filter_state else None
        if state is not None:
            return state if isinstance(state, Address) else self._parse(str(state))
        if self._metadata_key is not None and (text := self._from_metadata(stream)) is not None and (address := self._parse(text)) is not None:
            return address
        if self._header is not None and stream.request is not None:
            value = stream.request.get(self._header)
            if value and (address := self._parse(value.decode("latin-1"))) is not None:
                return address
        connection = stream.connection
        if connection is not None and connection.local != connection.direct_local:
            local: Address = connection.local
            return local
        return None

    def _from_metadata(self, stream: Any) -> str | None:
        value: Any = stream.metadata.get(self._metadata_key.key)  # type: ignore[union-attr]
        for segment in self._metadata_key.path:  # type: ignore[union-attr]
            if not isinstance(value, dict):
                return None
            value = value.get(segment.key)
        if isinstance(value, list) and value:
            value = value[0]
        return value if isinstance(value, str) else None

    def _parse(self, text: str) -> Address | None:
        try:
            address = Address.parse(text)
        except ValueError:
            address = None
        if address is None or address.kind != "ip":
            self._cluster.stats.original_dst_host_invalid.n += 1
            return None
        return address

    def sweep(self) -> None:
        """Drop hosts that were not picked since the last sweep and that nothing uses. Called every `cleanup_interval`."""
        stale = [key for key, host in self._hosts.items() if key not in self._used and not host.cx_active and not host.rq_active]
        self._used.clear()
        if stale:
            self._cluster.adopt([], [self._hosts.pop(key) for key in stale])
