"""What the connection manager does to a request's head before routing: normalisation, forwarded headers, request ids, hygiene.

The order is Envoy's (HTTP connection manager, header manipulation). A head that has none of the fields in `_WATCHED` takes the short way, which adds the
constant fields and is all that most requests need.
"""

from __future__ import annotations

import random
import re
from binascii import hexlify
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.codec.h1.grammar import connection_tokens
from meshproxy.codec.headers import Pair, RequestHead
from meshproxy.http.paths import REDIRECT, REFUSE, PathOptions, normalise
from meshproxy.http.replies import MISSING_HOST, Reply
from meshproxy.net.address import Address, canonical_ip
from meshproxy.net.interfaces import machine_address

if TYPE_CHECKING:
    from meshproxy.codec.h1.request import KnownRequest
    from meshproxy.http.stream import Stream
    from meshproxy.net.connection import ConnectionInfo

_HOP_BY_HOP = (b"connection", b"keep-alive", b"proxy-connection", b"upgrade", b"te", b"http2-settings")

# Only a trusted (internal) client may send these.
_INTERNAL_ONLY = (
    b"x-envoy-retry-on",
    b"x-envoy-retry-grpc-on",
    b"x-envoy-max-retries",
    b"x-envoy-upstream-alt-stat-name",
    b"x-envoy-upstream-rq-timeout-ms",
    b"x-envoy-upstream-rq-per-try-timeout-ms",
    b"x-envoy-upstream-rq-timeout-alt-response",
    b"x-envoy-expected-rq-timeout-ms",
    b"x-envoy-force-trace",
    b"x-envoy-ip-tags",
    b"x-envoy-hedge-on-per-try-timeout",
    b"x-envoy-retriable-status-codes",
    b"x-envoy-retriable-header-names",
    b"x-envoy-original-url",
)
_CLIENT_CERT = b"x-forwarded-client-cert"
_SCHEMES = frozenset((b"http", b"https"))
_EDGE_ONLY = (
    b"x-envoy-decorator-operation",
    b"x-envoy-downstream-service-cluster",
    b"x-envoy-downstream-service-node",
    b"x-envoy-original-path",
    b"x-envoy-original-host",
)
_WATCHED = frozenset(
    (
        *_HOP_BY_HOP,
        *_INTERNAL_ONLY,
        *_EDGE_ONLY,
        b"expect",
        b"transfer-encoding",
        b"referer",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-port",
        b"x-forwarded-client-cert",
        b"x-envoy-internal",
        b"x-envoy-external-address",
    )
)
# A referer is kept if it is an absolute URL, or a path whose first segment has no colon.
_REFERER = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*://\S+|[!$%&'()*+,\-.0-9;=?@A-Z_a-z~]*(?:/[!$%&'()*+,\-./0-9:;=?@A-Z_a-z~]*)?").fullmatch
# What a connection nominates in Connection is removed, but these are the mesh's own and not the client's to remove.
_NOT_NOMINABLE = frozenset(
    (
        b"host",
        b"authorization",
        b"cookie",
        b"content-length",
        b"content-type",
        b"te",
        b"close",
        b"keep-alive",
        b"upgrade",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
    )
)

MISSING_PATH = Reply(404, details="missing_path_rejected")
ABSOLUTE_PATH = Reply(404, details="absolute_path_rejected")
NORMALISATION_FAILED = Reply(400, details="path_normalization_failed")


class RequestIds:
    """Version 4 UUIDs, cheaply: the first four groups are drawn anew for every 256 of them, the last one (48 bits) for each."""

    __slots__ = ("_last_groups", "_prefix", "_random")

    _BATCH = 256

    def __init__(self, source: random.Random) -> None:
        self._random = source
        self._prefix = b""
        self._last_groups: list[bytes] = []

    def new(self) -> bytes:
        """HOT: 36 characters; the 15th is the version and, in Envoy's use, the trace reason."""
        try:
            return self._prefix + self._last_groups.pop()
        except IndexError:
            self._draw()
            return self.new()

    def new_apart(self) -> bytes:
        """HOT: the same with eight first digits of its own, for whom they are a number by which chance decides."""
        return b"%08x%b" % (self._random.getrandbits(32), self.new()[8:])

    def _draw(self) -> None:
        bits = self._random.getrandbits(74)
        self._prefix = b"%08x-%04x-4%03x-%04x-" % (bits >> 42, bits >> 26 & 0xFFFF, bits >> 14 & 0xFFF, bits & 0x3FFF | 0x8000)
        self._last_groups = hexlify(self._random.randbytes(6 * self._BATCH), b" ", 6).split(b" ")


class RequestHeadOptions:
    """The connection manager's fields that concern request heads; see `manager.py` for where each comes from."""

    def __init__(self) -> None:
        self.use_remote_address = False
        self.xff_num_trusted_hops = 0
        self.skip_xff_append = False
        self.appends_xff = False  # also without use_remote_address, as original_ip_detection_extensions say
        self.internal: Callable[[Address], bool] | None = None
        self.internal_only: tuple[bytes, ...] = ()  # the route configuration's internal_only_headers
        self.via: bytes = b""
        self.generate_request_id = True
        self.preserve_external_request_id = False
        self.packs_trace_reason = True
        self.traces_by_id = True  # use_request_id_for_trace_sampling
        self.user_agent: bytes = b""
        self.node_name: bytes = b""
        self.paths = PathOptions()
        self.strip_port: str | None = None  # None, "matching", "any"
        self.strip_trailing_host_dot = False
        self.default_host: bytes = b""
        self.drops_underscores = False
        self.xfcc: str = "sanitize"  # "forward_only", "append_forward", "sanitize_set", "always_forward_only"
        self.xfcc_details: tuple[str, ...] = ()
        self.append_x_forwarded_port = False
        self.scheme_override: bytes | None = None
        self.proxy_100_continue = False


class Additions:
    """What plain requests from one address get: constant pairs, and what to do about the request id."""

    __slots__ = ("certificate", "forgets_trace_reason", "generates_id", "index", "internal", "pairs", "relayed", "replaces_id", "scheme")

    def __init__(self, connection: ConnectionInfo, options: RequestHeadOptions, relayed: Relayed) -> None:
        """`relayed`: for those of its requests that another proxy has sent."""
        self.relayed = relayed
        self.certificate = relayed.certificate
        pairs: list[Pair] = []
        self.internal = False
        edge = False
        if options.use_remote_address:
            remote = connection.remote
            address = _ip_bytes(remote)
            forwarded = _forwarded_bytes(remote)
            self.internal = options.internal is not None and options.internal(remote)
            edge = not self.internal
            if not options.skip_xff_append and forwarded:
                pairs.append((b"x-forwarded-for", forwarded))
        tls = connection.tls is not None
        scheme = options.scheme_override or (b"https" if tls else b"http")
        pairs.append((b"x-forwarded-proto", scheme))
        if self.internal:
            pairs.append((b"x-envoy-internal", b"true"))
        elif edge and address:
            pairs.append((b"x-envoy-external-address", address))
        self.pairs = tuple(pairs)
        self.index = dict(pairs)
        self.scheme = scheme
        self.generates_id = options.generate_request_id
        self.replaces_id = edge and not options.preserve_external_request_id
        self.forgets_trace_reason = edge and options.packs_trace_reason


class Relayed:
    """In place of `Additions`: for plain requests that another proxy has sent to one that takes its word (`RequestHeadPreparer.is_relayed`).

    `certificate`: the field that tells of the client's, where there is one and it is told; it comes last.
    """

    __slots__ = ("certificate", "generates_id", "internal_only")

    forgets_trace_reason = internal = replaces_id = False

    def __init__(self, options: RequestHeadOptions, internal_only: frozenset[bytes], element: bytes | None) -> None:
        self.certificate: Pair | None = None if element is None else (_CLIENT_CERT, element)
        self.generates_id = options.generate_request_id
        self.internal_only = internal_only

    def apply(self, head: RequestHead, index: dict[bytes, bytes]) -> None:
        """What `RequestHeadPreparer._carefully` comes to for such a head: the sender is no internal client, and what it says of the scheme holds."""
        present = self.internal_only.intersection(index)
        if present:
            head.items[:] = [pair for pair in head.items if pair[0] not in present]
            for name in present:
                del index[name]
        if head.version == 20:
            head.scheme = head.scheme.lower()
        elif head.scheme != b"https":
            head.scheme = index[b"x-forwarded-proto"]


class _AdditionsMemo:
    """Additions by address, TLS and what is told of the client's certificate; bounded."""

    __slots__ = ("_internal_only", "_made", "_options", "_relayed")

    def __init__(self, options: RequestHeadOptions, internal_only: frozenset[bytes]) -> None:
        self._options = options
        self._internal_only = internal_only
        self._made: dict[tuple[str, bool, bytes | None], Additions] = {}
        self._relayed: dict[bytes | None, Relayed] = {}

    def get(self, connection: ConnectionInfo, element: bytes | None) -> Additions:
        key = connection.remote.ip, connection.tls is not None, element
        return self._made.get(key) or self._make(connection, key)

    def _make(self, connection: ConnectionInfo, key: tuple[str, bool, bytes | None]) -> Additions:
        if len(self._made) >= 1024:
            self._made.clear()
            self._relayed.clear()
        element = key[2]
        relayed = self._relayed.get(element)
        if relayed is None:
            relayed = self._relayed[element] = Relayed(self._options, self._internal_only, element)
        made = self._made[key] = Additions(connection, self._options, relayed)
        return made


class RequestHeadPreparer:
    """Compiled `RequestHeadOptions`."""

    def __init__(self, options: RequestHeadOptions, source: random.Random) -> None:
        self.options = options
        self.ids = RequestIds(source)
        self.new_id = self.ids.new
        # The short way is for connection managers whose options add nothing but constants.
        self._strips_host = options.strip_port is not None or options.strip_trailing_host_dot
        self._adds_certificate = options.xfcc in ("append_forward", "sanitize_set")
        self._plain = not (options.via or options.user_agent or options.drops_underscores or options.append_x_forwarded_port or options.appends_xff)
        self.is_plain_path = options.paths.is_plain
        self._watched = _WATCHED.union(options.internal_only)
        self._watched_http2 = self._watched - {b"te"}  # which can only say `trailers` there, and stays
        internal_only = frozenset((*_INTERNAL_ONLY, *options.internal_only))
        self._additions = _AdditionsMemo(options, internal_only)
        self._relays = self._plain and not self._strips_host and not options.use_remote_address and options.scheme_override is None
        self._watched_relayed = self._watched - internal_only - {b"x-forwarded-proto"}
        self._watched_relayed_http2 = self._watched_relayed - {b"te"}

    def prepare(self, stream: Stream) -> Reply | None:
        """Make `stream.request` what the filters and the router may see; a Reply refuses it. `complete` alone does for a plain head."""
        head = stream.request
        assert head is not None
        additions = self.additions(stream.connection)
        # HTTP/2 names the scheme, which may be another one than the connection's.
        plain_scheme = head.version != 20 or head.scheme == additions.scheme or self.options.scheme_override is not None
        if plain_scheme and head._index is not None and self.is_plain(head, head._index, http2=head.version == 20):
            self.complete(stream, head, additions)
            return None
        if head._index is not None and self.is_relayed(head, head._index, http2=head.version == 20):
            self.complete(stream, head, additions.relayed)
            return None
        if not head.authority and (reply := self._missing_host(head)) is not None:
            return reply
        path = head.path
        if path[:1] != b"/":
            if head.method != b"CONNECT":
                if not path:
                    return MISSING_PATH
                stream.manager.stats.downstream_rq_non_relative_path.n += 1
                return ABSOLUTE_PATH
        elif not self.is_plain_path(path) and (reply := self._normalise(stream, head)) is not None:
            return reply
        if self._strips_host:
            self._strip_host(head, stream.connection)
        index = head._index
        watched = self._watched_http2 if head.version == 20 else self._watched
        if not self._plain or not plain_scheme or index is None or not watched.isdisjoint(index):
            return self._carefully(stream, head)
        self.complete(stream, head, additions)
        return None

    def is_plain(self, head: KnownRequest | RequestHead, index: dict[bytes, bytes], *, http2: bool = False) -> bool:
        """HOT: whether a head needs no more than `complete`: then all its repetitions can go straight there. `index`: the head's."""
        path = head.path
        watched = self._watched_http2 if http2 else self._watched
        return bool(self._plain and head.authority and not self._strips_host and path[:1] == b"/" and self.is_plain_path(path) and watched.isdisjoint(index))

    def is_relayed(self, head: KnownRequest | RequestHead, index: dict[bytes, bytes], *, http2: bool = False) -> bool:
        """HOT: whether a head is one that sidecars get from each other: plain but for the scheme, and for what only internal clients may say."""
        path = head.path
        return bool(
            self._relays
            and index.get(b"x-forwarded-proto") in _SCHEMES
            and head.authority
            and path[:1] == b"/"
            and self.is_plain_path(path)
            and (self._watched_relayed_http2 if http2 else self._watched_relayed).isdisjoint(index)
        )

    def additions(self, connection: ConnectionInfo) -> Additions:
        """What every plain request of a connection gets."""
        tls = connection.tls
        element = None
        if tls is not None and self._adds_certificate and tls.presented:
            element = tls.forwarded
            if element is None:
                element = tls.forwarded = _client_cert_element(tls, self.options.xfcc_details).encode()
        return self._additions.get(connection, element)

    def complete(self, stream: Stream, head: RequestHead, additions: Additions | Relayed) -> None:
        """HOT: the end of a plain head: forwarded headers and request id."""
        index = head._index
        assert index is not None
        items = head.items
        if additions.__class__ is Relayed:
            additions.apply(head, index)
        else:
            items += additions.pairs  # type: ignore[union-attr]
            index.update(additions.index)  # type: ignore[union-attr]
            head.scheme = additions.scheme  # type: ignore[union-attr]
        stream.is_internal = additions.internal
        if additions.generates_id:
            known = index.get(b"x-request-id")
            if known is None:
                value = index[b"x-request-id"] = self.new_id()
                items.append((b"x-request-id", value))
            elif additions.replaces_id or not known:
                if len(index) == len(items):  # as `head.set`, without its calls
                    value = index[b"x-request-id"] = self.new_id()
                    items[items.index((b"x-request-id", known))] = b"x-request-id", value
                else:
                    head.set(b"x-request-id", self.new_id())
            elif additions.forgets_trace_reason:
                _forget_trace_reason(head)
        certificate = additions.certificate
        if certificate is not None:  # the head has no such field, or would not be plain
            items.append(certificate)
            index[_CLIENT_CERT] = certificate[1]

    # -- the steps of the long way

    def _missing_host(self, head: RequestHead) -> Reply | None:
        if head.version == 10 and self.options.default_host:
            head.authority = self.options.default_host
            return None
        return MISSING_HOST

    def _normalise(self, stream: Stream, head: RequestHead) -> Reply | None:
        head.path, verdict = normalise(head.path, self.options.paths)
        if verdict == REFUSE or (verdict == REDIRECT and stream.is_grpc):
            stream.manager.stats.downstream_rq_failed_path_normalization.n += 1
            return NORMALISATION_FAILED
        if verdict == REDIRECT:
            stream.manager.stats.downstream_rq_redirected_with_normalized_path.n += 1
            return Reply(307, details="path_normalization_failed", headers=((b"location", head.path),))  # Envoy's own words for it
        return None

    def _strip_host(self, head: RequestHead, connection: ConnectionInfo) -> None:
        host = head.authority
        if self.options.strip_port is not None:
            name, colon, port = host.rpartition(b":")
            given = colon and port.isdigit() and (b":" not in name or name.endswith(b"]"))
            if given and (self.options.strip_port == "any" or port.lstrip(b"0") == b"%d" % connection.local.port):
                host = name if head.method != b"CONNECT" or self.options.strip_port == "any" else host
        if self.options.strip_trailing_host_dot:
            name, colon, port = host.partition(b":")
            if name.endswith(b"."):
                host = name[:-1] + colon + port
        head.authority = host

    def _carefully(self, stream: Stream, head: RequestHead) -> Reply | None:
        options = self.options
        connection = stream.connection
        self._drop_underscores(stream, head)
        head.remove(b"transfer-encoding")
        self._remove_hop_by_hop(stream, head)
        self._check_referer(head)
        expect = head.get(b"expect")
        if expect is not None and not options.proxy_100_continue and expect.lower() == b"100-continue":
            head.remove(b"expect")
        tls = connection.tls is not None
        trusted: Address | None
        if options.use_remote_address:
            trusted, single = self._from_peer(head, connection)
        else:
            before = head.joined(b"x-forwarded-for")
            trusted, single = _from_right(before, options.xff_num_trusted_hops)
            if options.appends_xff:
                self._append_forwarded(head, connection, before)
        forwarded_proto = head.get(b"x-forwarded-proto")
        if (options.use_remote_address and options.xff_num_trusted_hops == 0) or not forwarded_proto:
            forwarded_proto = b"https" if tls else b"http"
            head.set(b"x-forwarded-proto", forwarded_proto)
        if options.append_x_forwarded_port and b"x-forwarded-port" not in head:
            head.add(b"x-forwarded-port", b"%d" % connection.local.port)
        if options.scheme_override is not None:
            head.scheme = options.scheme_override
            head.set(b"x-forwarded-proto", options.scheme_override)
        elif head.version == 20 and head.scheme:
            head.scheme = head.scheme.lower()
        elif head.scheme != b"https" or options.use_remote_address:
            forwarded_proto = forwarded_proto.lower()
            head.scheme = forwarded_proto if forwarded_proto in (b"http", b"https") else b"https" if tls else b"http"
        internal = stream.is_internal = single and trusted is not None and options.internal is not None and options.internal(trusted)
        if trusted is not None:
            stream.remote = trusted
        edge = options.use_remote_address and not internal
        head.remove(b"x-envoy-internal")
        if internal:
            head.add(b"x-envoy-internal", b"true")
            stream.echoes_request_id = b"x-envoy-force-trace" in head
        else:
            if edge:
                for name in _EDGE_ONLY:
                    head.remove(name)
            for name in _INTERNAL_ONLY:
                head.remove(name)
            for name in options.internal_only:
                head.remove(name)
        if options.user_agent:
            head.set(b"x-envoy-downstream-service-cluster", options.user_agent)
            if not head.get(b"user-agent"):
                head.set(b"user-agent", options.user_agent)
            if options.node_name:
                head.set(b"x-envoy-downstream-service-node", options.node_name)
        if options.via:
            via = head.joined(b"via")
            head.set(b"via", options.via if not via else via + b", " + options.via)
        if edge:
            address = _ip_bytes(trusted or connection.remote)
            if address:
                head.set(b"x-envoy-external-address", address)
        if options.generate_request_id and (not head.get(b"x-request-id") or (edge and not options.preserve_external_request_id)):
            head.set(b"x-request-id", self.new_id())
        elif edge and options.packs_trace_reason:
            _forget_trace_reason(head)
        self._client_certificate(head, connection)
        return None

    def _drop_underscores(self, stream: Stream, head: RequestHead) -> None:
        if not self.options.drops_underscores:
            return
        kept = [pair for pair in head.items if b"_" not in pair[0]]
        if len(kept) != len(head.items):
            stream.manager.stats.dropped_headers_with_underscores.n += len(head.items) - len(kept)
            head.items = kept
            head.touch()

    @staticmethod
    def _remove_hop_by_hop(stream: Stream, head: RequestHead) -> None:
        tokens = connection_tokens(head) if b"connection" in head else set()
        for token in tokens - _NOT_NOMINABLE:
            if not token.startswith((b"x-envoy-", b":")):
                head.remove(token)
        te = head.joined(b"te")
        keeps_trailers = te is not None and b"trailers" in [part.split(b";")[0].strip().lower() for part in te.split(b",")]
        upgrade = stream.upgrade
        kept = [b"te"] if keeps_trailers else []
        if head.version == 20:
            kept.append(b"http2-settings")  # means nothing there
        if upgrade is not None:
            kept += (b"connection", b"upgrade")
        for name in _HOP_BY_HOP:
            if name not in kept:
                head.remove(name)
        if keeps_trailers:
            head.set(b"te", b"trailers")

    @staticmethod
    def _check_referer(head: RequestHead) -> None:
        values = head.get_all(b"referer")
        if values and (len(values) > 1 or _REFERER(values[0]) is None):
            head.remove(b"referer")

    def _from_peer(self, head: RequestHead, connection: ConnectionInfo) -> tuple[Address | None, bool]:
        """use_remote_address: the trusted client and whether it is the only one; appends to X-Forwarded-For."""
        options = self.options
        before = head.joined(b"x-forwarded-for")
        if options.xff_num_trusted_hops > 0:
            trusted, _ = _from_right(before, options.xff_num_trusted_hops - 1)
            trusted = trusted or connection.remote
        else:
            trusted = connection.remote
        if not options.skip_xff_append:
            self._append_forwarded(head, connection, before)
        return trusted, not before

    def _append_forwarded(self, head: RequestHead, connection: ConnectionInfo, before: bytes | None) -> None:
        address = _forwarded_bytes(connection.remote)
        if address:
            head.set(b"x-forwarded-for", address if not before else before + b"," + address)

    def _client_certificate(self, head: RequestHead, connection: ConnectionInfo) -> None:
        mode = self.options.xfcc
        if mode == "always_forward_only":
            return
        tls = connection.tls
        if mode == "sanitize" or tls is None or not tls.presented:
            head.remove(b"x-forwarded-client-cert")
            return
        if mode == "forward_only":
            return
        element = self.additions(connection).certificate[1]  # type: ignore[index]  # it has one
        before = head.joined(b"x-forwarded-client-cert")
        head.set(b"x-forwarded-client-cert", before + b"," + element if before and mode == "append_forward" else element)


def _forget_trace_reason(head: RequestHead) -> None:
    """The id of an untrusted client is kept, but not what it says about tracing (the 15th character: sampled, forced, asked for by the client)."""
    value = head.get(b"x-request-id")
    if value is not None and len(value) == 36 and value[14:15] != b"4":
        head.set(b"x-request-id", value[:14] + b"4" + value[15:])


def _ip_bytes(address: Address) -> bytes:
    return address.ip.encode() if address.kind == "ip" else b""


def _forwarded_bytes(address: Address) -> bytes:
    """What X-Forwarded-For says of a client: for one on this machine the machine's address, which means more to those who read it."""
    if address.kind == "ip" and address.ip in ("127.0.0.1", "::1"):
        return machine_address().encode()
    return _ip_bytes(address)


def _from_right(value: bytes | None, skip: int) -> tuple[Address | None, bool]:
    """The address `skip` places from the right end of an X-Forwarded-For value (None: not there, or no address), and whether it is the only one in it."""
    if not value:
        return None, False
    parts = value.split(b",")
    if skip >= len(parts):
        return None, False
    text = parts[-1 - skip].strip(b" \t").decode("latin-1")
    try:
        return Address(canonical_ip(text)), len(parts) == 1
    except ValueError:
        return None, False


# What of a name stands as it is in X-Forwarded-Client-Cert: whatever cannot end the line, the element or one of its parts. Envoy lets the rest stand too; no
# name that means well has any of it.
_IN_NAMES = "!#$%&'()*+-./:<=>?@[\\]^_`{|}~"


def _client_cert_element(tls: Any, details: tuple[str, ...]) -> str:
    from urllib.parse import quote

    parts = []
    local = tls.local_certificate
    if local is not None:
        parts += [f"By={quote(uri, safe=_IN_NAMES)}" for uri in local.uri_sans]
    peer = tls.peer_certificate
    parts.append(f"Hash={peer.sha256}")
    for detail in details:
        if detail == "cert":
            parts.append(f'Cert="{quote(peer.pem, safe="")}"')
        elif detail == "chain":
            parts.append(f'Chain="{quote(peer.pem, safe="")}"')
        elif detail == "subject":
            parts.append(f'Subject="{peer.subject}"')
        elif detail == "uri":
            parts += [f"URI={quote(uri, safe=_IN_NAMES)}" for uri in peer.uri_sans] or ["URI="]
        elif detail == "dns":
            parts += [f"DNS={quote(dns, safe=_IN_NAMES)}" for dns in peer.dns_sans]
    return ";".join(parts)


__all__ = ["Pair", "RequestHeadOptions", "RequestHeadPreparer", "RequestIds"]
