"""What a decoded list of fields has to be like to be a request, a response or trailers (RFC 9113 8), and what is concluded from it.

`request` and `response` make `KnownRequest` and `KnownResponse`, which connections share for lists that repeat themselves: their `items` and `index` are
never changed, `head()` makes the independent head of one message. They raise `MalformedError`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from meshproxy.codec.grammar import JOINED_IN_REQUESTS, JOINED_IN_RESPONSES, LENGTH, TOKEN, VALUE, join_repeated
from meshproxy.codec.grpc import status_of
from meshproxy.codec.h2 import errors
from meshproxy.codec.h2.errors import MalformedError
from meshproxy.codec.h2.settings import ALLOW, DROP_HEADER, REJECT_REQUEST
from meshproxy.codec.headers import NO_PLANS, Headers, Pair, RequestHead, ResponseHead
from meshproxy.codec.hpack.fields import CutFields, ShapedFields
from meshproxy.codec.response_shape import STEADY, ResponseShape

if TYPE_CHECKING:
    from meshproxy.codec.h2.settings import Options
    from meshproxy.codec.hpack.fields import Fields, Shape

_REQUEST_PSEUDO = {b":method": 0, b":scheme": 1, b":authority": 2, b":path": 3, b":protocol": 4}
_PSEUDO = frozenset(_REQUEST_PSEUDO)
_KNOWN_PSEUDO = _PSEUDO | {b":status"}
_AUTHORITY = re.compile(rb"[!$%&'()*+,\-.0-9:;=A-Z\[\]_a-z~]*").fullmatch
_SCHEME = re.compile(rb"[A-Za-z][A-Za-z0-9+\-.]*").fullmatch
_STATUS = re.compile(rb"[1-9][0-9][0-9]").fullmatch
# As `VALUE`: changes what may not be in a path.
_PATH = bytes(code if code > 32 and code != 127 else code ^ 64 for code in range(256))
# Fields of a connection, which HTTP/2 has none of (RFC 9113 8.2.2).
_CONNECTION = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))
_SPECIAL_REQUEST = _CONNECTION | {b"te", b"host", b"content-length"}

_WEB = frozenset((b"http", b"https"))

# Pairs found valid lately: hardly any head has more than a few that are new.
_valid: set[Pair] = set()
_MAX_VALID = 4096
_MAX_VALID_PAIR = 256  # bytes


_new = object.__new__
_SEEN = object()  # in place of what is known of fields that came once: what is concluded when they come again is kept


class KnownRequest:
    """A request's head. `length`: its content-length, or -1; `size`: of its fields, in bytes. `plain` and `plans` belong to the connection manager."""

    __slots__ = ("authority", "index", "items", "kept", "length", "method", "path", "plain", "plans", "protocol", "scheme", "size")

    final = bodied = True
    received = 0  # connections count the bytes that they read

    def __init__(self, method: bytes, path: bytes, authority: bytes, scheme: bytes, items: list[Pair], index: dict[bytes, bytes], size: int) -> None:
        self.method = method
        self.path = path
        self.authority = authority
        self.scheme = scheme
        self.items = items
        self.index = index
        self.size = size
        self.protocol: bytes | None = None
        self.length = -1
        self.kept = False
        self.plain: object = None  # who (http.request_head.RequestHeadPreparer) found last that it is plain
        self.plans: dict[Any, Any] = NO_PLANS

    def head(self) -> RequestHead:
        """The head for one request. The first time that a head is seen there is only one, and nothing is copied."""
        if self.kept:
            head = RequestHead(self.method, self.path, self.authority, self.items.copy(), self.index.copy(), scheme=self.scheme, version=20)
        else:
            head = RequestHead(self.method, self.path, self.authority, self.items, self.index, scheme=self.scheme, version=20)
        head.protocol = self.protocol
        return head


class ShapedRequest:
    """A request's head of a known shape, not yet put together.

    `values`: those that `shape` leaves open, in order. `plans` belongs to the connection manager and to all of that shape.
    """

    __slots__ = ("fields", "length", "path", "plans", "shape", "values")

    kept = False
    protocol: bytes | None = None

    fields: Fields
    shape: RequestShape
    values: list[bytes]
    path: bytes
    length: int
    plans: dict[Any, Any]

    def head(self) -> NewRequest:
        """The head of the request."""
        return self.shape.head(self.fields.items, self.path)


class NewRequest(RequestHead):
    """A `KnownRequest` that comes once, and so is its own `head()`. It has no place for what is concluded from it."""

    __slots__ = ("length", "plain")

    length: int
    plain: object
    kept = False
    received = 0
    plans = NO_PLANS
    index = vars(Headers)["_index"]  # by the name that it has in a `KnownRequest`

    def head(self) -> RequestHead:
        """The head of the request."""
        return self


class KnownResponse:
    """A response's head. `length`: its content-length, or -1; `final`: not informational; `bodied`: final, and its status is not one that has no body."""

    __slots__ = ("bodied", "final", "index", "items", "kept", "length", "size", "status")

    reason = None
    received = 0  # connections count the bytes that they read

    def __init__(self, status: int, items: list[Pair], index: dict[bytes, bytes], size: int) -> None:
        self.status = status
        self.items = items
        self.index = index
        self.size = size
        self.length = -1
        self.final = status >= 200
        self.bodied = status >= 200 and status not in (204, 304)
        self.kept = False

    def head(self) -> ResponseHead:
        """The head for one response; see `KnownRequest.head`."""
        if self.kept:
            return ResponseHead(self.status, self.items.copy(), self.index.copy(), version=20)
        return ResponseHead(self.status, self.items, self.index, version=20)


class KnownTrailers(Headers):
    """A trailer section, as it came; for those who may change it, there is `own()`."""

    __slots__ = ("grpc_status", "kept")

    def __init__(self, items: list[Pair]) -> None:
        super().__init__(items)
        self.kept = False
        self.grpc_status = status_of(self)

    def own(self) -> Headers:
        """The trailers of one message; see `KnownRequest.head`."""
        return Headers(self.items.copy()) if self.kept else self


class RequestShape:
    """What is concluded from the shape of a request's fields (`hpack.fields.Shape`): all but what the values of its literals say.

    `names`: whose values those are; `path_place`: of `:path` among them, or -1; `plans` is the only thing about it that changes.
    """

    __slots__ = ("_authority", "_count", "_index", "_length", "_path", "_places", "_scheme", "_varying", "method", "names", "path_place", "plans")

    def __init__(self, known: KnownRequest, count: int, values: tuple[tuple[int, bytes], ...]) -> None:
        """`count`: of pseudo fields. `values`: see `Shape`."""
        self.method = known.method
        self._scheme = known.scheme
        self._authority = known.authority
        self._path = known.path
        self._length = known.length
        self._index = known.index.copy()
        self._count = count
        self._places = tuple(place for place, _ in values)
        self.names = tuple(name for _, name in values)
        self.path_place = self.names.index(b":path") if b":path" in self.names else -1
        self._varying = tuple(place for place, name in values if name != b":path")
        self.plans: dict[Any, Any] = NO_PLANS

    def take(self, fields: Fields) -> ShapedRequest | None:
        """HOT: the head of one request; None when its values are to be looked at more closely."""
        place = self.path_place
        path = self._path
        values: list[bytes]
        if fields.__class__ is ShapedFields and fields.visible:
            values = fields.values
            if place >= 0:
                path = values[place]
                if not path or path[0] != 47 or 32 in path:
                    return None
        else:
            items = fields.items
            values = [items[place][1] for place in self._places]
            text = b"".join(values)
            if text.translate(VALUE) is not text:
                return None
            if place >= 0:
                path = values[place]
                if path[:1] != b"/" or path.translate(_PATH) is not path:
                    return None
        known = _new(ShapedRequest)
        known.fields = fields
        known.shape = self
        known.values = values
        known.path = path
        known.length = self._length
        known.plans = self.plans
        return known

    def head(self, items: tuple[Pair, ...], path: bytes) -> NewRequest:
        """HOT: a head of this shape. `items`: all fields."""
        index = self._index.copy()
        for place in self._varying:
            name, value = items[place]
            index[name] = value
        head = _new(NewRequest)
        head.items = [*items[self._count :]]
        head._index = index
        head.method = self.method
        head.path = path
        head.authority = self._authority
        head.scheme = self._scheme
        head.version = 20
        head.protocol = head.plain = None
        head.length = self._length
        return head


class FieldsOfResponse:
    """What is concluded from the shape of a response's fields: see `RequestShape`. `response`: what it says of the head; `names` as there."""

    __slots__ = ("_places", "response")

    def __init__(self, known: KnownResponse, shape: Shape) -> None:
        """`known`: one of that shape."""
        self._places = tuple(place for place, _ in shape.values)
        self.response = ResponseShape(known.status, known.items, tuple(name for _, name in shape.values), stated=known.length, size=shape.size)

    def values(self, fields: Fields) -> tuple[bytes, ...] | None:
        """HOT: the values of one response; None when they are to be looked at more closely."""
        if fields.__class__ is ShapedFields and fields.visible:
            return (*fields.values,)
        if fields.over:
            return None
        items = fields.items
        values = (*[items[place][1] for place in self._places],)
        text = b"".join(values)
        return values if text.translate(VALUE) is text else None


def _learn_response(shape: Shape, known: KnownResponse, items: tuple[Pair, ...]) -> None:
    """As `_learn`, for responses that have a body."""
    shape.known = _SEEN
    names = [name for _, name in shape.values]
    if known.bodied and len(known.index) == len(known.items) and (*known.items,) == items[1:] and b":status" not in names and STEADY.isdisjoint(names):
        shape.known = FieldsOfResponse(known, shape)


def _learn(shape: Shape, known: KnownRequest, items: tuple[Pair, ...]) -> None:
    """Remember what was concluded from a shape, if a request of that shape is as plain as nearly all are. `items`: those of `known`."""
    shape.known = _SEEN
    count = len(items) - len(known.items)
    names = [name for name, _ in items]
    varying = [name for _, name in shape.values if name != b":path"]
    if (
        known.protocol is None
        and known.method != b"CONNECT"
        and len(known.index) == len(known.items)
        and (*known.items,) == items[count:]
        and _PSEUDO.issuperset(names[:count])
        and _SPECIAL_REQUEST.isdisjoint(varying)
        and _PSEUDO.isdisjoint(varying)
        and not any(b"_" in name for name in names)
    ):
        shape.known = RequestShape(known, count, shape.values)


def request(fields: Fields, options: Options) -> KnownRequest | ShapedRequest:
    """HOT: a request's head."""
    shape = fields.shape
    if shape is not None and shape.known.__class__ is RequestShape:
        return shape.known.take(fields) or _request(fields, options)
    known = _request(fields, options)
    if shape is not None and shape.known is None:
        _learn(shape, known, fields.items)
    return known


def _request(fields: Fields, options: Options) -> KnownRequest:
    if fields.over:
        raise _over(fields, options)
    items = fields.items
    pseudo: list[bytes | None] = [None, None, None, None, None]
    count = 0
    for name, value in items:
        place = _REQUEST_PSEUDO.get(name)
        if place is None:
            break
        if pseudo[place] is not None or not value:
            raise MalformedError
        pseudo[place] = value
        count += 1
    method, scheme, authority, path, protocol = pseudo
    regular = list(items[count:])
    _check(regular)
    index = dict(reversed(regular))
    length = -1
    if not _SPECIAL_REQUEST.isdisjoint(index):
        regular, index, authority, length = _special_request(regular, index, authority)
    if method is None or authority is None:
        raise MalformedError(errors.MESSAGING)
    if (method not in _KNOWN_METHODS and TOKEN(method) is None) or _AUTHORITY(authority) is None:
        raise MalformedError
    if method == b"CONNECT" and protocol is None:
        if scheme is not None or path is not None:
            raise MalformedError(errors.MESSAGING)
        path = scheme = b""
    elif scheme is None or path is None:
        raise MalformedError(errors.MESSAGING)
    elif path.translate(_PATH) is not path or _SCHEME(scheme) is None:
        raise MalformedError
    elif path[0] != 47 and scheme.lower() in _WEB and (path != b"*" or method != b"OPTIONS"):
        raise MalformedError(errors.MESSAGING)
    if protocol is not None and (method != b"CONNECT" or not options.allow_connect):
        raise MalformedError
    if len(index) != len(regular):
        regular = _joined(regular)
        index = dict(reversed(regular))
    if options.headers_with_underscores != ALLOW:
        regular, index = _underscores(regular, index, options)
    known = KnownRequest(method, path, authority, scheme, regular, index, fields.size)
    known.length = length
    known.protocol = protocol
    if protocol is None:  # not everybody allows it
        _keep(fields, known, options)
    return known


def response(fields: Fields, options: Options) -> KnownResponse:
    """HOT: a response's head, informational ones too."""
    if fields.over:
        raise _over(fields, options)
    items = fields.items
    if not items or items[0][0] != b":status" or _STATUS(items[0][1]) is None:
        raise MalformedError
    regular = list(items[1:])
    _check(regular)
    index = dict(reversed(regular))
    length = -1
    status = int(items[0][1])
    if not _CONNECTION.isdisjoint(index):
        raise MalformedError
    if b"content-length" in index:
        length = _length(regular)
        if status == 204 or status < 200:  # which have none (RFC 9110 8.6); as Envoy we mind only what is wrong
            if length:
                raise MalformedError
            regular = [pair for pair in regular if pair[0] != b"content-length"]
            del index[b"content-length"]
    if status == 101:  # there is no switching of protocols in HTTP/2
        raise MalformedError
    if len(index) != len(regular):
        joined = join_repeated(regular, JOINED_IN_RESPONSES)
        if len(joined) != len(regular):
            regular, index = joined, dict(reversed(joined))
    known = KnownResponse(status, regular, index, fields.size)
    known.length = length
    _keep(fields, known, options)
    shape = fields.shape
    if shape is not None and shape.known is None:
        _learn_response(shape, known, items)
    return known


def trailers(fields: Fields, options: Options) -> KnownTrailers:
    """HOT: a trailer section."""
    if fields.over or fields.size - 32 * len(fields.items) > options.max_head_bytes:
        raise _over(fields, options)
    known = fields.known
    if known.__class__ is KnownTrailers:
        return known
    pairs = list(fields.items)
    _check(pairs)
    if any(name in _CONNECTION for name, _ in pairs):
        raise MalformedError
    known = KnownTrailers(pairs)
    if fields.known is None:
        fields.known = _SEEN
    else:
        known.kept = True
        fields.known = known
    return known


def _over(fields: Fields, options: Options) -> MalformedError:
    """What is wrong with fields of which there are more than there may be: as in Envoy, which looks at each as it comes, what comes first."""
    looked_at = (*fields.items, fields.beyond) if isinstance(fields, CutFields) else fields.items
    _check([pair for pair in looked_at if pair[0] not in _KNOWN_PSEUDO])
    count = len(fields.items)
    many = fields.over and count >= options.max_headers and fields.size - 32 * count <= options.max_head_bytes
    return MalformedError(errors.TOO_MANY_HEADERS if many else errors.HEADERS_TOO_LARGE, errors.INTERNAL_ERROR)


def _keep(fields: Fields, known: Any, options: Options) -> None:
    """Remember what was concluded, if the same fields come again and everybody would conclude the same."""
    if fields.known is None:
        fields.known = _SEEN
    elif options.headers_with_underscores == ALLOW:
        known.kept = True
        fields.known = known


def _check(pairs: list[Pair]) -> None:
    """Names in lower case, and no control characters."""
    for pair in pairs:
        if pair not in _valid:
            name, value = pair
            if value.translate(VALUE) is not value or (name not in _names and not _check_name(name)):
                raise MalformedError
            if len(name) + len(value) <= _MAX_VALID_PAIR and name not in _UNIQUE:
                if len(_valid) >= _MAX_VALID:
                    _valid.clear()
                _valid.add(pair)


def _check_name(name: bytes) -> bool:
    if TOKEN(name) is None or name != name.lower():
        return False
    if len(name) <= 64:
        if len(_names) >= 512:
            _names.clear()
        _names.add(name)
    return True


_names: set[bytes] = set()
_UNIQUE = frozenset((b"x-request-id", b"traceparent", b"tracestate", b"etag", b"date", b"x-b3-traceid", b"x-b3-spanid", b"b3", b"idempotency-key"))
_KNOWN_METHODS = frozenset((b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH", b"CONNECT"))


def _special_request(regular: list[Pair], index: dict[bytes, bytes], authority: bytes | None) -> tuple[list[Pair], dict[bytes, bytes], bytes | None, int]:
    """Fields that mean something to the connection."""
    if not _CONNECTION.isdisjoint(index):
        raise MalformedError
    te = index.get(b"te")
    if te is not None and (te != b"trailers" or len(index) != len(regular)):
        values = [value for name, value in regular if name == b"te"]
        if any(value.lower() != b"trailers" for value in values):
            raise MalformedError
        if len(values) > 1 or te != b"trailers":  # as Envoy, once if at all
            regular = [pair for pair in regular if pair[0] != b"te"]
            if b"trailers" in values:
                regular.append((b"te", b"trailers"))
            index = dict(reversed(regular))
    length = _length(regular)
    host = index.get(b"host")
    if host is not None:
        count = len(regular)
        regular = [pair for pair in regular if pair[0] != b"host"]
        if count - len(regular) > 1:
            raise MalformedError
        if authority is None:
            authority = host
        index = dict(reversed(regular))
    return regular, index, authority, length


def _joined(regular: list[Pair]) -> list[Pair]:
    """Fields that came repeatedly, as Envoy joins them."""
    crumbs = [value for name, value in regular if name == b"cookie"]
    if len(crumbs) > 1:  # RFC 9113 8.2.3; Envoy puts the whole at the end
        regular = [pair for pair in regular if pair[0] != b"cookie"]
        regular.append((b"cookie", b"; ".join(crumbs)))
    return join_repeated(regular, JOINED_IN_REQUESTS)


def _length(pairs: list[Pair]) -> int:
    values = [value for name, value in pairs if name == b"content-length"]
    if not values:
        return -1
    if len(values) > 1 or LENGTH(values[0]) is None or int(values[0]) >= 1 << 63:
        raise MalformedError
    return int(values[0])


def _underscores(regular: list[Pair], index: dict[bytes, bytes], options: Options) -> tuple[list[Pair], dict[bytes, bytes]]:
    if not any(b"_" in name for name in index):
        return regular, index
    stats = options.stats
    if options.headers_with_underscores == REJECT_REQUEST:
        stats.requests_rejected_with_underscores_in_headers.n += 1
        raise MalformedError(errors.UNDERSCORE, errors.INTERNAL_ERROR)
    assert options.headers_with_underscores == DROP_HEADER
    kept = [pair for pair in regular if b"_" not in pair[0]]
    stats.dropped_headers_with_underscores.n += len(regular) - len(kept)
    return kept, dict(reversed(kept))
