"""Static secrets: certificates and validation contexts that a bootstrap gives names, and TLS contexts refer to by an `SdsSecretConfig` without a source."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshproxy.api.errors import fail, under

_TLS = "envoy.extensions.transport_sockets.tls.v3."
HONOURS = {
    f"{_TLS}Secret": "name tls_certificate validation_context",
    f"{_TLS}SdsSecretConfig": "name",
    f"{_TLS}CommonTlsContext": "tls_certificate_sds_secret_configs validation_context_sds_secret_config combined_validation_context",
    f"{_TLS}CommonTlsContext.CombinedCertificateValidationContext": "default_validation_context validation_context_sds_secret_config",
}


class Secrets:
    """The secrets of `static_resources`, by kind and name."""

    __slots__ = ("_certificates", "_validations")

    def __init__(self, protos: Iterable[Any] = ()) -> None:
        """Raises ConfigError when two of a kind have the same name."""
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
        return _find(self._certificates, reference, "static secret")

    def validation(self, reference: Any) -> Any:
        """The CertificateValidationContext that an SdsSecretConfig names. Raises ConfigError."""
        return _find(self._validations, reference, "static certificate validation context")


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
