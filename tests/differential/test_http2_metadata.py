"""METADATA frames, Envoy's extension of HTTP/2: maps of a stream that pass through a proxy where both its sides are allowed to know them."""

from __future__ import annotations

import hpack

from tests.differential.harness import (
    Body,
    Case,
    Data,
    Ended,
    Got,
    Headers,
    Heard,
    Hello,
    Metadata,
    Open,
    Response,
    Signal,
    Sync,
    Wait,
    ask,
    bootstrap,
    check_cases,
    cluster,
    each,
    filter_,
    get,
    h2_case,
    h2_cluster,
    head,
    http,
    lines,
    reply,
)


def vhost(name: str, to: str = "", **route: object) -> dict:
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to or name, **route}}]}


ALLOWED = {"allow_metadata": True}
CLUSTERS = [
    cluster("a"),
    h2_cluster("h2a", options=ALLOWED),
    h2_cluster("plain", "h2a"),
    h2_cluster("little", "h2a", options={"allow_metadata": True, "max_metadata_size": 100}),
    h2_cluster("retried", "h2a", options=ALLOWED),
    cluster("dead"),
]
RETRIED = {"retry_policy": {"retry_on": "5xx", "num_retries": 1, "retry_back_off": {"base_interval": "0.001s"}}}
HOSTS = [*(vhost(one["name"]) for one in CLUSTERS if one["name"] != "retried"), vhost("retried", **RETRIED)]
HOSTS.append({"name": "direct", "domains": ["direct.test"], "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 200}}]})
CONFIG = bootstrap(
    http("main", HOSTS, http2_protocol_options=ALLOWED),
    http("refusing", HOSTS),
    http("little", HOSTS, http2_protocol_options={"allow_metadata": True, "max_metadata_size": 100}),
    http("buffering", HOSTS, http2_protocol_options=ALLOWED, filters=[filter_("buffer", max_request_bytes=1000)]),
    clusters=CLUSTERS,
)

ONE = Metadata([("key", "value"), ("other", "thing")])
TWO = Metadata([("second", "map")])
LONG = Metadata([("long", "x" * 40_000)])
ODD = Metadata([("UPPER Case", "v\x01"), ("", "empty"), (":path", "/x"), ("connection", "close")])
BULK = bytes(range(256)) * 200
LONG_SPLIT = Metadata(LONG.fields, split=16_000)


def asking(name: str, *steps: object, host: str = "h2a", **fields: object) -> Case:
    """A POST whose head goes out; then these steps."""
    return h2_case(name, Open(head("POST", authority=f"{host}.test"), end=False), *steps, **fields)  # type: ignore[arg-type]


def requests() -> list[Case]:
    """What clients send."""
    return [
        asking("request", ONE, Data(b"x", end=True), Ended()),
        asking("request_two_maps", ONE, TWO, Data(b"x", end=True), Ended()),
        asking("request_between_data", Data(b"x"), ONE, Data(b"y", end=True), Ended()),
        asking("request_between_data_that_was_read", Data(b"x"), Wait("begun"), ONE, Wait("metadata"), Data(b"y", end=True), Ended(),
               up=[Got(b"x"), Signal("begun"), Heard("metadata"), Signal("metadata"), Ended(), *reply()]),
        asking("request_before_trailers", Data(b"x"), ONE, Headers(lines("x-t: 1"), end=True), Ended()),
        asking("request_before_an_empty_end", ONE, Data(b"", end=True), Ended()),
        h2_case("request_after_its_end", Open(head(authority="h2a.test")), ONE, Ended()),
        asking("request_in_pieces", Metadata(ONE.fields, split=3), Data(b"x", end=True), Ended()),
        asking("request_long", LONG_SPLIT, Data(b"x", end=True), Ended()),
        asking("request_empty", Metadata(block=b""), Data(b"x", end=True), Ended()),
        asking("request_garbage", Metadata(block=b"\xff\xff\xff\xff\xff\xff"), Data(b"x", end=True), Ended()),
        asking("request_never_ending", Metadata(ONE.fields, end=False), Data(b"x", end=True), Ended()),
        asking("request_repeated_names", Metadata([("a", "1"), ("a", "2"), ("b", "3")]), Data(b"x", end=True), Ended()),
        asking("request_indexed", Metadata(block=hpack.Encoder().encode([("key", "value"), ("key", "value")])), Data(b"x", end=True), Ended()),
        asking("request_odd_names", ODD, Data(b"x", end=True), Ended()),
        asking("request_not_ready", ONE, Data(b"x", end=True), Ended(), on="buffering"),
        asking("request_to_http1", ONE, Data(b"x", end=True), Ended(), host="a"),
        asking("request_to_one_that_is_not_allowed", ONE, Data(b"x", end=True), Ended(), host="plain"),
        asking("request_to_nobody", ONE, Ended(), host="dead"),
        asking("request_that_we_answer", ONE, Ended(), host="direct"),
        asking("request_tried_again", ONE, Data(b"x", end=True), Ended(), host="retried", up=each([Ended(), *reply(503)], [Ended(), *reply()])),
        asking("request_where_it_is_not_allowed", ONE, Data(b"x", end=True), Ended(), on="refusing"),
        asking("request_too_large", Metadata([("k", "v" * 200)]), Data(b"x", end=True), Ended(), on="little"),
        asking("request_too_large_in_all", *[Metadata([("k", "v" * 40)])] * 4, Data(b"x", end=True), Ended(), on="little"),
        asking("request_all_that_is_allowed", Metadata([("k", "v" * 40)]), Data(b"x", end=True), Ended(), on="little"),
        h2_case("on_an_idle_stream", Metadata(ONE.fields, stream=7), ask(authority="h2a.test")),
        h2_case("on_the_connection", Metadata(ONE.fields, stream=0), ask(authority="h2a.test")),
        h2_case("on_a_closed_stream", ask(authority="h2a.test"), Metadata(ONE.fields, stream=1), Sync()),
        h2_case("settings", Heard("settings"), hello=Hello(show=("settings", "window_update"))),
    ]  # fmt: skip


def responding(name: str, *steps: object, host: str = "h2a", **fields: object) -> Case:
    """A GET that is answered with these steps."""
    return h2_case(name, ask(authority=f"{host}.test"), up=[Ended(), *steps], **fields)  # type: ignore[list-item, arg-type]


def responses() -> list[Case]:
    """What upstreams send."""
    start, end = Headers([(":status", "200")]), Data(b"ok", end=True)
    return [
        responding("response", start, ONE, end),
        responding("response_two_maps", start, ONE, TWO, end),
        responding("response_before_its_head", ONE, start, end),
        responding("response_between_data", start, Data(b"x"), ONE, end),
        h2_case("response_between_data_that_was_read", Open(head(authority="h2a.test")), Got(b"x"), Signal("got"), Heard("metadata"), Signal("heard"), Ended(),
                up=[Ended(), start, Data(b"x"), Wait("got"), ONE, Wait("heard"), end]),
        responding("response_before_trailers", start, Data(b"x"), ONE, Headers(lines("x-t: 1"), end=True)),
        responding("response_without_a_body", start, ONE, Data(b"", end=True)),
        responding("response_after_its_end", Headers([(":status", "200")], end=True), ONE),
        responding("response_long", start, LONG_SPLIT, end),
        responding("response_empty", start, Metadata(block=b""), end),
        responding("response_garbage", start, Metadata(block=b"\xff\xff\xff\xff\xff\xff"), end),
        responding("response_from_one_that_is_not_allowed", start, ONE, end, host="plain"),
        responding("response_to_one_that_is_not_allowed", start, ONE, end, on="refusing"),
        responding("response_too_large", start, Metadata([("k", "v" * 200)]), end, host="little"),
        Case("response_to_http1", [get(host="h2a.test"), Response()], [Ended(), start, ONE, end]),
        Case("response_to_http1_before_its_head", [get(host="h2a.test"), Response()], [Ended(), ONE, start, end]),
        h2_case("while_data_is_relayed", Open(head("POST", authority="h2a.test"), end=False), Heard("headers"), Body(BULK, end=False), ONE, Body(BULK), Ended(),
                up=[start, Got(len(BULK)), Heard("metadata"), Body(BULK, end=False), TWO, Ended(), Body(BULK)]),
        h2_case("both_ways", Open(head("POST", authority="h2a.test"), end=False), ONE, Heard("metadata"), Data(b"x", end=True), Ended(),
                up=[Heard("metadata"), start, TWO, Ended(), end]),
    ]  # fmt: skip


CASES = [*requests(), *responses()]

test_case = check_cases(CASES)
