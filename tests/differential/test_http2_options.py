"""Options that few set: the gentle end of old HTTP/1 connections, the scheme of the way upstream, connections ahead of requests for a whole cluster."""

from __future__ import annotations

from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Counted,
    Ended,
    Heard,
    Idle,
    Open,
    Request,
    Response,
    Signal,
    Sync,
    Until,
    Wait,
    ask,
    bootstrap,
    check_cases,
    cluster,
    each,
    file_log,
    get,
    h2_case,
    h2_cluster,
    head,
    http,
    http2_options,
    req,
)


def vhost(name: str, to: str = "", **route: Any) -> dict[str, Any]:
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to or name, **route}}]}


TLS = {"transport_socket": {"name": "tls", "typed_config": {"@": "upstream_tls"}}}
SCHEMES = [file_log("%RESPONSE_CODE% scheme=%REQ(:SCHEME)% proto=%REQ(X-FORWARDED-PROTO)%\n")]
OLD = {"common_http_protocol_options": {"max_connection_duration": "0.3s"}, "http1_safe_max_connection_duration": True, "drain_timeout": "0.1s"}
CLUSTERS = [
    cluster("a"),
    h2_cluster("h2a"),
    cluster("tls", "tls_a", **TLS),
    cluster("tls_h2", "tls_h2", typed_extension_protocol_options=http2_options(), **TLS),
    cluster("mixed", "tls_h2", typed_extension_protocol_options=http2_options(), transport_socket_matches=[{"name": "all", "match": {}, **TLS}]),
]
THREE = ("a", "b", "c")


def ahead(ratio: float, **fields: Any) -> dict[str, Any]:
    return {"preconnect_policy": {"predictive_preconnect_ratio": ratio, **fields}}


CLUSTERS += [
    cluster("ahead-2", *THREE, **ahead(2.0)),
    cluster("ahead-3", *THREE, **ahead(3.0)),
    cluster("ahead-little", *THREE, **ahead(1.2)),
    cluster("ahead-not", *THREE, **ahead(1.0)),
    cluster("ahead-both", *THREE, **ahead(2.0, per_upstream_preconnect_ratio=2.0)),
    cluster("ahead-one", "a", **ahead(3.0)),
    cluster("ahead-least", "a", lb_policy="LEAST_REQUEST", **ahead(3.0)),
    cluster("ahead-ring", "a", lb_policy="RING_HASH", **ahead(3.0)),
    cluster("ahead-broken", *THREE, circuit_breakers={"thresholds": [{"max_connections": 2}]}, **ahead(3.0)),
    cluster("ahead-dead", "dead", "dead2", **ahead(3.0)),
    h2_cluster("ahead-h2", "h2a", "h2b", "h2c", **ahead(3.0)),
    h2_cluster("ahead-h2-one", "h2a", "h2b", "h2c", options={"max_concurrent_streams": 1}, **ahead(3.0)),
]
HOSTS = [*(vhost(one["name"].replace("_", "-"), one["name"]) for one in CLUSTERS), vhost("adds", "a")]
CONFIG = bootstrap(
    http("main", HOSTS),
    http("soft", HOSTS, listener_fields={"access_log": [file_log("closed=%DOWNSTREAM_LOCAL_CLOSE_REASON%/%DOWNSTREAM_DETECTED_CLOSE_TYPE%\n")]}, **OLD),
    http("soft_once", HOSTS, **OLD | {"common_http_protocol_options": {"max_connection_duration": "0.3s", "max_requests_per_connection": 1}}),
    http("matching", HOSTS, access_log=SCHEMES, scheme_header_transformation={"match_upstream": True}),
    http("matching_at_the_edge", HOSTS, access_log=SCHEMES, use_remote_address=True, scheme_header_transformation={"match_upstream": True}),
    http("without_effect", HOSTS, append_local_overload=True, add_proxy_protocol_connection_state=False),
    http("not_matching", HOSTS, access_log=SCHEMES, scheme_header_transformation={"match_upstream": False}),
    clusters=CLUSTERS,
)

RESUMED = {"skip_stats": ("ssl.session_reused", ".all.total_match_count")}  # sessions are not resumed here; hosts choose their sockets when they like
EXPIRED = Counted("downstream_cx_max_duration_reached", 1)
SOFT = [
    Case("soft_drain_of_an_idle_connection", [get("/1"), Response(), EXPIRED, get("/2"), Response()], on="soft", then="closed"),
    Case("soft_drain_is_no_timeout", [get("/1"), Response(), EXPIRED, Idle(0.3), get("/2"), Response()], on="soft", then="closed"),
    Case("soft_drain_after_repeats", [*[step for _ in range(5) for step in (get(), Response())], EXPIRED, get(), Response()], on="soft", then="closed"),
    Case(
        "soft_drain_of_a_busy_connection",
        [get("/1"), Response(), get("/2"), Response()],
        each([Request(), EXPIRED, OK], [Request(), OK]),
        on="soft",
        then="closed",
    ),
    Case(
        "soft_drain_while_a_repeat_waits",
        [*[step for _ in range(5) for step in (get(), Response())]],
        each(*[[Request(), OK]] * 3, [Request(), EXPIRED, OK], [Request(), OK]),
        on="soft",
        then="closed",
    ),
    Case(
        "soft_drain_while_a_head_is_not_complete",
        [get("/1")[:-2], EXPIRED, get("/1")[-2:], Response(), get("/2"), Response()],
        on="soft",
        then="closed",
    ),
    Case(
        "soft_drain_with_pipelined_requests",
        [get("/1"), Wait("asked"), get("/2") + get("/3"), Signal("more"), Response(), Response()],
        each([Request(), Signal("asked"), Wait("more"), EXPIRED, OK], [Request(), OK]),
        on="soft",
        then="closed",
    ),
    Case(
        "soft_drain_in_a_body",
        [req("POST", "/", "Content-Length: 10") + b"hello", Wait("begun"), EXPIRED, b"world", Response(), get("/2"), Response()],
        each([Until(b"hello"), Signal("begun"), Until(b"world"), OK], [Request(), OK]),
        on="soft",
        then="closed",
    ),
    Case("soft_drain_of_a_connection_without_anything", [b""], on="soft", then="closed"),
    Case("soft_drain_where_one_request_is_the_limit", [get("/1"), Response()], [Request(), EXPIRED, OK], on="soft_once", then="closed"),
    h2_case("no_soft_drain_for_http2", ask(), on="soft", then="closed"),
]


def scheme(on: str) -> list[Case]:
    """What scheme goes upstream, and what logs say of it. Requests come three times: what is remembered of them must not change it."""
    cases = []
    for host in ("a", "h2a", "tls", "tls-h2", "mixed"):
        for came in ("http", "https"):
            asked = [ask("GET", "/", authority=f"{host}.test", scheme=came), ask("POST", "/", authority=f"{host}.test", scheme=came, body=b"x")]
            cases.append(h2_case(f"{on}_{host}_h2_{came}", *asked, *asked, *asked, on=on, **RESUMED))
        again = [step for _ in range(4) for step in (get(host=f"{host}.test"), Response())]
        cases.append(Case(f"{on}_{host}_h1", again, on=on, **RESUMED))
        told = [step for _ in range(4) for step in (get("/", "X-Forwarded-Proto: https", host=f"{host}.test"), Response())]
        cases.append(Case(f"{on}_{host}_h1_told", told, on=on, **RESUMED))
    return cases


def preconnect() -> list[Case]:
    """How many connections there are. Which hosts get them, chance decides."""
    cases = []
    for one in CLUSTERS:
        name = one["name"]
        if name.startswith("ahead"):
            asked = [step for n in range(4) for step in (get(f"/{n}", host=f"{name}.test"), Response())]
            # Whether a connection is there when its request comes depends on which host that is for.
            chance: dict[str, Any] = {"skip_stats": ("upstream_rq_pending_total",)} if name == "ahead-h2-one" else {}
            cases.append(Case(f"preconnect_{name}", asked, skip=("upstream", "log"), **chance))
            two = [Open(head(authority=f"{name}.test")), Open(head(authority=f"{name}.test"))]
            pairs = [step for n in (0, 4, 8) for step in (*two, Ended(n + 1, n + 3), Sync())]
            cases.append(h2_case(f"preconnect_{name}_two_at_once", *pairs, Heard("headers", 6), skip=("upstream", "log", "client"), **chance))
    return cases


CASES = [
    h2_case("options_without_effect", ask(), ask(authority="h2a.test"), on="without_effect"),
    *preconnect(),
    *SOFT,
    *scheme("matching"),
    *scheme("matching_at_the_edge"),
    *scheme("not_matching"),
]

test_case = check_cases(CASES)
