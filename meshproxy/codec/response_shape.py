"""What responses have in common whose heads differ in nothing but a few values: a length, a date, a tag. `codec.h1` and `codec.h2` find out which."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.codec.headers import ResponseHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshproxy.codec.headers import Pair

LENGTH = b"content-length"
# What decides how a response is understood, or says who sends it: those in which it differs are of other shapes.
STEADY = frozenset((b"content-encoding", b"content-type", b"grpc-status", b"server", b"via", b"x-envoy-peer-metadata", b"x-envoy-peer-metadata-id"))
_NONE = -2  # no body is as long as that


class ResponseShape:
    """A response's head without the values of `names`, which have `marks` in their place.

    What it has in common with a KnownResponse is for that head. `size`: of a head on the wire, without the values.
    """

    __slots__ = ("_length_at", "_stated", "index", "items", "marks", "names", "reason", "size", "status")

    length = -1  # of the body: each has its own
    received = 0

    def __init__(self, status: int, items: Sequence[Pair], names: tuple[bytes, ...], *, stated: int, size: int, reason: bytes | None = None) -> None:
        """`items`: of one of them, whose names are all different. `stated`: its content-length, or -1."""
        self.status = status
        self.reason = reason
        self.names = names
        self.marks = tuple(b"<value %d>" % number for number in range(len(names)))
        marked = dict(zip(names, self.marks, strict=True))
        self.items: list[Pair] = [(name, marked.get(name, value)) for name, value in items]
        self.index = dict(self.items)
        self.size = size
        self._length_at = names.index(LENGTH) if LENGTH in names else -1
        self._stated = stated

    @property
    def says_length(self) -> bool:
        """Whether the heads say how long their bodies are."""
        return self._length_at >= 0 or self._stated >= 0

    def length_of(self, values: Sequence[bytes]) -> int:
        """HOT: of the body, as the head says: -1 where it does not."""
        at = self._length_at
        if at < 0:
            return self._stated
        value = values[at]
        return int(value) if value.isdigit() and len(value) < 18 else _NONE

    def head(self, values: Sequence[bytes]) -> ResponseHead:
        """The head with these values, as others know heads."""
        fields = dict(zip(self.names, values, strict=True))
        items = [(name, fields.get(name, value)) for name, value in self.items]
        return ResponseHead(self.status, items, dict(items), reason=self.reason)
