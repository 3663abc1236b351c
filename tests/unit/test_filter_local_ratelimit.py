"""The local rate limit filter, rate limit actions, and the network filters that limit connections."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.http.filters import local_ratelimit
from meshproxy.http.rate_limits import RateLimitPolicy
from meshproxy.http.replies import Reply
from meshproxy.net.address import Address
from meshproxy.observe import flags
from meshproxy.tcp.filters import connection_limit
from meshproxy.tcp.filters import local_ratelimit as network_ratelimit
from tests.unit.filter_help import Route, Stream, connection, context, counters, network_context, proto

HTTP = "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit"
NETWORK = "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit"
LIMIT = "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit"
RATE_LIMIT = "envoy.config.route.v3.RateLimit"
ON = "filter_enabled: {default_value: {numerator: 100}}, filter_enforced: {default_value: {numerator: 100}}"


def bucket(size: int, interval: str = "60s") -> str:
    return f"token_bucket: {{max_tokens: {size}, tokens_per_fill: 1, fill_interval: {interval}}}"


def make(text: str, ctx: Any = None) -> tuple[Any, Any]:
    ctx = ctx or context()
    return local_ratelimit.compile(proto(HTTP, f"{{stat_prefix: sp, {text}}}"), ctx), ctx


def send(filter: Any, *headers: tuple[bytes, bytes], **attributes: Any) -> Any:
    return filter.request_headers(Stream(headers=headers, **attributes), True)


# -- the filter


def test_limited() -> None:
    filter, ctx = make(f"{bucket(2)}, {ON}")
    assert send(filter) is None
    assert send(filter) is None
    reply = send(filter)
    assert (reply.status, reply.body, reply.details, reply.flag) == (429, b"local_rate_limited", "local_rate_limited", flags.RL)
    assert (reply.headers, reply.grpc_status) == ((), None)
    prefix = "sp.http_local_rate_limit."
    assert counters(ctx) == {f"{prefix}enabled": 3, f"{prefix}ok": 2, f"{prefix}rate_limited": 1, f"{prefix}enforced": 1}
    ctx.clock.now += 60
    assert send(filter) is None


def test_repeated_requests_take_tokens_too() -> None:
    filter, ctx = make(f"{bucket(2)}, {ON}")
    assert send(filter) is None
    repeated = Stream()
    repeated.request = None  # type: ignore[assignment]  # not looked at
    assert filter.request_headers_repeated(repeated) is None
    assert filter.request_headers_repeated(repeated).status == 429
    assert counters(ctx)["sp.http_local_rate_limit.ok"] == 2
    # A filter that changes requests, or looks at them, has to see them all.
    adds = "request_headers_to_add_when_not_enforced: [{header: {key: x-over, value: 'yes'}}]"
    descriptor = f"descriptors: [{{entries: [{{key: a, value: b}}], {bucket(1)}}}]"
    for more in (adds, descriptor, "local_rate_limit_per_downstream_connection: true"):
        assert not hasattr(make(f"{bucket(2)}, {ON}, {more}")[0], "request_headers_repeated")


def test_status_headers_and_grpc() -> None:
    filter, _ = make(
        f"{bucket(1)}, {ON}, status: {{code: 503}}, rate_limited_as_resource_exhausted: true, "
        "response_headers_to_add: [{header: {key: x-limited, value: 'yes'}}]"
    )
    send(filter)
    reply = send(filter)
    assert (reply.status, reply.grpc_status, reply.headers) == (503, 8, ((b"x-limited", b"yes"),))


def test_a_status_that_is_no_error_is_429() -> None:
    filter, _ = make(f"{bucket(1)}, {ON}, status: {{code: 201}}")
    send(filter)
    assert send(filter).status == 429


def test_not_enforced() -> None:
    filter, ctx = make(
        f"{bucket(1)}, filter_enabled: {{default_value: {{numerator: 100}}}}, "
        "request_headers_to_add_when_not_enforced: [{header: {key: x-over, value: 'yes'}}]"
    )
    send(filter)
    stream = Stream()
    assert filter.request_headers(stream, True) is None
    assert stream.request.get(b"x-over") == b"yes"
    assert counters(ctx)["sp.http_local_rate_limit.rate_limited"] == 1
    assert "sp.http_local_rate_limit.enforced" not in counters(ctx)


def test_not_enabled_has_no_hooks() -> None:
    filter, _ = make(bucket(1))
    assert not hasattr(filter, "request_headers")
    filter, _ = make(f"{bucket(1)}, filter_enabled: {{default_value: {{numerator: 100}}}}")
    assert hasattr(filter, "request_headers")
    assert not hasattr(filter, "response_headers")


def test_enabled_by_runtime() -> None:
    ctx = context(mutable=True)
    filter, _ = make(f"{bucket(1)}, filter_enabled: {{runtime_key: use}}, filter_enforced: {{runtime_key: enforce}}", ctx)
    assert [send(filter) for _ in range(3)] == [None] * 3
    ctx.runtime.modify({"use": "100", "enforce": "100"})
    assert send(filter) is None
    assert isinstance(send(filter), Reply)


def test_tells_the_client() -> None:
    filter, ctx = make(f"{bucket(2)}, {ON}, enable_x_ratelimit_headers: DRAFT_VERSION_03")

    def tell(seconds: float) -> list[bytes]:
        ctx.clock.now += seconds
        stream = Stream()
        filter.request_headers(stream, True)
        filter.response_headers(stream, True)
        return [value for name, value in stream.response.items if name.startswith(b"x-ratelimit")]

    assert tell(0) == [b"2", b"1", b"0"]
    assert tell(0) == [b"2", b"0", b"60"]
    assert tell(1.5) == [b"2", b"0", b"59"]
    untouched = Stream()
    filter.response_headers(untouched, True)
    assert untouched.response.items == []


def test_per_connection() -> None:
    filter, _ = make(f"{bucket(1)}, {ON}, local_rate_limit_per_downstream_connection: true")
    first, second = Stream(), Stream()
    assert filter.request_headers(first, True) is None
    assert filter.request_headers(second, True) is None
    assert filter.request_headers(first, True) is not None


BY_USER = "rate_limits: [{actions: [{request_headers: {header_name: x-user, descriptor_key: user}}]}]"


def descriptor(size: int, *entries: str, interval: str = "60s") -> str:
    listed = ", ".join(f"{{key: {key}, value: '{value}'}}" for key, _, value in (entry.partition("=") for entry in entries))
    return f"{{entries: [{listed}], {bucket(size, interval)}}}"


def test_descriptor() -> None:
    filter, _ = make(f"{bucket(100)}, {ON}, {BY_USER}, descriptors: [{descriptor(1, 'user=bob')}]")
    bob, alice = (b"x-user", b"bob"), (b"x-user", b"alice")
    assert send(filter, bob) is None
    assert send(filter, bob) is not None
    assert [send(filter, alice) for _ in range(5)] == [None] * 5
    assert send(filter) is None


def test_descriptors_take_from_the_default_bucket_too() -> None:
    text = f"{bucket(1)}, {ON}, {BY_USER}, descriptors: [{descriptor(10, 'user=bob')}]"
    bob = (b"x-user", b"bob")
    filter, _ = make(text)
    assert send(filter, bob) is None
    assert send(filter, bob) is not None
    filter, _ = make(f"{text}, always_consume_default_token_bucket: false")
    assert [send(filter, bob) for _ in range(5)] == [None] * 5
    assert send(filter) is None
    assert send(filter) is not None


def test_the_slowest_bucket_is_asked_first() -> None:
    actions = ", ".join(f"{{actions: [{{request_headers: {{header_name: {name}, descriptor_key: {name}}}}}]}}" for name in "ab")
    two = f"rate_limits: [{actions}]"
    filter, _ = make(f"{bucket(100)}, {ON}, {two}, descriptors: [{descriptor(5, 'a=1', interval='1s')}, {descriptor(1, 'b=1', interval='3600s')}]")
    both = (b"a", b"1"), (b"b", b"1")
    assert send(filter, *both) is None
    assert [send(filter, *both) is None for _ in range(9)] == [False] * 9
    assert [send(filter, both[0]) is None for _ in range(5)] == [True] * 4 + [False]  # the denied ones took nothing from it


def test_wildcard_values_have_buckets_of_their_own() -> None:
    filter, _ = make(f"{bucket(100)}, {ON}, {BY_USER}, max_dynamic_descriptors: 2, descriptors: [{descriptor(1, 'user=')}, {descriptor(3, 'user=vip')}]")
    a, b, c, vip = ((b"x-user", name) for name in (b"a", b"b", b"c", b"vip"))
    assert send(filter, a) is None
    assert send(filter, a) is not None
    assert send(filter, b) is None
    assert [send(filter, vip) for _ in range(3)] == [None] * 3
    assert send(filter, vip) is not None
    assert send(filter, a) is not None
    assert send(filter, c) is None  # b, the longest unused, makes room
    assert send(filter, a) is not None
    assert send(filter, b) is None


def test_hits_addend() -> None:
    text = (
        f"rate_limits: [{{actions: [{{generic_key: {{descriptor_value: v}}}}], hits_addend: {{number: 3}}}}], descriptors: [{descriptor(7, 'generic_key=v')}]"
    )
    filter, _ = make(f"{bucket(100)}, {ON}, {text}")
    assert [send(filter) is None for _ in range(3)] == [True, True, False]


def test_hits_addend_of_nothing() -> None:
    text = (
        f"rate_limits: [{{actions: [{{generic_key: {{descriptor_value: v}}}}], hits_addend: {{number: 0}}}}], descriptors: [{descriptor(7, 'generic_key=v')}]"
    )
    filter, _ = make(f"{bucket(100)}, {ON}, {text}")
    assert send(filter) is not None


def test_descriptors_of_the_route() -> None:
    filter, _ = make(f"{bucket(100)}, {ON}, stage: 1, descriptors: [{descriptor(1, 'generic_key=r')}, {descriptor(2, 'generic_key=v')}]")

    def limits(value: str, stage: int = 1) -> list[Any]:
        return [proto(RATE_LIMIT, f"{{stage: {stage}, actions: [{{generic_key: {{descriptor_value: {value}}}}}]}}")]

    class VirtualHost:
        rate_limits = limits("v")

    own = Route(rate_limits=limits("r"), virtual_host=VirtualHost)
    inherited = Route(rate_limits=[], virtual_host=VirtualHost)
    other_stage = Route(rate_limits=limits("r", 0), virtual_host=VirtualHost)
    assert [send(filter, route=own) is None for _ in range(2)] == [True, False]  # OVERRIDE: the virtual host's do not count
    assert [send(filter, route=inherited) is None for _ in range(3)] == [True, True, False]
    assert [send(filter, route=other_stage) for _ in range(3)] == [None] * 3
    assert send(filter, route=None) is None
    assert send(filter, route=Route(action="redirect")) is None


def test_virtual_host_included_or_ignored() -> None:
    class VirtualHost:
        rate_limits = [proto(RATE_LIMIT, "{actions: [{generic_key: {descriptor_value: v}}]}")]

    own = [proto(RATE_LIMIT, "{actions: [{generic_key: {descriptor_value: r}}]}")]
    text = f"{bucket(100)}, {ON}, descriptors: [{descriptor(1, 'generic_key=v')}]"
    filter, _ = make(f"{text}, vh_rate_limits: INCLUDE")
    assert [send(filter, route=Route(rate_limits=own, virtual_host=VirtualHost)) is None for _ in range(2)] == [True, False]
    filter, _ = make(f"{text}, vh_rate_limits: IGNORE")
    assert [send(filter, route=Route(rate_limits=[], virtual_host=VirtualHost)) is None for _ in range(2)] == [True, True]
    include = Route(rate_limits=own, virtual_host=VirtualHost, include_vh_rate_limits=True)
    assert [send(filter, route=include) is None for _ in range(2)] == [True, False]


def test_route_replaces_it_and_routes_of_one_virtual_host_share() -> None:
    base, ctx = make("")
    assert not hasattr(base, "request_headers")
    override = proto(HTTP, f"{{stat_prefix: r, {bucket(1)}, {ON}}}")
    one = local_ratelimit.specialise(base, [override], ctx)
    other = local_ratelimit.specialise(base, [override], ctx)
    assert one is other
    separate: Any = local_ratelimit.specialise(base, [override, proto(HTTP, f"{{stat_prefix: r, {bucket(1)}, {ON}}}")], ctx)
    assert send(one) is None
    assert send(other) is not None
    assert send(separate) is None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("token_bucket: {max_tokens: 1, fill_interval: 0.04s}", "token_bucket.fill_interval"),
        (f"{bucket(1)}, descriptors: [{{entries: [{{key: a, value: b}}], {bucket(1, '0.01s')}}}]", "descriptors[0].token_bucket.fill_interval"),
        (f"{bucket(1)}, descriptors: [{descriptor(1, 'a=b')}, {descriptor(2, 'a=b')}]", "descriptors[1]"),
        (f"{bucket(1)}, descriptors: [{descriptor(1, 'a=')}, {descriptor(2, 'a=')}]", "descriptors[1]"),
        (f"{bucket(1)}, rate_limits: [{{stage: 1, actions: [{{remote_address: {{}}}}]}}]", "rate_limits[0].stage"),
        (f"{bucket(1)}, rate_limits: [{{actions: [{{}}]}}]", "rate_limits[0].actions[0]"),
        (f"{bucket(1)}, rate_limits: [{{actions: [{{extension: {{name: x}}}}]}}]", "rate_limits[0].actions[0].extension"),
    ],
)
def test_errors(text: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(text)
    assert caught.value.problems[0].path == path


def test_route_needs_a_bucket() -> None:
    base, ctx = make("")
    with pytest.raises(ConfigError, match="token_bucket"):
        local_ratelimit.specialise(base, [proto(HTTP, "{stat_prefix: r}")], ctx)


# -- actions


@pytest.mark.parametrize(
    ("actions", "entries"),
    [
        ("{source_cluster: {}}", [(b"source_cluster", b"local")]),
        ("{destination_cluster: {}}", [(b"destination_cluster", b"up")]),
        ("{request_headers: {header_name: X-A, descriptor_key: k}}", [(b"k", b"1")]),
        ("{request_headers: {header_name: x-b, descriptor_key: k}}", None),
        ("{request_headers: {header_name: x-b, descriptor_key: k, skip_if_absent: true}}, {source_cluster: {}}", [(b"source_cluster", b"local")]),
        ("{source_cluster: {}}, {request_headers: {header_name: x-b, descriptor_key: k}}", None),
        ("{query_parameters: {query_parameter_name: q, descriptor_key: k}}", [(b"k", b"a b")]),
        ("{query_parameters: {query_parameter_name: q}}", [(b"query_param", b"a b")]),
        ("{query_parameters: {query_parameter_name: z, descriptor_key: k}}", None),
        ("{remote_address: {}}", [(b"remote_address", b"203.0.113.77")]),
        ("{masked_remote_address: {}}", [(b"masked_remote_address", b"203.0.113.77/32")]),
        ("{masked_remote_address: {v4_prefix_mask_len: 24}}", [(b"masked_remote_address", b"203.0.113.0/24")]),
        ("{generic_key: {descriptor_value: v}}, {generic_key: {descriptor_key: k, descriptor_value: w}}", [(b"generic_key", b"v"), (b"k", b"w")]),
        ("{header_value_match: {descriptor_value: v, headers: [{name: x-a, present_match: true}]}}", [(b"header_match", b"v")]),
        ("{header_value_match: {descriptor_value: v, expect_match: false, headers: [{name: x-a, present_match: true}]}}", None),
        ("{header_value_match: {descriptor_key: k, descriptor_value: v, expect_match: false, headers: [{name: x-b, present_match: true}]}}", [(b"k", b"v")]),
        ("{query_parameter_value_match: {descriptor_value: v, query_parameters: [{name: q, string_match: {exact: a b}}]}}", [(b"query_match", b"v")]),
        ("{query_parameter_value_match: {descriptor_value: v, query_parameters: [{name: q, string_match: {exact: c}}]}}", None),
        ("{metadata: {descriptor_key: k, metadata_key: {key: f, path: [{key: p}]}}}", [(b"k", b"dynamic")]),
        ("{metadata: {descriptor_key: k, metadata_key: {key: f, path: [{key: p}]}, source: ROUTE_ENTRY}}", [(b"k", b"route")]),
        ("{metadata: {descriptor_key: k, metadata_key: {key: f, path: [{key: z}]}, default_value: d}}", [(b"k", b"d")]),
        ("{metadata: {descriptor_key: k, metadata_key: {key: f, path: [{key: z}]}}}", None),
        ("{metadata: {descriptor_key: k, metadata_key: {key: f, path: [{key: z}]}, skip_if_absent: true}}", []),
        ("{dynamic_metadata: {descriptor_key: k, metadata_key: {key: f, path: [{key: p}]}}}", [(b"k", b"dynamic")]),
    ],
)
def test_actions(actions: str, entries: list[tuple[bytes, bytes]] | None) -> None:
    policy = RateLimitPolicy([proto(RATE_LIMIT, f"{{actions: [{actions}]}}")], context().context)
    stream = Stream(b"/p?q=a%20b&q=c", [(b"x-a", b"1"), (b"x-a", b"2")], route=Route(metadata={"f": {"p": "route"}}))
    stream.remote = Address.parse("203.0.113.77:9")
    stream.metadata["f"] = {"p": "dynamic"}
    assert policy.descriptors(stream) == ([] if entries is None else [(tuple(entries), None)])


def test_masked_remote_address_of_ipv6() -> None:
    policy = RateLimitPolicy([proto(RATE_LIMIT, "{actions: [{masked_remote_address: {v6_prefix_mask_len: 48}}]}")], context().context)
    stream = Stream()
    stream.remote = Address.parse("[2001:db8:1:2::3]:9")
    assert policy.descriptors(stream) == [(((b"masked_remote_address", b"2001:db8:1::/48"),), None)]
    stream.remote = Address.pipe("/run/x.sock")
    assert policy.descriptors(stream) == []


def test_disable_key_is_for_the_global_rate_limit() -> None:
    assert not RateLimitPolicy([proto(RATE_LIMIT, "{disable_key: k, actions: [{remote_address: {}}]}")], context().context)


# -- connections


def test_connections_limited_by_a_bucket() -> None:
    ctx = network_context()
    filter = network_ratelimit.compile(proto(NETWORK, f"{{stat_prefix: lr, {bucket(1)}}}"), ctx)
    assert filter.on_connection(connection()) is None
    assert filter.on_connection(connection()) is False
    assert counters(ctx) == {"local_rate_limit.lr.rate_limited": 1}


def test_filters_with_one_share_key_have_one_bucket() -> None:
    ctx = network_context()
    one = network_ratelimit.compile(proto(NETWORK, f"{{stat_prefix: a, share_key: k, {bucket(1)}}}"), ctx)
    same = network_ratelimit.compile(proto(NETWORK, f"{{stat_prefix: b, share_key: k, {bucket(1)}}}"), ctx)
    other_settings = network_ratelimit.compile(proto(NETWORK, f"{{stat_prefix: b, share_key: k, {bucket(2)}}}"), ctx)
    assert one.on_connection(connection()) is None
    assert same.on_connection(connection()) is False
    assert other_settings.on_connection(connection()) is None


def test_bucket_switched_off_by_runtime() -> None:
    base = context(mutable=True)
    filter = network_ratelimit.compile(
        proto(NETWORK, f"{{stat_prefix: lr, {bucket(1)}, runtime_enabled: {{default_value: true, runtime_key: use}}}}"), network_context(base)
    )
    filter.on_connection(connection())
    base.runtime.modify({"use": "false"})
    assert filter.on_connection(connection()) is None


def test_too_many_connections() -> None:
    ctx = network_context()
    filter = connection_limit.compile(proto(LIMIT, "{stat_prefix: cl, max_connections: 2}"), ctx)
    conns = [connection(i) for i in range(3)]
    assert [filter.on_connection(conn) for conn in conns] == [None, None, False]
    assert counters(ctx) == {"connection_limit.cl.limited_connections": 1, "connection_limit.cl.active_connections": 3}
    filter.on_close(conns[2])
    filter.on_close(conns[2])
    assert counters(ctx)["connection_limit.cl.active_connections"] == 2
    filter.on_close(conns[0])
    assert filter.on_connection(connection(9)) is None


def test_connection_closed_while_it_is_delayed() -> None:
    async def scenario() -> None:
        ctx = network_context()
        forever: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waited = []

        async def sleep(seconds: float) -> None:
            waited.append(seconds)
            await forever

        filter = connection_limit.ConnectionLimit(proto(LIMIT, "{stat_prefix: cl, max_connections: 1, delay: 1.5s}"), ctx, sleep=sleep)
        assert filter.on_connection(connection(1)) is None
        late = connection(2)
        task = asyncio.ensure_future(filter.on_connection(late))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert waited == [1.5]
        task.cancel()
        filter.on_close(late)
        assert counters(ctx)["connection_limit.cl.active_connections"] == 1
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


def test_limit_switched_off_by_runtime() -> None:
    base = context(mutable=True)
    base.runtime.modify({"use": "false"})
    filter = connection_limit.compile(
        proto(LIMIT, "{stat_prefix: cl, max_connections: 1, runtime_enabled: {default_value: true, runtime_key: use}}"), network_context(base)
    )
    uncounted = connection(1)
    assert filter.on_connection(uncounted) is None
    base.runtime.modify({"use": "true"})
    assert filter.on_connection(connection(2)) is None
    filter.on_close(uncounted)  # was never counted
    assert filter.on_connection(connection(3)) is False
