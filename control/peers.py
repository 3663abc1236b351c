"""What gRPC knows of the other end of a call, as far as secrets depend on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_LOCAL = ("unix:", "unix-abstract:", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D")


def is_local(peer: str) -> bool:
    """Whether a call did not leave the machine. `peer`: as gRPC calls it."""
    return peer.startswith(_LOCAL)


def is_private(peer: str, auth_context: Mapping[str, Any]) -> bool:
    """Whether nobody but the two ends can read a call: it came by TLS, or did not leave the machine. `peer`: as gRPC calls it."""
    return auth_context.get("transport_security_type", [b""])[0] == b"ssl" or is_local(peer)


def proven(peer: str, auth_context: Mapping[str, Any]) -> frozenset[str] | None:
    """The SPIFFE IDs that a caller has proven by mutual TLS. None: it is on this machine, where what it says of itself is believed."""
    if is_local(peer):
        return None
    names = auth_context.get("x509_subject_alternative_name", ())
    return frozenset(name.decode("latin-1") for name in names if name.startswith(b"spiffe://"))


def good_until(auth_context: Mapping[str, Any]) -> float:
    """When the certificate ends by which a caller has proved who it is, as seconds since 1970; infinity without one."""
    pems = auth_context.get("x509_pem_cert", ())
    if not pems:
        return math.inf
    from cryptography import x509  # who has no authority need not have it

    return x509.load_pem_x509_certificate(pems[0]).not_valid_after_utc.timestamp()
