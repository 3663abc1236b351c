"""Requests over HTTP/1.1 whose path, request id and trace context are other ones each time: what a proxy remembers of what they have in common must never show.

The first half of each case is for the proxy to learn what varies; then comes what the case is about.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Close,
    Data,
    Ended,
    Headers,
    Play,
    Request,
    Reset,
    Response,
    Rig,
    Rst,
    Signal,
    Until,
    Wait,
    answer,
    bootstrap,
    check_cases,
    each,
    file_log,
    filter_,
    http,
    lines,
    reply,
    req,
)
from tests.differential.test_repeated import CHUNKED, ERROR, HOSTS, JSON_LOG, LARGE, LIMIT, ORIGIN, THEIRS
from tests.differential.test_repeated import CONFIG as REPEATED
from tests.differential.test_varying import BY_ID
from tests.differential.test_varying import CONFIG as OVER_HTTP2

LEARN = 7  # from the sixth on, requests have plans
TIMES = 10
VARYING = ("X-Request-Id: {n:08d}-2222-4333-8444-555555555555", "traceparent: 00-{n:032x}-{n:016x}-01")
AGENT = "User-Agent: Mozilla/5.0 (X11; Linux x86_64)"

ANYBODY = [{"any": True}]
ADMINS = [{"header": {"name": "x-role", "string_match": {"exact": "admin"}}}]
LOCAL = [{"direct_remote_ip": {"address_prefix": "127.0.0.0", "prefix_len": 8}}]


def rules(action: str, **policies: tuple[dict[str, Any], list[dict[str, Any]]]) -> dict[str, Any]:
    """RBAC rules: by the name of each policy what it permits, and whom."""
    return {"action": action, "policies": {name: {"permissions": [what], "principals": whom} for name, (what, whom) in policies.items()}}


def path(**matcher: str) -> dict[str, Any]:
    """A permission by path."""
    return {"url_path": {"path": matcher}}


def tokens(count: int) -> dict[str, Any]:
    """A local rate limit of so many requests."""
    return {**LIMIT, "token_bucket": {"max_tokens": count, "fill_interval": "1000s"}}


PATHS = rules("ALLOW", odd=(path(suffix="odd"), ADMINS), paths=(path(prefix="/p/"), LOCAL))
OUTSIDE = rules("DENY", admin=(path(prefix="/admin"), ANYBODY))
NAMED = rules("DENY", named=({"header": {"name": ":path", "string_match": {"contains": "odd"}}}, ANYBODY))
MORE_LOG = {
    "log_format": {"json_format": {
        "id": "%REQ(X-REQUEST-ID)%", "short": "%REQ(TRACEPARENT):9%", "trace": "%REQ(TRACEPARENT)%", "either": "%REQ(X-B?X-A)%", "or": "%REQ(X-A?X-B)%",
        "path": "%REQ(:PATH):9%", "text": "in %REQ(:PATH)% for %REQ(X-A)%", "agent": "%REQ(USER-AGENT)%", "none": "%REQ(X-NONE)%", "host": "%REQ(:AUTHORITY)%",
        "added": "%REQ(X-ADDED)%", "for": "%REQ(X-FORWARDED-FOR)%", "took": "%RESPONSE_CODE% %PROTOCOL%"}},
}  # fmt: skip
LISTENERS = [*REPEATED["static_resources"]["listeners"][:-1], *[one for one in OVER_HTTP2["static_resources"]["listeners"] if one["name"].startswith("h2")]]
CONFIG = bootstrap(
    *LISTENERS,
    http("paths", HOSTS, filters=[filter_("rbac", rules=PATHS)]),
    http("behind_another", HOSTS, filters=[filter_("on_demand"), filter_("rbac", rules=PATHS)]),
    http("named", HOSTS, filters=[filter_("rbac", rules=NAMED)]),
    http("like_mesh", HOSTS, filters=[filter_("rbac", rules=OUTSIDE), filter_("fault", abort={"http_status": 503, "percentage": {"numerator": 0}}),
                                      filter_("local_ratelimit", **tokens(1000))],
         access_log=[file_log(**JSON_LOG)], use_remote_address=True),
    http("limited_last", HOSTS, filters=[filter_("rbac", rules=OUTSIDE), filter_("local_ratelimit", **tokens(8))]),
    http("shadowed", HOSTS, filters=[filter_("rbac", rules=OUTSIDE, shadow_rules=OUTSIDE)]),
    http("more_log", HOSTS, access_log=[file_log(**MORE_LOG), file_log(BY_ID)]),
    http("small_heads", HOSTS, max_request_headers_kb=1),
    http("underscores", HOSTS, common_http_protocol_options={"headers_with_underscores_action": "REJECT_REQUEST"}),
    http("spelt", HOSTS, http_protocol_options={"header_key_format": {"proper_case_words": {}}}),
    http("normalises", HOSTS, normalize_path=True, merge_slashes=True),
    clusters=OVER_HTTP2["static_resources"]["clusters"],
    layered_runtime=REPEATED["layered_runtime"],
)  # fmt: skip


def ask(n: int, *headers: str, method: str = "GET", path: str = "/p/{n}?q={n}", host: str = "a.test", body: bytes = b"") -> bytes:
    """The request with this number, which stands wherever there is {n}."""
    return req(method, path.format(n=n), *(line.format(n=n) for line in headers), host=host, body=body)


def varying(name: str, *headers: str, up: Any = None, times: int = TIMES, on: str = "main", then: str = "open", skip: tuple[str, ...] = (), note: str = "",
            **fields: Any) -> Case:  # fmt: skip
    """So many requests, each after the response to the one before."""
    steps = [step for n in range(1, times + 1) for step in (ask(n, *(headers or VARYING), **fields), Response(fields.get("method", "GET")))]
    return Case(name, steps, Play() if up is None else up, on=on, then=then, skip=skip, note=note)


def late(*script: Any) -> Play:
    """The eighth request gets this, all others an answer."""
    return each(*[[Request(), OK]] * LEARN, [Request(), *script], [Request(), OK])


def h2_late(*script: Any) -> dict[str, Play]:
    """The same of an upstream that speaks HTTP/2."""
    return {"h2a": each(*[[Ended(), *reply()]] * LEARN, list(script), [Ended(), *reply()])}


def odd(name: str, *steps: Any, after: bool = True, headers: Iterable[str] = VARYING, **fields: Any) -> Case:
    """What is special comes when the proxy has learnt; and then more of what came before."""
    before = [step for n in range(1, LEARN + 1) for step in (ask(n, *headers), Response())]
    behind = [step for n in range(TIMES, TIMES + 2) for step in (ask(n, *headers), Response())] if after else []
    return Case(name, [*before, *steps, *behind], **fields)


def request(head: str) -> bytes:
    """A head as it is written, lines apart."""
    return head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n"


def changed(name: str, path: str, host: str) -> Case:
    """Something changes meanwhile."""

    async def run(rig: Rig) -> Any:
        wire = await rig.connect()
        answers = [await rig.exchange(wire, ask(n, *VARYING, host=f"{host}.test")) for n in range(LEARN)]
        await rig.proxy.admin("POST", path)
        answers += [await rig.exchange(wire, ask(n, *VARYING, host=f"{host}.test")) for n in range(LEARN, TIMES)]
        await rig.proxy.admin("POST", path.replace("/fail", "/ok").replace("=100", "="))
        return answers

    return Case(name, run)


ID = "X-Request-Id: 00000008-2222-4333-8444-555555555555"
TRACE = f"traceparent: 00-{8:032x}-{8:016x}-01"

CASES = [
    varying("get"),
    varying("get_with_more", *VARYING, AGENT, "X-A: 1", "Authorization: Bearer abc", "Cookie: a=b; c=d"),
    varying("delete", method="DELETE"),
    varying("head", method="HEAD"),
    varying("options", method="OPTIONS"),
    varying("post", *VARYING, method="POST", body=b"hello"),
    varying("path_only", "X-A: 1"),
    varying("no_fields_but_host", "X-A: 1", path="/{n}"),
    varying("same_path", path="/same"),
    varying("id_only", VARYING[0], path="/same"),
    varying("root_now_and_then", *VARYING, "X-A: {n}", path="/"),
    varying("words", *VARYING, "Cookie: session={n}; theme=dark", "X-A: a b {n}"),
    varying("words_apart", *VARYING, "X-A: a  b {n}"),
    varying("long_values", *VARYING, "X-Long: {n:0900d}", path="/p/{n:0500d}"),
    varying("longer_each_time", *VARYING, times=30, path="/p/{n}"),
    varying("visible", *VARYING, "X-A: \\ \"{n}\" {{}}|~", path="/p/{n}\\|~\"<>^`{{}}"),
    varying("not_ascii", *VARYING, "X-A: \xe9{n}"),
    varying("tab", *VARYING, "X-A: a\t{n}"),
    varying("empty_id", "X-Request-Id: ", "traceparent: {n}"),
    varying("connection_keep_alive", *VARYING, "Connection: keep-alive"),
    varying("connection_varies", *VARYING, "Connection: x{n}", "X1: 1"),
    varying("host_varies", *VARYING, path="/", host="{n}.test"),
    varying("te_varies", *VARYING, "TE: trailers{n}"),
    varying("expect_varies", *VARYING, "Expect: {n}"),
    varying("underscore", *VARYING, "x_a: {n}"),
    varying("underscore_rejected", *VARYING, "x_a: {n}", on="underscores", times=1, then="leave"),
    varying("underscores_refused", on="underscores"),
    varying("twice", *VARYING, "X-A: {n}", "X-A: 1"),
    varying("relayed", *VARYING, "X-Forwarded-Proto: http", "X-Envoy-Expected-Rq-Timeout-Ms: 15000"),
    varying("relayed_https", *VARYING, "X-Forwarded-Proto: https", "X-Envoy-Expected-Rq-Timeout-Ms: 15000"),
    varying("proto_varies", *VARYING, "X-Forwarded-Proto: http{n}"),
    varying("expected_timeout_varies", *VARYING, "X-Envoy-Expected-Rq-Timeout-Ms: {n}000"),
    varying("timeout_varies", *VARYING, "X-Envoy-Upstream-Rq-Timeout-Ms: {n}000", "X-Forwarded-For: 10.0.0.1"),
    varying("forwarded_for_varies", *VARYING, "X-Forwarded-For: 10.0.0.{n}"),
    varying("referer_varies", *VARYING, "Referer: http://a.test/{n}"),
    varying("fragment", path="/p/{n}#f"),
    varying("dots", path="/p/../{n}", on="normalises"),
    varying("slashes", path="/p//{n}", on="normalises"),
    varying("plain_paths_normalised", on="normalises"),
    varying("small_heads", *VARYING, "X-A: {n}", on="small_heads"),
    *[varying(f"host_{host}", *VARYING, "X-A: {n}", host=f"{host}.test", up=Play([[Request(), THEIRS]])) for host in (
        "adds", "adds_id", "adds_path", "adds_address", "adds_back", "removes", "prefix", "rehost", "auto", "weighted", "retries", "endless", "counted",
        "counts_tries", "copies_count", "clustered", "fraction", "nowhere", "timeout")],
    varying("count_varies", *VARYING, "X-Envoy-Attempt-Count: {n}", host="counts_tries.test"),
    varying("counts_tries_of_post", *VARYING, host="counts_tries.test", method="POST", body=b"hello"),
    varying("counts_tries_when_one_fails", *VARYING, host="counts_tries.test", up=late(ERROR)),
    varying("counts_tries_when_one_is_lost", *VARYING, host="counts_tries.test", up=late(Close())),
    *[varying(f"cors_{h}{name}", *VARYING, *lines, host=f"{h}.test", on="cors") for h in ("a", "adds", "host", "typed") for name, lines in (
        ("", ()), ("_asked", (ORIGIN,)), ("_origin_varies", ("Origin: http://{n}.test",)))],
    varying("cors_by_route", *VARYING, ORIGIN, path="/{n}", host="some.test", on="cors"),
    varying("host_by_header", *VARYING, "X-To: b", host="by_header.test"),
    varying("host_by_varying_header", *VARYING, "X-To: b{n}", host="by_header.test"),
    *[varying(f"on_{on}", *VARYING, "X-A: {n}", on=on) for on in (
        "values", "like_istio", "edge", "json", "filtered", "rbac_deny", "limit", "limit_each", "fault", "no_fault", "plain_router", "pass_server", "echo_id",
        "no_id", "few", "paths", "named", "like_mesh", "limited_last", "shadowed", "more_log", "spelt")],
    *[varying(f"on_{on}_without_ids", "X-A: {n}", on=on) for on in ("edge", "json", "no_id", "like_mesh", "more_log")],
    *[varying(f"on_{on}_adds", *VARYING, "X-A: {n}", AGENT, host="adds.test", on=on) for on in ("edge", "json", "like_mesh", "more_log")],
    varying("rbac_allowed", *VARYING, "X-Role: admin", on="rbac"),
    varying("rbac_role_varies", *VARYING, "X-Role: admin{n}", on="rbac_deny"),
    varying("paths_role_varies", *VARYING, "X-Role: admin{n}", on="paths"),
    odd("paths_odd", ask(8, *VARYING, path="/x/odd"), Response(), on="paths"),
    odd("paths_odd_allowed", ask(8, *VARYING, "X-Role: admin", path="/x/odd"), Response(), on="paths", headers=(*VARYING, "X-Role: admin")),
    odd("behind_another", ask(8, *VARYING, "X-Role: {n}", path="/x/odd"), Response(), on="behind_another", headers=(*VARYING, "X-Role: {n}")),
    odd("behind_another_allowed", *[step for n in range(1, 4) for step in (ask(n, *VARYING, "X-Role: admin", path="/x/odd"), Response())],
        on="behind_another", headers=(*VARYING, "X-Role: {n}")),
    odd("paths_other", ask(8, *VARYING, path="/x/8"), Response(), on="paths"),
    odd("named_odd", ask(8, *VARYING, path="/odd"), Response(), on="named"),
    odd("mesh_admin", ask(8, *VARYING, path="/admin/8"), Response(), on="like_mesh"),
    varying("fault_sometimes", *VARYING, "X-Break: {n}", on="fault"),
    varying("many", host="many.test", path="/a{n}"),
    varying("many_by_header", *VARYING, "X-A: b{n}", host="many.test", path="/by{n}"),
    varying("many_no_route", host="many.test", path="/zzz{n}"),
    odd("to_others", *[step for path in ("/query?to=b", "/redirect", "/direct", "/a8", "/by8") for step in (
        ask(8, *VARYING, path=path, host="many.test"), Response())]),
    Case("routes_in_turn", [step for n in range(24) for step in (
        ask(n, *VARYING, path=("/a{n}", "/direct", "/query?to=b", "/by{n}", "/a", "/redirect")[n % 6], host="many.test"), Response())]),
    Case("two_clients_in_one", [step for n in range(24) for step in (
        ask(n, *VARYING, *((AGENT, "X-A: {n}") if n % 2 else ("X-B: 1",))), Response())]),
    Case("more_varies_later", [step for n in range(24) for step in (
        ask(n, *VARYING, f"X-A: {0 if n < 10 else n}", host="adds.test"), Response())]),
    Case("few_values", [step for n in range(24) for step in (ask(n, *VARYING, f"X-A: {'b' if n % 3 else 'a'}", path="/by{n}", host="many.test"), Response())]),
    # ---- one that is not like the others
    *[odd(f"odd_{name}", request(head), Response()) for name, head in {
        "host": f"GET /p/8 HTTP/1.1\nHost: adds.test\n{ID}\n{TRACE}",
        "names_in_lower_case": f"GET /p/8 HTTP/1.1\nHost: a.test\n{ID.lower()}\n{TRACE}",
        "order": f"GET /p/8 HTTP/1.1\nHost: a.test\n{TRACE}\n{ID}",
        "one_more": f"GET /p/8 HTTP/1.1\nHost: a.test\n{ID}\n{TRACE}\nX-A: 1",
        "one_less": f"GET /p/8 HTTP/1.1\nHost: a.test\n{ID}",
        "spaces": f"GET /p/8 HTTP/1.1\nHost: a.test\n{ID.replace(': ', ':   ')}\n{TRACE}",
        "spaces_behind": f"GET /p/8 HTTP/1.1\nHost: a.test\n{ID}  \n{TRACE}",
        "no_space": f"GET /p/8 HTTP/1.1\nHost: a.test\n{ID.replace(': ', ':')}\n{TRACE}",
        "empty_value": f"GET /p/8 HTTP/1.1\nHost: a.test\nX-Request-Id: \n{TRACE}",
        "words": f"GET /p/8 HTTP/1.1\nHost: a.test\nX-Request-Id: a b\n{TRACE}",
        "not_ascii": f"GET /p/8 HTTP/1.1\nHost: a.test\nX-Request-Id: \xe9\n{TRACE}",
        "tab": f"GET /p/8 HTTP/1.1\nHost: a.test\nX-Request-Id: a\tb\n{TRACE}",
        "method": f"DELETE /p/8 HTTP/1.1\nHost: a.test\n{ID}\n{TRACE}",
        "absolute": f"GET http://a.test/p/8 HTTP/1.1\nHost: a.test\n{ID}\n{TRACE}",
        "length_0": f"GET /p/8 HTTP/1.1\nHost: a.test\n{ID}\n{TRACE}\nContent-Length: 0",
        "same_length": f"GET /p/8?q=8 HTTP/1.1\nHost: b.test\n{ID}\n{TRACE}",
        "fragment": f"GET /p/8#q=8 HTTP/1.1\nHost: a.test\n{ID}\n{TRACE}",
    }.items()],
    *[odd(f"odd_{name}", request(head), Response(), after=False, then="leave") for name, head in {
        "close": f"GET /p/8 HTTP/1.1\nHost: a.test\n{ID}\n{TRACE}\nConnection: close",
        "http_1_0": f"GET /p/8 HTTP/1.0\nHost: a.test\n{ID}\n{TRACE}",
        "control": f"GET /p/8?q=8 HTTP/1.1\nHost: a.test\n{ID[:-1]}\x01\n{TRACE}",
        "nul": f"GET /p/8?q=8 HTTP/1.1\nHost: a.test\n{ID[:-1]}\0\n{TRACE}",
        "space_in_path": f"GET /p/8?q 8 HTTP/1.1\nHost: a.test\n{ID}\n{TRACE}",
        "no_path": f"GET HTTP/1.1\nHost: a.test\n{ID}\n{TRACE}",
        "version": f"GET /p/8?q=8 HTTP/1.2\nHost: a.test\n{ID}\n{TRACE}",
        "asterisk": f"GET *p/8?q=8 HTTP/1.1\nHost: a.test\n{ID}\n{TRACE}",
    }.items()],
    odd("odd_chunked", request(f"POST /p/8 HTTP/1.1\nHost: a.test\n{ID}\n{TRACE}\nTransfer-Encoding: chunked") + b"2\r\nab\r\n0\r\n\r\n", Response("POST")),
    odd("too_long", ask(8, *VARYING, path="/" + "x" * 1500), Response(), after=False, then="leave", on="small_heads"),
    odd("line_in_value", request(f"GET /p/8?q=8 HTTP/1.1\nHost: a.test\nX-Request-Id: a\nX-Role: admin\n{TRACE}"), Response(), on="rbac_deny"),
    # ---- pieces
    odd("pipelined", b"".join(ask(n, *VARYING) for n in range(20, 25)), *[Response()] * 5),
    odd("in_halves", ask(8, *VARYING)[:40], ask(8, *VARYING)[40:], Response()),
    odd("more_than_one", ask(8, *VARYING) + ask(9, *VARYING)[:30], Response(), ask(9, *VARYING)[30:], Response()),
    odd("empty_line_between", b"\r\n", ask(8, *VARYING), Response()),
    odd("empty_line_before", b"\r\n" + ask(8, *VARYING), Response()),
    odd("with_a_body", req("GET", "/p/8", *(line.format(n=8) for line in VARYING), body=b"hello"), Response()),
    odd("garbage_afterwards", b"garbage\r\n\r\n", Response(), after=False, then="closed"),
    odd("next_comes_early", ask(8, *VARYING), Wait("asked"), ask(9, *VARYING), Signal("go"), Response(), Response(),
        up=late(Signal("asked"), Wait("go"), OK)),
    odd("client_leaves", ask(8, *VARYING), Wait("asked"), Reset(), after=False, then="leave", up=late(Signal("asked"), Until(b"never"))),
    # ---- what upstreams answer
    varying("theirs", up=Play([[Request(), THEIRS]])),
    varying("no_body", up=Play([[Request(), answer(body=b"")]])),
    varying("not_found", up=Play([[Request(), answer("404 Not Found")]])),
    varying("closing", up=Play([[Request(), answer(connection="close")]])),
    varying("late_chunked", up=late(CHUNKED)),
    varying("late_large", up=late(answer(body=LARGE))),
    varying("late_slowly", up=late(b"HTTP/1.1 200 OK\r\ncontent-le", b"ngth: 2\r\n\r\no", b"k")),
    varying("late_error", up=late(ERROR)),
    varying("late_error_logged", *VARYING, "X-A: {n}", up=late(ERROR), on="more_log"),
    varying("late_closed", up=late(Close())),
    varying("late_reset", up=late(Reset())),
    varying("late_garbage", up=late(b"garbage\r\n\r\n")),
    varying("late_retried", host="retries.test", up=late(ERROR)),
    varying("late_retried_logged", *VARYING, "X-A: {n}", host="retries.test", up=late(ERROR), on="like_mesh"),
    varying("late_retried_reset", host="resets.test", up=late(Reset())),
    varying("late_retried_by_response", host="by_response.test", up=late(answer(x_again="yes"))),
    varying("late_timed_out", host="timeout.test", up=late(Until(b"never"))),
    varying("late_try_timed_out", host="per_try.test", up=late(Until(b"never"))),
    # ---- to HTTP/2 upstreams
    varying("h2_get", on="h2", up={"h2a": [Ended(), *reply()]}),
    varying("h2_long_values", *VARYING, "X-Long: {n:0200d}", path="/p/{n:0180d}", on="h2", up={"h2a": [Ended(), *reply()]}),
    *[varying(f"h2_host_{host}", *VARYING, "X-A: {n}", host=f"{host}.test", on="h2", up={"h2a": [Ended(), *reply()]}) for host in (
        "adds", "adds_path", "prefix", "regex", "retries", "hashed", "nobody")],
    *[varying(f"on_{on}", *VARYING, "X-A: {n}", on=on, up={"h2a": [Ended(), *reply()]}) for on in (
        "h2_json", "h2_edge", "h2_no_id", "h2_keeps_id", "h2_normalises", "h2_logged_by_id")],
    varying("h2_late_error", on="h2", up=h2_late(Ended(), *reply(503))),
    varying("h2_late_reset", on="h2", up=h2_late(Rst())),
    varying("h2_late_trailers", on="h2", up=h2_late(Ended(), *reply(trailers=("x-t: 1",)))),
    varying("h2_late_apart", on="h2", up=h2_late(Ended(), Headers(lines(":status: 200")), Data(b"xy", end=True))),
    # ---- changes in between
    changed("drains", "/healthcheck/fail", "a"),
    changed("runtime", "/runtime_modify?to.b=100", "fraction"),
    changed("maintenance", "/runtime_modify?upstream.maintenance_mode.a=100", "a"),
]  # fmt: skip

test_case = check_cases(CASES)
