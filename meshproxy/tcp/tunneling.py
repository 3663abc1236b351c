"""What a TCP proxy's `tunneling_config` says of the HTTP requests that its connections travel in; one such request is `tunnel.py`.

Source: envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.TunnelingConfig and Envoy's `tcp_proxy/upstream.cc`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from meshproxy.api import registry
from meshproxy.api.errors import UNSUPPORTED, fail, under
from meshproxy.codec.headers import RequestHead
from meshproxy.http.header_mutations import compile_mutation
from meshproxy.observe.format import Compiler
from meshproxy.observe.stream_info import TypedState
from meshproxy.upstream import options, pool

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshproxy.codec.headers import Headers, Pair
    from meshproxy.context import Context
    from meshproxy.tcp.tunnel import TunnelSession
    from meshproxy.upstream.cluster import Cluster

# Filter state and dynamic metadata, by Envoy's names.
_HEADERS_TOLD = "envoy.tcp_proxy.propagate_response_headers"
_TRAILERS_TOLD = "envoy.tcp_proxy.propagate_response_trailers"
_NAMESPACE = "envoy.filters.network.tcp_proxy"
_REQUEST_ID = "x-request-id"
# What would end a request line early, whoever had it put into a name.
_NO_HOST = re.compile(rb"[\x00-\x20\x7f]").search


class Tunneling:
    """How the requests of one TCP proxy look. Immutable."""

    def __init__(self, proto: Any, context: Context) -> None:
        """`proto`: a TunnelingConfig. Raises ConfigError with paths relative to it."""
        self.context = context
        if proto.post_path and not proto.use_post:
            fail("post_path", "Can't set a post path when POST method isn't used")
        self.posts: bool = proto.use_post
        self._path = (proto.post_path or "/").encode() if proto.use_post else b""
        with under("hostname"):
            self._hostname = Compiler(clock=context.clock, wall=context.wall).text(proto.hostname)
        self._mutate = compile_mutation(proto.headers_to_add, (), "headers", request=True)
        self._tells_headers: bool = proto.propagate_response_headers
        self._tells_trailers: bool = proto.propagate_response_trailers
        self._compile_id(proto)
        # By this head, which names nobody, the pool is chosen: as in Envoy, a tunnel's name is no SNI.
        self.nobody = RequestHead(b"CONNECT", b"", version=11)
        self.nobody_http2 = RequestHead(b"CONNECT", b"", version=20)

    def _compile_id(self, proto: Any) -> None:
        self._id_header = (proto.request_id_header or _REQUEST_ID).lower().encode()
        self._id_key: str = proto.request_id_metadata_key or "tunnel_request_id"
        self._make_id: Any = None
        if not proto.request_id_extension.HasField("typed_config"):
            return
        with under("request_id_extension.typed_config"):
            extension = registry.unpack(proto.request_id_extension.typed_config)
            if extension.DESCRIPTOR.full_name != "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig":
                fail("", f"the request id extension {extension.DESCRIPTOR.full_name} is not supported", UNSUPPORTED)
            from meshproxy.http.request_head import RequestIds  # few workers of TCP have any HTTP

            self._make_id = RequestIds(self.context.random).new_apart

    # -- for sessions

    def head(self, session: TunnelSession, *, scheme: bytes) -> RequestHead | None:
        """The request of a session; None when nobody can be asked for by the name that it comes to."""
        hostname = self._hostname
        authority = hostname if isinstance(hostname, bytes) else hostname(session)
        if not authority or _NO_HOST(authority):
            return None
        head = RequestHead(b"POST" if self.posts else b"CONNECT", self._path, authority, scheme=scheme)
        if self._make_id is not None:
            request_id = self._make_id()
            head.set(self._id_header, request_id)
            _shared(session, "metadata").setdefault(_NAMESPACE, {})[self._id_key] = request_id.decode()
        if self._mutate is not None:
            self._mutate(session, head)
        return head

    def pool_for(self, session: TunnelSession, cluster: Cluster) -> pool.Pool:
        """Of the session's host."""
        host = session.host
        ends = None
        if host.proxy_protocol:
            from meshproxy.upstream.proxy_protocol import ends_of  # few workers need it

            ends = ends_of(session)
        return cluster.pool_for(host, 0, self.nobody_http2 if speaks_http2(cluster) else self.nobody, ends=ends)

    def tell_headers(self, session: TunnelSession, status: int, headers: Headers) -> None:
        """The answer came, of whatever status."""
        if self._tells_headers:
            _shared(session, "filter_state")[_HEADERS_TOLD] = _told([(b":status", b"%d" % status), *headers])

    def tell_trailers(self, session: TunnelSession, trailers: Headers) -> None:
        """The answer ended with trailers."""
        if self._tells_trailers:
            _shared(session, "filter_state")[_TRAILERS_TOLD] = _told(trailers)


def speaks_http2(cluster: Cluster) -> bool:
    """Whether tunnels to it are of HTTP/2, by configuration: ALPN may have it otherwise."""
    protocol = cluster.options.protocol
    return protocol in (options.HTTP2, options.AUTO) or (protocol == options.DOWNSTREAM and cluster.options.allows_http2)


def _told(headers: Iterable[Pair]) -> TypedState:
    """Headers as Envoy's HeaderMap."""
    return TypedState(headers=[{"key": name.decode("latin-1"), "value": value.decode("latin-1")} for name, value in headers])


def _shared(session: TunnelSession, name: str) -> dict[str, Any]:
    """Metadata or filter state of the connection, which its session has in common with it."""
    made = getattr(session.connection, name)
    if made is None:
        made = {}
        setattr(session.connection, name, made)
    setattr(session, f"_{name}", made)
    return made
