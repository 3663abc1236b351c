"""More fields that few set: of addresses in headers, of routes, rate limits, faults, RBAC and access logs, each with what it changes."""

from __future__ import annotations

from typing import Any

from tests.differential.harness import (
    Case,
    Ended,
    Open,
    Request,
    Response,
    answer,
    bootstrap,
    check_cases,
    cluster,
    endpoint,
    file_log,
    filter_,
    get,
    h2_case,
    http,
)

FULL = {"default_value": {"numerator": 100}, "runtime_key": "none"}
ADDRESSES = [file_log("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT% %REQ(X-FORWARDED-FOR)%\n")]


NO_SUCH_TYPE = {"@": "xds.type.v3.TypedStruct", "type_url": "type.googleapis.com/no.such.Filter", "value": {}}


def route(path: str, *, match: dict | None = None, config: dict | None = None, fields: dict | None = None, **action: Any) -> dict:
    """A route by prefix to the cluster a."""
    filters = {"typed_per_filter_config": config} if config else {}
    return {"match": {"prefix": path, **(match or {})}, "route": {"cluster": "a", **action}, **filters, **(fields or {})}


def hosts(*routes: dict, **fields: Any) -> list[dict]:
    return [{"name": "all", "domains": ["*"], "routes": [*routes, route("/")], **fields}]


# ---- the peer's address
PROXIED = {"listener_fields": {"listener_filters": [filter_("proxy_protocol", allow_requests_without_proxy_protocol=True)]}, "access_log": ADDRESSES}
MAPPED = {"represent_ipv4_remote_address_as_ipv4_mapped_ipv6": True, **PROXIED}
PEERS = {
    "loopback": b"",
    "v4": b"PROXY TCP4 50.0.0.1 127.0.0.1 77 80\r\n",
    "private": b"PROXY TCP4 10.0.0.1 127.0.0.1 77 80\r\n",
    "other_loopback": b"PROXY TCP4 127.0.0.2 127.0.0.1 77 80\r\n",
    "v6": b"PROXY TCP6 2001:db8::7 ::1 77 80\r\n",
}
PRIVATE = PEERS | {f"private_{at}": f"PROXY TCP{6 if ':' in address else 4} {address} {'::1' if ':' in address else '127.0.0.1'} 77 80\r\n".encode()
                   for at, address in enumerate(("172.15.0.1", "172.16.0.1", "172.31.9.9", "172.32.0.1", "192.168.7.7", "192.169.0.1", "11.0.0.1", "fd00::1",
                                                 "fd12::1", "fc00::1", "::1", "fe80::1", "169.254.0.1", "100.64.0.1"))}  # fmt: skip
FORWARDED = {"none": (), "v4": ("X-Forwarded-For: 9.9.9.9",), "loopback": ("X-Forwarded-For: 127.0.0.1",), "two": ("X-Forwarded-For: 8.8.8.8, 10.0.0.2",)}

# ---- routes
ABSENT_STATE = {"key": "no.such.state", "string_match": {"safe_regex": {"regex": ".*"}}}
ABSENT_ADDRESS = {"key": "no.such.state", "address_match": {"ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]}}
LONG = "x" * 5000
ROUTES = hosts(
    route("/path/literal", path_rewrite="/elsewhere"),
    route("/path/header", path_rewrite="/%REQ(X-A)%/x"),
    route("/path/original", path_rewrite="/was%REQ(:PATH)%"),
    route("/path/empty", path_rewrite="%REQ(X-A?X-B)%"),
    route("/path/query", path_rewrite="/q?new=1"),
    route("/host/literal", host_rewrite="new.test"),
    route("/host/header", host_rewrite="%REQ(X-A)%.test"),
    route("/host/mixed", host_rewrite="a-%REQ(X-A):2%-%PROTOCOL%", append_x_forwarded_host=True),
    route("/host/only", host_rewrite="%REQ(X-A)%"),
    {"match": {"prefix": "/state", "filter_state": [ABSENT_STATE]}, "direct_response": {"status": 201}},
    {"match": {"prefix": "/state", "filter_state": [ABSENT_ADDRESS]}, "direct_response": {"status": 202}},
    {"match": {"prefix": "/long"}, "direct_response": {"status": 200, "body": {"inline_string": LONG}}},
    {"match": {"safe_regex": {"google_re2": {"max_program_size": 2000}, "regex": "/large/[a-z0-9]{3,40}"}}, "direct_response": {"status": 203}},
    {
        "match": {"prefix": "/weights"},
        "route": {"weighted_clusters": {"total_weight": 7, "clusters": [{"name": "a", "weight": 7}, {"name": "m", "weight": 0}]}},
    },
    route("/optional", config={"no.such.filter": {"@": "filter_config", "is_optional": True, "config": NO_SUCH_TYPE}}),
    route("/hash", hash_policy=[{"filter_state": {"key": "no.such.state"}}, {"header": {"header_name": "x-a"}}], cluster="ring"),
)


def keyed(name: str) -> dict:
    """An endpoint whose place in the ring does not come from its port."""
    return endpoint(name, metadata={"filter_metadata": {"envoy.lb": {"hash_key": name}}})


# ---- rate limits
ONE = {"max_tokens": 1, "tokens_per_fill": 1, "fill_interval": "600s"}
MANY = {"max_tokens": 100, "tokens_per_fill": 100, "fill_interval": "600s"}
TWO = {"max_tokens": 2, "tokens_per_fill": 2, "fill_interval": "600s"}


def bucket(*entries: tuple[str, str], of: dict = ONE) -> dict:
    return {"entries": [{"key": key, "value": value} if value else {"key": key} for key, value in entries], "token_bucket": of}


def limited(path: str, *descriptors: dict, limits: list[dict] | None = None, action: dict | None = None, default: dict = MANY, **filter_fields: Any) -> dict:
    limit = {"@": "local_ratelimit", "stat_prefix": "limited", "token_bucket": default, "filter_enabled": FULL, "filter_enforced": FULL,
             "descriptors": list(descriptors), **filter_fields}  # fmt: skip
    return route(path, config={"local_ratelimit": limit}, **({"rate_limits": limits} if limits else {}), **(action or {}))


def generic(value: str, **fields: Any) -> dict:
    return {"actions": [{"generic_key": {"descriptor_value": value}}], **fields}


def header_entry(skip: bool) -> dict:
    return {"request_headers": {"header_name": "x-a", "descriptor_key": "a", "skip_if_absent": skip}}


def query_entry(skip: bool) -> dict:
    return {"query_parameters": {"query_parameter_name": "q", "descriptor_key": "q", "skip_if_absent": skip}}


def metadata_entry(skip: bool) -> dict:
    key = {"key": "no.such.namespace", "path": [{"key": "x"}]}
    return {"metadata": {"descriptor_key": "m", "metadata_key": key, "source": "ROUTE_ENTRY", "skip_if_absent": skip}}


OF_KEY = ("generic_key", "k")
HIT_NUMBERS = [(f"number_{number}", {"number": number}, ()) for number in range(4)]
HIT_HEADERS = [(f"header_{number}", {"format": "%REQ(X-HITS)%"}, (f"X-Hits: {value}",) if value else ())
               for number, value in enumerate(("", "0", "1", "2", "3", "x", "-1", "1.5"))]  # fmt: skip
HITS = [(at, *one) for at in ("limits", "rate_limits") for one in (*HIT_NUMBERS, *HIT_HEADERS)]  # of the route and of the filter
OF_ROUTE, OF_HOST = bucket(("generic_key", "route")), bucket(("generic_key", "host"))
MASKED = {"actions": [{"masked_remote_address": {"v6_prefix_mask_len": 32}}]}
DYNAMIC = [{"actions": [{"request_headers": {"header_name": "x-a", "descriptor_key": "a"}}]}]
LIMITED = hosts(
    *(limited(f"/skip-{kind}-{skip}".lower(), bucket(OF_KEY), limits=[{"actions": [generic("k")["actions"][0], entry(skip)]}])
      for kind, entry in (("header", header_entry), ("query", query_entry), ("metadata", metadata_entry)) for skip in (True, False)),
    limited("/masked-v6", bucket(("masked_remote_address", "2001:db8::/32")), limits=[MASKED]),
    limited("/masked-all", bucket(("masked_remote_address", "2001:db8::7/128")), limits=[{"actions": [{"masked_remote_address": {}}]}]),
    limited("/disabled", bucket(OF_KEY), limits=[generic("k", disable_key="off")]),
    *(limited(f"/hits-{at}-{name}", bucket(OF_KEY, of=TWO), **{at: [generic("k", hits_addend=hits)]}) for at, name, hits, _ in HITS),
    limited("/both", OF_ROUTE, OF_HOST, limits=[generic("route")], action={"include_vh_rate_limits": True}),
    *(limited(f"/vh-{option.lower()}-{own}", OF_ROUTE, OF_HOST, limits=[generic("route")] if own == "own" else None, vh_rate_limits=option)
      for option in ("OVERRIDE", "INCLUDE", "IGNORE") for own in ("own", "none")),
    *(limited(f"/default-{always}".lower(), bucket(OF_KEY, of=MANY), limits=[generic("k")], default=ONE, always_consume_default_token_bucket=always)
      for always in (True, False)),
    limited("/dynamic", bucket(("a", "")), limits=DYNAMIC, max_dynamic_descriptors=2),
    rate_limits=[generic("host")],
)  # fmt: skip


def times(name: str, *requests: bytes, on: str = "limits", **fields: Any) -> Case:
    """Requests after each other on one connection, each with its response."""
    return Case(name, [step for request in requests for step in (request, Response())], on=on, **fields)


# ---- faults
def throttled(limit: dict, **fields: Any) -> dict:
    return {"fault": {"@": "fault", "response_rate_limit": {"percentage": {"numerator": 100}, **limit}, **fields}}


RUNTIME = {"my.never": 0, "my.always": 100}
FAULTS = hosts(
    route("/by-header", config=throttled({"header_limit": {}})),
    route("/runtime-off", config=throttled({"fixed_limit": {"limit_kbps": 1000}}, response_rate_limit_percent_runtime="my.never")),
    route("/runtime-on", config=throttled({"fixed_limit": {"limit_kbps": 1000}, "percentage": {"numerator": 0}},
                                          response_rate_limit_percent_runtime="my.always")),
)  # fmt: skip
THROUGHPUT = "X-Envoy-Fault-Throughput-Response"

# ---- RBAC
ANY = [{"any": True}]


def rules(**policies: dict) -> dict:
    return {"action": "ALLOW", "policies": {name: {"permissions": ANY, "principals": ANY, **policy} for name, policy in policies.items()}}


ROLE = {"principals": [{"header": {"name": "x-role", "string_match": {"exact": "admin"}}}]}
GUEST = {"principals": [{"header": {"name": "x-role", "string_match": {"exact": "guest"}}}]}
PER_RULE = filter_("rbac", rules=rules(admins=ROLE, guests=GUEST), shadow_rules=rules(admins=ROLE), track_per_rule_stats=True)
PER_RULE_PREFIXED = {**PER_RULE, "typed_config": {**PER_RULE["typed_config"], "rules_stat_prefix": "real_", "shadow_rules_stat_prefix": "dry_"}}
HIGH_PORTS = {"permissions": [{"destination_port_range": {"start": 1024, "end": 65536}}]}
LOW_PORTS = {"permissions": [{"destination_port_range": {"start": 1, "end": 1024}}]}

# ---- access logs
TYPED_JSON = {"path": "%REQ(:PATH)%", "code": "%RESPONSE_CODE%", "nested": {"a": "%REQ(X-A)%", "n": 1, "b": True}, "text": "got %RESPONSE_CODE% for %REQ(X-A)%",
              "none": None}  # fmt: skip


def formatter(name: str) -> dict:
    return {"name": f"envoy.formatter.{name}", "typed_config": {"@": f"envoy.extensions.formatter.{name}.v3." + name.title().replace("_", "")}}


BY_EXTENSION = {"text_format_source": {"inline_string": "%REQ_WITHOUT_QUERY(:PATH)% %REQ_WITHOUT_QUERY(X-A?:PATH):6% %METADATA(ROUTE:n:k)%\n"},
                "formatters": [formatter("req_without_query"), formatter("metadata")]}  # fmt: skip
TOLERANT = {"http2_protocol_options": {"stream_error_on_invalid_http_messaging": True}}
STRICT = {"http2_protocol_options": {"stream_error_on_invalid_http_messaging": False}}

CONFIG = bootstrap(
    http("main", ROUTES, route_config={"max_direct_response_body_size_bytes": 5000}),
    http("mapped", hosts(), use_remote_address=True, **MAPPED),
    http("mapped_hops", hosts(), use_remote_address=True, xff_num_trusted_hops=1, **MAPPED),
    http("mapped_silent", hosts(), use_remote_address=True, skip_xff_append=True, **MAPPED),
    http("mapped_within", hosts(), **MAPPED),
    http("unmapped", hosts(), use_remote_address=True, **PROXIED),
    http("unix", hosts(), internal_address_config={"unix_sockets": True}),
    http("not_unix", hosts(), use_remote_address=True, internal_address_config={"unix_sockets": False}, **PROXIED),
    http("optional", hosts(), filters=[{"name": "no.such.filter", "is_optional": True, "typed_config": NO_SUCH_TYPE}]),
    http("limits", LIMITED, filters=[filter_("local_ratelimit", stat_prefix="none")]),
    http("faults", FAULTS, filters=[filter_("fault")]),
    http("per_rule", hosts(), filters=[PER_RULE]),
    http("per_rule_prefixed", hosts(), filters=[PER_RULE_PREFIXED]),
    http("high_ports", hosts(), filters=[filter_("rbac", rules=rules(ports=HIGH_PORTS))]),
    http("low_ports", hosts(), filters=[filter_("rbac", rules=rules(ports=LOW_PORTS))]),
    http("by_state", hosts(), filters=[filter_("rbac", rules=rules(state={"principals": [{"filter_state": ABSENT_STATE}]}))]),
    http("by_no_state", hosts(), filters=[filter_("rbac", rules=rules(state={"principals": [{"not_id": {"filter_state": ABSENT_ADDRESS}}]}))]),
    http(
        "typed_json", hosts(), access_log=[{"name": "file", "typed_config": {"@": "file_log", "path": "${file:access.log}", "typed_json_format": TYPED_JSON}}]
    ),
    http("formatters", hosts(), access_log=[file_log(log_format=BY_EXTENSION)]),
    http("tolerant", hosts(), **TOLERANT),
    http("strict", hosts(), **STRICT),
    clusters=[cluster("a"), cluster("m", "b"), cluster("ring", *(keyed(name) for name in "abc"), lb_policy="RING_HASH")],
    layered_runtime={"layers": [{"name": "s", "static_layer": RUNTIME}]},
)
BAD_HEADERS = {
    "upper": [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a.test"), ("X-Upper", "1")],
    "no_path": [(":method", "GET"), (":scheme", "http"), (":authority", "a.test")],
    "connection": [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a.test"), ("connection", "close")],
    "length": [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a.test"), ("content-length", "x")],
}
BODY = answer("200 OK", b"b" * 600)

CASES = [
    # ---- the peer's address
    *(Case(f"address_{on}_{peer}_{name}", [line + get("/", *values), Response("GET")], on=on)
      for on in ("mapped", "mapped_hops", "mapped_silent", "mapped_within", "unmapped") for peer, line in PEERS.items()
      for name, values in FORWARDED.items() if on not in ("unmapped", "mapped_silent") or name in ("none", "v4")),
    *(Case(f"internal_{name}", get("/", *values), on="unix") for name, values in FORWARDED.items()),
    *(Case(f"internal_peer_{peer}", [line + get(), Response("GET")], on="not_unix") for peer, line in PRIVATE.items()),
    Case("optional_filter_of_no_known_type", get(), on="optional"),
    Case("optional_route_configuration_of_no_known_type", get("/optional")),
    # ---- routes
    *(Case(f"rewritten{path.replace('/', '_')}_{number}", get(path + query, *values))
      for path in ("/path/literal", "/path/header", "/path/original", "/path/empty", "/path/query", "/host/literal", "/host/header",
                   "/host/mixed", "/host/only")
      for number, (query, values) in enumerate((("", ()), ("?a=b", ("X-A: value",)), ("/more?", ("X-A: two words",)), ("#f", ("X-A: /s",))))),
    Case("filter_state_that_is_not_there", get("/state")),
    Case("long_direct_response", get("/long")),
    *(Case(f"large_regex_{number}", get(path)) for number, path in enumerate(("/large/abc", "/large/ab", "/large/" + "a" * 40, "/large/" + "a" * 41))),
    Case("total_weight", get("/weights")),
    *(Case(f"hash_skips_the_state_{value}", get("/hash", f"X-A: {value}")) for value in "123456"),
    # ---- rate limits
    *(times(f"limit_skip_{kind}_{skip}_{number}", *[get(f"/skip-{kind}-{skip}{query}", *values)] * 2)
      for kind in ("header", "query", "metadata") for skip in ("true", "false")
      for number, (query, values) in enumerate((("", ()), ("?q=1", ("X-A: 1",))))),
    times("limit_masked_v6", *[get("/masked-v6", "X-Forwarded-For: 2001:db8::7"), get("/masked-v6", "X-Forwarded-For: 2001:db8:1::8")] * 2),
    times("limit_masked_v6_stranger", *[get("/masked-v6", "X-Forwarded-For: 2001:db9::7")] * 2),
    times("limit_masked_v6_all", *[get("/masked-all", f"X-Forwarded-For: 2001:db8::{end}") for end in (7, 8, 8, 7)]),
    times("limit_disabled", *[get("/disabled")] * 3),
    *(times(f"limit_hits_{at}_{name}", *[get(f"/hits-{at}-{name}", *values)] * 3) for at, name, _, values in HITS),
    times("limit_of_host_included", *[get("/both")] * 2),
    *(times(f"limit_vh_{option}_{own}", *[get(f"/vh-{option}-{own}")] * 3) for option in ("override", "include", "ignore") for own in ("own", "none")),
    *(times(f"limit_default_{always}", *[get(f"/default-{always}")] * 3) for always in ("true", "false")),
    times("limit_dynamic", *(get("/dynamic", f"X-A: {value}") for value in (1, 1, 2, 2, 3, 1, 3, 2))),
    # ---- faults
    *(Case(f"throttled_by_header_{number}", get("/by-header", *values), [Request(), BODY], on="faults", joined=True)
      for number, values in enumerate(((), (f"{THROUGHPUT}: 100",), (f"{THROUGHPUT}: 0",), (f"{THROUGHPUT}: x",), (f"{THROUGHPUT}: -5",),
                                       (f"{THROUGHPUT}: 100", f"{THROUGHPUT}-Percentage: 0"), (f"{THROUGHPUT}: 100", f"{THROUGHPUT}-Percentage: 50x")))),
    *(Case(f"throttled_runtime_{which}", get(f"/runtime-{which}"), [Request(), BODY], on="faults", joined=True) for which in ("off", "on")),
    # ---- RBAC
    *(Case(f"{on}_{role or 'none'}", get("/", *([f"X-Role: {role}"] if role else [])), on=on)
      for on in ("per_rule", "per_rule_prefixed") for role in ("", "admin", "guest", "other")),
    *(Case(f"rbac_{on}", get(), on=on) for on in ("high_ports", "low_ports", "by_state", "by_no_state")),
    # ---- access logs
    *(Case(f"log_{on}_{number}", get("/p?q=1", *values), on=on) for on in ("typed_json", "formatters")
      for number, values in enumerate(((), ("X-A: /a?b=c",), ("X-A: plain",)))),
    # ---- HTTP/2 messaging
    *(h2_case(f"{on}_{name}", Open(pairs), Ended(), on=on) for on in ("tolerant", "strict") for name, pairs in BAD_HEADERS.items()),
]  # fmt: skip

test_case = check_cases(CASES)
