"""Attributes of a request or connection by the names that Istio and CEL have for them: `request.host`, `request.headers['x-user']`, `'a constant'`.

Envoy has all of CEL; this is what most tags of metrics are. Both the sidecar and the control plane read such texts, so that what one takes the other does.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from meshproxy.api.errors import UNSUPPORTED, fail

# What can be asked for as it is, and what by a name in brackets.
PLAIN = frozenset(
    (
        "request.method", "request.host", "request.path", "request.url_path", "request.scheme", "request.protocol", "request.useragent",
        "response.code", "response.code_details", "response.flags",
        "source.address", "source.port", "destination.address", "destination.port", "upstream.address", "upstream.port",
        "connection.requested_server_name", "xds.cluster_name", "xds.route_name", "node.id", "node.cluster",
    )
)  # fmt: skip
NAMED = frozenset(("request.headers", "response.headers", "node.metadata"))
_LITERAL = re.compile(r"""'([^'"\\]*)'|"([^'"\\]*)"|(-?[0-9]+|true|false)""")
_NAMED = re.compile(r"""([a-z_.]+)\[(?:'([^'"\\]+)'|"([^'"\\]+)")\]""")


class Attribute(NamedTuple):
    """What a text asks for: `name` is one of PLAIN, or one of NAMED with a `key`, or "" for the constant `key`."""

    name: str
    key: str = ""


def parse(text: str) -> Attribute:
    """Raises ConfigError (unsupported) for what is more than an attribute or a constant."""
    text = text.strip()
    literal = _LITERAL.fullmatch(text)
    if literal is not None:
        return Attribute("", literal[1] or literal[2] or literal[3] or "")
    if text in PLAIN:
        return Attribute(text)
    named = _NAMED.fullmatch(text)
    if named is not None and named[1] in NAMED:
        return Attribute(named[1], named[2] or named[3])
    known = ", ".join([*sorted(PLAIN), *(f"{one}['...']" for one in sorted(NAMED))])
    return fail("", f"{text!r} is neither a constant nor one of {known}", UNSUPPORTED)
