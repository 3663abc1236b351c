"""Responses whose heads are other ones each time, to requests that repeat themselves: what a proxy remembers of what they have in common must never show.

The first half of each case is for the proxy to learn what varies; then comes what the case is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tests.differential.harness import (
    Case,
    Close,
    Ended,
    Idle,
    Open,
    Play,
    Request,
    Reset,
    Response,
    Rst,
    answer,
    bootstrap,
    check_cases,
    each,
    file_log,
    get,
    h2_case,
    head,
    http,
    reply,
    req,
)
from tests.differential.test_repeated import CONFIG as REPEATED
from tests.differential.test_repeated import HOSTS, JSON_LOG, ORIGIN, filter_, vhost
from tests.differential.test_varying import CONFIG as OVER_HTTP2

TIMES = 14  # from the seventh on, what varies is known
LATE = 10
RETRIES = "timeout: 4s, retry_policy: {retry_on: 5xx, retry_back_off: {base_interval: 0.001s}}"
COPY = "{header: {key: x-copy, value: 'was %RESP(x-tag)%'}}"
MORE_HOSTS = [
    *HOSTS,
    vhost("copies", top=f"response_headers_to_add: [{COPY}]"),
    vhost("sets", top="response_headers_to_add: [{header: {key: x-tag, value: ours}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}]"),
    vhost("appends", top="response_headers_to_add: [{header: {key: x-tag, value: ours}, append_action: APPEND_IF_EXISTS_OR_ADD}]"),
    vhost("if_absent", top="response_headers_to_add: [{header: {key: x-tag, value: ours}, append_action: ADD_IF_ABSENT}]"),
    vhost("drops", top="response_headers_to_remove: [x-tag]"),
]  # fmt: skip
H2 = [
    vhost("a", "cluster: h2a"),
    vhost("adds", "cluster: h2a", top="response_headers_to_add: [{header: {key: x-back, value: there}}]"),
    vhost("copies", "cluster: h2a", top=f"response_headers_to_add: [{COPY}]"),
    vhost("drops", "cluster: h2a", top="response_headers_to_remove: [x-tag]"),
    vhost("retries", "cluster: h2a, timeout: 4s, retry_policy: {retry_on: 5xx, retry_back_off: {base_interval: 0.001s}}"),
]
LOG = "%RESP(X-TAG)% %RESP(CONTENT-LENGTH)% %RESP(X-NONE?X-TAG)% %RESP(X-TAG?X-UP)% %RESP(X-TAG):2% %BYTES_SENT% %RESPONSE_CODE% %RESP(X-UP)%\n"
CONFIG = bootstrap(
    *REPEATED["static_resources"]["listeners"][1:-1],  # the last one is the rig's, the first has more hosts here
    http("main", MORE_HOSTS),
    http("tags", MORE_HOSTS, access_log=[file_log(LOG)]),
    http("tags_json", MORE_HOSTS, access_log=[file_log(log_format={"json_format": {"tag": "%RESP(X-TAG)%", "sent": "%BYTES_SENT%"}}), file_log(**JSON_LOG)]),
    http("not_ours", MORE_HOSTS, http_filters=[filter_("router", suppress_envoy_headers=True)], access_log=[
        file_log("%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% %RESP(X-TAG)% %BYTES_SENT%\n")]),
    http("spelt", MORE_HOSTS, http_protocol_options={"header_key_format": {"proper_case_words": {}}}),
    http("h2_tags", H2, access_log=[file_log(LOG)]),
    *[one for one in OVER_HTTP2["static_resources"]["listeners"] if one["name"].startswith("h2") and one["name"] != "h2"],
    http("h2", H2),
    clusters=OVER_HTTP2["static_resources"]["clusters"],
    layered_runtime=REPEATED["layered_runtime"],
)  # fmt: skip


def tag(n: int) -> dict[str, str]:
    """What the answer with this number has of its own."""
    return {"x_tag": f"tag-{n}"}


def tagged(n: int) -> bytes:
    return answer(**tag(n), x_up="up")


def body(n: int) -> bytes:
    return b"x" * (n * n)


def one_by_one(make: Callable[[int], Any]) -> Play:
    """The upstream sends what `make` makes of each request's number."""
    made = [make(n) for n in range(1, TIMES + 1)]
    return each(*[[Request(), *(one if isinstance(one, list) else [one])] for one in made])


def late(*script: Any) -> Play:
    """One answer is this, when what varies is known; all others are tagged."""
    return one_by_one(lambda n: list(script) if n == LATE else tagged(n))


def ask(
    name: str, up: Play, *headers: str, host: str = "a", method: str = "GET", on: str = "main", times: int = TIMES, sent: bytes = b"", **fields: Any
) -> Case:
    """The same request so many times."""
    return Case(name, [req(method, "/p", *headers, host=f"{host}.test", body=sent), Response(method)] * times, up, on=on, **fields)


def over_http2(name: str, up: Play, *headers: str, host: str = "a", on: str = "main", times: int = TIMES) -> Case:
    """The same over HTTP/2."""
    return h2_case(f"{name}_over_http2", [step for _ in range(times) for step in (Open(head("GET", "/p", *headers, authority=f"{host}.test")), Ended())],
                   on=on, up=up)  # fmt: skip


def both(name: str, up: Callable[[], Play], *headers: str, **fields: Any) -> Iterator[Case]:
    """Over both versions of HTTP."""
    yield ask(name, up(), *headers, **fields)
    yield over_http2(name, up(), *headers, **fields)


def every(make: Callable[[int], Any]) -> Callable[[], Play]:
    return lambda: one_by_one(make)


def over(name: str, make: Callable[[int], list[Any]], **fields: Any) -> Iterator[Case]:
    """To an upstream that speaks HTTP/2, over both versions. `make`: the answer with that number."""
    up = {"h2a": each(*[[Ended(), *make(n)] for n in range(1, TIMES + 1)])}
    fields.setdefault("on", "h2")
    yield ask(f"h2_{name}", up, **fields)  # type: ignore[arg-type]
    yield over_http2(f"h2_{name}", up, **fields)  # type: ignore[arg-type]


LITERAL = frozenset(("x-tag", "content-length", "etag", "date", "set-cookie", "content-type", "x-envoy-upstream-service-time"))
LONG = "x" * 700
H2_VARIED: dict[str, Callable[[int], tuple[int, tuple[str, ...], bytes]]] = {
    "tags": lambda n: (200, (f"x-tag: tag-{n}", "x-up: up"), b"ok"),
    "lengths": lambda n: (200, (f"content-length: {n}", "x-up: up"), b"x" * n),
    "lengths_and_tags": lambda n: (200, (f"content-length: {n * 7}", f"x-tag: {n}"), b"x" * (n * 7)),
    "dates": lambda n: (200, (f"date: Thu, 01 Jan 1970 00:00:{n:02d} GMT", f'etag: "{n}"', "server: theirs"), b"ok"),
    "cookies": lambda n: (200, (f"set-cookie: a={n}; Path=/; HttpOnly",), b"ok"),
    "two_cookies": lambda n: (200, (f"set-cookie: a={n}", f"set-cookie: b={n}"), b"ok"),
    "long": lambda n: (200, (f"x-tag: {LONG}{n}",), b"ok"),
    "longer_each_time": lambda n: (200, (f"x-tag: {'y' * n * 20}",), b"ok"),
    "empty_now_and_then": lambda n: (200, (f"x-tag: {n if n % 3 else ''}",), b"ok"),
    "tabs": lambda n: (200, (f"x-tag: a\t{n}",), b"ok"),
    "not_ascii": lambda n: (200, (f"x-tag: \xe9{n}",), b"ok"),
    "service_times": lambda n: (200, (f"x-envoy-upstream-service-time: {n}",), b"ok"),
    "types": lambda n: (200, (f"content-type: text/{n}", f"x-tag: {n}"), b"ok"),
    "statuses": lambda n: ((200, 201, 404, 500)[n % 4], (f"x-tag: {n}",), b"ok"),
    "errors": lambda n: (503, (f"x-tag: {n}",), b"no"),
    "no_bodies": lambda n: (204, (f"x-tag: {n}",), b""),
    "empty": lambda n: (200, (f"x-tag: {n}", "content-length: 0"), b""),
    "large": lambda n: (200, (f"x-tag: {n}", f"content-length: {20_000 + n}"), b"x" * (20_000 + n)),
    "marks": lambda n: (200, (f"x-tag: <value {n % 3}>", f"x-up: {n}", "x-mark: <value 0>"), b"ok"),
    "canary_now_and_then": lambda n: (200, (f"x-tag: {n}", *(("x-envoy-upstream-canary: true",) if n % 5 == 0 else ())), b"ok"),
}


def answered(n: int, make: Callable[[int], tuple[int, tuple[str, ...], bytes]], literal: frozenset[str]) -> list[Any]:
    """The answer of an upstream that speaks HTTP/2."""
    status, fields, data = make(n)
    return reply(status, *fields, body=data or None, literal=literal)


VARIED: dict[str, Callable[[int], Any]] = {
    "tags": tagged,
    "lengths": lambda n: answer(body=body(n)),
    "lengths_and_tags": lambda n: answer(body=body(n), **tag(n)),
    "lengths_first": lambda n: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Tag: %d\r\n\r\n%b" % (n, n, b"x" * n),
    "dates": lambda n: answer(date=f"Thu, 01 Jan 1970 00:00:{n:02d} GMT"),
    "dates_and_tags": lambda n: answer(date=f"Thu, 01 Jan 1970 00:00:{n:02d} GMT", **tag(n)),
    "etags": lambda n: answer(etag=f'W/"{n:x}-{n * n:x}"', last_modified=f"Thu, 01 Jan 1970 00:00:{n:02d} GMT", cache_control="max-age=60"),
    "cookies": lambda n: answer(set_cookie=f"session={n}; Path=/; HttpOnly; SameSite=Lax"),
    "two_cookies": lambda n: b"HTTP/1.1 200 OK\r\nset-cookie: a=%d\r\nset-cookie: b=%d\r\ncontent-length: 2\r\n\r\nok" % (n, n),
    "some_tags_again": lambda n: tagged(n // 2),
    "few_tags": lambda n: tagged(n % 3),
    "spaces": lambda n: answer(x_tag=f"a {n} b"),
    "more_spaces": lambda n: answer(x_tag=f"a  {n}  b" if n % 2 else f"a {n} b"),
    "spaces_around": lambda n: b"HTTP/1.1 200 OK\r\nx-tag:   %d  \r\ncontent-length: 2\r\n\r\nok" % n,
    "empty_now_and_then": lambda n: answer(x_tag="" if n % 4 == 0 else str(n)),
    "tabs": lambda n: answer(x_tag=f"a\t{n}"),
    "not_ascii": lambda n: b"HTTP/1.1 200 OK\r\nx-tag: \xe9%d\r\ncontent-length: 2\r\n\r\nok" % n,
    "longer_each_time": lambda n: answer(x_tag="y" * (n * 20)),
    "long": lambda n: answer(x_tag=f"{LONG}{n}"),
    "as_long_as_before": lambda n: answer(x_tag=f"{n:02d}" if n % 2 else f"a{n:02d}", x_other=f"a{n:02d}" if n % 2 else f"{n:02d}"),
    "service_times": lambda n: answer(x_envoy_upstream_service_time=str(n)),
    "request_ids": lambda n: answer(x_request_id=f"{n:08d}-2222-4333-8444-555555555555"),
    "names_differ": lambda n: answer(**{f"x_{n}": "1"}),
    "statuses": lambda n: answer(f"{(200, 201, 404, 500)[n % 4]} X", **tag(n)),
    "reasons": lambda n: answer(f"200 Reason {n}"),
    "errors": lambda n: answer("503 No", **tag(n)),
    "types": lambda n: answer(content_type=f"text/{n}", **tag(n)),
    "servers": lambda n: answer(server=f"their-{n}", **tag(n)),
    "via": lambda n: answer(via=f"1.1 p{n}", **tag(n)),
    "attempts": lambda n: answer(x_envoy_attempt_count=str(n)),
    "marks": lambda n: answer(x_tag=f"<value {n % 3}>", x_up=str(n)),
    "marks_that_stay": lambda n: answer(x_mark="<value 0>", **tag(n)),
    "says_date": lambda n: answer(date="Thu, 01 Jan 1970 00:00:00 GMT", x_a="<date>", **tag(n)),
    "says_service_time": lambda n: answer(x_a="<service time>", **tag(n)),
    "says_value": lambda n: answer(x_a="<value 0>", x_envoy_upstream_service_time=str(n)),
    "keep_alive": lambda n: answer(connection="keep-alive", **tag(n)),
    "keep_alive_fields": lambda n: answer(keep_alive=f"timeout={n}", **tag(n)),
    "empty": lambda n: answer(body=b"", **tag(n)),
    "leading_zeros": lambda n: b"HTTP/1.1 200 OK\r\nx-tag: %d\r\ncontent-length: 00%d\r\n\r\n%b" % (n, n, b"x" * n),
    "in_halves": lambda n: [tagged(n)[:20], Idle(0.005), tagged(n)[20:]],
    "bodies_apart": lambda n: [tagged(n)[:-2], Idle(0.005), b"ok"],
    "chunked": lambda n: b"HTTP/1.1 200 OK\r\nx-tag: %d\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" % n,
    "large": lambda n: answer(body=b"x" * (20_000 + n), **tag(n)),
}


def odd(length: bytes, sent: bytes = b"ok") -> bytes:
    """A tagged answer with this length."""
    return b"HTTP/1.1 200 OK\r\nx-tag: tag-x\r\nx-up: up\r\ncontent-length: %b\r\n\r\n%b" % (length, sent)


ODD: dict[str, list[Any]] = {
    "chunked": [b"HTTP/1.1 200 OK\r\nx-tag: t\r\nx-up: up\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"],
    "closed": [Close()],
    "reset": [Reset()],
    "garbage": [b"garbage\r\n\r\n"],
    "continue": [b"HTTP/1.1 100 Continue\r\n\r\n", tagged(LATE)],
    "closing": [answer(x_tag="t", x_up="up", connection="close"), Close()],
    "canary": [answer(x_tag="t", x_up="up", x_envoy_upstream_canary="true")],
    "no_content": [b"HTTP/1.1 204 No Content\r\nx-tag: t\r\nx-up: up\r\n\r\n"],
    "not_modified": [b"HTTP/1.1 304 Not Modified\r\nx-tag: t\r\nx-up: up\r\n\r\n"],
    "error": [answer("503 No", x_tag="t", x_up="up")],
    "length_of_letters": [odd(b"abc")],
    "negative_length": [odd(b"-2")],
    "length_with_sign": [odd(b"+2")],
    "two_lengths": [b"HTTP/1.1 200 OK\r\nx-tag: t\r\nx-up: up\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok"],
    "length_and_coding": [b"HTTP/1.1 200 OK\r\nx-tag: t\r\nx-up: up\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"],
    "nul": [b"HTTP/1.1 200 OK\r\nx-tag: a\0b\r\nx-up: up\r\ncontent-length: 2\r\n\r\nok"],
    "other_order": [b"HTTP/1.1 200 OK\r\nx-up: up\r\nx-tag: t\r\ncontent-length: 2\r\n\r\nok"],
    "other_spelling": [b"HTTP/1.1 200 OK\r\nX-Tag: t\r\nx-up: up\r\ncontent-length: 2\r\n\r\nok"],
    "http_1_0": [b"HTTP/1.0 200 OK\r\nx-tag: t\r\nx-up: up\r\ncontent-length: 2\r\n\r\nok", Close()],
}


def cases() -> Iterator[Case]:
    for name, make in VARIED.items():
        yield from both(name, every(make))
    for name, script in ODD.items():
        yield from both(f"late_{name}", lambda script=script: late(*script))  # type: ignore[misc]
    yield ask("late_too_short", late(odd(b"9"), Close()), times=LATE, then="closed")
    yield ask("late_too_long", late(odd(b"1")), times=TIMES)
    for host in ("adds", "adds_path", "adds_back", "removes", "copies", "sets", "appends", "if_absent", "drops", "counted", "counts_tries", "copies_count",
                 "by_response", "by_code", "endless", "per_try", "weighted"):  # fmt: skip
        yield from both(f"host_{host}", every(tagged), "x-a: 1", host=host)
    for host in ("retries", "counts_tries", "by_response"):
        yield ask(f"{host}_after_error", late(answer("503 No", x_tag="t", x_up="up", x_again="yes")), host=host)
        yield ask(f"{host}_after_reset", late(Close()), host=host)
    for host in ("by_response", "a"):
        yield from both(f"{host}_says_again", every(lambda n: answer(x_again="yes" if n == LATE else f"no-{n}")), host=host)
    for on in ("edge", "json", "values", "like_istio", "filtered", "rbac", "limit", "plain_router", "pass_server", "echo_id", "no_id", "few", "tags",
               "tags_json", "not_ours", "spelt"):  # fmt: skip
        yield from both(f"on_{on}", every(tagged), "x-role: admin", on=on)
        yield from both(f"on_{on}_lengths", every(lambda n: answer(body=body(n), x_envoy_upstream_service_time=str(n), **tag(n))), "x-role: admin", on=on)
    for host in ("copies", "sets", "drops", "adds"):
        yield ask(f"logged_{host}", one_by_one(tagged), host=host, on="tags")
        yield ask(f"logged_{host}_as_json", one_by_one(tagged), host=host, on="tags_json")
    yield from both("not_ours_says_service_time", every(VARIED["says_service_time"]), on="not_ours")
    yield ask("logged_few_tags", one_by_one(lambda n: tagged(n % 5)), on="tags")
    for name, varied in H2_VARIED.items():
        for way, literal in (("literals", LITERAL), ("indexed", frozenset[str]())):
            yield from over(f"{name}_{way}", lambda n, varied=varied, literal=literal: answered(n, varied, literal))  # type: ignore[misc]
    for where in ({"host": "adds"}, {"host": "copies"}, {"host": "drops"}, {"on": "h2_json"}, {"on": "h2_edge"}, {"on": "h2_tags"}, {"on": "h2_stats"}):
        for way, literal in (("literals", LITERAL), ("indexed", frozenset[str]())):
            name = "_".join((*where.values(), way))
            yield from over(name, lambda n, literal=literal: answered(n, H2_VARIED["lengths_and_tags"], literal), **where)  # type: ignore[misc]
    yield from over("one_with_trailers", lambda n: reply(200, f"x-tag: {n}", trailers=("x-last: 1",) if n == LATE else (), literal=LITERAL))
    yield from over("one_is_reset", lambda n: reply(200, f"x-tag: {n}", literal=LITERAL) if n != LATE else [Rst()])
    yield from over("one_is_too_short", lambda n: reply(200, f"x-tag: {n}", f"content-length: {2 + (n == LATE)}", literal=LITERAL))
    yield from over("one_is_too_long", lambda n: reply(200, f"x-tag: {n}", f"content-length: {2 - (n == LATE)}", literal=LITERAL))
    yield from over("one_has_no_length", lambda n: reply(200, f"x-tag: {n}", f"content-length: {'x' if n == LATE else 2}", literal=LITERAL))
    yield from over("one_fails", lambda n: reply(503 if n == LATE else 200, f"x-tag: {n}", literal=LITERAL), host="retries")
    yield from both("cors", every(tagged), ORIGIN.lower(), host="host", on="cors")
    yield from both("no_cors", every(tagged), ORIGIN.lower(), on="cors")
    yield ask("to_posts", one_by_one(tagged), method="POST", sent=b"hello")
    yield ask("to_deletes", one_by_one(tagged), method="DELETE")
    yield ask("to_head", one_by_one(lambda n: tagged(n)[:-2]), method="HEAD")
    methods = ["HEAD" if n == LATE else "GET" for n in range(1, TIMES + 1)]
    asked = [step for method in methods for step in (req(method, "/p"), Response(method))]
    yield Case("head_in_between", asked, one_by_one(lambda n: tagged(n)[:-2] if n == LATE else tagged(n)))
    yield Case("pipelined", [get("/p") * TIMES, *[Response()] * TIMES], one_by_one(tagged))


CASES = list(cases())

test_case = check_cases(CASES)
