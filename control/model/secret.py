"""Certificates and authorities that documents bring, and who may refer to what in other namespaces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

CA_SUFFIX = "-cacert"  # of the Secret beside a certificate's that has the authorities, and of their name over SDS


@dataclass(frozen=True, slots=True, eq=False)
class Secret:
    """A Secret with a certificate chain and its key, authorities to trust, or both; all are PEM."""

    name: str
    namespace: str
    chain: str = ""
    key: str = field(default="", repr=False)
    ca: str = ""
    crl: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class CaBundle:
    """A ConfigMap with authorities to trust, as PEM."""

    name: str
    namespace: str
    pem: str


class Credential(NamedTuple):
    """What a Secret is good for."""

    is_certificate: bool
    is_ca: bool


class Referrer(NamedTuple):
    """Who refers to something: group and kind of the document, and its namespace."""

    group: str
    kind: str
    namespace: str


class Referent(NamedTuple):
    """What is referred to; the core's group is empty."""

    group: str
    kind: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceGrant:
    """What documents of other namespaces may refer to in `namespace`. `to`: (group, kind, name), any name if that is empty."""

    name: str
    namespace: str
    origins: tuple[Referrer, ...]
    to: tuple[tuple[str, str, str], ...]

    def allows(self, who: Referrer, what: Referent) -> bool:
        return (
            self.namespace == what.namespace
            and who in self.origins
            and any((group, kind) == what[:2] and name in ("", what.name) for group, kind, name in self.to)
        )


def is_granted(grants: Iterable[ReferenceGrant], who: Referrer, what: Referent) -> bool:
    """Whether `who` may refer to `what`: within a namespace always, beyond it if that namespace says so."""
    return who.namespace == what.namespace or any(grant.allows(who, what) for grant in grants)
