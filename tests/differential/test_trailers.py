"""Trailers of requests and responses, with `enable_trailers` on either side, and the case of header names."""

from tests.differential.harness import Case, Request, answer, bootstrap, check_cases, cluster, filter_, get, http, req

TRAILERS = {"explicit_http_config": {"http_protocol_options": {"enable_trailers": True}}}
PRESERVE = {"stateful_formatter": {"name": "preserve_case", "typed_config": {"@": "preserve_case"}}}
PROPER = {"proper_case_words": {}}


def options(http1: dict, which: str = "explicit_http_config") -> dict:
    """Upstream HTTP/1.1 options of a cluster."""
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {"@": "http_options", which: {"http_protocol_options": http1}}}


HOSTS = [
    {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}}]}
    for name in ("a", "trailers", "downstream", "preserve", "proper")
]  # fmt: skip

CONFIG = bootstrap(
    http("main", HOSTS),
    http("trailers", HOSTS, http_protocol_options={"enable_trailers": True}),
    http("preserve", HOSTS, http_protocol_options={"header_key_format": PRESERVE}),
    http(
        "preserve_mutating",
        HOSTS,
        http_protocol_options={"header_key_format": PRESERVE},
        filters=[
            filter_(
                "header_mutation",
                mutations={
                    "request_mutations": [{"append": {"header": {"key": "X-Added-By-Filter", "value": "1"}}}, {"remove": "x-gone"}],
                    "response_mutations": [{"append": {"header": {"key": "X-Added-To-Response", "value": "1"}}}],
                },
            ),
        ],
    ),
    http("proper", HOSTS, http_protocol_options={"header_key_format": PROPER}),
    clusters=[
        cluster("a"),
        cluster("trailers", typed_extension_protocol_options=options({"enable_trailers": True})),
        cluster("downstream", typed_extension_protocol_options=options({"enable_trailers": True}, "use_downstream_protocol_config")),
        cluster("preserve", typed_extension_protocol_options=options({"header_key_format": PRESERVE})),
        cluster("proper", typed_extension_protocol_options=options({"header_key_format": PROPER})),
    ],
)


def chunked(host: str, trailers: str) -> bytes:
    return req("POST", "/", "Transfer-Encoding: chunked", host=host, body=f"3\r\nabc\r\n0\r\n{trailers}\r\n".encode("latin-1"))


RESPONSE = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-check\r\n\r\n3\r\nabc\r\n0\r\nX-Check: sum\r\nx-more: 2\r\n\r\n"
EMPTY_WITH_TRAILERS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-check: sum\r\n\r\n"
MIXED = ["X-CamelCase: 1", "ACCEPT: */*", "x-lower: 1", "X-Many: 1", "x-MANY: 2"]

CASES = [
    Case("request_trailers_dropped", chunked("a.test", "X-Check: 1\r\n")),
    Case("request_trailers_dropped_upstream_could", chunked("trailers.test", "X-Check: 1\r\n")),
    Case("request_trailers_upstream_cannot", chunked("a.test", "X-Check: 1\r\n"), on="trailers"),
    Case("request_trailers_pass", chunked("trailers.test", "X-Check: 1\r\nx-more: 2\r\n"), on="trailers"),
    Case("request_trailers_pass_with_the_protocol_of_downstream", chunked("downstream.test", "X-Check: 1\r\n"), on="trailers"),
    Case("response_trailers_pass_with_the_protocol_of_downstream", get(host="downstream.test"), [Request(), RESPONSE], on="trailers"),
    Case("response_trailers_dropped", get(host="a.test"), [Request(), RESPONSE]),
    Case("response_trailers_downstream_cannot", get(host="trailers.test"), [Request(), RESPONSE]),
    Case("response_trailers_pass", get(host="trailers.test"), [Request(), RESPONSE], on="trailers"),
    Case("response_trailers_after_empty_body", get(host="trailers.test"), [Request(), EMPTY_WITH_TRAILERS], on="trailers"),
    Case("te_trailers_with_trailers_on", get("/", "TE: trailers", host="trailers.test"), [Request(), RESPONSE], on="trailers"),
    Case("trailer_content_length", chunked("trailers.test", "Content-Length: 3\r\n"), on="trailers", stricter=400, may_begin=True),
    Case("trailer_transfer_encoding", chunked("trailers.test", "Transfer-Encoding: chunked\r\n"), on="trailers", stricter=400, may_begin=True),
    Case("trailer_host", chunked("trailers.test", "Host: b.test\r\n"), on="trailers", stricter=400, may_begin=True),
    Case("trailer_authorization", chunked("trailers.test", "Authorization: x\r\n"), on="trailers", stricter=400, may_begin=True),
    Case("trailer_bad_name", chunked("trailers.test", "x y: 1\r\n"), on="trailers", then="closed"),
    Case("trailer_without_colon", chunked("trailers.test", "xy\r\n"), on="trailers", then="closed"),
    # ---- header case
    Case("names_lower_cased", get("/", *MIXED), [Request(), answer(X_Camel="1", SERVER_X="2")]),
    Case("names_preserved_to_upstream", get("/", *MIXED, host="preserve.test"), [Request(), answer(X_Camel="1", ALL_CAPS="2")], on="preserve"),
    Case("names_preserved_downstream_only", get("/", *MIXED, host="a.test"), [Request(), answer(X_Camel="1", ALL_CAPS="2")], on="preserve"),
    Case("names_preserved_upstream_only", get("/", *MIXED, host="preserve.test"), [Request(), answer(X_Camel="1", ALL_CAPS="2")]),
    Case("names_preserved_with_mutations", get("/", "X-Gone: 1", *MIXED, host="preserve.test"), [Request(), answer(X_Camel="1")], on="preserve_mutating"),
    Case("names_preserved_repeated", get("/", "X-AB: 1", "X-aB: 2", "x-ab: 3", host="preserve.test"), on="preserve"),
    Case("names_preserved_host_upper", b"GET / HTTP/1.1\r\nHOST: preserve.test\r\nContent-LENGTH: 0\r\n\r\n", on="preserve"),
    Case("names_preserved_404", get(host="nowhere.test"), on="preserve"),
    Case("names_proper", get("/", *MIXED, host="proper.test"), [Request(), answer(x_camel="1", etag="2", ALL_CAPS="3")], on="proper"),
    Case("names_proper_chunked", req("POST", "/", "Transfer-Encoding: chunked", host="proper.test", body=b"1\r\nx\r\n0\r\n\r\n"), on="proper"),
    Case("names_proper_local_reply", get(host="nowhere.test"), on="proper"),
]  # fmt: skip

test_case = check_cases(CASES)
