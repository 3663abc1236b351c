"""TCP proxy and network filters: bytes both ways, half-close, idle, failures, weights, RBAC, limits; access logs of connections."""

from typing import Any

from tests.differential.harness import (
    Case,
    Close,
    Echo,
    Eof,
    HalfClose,
    Play,
    Reset,
    Rig,
    Signal,
    Until,
    Wait,
    bootstrap,
    check_cases,
    cluster,
    endpoint,
    file_log,
    filter_,
    listener,
)

LOG = file_log(
    "tcp flags=%RESPONSE_FLAGS% details=%RESPONSE_CODE_DETAILS% termination=%CONNECTION_TERMINATION_DETAILS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT% "
    "upstream=%UPSTREAM_HOST% cluster=%UPSTREAM_CLUSTER% failure=%UPSTREAM_TRANSPORT_FAILURE_REASON% code=%RESPONSE_CODE% protocol=%PROTOCOL% "
    "attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT% remote=%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% method=%REQ(:METHOD)% "
    "closed=%DOWNSTREAM_LOCAL_CLOSE_REASON%/%DOWNSTREAM_DETECTED_CLOSE_TYPE%/%UPSTREAM_DETECTED_CLOSE_TYPE%\n",
)


def proxy(name: str, to: str = "a", *before: Any, listener_fields: dict | None = None, **fields: Any) -> dict:
    """A listener with a TCP proxy, after other network filters."""
    target = {} if "weighted_clusters" in fields else {"cluster": to}
    return listener(name, *before, filter_("tcp_proxy", stat_prefix=name, access_log=[LOG], **target, **fields), **(listener_fields or {}))


def rbac(name: str, action: str, principal: dict, **fields: Any) -> dict:
    policies = {"p": {"permissions": [{"any": True}], "principals": [principal]}}
    return filter_("network_rbac", stat_prefix=f"{name}.", rules={"action": action, "policies": policies}, **fields)


LOOPBACK = {"direct_remote_ip": {"address_prefix": "127.0.0.0", "prefix_len": 8}}
ELSEWHERE = {"direct_remote_ip": {"address_prefix": "10.0.0.0", "prefix_len": 8}}
CONFIG = bootstrap(
    proxy("main"),
    proxy("dead", "dead"),
    proxy("dead_twice", "dead", max_connect_attempts=2),
    proxy("dead_then_alive", "dead_then_alive", max_connect_attempts=20),
    proxy("hole", "hole"),
    proxy("hole_twice", "hole", max_connect_attempts=2),
    proxy("empty", "empty"),
    proxy("full", "full"),
    proxy("missing", "not_there"),
    proxy("idle", idle_timeout="0.4s"),
    proxy("idle_hole", "long_hole", idle_timeout="0.3s"),
    proxy("lifetime", max_downstream_connection_duration="0.4s"),
    proxy("weighted", weighted_clusters={"clusters": [{"name": "a", "weight": 1}, {"name": "b", "weight": 1}]}),
    proxy("one_weighted", weighted_clusters={"clusters": [{"name": "b", "weight": 3}]}),
    proxy("hashed", "ring", hash_policy=[{"source_ip": {}}]),
    proxy("small_buffer", listener_fields={"per_connection_buffer_limit_bytes": 1024}),
    proxy("early_log", access_log_options={"flush_access_log_on_connected": True}),
    proxy("rbac_allowed", "a", rbac("allowed", "ALLOW", LOOPBACK)),
    proxy("rbac_refused", "a", rbac("refused", "ALLOW", ELSEWHERE)),
    proxy("rbac_refused_later", "a", rbac("refused_later", "ALLOW", ELSEWHERE, delay_deny="0.05s")),
    proxy("rbac_denied", "a", rbac("denied", "DENY", LOOPBACK)),
    proxy("rbac_shadow", "a", filter_("network_rbac", stat_prefix="shadow.", shadow_rules={"action": "DENY", "policies": {
        "p": {"permissions": [{"any": True}], "principals": [LOOPBACK]}}})),
    proxy("connection_limit", "a", filter_("connection_limit", stat_prefix="one", max_connections=1)),
    proxy("connection_limit_delay", "a", filter_("connection_limit", stat_prefix="slow", max_connections=1, delay="0.1s")),
    proxy("rate_limit", "a", filter_("network_ratelimit", stat_prefix="rate", token_bucket={"max_tokens": 2, "fill_interval": "600s"})),
    clusters=[
        cluster("a"),
        cluster("b"),
        cluster("dead"),
        cluster("dead_then_alive", "dead", "a"),
        cluster("hole", connect_timeout="0.1s"),
        cluster("long_hole", "hole"),
        cluster("empty", localities=[{"lb_endpoints": []}]),
        cluster("full", "a", circuit_breakers={"thresholds": [{"max_connections": 0}]}),
        cluster("ring", endpoint("a", metadata={"filter_metadata": {"envoy.lb": {"hash_key": "a"}}}),
                endpoint("b", metadata={"filter_metadata": {"envoy.lb": {"hash_key": "b"}}}), lb_policy="RING_HASH"),
    ],
)  # fmt: skip


def on_connect(*script: Any) -> Play:
    """What the upstream does with a connection; it closes in the end, for the proxy hands on each half-close by itself."""
    return Play([[*script, Close()]], on_connect=True)


ECHO = on_connect(Echo())
GREET = on_connect(b"220 ready\r\n", Until(b"quit"), b"bye", Close())
TALK = [b"hello", Until(b"hello"), b"again", Until(b"again"), Close()]


async def second_connection(rig: Rig, name: str) -> Any:
    """One connection is open; a second comes; then the first ends and a third comes."""
    seen = []
    first = await rig.connect(name)
    seen.append(await echo(rig, first))
    seen.append(await echo(rig, await rig.connect(name)))
    seen.append(await echo(rig, first))
    first.close()
    await rig.until_counted(f"listener.{name}.downstream_cx_destroy", 2)
    seen.append(await echo(rig, await rig.connect(name)))
    return seen


async def echo(rig: Rig, wire: Any) -> str:
    wire.send(b"ping")
    await wire.until(lambda: b"ping" in wire.buffer)
    return wire.take(len(wire.buffer)).decode() or "closed"


def limited(name: str) -> Case:
    return Case(f"second_{name}", lambda rig: second_connection(rig, name), ECHO, skip=("upstream",))


async def three_connections(rig: Rig) -> Any:
    return [await echo(rig, await rig.connect("rate_limit")) for _ in range(3)]


async def both_clusters_are_used(rig: Rig) -> Any:
    for _ in range(24):
        await echo(rig, await rig.connect("weighted"))
    return sorted(name for name, upstream in rig.upstreams.items() if upstream.connections)


async def always_the_same(rig: Rig) -> Any:
    for _ in range(6):
        await echo(rig, await rig.connect("hashed"))
    return len([name for name, upstream in rig.upstreams.items() if upstream.connections])


async def many_bytes(rig: Rig) -> Any:
    """A megabyte there and back in uneven pieces, while the client reads late."""
    data = bytes(range(256)) * 4096
    wire = await rig.connect("small_buffer")
    wire.transport.pause_reading()
    for start in range(0, len(data), 77_777):
        wire.send(data[start : start + 77_777])
    wire.transport.write_eof()
    wire.transport.resume_reading()
    await wire.until(lambda: False)
    return [len(wire.received), bytes(wire.received) == data]


def tcp(name: str, steps: list, up: Play = ECHO, on: str = "main", then: str = "closed", **fields: Any) -> Case:
    return Case(name, steps, up, on=on, then=then, **fields)


CASES = [
    tcp("echo", TALK),
    tcp("server_speaks_first", [Until(b"ready\r\n"), b"quit", Until(b"bye")], GREET),
    tcp("connects_without_bytes_from_the_client", [Until(b"hi"), Close()], on_connect(b"hi", Eof())),
    tcp("client_half_close", [b"question", HalfClose(), Until(b"answer")], on_connect(Eof(), b"answer", Close())),
    tcp("client_half_close_echo", [b"question", HalfClose(), Until(b"question")]),
    tcp("server_half_close", [Until(b"all of it"), Wait("ended"), b"thanks", Close()],
        on_connect(b"all of it", HalfClose(), Signal("ended"), Until(b"thanks"), Eof()), skip_stats=("upstream_flush",)),
    tcp("client_closes_at_once", [Close()], on_connect(Eof())),
    tcp("client_resets", [b"x", Wait("got"), Reset()], on_connect(Until(b"x"), Signal("got"), Eof())),
    tcp("server_closes_at_once", [], on_connect(Close())),
    tcp("server_resets", [b"x"], on_connect(Until(b"x"), Reset())),
    tcp("server_closes_after_bytes", [b"x", Until(b"last words")], on_connect(Until(b"x"), b"last words", Close())),
    tcp("refused", [b"hello"], on="dead"),
    tcp("refused_twice", [b"hello"], on="dead_twice"),
    tcp("refused_without_bytes", [], on="dead"),
    tcp("retried_on_another_host", TALK, on="dead_then_alive", skip=("log", "stats"), note="the first host is random"),
    tcp("connect_timeout", [b"hello"], on="hole"),
    tcp("connect_timeout_twice", [b"hello"], on="hole_twice"),
    tcp("client_gone_while_connecting", [Close()], on="hole", skip=("stats", "log"), note="a race by nature"),
    tcp("no_hosts", [b"hello"], on="empty"),
    tcp("breaker_open", [b"hello"], on="full"),
    tcp("no_such_cluster", [b"hello"], on="missing"),
    tcp("idle", [b"hello", Until(b"hello")], on="idle"),
    tcp("idle_without_bytes", [], on="idle", up=on_connect(Eof())),
    tcp("idle_while_connecting", [b"hello"], on="idle_hole"),
    tcp("longest_life", [b"hello", Until(b"hello")], on="lifetime"),
    tcp("weighted_single", TALK, on="one_weighted"),
    Case("weighted_both", both_clusters_are_used, ECHO, skip=("upstream", "log", "stats"), note="by chance"),
    Case("hashed_by_source", always_the_same, ECHO),
    Case("a_megabyte", many_bytes, ECHO, skip=("upstream",)),
    tcp("log_on_connect", TALK, on="early_log"),
    tcp("rbac_allowed", TALK, on="rbac_allowed"),
    tcp("rbac_refused", [Until(b"ready"), b"hello"], GREET, on="rbac_refused"),
    tcp("rbac_refused_later", [Until(b"ready"), b"x"], GREET, on="rbac_refused_later"),
    tcp("rbac_denied", [Until(b"ready"), b"hello"], GREET, on="rbac_denied"),
    tcp("rbac_shadow", TALK, on="rbac_shadow"),
    limited("connection_limit"),
    limited("connection_limit_delay"),
    Case("rate_limit_third", three_connections, ECHO, skip=("upstream",)),
]  # fmt: skip

test_case = check_cases(CASES)
