"""Kubernetes' Secret and ConfigMap, as far as they hold certificates, and the Gateway API's ReferenceGrant.

Nothing that a Secret says is ever repeated in a message.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from control.kinds import telemetry
from control.kinds.common import Meta
from control.kinds.fields import Fields
from control.model.secret import CaBundle, ReferenceGrant, Referrer, Secret
from control.model.telemetry import MeshConfig

_CHAIN_AND_KEY = (("tls.crt", "tls.key"), ("cert", "key"))
_AUTHORITIES = (("ca.crt", "ca.crl"), ("cacert", "crl"))
_TLS = "kubernetes.io/tls"


def is_for_us(document: dict[str, Any]) -> bool:
    """Whether a Secret or a ConfigMap may have anything for a mesh."""
    meta = document.get("metadata") or {}
    if document["kind"] == "ConfigMap" and telemetry.is_mesh_config(Meta(str(meta.get("name")), str(meta.get("namespace")), {}, {})):
        return True
    names = {name for field in ("data", "stringData") for name in document.get(field) or ()}
    return document.get("type") == _TLS or any(names.issuperset(pair) for pair in _CHAIN_AND_KEY) or any(pair[0] in names for pair in _AUTHORITIES)


def parse_secret(meta: Meta, body: Fields) -> Secret | None:
    """A Secret with a certificate (`tls.crt` and `tls.key`, or `cert` and `key`) or authorities (`ca.crt`, or `cacert`). Others are for others."""
    kind = body.text("type", "Opaque")
    data = _data(body)
    chain_name, key_name = next((pair for pair in _CHAIN_AND_KEY if pair[0] in data and pair[1] in data), ("", ""))
    ca_name, crl_name = next((pair for pair in _AUTHORITIES if pair[0] in data), ("", ""))
    if not chain_name and kind == _TLS:
        for name in ("tls.crt", "tls.key"):
            if name not in data:
                body.error(f"data[{name}]", f"is needed in a Secret of type {_TLS}")
        return None
    if not chain_name and not ca_name:
        return None
    for name in (chain_name, key_name, ca_name, crl_name):
        if name in data and data[name] is None:
            return None  # said already
    chain, key, ca, crl = (data.get(name) or "" for name in (chain_name, key_name, ca_name, crl_name))
    if chain_name:
        _check_pair(body, chain_name, chain, key_name, key)
    if ca_name:
        _check_certificates(body, ca_name, ca)
    return Secret(meta.name, meta.namespace, chain, key, ca, crl)


def parse_config_map(meta: Meta, body: Fields) -> CaBundle | MeshConfig | None:
    """A ConfigMap with `ca.crt` or `cacert`, or Istio's own with its MeshConfig. Others are for others."""
    if telemetry.is_mesh_config(meta):
        body.rest()
        return telemetry.parse_mesh_config(body)
    data = body.rest().get("data")
    if not isinstance(data, dict):
        return None
    name = next((name for name, _ in _AUTHORITIES if data.get(name)), "")
    pem = data.get(name)
    if not name or not isinstance(pem, str):
        return None
    _check_certificates(body, name, pem)
    return CaBundle(meta.name, meta.namespace, pem)


def parse_reference_grant(meta: Meta, body: Fields) -> ReferenceGrant:
    """`spec` of a ReferenceGrant."""
    spec = body.need("spec")
    return ReferenceGrant(
        meta.name,
        meta.namespace,
        spec.each("from", lambda one: Referrer(one.text("group"), one.text("kind", required=True), one.text("namespace", required=True)), required=True),
        spec.each("to", lambda one: (one.text("group"), one.text("kind", required=True), one.text("name")), required=True),
    )


def _data(body: Fields) -> dict[str, str | None]:
    """`data` decoded and `stringData` over it; None for what is neither text nor base64 of it, which is noted if it matters to us."""
    found: dict[str, str | None] = {}
    ours = {name for pair in (*_CHAIN_AND_KEY, *_AUTHORITIES) for name in pair}
    for field in ("data", "stringData"):
        values = body.rest().get(field)
        if not isinstance(values, dict):
            if values is not None:
                body.error(field, "must be a mapping")
            continue
        for name, value in values.items():
            if name not in ours:
                continue
            found[name] = None
            if not isinstance(value, str):
                body.error(f"{field}[{name}]", "must be text")
                continue
            try:
                found[name] = value if field == "stringData" else base64.b64decode("".join(value.split()), validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                body.error(f"{field}[{name}]", "must be base64 of PEM")
    return found


def _check_certificates(body: Fields, name: str, pem: str) -> None:
    from cryptography import x509

    try:
        x509.load_pem_x509_certificates(pem.encode())
    except ValueError:
        body.error(f"data[{name}]", "no certificates in PEM")


def _check_pair(body: Fields, chain_name: str, chain: str, key_name: str, key: str) -> None:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        leaf = x509.load_pem_x509_certificates(chain.encode())[0]
    except ValueError:
        body.error(f"data[{chain_name}]", "no certificates in PEM")
        return
    try:
        private = load_pem_private_key(key.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        body.error(f"data[{key_name}]", "no private key in PEM without a password")
        return
    if private.public_key() != leaf.public_key():
        body.error(f"data[{key_name}]", f"is not the key of {chain_name}")
