"""What a source needs of a gRPC client, whichever it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

Metadata = Sequence[tuple[str, str | bytes]]

UNAVAILABLE = 14


class CallFailed(Exception):
    """A call that did not succeed. `code`: gRPC status."""

    def __init__(self, code: int, details: str) -> None:
        super().__init__(f"status {code}: {details}")
        self.code = code
        self.details = details


class Calls(Protocol):
    """Calls to one server; methods are `/service/method`. Both raise CallFailed."""

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout: float) -> bytes:
        """One message there, one back; `timeout` in seconds."""
        ...

    def stream(self, method: str, request: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        """One message there, any number back. Closing the iterator ends the call."""
        ...
