"""Static secrets: how references are resolved, and which lead nowhere. Each text of an error is Envoy's."""

from __future__ import annotations

from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.api.secrets import Secrets, inline, names
from tests.unit.net_help import message

TLS = "envoy.extensions.transport_sockets.tls.v3."
CERTIFICATE = {"certificate_chain": {"inline_string": "chain"}, "private_key": {"inline_string": "key"}}
SECRETS = [
    {"name": "own", "tls_certificate": CERTIFICATE},
    {"name": "ca", "validation_context": {"trusted_ca": {"inline_string": "authority"}, "verify_certificate_hash": ["b"]}},
]


def secrets(*documents: dict[str, Any]) -> Secrets:
    return Secrets([message(f"{TLS}Secret", document) for document in documents or SECRETS])


def context(**fields: Any) -> Any:
    return message(f"{TLS}CommonTlsContext", fields)


def test_references_become_what_they_name():
    referring = context(tls_certificate_sds_secret_configs=[{"name": "own"}], validation_context_sds_secret_config={"name": "ca"})
    assert names(referring) == (["own"], "ca")
    inline(referring, secrets())
    assert referring == context(tls_certificates=[CERTIFICATE], validation_context=SECRETS[1]["validation_context"])
    assert names(referring) == ([], "")


def test_combined_contexts_are_merged():
    default = {"verify_certificate_hash": ["a"], "allow_expired_certificate": True}
    combined = {"default_validation_context": default, "validation_context_sds_secret_config": {"name": "ca"}}
    referring = context(combined_validation_context=combined)
    assert names(referring) == ([], "ca")
    inline(referring, secrets())
    expected = {"trusted_ca": {"inline_string": "authority"}, "verify_certificate_hash": ["a", "b"], "allow_expired_certificate": True}
    assert referring == context(validation_context=expected)


def test_without_references_nothing_changes():
    plain = context(tls_certificates=[CERTIFICATE], alpn_protocols=["h2"])
    inline(plain, None)
    assert plain == context(tls_certificates=[CERTIFICATE], alpn_protocols=["h2"])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tls_certificate_sds_secret_configs": [{"name": "own"}, {"name": "ca"}]}, "tls_certificate_sds_secret_configs[1].name: Unknown static secret: ca"),
        (
            {"validation_context_sds_secret_config": {"name": "own"}},
            "validation_context_sds_secret_config.name: Unknown static certificate validation context: own",
        ),
        (
            {"tls_certificates": [CERTIFICATE], "tls_certificate_sds_secret_configs": [{"name": "own"}]},
            "tls_certificate_sds_secret_configs: SDS and non-SDS TLS certificates may not be mixed",
        ),
    ],
)
def test_references_that_lead_nowhere(fields, problem):
    with pytest.raises(ConfigError) as caught:
        inline(context(**fields), secrets())
    assert str(caught.value.problems[0]).startswith(problem)


def test_unknown_without_any_secret():
    with pytest.raises(ConfigError, match="Unknown static secret: own"):
        inline(context(tls_certificate_sds_secret_configs=[{"name": "own"}]), None)


def test_names_are_unique_by_kind():
    secrets({"name": "same", "tls_certificate": CERTIFICATE}, {"name": "same", "validation_context": {}})
    with pytest.raises(ConfigError, match="Duplicate static TlsCertificate secret name same"):
        secrets({"name": "same", "tls_certificate": CERTIFICATE}, {"name": "same", "tls_certificate": CERTIFICATE})
    with pytest.raises(ConfigError, match="Secret type not implemented"):
        secrets({"name": "empty"})
