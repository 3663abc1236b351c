"""Listener filters: what is found out about a connection before it is one.

They look at the first bytes with MSG_PEEK on the bare socket, so that TLS and HTTP get every byte again; only the PROXY protocol takes its header away.
`Inspection` runs the filters of one accepted socket, in order. Most connections have sent their first bytes by the time they are accepted and go through
without ever waiting; one that waits is woken only by more bytes than it has already seen (SO_RCVLOWAT), so that peeked bytes never make the loop spin.
"""

from __future__ import annotations

import asyncio
import logging
import re
import select
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import registry
from meshproxy.api.errors import UNSUPPORTED, ConfigError, fail, under
from meshproxy.net.address import Address

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.observe.stats import Scope

_L = "envoy.extensions.filters.listener."
HONOURS = {
    f"{_L}tls_inspector.v3.TlsInspector": "initial_read_buffer_size close_connection_on_client_hello_parsing_errors max_client_hello_size",
    f"{_L}http_inspector.v3.HttpInspector": "",
    f"{_L}original_dst.v3.OriginalDst": "",
    f"{_L}proxy_protocol.v3.ProxyProtocol": "rules allow_requests_without_proxy_protocol pass_through_tlvs disallowed_versions stat_prefix tlv_location",
    f"{_L}proxy_protocol.v3.ProxyProtocol.Rule": "tlv_type on_tlv_present",
    f"{_L}proxy_protocol.v3.ProxyProtocol.KeyValuePair": "metadata_namespace key",
    "envoy.config.core.v3.ProxyProtocolPassThroughTLVs": "match_type tlv_type",
    "envoy.config.listener.v3.ListenerFilter": "name typed_config filter_disabled",
    "envoy.config.listener.v3.ListenerFilterChainMatchPredicate": "or_match and_match not_match any_match destination_port_range",
    "envoy.config.listener.v3.ListenerFilterChainMatchPredicate.MatchSet": "rules",
}

log = logging.getLogger(__name__)

_FIRST_PEEK = 4096  # bytes; grows while a filter wants more
_MAX_PEEK = 1 << 17
_PAUSE = 0.01  # seconds between looks at a socket that cannot say when there is more
_MAX_HANDSHAKE_MESSAGE = 16384  # bytes; of Envoy's TLS library
_MAX_HTTP_LINE = 1 << 16  # Envoy's limit for a request line that is to be inspected
_SO_ORIGINAL_DST = 80  # of SOL_IP and SOL_IPV6, from the kernel's netfilter headers
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR

# What a filter says of the bytes it was shown.
DONE, MORE, CLOSE = "done", "more", "close"


class ListenerFilter:
    """One listener filter of a listener. `needs_data`: `on_data` must see the first bytes; otherwise `on_accept` is all there is."""

    needs_data = True

    def on_accept(self, conn: ConnectionInfo, sock: socket.socket) -> bool:
        """Called first, once a connection. True: `on_data` is not needed for this one."""
        return not self.needs_data

    def on_data(self, conn: ConnectionInfo, data: bytes) -> str | int:
        """Look at all bytes that have come so far: DONE, MORE, CLOSE, or the number of bytes to take away (then done)."""
        raise AssertionError("a filter that needs data defines on_data")


class TlsInspector(ListenerFilter):
    """Server name and ALPN of a ClientHello."""

    def __init__(self, proto: Any, scope: Scope) -> None:
        from meshproxy.codec import client_hello

        self._codec = client_hello
        self._max_size: int = proto.max_client_hello_size.value if proto.HasField("max_client_hello_size") else client_hello.MAX_SIZE
        if self._max_size > client_hello.MAX_SIZE:
            fail("max_client_hello_size", f"max_client_hello_size of {self._max_size} is greater than maximum of {client_hello.MAX_SIZE}.")
        self._strict: bool = proto.close_connection_on_client_hello_parsing_errors
        names = ("tls_found", "tls_not_found", "alpn_found", "alpn_not_found", "sni_found", "sni_not_found", "client_hello_too_large")
        (
            self._found,
            self._not_found,
            self._alpn_found,
            self._alpn_not_found,
            self._sni_found,
            self._sni_not_found,
            self._too_large,
        ) = (scope.counter(f"tls_inspector.{name}") for name in names)
        self._bytes = scope.histogram("tls_inspector.bytes_processed")

    def on_data(self, conn: ConnectionInfo, data: bytes) -> str | int:
        codec = self._codec
        try:
            hello = codec.parse(data, self._max_size)
        except codec.TooLargeError:
            self._too_large.n += 1
            self._bytes.record(len(data))
            _metadata(conn, "envoy.filters.listener.tls_inspector")["failure_reason"] = "ClientHelloTooLarge"
            return CLOSE
        except codec.NotClientHelloError:
            self._bytes.record(len(data))
            self._not_found.n += 1
            _metadata(conn, "envoy.filters.listener.tls_inspector")["failure_reason"] = "ClientHelloNotDetected"
            conn.transport_failure = _not_tls(data)
            return CLOSE if self._strict else DONE
        if hello is None:
            return MORE
        self._bytes.record(hello.size)
        self._found.n += 1
        conn.transport_protocol = "tls"
        conn.server_name = hello.server_name
        (self._sni_found if hello.server_name else self._sni_not_found).n += 1
        conn.application_protocols = hello.alpn
        (self._alpn_found if hello.alpn else self._alpn_not_found).n += 1
        return DONE


def _not_tls(data: bytes) -> str:
    """What Envoy's TLS library says of such bytes; it shows in access logs as the downstream transport failure reason."""
    if data.startswith(b"\x16\x03"):  # a handshake record, but of no ClientHello
        too_long = int.from_bytes(data[6:9]) > _MAX_HANDSHAKE_MESSAGE
        code, reason = ("96", "EXCESSIVE_MESSAGE_SIZE") if too_long else ("df", "UNEXPECTED_MESSAGE")
        return f"TLS_error|error:100000{code}:SSL routines:OPENSSL_internal:{reason}:TLS_error_end"
    if data.startswith((b"GET ", b"POST ", b"HEAD ", b"PUT ")):
        return "TLS_error|error:1000009c:SSL routines:OPENSSL_internal:HTTP_REQUEST:TLS_error_end"
    if data.startswith(b"CONNE"):
        return "TLS_error|error:1000009d:SSL routines:OPENSSL_internal:HTTPS_PROXY_REQUEST:TLS_error_end"
    return "TLS_error|error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER:TLS_error_end"


class HttpInspector(ListenerFilter):
    """HTTP/1.0, HTTP/1.1 or HTTP/2 in clear text, from the first line."""

    def __init__(self, proto: Any, scope: Scope) -> None:
        counters = {name: scope.counter(f"http_inspector.{name}") for name in ("http10_found", "http11_found", "http2_found", "http_not_found", "read_error")}
        self._by_protocol = {"http/1.0": counters["http10_found"], "http/1.1": counters["http11_found"], "h2c": counters["http2_found"]}
        self._not_found = counters["http_not_found"]
        self._read_error = counters["read_error"]

    def on_accept(self, conn: ConnectionInfo, sock: socket.socket) -> bool:
        return conn.transport_protocol != "raw_buffer"

    def on_data(self, conn: ConnectionInfo, data: bytes) -> str | int:
        protocol = http_protocol(data)
        if protocol is None:
            if len(data) < _MAX_HTTP_LINE:
                return MORE
            self._read_error.n += 1
            return CLOSE
        if protocol:
            self._by_protocol[protocol].n += 1
            conn.application_protocols = (protocol,)
        else:
            self._not_found.n += 1
        return DONE


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ +[^\x00-\x20\x7f]+ +HTTP/([0-9])\.([0-9])\r?\n"


def http_protocol(data: bytes) -> str | None:
    """'h2c', 'http/1.1', 'http/1.0' (any other version too), '' when it is not HTTP, None when more bytes are needed."""
    if _PREFACE.startswith(data[: len(_PREFACE)]):
        return "h2c" if len(data) >= len(_PREFACE) else None
    if re.match(_TOKEN, data) is None:
        return ""
    end = data.find(b"\n")
    if end < 0:
        return None
    line = re.fullmatch(_REQUEST_LINE, data[: end + 1])
    if line is None:
        return ""
    return "http/1.1" if line.group(1, 2) == (b"1", b"1") else "http/1.0"


class OriginalDst(ListenerFilter):
    """Where the connection was going before iptables redirected it. Without a redirection the local address stays as it is."""

    needs_data = False

    def on_accept(self, conn: ConnectionInfo, sock: socket.socket) -> bool:
        original = original_destination(sock)
        if original is not None and original != conn.local:
            conn.local = original
        return True


def original_destination(sock: socket.socket) -> Address | None:
    """What connection tracking says; None without a record (ENOENT), or where there is no connection tracking at all."""
    try:
        if sock.family == socket.AF_INET:
            raw = sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
            return Address(socket.inet_ntop(socket.AF_INET, raw[4:8]), struct.unpack_from("!H", raw, 2)[0])
        if sock.family == socket.AF_INET6:
            raw = sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
            return Address.from_sockaddr(socket.AF_INET6, (socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack_from("!H", raw, 2)[0]))
    except OSError:
        return None
    return None


class ProxyProtocol(ListenerFilter):
    """The PROXY protocol, versions 1 and 2."""

    def __init__(self, proto: Any, scope: Scope) -> None:
        from meshproxy.codec import proxy_protocol

        self._codec = proxy_protocol
        self._optional: bool = proto.allow_requests_without_proxy_protocol
        self._disallowed = frozenset(version + 1 for version in proto.disallowed_versions)  # the enum counts from V1 = 0
        if self._disallowed == {1, 2}:
            fail("disallowed_versions", "all versions of PROXY protocol are disallowed")
        self._rules = {rule.tlv_type & 0xFF: (rule.on_tlv_present.metadata_namespace or _L_PROXY, rule.on_tlv_present.key) for rule in proto.rules}
        self._in_filter_state = bool(proto.tlv_location)
        keep = proto.pass_through_tlvs
        self._keep_all = proto.HasField("pass_through_tlvs") and not keep.match_type
        self._keep = frozenset(kind & 0xFF for kind in keep.tlv_type)
        self._error = scope.counter("downstream_cx_proxy_proto_error")
        own = scope.scope(f"proxy_proto.{proto.stat_prefix}." if proto.stat_prefix else "proxy_proto.")
        self._not_found_allowed = own.counter("not_found_allowed")
        self._not_found_disallowed = own.counter("not_found_disallowed")
        self._found, self._bad, self._refused = (
            {version: own.counter(f"versions.v{version}.{name}") for version in (1, 2)} for name in ("found", "error", "disallowed")
        )

    def on_data(self, conn: ConnectionInfo, data: bytes) -> str | int:
        codec = self._codec
        version = codec.version_of(data)
        if version is None:
            return MORE
        if version in self._disallowed:
            if not self._optional:
                self._found[version].n += 1
                self._refused[version].n += 1
                return CLOSE
            version = 0
        if version == 0:
            if self._optional:
                self._not_found_allowed.n += 1
                return DONE
            self._not_found_disallowed.n += 1
            self._error.n += 1
            return CLOSE
        try:
            header = codec.parse(data)
        except codec.ProxyProtocolError as error:
            log.debug("%r: PROXY protocol: %s", conn, error)
            self._bad[version].n += 1
            self._error.n += 1
            return CLOSE
        if header is None:
            return MORE
        self._found[version].n += 1
        if header.source is not None and header.destination is not None:
            conn.remote = Address(*header.source)
            local = Address(*header.destination)
            if local != conn.local:
                conn.local = local
        for kind, value in header.tlvs:
            rule = self._rules.get(kind)
            if rule is not None:
                self._store(conn, *rule, value)
            if self._keep_all or kind in self._keep:
                if conn.proxy_tlvs is None:
                    conn.proxy_tlvs = {}
                conn.proxy_tlvs[kind] = value
        return header.size

    def _store(self, conn: ConnectionInfo, namespace: str, key: str, value: bytes) -> None:
        # Envoy replaces what is not UTF-8 by '!'.
        text = value.decode("utf-8", "replace").replace("\ufffd", "!")
        if not self._in_filter_state:
            _metadata(conn, namespace)[key] = text
            return
        if conn.filter_state is None:
            conn.filter_state = {}
        conn.filter_state.setdefault("envoy.network.proxy_protocol.tlv", {})[key] = text


_L_PROXY = "envoy.filters.listener.proxy_protocol"


def _metadata(conn: ConnectionInfo, namespace: str) -> dict[str, Any]:
    if conn.metadata is None:
        conn.metadata = {}
    return conn.metadata.setdefault(namespace, {})


_FILTERS: dict[str, Callable[[Any, Scope], ListenerFilter]] = {
    "TlsInspector": TlsInspector,
    "HttpInspector": HttpInspector,
    "OriginalDst": lambda _proto, _scope: OriginalDst(),
    "ProxyProtocol": ProxyProtocol,
}


def compile(proto: Any, scope: Scope) -> ListenerFilter:
    """From the message of one listener filter; `scope` is the root scope. Raises ConfigError."""
    return _FILTERS[proto.DESCRIPTOR.name](proto, scope)


class Chain:
    """The listener filters of a listener, with what disables each of them. `waits`: one of them needs bytes."""

    def __init__(self, protos: Any, scope: Scope) -> None:
        self.filters: list[tuple[ListenerFilter, Callable[[ConnectionInfo], bool] | None]] = []
        self.type_names: list[str] = []
        for at, entry in enumerate(protos):
            with under(f"[{at}]"):
                if entry.WhichOneof("config_type") != "typed_config":
                    fail(
                        "typed_config",
                        f"the configuration of listener filter {entry.name!r} is missing or comes by discovery, which is not supported",
                        UNSUPPORTED,
                    )
                with under("typed_config"):
                    url = registry.type_url(entry.typed_config)
                    compiled = registry.module(url, "listener filter").compile(registry.unpack(entry.typed_config), scope)
                with under("filter_disabled"):
                    disabled = _compile_predicate(entry.filter_disabled) if entry.HasField("filter_disabled") else None
            self.add(compiled, disabled)

    def add(self, listener_filter: ListenerFilter, disabled: Callable[[ConnectionInfo], bool] | None = None, *, first: bool = False) -> None:
        """One more filter, at the end or in front of all others."""
        self.filters.insert(0 if first else len(self.filters), (listener_filter, disabled))
        self.type_names.append(type(listener_filter).__name__)


def _compile_predicate(proto: Any) -> Callable[[ConnectionInfo], bool]:
    which = proto.WhichOneof("rule")
    if which in ("or_match", "and_match"):
        rules = [_compile_predicate(rule) for rule in getattr(proto, which).rules]
        combine = any if which == "or_match" else all
        return lambda conn: combine(rule(conn) for rule in rules)
    if which == "not_match":
        inner = _compile_predicate(proto.not_match)
        return lambda conn: not inner(conn)
    if which == "destination_port_range":
        start, end = proto.destination_port_range.start, proto.destination_port_range.end
        return lambda conn: start <= conn.local.port < end
    if which == "any_match":
        value = proto.any_match
        return lambda conn: value
    raise ConfigError("a rule is required")


class Inspection:
    """Runs the listener filters of one accepted socket, then calls `done(conn, sock)`, or `failed(conn, sock, why)` with why 'closed' (a filter refused the
    connection), 'remote' (the peer went away), 'error', or 'timeout'. The callee owns the socket from then on.
    """

    __slots__ = ("_at", "_chain", "_done", "_failed", "_loop", "_low_water", "_seen", "_timer", "conn", "sock")

    def __init__(
        self,
        chain: Chain,
        context: Context,
        conn: ConnectionInfo,
        sock: socket.socket,
        done: Callable[[ConnectionInfo, socket.socket], None],
        failed: Callable[[ConnectionInfo, socket.socket, str], None],
    ) -> None:
        self._chain = chain
        self._loop: asyncio.AbstractEventLoop = context.loop
        self._done = done
        self._failed = failed
        self.conn = conn
        self.sock = sock
        self._at = -1
        self._seen = 0
        self._low_water = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> bool:
        """Go as far as the bytes that are there allow; whether that was all the way, one way or the other."""
        if self._next():
            return self._look()
        self._finish(None)
        return True

    def _next(self) -> bool:
        """Go to the next filter that has to see bytes; False when there is none."""
        filters = self._chain.filters
        self._seen = 0
        while True:
            self._at += 1
            if self._at >= len(filters):
                return False
            listener_filter, disabled = filters[self._at]
            if disabled is not None and disabled(self.conn):
                continue
            if not listener_filter.on_accept(self.conn, self.sock):
                return True

    def _look(self) -> bool:
        """Peek and show the bytes to filter after filter; True when it is over."""
        self._timer = None
        sock, size = self.sock, max(_FIRST_PEEK, 2 * self._seen)
        while True:
            try:
                data = sock.recv(size, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                self._wait(0)
                return False
            except OSError:
                return self._finish("error")
            if not data:
                return self._finish("remote")
            verdict = self._chain.filters[self._at][0].on_data(self.conn, data)
            if verdict is MORE:
                if len(data) == size and size < _MAX_PEEK:
                    size *= 2
                    continue
                if len(data) == self._seen:
                    if self._gone():
                        return self._finish("remote")
                    self._pause()
                else:
                    self._wait(len(data))
                return False
            if verdict is CLOSE:
                return self._finish("closed")
            if isinstance(verdict, int):
                sock.recv(verdict)  # exactly the header: it was just peeked, so it is there
            if not self._next():
                return self._finish(None)

    def _gone(self) -> bool:
        """Whether the peer has closed: a peek cannot tell, because the bytes before the end stay in sight."""
        poller = select.poll()
        poller.register(self.sock, _GONE)
        return bool(poller.poll(0))

    def _wait(self, seen: int) -> None:
        """Be woken by bytes beyond the `seen` ones, or by the end of the connection."""
        if seen + 1 != self._low_water:
            if seen or self._low_water:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, seen + 1)
            if not self._low_water:
                self._loop.add_reader(self.sock.fileno(), self._look)
            self._low_water = seen + 1
        self._seen = seen

    def _pause(self) -> None:
        """Woken without more bytes: Unix sockets know no low-water mark. Look again in a moment."""
        self._stop()
        self._seen = 0
        self._timer = self._loop.call_later(_PAUSE, self._look)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._low_water:
            self._loop.remove_reader(self.sock.fileno())
            if self._low_water > 1:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            self._low_water = 0

    def _finish(self, why: str | None) -> bool:
        self._stop()
        if why is None:
            self._done(self.conn, self.sock)
        else:
            self._failed(self.conn, self.sock, why)
        return True

    def cancel(self) -> None:
        """The listener is closed: drop the socket without a word."""
        self._stop()
        self.sock.close()

    def time_out(self, go_on: bool) -> None:
        """listener_filters_timeout is over. `go_on`: continue_on_listener_filters_timeout."""
        self._finish(None if go_on else "timeout")
