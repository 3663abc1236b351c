"""TLS on both sides: versions, ALPN, client certificates and who may have them, SANs, origination, what headers and logs say of it.

Reasons of failures are not compared: they are OpenSSL's and BoringSSL's own words.
"""

import ssl
from dataclasses import replace
from typing import Any

from tests.differential.harness import (
    Case,
    Close,
    Echo,
    Play,
    Response,
    Tls,
    Until,
    bootstrap,
    check_cases,
    cluster,
    endpoint,
    file_log,
    filter_,
    get,
    hcm,
    listener,
    req,
    to,
)

LOG = file_log(
    "%RESPONSE_CODE% flags=%RESPONSE_FLAGS% sni=%REQUESTED_SERVER_NAME% version=%DOWNSTREAM_TLS_VERSION% peer=%DOWNSTREAM_PEER_SUBJECT% "
    "uri=%DOWNSTREAM_PEER_URI_SAN% dns=%DOWNSTREAM_PEER_DNS_SAN% local=%DOWNSTREAM_LOCAL_SUBJECT% local_dns=%DOWNSTREAM_LOCAL_DNS_SAN% "
    "issuer=%DOWNSTREAM_PEER_ISSUER% presented=%DOWNSTREAM_PEER_CERT_V_START(%Y)% up_version=%UPSTREAM_TLS_VERSION% up_peer=%UPSTREAM_PEER_SUBJECT% "
    "up_dns=%UPSTREAM_PEER_DNS_SAN%\n",
)
LISTENER_LOG = [
    file_log(
        "listener flags=%RESPONSE_FLAGS% sni=%REQUESTED_SERVER_NAME% termination=%CONNECTION_TERMINATION_DETAILS% "
        "closed=%DOWNSTREAM_LOCAL_CLOSE_REASON%/%DOWNSTREAM_DETECTED_CLOSE_TYPE%\n"
    )
]


def certificate(name: str) -> dict:
    return {"certificate_chain": {"filename": f"${{pem:{name}}}"}, "private_key": {"filename": f"${{key:{name}}}"}}


def trust(*sans: dict, ca: str = "ca", **fields: Any) -> dict:
    """A validation context, with typed SAN matchers."""
    matchers = {"match_typed_subject_alt_names": list(sans)} if sans else {}
    return {"validation_context": {"trusted_ca": {"filename": f"${{pem:{ca}}}"}, **matchers, **fields}}


def san(kind: str, **match: Any) -> dict:
    return {"san_type": kind, "matcher": match}


def secure(
    name: str,
    *,
    server: str = "server",
    common: dict | None = None,
    hcm_options: dict | None = None,
    hosts: Any = None,
    chain_fields: dict | None = None,
    **context: Any,
) -> dict:
    """A TLS listener with a connection manager."""
    tls = {"common_tls_context": {"tls_certificates": [certificate(server)], **(common or {})}, **context}
    chain = {
        "filters": [hcm(name, hosts or to("a"), **({"access_log": [LOG]} | (hcm_options or {})))],
        "transport_socket": {"name": "tls", "typed_config": {"@": "downstream_tls", **tls}},
        **(chain_fields or {}),
    }
    return listener(name, chains=[chain], access_log=LISTENER_LOG)


def upstream(name: str, to_upstream: str = "tls", *, common: dict | None = None, **context: Any) -> dict:
    """A cluster that speaks TLS."""
    tls = {"common_tls_context": common or {}, **context}
    return cluster(name, endpoint(to_upstream, hostname="a.test"), transport_socket={"name": "tls", "typed_config": {"@": "upstream_tls", **tls}})


SPIFFE = "spiffe://mesh.test/ns/default/sa/web"
FORWARD = {"forward_client_cert_details": "SANITIZE_SET", "set_current_client_cert_details": {"subject": True, "cert": False, "dns": True, "uri": True}}
PRINCIPAL = {"authenticated": {"principal_name": {"exact": SPIFFE}}}
UPSTREAMS = (
    "origin",
    "origin_verified",
    "origin_wrong_ca",
    "origin_wrong_san",
    "origin_sni",
    "origin_mtls",
    "origin_mtls_no_certificate",
    "origin_auto_sni",
    "origin_alpn",
)
CONFIG = bootstrap(
    secure("main"),
    secure("rsa", server="rsa"),
    secure("impatient", chain_fields={"transport_socket_connect_timeout": "0.1s"}),
    secure("alpn", common={"alpn_protocols": ["http/1.1"]}),
    secure("tls12", common={"tls_params": {"tls_maximum_protocol_version": "TLSv1_2"}}),
    secure("tls13", common={"tls_params": {"tls_minimum_protocol_version": "TLSv1_3"}}),
    secure("mutual", common=trust(), require_client_certificate=True),
    secure("optional", common=trust()),
    secure("uri", common=trust(san("URI", exact=SPIFFE)), require_client_certificate=True),
    secure("uri_other", common=trust(san("URI", exact="spiffe://mesh.test/ns/default/sa/db")), require_client_certificate=True),
    secure("uri_prefix", common=trust(san("URI", prefix="spiffe://mesh.test/ns/default/")), require_client_certificate=True),
    secure("uri_regex", common=trust(san("URI", safe_regex={"regex": "spiffe://[a-z.]+/ns/.*"})), require_client_certificate=True),
    secure("dns", common=trust(san("DNS", exact="web.mesh.test")), require_client_certificate=True),
    secure("dns_suffix", common=trust(san("DNS", suffix=".mesh.test")), require_client_certificate=True),
    secure("any_of_two", common=trust(san("DNS", exact="x.test"), san("URI", exact=SPIFFE)), require_client_certificate=True),
    secure("forwarding", common=trust(), require_client_certificate=True, hcm_options=FORWARD),
    secure("forward_append", common=trust(), require_client_certificate=True, hcm_options=FORWARD | {"forward_client_cert_details": "APPEND_FORWARD"}),
    secure("forward_only", common=trust(), require_client_certificate=True, hcm_options={"forward_client_cert_details": "FORWARD_ONLY"}),
    secure("rbac", common=trust(), hcm_options={"filters": [filter_("rbac", rules={"action": "ALLOW", "policies": {
        "web": {"permissions": [{"any": True}], "principals": [PRINCIPAL]}}})]}),
    secure("require_tls", hosts=[{"name": "all", "domains": ["*"], "require_tls": "ALL", "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}]}]),
    secure("edge", hcm_options={"use_remote_address": True}),
    secure("matching", hosts=[{"name": "all", "domains": ["*"], "routes": [
        {"match": {"prefix": "/", "tls_context": {"presented": True, "validated": True}},
         "direct_response": {"status": 200, "body": {"inline_string": "validated"}}},
        {"match": {"prefix": "/", "tls_context": {"presented": False}}, "direct_response": {"status": 200, "body": {"inline_string": "anonymous"}}},
    ]}], common=trust()),
    listener("to_origins", hcm("origins", [
        {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}}]} for name in (*UPSTREAMS, "origin_plain")
    ], access_log=[LOG])),
    listener("tcp", chains=[{
        "filters": [filter_("tcp_proxy", stat_prefix="tcp", cluster="echo", access_log=[LOG])],
        "transport_socket": {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": {"tls_certificates": [certificate("server")]}}},
    }]),
    listener("tcp_origin", filter_("tcp_proxy", stat_prefix="tcp_origin", cluster="origin_tcp", access_log=[LOG])),
    clusters=[
        cluster("a"),
        cluster("echo"),
        upstream("origin"),
        upstream("origin_tcp", "tls_echo"),
        upstream("origin_verified", common=trust(san("DNS", exact="a.test")), sni="a.test"),
        upstream("origin_wrong_ca", common=trust(ca="rogue-ca")),
        upstream("origin_wrong_san", common=trust(san("DNS", exact="other.test"))),
        upstream("origin_sni", sni="named.test"),
        upstream("origin_mtls", "mtls", common={"tls_certificates": [certificate("client")]}),
        upstream("origin_mtls_no_certificate", "mtls"),
        upstream("origin_auto_sni") | {"typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@": "http_options", "explicit_http_config": {"http_protocol_options": {}}, "upstream_http_protocol_options": {"auto_sni": True}}}},
        upstream("origin_alpn", common={"alpn_protocols": ["other", "http/1.1"]}),
        upstream("origin_plain", "a"),
    ],
)  # fmt: skip

CLIENT = Tls(certificate="client")
ROGUE = Tls(certificate="rogue")
NOBODY = Tls(certificate="nosan")
MUTUAL = ("mutual", "uri", "uri_other", "uri_prefix", "uri_regex", "dns", "dns_suffix", "any_of_two")


def tls(name: str, on: str, by: Tls, request: bytes | None = None, **fields: Any) -> Case:
    return Case(name, request or get(), on=on, tls=by, **fields)


def may_fail(on: str, who: str, by: Tls) -> Case:
    """A handshake that may be refused: the client sees that only when it reads."""
    return Case(f"{on}_{who}", [get(), Response()], on=on, tls=by, then="leave")


CASES = [
    tls("plain_tls", "main", Tls()),
    tls("without_sni", "main", Tls(sni=None)),
    tls("post", "main", Tls(), req("POST", "/", body=b"x" * 20_000)),
    tls("two_requests", "main", Tls()),
    Case("connection_close", [get("/", "Connection: close"), Response()], on="main", tls=Tls(), then="closed"),
    Case("plaintext_to_tls", [get(), Response()], on="main", then="closed"),
    Case("gone_before_the_handshake", [Close()], on="main", then="leave"),
    Case("no_handshake", [], on="impatient", then="closed"),
    tls("alpn_offered", "alpn", Tls(alpn=("http/1.1",))),
    tls("alpn_unknown", "alpn", Tls(alpn=("spdy",))),
    tls("alpn_none", "alpn", Tls()),
    tls("tls_1_2", "tls12", Tls()),
    tls("tls_1_3", "tls13", Tls()),
    Case("tls_1_3_refuses_1_2", [get(), Response()], on="tls13", tls=Tls(maximum=ssl.TLSVersion.TLSv1_2), then="leave"),
    tls("tls_1_2_client", "main", Tls(maximum=ssl.TLSVersion.TLSv1_2)),
    tls("curve_p256", "main", Tls(curve="prime256v1")),
    tls("curve_p256_tls_1_2", "main", Tls(curve="prime256v1", maximum=ssl.TLSVersion.TLSv1_2)),
    tls("signed_tls_1_2", "mutual", replace(CLIENT, maximum=ssl.TLSVersion.TLSv1_2)),
    tls("signed_with_rsa", "mutual", Tls(certificate="rsa")),
    tls("signed_with_rsa_tls_1_2", "mutual", Tls(certificate="rsa", maximum=ssl.TLSVersion.TLSv1_2)),
    tls("server_with_rsa", "rsa", Tls()),
    tls("server_with_rsa_tls_1_2", "rsa", Tls(maximum=ssl.TLSVersion.TLSv1_2)),
    *[may_fail(on, who, by) for on in MUTUAL for who, by in {"client": CLIENT, "rogue": ROGUE, "nosan": NOBODY, "none": Tls()}.items()],
    may_fail("optional", "client", CLIENT),
    may_fail("optional", "rogue", ROGUE),
    may_fail("optional", "none", Tls()),
    tls("forward_certificate", "forwarding", CLIENT, get("/", "X-Forwarded-Client-Cert: By=forged")),
    tls("forward_append", "forward_append", CLIENT, get("/", "X-Forwarded-Client-Cert: By=earlier")),
    tls("forward_certificate_of_a_plain_head", "forwarding", CLIENT, get("/")),
    tls("forward_append_to_nothing", "forward_append", CLIENT, get("/")),
    tls("forward_append_to_what_a_sidecar_sends", "forward_append", CLIENT, get("/", "x-forwarded-proto: http", "x-request-id: 1", "x-envoy-attempt-count: 1")),
    # What is remembered of heads that repeat themselves is for the client's certificate, too.
    Case("forward_certificate_again", [get("/"), Response()] * 6, on="forwarding", tls=CLIENT),
    Case("forward_append_again", [get("/"), Response()] * 6, on="forward_append", tls=CLIENT),
    Case("forward_append_again_to_what_a_sidecar_sends", [get("/", "x-forwarded-proto: http", "x-envoy-attempt-count: 1"), Response()] * 6,
         on="forward_append", tls=CLIENT),
    Case("forward_append_now_and_then", [get("/"), Response(), get("/", "X-Forwarded-Client-Cert: By=earlier"), Response()] * 4,
         on="forward_append", tls=CLIENT),
    tls("forward_only", "forward_only", CLIENT, get("/", "X-Forwarded-Client-Cert: By=earlier")),
    tls("certificate_header_sanitised", "main", Tls(), get("/", "X-Forwarded-Client-Cert: By=forged")),
    tls("rbac_principal", "rbac", CLIENT),
    tls("rbac_no_certificate", "rbac", Tls()),
    tls("require_tls_satisfied", "require_tls", Tls()),
    tls("forwarded_proto", "main", Tls()),
    tls("forwarded_proto_edge", "edge", Tls(), get("/", "X-Forwarded-Proto: http")),
    tls("https_absolute_form", "main", Tls(), req("GET", "https://a.test/x")),
    tls("http_absolute_form", "main", Tls(), req("GET", "http://a.test/x")),
    tls("match_validated", "matching", CLIENT),
    tls("match_anonymous", "matching", Tls()),
    # ---- origination
    *[Case(f"to_{name}", get(host=f"{name}.test"), on="to_origins") for name in UPSTREAMS],
    Case("to_plaintext", get(host="origin_plain.test"), on="to_origins", skip=("upstream",), note="each TLS library has a ClientHello of its own"),
    Case("tcp_over_tls", [b"hello", Until(b"hello"), Close()], Play([[Echo(), Close()]], on_connect=True), on="tcp", tls=Tls(), then="leave"),
    Case("tcp_to_tls", [b"hello", Until(b"hello"), Close()], Play([[Echo(), Close()]], on_connect=True), on="tcp_origin", then="leave"),
]  # fmt: skip

test_case = check_cases(CASES)
