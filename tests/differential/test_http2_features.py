"""What is configured for requests, where they come over HTTP/2: local replies, filters, retries, mirrors, hashes, certificates, logs, draining."""

from __future__ import annotations

from typing import Any

from tests.differential import http2_wire as h2
from tests.differential.harness import (
    Body,
    Case,
    Data,
    Ended,
    Got,
    Headers,
    Heard,
    Hello,
    Open,
    Play,
    Request,
    Response,
    Rig,
    Rst,
    Script,
    Signal,
    Sync,
    Tls,
    Wait,
    answer,
    ask,
    bootstrap,
    check_cases,
    cluster,
    each,
    file_log,
    filter_,
    get,
    h2_case,
    h2_cluster,
    hcm,
    head,
    http,
    lines,
    listener,
    reply,
    req,
)
from tests.differential.wire import play


def vhost(name: str, to: str = "a", *, match: dict | None = None, **route: Any) -> dict:
    outer = {key: route.pop(key) for key in ("typed_per_filter_config", "response_headers_to_add", "request_headers_to_add", "cors") if key in route}
    action = route if "redirect" in route or "direct_response" in route else {"route": ({} if "weighted_clusters" in route else {"cluster": to}) | route}
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": match or {"prefix": "/"}, **action, **outer}]}


FAST = {"retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"}}
FULL = {"default_value": {"numerator": 100}}
LIMIT = {"stat_prefix": "limit", "token_bucket": {"max_tokens": 1, "fill_interval": "3600s"}, "filter_enabled": FULL, "filter_enforced": FULL}
DENY = {"rules": {"action": "DENY", "policies": {"no": {"permissions": [{"header": {"name": "x-bad", "present_match": True}}], "principals": [{"any": True}]}}}}
CORS = {
    "@": "cors_policy",
    "allow_origin_string_match": [{"exact": "https://ok.test"}],
    "allow_methods": "GET",
    "expose_headers": "x-a",
    "allow_credentials": True,
}
HOSTS = [
    vhost("a"),
    vhost("h2", "h2a"),
    vhost("both", "both"),
    vhost("said", direct_response={"status": 200, "body": {"inline_string": "said"}}),
    vhost("empty", direct_response={"status": 204}),
    vhost("away", redirect={"https_redirect": True, "path_redirect": "/new"}),
    vhost("method", match={"prefix": "/", "headers": [{"name": ":method", "string_match": {"exact": "PATCH"}}]}),
    vhost("scheme", match={"prefix": "/", "headers": [{"name": ":scheme", "string_match": {"exact": "https"}}]}),
    vhost("hosted", match={"prefix": "/", "headers": [{"name": ":authority", "string_match": {"exact": "hosted.test"}}]}),
    vhost("cookied", match={"prefix": "/", "headers": [{"name": "cookie", "string_match": {"exact": "a=1; b=2"}}]}),
    vhost("retried", "h2a", retry_policy={**FAST, "retry_on": "5xx,reset", "num_retries": 2}),
    vhost("retried-h1", retry_policy={**FAST, "retry_on": "5xx,reset", "num_retries": 2}),
    vhost("mirrored", request_mirror_policies=[{"cluster": "h2shadow"}]),
    vhost("hashed", "ring", hash_policy=[{"cookie": {"name": "session"}}, {"header": {"header_name": "x-key"}}]),
    vhost("affine", "ring", hash_policy=[{"cookie": {"name": "session", "ttl": "60s", "path": "/"}}]),
    vhost("weighted", weighted_clusters={"clusters": [{"name": "h2a", "weight": 1}, {"name": "a", "weight": 0}]}),
    vhost("headers", "h2a", request_headers_to_add=[{"header": {"key": "x-added", "value": "%PROTOCOL% %REQ(:PATH)%"}}],
          response_headers_to_add=[{"header": {"key": "x-back", "value": "%RESPONSE_CODE%"}}]),
    vhost("cors", typed_per_filter_config={"envoy.filters.http.cors": CORS}),
    vhost("deadly", "dead"),
]  # fmt: skip
LOG = (
    "%PROTOCOL% %REQ(:METHOD)% %REQ(:SCHEME)% %REQ(:AUTHORITY)% %REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS% %RESPONSE_FLAGS_LONG% "
    "%BYTES_RECEIVED% %BYTES_SENT% %UPSTREAM_PROTOCOL% %CONNECTION_TERMINATION_DETAILS% %REQUEST_HEADERS_BYTES% "
    "%RESPONSE_TRAILERS_BYTES% %TRAILER(x-t)% %RESP(x-r)% %STREAM_ID% %REQUESTED_SERVER_NAME% %DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_PEER_SUBJECT%\n"
)


def tls(name: str, *alpn: str, client: bool = False, **options: Any) -> dict:
    """A TLS listener."""
    common: dict[str, Any] = {"tls_certificates": [{"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}]}
    if alpn:
        common["alpn_protocols"] = list(alpn)
    if client:
        common["validation_context"] = {"trusted_ca": {"filename": "${pem:ca}"}}
    context = {"@": "downstream_tls", "require_client_certificate": client, "common_tls_context": common}
    return listener(name, chains=[{"filters": [hcm(name, HOSTS, **options)], "transport_socket": {"name": "tls", "typed_config": context}}])


CONFIG = bootstrap(
    http("main", HOSTS),
    http("edge", HOSTS, use_remote_address=True, xff_num_trusted_hops=0, server_name="mine", server_header_transformation="APPEND_IF_ABSENT"),
    http("logged", HOSTS, access_log=[file_log(LOG)]),
    http("rbac", HOSTS, filters=[filter_("rbac", **DENY)]),
    http("fault", HOSTS, filters=[filter_("fault", abort={"http_status": 418, "percentage": {"numerator": 100}}, headers=[{"name": "x-fault",
            "present_match": True}])]),
    http("delayed", HOSTS, filters=[filter_("fault", delay={"fixed_delay": "0.1s", "percentage": {"numerator": 100}}, headers=[{"name": "x-fault",
            "present_match": True}])]),
    http("limited", HOSTS, filters=[filter_("local_ratelimit", **LIMIT)]),
    http("buffered", HOSTS, filters=[filter_("buffer", max_request_bytes=10)]),
    http("cors", HOSTS, filters=[filter_("cors")]),
    http("mutated", HOSTS, filters=[filter_("header_mutation", mutations={"request_mutations": [{"append": {"header": {"key": "x-m", "value": "1"}}},
            {"remove": "x-gone"}],
                                                                        "response_mutations": [{"append": {"header": {"key": "x-n", "value": "2"}}}]})]),
    http("merged", HOSTS, merge_slashes=True, normalize_path=True, path_with_escaped_slashes_action="REJECT_REQUEST", strip_any_host_port=True),
    http("preserving", HOSTS, preserve_external_request_id=True, generate_request_id=False, always_set_request_id_in_response=True),
    http("drained", HOSTS, drain_timeout="0.05s"),
    tls("tls", "h2", "http/1.1", access_log=[file_log(LOG)]),
    tls("tls_no_alpn"),
    tls("tls_h1_only", "http/1.1"),
    tls("tls_h2_codec", "h2", codec_type="HTTP2"),
    tls("mtls", "h2", "http/1.1", client=True, forward_client_cert_details="SANITIZE_SET", set_current_client_cert_details={"uri": True, "dns": True,
            "subject": True},
        access_log=[file_log(LOG)]),
    clusters=[
        cluster("a"), h2_cluster("h2a"), h2_cluster("h2shadow"), cluster("dead"),
        h2_cluster("both", "h2a", "h2b", lb_policy="ROUND_ROBIN"),
        h2_cluster("ring", "h2a", "h2b", lb_policy="RING_HASH"),
    ],
)  # fmt: skip


def tls_case(name: str, *steps: Any, on: str, tls: Tls, **fields: Any) -> Case:
    return h2_case(name, *steps, on=on, tls=tls, **fields)


ALPN = Tls(alpn=("h2", "http/1.1"))


async def drained(rig: Rig) -> Any:
    """Health is failed: GOAWAY in two steps with the next answer, requests that are under way are served."""
    wire = await rig.connect("drained")
    script: Script = [Hello(), Open(head("POST", authority="h2.test"), end=False), Wait("begun"), *ask()]
    trouble = [await play(script, wire, rig.signals)]
    await rig.proxy.admin("POST", "/healthcheck/fail")
    trouble.append(await play([*ask(), Heard("goaway", 2), Data(b"late", end=True, stream=1), Ended(1)], wire, rig.signals))
    await rig.proxy.admin("POST", "/healthcheck/ok")
    await wire.until(lambda: False)
    assert wire.http2 is not None
    return [rig.normaliser.bytes(wire.http2.text()), trouble, wire.end is not None]


async def hashed(rig: Rig) -> Any:
    """The same key goes to the same host."""
    wire = await rig.connect("main")
    await play([Hello(), *[step for key in "abcabcabc" for step in ask("GET", "/", f"x-key: {key}", authority="hashed.test")]], wire, rig.signals)
    assert wire.http2 is not None
    hosts = [bytes(wire.http2.streams[number].data) for number in range(1, 18, 2)]
    return [hosts[:3] == hosts[3:6] == hosts[6:9], len(hosts)]


WHO = {"h2a": [Ended(), *reply(body=b"A")], "h2b": [Ended(), *reply(body=b"B")]}
TRAILERS: Script = [Ended(), *reply(200, "x-r: 1", trailers=("x-t: 2",))]

CASES = [
    # ---- local replies
    h2_case("not_found", ask(authority="nowhere.test")),
    h2_case("not_found_with_body", Open(head("POST", authority="nowhere.test"), end=False), Ended(), Data(b"late", end=True), Sync()),
    h2_case("direct_response", ask(authority="said.test")),
    h2_case("direct_response_head", ask("HEAD", authority="said.test")),
    h2_case("direct_response_empty", ask(authority="empty.test")),
    h2_case("redirect", ask("GET", "/old?x", authority="away.test")),
    h2_case("dead_upstream", ask(authority="deadly.test")),
    h2_case("on_the_edge", ask("GET", "/", "x-forwarded-for: 1.2.3.4", "x-forwarded-host: evil", "x-envoy-internal: true", "x-envoy-max-retries: 9"),
            on="edge"),
    h2_case("server_header_appended_if_absent", ask(authority="h2.test"), on="edge", up=[Ended(), *reply(200, "server: theirs")]),
    # ---- matching
    h2_case("matched_by_method", ask("PATCH", authority="method.test")),
    h2_case("not_matched_by_method", ask("GET", authority="method.test")),
    h2_case("matched_by_scheme", ask("GET", "/", authority="scheme.test", scheme="https")),
    h2_case("matched_by_authority", ask(authority="hosted.test")),
    h2_case("matched_by_cookie_crumbs", ask("GET", "/", "cookie: a=1", "cookie: b=2", authority="cookied.test")),
    h2_case("path_merged", ask("GET", "/a//b/../c"), on="merged"),
    h2_case("path_with_escaped_slash", ask("GET", "/a%2Fb"), on="merged"),
    h2_case("port_stripped", ask("GET", "/", authority="a.test:8443"), on="merged"),
    h2_case("weighted", ask(authority="weighted.test")),
    h2_case("headers_added", ask("GET", "/p", authority="headers.test")),
    # ---- retries, mirrors, hosts
    h2_case("retried_503", ask(authority="retried.test"), up=each([Ended(), *reply(503)], [Ended(), *reply()])),
    h2_case("retried_503_with_body", ask("POST", body=b"hello", authority="retried.test"), up=each([Ended(), *reply(503)], [Ended(), *reply()])),
    h2_case("retried_with_trailers", ask("POST", body=b"hello", trailers=("x-t: 1",), authority="retried.test"), up=each([Ended(), *reply(503)], [Ended(),
            *reply()])),
    h2_case("retried_refused", ask(authority="retried.test"), up=each([Ended(), Rst(h2.REFUSED_STREAM)], [Ended(), *reply()])),
    h2_case("retried_enough", ask(authority="retried.test"), up=[Ended(), *reply(503)]),
    h2_case("retried_h1", ask("POST", body=b"hello", authority="retried-h1.test"), up=each([Request(), answer("503 X", b"")], [Request(), answer()])),
    h2_case("mirrored", ask("POST", body=b"hello", authority="mirrored.test"), up={"h2shadow": [Ended(), *reply(500)]}),
    Case("mirrored_h1", get(host="mirrored.test"), {"h2shadow": [Ended(), *reply(500)]}),
    h2_case("round_robin", *[ask(authority="both.test") for _ in range(4)], up=WHO, skip=("client", "upstream", "log"), note="which is the first is random"),
    Case("hashed_by_header", hashed, WHO, skip=("upstream", "stats", "log"), note="which host has which part of the ring depends on ports"),
    h2_case("affinity_cookie", ask(authority="affine.test"), ask("GET", "/", "cookie: session=x", authority="affine.test"), up={"h2a": [Ended(), *reply()],
            "h2b": [Ended(), *reply()]}, skip=("client", "upstream", "stats", "log")),
    # ---- filters
    h2_case("rbac_denied", ask("GET", "/", "x-bad: 1"), on="rbac"),
    h2_case("rbac_allowed", ask(), on="rbac"),
    h2_case("fault_aborts", ask("GET", "/", "x-fault: 1"), on="fault"),
    h2_case("fault_aborts_amid_a_request", Open(head("POST", "/", "x-fault: 1"), end=False), Ended(), on="fault"),
    h2_case("fault_delays", ask("GET", "/", "x-fault: 1"), on="delayed"),
    h2_case("reset_while_a_filter_holds", Open(head("GET", "/", "x-fault: 1")), Rst(), Sync(), ask(), on="delayed"),
    h2_case("limited", ask(), ask(), on="limited", then="leave"),
    h2_case("buffered", ask("POST", body=b"hello"), on="buffered"),
    h2_case("buffered_too_much_in_one_frame", ask("POST", body=b"more than ten bytes"), on="buffered"),
    h2_case("buffered_too_much_in_its_last_frame", Open(head("POST"), end=False), Data(b"some"), Sync(), Data(b"and more than ten", end=True), Ended(),
            on="buffered"),
    h2_case("buffered_too_much_in_its_last_frame_at_once", Open(head("POST"), end=False), Data(b"some"), Data(b"and more than ten", end=True), Ended(),
            on="buffered"),
    h2_case("buffered_as_much_as_may_be", ask("POST", body=b"ten bytes."), on="buffered"),
    h2_case("buffered_too_much_with_length", ask("POST", "/", "content-length: 19", body=b"more than ten bytes"), on="buffered"),
    Case("buffered_too_much_h1", [req("POST", "/", body=b"more than ten bytes"), Response()], on="buffered", then="closed"),
    Case("buffered_too_much_chunked_h1", [req("POST", "/", "Transfer-Encoding: chunked") + b"13\r\nmore than ten bytes\r\n0\r\n\r\n", Response()],
         on="buffered", then="closed"),
    h2_case("buffered_too_much", Open(head("POST"), end=False), Data(b"more than ten bytes"), Ended(), on="buffered"),
    h2_case("cors_preflight", ask("OPTIONS", "/", "origin: https://ok.test", "access-control-request-method: GET", authority="cors.test"), on="cors"),
    h2_case("cors_actual", ask("GET", "/", "origin: https://ok.test", authority="cors.test"), on="cors"),
    h2_case("cors_other_origin", ask("GET", "/", "origin: https://evil.test", authority="cors.test"), on="cors"),
    h2_case("mutated", ask("GET", "/", "x-gone: 1", authority="h2.test"), on="mutated"),
    h2_case("request_id_kept", ask("GET", "/", "x-request-id: mine"), on="preserving"),
    # ---- logs
    h2_case("log_h2_h2", ask("POST", "/p?q", body=b"hello", authority="h2.test"), on="logged", up=TRAILERS),
    h2_case("log_h2_h1", ask("POST", "/p?q", "content-length: 5", body=b"hello"), on="logged"),
    Case("log_h1_h2", get("/p?q", host="h2.test"), TRAILERS, on="logged"),
    h2_case("log_local", ask(authority="nowhere.test"), on="logged"),
    h2_case("log_reset_by_client", Open(head("POST", authority="h2.test"), end=False), Wait("begun"), Rst(), on="logged", up=[Signal("begun"), Ended()]),
    h2_case("log_reset_by_upstream", ask(authority="h2.test"), on="logged", up=[Ended(), Rst(h2.INTERNAL_ERROR)]),
    h2_case("log_reset_amid_the_answer", Open(head(authority="h2.test")), Got(b"part"), Signal("got"), Ended(), on="logged",
            up=[Ended(), Headers(lines(":status: 200")), Data(b"part"), Wait("got"), Rst()]),
    # ---- TLS
    tls_case("alpn_h2", ask(authority="h2.test"), on="tls", tls=ALPN),
    tls_case("alpn_h2_only", ask(), on="tls", tls=Tls(alpn=("h2",))),
    Case("alpn_http1", [get(host="h2.test"), Response()], on="tls", tls=Tls(alpn=("http/1.1",))),
    Case("alpn_none", [get(host="a.test"), Response()], on="tls", tls=Tls()),
    tls_case("no_alpn_but_http2", ask(), on="tls_no_alpn", tls=Tls()),
    tls_case("alpn_chosen_http1_but_http2_spoken", ask(), on="tls_h1_only", tls=ALPN, then="closed"),
    tls_case("codec_http2", ask(), on="tls_h2_codec", tls=ALPN),
    tls_case("scheme_http_over_tls", ask("GET", "/", scheme="http"), on="tls", tls=ALPN),
    tls_case("client_certificate", ask("GET", "/", "x-forwarded-client-cert: By=evil", authority="h2.test"), on="mtls", tls=Tls(alpn=("h2",),
            certificate="client")),
    tls_case("client_certificate_again", *[ask(authority="h2.test", scheme="https")] * 6, on="mtls", tls=Tls(alpn=("h2",), certificate="client")),
    tls_case("client_certificate_from_a_sidecar", *[ask("GET", "/", "x-forwarded-proto: http", authority="h2.test")] * 6, on="mtls",
             tls=Tls(alpn=("h2",), certificate="client")),
    tls_case("client_certificate_other_paths", *[ask("GET", f"/{n}", f"x-request-id: {n}", authority="h2.test", scheme="https") for n in range(8)], on="mtls",
             tls=Tls(alpn=("h2",), certificate="client")),
    tls_case("long_over_tls", Open(head("POST", "/", authority="h2.test", scheme="https"), end=False), Body(bytes(200_000)), Ended(), on="tls", tls=ALPN,
             up=[Ended(), *reply(body=bytes(100_000))]),
    # ---- draining
    Case("drained_in_two_steps", drained, {"h2a": Play([[Signal("begun"), Ended(), *reply()]])}, skip=("stats",)),
]  # fmt: skip

test_case = check_cases(CASES)
