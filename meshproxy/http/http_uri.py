"""HttpUri: where requests of our own go."""

from __future__ import annotations

from typing import Any
from urllib.parse import SplitResult, urlsplit

from meshproxy.api import errors


def check(proto: Any) -> None:
    """What Envoy asks of an HttpUri. Raises ConfigError relative to `proto`."""
    if not proto.uri:
        errors.fail("uri", "must not be empty")
    if not proto.cluster:
        errors.fail("cluster", "must not be empty")
    if not proto.HasField("timeout"):
        errors.fail("timeout", "is required")


def split(text: str) -> SplitResult | None:
    """An absolute URI of http or https in its parts; None for what is none."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return None
    valid = parts.scheme in ("http", "https") and bool(parts.netloc) and text.isascii() and text.isprintable() and " " not in text
    return parts if valid else None


def target(parts: SplitResult) -> bytes:
    """The path and query that are asked for."""
    return (parts.path or "/").encode() + (b"?" + parts.query.encode() if parts.query else b"")
