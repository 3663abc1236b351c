"""Output of `meshctl`: tables for people, JSON and YAML for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml
from google.protobuf import json_format

from meshproxy.api import messages


def show(value: Any, form: str) -> str:
    """A plain value as JSON or YAML."""
    return json.dumps(value, indent=2) if form == "json" else yaml.safe_dump(value, sort_keys=False).rstrip("\n")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns one under another."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def plain(message: Any) -> Any:
    """A message as plain values, with the API's own names."""
    _load_types(message)
    return _plain(json_format.MessageToDict(message, preserving_proto_field_name=True))


def _plain(value: Any) -> Any:
    """protobuf makes an OrderedDict of an Any, which YAML's safe writer does not take."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _load_types(message: Any) -> None:
    """protobuf writes an Any only if it knows what is in it."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        values = value.values() if hasattr(value, "values") and field.message_type.GetOptions().map_entry else value if field.is_repeated else [value]
        for one in values:
            if not hasattr(one, "ListFields"):
                break  # a map of plain values
            if one.DESCRIPTOR.full_name != "google.protobuf.Any":
                _load_types(one)
            elif (cls := messages.message_class(messages.full_name(one.type_url))) is not None:
                _load_types(cls.FromString(one.value))
