"""Circuit breakers, outlier detection, limits of connections: what happens to the request that is one too many."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Close,
    Counted,
    Eof,
    Play,
    Request,
    Response,
    Rig,
    Signal,
    Wait,
    answer,
    bootstrap,
    check_cases,
    cluster,
    each,
    get,
    http,
    req,
)


def breaker(**limits: int) -> dict:
    return {"thresholds": [{"priority": "DEFAULT", "track_remaining": True, **limits}]}


def outlier(**fields: Any) -> dict:
    return {"interval": "600s", "base_ejection_time": "600s", "max_ejection_percent": 100, **fields}


NAMES = (
    "one_request", "one_connection", "no_pending", "high_only", "five_xx", "gateway", "gateway_only_500", "local_origin", "keep_one", "always_one",
    "not_enforced", "one_use", "idle", "connect_errors", "two_connections",
    "as_messages",
)  # fmt: skip
CONFIG = bootstrap(
    http("main", [
        {"name": name, "domains": [f"{name}.test"], "routes": [
            {"match": {"prefix": "/high"}, "route": {"cluster": name, "priority": "HIGH"}},
            {"match": {"prefix": "/retry"}, "route": {"cluster": name, "retry_policy": {"retry_on": "5xx", "num_retries": 2}}},
            {"match": {"prefix": "/"}, "route": {"cluster": name}},
        ]}
        for name in NAMES
    ]),
    clusters=[
        cluster("one_request", "a", circuit_breakers=breaker(max_requests=1)),
        cluster("one_connection", "a", circuit_breakers=breaker(max_connections=1)),
        cluster("two_connections", "a", circuit_breakers=breaker(max_connections=2, max_pending_requests=1)),
        cluster("no_pending", "a", circuit_breakers=breaker(max_connections=1, max_pending_requests=0)),
        cluster("high_only", "a", circuit_breakers={"thresholds": [{"priority": "HIGH", "max_requests": 0}]}),
        cluster("five_xx", "a", "b", outlier_detection=outlier(consecutive_5xx=2),
                common_lb_config={"update_merge_window": "0s"}),
        cluster("gateway", "a", "b", outlier_detection=outlier(consecutive_5xx=99, consecutive_gateway_failure=2, enforcing_consecutive_gateway_failure=100)),
        cluster("gateway_only_500", "a", outlier_detection=outlier(
            consecutive_5xx=99, consecutive_gateway_failure=2, enforcing_consecutive_gateway_failure=100)),
        cluster("local_origin", "a", "b", outlier_detection=outlier(
            split_external_local_origin_errors=True, consecutive_local_origin_failure=2, consecutive_5xx=99)),
        cluster("keep_one", "a", outlier_detection=outlier(consecutive_5xx=1, max_ejection_percent=10)),
        cluster("always_one", "a", outlier_detection=outlier(consecutive_5xx=1, max_ejection_percent=10, always_eject_one_host=True),
                common_lb_config={"healthy_panic_threshold": {"value": 0}}),
        cluster("not_enforced", "a", outlier_detection=outlier(consecutive_5xx=1, enforcing_consecutive_5xx=0)),
        cluster("connect_errors", "dead", outlier_detection=outlier(consecutive_5xx=2), common_lb_config={"healthy_panic_threshold": {"value": 0}}),
        cluster("one_use", "a", typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@": "http_options", "explicit_http_config": {"http_protocol_options": {}}, "common_http_protocol_options": {"max_requests_per_connection": 2}}}),
        cluster("as_messages", "a", connect_timeout={"seconds": 5}, typed_extension_protocol_options={
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@": "http_options", "explicit_http_config": {"http_protocol_options": {}},
                "common_http_protocol_options": {"max_requests_per_connection": {"value": "2"}, "idle_timeout": {"seconds": "60", "nanos": 1}}}}),
        cluster("idle", "a", typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@": "http_options", "explicit_http_config": {"http_protocol_options": {}}, "common_http_protocol_options": {"idle_timeout": "0.1s"}}}),
    ],
)  # fmt: skip

HELD = Play([[Request(), Signal("held"), Wait("go"), OK]])
GAUGES = "circuit_breakers.default"


async def gauges(rig: Rig, cluster_name: str) -> list[str]:
    """The circuit breaker gauges of a cluster as the admin shows them."""
    _, text = await rig.proxy.admin("GET", f"/stats?filter=cluster.{cluster_name}.circuit_breakers")
    return [line for line in text.splitlines() if "remaining_cx_pools" not in line]


def one_too_many(name: str, path: str = "/", requests: int = 2) -> Case:
    """All requests at once but one after the first is held by the upstream."""

    async def run(rig: Rig) -> Any:
        first = await rig.connect()
        one = asyncio.ensure_future(rig.exchange(first, get(path, host=f"{name}.test")))
        await rig.signals["held"].wait()
        during = await gauges(rig, name)
        refused: list[str] = []
        waiting: list[asyncio.Future[str]] = []
        for _ in range(requests - 1):
            exchange = asyncio.ensure_future(rig.exchange(await rig.connect(), get(path, host=f"{name}.test")))
            await rig.until_counted("http.main.downstream_rq_total", 1 + len(refused) + len(waiting) + 1)
            await rig.settled()  # what the worker was at then is done: it is refused, or held
            if await rig.counted("http.main.downstream_rq_completed") > len(refused):
                refused.append(await exchange)
            else:
                waiting.append(exchange)
        at_peak = await gauges(rig, name)
        rig.signals["go"].set()
        answers = sorted([await one, *[await exchange for exchange in waiting]])
        return {
            "refused": sorted(refused),
            "answered": answers,
            "gauges while one is held": during,
            "gauges at the peak": at_peak,
            "after": await gauges(rig, name),
        }

    return Case(f"breaker_{name}{path.replace('/', '_').rstrip('_')}", run, HELD, skip=("upstream",), skip_stats=("upstream_cx_",))


async def hosts_of(rig: Rig, name: str) -> list[str]:
    """Health flags of the hosts, and the outlier counters."""
    _, text = await rig.proxy.admin("GET", "/clusters")
    flags = [rig.normaliser.line(line) for line in text.splitlines() if line.startswith(f"{name}::127") and "health_flags" in line]
    _, stats = await rig.proxy.admin("GET", f"/stats?filter=cluster.{name}.(outlier_detection|membership)")
    return flags + stats.splitlines()


def ejection(name: str, *statuses: int, detected: int, then: int = 2, path: str = "/") -> Case:
    """The first host answers with these statuses, so often it is found that it should be ejected; then requests show who is left."""

    async def run(rig: Rig) -> Any:
        answers = [(await rig.get(get(path, host=f"{name}.test")))[9:12] for _ in statuses]
        # The main thread deals with it in its own time.
        await rig.until_counted(f"cluster.{name}.outlier_detection.ejections_detected_consecutive_5xx", detected)
        await rig.settled()
        answers += [(await rig.get(get(path, host=f"{name}.test")))[9:12] for _ in range(then)]
        lines = await hosts_of(rig, name)
        return {"answers": answers, "hosts": lines}

    failing = Play([[Request(), answer(f"{status} X", b"")] for status in statuses] + [[Request(), OK]])
    return Case(f"outlier_{name}_{'_'.join(map(str, statuses))}{path.replace('/', '_').rstrip('_')}", run, failing, skip=("upstream", "log"))


async def both_hosts_fail(rig: Rig) -> Any:
    """Both hosts answer 503 to everything: after two failures each, both are ejected, and panic brings them back."""
    answers = []
    for count in (1, 2):
        while sum("failed_outlier_check" in line for line in await hosts_of(rig, "five_xx")) < count:
            answers.append((await rig.get(get(host="five_xx.test")))[9:12])
            await rig.settled()
    answers = sorted(set(answers))
    answers += [(await rig.get(get(host="five_xx.test")))[9:12] for _ in range(4)]
    return {"answers": answers, "hosts": await hosts_of(rig, "five_xx")}


def upstream_connections(name: str) -> Callable[[Rig], Awaitable[Any]]:
    """Requests per upstream connection."""

    async def run(rig: Rig) -> Any:
        wire = await rig.connect()
        for number in range(5):
            await rig.exchange(wire, get(f"/{number}", host=f"{name}.test"))
        return [bytes(wire.received).count(b"GET /") for wire in rig.upstreams["a"].connections]

    return run


CASES = [
    one_too_many("one_request"),
    one_too_many("one_connection"),
    Case("breaker_no_pending", get(host="no_pending.test")),
    one_too_many("two_connections", requests=4),
    one_too_many("one_request", "/retry"),
    Case("breaker_high_priority", get("/high", host="high_only.test")),
    Case("breaker_default_not_high", get("/", host="high_only.test")),
    Case("breaker_high_priority_grpc", req("POST", "/high", "Content-Type: application/grpc", host="high_only.test")),
    Case("breaker_high_priority_not_retried", get("/retry", host="high_only.test")),
    ejection("gateway_only_500", 500, 503, 500, 503, detected=0),
    ejection("keep_one", 500, 500, detected=2),
    ejection("always_one", 500, detected=1),
    ejection("not_enforced", 500, 500, detected=2),
    ejection("connect_errors", 503, 503, detected=1),
    Case(
        "outlier_both_hosts",
        both_hosts_fail,
        [Request(), answer("503 X", b"")],
        skip=("upstream", "log"),
        skip_stats=("upstream_cx", "upstream_rq", "downstream_"),
        note="how many requests it takes depends on the host that comes first",
    ),
    Case("upstream_max_requests_per_connection", upstream_connections("one_use")),
    Case("values_written_as_messages", upstream_connections("as_messages")),
    Case(
        "upstream_idle_timeout",
        [get("/1", host="idle.test"), Response(), Wait("gone"), get("/2", host="idle.test"), Response(), Counted("upstream_cx_idle_timeout", 2)],
        each([Request(), OK, Eof(), Signal("gone"), Close()], [Request(), OK, Eof()]),
    ),
]

test_case = check_cases(CASES)
