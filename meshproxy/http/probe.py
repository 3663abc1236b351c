"""What general code is run on to learn what it always does (see `http.plan`): a stream that has a head, and nothing else that is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshproxy.codec.headers import RequestHead, ResponseHead

REQUEST_ID = b"x-request-id"


class Varies(Exception):
    """Something looked at what a plan cannot tell."""


class Probe:
    """Stands in for a stream: it has the head that it was given, and nothing else is known of it."""

    __slots__ = ("operation", "request", "response", "span", "tracing")

    request: RequestHead
    response: ResponseHead
    operation: bytes  # this and the next two: of responses of connection managers that trace
    span: None
    tracing: Any
    tunnel = echoes_request_id = False  # or there would be no plan

    def __getattr__(self, name: str) -> Any:
        raise Varies(name)


class GuardedValues(dict[bytes, bytes]):
    """The index of a response's head with marks for some values: which fields it has is known, what those say is not, and nobody may read it."""

    __slots__ = ("_varying",)

    def __init__(self, index: dict[bytes, bytes], varying: Iterable[bytes]) -> None:
        super().__init__(index)
        self._varying = frozenset(varying)

    def get(self, name: bytes, default: Any = None) -> Any:
        if name in self._varying:
            raise Varies(name)
        return dict.get(self, name, default)

    def __getitem__(self, name: bytes) -> bytes:
        if name in self._varying:
            raise Varies(name)
        return dict.__getitem__(self, name)


class GuardedIndex(GuardedValues):
    """The index of a probe's head. The request id is another one each time, and what else is said to vary: nobody may read that, or ask whether it is there."""

    __slots__ = ()

    def __init__(self, index: dict[bytes, bytes], varying: tuple[bytes, ...] = ()) -> None:
        super().__init__(index, (REQUEST_ID, *varying))

    def __contains__(self, name: object) -> bool:
        if name in self._varying:
            raise Varies(name)
        return dict.__contains__(self, name)
