"""Durations of the API as numbers."""

from __future__ import annotations

from typing import Any


def seconds(duration: Any) -> float:
    """A Duration in seconds."""
    return float(duration.seconds + duration.nanos / 1e9)


def milliseconds(duration: Any) -> int:
    """A Duration in whole milliseconds, cut off as Envoy does."""
    return int(duration.seconds * 1000 + duration.nanos // 1_000_000)


def seconds_of(proto: Any, field: str, default: float) -> float:
    """A Duration field in seconds; `default` when it is not set."""
    return seconds(getattr(proto, field)) if proto.HasField(field) else default


def milliseconds_of(proto: Any, field: str, default: int) -> int:
    """A Duration field in whole milliseconds; `default` when it is not set."""
    return milliseconds(getattr(proto, field)) if proto.HasField(field) else default
