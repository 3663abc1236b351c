"""The ext_authz filter with a service of the test's own, and how it and its parts are configured. With real services: tests/differential/test_ext_authz.py."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from meshproxy.api import messages
from meshproxy.api.errors import ConfigError
from meshproxy.codec.headers import RequestHead, ResponseHead
from meshproxy.http.ext_authz import grpc_service, mutations
from meshproxy.http.ext_authz.attributes import Attributes, text
from meshproxy.http.ext_authz.http_service import HttpService
from meshproxy.http.ext_authz.verdict import DENIED, ERROR, JOIN, OK, Mutation, Verdict
from meshproxy.http.filters import ext_authz
from meshproxy.http.header_mutations import ADD_IF_ABSENT, APPEND, OVERWRITE, OVERWRITE_IF_EXISTS
from meshproxy.http.mutation_rules import ADD, ALLOWED, FAILED, IGNORED, REMOVE, SET, MutationRules
from meshproxy.http.replies import Reply
from meshproxy.observe import flags
from meshproxy.tcp.filters import ext_authz as network_ext_authz
from tests.polling import PATIENCE
from tests.unit import stream_help
from tests.unit.filter_help import Route, Stream, connection, context, counters, network_context, proto

_P = "envoy.extensions.filters.http.ext_authz.v3"
GRPC = "grpc_service: {envoy_grpc: {cluster_name: authz}}, transport_api_version: V3"
HTTP = "http_service: {server_uri: {uri: 'http://authz/', cluster: authz, timeout: 1s}}"


class Service:
    """Says what the test wants, and remembers what it was asked."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = list(verdicts)
        self.asked: list[Any] = []

    async def check(self, request: Any, stream: Any, log: Any = None) -> Verdict:
        self.asked.append(request.attributes)
        return self.verdicts.pop(0)


def make(said: Verdict | None = None, fields: str = "", **runtime: str) -> tuple[Any, Any, Service]:
    """The filter, its context, and the service in place of the configured one."""
    ctx = context(runtime)
    made = ext_authz.compile(proto(f"{_P}.ExtAuthz", f"{{{GRPC}, {fields}}}"), ctx)
    service = Service(said or Verdict(OK))
    made._service = service
    return made, ctx, service


def request(path: bytes = b"/", headers: Any = (), **fields: Any) -> Any:
    stream: Any = Stream(path, headers, **{"route": Route(), **fields})
    stream.upgrade = None
    stream.forwarding = None
    stream.protocol = "HTTP/1.1"
    stream.manager = SimpleNamespace(
        router=SimpleNamespace(cluster_of=lambda stream: None), parser_options=SimpleNamespace(max_headers=100, max_head_bytes=60 << 10)
    )
    stream.buffered_body = lambda limit: (stream.body[:limit], len(stream.body) > limit)
    return stream


def run(made: Any, stream: Any, end_stream: bool = True) -> Reply | None:
    result = made.request_headers(stream, end_stream)
    return result if result is None or isinstance(result, Reply) else asyncio.run(result)


def authz_counters(ctx: Any) -> dict[str, int]:
    return {name.rpartition("ext_authz.")[2]: count for name, count in counters(ctx).items() if "ext_authz" in name}


def verdict(outcome: str = OK, **fields: Any) -> Verdict:
    made = Verdict(outcome)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_a_request_that_may_go_on_is_changed() -> None:
    said = verdict(remove=[b"x-gone"], query=[(b"b", b"2")], query_remove=[b"a"], metadata={"user": "me"})
    said.add([Mutation(b"x-join", b"2", JOIN), Mutation(b"x-user", b"me")], [Mutation(b"x-ok", b"1", APPEND)])
    made, ctx, service = make(said)
    stream = request(b"/p?a=1", [(b"x-gone", b"1"), (b"x-join", b"1")])
    assert run(made, stream) is None
    assert stream.request.items == [(b"x-join", b"1,2"), (b"x-user", b"me")]
    assert stream.request.path == b"/p?b=2"
    assert stream.metadata[ext_authz.METADATA] == {"user": "me", "ext_authz_duration": 0.0}
    assert made.response_headers(stream, True) is None
    assert stream.response.items == [(b"x-ok", b"1")]
    assert authz_counters(ctx) == {"ok": 1}
    http = service.asked[0].request.http
    assert (http.method, http.path, http.host, http.protocol) == ("GET", "/p?a=1", "example.com", "HTTP/1.1")


def test_a_refusal() -> None:
    made, ctx, _ = make(verdict(DENIED, status=401, body=b"who?", reply=[(b"x-why", b"1"), (b"x-bad", b"a\nb")]), "max_denied_response_body_bytes: 3")
    reply = run(made, request())
    assert reply is not None
    assert (reply.status, reply.body, reply.details, reply.flag) == (401, b"who", "ext_authz_denied", flags.UAEX)
    assert reply.headers == ((b"x-why", b"1"),)
    assert authz_counters(ctx) == {"denied": 1}


@pytest.mark.parametrize(("fields", "status", "counted"), [("", 403, {"error": 1}), ("status_on_error: {code: 503}", 503, {"error": 1})])
def test_a_request_that_could_not_be_checked(fields: str, status: int, counted: dict[str, int]) -> None:
    made, ctx, _ = make(Verdict(ERROR), fields)
    reply = run(made, request())
    assert reply is not None
    assert (reply.status, reply.body, reply.details) == (status, b"", "ext_authz_error")
    assert authz_counters(ctx) == counted


def test_a_request_that_could_not_be_checked_may_pass() -> None:
    made, ctx, _ = make(Verdict(ERROR), "failure_mode_allow: true, failure_mode_allow_header_add: true, stat_prefix: waf")
    stream = request()
    assert run(made, stream) is None
    assert stream.request.get(b"x-envoy-auth-failure-mode-allowed") == b"true"
    assert counters(ctx) == {"http.ing.ext_authz.waf.error": 1, "http.ing.ext_authz.waf.failure_mode_allowed": 1}


def test_without_a_route_nobody_is_asked() -> None:
    made, _, service = make()
    assert run(made, request(route=None)) is None
    assert service.asked == []


def test_switched_off() -> None:
    made, ctx, service = make(fields="filter_enabled: {default_value: {numerator: 0}}, deny_at_disable: {runtime_key: deny, default_value: false}")
    assert run(made, request()) is None
    denying, _, _ = make(fields="filter_enabled: {default_value: {numerator: 0}}, deny_at_disable: {runtime_key: deny, default_value: false}", deny="true")
    reply = run(denying, request())
    assert reply is not None
    assert reply.details == "ext_authz_error"
    assert authz_counters(ctx) == {"disabled": 1}
    assert service.asked == []


def test_switched_on_by_metadata() -> None:
    made, ctx, service = make(fields="filter_enabled_metadata: {filter: rbac, path: [{key: policy}], value: {string_match: {prefix: mine}}}")
    assert run(made, request()) is None
    stream = request()
    stream.metadata["rbac"] = {"policy": "mine-1"}
    assert run(made, stream) is None
    assert len(service.asked) == 1
    assert authz_counters(ctx) == {"disabled": 1, "ok": 1}


def test_what_is_invalid_is_refused_where_it_is_looked_at() -> None:
    said = verdict()
    said.add([Mutation(b"x-a", b"a\nb"), Mutation(b"x-b", b"1")], [])
    made, ctx, _ = make(said, "validate_mutations: true")
    reply = run(made, request())
    assert reply is not None
    assert (reply.status, reply.details) == (500, "ext_authz_invalid")
    assert authz_counters(ctx) == {"invalid": 1}
    made, _, _ = make(said)
    stream = request()
    assert run(made, stream) is None
    assert stream.request.items == [(b"x-b", b"1")], "what would break the message is never sent"


def test_too_many_headers_are_invalid() -> None:
    said = verdict()
    said.add([Mutation(b"x-%d" % number, b"1") for number in range(101)], [])
    made, ctx, _ = make(said)
    reply = run(made, request())
    assert reply is not None
    assert reply.status == 500
    assert authz_counters(ctx) == {"invalid": 1, "request_header_limits_reached": 1}


def test_metadata_is_not_taken_from_whoever_may_not_give_it() -> None:
    made, ctx, _ = make(verdict(metadata={"a": 1}), "enable_dynamic_metadata_ingestion: false")
    stream = request()
    assert run(made, stream) is None
    assert stream.metadata == {}
    assert authz_counters(ctx) == {"ignored_dynamic_metadata": 1, "ok": 1}


def test_what_the_service_hears_of_metadata() -> None:
    made, _, service = make(fields="metadata_context_namespaces: [of-stream, of-connection, both, none], route_metadata_context_namespaces: [of-route]")
    stream = request(route=Route(metadata={"of-route": {"a": {"b": [1.0, True]}}, "hidden": {"x": "y"}}))
    stream.metadata.update({"of-stream": {"n": 1.0}, "both": {"of": "stream"}, "hidden": {"x": "y"}})
    stream.connection.metadata = {"of-connection": {"m": 2.0}, "both": {"of": "connection"}}
    run(made, stream)
    known = service.asked[0].metadata_context.filter_metadata
    assert {name: dict(known[name]) for name in known} == {"of-stream": {"n": 1.0}, "of-connection": {"m": 2.0}, "both": {"of": "stream"}}
    assert list(service.asked[0].route_metadata_context.filter_metadata) == ["of-route"]


@pytest.mark.parametrize(("fields", "text_", "raw"), [("", "hell", b""), ("pack_as_bytes: true", "", b"hell")])
def test_the_body(fields: str, text_: str, raw: bytes) -> None:
    made, _, service = make(fields=f"with_request_body: {{max_request_bytes: 4, allow_partial_message: true, {fields}}}")
    stream = request(body=b"hello")

    async def buffered(limit: int, *, partly: bool) -> bool:
        return partly

    stream.buffered_request = buffered
    assert run(made, stream, end_stream=False) is None
    http = service.asked[0].request.http
    assert (http.body, http.raw_body, http.headers["x-envoy-auth-partial-body"], http.size) == (text_, raw, "true", 5)


def test_a_body_that_is_too_long() -> None:
    made, ctx, service = make(fields="with_request_body: {max_request_bytes: 4}")
    stream = request(body=b"hello")

    async def buffered(limit: int, *, partly: bool) -> bool:
        return len(stream.body) <= limit

    stream.buffered_request = buffered
    reply = run(made, stream, end_stream=False)
    assert reply is not None
    assert reply.status == 413
    assert service.asked == []
    assert counters(ctx)["http.ing.downstream_rq_too_large"] == 1


def test_filter_state_for_logs() -> None:
    made, ctx, _ = make(fields="emit_filter_state_stats: true, filter_metadata: {a: b}")
    made.name = "authz"
    stream = request()
    run(made, stream)
    info = stream.filter_state["authz"]
    assert (info.latency_us, info.metadata) == (0, {"a": "b"})
    taken = request()
    taken.filter_state["authz"] = "somebody else's"
    made._service.verdicts.append(Verdict(OK))
    run(made, taken)
    assert authz_counters(ctx)["filter_state_name_collision"] == 1


def overridden(*texts: str, fields: str = "") -> Any:
    made, ctx, _ = make(fields=fields)
    return ext_authz.specialise(made, [proto(f"{_P}.ExtAuthzPerRoute", one) for one in texts], ctx)


def test_overrides() -> None:
    assert overridden("{disabled: true}") is None
    told = overridden("{check_settings: {context_extensions: {a: host, b: host}}}", "{check_settings: {context_extensions: {b: route}}}")
    assert told._extensions == {"a": "host", "b": "route"}
    body = "with_request_body: {max_request_bytes: 9}"
    assert overridden("{check_settings: {disable_request_body_buffering: true}}", fields=body)._body is None
    assert overridden("{check_settings: {}}", fields=body)._body == (9, False)
    assert overridden("{check_settings: {with_request_body: {max_request_bytes: 5, allow_partial_message: true}}}", fields=body)._body == (5, True)
    other = overridden("{check_settings: {grpc_service: {envoy_grpc: {cluster_name: other}}}}", "{check_settings: {}}")
    assert isinstance(other._service, Service), "the most specific override says whom to ask, or nobody does"
    assert overridden("{check_settings: {grpc_service: {envoy_grpc: {cluster_name: other}}}}")._service.cluster_name == "other"


@pytest.mark.parametrize(("status", "becomes"), [(0, 403), (100, 403), (101, 403), (200, 200), (304, 304), (599, 599), (600, 403)])
def test_a_refusal_is_a_final_response(status: int, becomes: int) -> None:
    answer = messages.known("envoy.service.auth.v3.CheckResponse")()
    answer.status.code = 7
    answer.denied_response.status.code = status
    assert grpc_service._verdict(answer).status == becomes


@pytest.mark.parametrize("status", [204, 304])
def test_a_refusal_that_has_no_body(status: int) -> None:
    made, _, _ = make(verdict(DENIED, status=status, body=b"HTTP/1.1 200 OK", reply=[(b"content-type", b"a/b")]))
    reply = run(made, request())
    assert reply is not None
    stream, codec, _ = stream_help.make()
    stream.local_reply(reply)
    assert [one for one in codec.out if one[0] == "data"] == []
    assert stream.response is not None
    assert stream.response.items == []


async def test_a_client_that_goes_away_cancels_the_call() -> None:
    made, _, service = make()
    cancelled = asyncio.Event()
    asked = asyncio.Event()

    async def check(request: Any, stream: Any, log: Any = None) -> Verdict:
        asked.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    service.check = check  # type: ignore[method-assign]
    stream, _, _ = stream_help.make(made)
    stream.route.metadata = {}
    stream.go(True)
    async with asyncio.timeout(PATIENCE):
        await asked.wait()
        stream.on_reset(0, "downstream_remote_disconnect")
        await cancelled.wait()
    assert stream.ended


async def test_a_body_waits_while_the_service_is_asked() -> None:
    made, _, service = make(fields="with_request_body: {max_request_bytes: 4, allow_partial_message: true}")
    stream, _, forwarding = stream_help.make(made)
    stream.route.metadata = {}
    stream.manager.parser_options = SimpleNamespace(max_headers=100, max_head_bytes=60 << 10)  # type: ignore[attr-defined]
    stream.go(False)
    stream.on_data(b"ab", False)
    await asyncio.sleep(0)
    assert service.asked == []
    stream.on_data(b"cdef", False)
    async with asyncio.timeout(PATIENCE):
        while stream._request_hold is not None:
            await asyncio.sleep(0)
    stream.on_data(b"gh", True)
    assert service.asked[0].request.http.body == "abcd"
    assert [entry[1:] for entry in forwarding.out if entry[0] == "data"] == [(b"ab", False), (b"cdef", False), (b"gh", True)]


# -- configuration


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ("{transport_api_version: V3}", "one of grpc_service"),
        ("{grpc_service: {envoy_grpc: {cluster_name: a}}, transport_api_version: V2}", "transport_api_version"),
        ("{grpc_service: {google_grpc: {target_uri: x, stat_prefix: y}}, transport_api_version: V3}", "grpc_service.google_grpc"),
        ("{http_service: {server_uri: {uri: x, cluster: a}}}", "http_service.server_uri.timeout"),
        ("{http_service: {server_uri: {uri: x, timeout: 1s}}}", "http_service.server_uri.cluster"),
        ("{http_service: {server_uri: {uri: x, cluster: a, timeout: 1s}, path_prefix: x}}", "http_service.path_prefix"),
        (f"{{{GRPC}, allowed_headers: {{patterns: [{{}}]}}}}", "allowed_headers.patterns[0].match_pattern"),
        (f"{{{GRPC}, decoder_header_mutation_rules: {{allow_expression: {{regex: '('}}}}}}", "decoder_header_mutation_rules.allow_expression"),
        (
            "{http_service: {server_uri: {uri: x, cluster: a, timeout: 1s}, authorization_request: {allowed_headers: {}}}, allowed_headers: {}}",
            "allowed_headers",
        ),
    ],
)
def test_wrong_configuration(config: str, path: str) -> None:
    with pytest.raises(ConfigError, match=path.replace("[", r"\[").replace("]", r"\]")):
        ext_authz.compile(proto(f"{_P}.ExtAuthz", config), context())


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ("{}", "one of disabled"),
        ("{check_settings: {disable_request_body_buffering: true, with_request_body: {max_request_bytes: 1}}}", "check_settings"),
        ("{check_settings: {grpc_service: {google_grpc: {target_uri: x, stat_prefix: y}}}}", "check_settings.grpc_service.google_grpc"),
        (
            "{check_settings: {http_service: {server_uri: {uri: x, cluster: a, timeout: 1s}, authorization_request: {allowed_headers: {}}}}}",
            "check_settings.http_service.authorization_request.allowed_headers",
        ),
    ],
)
def test_wrong_overrides(config: str, path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        overridden(config)


# -- the parts


def test_text_that_is_none() -> None:
    assert text("ä".encode() + b"\xff\xe2\x82") == "ä!!!"


def test_headers_that_the_service_gets() -> None:
    stream = request(headers=[(b"x-a", b"1"), (b"x-a", b"2"), (b"x-b", b"3"), (b"x-envoy-auth-partial-body", b"mine")])
    told = Attributes(allows=lambda name: name.startswith(b"x-"), disallows=lambda name: name == b"x-b")
    assert dict(told.of_request(stream, 1, {}, 0, None).attributes.request.http.headers) == {"x-a": "1,2"}
    raw = Attributes(allows=lambda name: name == b"x-a", raw_headers=True)
    headers = raw.of_request(stream, 1, {}, 0, None).attributes.request.http.header_map.headers
    assert [(one.key, one.raw_value) for one in headers] == [("x-a", b"1"), ("x-a", b"2")]


@pytest.mark.parametrize(
    ("action", "items"),
    [
        (APPEND, [(b"x-a", b"1"), (b"x-a", b"2"), (b"x-a", b"3")]),
        (ADD_IF_ABSENT, [(b"x-a", b"1"), (b"x-a", b"2")]),
        (OVERWRITE, [(b"x-a", b"3")]),
        (OVERWRITE_IF_EXISTS, [(b"x-a", b"3")]),
        (JOIN, [(b"x-a", b"1,3"), (b"x-a", b"2")]),
    ],
)
def test_actions(action: int, items: Any) -> None:
    head = RequestHead(b"GET", b"/", b"a", [(b"x-a", b"1"), (b"x-a", b"2")])
    mutations.apply(head, Mutation(b"x-a", b"3", action), request=True)
    assert head.items == items
    empty = ResponseHead(200)
    mutations.change_response(empty, [Mutation(b"x-a", b"3", action), Mutation(b":status", b"201"), Mutation(b":path", b"/")])
    assert empty.items == ([] if action in (OVERWRITE_IF_EXISTS, JOIN) else [(b"x-a", b"3")])
    assert empty.status == 201


@pytest.mark.parametrize(
    ("rules", "operation", "name", "value", "result"),
    [
        ("{}", SET, b"x-a", b"1", ALLOWED),
        ("{}", SET, b"x-a", b"a\nb", IGNORED),
        ("{disallow_is_error: true}", SET, b"x-a", b"a\nb", FAILED),
        ("{}", SET, b"host", b"a", IGNORED),
        ("{allow_all_routing: true}", SET, b"host", b"a", ALLOWED),
        ("{allow_all_routing: true}", SET, b"host", b"a b", IGNORED),
        ("{allow_all_routing: true}", SET, b":scheme", b"gopher", IGNORED),
        ("{allow_all_routing: true}", REMOVE, b"host", b"", IGNORED),
        ("{}", SET, b":path", b"/", ALLOWED),
        ("{}", ADD, b":path", b"/", IGNORED),
        ("{disallow_system: true}", SET, b":path", b"/", IGNORED),
        ("{}", SET, b"x-envoy-a", b"1", IGNORED),
        ("{allow_envoy: true}", SET, b"x-envoy-a", b"1", ALLOWED),
        ("{disallow_all: true}", SET, b"x-a", b"1", IGNORED),
        ("{disallow_all: true, allow_expression: {regex: 'x-.*'}}", SET, b"x-a", b"1", ALLOWED),
        ("{disallow_expression: {regex: 'x-.*'}, allow_expression: {regex: 'x-.*'}}", SET, b"x-a", b"1", IGNORED),
    ],
)
def test_rules(rules: str, operation: str, name: bytes, value: bytes, result: int) -> None:
    compiled = MutationRules(proto("envoy.config.common.mutation_rules.v3.HeaderMutationRules", rules))
    assert compiled.check(operation, name, value) == result


def test_the_request_to_a_service_that_is_asked_by_http() -> None:
    config = (
        "{server_uri: {uri: 'http://x/', cluster: a, timeout: 1s}, path_prefix: /check, "
        "authorization_request: {headers_to_add: [{key: x-b, value: mine}, {key: x-c, value: added}]}}"
    )
    service = HttpService(proto(f"{_P}.HttpService", config), context().context)
    stream = request(b"/p?q", [(b"x-b", b"client's"), (b"content-length", b"99")])
    asked = Attributes().of_request(stream, 1, {}, 0, (b"body", False)).attributes.request.http
    head = service._head(asked, 4)
    assert service._mutate is not None
    service._mutate(stream, head)
    assert (head.method, head.path, head.authority) == (b"GET", b"/check/p?q", b"example.com")
    assert sorted(head.items) == [(b"content-length", b"4"), (b"x-b", b"mine"), (b"x-c", b"added"), (b"x-envoy-auth-partial-body", b"false")]


# -- connections

_NETWORK = "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz"


def make_network(said: Verdict, fields: str = "") -> tuple[Any, Any, Service]:
    ctx = context()
    made = network_ext_authz.compile(proto(_NETWORK, f"{{stat_prefix: x, {GRPC}, {fields}}}"), network_context(ctx))
    service = Service(said)
    made._service = service  # type: ignore[assignment]
    return made, ctx, service


@pytest.mark.parametrize(
    ("said", "fields", "passes", "counted"),
    [
        (Verdict(OK), "", None, {"ok": 1, "total": 1}),
        (Verdict(DENIED), "", False, {"denied": 1, "cx_closed": 1, "total": 1}),
        (Verdict(ERROR), "", False, {"error": 1, "cx_closed": 1, "total": 1}),
        (Verdict(ERROR), "failure_mode_allow: true", None, {"error": 1, "failure_mode_allowed": 1, "total": 1}),
    ],
)
def test_connections(said: Verdict, fields: str, passes: bool | None, counted: dict[str, int]) -> None:
    made, ctx, service = make_network(said, fields)
    conn = connection()
    assert asyncio.run(made.on_first_data(conn)) is passes
    assert {name.removeprefix("ext_authz.x."): count for name, count in counters(ctx).items()} == counted
    assert service.asked[0].source.address.socket_address.address == "10.0.0.1"
    assert (conn.local_close_reason, bool(conn.flags & flags.UAEX)) == (("ext_authz_close", True) if passes is False else (None, False))


def test_connections_that_metadata_switches_off() -> None:
    made, ctx, service = make_network(Verdict(DENIED), "filter_enabled_metadata: {filter: a, path: [{key: b}], value: {present_match: true}}")
    assert made.on_first_data(connection()) is None
    assert counters(ctx) == {"ext_authz.x.disabled": 1}
    assert service.asked == []


async def test_a_connection_that_ends_cancels_the_call() -> None:
    made, ctx, service = make_network(Verdict(OK))

    async def check(request: Any, view: Any) -> Verdict:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    service.check = check  # type: ignore[method-assign]
    conn = connection()
    task = asyncio.create_task(made.on_first_data(conn))
    await asyncio.sleep(0)
    assert counters(ctx)["ext_authz.x.active"] == 1
    made.on_close(conn)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "ext_authz.x.active" not in counters(ctx)


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (f"{{{GRPC}}}", "stat_prefix"),
        ("{stat_prefix: x, transport_api_version: V3}", "grpc_service"),
        ("{stat_prefix: x, grpc_service: {envoy_grpc: {cluster_name: a}}, transport_api_version: V2}", "transport_api_version"),
    ],
)
def test_wrong_configuration_for_connections(config: str, path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        network_ext_authz.compile(proto(_NETWORK, config), network_context())
