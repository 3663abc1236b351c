"""Matchers of subject alternative names: what validation contexts and RBAC ask of a certificate.

Certificates are taken as anything with `dns_sans`, `uri_sans`, `email_sans` (text), `ip_sans` (packed) and `other_sans`, see net.certificate.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from meshproxy.api.errors import ConfigError, fail, under

SanMatcher = Callable[[Any], bool]


def ip_text(packed: bytes) -> str:
    """An IP address SAN as text; hexadecimal when it is no address."""
    if len(packed) not in (4, 16):
        return packed.hex()
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def dns_match(name: str, pattern: str) -> bool:
    """Whether a DNS SAN covers `name`: equal, or with one wildcard in its leftmost label (RFC 6125 section 6.4.3; none inside an A-label)."""
    name, pattern = name.lower(), pattern.lower()
    if name == pattern:
        return True
    label, dot, rest = pattern.partition(".")
    first, name_dot, name_rest = name.partition(".")
    if not dot or not name_dot or rest != name_rest or "*" in rest or label.count("*") != 1 or not first:
        return False
    if label.startswith("xn--") or (label != "*" and first.startswith("xn--")):
        return False
    before, _, after = label.partition("*")
    return len(first) >= len(before) + len(after) and first.startswith(before) and first.endswith(after)


def compile_san(proto: Any, path: str) -> SanMatcher:
    """A `SubjectAltNameMatcher`; `path` is where it stands. Raises ConfigError."""
    kind = proto.SanType.Name(proto.san_type)
    matches = compile_string_at(proto.matcher, f"{path}.matcher")
    if kind == "DNS":
        if proto.matcher.WhichOneof("match_pattern") == "exact":
            exact = proto.matcher.exact
            return lambda certificate: any(dns_match(exact, san) for san in certificate.dns_sans)
        return lambda certificate: any(matches(san.encode("latin-1")) for san in certificate.dns_sans)
    if kind == "URI":
        return lambda certificate: any(matches(san.encode("latin-1")) for san in certificate.uri_sans)
    if kind == "EMAIL":
        return lambda certificate: any(matches(san.encode("latin-1")) for san in certificate.email_sans)
    if kind == "IP_ADDRESS":
        return lambda certificate: any(matches(ip_text(san).encode()) for san in certificate.ip_sans)
    if kind == "OTHER_NAME":
        wanted = proto.oid
        if not wanted:
            fail(f"{path}.oid", "an object identifier is required for OTHER_NAME")
        return lambda certificate: any(oid == wanted and matches(value) for oid, value in certificate.other_sans)
    raise ConfigError.at(f"{path}.san_type", "a type is required")


def compile_string_at(proto: Any, path: str) -> Callable[[bytes], bool]:
    """A `StringMatcher`; `path` is where it stands. Raises ConfigError."""
    from meshproxy.api.matchers import compile_string  # only contexts with SAN matchers load the matchers

    with under(path):
        return compile_string(proto)
