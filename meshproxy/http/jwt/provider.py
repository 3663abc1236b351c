"""A provider of tokens (envoy.extensions.filters.http.jwt_authn.v3.JwtProvider): what it accepts, its keys, and what becomes of a request with its token."""

from __future__ import annotations

import base64
import math
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from meshproxy.api import datasource, errors, matchers
from meshproxy.api.durations import seconds
from meshproxy.http.jwt.keys import Keys
from meshproxy.http.jwt.remote import RemoteKeys
from meshproxy.http.jwt.status import Bad, Status
from meshproxy.http.jwt.token import CLOCK_SKEW_S, Jwt

if TYPE_CHECKING:
    import asyncio

    from meshproxy.codec.headers import RequestHead
    from meshproxy.http.filters import FilterContext
    from meshproxy.http.jwt.requirements import Verification

_DEFAULT_CACHE_SIZE = 100
_DEFAULT_CACHED_BYTES = 4096
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
# What protobuf's JSON escapes besides: angle brackets, and characters that change how others are shown.
_TO_ESCAPE = re.compile(
    '["\\\\<>\x00-\x1f\x7f\xad\u0600-\u0603\u06dd\u070f\u17b4\u17b5\u200b-\u200f\u2028-\u202e\u2060-\u2064\u206a-\u206f\ufeff\ufff9-\ufffb]'
)
_UNSENDABLE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class Audiences:
    """The audiences of which a token must name one; none: any will do. Scheme and final slash do not count, as in Envoy."""

    __slots__ = ("_allowed",)

    def __init__(self, allowed: Any) -> None:
        self._allowed = frozenset(map(_bare_audience, allowed))

    def allow(self, audiences: tuple[str, ...]) -> bool:
        return not self._allowed or any(_bare_audience(one) in self._allowed for one in audiences)


def _bare_audience(audience: str) -> str:
    return audience.removeprefix("http://" if audience.startswith("http://") else "https://").removesuffix("/")


class Cache:
    """Tokens whose signatures were good, the longest unused goes first. Times and audiences are checked each time."""

    __slots__ = ("_max_token", "_size", "_tokens")

    def __init__(self, proto: Any) -> None:
        """`proto`: JwtCacheConfig."""
        self._size = proto.jwt_cache_size or _DEFAULT_CACHE_SIZE
        self._max_token = proto.jwt_max_token_size or _DEFAULT_CACHED_BYTES
        self._tokens: OrderedDict[bytes, Jwt] = OrderedDict()

    def get(self, token: bytes, now: int) -> Jwt | None:
        jwt = self._tokens.get(token)
        if jwt is None:
            return None
        if jwt.check_time(now) == Status.EXPIRED:
            del self._tokens[token]
            return None
        self._tokens.move_to_end(token)
        return jwt

    def put(self, token: bytes, jwt: Jwt) -> None:
        if len(token) <= self._max_token:
            self._tokens[token] = jwt
            if len(self._tokens) > self._size:
                self._tokens.popitem(last=False)


class Provider:
    """A compiled JwtProvider. Each worker has its own, with its own keys and its own cache."""

    def __init__(self, proto: Any, context: FilterContext, stats: Any) -> None:
        """`stats`: counters by name. Raises ConfigError."""
        self.issuer: str = proto.issuer
        self.failed_key: str = proto.failed_status_in_metadata
        self.cache = Cache(proto.jwt_cache_config) if proto.HasField("jwt_cache_config") else None
        self._audiences = Audiences(proto.audiences)
        self._subject = None
        if proto.HasField("subjects"):
            with errors.under("subjects"):
                self._subject = matchers.compile_string(proto.subjects)
        self._max_lifetime: float | None = math.inf if proto.require_expiration else None
        if proto.HasField("max_lifetime"):
            self._max_lifetime = seconds(proto.max_lifetime)
        self._skew = proto.clock_skew_seconds or CLOCK_SKEW_S
        self._forward: bool = proto.forward
        self._forward_header = proto.forward_payload_header.lower().encode()
        self._pad: bool = proto.pad_forward_payload_header
        self._payload_key: str = proto.payload_in_metadata
        self._header_key: str = proto.header_in_metadata
        self._lists = tuple(proto.normalize_payload_in_metadata.space_delimited_claims)
        self._claims = tuple((claim.claim_name, claim.header_name.lower().encode()) for claim in proto.claim_to_headers)
        self._clear_route: bool = proto.clear_route_cache
        self._keys: Keys | None = None
        self._remote: RemoteKeys | None = None
        self._compile_keys(proto, context, stats)

    def _compile_keys(self, proto: Any, context: FilterContext, stats: Any) -> None:
        if proto.WhichOneof("jwks_source_specifier") is None:
            errors.fail("", "one of remote_jwks and local_jwks is required")
        if proto.HasField("remote_jwks"):
            with errors.under("remote_jwks"):
                self._remote = RemoteKeys(proto.remote_jwks, context, stats)
            return
        with errors.under("local_jwks"):
            if proto.local_jwks.HasField("watched_directory"):
                errors.fail("watched_directory", "is not supported", errors.UNSUPPORTED)
            text = datasource.read(proto.local_jwks, allow_empty=True)
            if text:
                try:
                    self._keys = Keys(text)
                except Bad as bad:
                    errors.fail("", f"invalid local jwks: {bad}")

    # -- verdicts

    def check_claims(self, jwt: Jwt, now: float, audiences: Audiences | None) -> Status:
        """All that is to be checked but the signature. `now`: Unix time."""
        status = jwt.check_time(int(now), self._skew)
        if status != Status.OK:
            return status
        if not (audiences or self._audiences).allow(jwt.audiences):
            return Status.AUDIENCE_NOT_ALLOWED
        if self._subject is not None and not self._subject(jwt.subject.encode()):
            return Status.VERIFICATION_FAILS
        if self._max_lifetime is not None and not (jwt.exp and jwt.exp - now < self._max_lifetime):
            return Status.VERIFICATION_FAILS
        return Status.OK

    def keys(self) -> Keys | None:
        """The keys, unless they must be fetched first; None, too, where there are none."""
        return self._keys if self._remote is None else self._remote.keys()

    def fetch(self) -> asyncio.Future[Keys | None] | None:
        """Have the keys fetched: what they come to, None for a failure. None where there is nowhere to fetch them from."""
        return None if self._remote is None else self._remote.fetch()

    # -- what a good token does

    def accept(self, jwt: Jwt, verification: Verification) -> None:
        """Put into the request and its metadata what the configuration wants to be known of the token."""
        head = verification.head
        if self._forward_header:
            padding = b"=" * (-len(jwt.encoded_payload) % 4) if self._pad else b""
            head.add(self._forward_header, jwt.encoded_payload + padding)
        added = False
        for claim, name in self._claims:
            value = _header_value(jwt.claim(claim))
            if value and _UNSENDABLE.search(value) is None:
                head.add(name, value)
                added = True
        if self._clear_route and (added or self._payload_key):
            verification.clears_route = True
        if self._header_key:
            verification.extracted[self._header_key] = jwt.header
        if self._payload_key:
            verification.extracted[self._payload_key] = self._normalised(jwt.payload)

    def remove(self, location: Any, head: RequestHead) -> None:
        """Take a good token out of the request, unless the upstream is to see it."""
        if not self._forward:
            location.remove(head)

    def _normalised(self, payload: dict[str, Any]) -> dict[str, Any]:
        lists = {claim: value.split(" ") for claim in self._lists if isinstance(value := payload.get(claim), str)}
        return payload | {claim: [part for part in parts if part] for claim, parts in lists.items() if any(parts)} if lists else payload


def _header_value(claim: Any) -> bytes:
    """A claim as a header says it; empty for what cannot be said."""
    if isinstance(claim, str):
        return claim.encode()
    if isinstance(claim, bool):
        return b"true" if claim else b"false"
    if isinstance(claim, (int, float)):
        return b"%d" % claim if 0 <= claim < 2**64 and claim == int(claim) else b"%.6f" % claim
    if isinstance(claim, (dict, list)):
        return base64.b64encode(_protobuf_json(claim).encode())
    return b""


def _protobuf_json(value: Any) -> str:
    """A structured claim as the JSON of a google.protobuf.Value, which upstreams get from Envoy. Members are sorted; Envoy's order is by chance."""
    if isinstance(value, str):
        return f'"{_TO_ESCAPE.sub(_escape, value)}"'
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return f"{{{','.join(f'{_protobuf_json(name)}:{_protobuf_json(value[name])}' for name in sorted(value))}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_protobuf_json, value))}]"
    short = f"{value:.15g}"
    return short if float(short) == value else f"{float(value):.17g}"


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    return _ESCAPES.get(char) or f"\\u{ord(char):04x}"
