"""Client certificates whose names are nearly right: an identity is compared byte for byte (CVE-2026-47778: a NUL cut it short), and only if the chain is."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.attack.target import Target, arena, http
from tests.differential import pki
from tests.differential.config import cluster, filter_, to
from tests.differential.rig import Tls

SPIFFE = "spiffe://mesh.test/ns/default/sa/web"
FORGED = {
    "nul_suffix": [f"{SPIFFE}\0.evil.test"],
    "nul_prefix": [f"spiffe://evil.test\0{SPIFFE}"],
    "longer": [f"{SPIFFE}2"],
    "shorter": [SPIFFE[:-1]],
    "upper_case": [SPIFFE.upper()],
    "trailing_slash": [f"{SPIFFE}/"],
    "trailing_space": [f"{SPIFFE} "],
    "new_line": [f"{SPIFFE}\n"],
    "dots": ["spiffe://mesh.test/ns/x/../default/sa/web"],
    "encoded": ["spiffe://mesh.test/ns/default/sa/%77eb"],
    "port": ["spiffe://mesh.test:443/ns/default/sa/web"],
    "user": ["spiffe://x@mesh.test/ns/default/sa/web"],
    "query": [f"{SPIFFE}?x"],
    "as_dns": ["mesh.test"],
    "dns_nul": ["web.mesh.test\0.evil.test"],
    "separators": [f"spiffe://evil.test/;URI={SPIFFE}", "spiffe://evil.test/,By=x"],
    "no_name": [],
    'quoted";URI=x': ["spiffe://evil.test/\r\nX-Injected: 1", "evil.test\r\nX-Injected: 1"],
}
HONEST = [SPIFFE, "web.mesh.test"]


def secure(name: str, *sans: dict[str, Any], principal: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A listener that wants a certificate of the forgers' own authority, which is trusted here."""
    if principal:
        policy = {"permissions": [{"any": True}], "principals": [{"authenticated": {"principal_name": principal}}]}
        options["filters"] = [filter_("rbac", rules={"action": "ALLOW", "policies": {"p": policy}})]
    listener = http(name, to("a"), **options)
    validation = {"trusted_ca": {"filename": "${pem:forger}"}, **({"match_typed_subject_alt_names": list(sans)} if sans else {})}
    certificate = {"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}
    context = {
        "@": "downstream_tls",
        "common_tls_context": {"tls_certificates": [certificate], "validation_context": validation},
        "require_client_certificate": True,
    }
    listener["filter_chains"][0]["transport_socket"] = {"name": "tls", "typed_config": context}
    return listener


def san(kind: str, **match: Any) -> dict[str, Any]:
    return {"san_type": kind, "matcher": match}


CONFIG = arena(
    http("main", to("a")),
    secure("by_uri", san("URI", exact=SPIFFE)),
    secure("by_dns", san("DNS", exact="web.mesh.test")),
    secure("by_regex", san("URI", safe_regex={"regex": "spiffe://mesh\\.test/ns/default/sa/web"})),
    secure("by_principal", principal={"exact": SPIFFE}),
    secure("forwarding", forward_client_cert_details="SANITIZE_SET", set_current_client_cert_details={"uri": True, "dns": True, "subject": True}),
    clusters=[cluster("a")],
)


@pytest.fixture(scope="session")
def pki_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual certificates, and the forgers'."""
    folder = tmp_path_factory.mktemp("forged")
    pki.create(folder)
    authority = pki.Authority(folder, "forger")
    authority.issue("honest", *HONEST)
    for name, sans in FORGED.items():
        authority.issue(name, *sans)
    return folder


async def ask(target: Target, listener: str, certificate: str) -> bytes:
    """What a client with that certificate is told; nothing when its handshake fails."""
    try:
        wire = await target.connect(listener, Tls(certificate=certificate))
    except (ssl.SSLError, OSError):
        return b""
    wire.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nX-Forwarded-Client-Cert: By=x;URI=" + SPIFFE.encode() + b"\r\n\r\n")
    return (await target.read(wire)).data


@pytest.mark.parametrize("listener", ["by_uri", "by_dns", "by_regex", "by_principal"])
async def test_forged_names_are_refused(target: Target, listener: str):
    """None of them gets an answer of the upstream."""
    assert (await ask(target, listener, "honest")).startswith(b"HTTP/1.1 200 ")
    for name in FORGED:
        assert not (await ask(target, listener, name)).startswith(b"HTTP/1.1 200 "), name
    assert sum(wire.received.count(b"GET / ") for wire in target.upstreams["a"].connections) == 1


@pytest.mark.parametrize("listener", ["by_uri", "by_principal", "forwarding"])
@pytest.mark.parametrize("certificate", ["client", "rogue"])
async def test_other_authorities_are_refused(target: Target, listener: str, certificate: str):
    """The right name, of somebody whom nobody trusts."""
    assert not await ask(target, listener, certificate)
    assert not target.upstreams["a"].connections


async def test_forwarded_identity_is_what_the_certificate_says(target: Target):
    """X-Forwarded-Client-Cert is ours alone: what the client sent of it is gone, and no name can add an element of its own."""
    for name in FORGED:
        await ask(target, "forwarding", name)
    seen = [line for wire in target.upstreams["a"].connections for line in bytes(wire.received).split(b"\r\n")]
    assert not any(line.lower().startswith(b"x-injected") for line in seen)
    elements = [line for line in seen if line.startswith(b"x-forwarded-client-cert:")]
    assert len(elements) == len(FORGED)
    for line, names in zip(elements, FORGED.values(), strict=True):
        assert not set(line) & set(b"\n\0")
        assert line.count(b",") == line.count(b",O=tests")
        assert line.count(b";URI=") - line.count(b"quoted") == max(1, sum(":/" in name for name in names))
        assert line.startswith(b"x-forwarded-client-cert: Hash=")
        assert not line.endswith(f";URI={SPIFFE}".encode())
