"""What main gathers of the certificates in a configuration: for /certs, and for the gauges that say when they expire."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from meshproxy.admin import certs
from meshproxy.net.certificate import pem_certificates
from meshproxy.observe.stats import Store
from tests.unit.net_help import DOWNSTREAM_TLS, UPSTREAM_TLS, message, own, pki


def socket(type_url: str, common: dict[str, Any]) -> dict[str, Any]:
    return {"name": "tls", "typed_config": {"@type": type_url, "common_tls_context": common}}


def collected(common: dict[str, Any], **cluster: Any) -> tuple[certs.Certificates, Any]:
    """What there is, and a server for it."""
    address = {"socket_address": {"address": "127.0.0.1", "port_value": 443}}
    listener = {"address": address, "filter_chains": [{"transport_socket": socket(DOWNSTREAM_TLS, common)}, {}]}
    secrets = [{"name": "own", "tls_certificate": own("server")}, {"name": "ca", "validation_context": {"trusted_ca": {"filename": pki()["ca.pem"]}}}]
    resources = {"listeners": [listener], "clusters": [{"name": "c", **cluster}], "secrets": secrets}
    server = SimpleNamespace(dynamic=None, listeners_manager=None, stats=Store())
    bootstrap = message("envoy.config.bootstrap.v3.Bootstrap", {"static_resources": resources})
    return certs.Certificates(bootstrap, bootstrap.SerializeToString()), server


def expiry(name: str) -> int:
    return pem_certificates(Path(pki()[f"{name}.pem"]).read_bytes())[0].not_after


def gauges(found: certs.Certificates, server: Any) -> dict[str, int]:
    found.refresh(server)
    return {name: server.stats.value(name) for name in server.stats.metrics}


def test_by_the_names_of_secrets():
    common = {"tls_certificate_sds_secret_configs": [{"name": "own"}], "validation_context_sds_secret_config": {"name": "ca"}}
    upstream = {"transport_socket": socket(UPSTREAM_TLS, {"tls_certificate_sds_secret_configs": [{"name": "own"}]})}
    assert gauges(*collected(common, alt_stat_name="other", **upstream)) == {
        "listener.127.0.0.1_443.ssl.certificate.own.expiration_unix_time_seconds": expiry("server"),
        "listener.127.0.0.1_443.ssl.certificate.ca.expiration_unix_time_seconds": expiry("ca"),
        "cluster.other.ssl.certificate.own.expiration_unix_time_seconds": expiry("server"),
    }


def test_without_names():
    inline = Path(pki()["server.pem"]).read_bytes()
    key = own("server")["private_key"]
    given = {"certificate_chain": {"inline_bytes": b64encode(inline).decode()}, "private_key": key}
    common = {"tls_certificates": [given, own("other")], "validation_context": {"trusted_ca": {"filename": pki()["ca.pem"]}}}
    prefix = "listener.127.0.0.1_443.ssl.certificate."
    assert gauges(*collected(common)) == {
        f"{prefix}unnamed_cert_{sha256(inline).hexdigest()[:8]}.expiration_unix_time_seconds": expiry("server"),
        f"{prefix}unnamed_cert_e3b0c442.expiration_unix_time_seconds": expiry("other"),
        f"{prefix}unnamed_ca_cert_e3b0c442.expiration_unix_time_seconds": expiry("ca"),
    }


def test_contexts_without_certificates_are_shown():
    found, server = collected({}, transport_socket=socket(UPSTREAM_TLS, {}))
    assert [(bundle.prefix, bundle.chains, bundle.authorities) for bundle in found.bundles(server)] == [
        ("listener.127.0.0.1:443.", [], []),
        ("cluster.c.", [], []),
    ]
