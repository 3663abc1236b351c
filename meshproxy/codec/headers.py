"""Header collections, the one representation shared by every HTTP version.

A header is a pair of bytes, `(name, value)`: the name in lower case, the value without surrounding white space. Pairs keep the order in which they
came. What HTTP/2 calls pseudo-header fields are attributes (`method`, `path`, `authority`, `scheme`, `status`), and `get` knows them by their HTTP/2
names (`:path`), as Envoy's matchers and format commands do; `host` is the same as `:authority`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Pair = tuple[bytes, bytes]

NO_PLANS: dict[Any, Any] = {}  # what owners concluded (http.plan) from heads of which they concluded nothing; stays empty


class Headers:
    """An ordered multimap of header fields, with an index that is built when first asked for.

    `items` may be read and appended to by anyone who calls `touch()` afterwards; the methods do so themselves.
    """

    __slots__ = ("_index", "items")

    def __init__(self, items: list[Pair] | None = None) -> None:
        self.items: list[Pair] = [] if items is None else items
        self._index: dict[bytes, bytes] | None = None

    def touch(self) -> None:
        """Forget the index after `items` was changed directly."""
        self._index = None

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        """The first value of `name` (lower case), or `default`."""
        index = self._index
        if index is None:
            # Reversed, so that among equal names the first one wins.
            index = self._index = dict(reversed(self.items))
        return index.get(name, default)

    def get_all(self, name: bytes) -> list[bytes]:
        """Every value of `name`, in order."""
        if self.get(name) is None:
            return []
        return [value for key, value in self.items if key == name]

    def joined(self, name: bytes) -> bytes | None:
        """All values of `name` joined by a comma, as Envoy's header matchers see them; None when there is none."""
        values = self.get_all(name)
        if not values:
            return None
        return values[0] if len(values) == 1 else b",".join(values)

    def set(self, name: bytes, value: bytes) -> None:
        """Give `name` exactly one value: in the place of its first occurrence, or at the end."""
        before = self.get(name)
        index = self._index
        assert index is not None
        items = self.items
        if before is None:
            items.append((name, value))
        elif len(index) == len(items):  # no name occurs twice
            items[items.index((name, before))] = name, value
        else:
            first = next(position for position, pair in enumerate(items) if pair[0] == name)
            self.items = [pair for position, pair in enumerate(items) if pair[0] != name or position == first]
            self.items[first] = name, value
        index[name] = value

    def add(self, name: bytes, value: bytes) -> None:
        """Append one more value of `name`."""
        self.items.append((name, value))
        index = self._index
        if index is not None:
            index.setdefault(name, value)

    def remove(self, name: bytes) -> bool:
        """Remove every value of `name`; whether there was one."""
        if self.get(name) is None:
            return False
        self.items = [pair for pair in self.items if pair[0] != name]
        assert self._index is not None
        del self._index[name]
        return True

    def __contains__(self, name: bytes) -> bool:
        return self.get(name) is not None

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.items!r})"


class RequestHead(Headers):
    """A request's head. `items` never holds Host or a pseudo-header: those are the attributes.

    `authority` is empty when the request named none (HTTP/1.0). `path` is the path with its query. `version` is 10, 11 or 20. `protocol` is the
    `:protocol` of an extended CONNECT (RFC 8441) or None.
    """

    __slots__ = ("authority", "method", "path", "protocol", "scheme", "version")

    case: dict[bytes, bytes] | None = None  # how the sender spelt the names, where that is preserved: see `SpeltRequestHead`

    def __init__(
        self,
        method: bytes,
        path: bytes,
        authority: bytes = b"",
        items: list[Pair] | None = None,
        index: dict[bytes, bytes] | None = None,
        *,
        scheme: bytes = b"http",
        version: int = 11,
    ) -> None:
        """`index`: first values by name, when the caller has them already and hands them over."""
        self.items = [] if items is None else items
        self._index = index
        self.method = method
        self.path = path
        self.authority = authority
        self.scheme = scheme
        self.version = version
        self.protocol: bytes | None = None

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        index = self._index
        if index is None:
            index = self._index = dict(reversed(self.items))
        value = index.get(name)
        if value is not None:
            return value
        attribute = _REQUEST_PSEUDO.get(name)
        if attribute is None:
            return default
        value = getattr(self, attribute)
        return value or default

    def get_all(self, name: bytes) -> list[bytes]:
        if name in _REQUEST_PSEUDO:
            value = self.get(name)
            return [] if value is None else [value]
        return super().get_all(name)

    def set(self, name: bytes, value: bytes) -> None:
        attribute = _REQUEST_PSEUDO.get(name)
        if attribute is None:
            super().set(name, value)
        else:
            setattr(self, attribute, value)

    def add(self, name: bytes, value: bytes) -> None:
        if name in _REQUEST_PSEUDO:
            self.set(name, value)
        else:
            super().add(name, value)

    def remove(self, name: bytes) -> bool:
        """Remove every value of `name`. Pseudo-headers stay: a request without them is not a request."""
        if name in _REQUEST_PSEUDO:
            return False
        return super().remove(name)

    def copy(self) -> RequestHead:
        """An independent copy (for retries and mirrored requests)."""
        head = type(self)(self.method, self.path, self.authority, self.items.copy(), scheme=self.scheme, version=self.version)
        head.protocol = self.protocol
        if self.case is not None:
            head.case = self.case  # type: ignore[misc]  # the copy is a SpeltRequestHead too
        return head

    def __repr__(self) -> str:
        return f"RequestHead({self.method!r}, {self.path!r}, {self.authority!r}, {self.items!r})"


class ResponseHead(Headers):
    """A response's head. `reason` is the HTTP/1 reason phrase when it differs from the standard one, else None."""

    __slots__ = ("reason", "status", "version")

    case: dict[bytes, bytes] | None = None

    def __init__(
        self,
        status: int,
        items: list[Pair] | None = None,
        index: dict[bytes, bytes] | None = None,
        *,
        version: int = 11,
        reason: bytes | None = None,
    ) -> None:
        self.items = [] if items is None else items
        self._index = index
        self.status = status
        self.version = version
        self.reason = reason

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        if name == b":status":
            return b"%d" % self.status
        return super().get(name, default)

    def get_all(self, name: bytes) -> list[bytes]:
        if name == b":status":
            return [b"%d" % self.status]
        return super().get_all(name)

    def __repr__(self) -> str:
        return f"ResponseHead({self.status}, {self.items!r})"


class SpeltRequestHead(RequestHead):
    """A request's head that remembers how the sender spelt the names: `case` is lower-case name -> name as it came first."""

    __slots__ = ("case",)

    case: dict[bytes, bytes] | None


class SpeltResponseHead(ResponseHead):
    """A response's head that remembers how the sender spelt the names."""

    __slots__ = ("case",)

    case: dict[bytes, bytes] | None


_REQUEST_PSEUDO = {
    b":method": "method",
    b":path": "path",
    b":authority": "authority",
    b":scheme": "scheme",
    b":protocol": "protocol",
    b"host": "authority",
}
