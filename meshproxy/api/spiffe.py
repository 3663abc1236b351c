"""SPIFFE IDs: what is one, and what is not.

Source: the SPIFFE-ID standard, section 2 (syntax, and at most 2048 bytes, 255 of them the trust domain). Nothing is normalised: a trust domain in capitals, an
escape or an empty segment is refused, so that two identities are the same exactly when their texts are.
"""

from __future__ import annotations

import re

from meshproxy.record import Record

SCHEME = "spiffe://"
MAX_ID = 2048  # bytes
MAX_TRUST_DOMAIN = 255

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")


class SpiffeId(Record, frozen=True):
    """`spiffe://trust_domain/path`. `path` is empty for a trust domain itself, and begins with a slash otherwise. `str()` is the URI."""

    trust_domain: str
    path: str = ""

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}{self.path}"


def parse(text: str) -> SpiffeId:
    """A SPIFFE ID from its URI. Raises ValueError with the reason."""
    if len(text) > MAX_ID:
        raise ValueError(f"a SPIFFE ID has at most {MAX_ID} bytes")
    if not text.startswith(SCHEME):
        raise ValueError(f"{text!r} is no SPIFFE ID: it does not begin with {SCHEME}")
    trust_domain, slash, path = text[len(SCHEME) :].partition("/")
    check_trust_domain(trust_domain)
    if slash:
        for segment in path.split("/"):
            check_segment(segment)
    return SpiffeId(trust_domain, slash + path)


def workload(trust_domain: str, namespace: str, service_account: str) -> SpiffeId:
    """The identity of a service account, as Istio writes it. Raises ValueError."""
    check_trust_domain(trust_domain)
    check_segment(namespace)
    check_segment(service_account)
    return SpiffeId(trust_domain, f"/ns/{namespace}/sa/{service_account}")


def check_trust_domain(text: str) -> None:
    """Raises ValueError for what is not the name of a trust domain."""
    if not _TRUST_DOMAIN.fullmatch(text) or len(text) > MAX_TRUST_DOMAIN:
        raise ValueError(f"{text!r} is no trust domain: 1 to {MAX_TRUST_DOMAIN} of the characters a-z 0-9 . - _")


def check_segment(text: str) -> None:
    """Raises ValueError for what is not a segment of a path."""
    if not _SEGMENT.fullmatch(text) or text in (".", ".."):
        raise ValueError(f"{text!r} is no segment of a SPIFFE ID's path: one or more of the characters a-z A-Z 0-9 . - _, and neither . nor ..")
