"""Static secrets: certificates and validation contexts that a bootstrap gives names, and TLS contexts refer to by an `SdsSecretConfig` without a source."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from meshproxy.api import messages, registry
from meshproxy.api.errors import fail, under

TLS = b"TlsContext"  # what a serialised message with a TLS context has in it, as the end of the name of its type
_WRAPPER = ".ProxyProtocolUpstreamTransport"
_TLS = "envoy.extensions.transport_sockets.tls.v3."
HONOURS = {
    f"{_TLS}Secret": "name tls_certificate validation_context",
    f"{_TLS}SdsSecretConfig": "name sds_config",
    f"{_TLS}CommonTlsContext": "tls_certificate_sds_secret_configs validation_context_sds_secret_config combined_validation_context",
    f"{_TLS}CommonTlsContext.CombinedCertificateValidationContext": "default_validation_context validation_context_sds_secret_config",
}


class MissingSecret(Exception):
    """A secret by discovery has not come yet."""


class Watcher(Protocol):
    """Who made something of secrets."""

    def secrets_changed(self) -> None:
        """One of them is new."""


class Secrets:
    """The secrets of `static_resources`, by kind and name, and those that came by discovery, by key (`key_of`) and serialised (`discovered`)."""

    __slots__ = ("_certificates", "_validations", "_watchers", "discovered")

    def __init__(self, protos: Iterable[Any] = (), discovered: Mapping[bytes, bytes] | None = None) -> None:
        """Raises ConfigError when two of a kind have the same name."""
        self.discovered: dict[bytes, bytes] = dict(discovered or {})
        self._watchers: dict[bytes, weakref.WeakSet[Watcher]] = {}
        self._certificates: dict[str, Any] = {}
        self._validations: dict[str, Any] = {}
        for at, secret in enumerate(protos):
            kind = secret.WhichOneof("type")
            if kind is None:
                fail(f"[{at}]", "Secret type not implemented")
            known, what = (self._certificates, "TlsCertificate") if kind == "tls_certificate" else (self._validations, "CertificateValidationContext")
            if secret.name in known:
                fail(f"[{at}].name", f"Duplicate static {what} secret name {secret.name}")
            known[secret.name] = getattr(secret, kind)

    def certificate(self, reference: Any) -> Any:
        """The TlsCertificate that an SdsSecretConfig names. Raises ConfigError."""
        if reference.HasField("sds_config"):
            return self._came(reference).tls_certificate
        return _find(self._certificates, reference, "static secret")

    def validation(self, reference: Any) -> Any:
        """The CertificateValidationContext that an SdsSecretConfig names. Raises ConfigError."""
        if reference.HasField("sds_config"):
            return self._came(reference).validation_context
        return _find(self._validations, reference, "static certificate validation context")

    def _came(self, reference: Any) -> Any:
        serialised = self.discovered.get(key_of(reference))
        if serialised is None:
            raise MissingSecret(reference.name)
        return messages.known(f"{_TLS}Secret").FromString(serialised)

    def watch(self, keys: Iterable[bytes], watcher: Watcher) -> None:
        """Tell `watcher` of new versions as long as it lives. Held weakly."""
        for key in keys:
            self._watchers.setdefault(key, weakref.WeakSet()).add(watcher)

    def update(self, key: bytes, serialised: bytes) -> None:
        """A secret has come; empty: nobody needs it any more."""
        if not serialised:
            self.discovered.pop(key, None)
            self._watchers.pop(key, None)
            return
        self.discovered[key] = serialised
        for watcher in list(self._watchers.get(key, ())):
            watcher.secrets_changed()


def key_of(reference: Any) -> bytes:
    """What an SdsSecretConfig with a source is known by: two of equal contents are one subscription."""
    return bytes(reference.SerializeToString(deterministic=True))


def discovered(context: Any) -> Iterator[tuple[Any, str]]:
    """The references of a CommonTlsContext to secrets that come by discovery, with the kind of each."""
    found = [(reference, "tls_certificate") for reference in context.tls_certificate_sds_secret_configs]
    which = context.WhichOneof("validation_context_type")
    if which == "validation_context_sds_secret_config":
        found.append((context.validation_context_sds_secret_config, "validation_context"))
    elif which == "combined_validation_context":
        found.append((context.combined_validation_context.validation_context_sds_secret_config, "validation_context"))
    return ((reference, kind) for reference, kind in found if reference.HasField("sds_config"))


def references(holder: Any) -> Iterator[tuple[Any, str]]:
    """The SdsSecretConfig messages of a Listener or a Cluster that have a source, and the kind of each."""
    for socket in _sockets(holder):
        if socket.WhichOneof("config_type") is None:
            continue
        config = registry.unpack(socket.typed_config)
        if "common_tls_context" in config.DESCRIPTOR.fields_by_name:
            yield from discovered(config.common_tls_context)


def _sockets(holder: Any) -> Iterator[Any]:
    if "filter_chains" in holder.DESCRIPTOR.fields_by_name:
        for chain in (*holder.filter_chains, holder.default_filter_chain):
            if chain.HasField("transport_socket"):
                yield chain.transport_socket
        return
    for one in (holder, *holder.transport_socket_matches):
        if one.HasField("transport_socket"):
            yield innermost(one.transport_socket)


def innermost(socket: Any) -> Any:
    """The TransportSocket that carries the bytes, of one that another may wrap."""
    while socket.typed_config.type_url.endswith(_WRAPPER):
        socket = registry.unpack(socket.typed_config).transport_socket
    return socket


def inline(context: Any, secrets: Secrets | None) -> None:
    """Put the secrets into the place of the references to them. `context`: a CommonTlsContext, changed. Raises ConfigError for unknown names."""
    secrets = secrets or Secrets()
    references = context.tls_certificate_sds_secret_configs
    if references and context.tls_certificates:
        fail("tls_certificate_sds_secret_configs", "SDS and non-SDS TLS certificates may not be mixed")
    for at, reference in enumerate(references):
        with under(f"tls_certificate_sds_secret_configs[{at}]"):
            context.tls_certificates.append(secrets.certificate(reference))
    context.ClearField("tls_certificate_sds_secret_configs")
    which = context.WhichOneof("validation_context_type")
    if which == "validation_context_sds_secret_config":
        with under(which):
            context.validation_context.CopyFrom(secrets.validation(context.validation_context_sds_secret_config))
    elif which == "combined_validation_context":
        combined = context.combined_validation_context
        merged = combined.default_validation_context
        with under(f"{which}.validation_context_sds_secret_config"):
            merged.MergeFrom(secrets.validation(combined.validation_context_sds_secret_config))
        context.validation_context.MergeFromString(merged.SerializeToString())  # setting it clears `combined`


def _find(known: dict[str, Any], reference: Any, what: str) -> Any:
    found = known.get(reference.name)
    if found is None:
        fail("name", f"Unknown {what}: {reference.name}")
    return found


def names(context: Any) -> tuple[list[str], str]:
    """The names of the secrets that a CommonTlsContext refers to: of its certificates, and of its validation context or ""."""
    which = context.WhichOneof("validation_context_type")
    validation = ""
    if which == "validation_context_sds_secret_config":
        validation = context.validation_context_sds_secret_config.name
    elif which == "combined_validation_context":
        validation = context.combined_validation_context.validation_context_sds_secret_config.name
    return [reference.name for reference in context.tls_certificate_sds_secret_configs], validation
