"""Streams on which both sides speak for some time, and nobody looks at what they say: what arrives, what is counted and logged, and how they end."""

from __future__ import annotations

from itertools import count as count_from
from typing import Any

from tests.differential import http2_wire as h2
from tests.differential.harness import (
    Body,
    Case,
    Close,
    Data,
    EchoData,
    Ended,
    Got,
    Headers,
    Heard,
    Hello,
    Idle,
    Open,
    Reset,
    Rig,
    Rst,
    Script,
    Settings,
    Show,
    Signal,
    Update,
    Wait,
    bootstrap,
    check_cases,
    file_log,
    filter_,
    grpc_head,
    h2_case,
    h2_cluster,
    http,
    lines,
    message,
)
from tests.differential.wire import play

LOG = "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT% %GRPC_STATUS%\n"
SMALL = {"initial_stream_window_size": 65_535, "initial_connection_window_size": 65_535}
QUICK = {"retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"}, "retry_on": "5xx,reset"}


def vhost(name: str, to: str = "h2a", **route: Any) -> dict[str, Any]:
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to, **route}}]}


HOSTS = [
    vhost("h2"),
    vhost("slow", timeout="0.4s"),
    vhost("retried", retry_policy=QUICK),
    vhost("mirrored", request_mirror_policies=[{"cluster": "h2shadow"}]),
    vhost("idle", idle_timeout="0.4s"),
    vhost("per-try-idle", retry_policy={**QUICK, "per_try_idle_timeout": "0.4s"}),
    vhost("lasting", max_stream_duration={"max_stream_duration": "0.4s"}),
    vhost("narrow", "h2narrow"),
]


def logged(name: str, **fields: Any) -> dict[str, Any]:
    return http(name, HOSTS, access_log=[file_log(LOG)], **fields)


CONFIG = bootstrap(
    logged("main"),
    logged("idle", stream_idle_timeout="0.4s"),
    logged("narrow", http2_protocol_options=SMALL),
    logged("counted", filters=[filter_("grpc_stats", stats_for_all_methods=True)]),
    logged("slowed", filters=[filter_("fault", response_rate_limit={"fixed_limit": {"limit_kbps": 64}, "percentage": {"numerator": 100}})]),
    http("periodic", HOSTS, access_log=[file_log(LOG, file="periodic.log")], access_log_options={"access_log_flush_interval": "0.1s"}),
    clusters=[h2_cluster("h2a"), h2_cluster("h2shadow"), h2_cluster("h2narrow", "h2a", options=SMALL)],
)


def begin(host: str = "h2") -> Script:
    """The client's first words, and the answer to them: from then on both heads are through."""
    return [Open(grpc_head(authority=f"{host}.test"), end=False), Data(message(b"first")), Got(b"hello")]


HEAD = Headers(lines(":status: 200", "content-type: application/grpc"))
ANSWER = [HEAD, Got(b"first"), Data(message(b"hello"))]
END = Headers(lines("grpc-status: 0"), end=True)
BULK = bytes(range(256)) * 1200


def talk(host: str = "h2") -> Script:
    """A conversation to its end."""
    return [*begin(host), Data(message(b"one")), Got(b"two"), Data(message(b"three")), Data(message(b"four")), Data(end=True), Ended()]


TALK = [*ANSWER, Got(b"one"), Data(message(b"two")), Ended(), END]


async def until_logged(rig: Rig) -> list[str]:
    """The lines of the periodic log up to the first that knows of everything that was said by then."""
    wire = await rig.connect("periodic")
    await play([Hello(), *begin(), Data(message(b"one"))], wire, rig.signals)
    for count in count_from(1):
        text = await rig.wait_lines("periodic.log", count)
        if "rx=18 tx=10" in text.splitlines()[-1]:
            return [text.splitlines()[-1]]
    raise AssertionError


CASES: list[Case] = [
    h2_case("conversation", talk(), up=TALK),
    h2_case("conversation_with_padding", begin(), Data(message(b"one"), padding=20), Got(b"two"), Data(b"x", padding=0, end=True), Ended(),
            up=[*ANSWER, Got(b"one"), Data(message(b"two"), padding=200), Ended(), END]),
    h2_case("many_messages_at_once", begin(), *[Data(message(b"%d" % number)) for number in range(60)], Data(message(b"last"), end=True), Got(b"end"), Ended(),
            up=[*ANSWER, Got(b"last"), *[Data(message(b"%d" % number)) for number in range(60)], Data(message(b"end")), END]),
    h2_case("request_ends_first", begin(), Data(end=True), Got(b"three"), Ended(),
            up=[*ANSWER, Ended(), Data(message(b"two")), Data(message(b"three")), END]),
    h2_case("request_ends_with_trailers", begin(), Data(message(b"one")), Headers(lines("x-end: 1"), end=True), Ended(),
            up=[*ANSWER, Got(b"one"), Ended(), END]),
    h2_case("response_ends_first", begin(), Data(message(b"one")), Ended(), up=[*ANSWER, Got(b"one"), END, Ended()]),
    h2_case("response_ends_without_trailers", begin(), Data(message(b"one"), end=True), Ended(),
            up=[*ANSWER, Got(b"one"), Ended(), Data(message(b"end"), end=True)]),
    h2_case("client_resets", begin(), Data(message(b"one")), Wait("got"), Rst(h2.CANCEL), up=[*ANSWER, Got(b"one"), Signal("got"), Ended()]),
    h2_case("client_closes", begin(), Data(message(b"one")), Wait("got"), Close(), up=[*ANSWER, Got(b"one"), Signal("got"), Ended()]),
    h2_case("upstream_resets", begin(), Data(message(b"one")), Got(b"two"), Signal("got"), Ended(),
            up=[*ANSWER, Got(b"one"), Data(message(b"two")), Wait("got"), Rst(h2.INTERNAL_ERROR)]),
    h2_case("upstream_closes", begin(), Data(message(b"one")), Got(b"two"), Signal("got"), Ended(),
            up=[*ANSWER, Got(b"one"), Data(message(b"two")), Wait("got"), Close()]),
    h2_case("upstream_tcp_reset", begin(), Data(message(b"one")), Got(b"two"), Signal("got"), Ended(),
            up=[*ANSWER, Got(b"one"), Data(message(b"two")), Wait("got"), Reset()]),
    h2_case("client_breaks_the_protocol", begin(), Data(message(b"one")), Wait("got"), Data(b"", stream=7), Heard("goaway"),
            up=[*ANSWER, Got(b"one"), Signal("got"), Ended()]),
    h2_case("more_than_the_content_length", Open(grpc_head("/", "content-length: 20", authority="h2.test"), end=False), Data(message(b"first")), Got(b"hello"),
            Data(b"12345"), Data(b"123456"), Ended(), up=[*ANSWER, Ended()]),
    h2_case("less_than_the_content_length", Open(grpc_head("/", "content-length: 20", authority="h2.test"), end=False), Data(message(b"first")), Got(b"hello"),
            Data(b"12345"), Data(b"1", end=True), Ended(), up=[*ANSWER, Ended()]),
    # ---- windows
    h2_case("bulk_both_ways", begin(), Body(BULK), Ended(), up=[*ANSWER, EchoData()]),
    h2_case("bulk_through_narrow_windows", begin("narrow"), Body(BULK), Ended(), on="narrow", up=[*ANSWER, EchoData()]),
    h2_case("a_window_that_closes_amid_the_conversation", begin(), Wait("narrow"), Data(message(b"one")), Got(b"two"), Data(message(b"three"), end=True),
            Ended(), up=[*ANSWER, Show(manual=("window",)), Settings({h2.WINDOW: 20}), Heard("settings_ack"), Signal("narrow"), Got(b"one"),
                Data(message(b"two")), Update(20, None), Ended(), END]),
    # ---- time
    h2_case("timeout_of_the_route", begin("slow"), Data(message(b"one"), end=True), Ended(), up=[*ANSWER, Got(b"one"), Heard("rst_stream")]),
    h2_case("idle_stream", begin(), Data(message(b"one")), Ended(), on="idle", up=[*ANSWER, Got(b"one"), Heard("rst_stream")]),
    h2_case("stream_kept_busy_by_the_client", begin(), Idle(0.25), Data(message(b"one")), Idle(0.25), Data(message(b"two")), Idle(0.25), Data(end=True),
            Ended(), on="idle", up=[*ANSWER, Ended(), END]),
    h2_case("stream_kept_busy_by_the_upstream", begin(), Got(b"end"), Data(end=True), Ended(), on="idle",
            up=[*ANSWER, Idle(0.25), Data(message(b"one")), Idle(0.25), Data(message(b"two")), Idle(0.25), Data(message(b"end")), Ended(), END]),
    h2_case("idle_timeout_of_the_route", begin("idle"), Idle(0.25), Data(message(b"one")), Idle(0.25), Data(message(b"two")), Ended(),
            up=[*ANSWER, Got(b"two"), Heard("rst_stream")]),
    h2_case("idle_timeout_of_a_try", begin("per-try-idle"), Data(end=True), Got(b"end"), Ended(),
            up=[*ANSWER, Ended(), Idle(0.25), Data(message(b"one")), Idle(0.25), Data(message(b"end")), Heard("rst_stream")]),
    h2_case("idle_timeout_of_a_try_whose_request_goes_on", begin("per-try-idle"), Idle(0.6), Data(end=True), Ended(), up=[*ANSWER, Ended(), END]),
    h2_case("stream_that_lasts_too_long", begin("lasting"), Data(message(b"one")), Ended(), up=[*ANSWER, Got(b"one"), Heard("rst_stream")]),
    # ---- where somebody looks at what is said, or keeps it
    h2_case("messages_are_counted", talk(), on="counted", up=TALK),
    h2_case("response_is_slowed", talk(), on="slowed", up=TALK),
    h2_case("retries_that_cannot_come_any_more", talk("retried"), up=TALK),
    h2_case("mirrored", talk("mirrored"), up={"h2a": TALK, "h2shadow": [Ended(), HEAD, END]}),
    Case("logged_meanwhile", until_logged, up=[*ANSWER, Ended()], skip=("log", "stats", "upstream"), note="when it is logged is a matter of time"),
]  # fmt: skip

test_case = check_cases(CASES)
