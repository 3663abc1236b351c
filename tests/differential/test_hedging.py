"""Hedging: a try that takes too long goes on beside the next one. HTTP/1 and HTTP/2 on both sides: who wins, what becomes of the others, what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.differential.harness import (
    Case,
    Close,
    Counted,
    Data,
    Ended,
    Eof,
    Got,
    Head,
    Headers,
    Heard,
    Idle,
    Open,
    Play,
    Request,
    Response,
    Rst,
    Signal,
    Until,
    Wait,
    answer,
    ask,
    bootstrap,
    check_cases,
    cluster,
    each,
    get,
    grpc_head,
    h2_case,
    h2_cluster,
    head,
    http,
    lines,
    reply,
    req,
)

LOCAL = {"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]}
INTERNAL = "x-forwarded-for: 127.0.0.9"
HEDGE = {"hedge_policy": {"hedge_on_per_try_timeout": True}}
SLOW = "0.3s"  # a try: an answer that a busy machine delays is not a slow one
NONE = {"circuit_breakers": {"thresholds": [{"max_retries": 0}]}}
NO_BUDGET = {"circuit_breakers": {"thresholds": [{"retry_budget": {"budget_percent": {"value": 0}, "min_retry_concurrency": 1}}]}}


def vhost(name: str, to: str, *, timeout: str = "4s", hedge: dict | None = None, fields: dict | None = None, **policy: Any) -> dict:
    retry = {"retry_on": "5xx", "num_retries": 1, "per_try_timeout": SLOW, "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"}, **policy}
    route = {"cluster": to, "timeout": timeout, "retry_policy": retry, **(HEDGE if hedge is None else hedge)}
    return {
        "name": f"{name}-{to}",
        "domains": [f"{name}-{to}.test"],
        "routes": [{"match": {"prefix": "/"}, "route": route}],
        "include_request_attempt_count": True,
        "include_attempt_count_in_response": True,
        **(fields or {}),
    }


HOSTS = [
    host
    for to in ("h1", "h2")
    for host in (
        vhost("once", to),
        vhost("thrice", to, num_retries=3),
        vhost("short", to, timeout="1.4s"),
        vhost("asked", to, hedge={}),
        vhost("by-host", to, hedge={}, fields=HEDGE),
        vhost("off-for-route", to, hedge={"hedge_policy": {}}, fields=HEDGE),
        vhost("other-reasons", to, retry_on="connect-failure"),
        vhost("told", to, fields={"include_is_timeout_retry_header": True}),
        vhost("grpc", to, retry_on="unavailable"),
        vhost("little", to, fields={"per_request_buffer_limit_bytes": 4}),
        vhost("never", to, retry_on=""),
        vhost("others", to, retriable_request_headers=[{"name": "x-absent", "present_match": True}]),
        vhost("idle", to, per_try_timeout="4s", per_try_idle_timeout=SLOW),
    )
] + [vhost("limited", "h1_limited"), vhost("limited", "h2_limited"), vhost("budget", "h2_budget", num_retries=3)]
CONFIG = bootstrap(
    http("main", HOSTS),
    http("internal", HOSTS, internal_address_config=LOCAL),
    clusters=[
        cluster("h1", "a"),
        h2_cluster("h2", "h2a"),
        cluster("h1_limited", "a", **NONE),
        h2_cluster("h2_limited", "h2a", **NONE),
        h2_cluster("h2_budget", "h2a", **NO_BUDGET),
    ],
)
HANG = "hang"


def play(to: str, *tries: list[Any]) -> Play:
    """What the upstream does with each try: `HANG`, a status, or steps."""

    def script(steps: list[Any]) -> list[Any]:
        made: list[Any] = [Ended() if to == "h2" else Request()]
        for step in steps:
            if step == HANG:
                made.append(Wait("never") if to == "h2" else Eof())
            elif isinstance(step, int):
                made += reply(step, "content-length: 2") if to == "h2" else [answer(f"{step} X", b"ok")]
            else:
                made.append(step)
        return made

    return each(*map(script, tries))


def case(name: str, down: str, to: str, host: str, *tries: list[Any], headers: tuple[str, ...] = (), body: bytes | None = None, **fields: Any) -> Case:
    authority = f"{host}-{to}.test"
    to = to.partition("_")[0]
    name = f"{name}_{down}_to_{fields.pop('label', to)}"
    method = "GET" if body is None else "POST"
    if down == "h2":
        lengths = () if body is None else (f"content-length: {len(body)}",)
        return h2_case(name, ask(method, "/", *lengths, *headers, body=body, authority=authority), up=play(to, *tries), **fields)
    return Case(name, [req(method, "/", *headers, host=authority, body=body or b""), Response()], play(to, *tries), **fields)


def everywhere(name: str, host: str, *tries: list[Any], **fields: Any) -> Iterator[Case]:
    """In all four combinations."""
    for down in ("h1", "h2"):
        for to in ("h1", "h2"):
            yield case(name, down, to, host, *tries, **fields)


LIMITED = ("h1_limited", "h2_limited")


def resets() -> Iterator[Case]:
    """One of two tries breaks off."""
    for to, broken, seen in (("h1", Close(), "cx_destroy_remote"), ("h2", Rst(), "rx_reset")):
        for down in ("h1", "h2"):
            yield case("first_resets", down, to, "once", [Wait("second"), broken, Signal("first")], [Signal("second"), Wait("first"), Counted(seen), 200])
            yield case("second_resets", down, to, "once", [Wait("second"), Counted(seen), 200], [Signal("second"), broken])


CASES = [
    *everywhere("second_answers", "once", [HANG], [200]),
    *everywhere("first_answers_late", "once", [Wait("second"), 200], [Signal("second"), HANG]),
    *everywhere("in_time", "once", [200]),
    *everywhere("bad_in_time", "once", [503], [200]),
    *everywhere("bad_in_time_and_slow", "once", [503], [HANG], [200]),
    *everywhere("second_is_bad_first_good", "once", [Wait("second"), Counted("upstream_rq_503"), 200], [Signal("second"), 503], skip=("log",)),
    *everywhere("first_is_bad_second_good", "once", [Wait("second"), 503, Signal("first")], [Signal("second"), Wait("first"), Counted("upstream_rq_503"), 200]),
    *everywhere("both_are_bad", "once", [Wait("second"), 503, Signal("first")], [Signal("second"), Wait("first"), Counted("upstream_rq_503"), 503]),
    *everywhere("first_is_404", "once", [Wait("second"), 404], [Signal("second"), HANG]),
    *everywhere("nobody_answers", "short", [HANG]),
    *everywhere("third_answers", "thrice", [HANG], [HANG], [200]),
    *everywhere("second_of_three_answers", "thrice", [HANG], [Wait("third"), 200], [Signal("third"), HANG]),
    *everywhere("second_is_bad_third_good", "thrice", [HANG], [503], [200]),
    *everywhere("asked_for_by_request", "asked", [HANG], [200], headers=("x-envoy-hedge-on-per-try-timeout: true", INTERNAL), on="internal"),
    *everywhere("not_asked_for", "asked", [HANG], [200], headers=(INTERNAL,), on="internal"),
    *everywhere("switched_off_by_request", "once", [HANG], [200], headers=("x-envoy-hedge-on-per-try-timeout: false", INTERNAL), on="internal"),
    *everywhere("asked_for_from_outside", "asked", [HANG], [200], headers=("x-envoy-hedge-on-per-try-timeout: true",)),
    *everywhere("by_the_virtual_host", "by-host", [HANG], [Signal("second"), 200]),
    *everywhere("off_for_the_route", "off-for-route", [HANG], [200]),
    *everywhere("whatever_is_retried", "other-reasons", [HANG], [200]),
    *everywhere("whatever_is_retried_second_is_bad", "other-reasons", [HANG], [503]),
    *everywhere("nothing_is_retried", "never", [Counted("upstream_rq_total"), Idle(0.4), 200]),
    *everywhere("whatever_the_request_wants", "once", [HANG], [200], headers=("x-envoy-retry-on: nonsense", INTERNAL), on="internal"),
    *everywhere("nothing_but_what_the_request_wants", "never", [HANG], [200], headers=("x-envoy-retry-on: nonsense", INTERNAL), on="internal"),
    *everywhere("for_other_requests", "others", [HANG], [200]),
    *everywhere("told_why", "told", [HANG], [200]),
    *everywhere("idle_tries_are_hedged", "idle", [HANG], [200]),
    *everywhere("with_body", "once", [HANG], [200], body=b"hello"),
    *everywhere("body_over_the_limit", "little", [Idle(0.4), 200], [HANG], body=b"hello"),
    *(case("limited", down, to, "limited", [Counted("upstream_rq_retry_overflow"), 200], label=to) for down in ("h1", "h2") for to in LIMITED),
    *(case("budget", down, "h2_budget", "budget", [HANG], [HANG], [200], label="budget") for down in ("h1", "h2")),
    *resets(),
    # ---- what has begun is not hedged
    Case("slow_body_h1_to_h1", [get(host="once-h1.test"), Response()],
         [Head(), b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab", Idle(0.4), b"cd", Eof()]),
    h2_case("request_that_goes_on_h2_to_h2", Open(head("POST", "/", authority="once-h2.test"), end=False), Data(b"he"), Wait("first"), Data(b"llo", end=True),
            Ended(), up=each([Got(b"he"), Signal("first"), Ended(), Wait("never")], [Ended(), *reply()])),
    # ---- clients that leave
    h2_case("client_resets_h2_to_h2", Open(head(authority="once-h2.test")), Wait("second"), Rst(),
            up=each([Ended(), Wait("never")], [Ended(), Signal("second"), Heard("rst_stream", 2)])),
    h2_case("client_resets_h2_to_h1", Open(head(authority="once-h1.test")), Wait("second"), Rst(),
            up=each([Request(), Eof()], [Request(), Signal("second"), Eof()])),
    h2_case("client_resets_amid_the_second_answer", Open(head(authority="once-h2.test")), Got(b"part"), Rst(),
            up=each([Ended(), Wait("never")], [Ended(), Headers(lines(":status: 200")), Data(b"part"), Heard("rst_stream", 2)])),
    Case("timeout_amid_the_second_answer", [get(host="short-h2.test"), Until(b"part")],
         each([Ended(), Wait("never")], [Ended(), Headers(lines(":status: 200")), Data(b"part"), Heard("rst_stream", 2)]), then="closed"),
    Case("client_closes_h1_to_h2", [get(host="once-h2.test"), Wait("second"), Close()],
         each([Ended(), Wait("never")], [Ended(), Signal("second"), Heard("rst_stream", 2)])),
    # ---- informational responses
    h2_case("first_resets_after_103", Open(head(authority="once-h2.test")), Ended(),
            up=each([Ended(), Wait("second"), Headers(lines(":status: 103", "link: a")), Rst()], [Ended(), Signal("second"), Wait("never")])),
    h2_case("late_answer_after_103", Open(head(authority="once-h2.test")), Ended(),
            up=each([Ended(), Headers(lines(":status: 103", "link: a")), Idle(0.5), *reply()], [Ended(), *reply(201)])),
    h2_case("second_answers_after_103", Open(head(authority="once-h2.test")), Ended(),
            up=each([Ended(), Wait("never")], [Ended(), Headers(lines(":status: 103", "link: a")), *reply(201)])),
    h2_case("timeout_after_103", Open(head(authority="short-h2.test")), Ended(),
            up=each([Ended(), Wait("never")], [Ended(), Headers(lines(":status: 103", "link: a")), Wait("never")])),
    h2_case("second_resets_after_103", Open(head(authority="once-h2.test")), Ended(),
            up=each([Ended(), Wait("never")], [Ended(), Headers(lines(":status: 103", "link: a")), Rst()])),
    # ---- gRPC
    h2_case("grpc_second_answers", Open(grpc_head(authority="grpc-h2.test")), Ended(),
            up=each([Wait("never")], reply(200, "content-type: application/grpc", body=b"", trailers=("grpc-status: 0",)))),
    h2_case("grpc_second_is_unavailable", Open(grpc_head(authority="grpc-h2.test")), Ended(),
            up=each([Wait("second"), *reply(200, "content-type: application/grpc", body=b"", trailers=("grpc-status: 0",))],
                    [Headers(lines(":status: 200", "content-type: application/grpc", "grpc-status: 14"), end=True), Signal("second")])),
    h2_case("grpc_nobody_answers", Open(grpc_head(authority="short-h2.test")), Ended(), up=Play([[Wait("never")]])),
]  # fmt: skip

test_case = check_cases(CASES)
