"""Which Secrets proxies may name, and whether they are there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from control.model.secret import CA_SUFFIX, Secret
from control.model.snapshot import Config, Key
from control.model.traffic import MUTUAL, REFUSED, TlsSettings
from control.translate import tls
from control.translate.uses import Use


def authorities_key(config: Config, where: str, name: str) -> Key | None:
    """The Secret that has the authorities for a credential of this name: one of their own, or that of the certificate."""
    known = config.references.credentials
    return next((key for key in ((where, name + CA_SUFFIX), (where, name)) if key in known and known[key].is_ca), None)


def is_there(config: Config, settings: TlsSettings, namespace: str) -> bool:
    """Whether a caller finds in Secrets of its namespace what its TLS needs of them."""
    if not settings.credential:
        return True
    found = config.references.credentials.get((namespace, settings.credential))
    if settings.mode == MUTUAL and (found is None or not found.is_certificate):
        return False
    return settings.insecure_skip_verify or authorities_key(config, namespace, settings.credential) is not None


class Means(NamedTuple):
    """What callers have to do as rules ask. `edge`: by the documents, they serve gateways; `known`: a document describes them; `grpc`: they are gRPC's own."""

    namespace: str
    identity: bool
    edge: bool
    known: bool
    grpc: bool

    def can_call(self, config: Config, use: Use) -> bool:
        """Whether a caller can do what its rules ask of it. If it cannot, better no cluster than a plain one."""
        settings = use.policy.tls
        if settings is None:
            return True
        if settings.mode == REFUSED or (settings.mode == "ISTIO_MUTUAL" and not self.identity):
            return False
        if not settings.is_originated:
            return True
        return not self.grpc and (not settings.credential or (self._may_name(use) and is_there(config, settings, self.namespace)))

    def _may_name(self, use: Use) -> bool:
        """Whether Secrets that a rule names are for the caller: gateways', and those of rules that select it, as in Istio."""
        return self.edge or (self.known and use.rule is not None and use.rule.selector is not None)


def of_callers(config: Config, uses: Iterable[Use], means: Means, known: Mapping[Key, Secret]) -> Iterator[tuple[str, Secret, bool]]:
    """(name over SDS, what it is, whether its authorities are meant) of all that callers need."""
    for use in uses:
        settings = use.policy.tls
        if settings is None or not settings.credential or not means.can_call(config, use):
            continue
        if settings.mode == MUTUAL:
            yield tls.certificate_name(settings), known[means.namespace, settings.credential], False
        key = authorities_key(config, means.namespace, settings.credential)
        if key is not None and not settings.insecure_skip_verify:
            yield tls.authorities_name(settings), known[key], True
