"""Which host a request goes to: hash policies with ring hash and Maglev, round robin order, weights, priorities, panic, health; mirroring."""

from typing import Any

from tests.differential.harness import OK, Case, Request, Rig, answer, bootstrap, check_cases, cluster, endpoint, get, http, req, y

NAMES = "abcde"
UPSTREAMS = {name: [Request(), answer(x_who=name)] for name in NAMES}


def vhost(name: str, *policies: str, to: str | None = None) -> dict:
    route = {"cluster": to or name, "hash_policy": [y(policy) for policy in policies]}
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": route}]}


def keyed(upstream: str, weight: int = 1) -> dict:
    """A host with a hash key that does not depend on its port, so that both proxies build the same table."""
    return endpoint(upstream, load_balancing_weight=weight, metadata={"filter_metadata": {"envoy.lb": {"hash_key": f"key-{upstream}"}}})


def hashed(name: str, policy: str, weights: tuple[int, ...] = (1,) * len(NAMES), **fields: Any) -> dict:
    return cluster(name, *[keyed(upstream, weight) for upstream, weight in zip(NAMES, weights, strict=True)], lb_policy=policy, **fields)


def locality(*hosts: Any, priority: int = 0, **fields: Any) -> dict:
    return {"priority": priority, "lb_endpoints": [endpoint(h) if isinstance(h, str) else h for h in hosts], **fields}


USER = "{header: {header_name: x-user}}"
HASHES = {
    "cookie_ttl0": "{cookie: {name: sid, ttl: 0s}}",
    "cookie_ttl": "{cookie: {name: sid, ttl: 60s, path: /p}}",
    "cookie_attributes": "{cookie: {name: sid, ttl: 60s, attributes: [{name: SameSite, value: Lax}]}}",
    "cookie_no_ttl": "{cookie: {name: sid}}",
    "source_ip": "{connection_properties: {source_ip: true}}",
    "query": "{query_parameter: {name: k}}",
    "regex": "{header: {header_name: x-user, regex_rewrite: {pattern: {regex: '^([a-z]+)-.*'}, substitution: '\\1'}}}",
}

CONFIG = bootstrap(
    http(
        "main",
        [
            vhost("ring", USER),
            vhost("ring_murmur", USER),
            vhost("ring_small", USER),
            vhost("ring_weighted", USER),
            vhost("maglev", USER),
            vhost("maglev_small", USER),
            vhost("maglev_weighted", USER),
            vhost("ring_hostname", USER),
            vhost("maglev_hostname", USER),
            *[vhost(name, policy, to="ring") for name, policy in HASHES.items()],
            vhost("two", USER, "{header: {header_name: x-other}}", to="ring"),
            vhost("terminal", "{header: {header_name: x-user}, terminal: true}", "{header: {header_name: x-other}}", to="ring"),
            vhost("retried", USER, to="maglev"),
            *[vhost(name) for name in (
                "round_robin", "rr_weighted", "least", "random", "priorities", "spill", "panic", "no_panic", "all_down", "degraded", "unhealthy_skipped",
                "locality_weighted", "failover_panic", "one_of_each",
            )],
            {"name": "mirror", "domains": ["mirror.test", "mirror.test:80"], "routes": [
                {"match": {"prefix": "/one"}, "route": {"cluster": "just_a", "request_mirror_policies": [{"cluster": "just_b"}]}},
                {"match": {"prefix": "/two"}, "route": {"cluster": "just_a", "request_mirror_policies": [{"cluster": "just_b"}, {"cluster": "just_c"}]}},
                {"match": {"prefix": "/none"}, "route": {"cluster": "just_a", "request_mirror_policies": [
                    {"cluster": "just_b", "runtime_fraction": {"default_value": {"numerator": 0}}}]}},
                {"match": {"prefix": "/plain"}, "route": {"cluster": "just_a", "request_mirror_policies": [
                    {"cluster": "just_b", "disable_shadow_host_suffix_append": True}]}},
                {"match": {"prefix": "/dead"}, "route": {"cluster": "just_a", "request_mirror_policies": [{"cluster": "just_dead"}]}},
                {"match": {"prefix": "/vhost"}, "route": {"cluster": "just_a"}},
            ], "request_mirror_policies": [{"cluster": "just_c"}]},
        ],
    ),
    clusters=[
        hashed("ring", "RING_HASH"),
        hashed("ring_murmur", "RING_HASH", ring_hash_lb_config={"hash_function": "MURMUR_HASH_2"}),
        hashed("ring_small", "RING_HASH", ring_hash_lb_config={"minimum_ring_size": 3, "maximum_ring_size": 7}),
        hashed("maglev", "MAGLEV"),
        hashed("maglev_small", "MAGLEV", maglev_lb_config={"table_size": 101}),
        hashed("ring_weighted", "RING_HASH", (1, 2, 4, 8, 16)),
        hashed("maglev_weighted", "MAGLEV", (1, 2, 4, 8, 16)),
        *[
            cluster(f"{policy}_hostname", *[endpoint(n, hostname=f"host-{n}.test") for n in NAMES], lb_policy=name, type="STRICT_DNS", dns_refresh_rate="3600s",
                    common_lb_config={"consistent_hashing_lb_config": {"use_hostname_for_hashing": True}})
            for policy, name in {"ring": "RING_HASH", "maglev": "MAGLEV"}.items()
        ],
        cluster("round_robin", *NAMES),
        cluster("rr_weighted", endpoint("a", load_balancing_weight=1), endpoint("b", load_balancing_weight=3), endpoint("c", load_balancing_weight=2)),
        cluster("least", *NAMES, lb_policy="LEAST_REQUEST"),
        cluster("random", *NAMES, lb_policy="RANDOM"),
        cluster("priorities", localities=[locality("a", "b"), locality("c", priority=1)]),
        cluster("spill", localities=[locality(endpoint("a", health_status="UNHEALTHY"), "b"), locality("c", priority=1)], lb_policy="RANDOM"),
        cluster("panic", endpoint("a", health_status="UNHEALTHY"), endpoint("b", health_status="UNHEALTHY"), "c"),
        cluster("no_panic", endpoint("a", health_status="UNHEALTHY"), endpoint("b", health_status="UNHEALTHY"), "c",
                common_lb_config={"healthy_panic_threshold": {"value": 0}}),
        cluster("all_down", endpoint("a", health_status="UNHEALTHY"), endpoint("b", health_status="DRAINING"), endpoint("c", health_status="TIMEOUT")),
        cluster("degraded", endpoint("a", health_status="DEGRADED"), endpoint("b", health_status="DEGRADED")),
        cluster("unhealthy_skipped", endpoint("a", health_status="UNHEALTHY"), "b", "c", "d"),
        cluster("failover_panic",
                localities=[locality(endpoint("a", health_status="UNHEALTHY")), locality(endpoint("b", health_status="UNHEALTHY"), priority=1)],
                common_lb_config={"zone_aware_lb_config": {"fail_traffic_on_panic": True}}),
        cluster("locality_weighted", localities=[
            locality("a", "b", locality={"zone": "z1"}, load_balancing_weight=1), locality("c", locality={"zone": "z2"}, load_balancing_weight=1),
        ], common_lb_config={"locality_weighted_lb_config": {}}),
        cluster("one_of_each", endpoint("a", health_status="HEALTHY"), endpoint("b", health_status="UNKNOWN"), endpoint("c", health_status="DEGRADED"),
                endpoint("d", health_status="UNHEALTHY")),
        *[cluster(f"just_{n}", n) for n in ("a", "b", "c", "dead")],
    ],
)  # fmt: skip


def who(response: str) -> str:
    """The upstream that answered, or the status."""
    return response.partition("x-who: ")[2][:1] or response[9:12]


async def answers(rig: Rig, *requests: bytes) -> list[str]:
    """Who answered each request, all sent on one connection."""
    wire = await rig.connect()
    return [who(await rig.exchange(wire, request)) for request in requests]


def by_value(host: str) -> Case:
    """Each value of the hashed header gets the same host from both proxies."""
    values = [f"user-{n}" for n in range(40)] + ["", "a", "0", "x" * 300, "caf\xe9", "a,b", "UPPER"]

    async def run(rig: Rig) -> Any:
        return "".join(await answers(rig, *[get("/", f"X-User: {value}", host=f"{host}.test") for value in values]))

    return counted(f"hash_{host}", run)


def counted(name: str, run: Any, **fields: Any) -> Case:
    """A case about choices; ports are in the way of the log and connection reuse in that of the stats."""
    return Case(name, run, UPSTREAMS, skip=("upstream", "log"), skip_stats=("upstream_cx_", "lb_recalculate", "rr_weighted"), **fields)


async def hash_of_two_headers(rig: Rig) -> str:
    lines = [(f"X-User: u{n}", f"X-Other: o{n % 3}") for n in range(20)]
    return "".join(await answers(rig, *[get("/", *pair, host="two.test") for pair in lines], *[get("/", *pair, host="terminal.test") for pair in lines]))


async def hash_of_repeated_header(rig: Rig) -> str:
    return "".join(
        await answers(
            rig,
            *[get("/", f"X-User: {n}", "X-User: z", host="ring.test") for n in range(10)],
            *[get("/", "X-User: z", f"X-User: {n}", host="ring.test") for n in range(10)],
        ),
    )


async def hash_of_rewritten_header(rig: Rig) -> str:
    return "".join(await answers(rig, *[get("/", f"X-User: {name}-{n}", host="regex.test") for name in ("ann", "bob", "cyd", "dan") for n in range(4)]))


async def hash_of_query(rig: Rig) -> str:
    return "".join(await answers(rig, *[get(f"/?a=b&k={n}", host="query.test") for n in range(20)]))


async def hash_of_cookie(rig: Rig) -> str:
    return "".join(await answers(rig, *[get("/", f"Cookie: x=y; sid={n}", host="cookie_no_ttl.test") for n in range(20)]))


async def source_ip_sticks(rig: Rig) -> Any:
    chosen = set()
    for _ in range(6):
        chosen.update(await answers(rig, get(host="source_ip.test")))
    return sorted(chosen)


def cookie_given(name: str) -> Case:
    """The response sets a cookie, and the cookie leads to the same host again."""

    async def run(rig: Rig) -> Any:
        wire = await rig.connect()
        first = await rig.exchange(wire, get(host=f"{name}.test"))
        cookie = first.partition("set-cookie: sid=")[2].partition("\r\n")[0]
        value = cookie.partition(";")[0].strip('"')
        again = await rig.exchange(wire, get("/", f"Cookie: sid={value}", host=f"{name}.test"))
        return [cookie.replace(value, "<hash>"), len(value) <= 16, who(first) == who(again), "set-cookie" in again]

    return counted(name, run, note="the value is a hash of the connection's addresses")


async def round_robin_order(rig: Rig) -> Any:
    """Starts anywhere, then in order."""
    order = "".join(await answers(rig, *[get(host="round_robin.test") for _ in range(12)]))
    start = order[0]
    expected = (NAMES * 4)[NAMES.index(start) :][:12]
    return order == expected or order


async def weighted_shares(rig: Rig) -> Any:
    order = await answers(rig, *[get(host="rr_weighted.test") for _ in range(60)])
    return {name: round(order.count(name) / 10) for name in "abc"}


def everybody(name: str, count: int = 60) -> Case:
    """The set of hosts that get requests."""

    async def run(rig: Rig) -> str:
        return "".join(sorted(set(await answers(rig, *[get(host=f"{name}.test") for _ in range(count)]))))

    return counted(f"hosts_{name}", run)


def mirrored(path: str, request: bytes | None = None) -> Case:
    case = Case(f"mirror_{path[1:]}", request or get(path, host="mirror.test"), [Request(), OK])
    if path == "/dead":
        case.skip_stats = ("just_dead",)
    return case


CASES = [
    *[by_value(host) for host in (
        "ring", "ring_murmur", "ring_small", "ring_weighted", "maglev", "maglev_small", "maglev_weighted", "ring_hostname", "maglev_hostname",
    )],
    counted("hash_two_headers_and_terminal", hash_of_two_headers),
    counted("hash_repeated_header", hash_of_repeated_header),
    counted("hash_rewritten_header", hash_of_rewritten_header),
    counted("hash_query", hash_of_query),
    counted("hash_cookie", hash_of_cookie),
    counted("hash_source_ip", source_ip_sticks),
    *[cookie_given(name) for name in ("cookie_ttl0", "cookie_ttl", "cookie_attributes")],
    counted("round_robin_order", round_robin_order),
    counted("round_robin_weights", weighted_shares),
    *[everybody(name) for name in (
        "least", "random", "priorities", "spill", "panic", "no_panic", "all_down", "degraded", "unhealthy_skipped", "locality_weighted", "failover_panic",
        "one_of_each",
    )],
    mirrored("/one"),
    mirrored("/two"),
    mirrored("/none"),
    mirrored("/plain"),
    mirrored("/vhost"),
    mirrored("/dead"),
    Case("mirror_post", req("POST", "/one", host="mirror.test", body=b"hello")),
    Case("mirror_chunked_post", req("POST", "/one", "Transfer-Encoding: chunked", host="mirror.test", body=b"5\r\nhello\r\n0\r\n\r\n")),
    Case("mirror_host_with_port", get("/one", host="mirror.test:80")),
    Case("mirror_answers_differently", get("/one", host="mirror.test"), {"a": [Request(), OK], "b": [Request(), answer("500 X", b"no")]}),
]  # fmt: skip

test_case = check_cases(CASES)
