"""Configured metadata as plain data: what matchers, balancers and format commands look at."""

from __future__ import annotations

from typing import Any


def metadata_dict(message: Any) -> dict[str, Any]:
    """`envoy.config.core.v3.Metadata` as plain data: filter namespace -> JSON-like dict."""
    return {name: struct_dict(struct) for name, struct in message.filter_metadata.items()}


def struct_dict(struct: Any) -> dict[str, Any]:
    """A `google.protobuf.Struct` as a JSON-like dict."""
    from google.protobuf.json_format import MessageToDict  # large: only where there is metadata

    plain: dict[str, Any] = MessageToDict(struct)
    return plain
