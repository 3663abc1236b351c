"""Fields of TLS and of what looks at connections before it that few set: revocation, pins, ciphers, resumption, inspection, who a client is."""

import ssl
from typing import Any

from tests.differential.harness import (
    Case,
    Head,
    Response,
    Rig,
    Tls,
    bootstrap,
    check_cases,
    cluster,
    each,
    file_log,
    filter_,
    get,
    hcm,
    listener,
    req,
    to,
)
from tests.differential.test_listeners import V1, ipv4, tlv, v2
from tests.differential.test_tls import SPIFFE, certificate, san, secure, trust, upstream

LOG = file_log(
    "%RESPONSE_CODE% flags=%RESPONSE_FLAGS% cipher=%DOWNSTREAM_TLS_CIPHER% version=%DOWNSTREAM_TLS_VERSION% local=%DOWNSTREAM_LOCAL_SUBJECT% "
    "peer=%DOWNSTREAM_PEER_SUBJECT% up_cipher=%UPSTREAM_TLS_CIPHER% up_version=%UPSTREAM_TLS_VERSION% up_peer=%UPSTREAM_PEER_SUBJECT%\n",
)
TLVS = file_log(
    "%DYNAMIC_METADATA(envoy.filters.listener.proxy_protocol)% %DYNAMIC_METADATA(mine)% %FILTER_STATE(envoy.network.proxy_protocol.tlv:PLAIN)% "
    "%FILTER_STATE(envoy.network.proxy_protocol.tlv:FIELD:corp)% %DOWNSTREAM_REMOTE_ADDRESS%\n"
)
# Of several values in filter state Envoy writes the text in the order of a hash table with a seed of its process: here each is asked for by its name.
TLVS_BY_NAME = file_log("%FILTER_STATE(envoy.network.proxy_protocol.tlv:FIELD:corp)% %FILTER_STATE(envoy.network.proxy_protocol.tlv:FIELD:other)%\n")
INSPECTED = [
    file_log(
        "listener flags=%RESPONSE_FLAGS% sni=%REQUESTED_SERVER_NAME% why=%DYNAMIC_METADATA(envoy.filters.listener.tls_inspector:failure_reason)% "
        "failure=%DOWNSTREAM_TRANSPORT_FAILURE_REASON%\n"
    )
]


def logged(name: str, **fields: Any) -> dict:
    return secure(name, hcm_options={"access_log": [LOG]}, **fields)


def crl(name: str, *, leaf: bool = False) -> dict:
    """A context with a revocation list."""
    return trust(crl={"filename": f"${{crl:{name}}}"}, only_verify_leaf_cert_crl=leaf)


def params(**fields: Any) -> dict:
    return {"tls_params": fields}


def bare(**fields: Any) -> dict:
    """A validation context without an authority."""
    return {"validation_context": fields}


def several(name: str, *certificates: str, **fields: Any) -> dict:
    """A listener with several certificates."""
    return logged(name, common={"tls_certificates": [certificate(each) for each in certificates]}, **fields)


# ---- whose certificate is good for a client (of a listener) or a server (of a cluster)
ASKS = {"require_client_certificate": True}
LISTENERS = {
    "crl": crl("ca"),
    "crl_incomplete": crl("ca"),
    "crl_of_all": crl("both"),
    "crl_of_all_leaf": crl("both", leaf=True),
    "crl_leaf": crl("between-ca", leaf=True),
    "crl_between_revoked": crl("between-ca-revoked"),
    "crl_between_revoked_leaf": crl("between-ca-revoked", leaf=True),
    "spki": trust(verify_certificate_spki=["${spki:client}"]),
    "hash": trust(verify_certificate_hash=["${sha256:client}"]),
    "hash_or_spki": trust(verify_certificate_hash=["${sha256:nosan}"], verify_certificate_spki=["${spki:client}"]),
    "untyped": trust(match_subject_alt_names=[{"exact": "web.mesh.test"}]),
    "untyped_uri": trust(match_subject_alt_names=[{"prefix": "spiffe://mesh.test/"}]),
    "untyped_ip": trust(match_subject_alt_names=[{"exact": "10.1.2.3"}]),
    "strict_time": trust(),
    "any_time": trust(allow_expired_certificate=True),
}
WHO = {
    "crl": ("client", "revoked", "none"),
    "crl_incomplete": ("deep", "rogue"),
    "crl_of_all": ("client", "revoked", "deep", "deep_revoked"),
    "crl_of_all_leaf": ("client", "revoked", "deep", "deep_revoked"),
    "crl_leaf": ("client", "deep", "deep_revoked"),
    "crl_between_revoked": ("deep", "client"),
    "crl_between_revoked_leaf": ("deep",),
    "spki": ("client", "nosan", "rogue"),
    "hash": ("client", "nosan", "none"),
    "hash_or_spki": ("client", "nosan", "wild"),
    "untyped": ("client", "nosan", "wild"),
    "untyped_uri": ("client", "wild", "rogue"),
    "untyped_ip": ("client", "wild"),
    "strict_time": ("expired",),
    "any_time": ("expired", "client", "rogue"),
}
SERVERS = {
    "up_crl": ("tls", crl("ca"), {}),
    "up_revoked": ("tls_with_revoked", crl("ca"), {}),
    "up_spki": ("tls", trust(verify_certificate_spki=["${spki:server}"]), {}),
    "up_spki_other": ("tls", trust(verify_certificate_spki=["${spki:client}"]), {}),
    "up_spki_alone": ("tls", bare(verify_certificate_spki=["${spki:server}"]), {}),
    "up_spki_alone_other": ("tls", bare(verify_certificate_spki=["${spki:client}"]), {}),
    "up_hash": ("tls", trust(verify_certificate_hash=["${sha256:server}"]), {}),
    "up_untyped": ("tls", trust(match_subject_alt_names=[{"exact": "a.test"}]), {}),
    "up_untyped_wild": ("tls", trust(match_subject_alt_names=[{"exact": "x.wild.test"}]), {}),
    "up_untyped_other": ("tls", trust(match_subject_alt_names=[{"exact": "wild.test"}]), {}),
    "up_expired": ("tls_with_expired", trust(), {}),
    "up_expired_allowed": ("tls_with_expired", trust(allow_expired_certificate=True), {}),
    "up_untrusted": ("tls", trust(ca="rogue-ca", trust_chain_verification="ACCEPT_UNTRUSTED"), {}),
    "up_untrusted_san": ("tls", trust(san("DNS", exact="other.test"), ca="rogue-ca", trust_chain_verification="ACCEPT_UNTRUSTED"), {}),
    "up_trusted": ("tls", trust(trust_chain_verification="ACCEPT_UNTRUSTED"), {}),
    "up_system": ("tls", bare(system_root_certs={}), {}),
    "up_auto_san": ("tls", trust(), {"sni": "a.test", "auto_sni_san_validation": True}),
    "up_auto_san_other": ("tls", trust(), {"sni": "b.test", "auto_sni_san_validation": True}),
    "up_auto_san_instead": ("tls", trust(san("DNS", exact="other.test")), {"sni": "a.test", "auto_sni_san_validation": True}),
    "up_auto_san_nothing": ("tls", trust(), {"auto_sni_san_validation": True}),
    "up_renegotiation": ("tls", {}, {"allow_renegotiation": True}),
    "up_keys_none": ("tls", {}, {"max_session_keys": 0}),
    "up_keys_two": ("tls", {}, {"max_session_keys": 2}),
    "up_usage": ("tls_with_rsa_enciphers", {}, {}),
    "up_usage_lenient": ("tls_with_rsa_enciphers", {}, {"enforce_rsa_key_usage": False}),
    "up_usage_enforced": ("tls_with_rsa_enciphers", {}, {"enforce_rsa_key_usage": True}),
    "up_usage_good": ("tls_with_rsa", {}, {"enforce_rsa_key_usage": True}),
    "up_cipher": ("tls", params(cipher_suites=["ECDHE-ECDSA-CHACHA20-POLY1305"]), {}),
    "up_cipher_none_fits": ("tls", params(cipher_suites=["ECDHE-RSA-AES128-GCM-SHA256"]), {}),
    "up_curve": ("tls", params(ecdh_curves=["P-384"]), {}),
}
_UNCHECKED = {"skip_stats": ("ssl.fail_verify_error",), "note": "what is accepted anyway is not looked at, and so not counted"}
OUTCOMES: dict[str, dict] = {
    "up_untrusted": _UNCHECKED,
    "up_untrusted_san": _UNCHECKED,
    "up_system": {"stricter": 503, "note": "the field is not implemented in Envoy: it accepts any certificate; here it does what its description says"},
}
CHACHA = "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-ECDSA-AES128-GCM-SHA256"
AES_256 = "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-AES128-GCM-SHA256"
RSA_ALONE = "ECDHE-RSA-AES128-GCM-SHA256"


def mtls(principal: dict) -> list[dict]:
    """RBAC that lets only clients of an mtls_authenticated principal pass."""
    custom = {"name": "mtls", "typed_config": {"@": "mtls_authenticated", **principal}}
    return [filter_("rbac", rules={"action": "ALLOW", "policies": {"who": {"permissions": [{"any": True}], "principals": [{"custom": custom}]}}})]


PRINCIPALS = {
    "anyone": {"any_validated_client_certificate": True},
    "uri": {"san_matcher": san("URI", exact=SPIFFE)},
    "dns": {"san_matcher": san("DNS", exact="web.mesh.test")},
    "dns_suffix": {"san_matcher": san("DNS", suffix=".test")},
    "ip": {"san_matcher": san("IP_ADDRESS", exact="10.1.2.3")},
    "email": {"san_matcher": san("EMAIL", prefix="a")},
}


def proxied(name: str, chain: dict | None = None, log: dict = TLVS, **fields: Any) -> dict:
    """A listener that is told who calls by the PROXY protocol."""
    filters = [filter_("proxy_protocol", **fields)] if chain is None else []
    return listener(name, chains=[{"filters": [hcm(name, to("a"), access_log=[log])], **(chain or {})}], listener_filters=filters)


RULES = [{"tlv_type": 0xE2, "on_tlv_present": {"key": "corp"}}, {"tlv_type": 0xE3, "on_tlv_present": {"key": "other", "metadata_namespace": "mine"}}]
SAID = v2(1, 0x11, ipv4("10.1.2.3", 77), tlv(0xE2, b"acme") + tlv(0xE3, b"b\xffc") + tlv(0xE4, b"z"))
SOCKET = {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": {"tls_certificates": [certificate("server")]}}}


def inspected(name: str, **fields: Any) -> dict:
    """A listener that tells TLS from what is not."""
    chains = [
        {"name": "tls", "filter_chain_match": {"transport_protocol": "tls"}, "filters": [hcm(name, to("a"))], "transport_socket": SOCKET},
        {"name": "plain", "filter_chain_match": {"transport_protocol": "raw_buffer"}, "filters": [hcm(name, to("a"))]},
    ]
    return listener(name, chains=chains, listener_filters=[filter_("tls_inspector", **fields)], access_log=INSPECTED)


CONFIG = bootstrap(
    *(secure(name, common=common, **ASKS) for name, common in LISTENERS.items()),
    logged("plain"),
    logged("sni", require_sni=True),
    logged("no_tickets", disable_stateless_session_resumption=True),
    logged("no_tickets_13", disable_stateless_session_resumption=True, common=params(tls_minimum_protocol_version="TLSv1_3")),
    logged("no_sessions_13", disable_stateful_session_resumption=True, common=params(tls_minimum_protocol_version="TLSv1_3")),
    logged("lenient", ocsp_staple_policy="LENIENT_STAPLING"),
    several("two", "server", "rsa"),
    several("two_scanned", "server", "rsa", full_scan_certs_on_sni_mismatch=True),
    several("rsa_first", "rsa", "server"),
    several("wild_rsa", "server", "other", "rsa_wild"),
    several("wild_rsa_scanned", "server", "other", "rsa", "rsa_wild", full_scan_certs_on_sni_mismatch=True),
    logged("client_ciphers", prefer_client_ciphers=True),
    logged("ciphers", common=params(cipher_suites=["ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-GCM-SHA256"])),
    logged("ciphers_equal", common=params(cipher_suites=["[ECDHE-ECDSA-AES128-GCM-SHA256|ECDHE-ECDSA-CHACHA20-POLY1305]"])),
    logged("ciphers_ordered", common=params(cipher_suites=["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"])),
    logged("curve", common=params(ecdh_curves=["P-256"])),
    *(secure(f"rbac_{name}", common=trust(), hcm_options={"filters": mtls(principal)}) for name, principal in PRINCIPALS.items()),
    inspected("inspected"),
    inspected("strict", close_connection_on_client_hello_parsing_errors=True),
    inspected("small_hello", max_client_hello_size=256),
    inspected("small_buffer", initial_read_buffer_size=256),
    proxied("tlvs", rules=RULES),
    proxied("tlvs_in_state", rules=RULES[:1], tlv_location="FILTER_STATE"),
    proxied("several_tlvs_in_state", log=TLVS_BY_NAME, rules=RULES, tlv_location="FILTER_STATE"),
    proxied("tlvs_passed", pass_through_tlvs={"match_type": "INCLUDE", "tlv_type": [0xE2]}),
    proxied("by_chain", {"use_proxy_proto": True}),
    listener("out", hcm("out", [
        {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}}]} for name in SERVERS
    ], access_log=[LOG])),
    clusters=[cluster("a"), *(upstream(name, to_, common=common, **fields) for name, (to_, common, fields) in SERVERS.items())],
)  # fmt: skip

OLD = ssl.TLSVersion.TLSv1_2


def may_fail(name: str, on: str, by: Tls) -> Case:
    """A handshake that may be refused: the client sees that only when it reads."""
    return Case(name, [get(), Response()], on=on, tls=by, then="leave")


def resumed(on: str, maximum: ssl.TLSVersion) -> Any:
    """Two connections, the second with the session of the first: whether it is resumed."""

    async def scenario(rig: Rig) -> Any:
        context = rig.client_tls(Tls(maximum=maximum))
        session, said = None, []
        for _ in range(2):
            wire = await rig.connect(on)
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context.wrap_bio(incoming, outgoing, server_hostname="a.test", session=session)

            async def move() -> None:
                wire.send(outgoing.read())  # noqa: B023 - used within this turn
                await wire.until(lambda: wire.buffer)  # noqa: B023
                incoming.write(wire.take(len(wire.buffer)))  # noqa: B023

            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await move()
            tls.write(get())
            answer = b""
            while not answer.endswith(b"ok"):
                try:
                    answer += tls.read(4096)
                except ssl.SSLWantReadError:
                    await move()
            said.append(f"{tls.version()} resumed={tls.session_reused} ticket={bool(tls.session and tls.session.has_ticket)}")
            session = tls.session
            wire.close()
        return said

    return scenario


def nameless(maximum: ssl.TLSVersion) -> Any:
    """A client that names no server, where one is required."""

    async def scenario(rig: Rig) -> Any:
        try:
            return await rig.exchange(await rig.connect("sni", Tls(sni=None, maximum=maximum)), get())
        except ssl.SSLError:
            return "refused"

    return scenario


def again(name: str) -> Case:
    """Two requests over connections of their own."""
    request = req("GET", "/", host=f"{name}.test")
    closing = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
    return Case(
        f"{name}_again",
        [request, Response(), request, Response()],
        each([Head(), closing], [Head(), closing]),
        on="out",
        skip_stats=("ssl.session_reused",),
        note="sessions with upstreams are not resumed",
    )


CASES = [
    *(may_fail(f"{on}_{who}", on, Tls(certificate=None if who == "none" else who)) for on in LISTENERS for who in WHO[on]),
    *(may_fail(f"{on}_{who}_tls_1_2", on, Tls(certificate=who, maximum=OLD)) for on, who in (("crl", "revoked"), ("strict_time", "expired"))),
    Case("strict_time_rsa_enciphers", [get(), Response()], on="strict_time", tls=Tls(certificate="rsa_enciphers"), then="leave",
         skip_stats=("ssl.connection_error", "ssl.fail_verify_error"), note="for OpenSSL, what a key is for is part of the check of its certificate"),
    Case("hash_nosan_tls_1_2", [get(), Response()], on="hash", tls=Tls(certificate="nosan", maximum=OLD), then="leave", skip=("fate",),
         note="what Python's ssl cannot check is looked at when the handshake is over: the client hears no alert"),
    *(Case(name, get(host=f"{name}.test"), on="out", **OUTCOMES.get(name, {})) for name in SERVERS),
    *(again(name) for name in ("up_crl", "up_keys_none", "up_keys_two")),
    *(may_fail(f"sni_{name}", "sni", Tls(sni=name)) for name in ("a.test", "x.test")),
    *(Case(f"sni_unnamed_{version.name}", nameless(version), on="sni", strictly="refused",
           note="the field is not implemented in Envoy; here it does what its description says") for version in (OLD, ssl.TLSVersion.TLSv1_3)),
    *(Case(f"resumed_{on}_{version.name}", resumed(on, version), on=on, skip_stats=("ssl.curves",),
           note="the curve of a session of TLS 1.2 that is resumed is not known")
      for on in ("plain", "no_tickets") for version in (OLD, ssl.TLSVersion.TLSv1_3)),
    *(Case(f"resumed_{on}", resumed(on, ssl.TLSVersion.TLSv1_3), on=on) for on in ("no_tickets_13", "no_sessions_13")),
    Case("ocsp_lenient", get(), on="lenient", tls=Tls()),
    *(may_fail(f"{on}_{name}", on, by) for on in ("two", "two_scanned") for name, by in {
        "no_name": Tls(sni=None), "first": Tls(), "second": Tls(sni="rsa.mesh.test"), "mismatch": Tls(sni="x.test"),
        "mismatch_rsa": Tls(sni="x.test", maximum=OLD, ciphers=RSA_ALONE), "no_name_rsa": Tls(sni=None, maximum=OLD, ciphers=RSA_ALONE),
        "first_rsa": Tls(maximum=OLD, ciphers=RSA_ALONE)}.items()),
    *(may_fail(f"{on}_{which}", on, Tls(sni=sni, maximum=OLD, ciphers=RSA_ALONE)) for on in ("rsa_first", "wild_rsa", "wild_rsa_scanned")
      for which, sni in {"exact": "a.test", "wildcard": "x.wild.test", "both": "other.test", "none": "x.test"}.items()),
    *(may_fail(f"{on}_{which}_any", on, Tls(sni=sni)) for on in ("rsa_first", "wild_rsa", "wild_rsa_scanned")
      for which, sni in {"exact": "a.test", "wildcard": "x.wild.test", "both": "other.test", "none": "x.test"}.items()),
    *(may_fail(f"{on}_{name}", on, Tls(maximum=OLD, ciphers=ciphers)) for on in ("plain", "client_ciphers", "ciphers", "ciphers_equal", "ciphers_ordered")
      for name, ciphers in {"chacha_first": CHACHA, "aes_256_first": AES_256, "rsa_alone": RSA_ALONE}.items()),
    *(may_fail(f"curve_{name}", "curve", Tls(curve=curve, maximum=version)) for name, curve, version in (
        ("fits", "prime256v1", OLD), ("other", "X25519", OLD), ("other_tls_1_3", "X25519", ssl.TLSVersion.TLSv1_3),
        ("fits_tls_1_3", "prime256v1", ssl.TLSVersion.TLSv1_3))),
    *(may_fail(f"rbac_{name}_{who}", f"rbac_{name}", Tls(certificate=None if who == "none" else who)) for name in PRINCIPALS
      for who in ("client", "wild", "none")),
    *(Case(f"{on}_tls", get(), on=on, tls=Tls(maximum=OLD)) for on in ("inspected", "strict", "small_buffer")),
    Case("small_hello_tls", [get(), Response()], on="small_hello", tls=Tls(alpn=("x" * 200,)), then="leave"),
    *(Case(f"{on}_{name}", [said, Response()], on=on, then="leave") for on in ("inspected", "strict", "small_hello") for name, said in {
        "plaintext": get(), "no_hello": b"\x16\x03\x01\x00\x05\x02\x00\x00\x01x"}.items()),
    *(Case(f"{on}_said", [SAID, get(), Response()], on=on, then="leave")
      for on in ("tlvs", "tlvs_in_state", "several_tlvs_in_state", "tlvs_passed", "by_chain")),
    *(Case(f"{on}_said_without", [V1, get(), Response()], on=on, then="leave") for on in ("tlvs", "tlvs_in_state", "several_tlvs_in_state")),
    Case("by_chain_v1", [V1, get(), Response()], on="by_chain", then="leave"),
    Case("by_chain_nothing_said", [get(), Response()], on="by_chain", then="leave"),
]  # fmt: skip

test_case = check_cases(CASES)
