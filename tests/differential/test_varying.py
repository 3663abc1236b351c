"""Requests over HTTP/2 whose path, request id and trace context are other ones each time: what a proxy remembers of what they have in common must never show.

Each case runs with what differs as literals that go into no table, and with an encoder that puts everything into its table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Close,
    Data,
    Ended,
    Headers,
    Idle,
    Open,
    Play,
    Request,
    Reset,
    Rst,
    Script,
    Signal,
    Until,
    Wait,
    bootstrap,
    check_cases,
    cluster,
    each,
    filter_,
    h2_case,
    h2_cluster,
    head,
    http,
    lines,
    message,
    reply,
)
from tests.differential.test_repeated import CONFIG as REPEATED
from tests.differential.test_repeated import ERROR, JSON_LOG, THEIRS, file_log, vhost

TIMES = 8  # from the fifth on, at the latest, requests have plans
TOLD = {"then": "leave", "skip": ("client",), "note": "we say why in a GOAWAY"}
H2 = [
    vhost("a", "cluster: h2a"),
    vhost("adds", "cluster: h2a", top="request_headers_to_add: [{header: {key: x-added, value: constant}}]"),
    vhost("adds_path", "cluster: h2a", top="request_headers_to_add: [{header: {key: x-copy, value: '%REQ(:path)%|%REQ(x-a)%'}}]"),
    vhost("prefix", "cluster: h2a, prefix_rewrite: /other/"),
    vhost("regex", "cluster: h2a, regex_rewrite: {pattern: {regex: '/p/(.*)'}, substitution: '/q/\\\\1'}"),
    vhost("retries", "cluster: h2a, retry_policy: {retry_on: '5xx,reset', retry_back_off: {base_interval: 0.001s}}, timeout: 4s"),
    vhost("timeout", "cluster: h2a, timeout: 2s"),  # requests that are answered are answered in time, also on a busy machine
    vhost("hashed", "cluster: h2a, hash_policy: [{header: {header_name: x-request-id}}]"),
    vhost("nobody", "cluster: nobody"),
]
ROUTES = {"name": "paths", "domains": ["paths.test"], "routes": [
    {"match": {"prefix": "/p/1"}, "direct_response": {"status": 200, "body": {"inline_string": "here"}}},
    {"match": {"prefix": "/p/2"}, "redirect": {"path_redirect": "/there"}},
    {"match": {"safe_regex": {"regex": "/p/[36]\\?.*"}}, "route": {"cluster": "h2a"}},
    {"match": {"prefix": "/p/4", "query_parameters": [{"name": "q", "string_match": {"exact": "4"}}]}, "route": {"cluster": "a"}},
    {"match": {"prefix": "/p/5"}, "route": {"cluster": "h2a", "timeout": "4s"}}]}  # fmt: skip
BY_ID = "%REQ(:PATH)% %REQ(X-REQUEST-ID)% %REQ(TRACEPARENT)% %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED%\n"
CONFIG = bootstrap(
    *REPEATED["static_resources"]["listeners"][:-1],  # the last one is the rig's
    http("h2", [*H2, ROUTES]),
    http("h2_json", H2, access_log=[file_log(**JSON_LOG)]),
    http("h2_edge", H2, use_remote_address=True),
    http("h2_no_id", H2, generate_request_id=False),
    http("h2_keeps_id", H2, preserve_external_request_id=True, use_remote_address=True),
    http("h2_normalises", H2, normalize_path=True, merge_slashes=True),
    http("h2_short_idle", H2, stream_idle_timeout="0.2s"),
    http("h2_logged_by_id", H2, access_log=[file_log(BY_ID)]),
    http("h2_stats", H2, filters=[filter_("grpc_stats", emit_filter_state=False, stats_for_all_methods=True)]),
    clusters=[*REPEATED["static_resources"]["clusters"], h2_cluster("h2a"), {**cluster("nobody"), "load_assignment": {"cluster_name": "nobody"}}],
    layered_runtime=REPEATED["layered_runtime"],
)

VARYING = ("x-request-id: {n:08d}-2222-4333-8444-555555555555", "traceparent: 00-{n:032x}-{n:016x}-01")


def requests(
    *headers: str,
    indexed: bool,
    method: str = "GET",
    path: str = "/p/{n}?q={n}",
    body: bytes = b"",
    before_body: Script | None = None,
    times: int = TIMES,
    wait: Callable[[int], Script] = lambda _: [Ended()],
    **fields: Any,
) -> Script:
    """So many requests, one after the other. In `path` and `headers`, `{n}` is the number of the request. `wait`: what follows that request."""
    literal = frozenset(line.partition(": ")[0] for line in (":path: " + path, *headers) if "{n" in line or line.startswith(("authorization", "cookie")))
    steps: Script = []
    for n in range(1, times + 1):
        pairs = head(method, path.format(n=n), *(line.format(n=n) for line in headers), **fields)
        steps.append(Open(pairs, end=not body, literal=frozenset() if indexed else literal))
        if body:
            steps += [*(before_body or ()), Data(body, end=True)]
        steps += wait(n)
    return steps


def both(
    name: str, *headers: str, on: str = "h2", up: Any = None, then: str = "open", skip: tuple[str, ...] = (), note: str = "", **fields: Any
) -> Iterator[Case]:
    """The case in its two ways. By default the upstreams of listeners whose names begin with h2 speak HTTP/2."""
    play = up if up is not None else {"h2a": [Ended(), *reply()]} if on.startswith("h2") else None
    for way, indexed in (("literals", False), ("indexed", True)):
        steps = requests(*(headers or VARYING), indexed=indexed, **fields)
        yield h2_case(f"{name}_{way}", steps, on=on, then=then, skip=skip, note=note, **({} if play is None else {"up": play}))


def late(*script: Any) -> Play:
    """The seventh request gets this, all others an answer."""
    return each(*[[Request(), OK]] * 6, [Request(), *script], [Request(), OK])


def h2_late(*script: Any) -> dict[str, Play]:
    """The same of an upstream that speaks HTTP/2."""
    return {"h2a": each(*[[Ended(), *reply()]] * 6, list(script), reply())}


def cases() -> Iterator[Case]:
    # ---- to HTTP/1 upstreams, and what routes do
    yield from both("get", on="main")
    yield from both("get_with_more", *VARYING, "user-agent: probe", "x-a: 1", "authorization: Bearer abc", "cookie: a=b", on="main")
    yield from both("post", on="main", method="POST", body=b"hello")
    yield from both("post_length", *VARYING, "content-length: 5", on="main", method="POST", body=b"hello")
    yield from both("head", on="main", method="HEAD")
    for host in (
        "adds", "adds_id", "adds_path", "adds_address", "adds_back", "removes", "prefix", "rehost", "auto", "weighted", "retries", "endless", "counted",
        "clustered", "fraction", "nowhere", "timeout",
    ):  # fmt: skip
        yield from both(f"host_{host}", *VARYING, "x-a: {n}", on="main", authority=f"{host}.test", up=Play([[Request(), THEIRS]]))
    yield from both("host_by_header", *VARYING, "x-to: b", on="main", authority="by_header.test")
    yield from both("host_by_varying_header", *VARYING, "x-to: b{n}", on="main", authority="by_header.test")
    for listener in ("edge", "json", "filtered", "rbac", "rbac_deny", "limit", "fault", "no_fault", "plain_router", "pass_server", "echo_id", "no_id", "few"):
        yield from both(f"on_{listener}", *VARYING, "x-a: {n}", on=listener)
    yield from both("rbac_role_varies", *VARYING, "x-role: admin{n}", on="rbac")
    yield from both("fault_sometimes", *VARYING, "x-break: {n}", on="fault")
    yield from both("many", on="main", authority="many.test", path="/a{n}")
    yield from both("many_by_header", *VARYING, "x-a: b{n}", on="main", authority="many.test", path="/by{n}")
    yield from both("many_no_route", on="main", authority="many.test", path="/zzz{n}")
    # ---- what upstreams answer
    yield from both("theirs", on="main", up=Play([[Request(), THEIRS]]))
    yield from both("late_error", on="main", up=late(ERROR))
    yield from both("late_closed", on="main", up=late(Close()))
    yield from both("late_reset", on="main", up=late(Reset()))
    yield from both("late_retried", on="main", authority="retries.test", up=late(ERROR))
    yield from both("late_retried_reset", on="main", authority="resets.test", up=late(Reset()))
    yield from both("late_timed_out", on="main", authority="timeout.test", up=late(Until(b"never")))
    yield from both("post_retried", on="main", method="POST", body=b"hello", authority="retries.test", up=late(ERROR))
    # ---- to HTTP/2 upstreams
    yield from both("h2_get")
    yield from both("h2_get_with_more", *VARYING, "user-agent: probe", "x-a: 1", "authorization: Bearer abc", "cookie: a=b")
    yield from both("h2_other_credentials", *VARYING, "authorization: Bearer {n}", "cookie: a={n}")
    yield from both("h2_post", method="POST", body=b"hello")
    yield from both("h2_body_apart", method="POST", body=b"x", before_body=[Idle(0.02)])
    for host in ("adds", "adds_path", "prefix", "regex", "retries", "hashed", "nobody", "nowhere"):
        yield from both(f"h2_host_{host}", *VARYING, "x-a: {n}", authority=f"{host}.test")
    yield from both("h2_paths", authority="paths.test")
    for listener in ("h2_json", "h2_edge", "h2_no_id", "h2_keeps_id", "h2_normalises", "h2_short_idle", "h2_logged_by_id"):
        yield from both(f"on_{listener}", *VARYING, "x-a: {n}", on=listener)
        yield from both(f"on_{listener}_without_ids", "x-a: {n}", on=listener)
    yield from both("h2_path_only", "x-a: 1")
    yield from both("h2_same_path", *VARYING, path="/same")
    yield from both("h2_relayed", *VARYING, "x-forwarded-proto: http", "x-envoy-expected-rq-timeout-ms: 15000")
    yield from both("h2_relayed_https", *VARYING, "x-forwarded-proto: https", "x-envoy-expected-rq-timeout-ms: 15000")
    yield from both("h2_proto_varies", *VARYING, "x-forwarded-proto: http{n}")
    yield from both("h2_expected_timeout_varies", *VARYING, "x-envoy-expected-rq-timeout-ms: {n}000")
    yield from both("h2_timeout_varies", *VARYING, "x-envoy-upstream-rq-timeout-ms: {n}000", "x-forwarded-for: 10.0.0.1")
    yield from both("h2_forwarded_for_varies", *VARYING, "x-forwarded-for: 10.0.0.{n}")
    yield from both("h2_empty_id", "x-request-id: ", "traceparent: {n}")
    yield from both("h2_empty_value", *VARYING, "x-a: ")
    yield from both("h2_long_values", *VARYING, "x-long: {n:0200d}", path="/p/{n:0180d}")
    yield from both("h2_visible", *VARYING, "x-a: \\\\ {n} {{}}|~", path="/p/{n}\\\\|~")
    yield from both("h2_not_ascii", *VARYING, "x-a: \xe9{n}", path="/p/\xe9{n}")
    yield from both("h2_tab", *VARYING, "x-a: a\t{n}")
    yield from both("h2_control", *VARYING, "x-a: a\x01{n}", times=2, **TOLD)
    yield from both("h2_space_in_path", path="/p {n}", times=2, **TOLD)
    yield from both("h2_fragment", path="/p/{n}#f")
    yield from both("h2_dots", path="/p/../{n}", on="h2_normalises")
    yield from both("h2_slashes", path="/p//{n}", on="h2_normalises")
    yield from both("h2_absolute", path="http://a.test/{n}", times=2, **TOLD)
    yield from both("h2_te", *VARYING, "te: trailers")
    yield from both("h2_te_varies", *VARYING, "te: trailers{n}", times=2, **TOLD)
    yield from both("h2_connection_varies", *VARYING, "connection: x{n}", times=2, **TOLD)
    yield from both("h2_host_varies", *VARYING, "host: {n}.test")
    yield from both("h2_underscore", *VARYING, "x_{n}: 1")
    yield from both("h2_length_varies", *VARYING, "content-length: 5", method="POST", body=b"hello")
    yield from both("h2_expect_varies", *VARYING, "expect: 100-continue{n}")
    yield from both("h2_twice", *VARYING, "x-request-id: {n}", "x-a: {n}", "x-a: 1")
    yield from both("h2_late_error", up=h2_late(*reply(503)))
    yield from both("h2_late_reset", up=h2_late(Rst()))
    yield from both("h2_late_retried", authority="retries.test", up=h2_late(*reply(503)))
    yield from both("h2_late_retried_reset", authority="retries.test", up=h2_late(Rst()))
    yield from both("h2_late_timed_out", authority="timeout.test", up=h2_late(Until(b"never")))
    yield from both("h2_late_trailers", up=h2_late(*reply(trailers=("x-t: 1",))))
    yield from both("h2_late_no_body", up=h2_late(*reply(204, body=None)))
    yield from both("h2_late_apart", up=h2_late(Headers(lines(":status: 200")), Idle(0.02), Data(b"x"), Idle(0.02), Data(b"y", end=True)))
    yield from both("h2_post_retried", method="POST", body=b"hello", authority="retries.test", up=h2_late(*reply(503)))
    yield from both("h2_reset_by_client", up=h2_late(Signal("asked"), Until(b"never")), wait=lambda n: [Wait("asked"), Rst()] if n == 7 else [Ended()])
    # ---- gRPC
    grpc = (*VARYING, "content-type: application/grpc", "te: trailers")
    answers = {"h2a": [Ended(), *reply(200, "content-type: application/grpc", body=message(), trailers=("grpc-status: 0",))]}
    for listener in ("h2", "h2_stats"):
        yield from both(f"{listener}_grpc", *grpc, on=listener, method="POST", path="/pkg.Service/M{n}", body=message(), up=answers)
        yield from both(f"{listener}_grpc_timeout", *grpc, "grpc-timeout: {n}S", on=listener, method="POST", path="/p.S/M", body=message(), up=answers)
    yield from both("h2_grpc_not_found_whole", *grpc, method="POST", authority="nobody.test", path="/p.S/M{n}", body=message())
    yield from both("h2_grpc_not_found", *grpc, method="POST", authority="nobody.test", path="/p.S/M{n}", body=message(), before_body=[Idle(0.02)])


test_case = check_cases(cases())
