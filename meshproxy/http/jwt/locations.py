"""Where tokens stand in requests: headers, query parameters, cookies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from meshproxy.observe.stream_values import percent_decode

if TYPE_CHECKING:
    from meshproxy.codec.headers import RequestHead

_BEARER = b"authorization", b"Bearer "
_ACCESS_TOKEN = b"access_token"
_FIRST_OF_TOKEN = re.compile(rb"[A-Za-z0-9_.-]")


class Location:
    """A place where tokens of some issuers may stand."""

    __slots__ = ("issuers",)

    def __init__(self) -> None:
        self.issuers: set[str] = set()

    def allows(self, issuer: str) -> bool:
        """Whether a provider of this place takes tokens of `issuer`; one that names no issuer takes all."""
        return issuer in self.issuers or "" in self.issuers

    def find(self, head: RequestHead) -> Iterable[bytes]:
        """The tokens that stand there, in order."""
        raise NotImplementedError

    def remove(self, head: RequestHead) -> None:
        """Take the tokens out of the request."""


class HeaderLocation(Location):
    """The values of a header, or what follows `prefix` in them."""

    __slots__ = ("name", "prefix")

    def __init__(self, name: bytes, prefix: bytes) -> None:
        super().__init__()
        self.name = name
        self.prefix = prefix

    def find(self, head: RequestHead) -> Iterable[bytes]:
        prefix = self.prefix
        values = head.get_all(self.name)
        if not prefix:
            return values
        found = []
        for value in values:
            position = value.find(prefix)
            if position >= 0:
                # The token begins at the first character that can be one's; where none is there, all of the value stands for it.
                first = _FIRST_OF_TOKEN.search(value, position + len(prefix))
                found.append(value if first is None else value[first.start() :])
        return found

    def remove(self, head: RequestHead) -> None:
        head.remove(self.name)


class ParameterLocation(Location):
    """The first query parameter of a name."""

    __slots__ = ("name",)

    def __init__(self, name: bytes) -> None:
        super().__init__()
        self.name = name

    def find(self, head: RequestHead) -> Iterable[bytes]:
        _, _, query = head.path.partition(b"?")
        for part in query.partition(b"#")[0].split(b"&") if query else ():
            name, _, value = part.partition(b"=")
            if percent_decode(name) == self.name:
                return (percent_decode(value),)
        return ()

    def remove(self, head: RequestHead) -> None:
        """All parameters of that name go; the others stay as they were written."""
        path, _, query = head.path.partition(b"?")
        parts = [part for part in query.split(b"&") if percent_decode(part.partition(b"=")[0]) != self.name]
        head.path = b"%b?%b" % (path, b"&".join(parts)) if parts else path


class CookieLocation(Location):
    """The first cookie of a name. It is never taken out, as in Envoy."""

    __slots__ = ("name",)

    def __init__(self, name: bytes) -> None:
        super().__init__()
        self.name = name

    def find(self, head: RequestHead) -> Iterable[bytes]:
        for line in head.get_all(b"cookie"):
            for part in line.split(b";"):
                name, equals, value = part.partition(b"=")
                if equals and name.lstrip(b" ") == self.name:
                    return (value[1:-1] if len(value) >= 2 and value[:1] == value[-1:] == b'"' else value,)
        return ()


class Extractor:
    """Finds the tokens for some providers. Where several name the same place, a token there may be of any of their issuers."""

    __slots__ = ("_locations", "_sanitised")

    def __init__(self, protos: Iterable[Any]) -> None:
        """`protos`: JwtProvider messages."""
        headers: dict[bytes, Location] = {}
        parameters: dict[bytes, Location] = {}
        cookies: dict[bytes, Location] = {}
        self._sanitised: list[bytes] = []
        for proto in protos:
            names = [(header.name.lower().encode(), header.value_prefix.encode()) for header in proto.from_headers]
            wanted = [name.encode() for name in proto.from_params]
            if not names and not wanted and not proto.from_cookies:
                names, wanted = [_BEARER], [_ACCESS_TOKEN]
            places = [headers.setdefault(name + prefix, HeaderLocation(name, prefix)) for name, prefix in names]
            places += [parameters.setdefault(name, ParameterLocation(name)) for name in wanted]
            places += [cookies.setdefault(name, CookieLocation(name)) for name in map(str.encode, proto.from_cookies)]
            for place in places:
                place.issuers.add(proto.issuer)
            self._sanitised += [name.lower().encode() for name in (proto.forward_payload_header, *(c.header_name for c in proto.claim_to_headers)) if name]
        self._locations = [table[key] for table in (headers, parameters, cookies) for key in sorted(table)]

    def extract(self, head: RequestHead) -> list[tuple[bytes, Location]]:
        """Every token with its place, in the order headers, parameters, cookies; Envoy verifies them from the last to the first."""
        return [(token, location) for location in self._locations for token in location.find(head)]

    def sanitise(self, head: RequestHead) -> None:
        """Remove the headers that only a verified token may set."""
        for name in self._sanitised:
            head.remove(name)
