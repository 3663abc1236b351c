"""Downstream HTTP/2 as listeners see it: over TLS, behind network filters, in their logs; clients that only reset; draining."""

from __future__ import annotations

from typing import Any

from tests.differential.config import Config
from tests.differential.harness import (
    Case,
    Close,
    Ended,
    Eof,
    Heard,
    Hello,
    Idle,
    Open,
    Request,
    Rig,
    Rst,
    Tls,
    ask,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    get,
    h2_case,
    hcm,
    head,
    http,
    listener,
)
from tests.differential.wire import Response, Script, play

H2 = Tls(alpn=("h2",))
H1 = Tls(alpn=("http/1.1",))
BOTH = Tls(alpn=("h2", "http/1.1"))
NEITHER = Tls(alpn=("other",))
NO_ALPN = Tls()
LOG = file_log("%PROTOCOL% flags=%RESPONSE_FLAGS% termination=%CONNECTION_TERMINATION_DETAILS% reason=%DOWNSTREAM_LOCAL_CLOSE_REASON%\n")
REPLY = {"status": 200, "body": {"inline_string": "hello"}}
HOSTS = [
    {"name": "a", "domains": ["a.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}]},
    {"name": "hole", "domains": ["hole.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "hole"}}]},
    {"name": "direct", "domains": ["direct.test"], "routes": [{"match": {"prefix": "/"}, "direct_response": REPLY}]},
]


def secure(name: str, *alpn: str, **options: Any) -> Config:
    """A listener with TLS."""
    common: Config = {"tls_certificates": [{"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}]}
    if alpn:
        common["alpn_protocols"] = list(alpn)
    socket = {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": common}}
    return listener(name, chains=[{"filters": [hcm(name, HOSTS, **options)], "transport_socket": socket}])


DRAIN = {"drain_timeout": "0.2s"}
LOGGED = {"listener_fields": {"access_log": [LOG]}}
CONFIG = bootstrap(
    http("main", HOSTS),
    secure("tls", "h2", "http/1.1"),
    secure("tls_h1_first", "http/1.1", "h2"),
    secure("tls_only_h2", "h2", codec_type="HTTP2"),
    secure("tls_only_h1", "h2", "http/1.1", codec_type="HTTP1"),
    secure("tls_no_alpn"),
    http("logged", HOSTS, **LOGGED),
    http("logged_idle", HOSTS, common_http_protocol_options={"idle_timeout": "0.2s"}, **DRAIN, **LOGGED),
    http("logged_duration", HOSTS, common_http_protocol_options={"max_connection_duration": "0.2s"}, **DRAIN, **LOGGED),
    http("logged_ping", HOSTS, http2_protocol_options={"connection_keepalive": {"interval": "0.1s", "timeout": "0.1s"}}, **LOGGED),
    listener("counted", filter_("connection_limit", stat_prefix="few", max_connections=10), hcm("counted", HOSTS)),
    listener("guarded", filter_("network_rbac", stat_prefix="r", rules={"policies": {"all": {"permissions": [{"any": True}], "principals": [{"any": True}]}}}),
             hcm("guarded", HOSTS), access_log=[LOG]),
    listener("inspected", hcm("inspected", HOSTS), listener_filters=[{"name": "http", "typed_config": {"@": "http_inspector"}}]),
    http("draining", HOSTS, **DRAIN),
    clusters=[cluster("a"), cluster("hole", connect_timeout="5s")],
    layered_runtime={"layers": [{"name": "static", "static_layer": {"overload.premature_reset_total_stream_count": 10}}]},
)  # fmt: skip


def resets(count: int, authority: str = "hole.test") -> Script:
    """Requests that are reset at once."""
    return [step for _ in range(count) for step in (Open(head(authority=authority)), Rst())]


async def drains(rig: Rig) -> list[str]:
    """A connection that is busy when draining begins."""
    wire = await rig.connect("draining")
    seen = []
    for steps in ([Hello(), *ask()], [*ask()], [*ask(), Eof()]):
        seen.append(str(await play(steps, wire, rig.signals)))
        if len(seen) == 1:
            seen.append(str((await rig.proxy.admin("POST", "/healthcheck/fail"))[1]))
            await rig.settled()
    assert wire.http2 is not None
    seen.append(rig.normaliser.bytes(wire.http2.text()))
    await rig.proxy.admin("POST", "/healthcheck/ok")
    return seen


CASES = [
    # ---- TLS
    h2_case("alpn_h2", ask(), on="tls", tls=H2),
    h2_case("alpn_both", ask(), on="tls", tls=BOTH),
    Case("alpn_h1", get(), on="tls", tls=H1),
    Case("alpn_h1_is_preferred", get(), on="tls_h1_first", tls=BOTH),
    h2_case("alpn_h2_where_h1_is_preferred", ask(), on="tls_h1_first", tls=H2),
    h2_case("no_alpn_prior_knowledge", ask(), on="tls", tls=NO_ALPN),
    Case("no_alpn_h1", get(), on="tls", tls=NO_ALPN),
    h2_case("no_alpn_wanted", ask(), on="tls_no_alpn", tls=H2),
    Case("alpn_neither", get(), on="tls", tls=NEITHER),
    h2_case("h2_although_alpn_says_h1", Idle(0.05), on="tls", tls=H1, then="closed"),
    Case("h1_although_alpn_says_h2", [get(), Eof()], on="tls", tls=H2, then="closed", skip=("client",), note="we say why in a GOAWAY"),
    h2_case("only_h2_without_alpn", ask(), on="tls_only_h2", tls=NO_ALPN),
    h2_case("only_h1_with_alpn_h2", Idle(0.05), on="tls_only_h1", tls=H2, then="closed"),
    h2_case("tls_scheme", ask(scheme="https"), on="tls", tls=H2),
    h2_case("tls_direct", ask(authority="direct.test"), on="tls", tls=H2),
    # ---- filters in front, and logs of listeners
    h2_case("behind_a_network_filter", ask(), ask(), on="counted"),
    h2_case("behind_a_network_filter_with_log", ask(), ask(), Close(), on="guarded", then="leave"),
    h2_case("behind_an_http_inspector", ask(), on="inspected"),
    h2_case("listener_log", ask(), Close(), on="logged", then="leave"),
    Case("listener_log_h1", [get(), Response(), Close()], on="logged", then="leave"),
    h2_case("listener_log_malformed", Open([(":method", "GET")]), Eof(), on="logged", then="closed"),
    h2_case("listener_log_malformed_later", Heard("settings"), Open([(":method", "GET")]), Eof(), on="logged", then="closed"),
    Case("listener_log_malformed_h1", [b"GET\r\n\r\n", Eof()], on="logged", then="closed"),
    Case("listener_log_malformed_later_h1", [get(), Response(), b"GET\r\n\r\n", Eof()], on="logged", then="closed"),
    h2_case("listener_log_idle", Eof(), on="logged_idle", then="closed"),
    Case("listener_log_idle_without_anything", [Eof()], on="logged_idle", then="closed"),
    h2_case("listener_log_duration", Eof(), on="logged_duration", then="closed"),
    Case("listener_log_duration_without_anything", [Eof()], on="logged_duration", then="closed"),
    h2_case("listener_log_ping_not_answered", Eof(), on="logged_ping", then="closed", hello=Hello(manual=("ping",))),
    h2_case("listener_log_resets", resets(5), Eof(), on="logged", then="closed"),
    # ---- premature resets
    h2_case("few_resets", resets(4), ask(authority="direct.test")),
    h2_case("too_many_resets", resets(5), Eof(), then="closed"),
    h2_case("too_many_resets_others_end", Open(head(), end=False), Idle(0.05), resets(5), Eof(), then="closed", up=[Request(), Eof()]),
    h2_case("resets_among_good_requests", resets(4), *[ask() for _ in range(8)], resets(3), ask(authority="direct.test")),
    h2_case("too_many_resets_among_good_requests", resets(4), *[ask() for _ in range(8)], resets(4), Eof(), then="closed"),
    h2_case("resets_of_answered_requests", *[[Open(head("POST", authority="direct.test"), end=False), Ended(), Rst()] for _ in range(8)],
            ask(authority="direct.test")),
    # ---- draining
    Case("drains", drains),
]  # fmt: skip

test_case = check_cases(CASES)
