"""What goes in and out of an admin handler."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from meshproxy.api import messages
from meshproxy.record import Record, field

TEXT = "text/plain; charset=UTF-8"
PLAIN = "text/plain"
JSON = "application/json"
HTML = "text/html; charset=UTF-8"


class Request(Record):
    """`path` is decoded and without its query; `query` has the first value of each parameter."""

    method: str
    path: str
    query: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    content_type: str = ""

    @classmethod
    def from_target(cls, method: str, target: str, body: bytes = b"", content_type: str = "") -> Request:
        """From a request target: the path is decoded as Envoy's admin listener normalises it (percent codes, repeated slashes)."""
        path, _, query = target.partition("?")
        return cls(method, re.sub("//+", "/", decode(path)), parse_query(query), body, content_type)


class Response(Record):
    """`body` is text, or bytes where a renderer made bytes, or pieces of either: those are made while they are sent, with pauses for others."""

    body: str | bytes | Iterator[str] | Iterator[bytes] = ""
    status: int = 200
    content_type: str = TEXT


OK = Response("OK\n")


def parse_query(query: str) -> dict[str, str]:
    """Decoded parameters; of several with one name the first counts; without `=` the value is empty."""
    parameters: dict[str, str] = {}
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if name:
            parameters.setdefault(decode(name), decode(value))
    return parameters


def decode(text: str) -> str:
    """Percent-decoded; bytes that are not UTF-8 become U+FFFD."""
    if "%" not in text:
        return text
    from urllib.parse import unquote_to_bytes

    return unquote_to_bytes(text).decode("utf-8", "replace")


def to_json(value: Any) -> str:
    """JSON as Envoy pretty-prints it: one space of indent, and a newline at the end."""
    import json

    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def message_to_json(message: Any, *, defaults: bool = False) -> str:
    """A proto message as Envoy prints it; `defaults` prints fields that are unset too."""
    from google.protobuf import json_format

    loaded = ""
    while True:
        try:
            return (
                json_format.MessageToJson(
                    message, indent=1, preserving_proto_field_name=True, always_print_fields_with_no_presence=defaults, ensure_ascii=False
                )
                + "\n"
            )
        except TypeError as error:
            # An Any of a type that main has had no use for so far: it is loaded now. The error ends with its name.
            name = str(error).rpartition("/")[2]
            if name == loaded or messages.descriptor(name) is None:
                raise
            loaded = name
