"""The secrets that a source keeps fresh, for whoever watches them.

    provider = Provider()
    source.run(provider.publish)                              # a task
    watch = provider.watch("default", lambda secret: ...)     # called at once when it is known, and whenever it changes
    watch.close()

Names are Istio's, `default` for the own certificate and `ROOTCA` for the roots, and SPIRE's, which are the SPIFFE IDs of the workload and of trust domains.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.serialization import Encoding

from meshproxy.api import messages
from meshproxy.identity.svid import Svid
from meshproxy.record import Record

if TYPE_CHECKING:
    from cryptography import x509

log = logging.getLogger("meshproxy.identity")

OWN, ROOTS = "default", "ROOTCA"
SECRET = "envoy.extensions.transport_sockets.tls.v3.Secret"


class Secret(Record, frozen=True):
    """A version of a secret. `proto`: envoy.extensions.transport_sockets.tls.v3.Secret, not to be changed; `version` says nothing about what is in it."""

    name: str
    version: str
    proto: Any

    def __repr__(self) -> str:
        return f"<Secret {self.name} {self.version}>"  # never the contents


class Watch:
    """Somebody's wish to know a secret."""

    def __init__(self, provider: Provider, name: str, call: Callable[[Secret], None]) -> None:
        self.name = name
        self._provider = provider
        self._call = call
        self._seen = ""

    def tell(self, secret: Secret) -> None:
        """Call, unless it is the version that was told before."""
        if secret.version != self._seen:
            self._seen = secret.version
            try:
                self._call(secret)
            except Exception:  # who watches must not keep the others, or the renewal, from going on
                log.exception("whoever watches secret %s failed", self.name)

    def close(self) -> None:
        """No longer wanted."""
        self._provider.forget(self)


class Provider:
    """What is held now, as secrets by name."""

    def __init__(self) -> None:
        self.svid: Svid | None = None
        self._secrets: dict[str, Secret] = {}
        self._watches: list[Watch] = []

    def publish(self, svid: Svid) -> None:
        """There is a new certificate, or there are other roots."""
        self.svid = svid
        self._secrets = {secret.name: secret for secret in _secrets(svid)}
        for watch in tuple(self._watches):
            found = self._secrets.get(watch.name)
            if found is not None:
                watch.tell(found)

    def get(self, name: str) -> Secret | None:
        """A secret as it is now; None while there is none of that name."""
        return self._secrets.get(name)

    def watch(self, name: str, call: Callable[[Secret], None]) -> Watch:
        """Be told of a secret; at once, if it is there. What `call` raises is logged."""
        watch = Watch(self, name, call)
        self._watches.append(watch)
        found = self._secrets.get(name)
        if found is not None:
            watch.tell(found)
        return watch

    def forget(self, watch: Watch) -> None:
        """See Watch.close."""
        if watch in self._watches:
            self._watches.remove(watch)

    def __repr__(self) -> str:
        return f"<Provider of {self.svid!r}>"


def _secrets(svid: Svid) -> list[Secret]:
    chain, key, roots = pem(svid.chain), svid.key_pem, pem(svid.bundle)
    found = []
    for name in (OWN, str(svid.identity)):
        proto = messages.known(SECRET)(name=name)
        proto.tls_certificate.certificate_chain.inline_bytes = chain
        proto.tls_certificate.private_key.inline_bytes = key
        found.append(Secret(name, _version(chain), proto))
    bundles = {ROOTS: roots, f"spiffe://{svid.identity.trust_domain}": roots, **{name: pem(certificates) for name, certificates in svid.federated}}
    for name, bundle in bundles.items():
        proto = messages.known(SECRET)(name=name)
        proto.validation_context.trusted_ca.inline_bytes = bundle
        found.append(Secret(name, _version(bundle), proto))
    return found


def pem(certificates: tuple[x509.Certificate, ...]) -> bytes:
    """One after the other."""
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


def _version(public: bytes) -> str:
    """Of what everybody may know: the hash of a key would tell whether a guess is right."""
    return hashlib.sha256(public).hexdigest()[:16]
