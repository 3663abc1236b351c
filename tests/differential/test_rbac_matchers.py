"""RBAC with match trees in place of policies, of requests and of connections: lists, maps, ranges, what has no value, what the log is told."""

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
    file_log,
    filter_,
    get,
    hcm,
    http,
    listener,
    req,
    to,
)

LOG = file_log(
    "%REQ(:PATH)% %RESPONSE_CODE% flags=%RESPONSE_FLAGS% details=%RESPONSE_CODE_DETAILS% hint=%DYNAMIC_METADATA(envoy.common:access_log_hint)% "
    "enforced=%DYNAMIC_METADATA(envoy.filters.http.rbac:enforced_effective_policy_id)%/%DYNAMIC_METADATA(envoy.filters.http.rbac:enforced_engine_result)% "
    "shadow=%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_effective_policy_id)%/%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_engine_result)% "
    "dry=%DYNAMIC_METADATA(envoy.filters.http.rbac:dry_shadow_effective_policy_id)% "
    "real=%DYNAMIC_METADATA(envoy.filters.http.rbac:real_enforced_engine_result)%\n"
)
TCP_LOG = file_log(
    "tcp flags=%RESPONSE_FLAGS% termination=%CONNECTION_TERMINATION_DETAILS% hint=%DYNAMIC_METADATA(envoy.common:access_log_hint)% "
    "shadow=%DYNAMIC_METADATA(envoy.filters.network.rbac:dry_shadow_effective_policy_id)%/"
    "%DYNAMIC_METADATA(envoy.filters.network.rbac:dry_shadow_engine_result)%\n"
)


def extension(kind: str, /, **fields: Any) -> dict:
    return {"name": kind, "typed_config": {"@": kind, **fields}}


def then(name: str, action: str = "ALLOW") -> dict:
    """A leaf."""
    return {"action": extension("rbac_action", name=name, action=action)}


def nested(**tree: Any) -> dict:
    return {"matcher": tree}


def single(given: dict, **match: Any) -> dict:
    return {"single_predicate": {"input": given, "value_match": match}}


def custom(given: dict, matcher: dict) -> dict:
    return {"single_predicate": {"input": given, "custom_match": matcher}}


def either(*predicates: dict) -> dict:
    return {"or_matcher": {"predicate": list(predicates)}}


def both(*predicates: dict) -> dict:
    return {"and_matcher": {"predicate": list(predicates)}}


def neither(predicate: dict) -> dict:
    return {"not_matcher": predicate}


def first(*branches: tuple[dict, dict], **fields: Any) -> dict:
    """A list of predicates with what follows."""
    return {"matcher_list": {"matchers": [{"predicate": predicate, "on_match": on_match} for predicate, on_match in branches]}, **fields}


def tree(given: dict, kind: str, children: dict, **fields: Any) -> dict:
    return {"matcher_tree": {"input": given, kind: children if kind == "custom_match" else {"map": children}}, **fields}


def cidr(text: str) -> dict:
    address, length = text.split("/")
    return {"address_prefix": address, "prefix_len": int(length)}


def header(name: str) -> dict:
    return extension("header_input", header_name=name)


PATH = header(":path")
ANY = {"safe_regex": {"google_re2": {}, "regex": ".*"}}
LOOPBACK = extension("ip_matcher", cidr_ranges=[cidr("127.0.0.0/8")], stat_prefix="loopback")
NINES = extension("ip_matcher", cidr_ranges=[cidr("9.9.0.0/16"), cidr("2001:db8::/32")], stat_prefix="nines")
SHADOW_DENIED = custom(
    extension("metadata_input", filter="envoy.filters.http.rbac", path=[{"key": "shadow_engine_result"}]),
    extension("metadata_matcher", value={"string_match": {"exact": "denied"}}),
)

LIST = first(
    (single(PATH, exact="/exact"), then("exact")),
    (single(PATH, prefix="/PRE", ignore_case=True), then("prefix")),
    (single(PATH, suffix="/suf"), then("suffix", "DENY")),
    (single(PATH, contains="middle"), then("contains")),
    (single(PATH, safe_regex={"google_re2": {}, "regex": "/re/[0-9]+"}), then("regex")),
    (both(single(PATH, prefix="/and"), single(header("x-a"), exact="1"), single(header("x-b"), exact="2")), then("and")),
    (both(single(PATH, prefix="/or"), either(single(header("x-a"), exact="1"), single(header("x-a"), exact="1,2"))), then("or")),
    (both(single(PATH, prefix="/not"), neither(single(header("x-a"), exact="1"))), then("not")),
    (both(single(PATH, prefix="/empty"), single(header("X-A"), exact="")), then("empty header")),
    (single(PATH, prefix="/nested"), nested(**first((single(header("x-a"), exact="1"), then("inner"))))),
    (single(PATH, prefix="/nested/no"), nested(**first((single(header("x-a"), exact="2"), then("inner2")), on_no_match=then("inner_none", "DENY")))),
    (single(PATH, prefix="/nested"), then("after")),
    (both(single(PATH, prefix="/source"), custom(extension("source_ip_input"), LOOPBACK)), then("source")),
    (both(single(PATH, prefix="/forwarded"), custom(extension("source_ip_input"), NINES)), then("forwarded")),
    (both(single(PATH, prefix="/direct"), custom(extension("direct_source_ip_input"), LOOPBACK)), then("direct")),
    (both(single(PATH, prefix="/destination"), custom(extension("destination_ip_input"), LOOPBACK)), then("destination")),
    (both(single(PATH, prefix="/header_ip"), custom(header("x-ip"), NINES)), then("header_ip")),
    (both(single(PATH, prefix="/ports"), single(extension("source_port_input"), safe_regex={"google_re2": {}, "regex": "[1-9][0-9]*"}),
          single(extension("destination_port_input"), safe_regex={"google_re2": {}, "regex": "[1-9][0-9]*"})), then("ports")),
    (both(single(PATH, prefix="/sni"), single(extension("server_name_input"), exact="")), then("sni")),
    (both(single(PATH, prefix="/state"), single(extension("filter_state_input", key="none"), **ANY)), then("state")),
    (both(single(PATH, prefix="/namespace"), neither(single(extension("namespace_input"), **ANY))), then("namespace")),
    (both(single(PATH, prefix="/nameless"), neither(single(header(""), **ANY))), then("nameless")),
    (both(single(PATH, prefix="/meta"), SHADOW_DENIED), then("metadata")),
    (both(single(PATH, prefix="/nometa"), custom(extension("metadata_input", filter="nobody", path=[{"key": "k"}]),
          extension("metadata_matcher", value={"string_match": {"exact": "denied"}}, invert=True))), then("no_metadata")),
    # Without TLS there is nothing to say of certificates: nothing after this one is looked at.
    (either(single(PATH, prefix="/tls"), single(extension("uri_san_input"), **ANY)), then("tls")),
    (single(PATH, prefix="/after_tls"), then("after_tls")),
)  # fmt: skip
REQUESTS = {
    "exact": get("/exact"),
    "exact_query": get("/exact?a"),
    "prefix": get("/pre/x"),
    "suffix": get("/a/suf"),
    "contains": get("/a/middle/b"),
    "regex": get("/re/12"),
    "regex_is_whole": get("/re/12a"),
    "and": get("/and", "X-A: 1", "X-B: 2"),
    "and_not_all": get("/and", "X-A: 1"),
    "or_first": get("/or", "X-A: 1"),
    "or_joined": get("/or", "X-A: 1", "X-A: 2"),
    "or_neither": get("/or", "X-A: 2"),
    "not": get("/not", "X-A: 2"),
    "not_missing": get("/not"),
    "not_denied": get("/not", "X-A: 1"),
    "empty_header": get("/empty", "X-A:"),
    "empty_missing": get("/empty"),
    "nested": get("/nested", "X-A: 1"),
    "nested_goes_on": get("/nested"),
    "nested_otherwise": get("/nested/no"),
    "source": get("/source"),
    "source_forwarded": get("/source", "X-Forwarded-For: 9.9.9.9"),
    "forwarded": get("/forwarded", "X-Forwarded-For: 9.9.9.9"),
    "forwarded_6": get("/forwarded", "X-Forwarded-For: 2001:db8::1"),
    "direct": get("/direct", "X-Forwarded-For: 9.9.9.9"),
    "destination": get("/destination"),
    "header_ip": get("/header_ip", "X-Ip: 9.9.1.1"),
    "header_ip_bad": get("/header_ip", "X-Ip: 9.9.1"),
    "header_ip_missing": get("/header_ip"),
    "ports": get("/ports"),
    "sni": get("/sni"),
    "state": get("/state"),
    "namespace": get("/namespace"),
    "nameless_header": get("/nameless"),
    "metadata": get("/meta"),
    "metadata_missing": get("/nometa"),
    "tls": get("/tls"),
    "after_tls": get("/after_tls"),
    "post": req("POST", "/exact", body=b"hello"),
    "post_denied": req("POST", "/suf", body=b"hello"),
}

EXACT = tree(header("x-kind"), "exact_match_map", {
    "a": then("a"), "b": then("b", "DENY"), "c": nested(**first((single(PATH, exact="/c"), then("c")))),
}, on_no_match=then("other kind"))  # fmt: skip
STRICT = tree(header("x-kind"), "exact_match_map", {"a": then("a")})
PREFIX = tree(PATH, "prefix_match_map", {
    "/": then("root", "DENY"), "/api": then("api"), "/api/v1": nested(**first((single(header("x-a"), exact="1"), then("v1", "DENY")))),
    "/only": nested(**first((single(header("x-a"), exact="1"), then("only")))),
})  # fmt: skip
RANGES = tree(header("x-ip"), "custom_match", extension("ip_tree", range_matchers=[
    {"ranges": [cidr("10.0.0.0/8")], "on_match": then("ten", "DENY")},
    {"ranges": [cidr("10.1.0.0/16"), cidr("2001:db8::/32")], "on_match": then("ten_one")},
    {"ranges": [cidr("10.1.2.0/24")], "on_match": nested(**first((single(PATH, exact="/inner"), then("inner", "DENY"))))},
    {"ranges": [cidr("20.0.0.0/8")], "on_match": then("exclusive"), "exclusive": True},
    {"ranges": [cidr("20.1.0.0/16")], "on_match": nested(**first((single(PATH, exact="/inner"), then("inner20", "DENY"))))},
    {"ranges": [cidr("20.1.0.0/16")], "on_match": nested(**first((single(PATH, exact="/same"), then("same20"))))},
]), on_no_match=then("elsewhere"))  # fmt: skip
LOGGED = first(
    (single(PATH, prefix="/log"), then("l", "LOG")), (single(PATH, prefix="/allow"), then("a")), (single(PATH, prefix="/deny"), then("d", "DENY")),
)  # fmt: skip
ALWAYS = {"on_no_match": then("always there")}
NEVER = {"on_no_match": then("never", "DENY")}
ALL = {"action": "ALLOW", "policies": {"all": {"permissions": [{"any": True}], "principals": [{"any": True}]}}}
NAMED = {"shadow_rules_stat_prefix": "dry_", "rules_stat_prefix": "real_", "track_per_rule_stats": True}
CERTIFIED = first(
    (both(single(PATH, prefix="/uri"), single(extension("uri_san_input"), prefix="spiffe://mesh.test/")), then("uri")),
    (both(single(PATH, prefix="/dns"), single(extension("dns_san_input"), contains="web.mesh.test")), then("dns")),
    (both(single(PATH, prefix="/subject"), single(extension("subject_input"), contains="CN=")), then("subject")),
    (both(single(PATH, prefix="/sni"), single(extension("server_name_input"), **ANY)), then("sni")),
    (single(PATH, prefix="/open"), then("open")),
)


def guarded(name: str, matcher: dict | None = None, hosts: Any = None, **fields: Any) -> dict:
    """A listener with RBAC; `matcher` is not there where None."""
    fields = fields | ({"matcher": matcher} if matcher is not None else {})
    return http(name, hosts or to("a"), filters=[filter_("rbac", **fields)], access_log=[LOG], use_remote_address=False)


def connections(name: str, **fields: Any) -> dict:
    """A TCP proxy behind RBAC."""
    return listener(name, filter_("network_rbac", stat_prefix=f"{name}.", **fields), filter_("tcp_proxy", stat_prefix=name, cluster="a", access_log=[TCP_LOG]))


def of_route(prefix: str, **rbac: Any) -> dict:
    return {"match": {"prefix": prefix}, "route": {"cluster": "a"}, "typed_per_filter_config": {"rbac": {"@": "rbac_per_route", "rbac": rbac}}}


ROUTES = [{"name": "all", "domains": ["*"], "routes": [
    of_route("/log", matcher=LOGGED), of_route("/rules", rules=ALL), of_route("/both", rules=ALL, matcher=NEVER), {"match": {"prefix": "/"}, "route": {
        "cluster": "a"}}]}]  # fmt: skip
FROM_LOOPBACK = first((custom(extension("direct_source_ip_input"), LOOPBACK), then("from here")))
DENY_LOOPBACK = first((custom(extension("source_ip_input"), LOOPBACK), then("from here", "DENY")))
CONFIG = bootstrap(
    guarded("list", LIST, shadow_rules={"action": "ALLOW", "policies": {}}),
    http("after_another", to("a"), access_log=[LOG], filters=[
        filter_("rbac", shadow_rules={"action": "ALLOW", "policies": {}}), filter_("rbac", matcher=first((SHADOW_DENIED, then("metadata"))))]),
    guarded("exact", EXACT, track_per_rule_stats=True),
    guarded("strict", STRICT),
    guarded("prefix", PREFIX),
    guarded("ranges", RANGES),
    guarded("logged", LOGGED),
    guarded("shadow", shadow_matcher=LOGGED, **NAMED),
    guarded("shadow_of_rules", rules=ALL, shadow_matcher=STRICT, **NAMED),
    guarded("before_rules", NEVER, rules=ALL, shadow_rules=ALL, shadow_matcher=NEVER, **NAMED),
    guarded("always", ALWAYS),
    guarded("empty", {}),
    guarded("routes", EXACT, hosts=ROUTES),
    listener("certified", chains=[{
        "filters": [hcm("certified", to("a"), access_log=[LOG], filters=[filter_("rbac", matcher=CERTIFIED)])],
        "transport_socket": {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": {
            "tls_certificates": [{"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}],
            "validation_context": {"trusted_ca": {"filename": "${pem:ca}"}}}}}}]),
    connections("tcp_allowed", matcher=FROM_LOOPBACK),
    connections("tcp_denied", matcher=DENY_LOOPBACK),
    connections("tcp_nothing", matcher=first((single(extension("server_name_input"), **ANY), then("sni")))),
    connections("tcp_no_tls", matcher=first((single(extension("dns_san_input"), **ANY), then("dns")), on_no_match=then("other"))),
    connections("tcp_logged", matcher=tree(extension("destination_ip_input"), "exact_match_map", {"127.0.0.1": then("l", "LOG")})),
    connections("tcp_shadow", shadow_matcher=DENY_LOOPBACK, shadow_rules_stat_prefix="dry_"),
    connections("tcp_shadow_both", matcher=ALWAYS, shadow_matcher=FROM_LOOPBACK, shadow_rules_stat_prefix="dry_"),
    clusters=[cluster("a")],
)  # fmt: skip

ECHO = Play([[Echo(), Close()]], on_connect=True)
GREET = Play([[b"220 ready\r\n", Until(b"quit"), b"bye", Close(), Close()]], on_connect=True)
CLIENT = Tls(certificate="client")


def ask(on: str, name: str, request: bytes, **fields: Any) -> Case:
    return Case(f"{on}_{name}", request, on=on, **fields)


def again(on: str, *requests: bytes) -> Case:
    """Requests in turn on one connection, several times: what is remembered of them must be right."""
    return Case(f"{on}_again", [part for request in requests * 4 for part in (request, Response())], on=on)


def connect(on: str) -> Case:
    """One connection whose server speaks first."""
    return Case(on, [Until(b"ready"), b"hello"], GREET, on=on, then="closed")


def talk(on: str) -> Case:
    """One that may pass."""
    return Case(on, [b"hello", Until(b"hello"), b"again", Until(b"again"), Close()], ECHO, on=on, then="closed")


CASES = [
    *[ask("list", name, request) for name, request in REQUESTS.items()],
    ask("after_another", "allowed", get("/")),
    *[ask("exact", f"{kind}{path.replace('/', '_')}", get(path, f"X-Kind: {kind}")) for kind in "abcd" for path in ("/", "/c")],
    ask("exact", "missing", get("/")),
    *[ask("strict", kind, get("/", f"X-Kind: {kind}")) for kind in "ab"],
    ask("strict", "missing", get("/")),
    *[ask("prefix", path.strip("/").replace("/", "_") or "root", get(path)) for path in ("/", "/ap", "/api", "/apis", "/api/v1", "/api/v1/x", "/only")],
    ask("prefix", "v1_denied", get("/api/v1/x", "X-A: 1")),
    ask("prefix", "only_allowed", get("/only", "X-A: 1")),
    *[ask("ranges", f"{ip.replace('.', '_').replace(':', '_')}{path.replace('/', '_')}", get(path, f"X-Ip: {ip}"))
      for ip in ("10.2.0.1", "10.1.0.1", "10.1.2.3", "2001:db8::7", "20.2.0.1", "20.1.0.1", "30.0.0.1", "nonsense", "10.1.0.1:80")
      for path in ("/", "/inner", "/same")],
    ask("ranges", "missing", get("/")),
    *[ask(on, path, get(f"/{path}")) for on in ("logged", "shadow") for path in ("log", "allow", "deny", "none")],
    *[ask("shadow_of_rules", kind, get("/", f"X-Kind: {kind}")) for kind in "ab"],
    ask("before_rules", "matcher_first", get("/")),
    ask("always", "allowed", get("/")),
    ask("empty", "denied", get("/")),
    *[ask("routes", path, get(f"/{path}", "X-Kind: b")) for path in ("log", "rules", "both", "other")],
    *[ask("certified", f"{path}_{who}", get(f"/{path}"), tls=by)
      for path in ("uri", "dns", "subject", "sni", "open") for who, by in (("client", CLIENT), ("anonymous", Tls()))],
    again("exact", get("/", "X-Kind: a"), get("/", "X-Kind: b")),
    again("always", get("/x")),
    again("logged", get("/log"), get("/allow"), get("/deny"), get("/none")),
    *[talk(on) for on in ("tcp_allowed", "tcp_logged", "tcp_shadow", "tcp_shadow_both")],
    *[connect(on) for on in ("tcp_denied", "tcp_nothing", "tcp_no_tls")],
]  # fmt: skip

test_case = check_cases(CASES)
