"""Retry decisions, back-off, and the choice of hosts."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from envoy.config.route.v3 import route_components_pb2 as pb

from meshproxy.api import convert
from meshproxy.api.errors import ConfigError
from meshproxy.codec.headers import RequestHead, ResponseHead
from meshproxy.http import retry, retry_hosts
from meshproxy.http.retry import NO, NO_LIMIT, NO_OVERFLOW, RETRY
from meshproxy.upstream.limits import Limits
from tests.unit.route_help import context

NAMES = "upstream_rq_retry upstream_rq_retry_success upstream_rq_retry_overflow upstream_rq_retry_limit_exceeded".split()
NAMES += ["upstream_rq_retry_backoff_exponential", "upstream_rq_retry_backoff_ratelimited"]


class Cluster:
    def __init__(self, picks: tuple[Any, ...] = (), **limits: Any) -> None:
        self.limits = (Limits(**limits), Limits("high"))
        self.stats = SimpleNamespace(**{name: SimpleNamespace(n=0) for name in NAMES})
        self.context = SimpleNamespace(wall=lambda: 1000.9)
        self.picks = list(picks)
        self.attempts: list[int] = []

    def pick(self, lb: Any) -> Any:
        self.attempts.append(lb.attempt)
        return self.picks.pop(0)

    def counts(self) -> dict[str, int]:
        return {name.removeprefix("upstream_rq_retry"): counter.n for name, counter in vars(self.stats).items() if counter.n}


def policy(**fields: Any) -> retry.RetryPolicy:
    return retry.compile_retry_policy(convert.to_message(fields, pb.RetryPolicy))


def head(**items: str) -> RequestHead:
    return RequestHead(b"GET", b"/", b"h", [(name.replace("_", "-").encode(), value.encode()) for name, value in items.items()])


def response(status: int = 200, **items: str) -> ResponseHead:
    return ResponseHead(status, [(name.replace("_", "-").encode(), value.encode()) for name, value in items.items()])


def route(found: retry.RetryPolicy | None, *, hedge: bool = False) -> Any:
    return SimpleNamespace(retry=found, priority=0, hedge_on_per_try_timeout=hedge)


def state(request: RequestHead | None = None, cluster: Cluster | None = None, runtime: Any = None, **fields: Any) -> Any:
    return retry.start(route(policy(**fields) if fields else None), request or head(), cluster or Cluster(), random.Random(1), runtime)


# -- conditions


def test_no_policy_no_state():
    assert state() is None
    assert state(num_retries=3) is None


@pytest.mark.parametrize(
    ("retry_on", "statuses"),
    [
        ("5xx", {500, 501, 502, 503, 504, 599}),
        ("gateway-error", {502, 503, 504}),
        ("retriable-4xx", {409}),
        ("retriable-status-codes", {418}),
        ("connect-failure,refused-stream,reset", set()),
        ("gateway-error, retriable-4xx", {502, 503, 504, 409}),
        ("unknown,,5xx", {500, 501, 502, 503, 504, 599}),
    ],
)
def test_statuses(retry_on, statuses):
    found = state(retry_on=retry_on, retriable_status_codes=[418])
    assert {status for status in (200, 400, 409, 418, 499, 500, 501, 502, 503, 504, 599) if found.would_retry_headers(response(status))} == statuses


RESETS = [
    "overflow",
    "remote connection failure",
    "local connection failure",
    "connection timeout",
    "connection termination",
    "remote reset",
    "remote refused stream reset",
    "protocol error",
]
CONNECT = {"remote connection failure", "local connection failure", "connection timeout"}
ANY = set(RESETS) - {"overflow"}


@pytest.mark.parametrize(
    ("retry_on", "sent", "reasons"),
    [
        ("5xx", True, ANY),
        ("gateway-error", True, ANY),
        ("reset", True, ANY),
        ("connect-failure", True, CONNECT),
        ("refused-stream", True, {"remote refused stream reset"}),
        ("reset-before-request", True, set()),
        ("reset-before-request", False, ANY),
        ("retriable-4xx,cancelled,retriable-headers", False, set()),
    ],
)
def test_resets(retry_on, sent, reasons):
    found = state(retry_on=retry_on)
    assert {reason for reason in RESETS if found.would_retry_reset(reason, sent)} == reasons


@pytest.mark.parametrize(("name", "status"), [("cancelled", 1), ("deadline-exceeded", 4), ("resource-exhausted", 8), ("internal", 13), ("unavailable", 14)])
def test_grpc_statuses(name, status):
    found = state(retry_on=name)
    assert [code for code in range(17) if found.would_retry_headers(response(200, grpc_status=str(code)))] == [status]
    assert not found.would_retry_headers(response(200))
    assert not found.would_retry_headers(response(200, grpc_status="x"))


def test_ratelimited_only_when_asked_for():
    limited = response(503, x_envoy_ratelimited="true")
    assert not state(retry_on="5xx").would_retry_headers(limited)
    assert state(retry_on="envoy-ratelimited").would_retry_headers(limited)


def test_retriable_headers():
    found = state(retry_on="retriable-headers", retriable_headers=[{"name": "x-again"}, {"name": "x", "string_match": {"prefix": "re"}}])
    assert found.would_retry_headers(response(200, x_again=""))
    assert found.would_retry_headers(response(200, x="retry"))
    assert not found.would_retry_headers(response(500, x="no"))


def test_retriable_request_headers():
    only_get = [{"name": ":method", "string_match": {"exact": "GET"}}]
    assert state(retry_on="5xx", retriable_request_headers=only_get).would_retry_headers(response(500))
    post = RequestHead(b"POST", b"/", b"h", [(b"x-envoy-retry-on", b"5xx")])
    assert not state(post, retry_on="5xx", retriable_request_headers=only_get).would_retry_headers(response(500))


# -- the request's own headers


def test_headers_are_merged_and_consumed():
    request = head(
        x_envoy_retry_on="gateway-error",
        x_envoy_retry_grpc_on="cancelled",
        x_envoy_max_retries="7",
        x_envoy_retriable_status_codes="418, 419,x",
        x_envoy_retriable_header_names="X-Again , ,y",
        x_envoy_hedge_on_per_try_timeout="true",
        x_envoy_upstream_rq_per_try_timeout_ms="5",
        other="1",
    )
    found = state(request, retry_on="retriable-status-codes,retriable-headers", retriable_status_codes=[409], num_retries=2)
    assert request.items == [(b"other", b"1")]
    assert found.left == 7
    assert found.status_codes == {409, 418, 419}
    for wanted in (response(503), response(418), response(409), response(200, grpc_status="1"), response(200, x_again=""), response(200, y="")):
        assert found.would_retry_headers(wanted)
    assert not found.would_retry_headers(response(500))


def test_headers_alone_make_retries():
    found = state(head(x_envoy_retry_on="5xx"))
    assert (found.left, found.would_retry_headers(response(500))) == (1, True)
    assert state(head(x_envoy_retry_grpc_on="internal")).would_retry_headers(response(200, grpc_status="13"))


def test_headers_are_consumed_without_retries_too():
    request = head(x_envoy_max_retries="3")
    assert state(request) is None
    assert request.items == []


def test_max_retries_needs_conditions():
    assert state(head(x_envoy_retry_on="nonsense", x_envoy_max_retries="9")).left == 1
    assert state(head(x_envoy_max_retries="-1"), retry_on="5xx").left == 1


@pytest.mark.parametrize(
    ("configured", "header", "hedges"), [(False, None, False), (True, None, True), (True, "false", False), (False, "true", True), (True, "x", True)]
)
def test_hedging(configured, header, hedges):
    request = head() if header is None else head(x_envoy_hedge_on_per_try_timeout=header)
    assert retry.hedges(route(None, hedge=configured), request) is hedges


@pytest.mark.parametrize(("text", "valid"), [("5xx,reset", True), (" 5xx , reset ", True), ("5xx,cancelled", False), ("", True)])
def test_parse(text, valid):
    assert retry.parse_retry_on(text)[1] is valid
    assert retry.parse_retry_grpc_on("cancelled,internal") == (retry.ON_CANCELLED | retry.ON_INTERNAL, True)


# -- limits


def test_retries_run_out():
    cluster = Cluster()
    found = state(cluster=cluster, retry_on="5xx", num_retries=2)
    assert [found.should_retry_headers(response(500)) for _ in range(3)] == [RETRY, RETRY, NO_LIMIT]
    assert cluster.counts() == {"": 2, "_limit_exceeded": 1}
    assert cluster.limits[0].retries == 0


def test_success_after_a_retry():
    cluster = Cluster()
    found = state(cluster=cluster, retry_on="5xx")
    assert found.should_retry_headers(response(500)) == RETRY
    assert cluster.limits[0].retries == 1
    assert found.should_retry_headers(response(200)) == NO
    assert (cluster.counts(), cluster.limits[0].retries) == ({"": 1, "_success": 1}, 0)


def test_finish_gives_the_place_back():
    cluster = Cluster()
    found = state(cluster=cluster, retry_on="5xx")
    found.should_retry_reset("remote reset", True)
    assert cluster.limits[0].retries == 1
    found.finish()
    found.finish()
    assert cluster.limits[0].retries == 0


def test_overflow():
    cluster = Cluster(max_retries=1)
    states = [state(cluster=cluster, retry_on="5xx", num_retries=5) for _ in range(2)]
    assert [one.should_retry_headers(response(500)) for one in states] == [RETRY, NO_OVERFLOW]
    assert cluster.counts() == {"": 1, "_overflow": 1}
    assert states[1].left == 4  # the attempt is used up all the same


def test_budget():
    cluster = Cluster(budget_percent=20.0, min_retry_concurrency=1)
    cluster.limits[0].rq = 10
    decisions = [state(cluster=cluster, retry_on="5xx").should_retry_headers(response(500)) for _ in range(3)]
    assert decisions == [RETRY, RETRY, NO_OVERFLOW]


def test_hedging_ignores_conditions_but_not_limits():
    found = state(retry_on="cancelled")
    assert [found.should_hedge(), found.should_hedge()] == [RETRY, NO_LIMIT]


def test_runtime_can_turn_retries_off():
    cluster = Cluster()
    assert state(cluster=cluster, runtime=context({"upstream.use_retry": "0"}).runtime, retry_on="5xx").should_retry_headers(response(500)) == NO
    assert cluster.counts() == {}


# -- back-off


class Highest(random.Random):
    """Every interval at its upper end."""

    def getrandbits(self, k: int) -> int:
        return (1 << 64) - (1 << 64) % (7 * 25 * 1000 * 64) - 1


def backoffs(count: int, runtime: Any = None, **fields: Any) -> list[float]:
    cluster = Cluster()
    found = retry.start(route(policy(retry_on="5xx", num_retries=100, **fields)), head(), cluster, Highest(), runtime)
    delays = []
    for _ in range(count):
        assert found.should_retry_headers(response(500)) == RETRY
        delays.append(round(found.backoff() * 1000))
    return delays


def test_exponential_back_off():
    assert backoffs(6) == [24, 49, 99, 199, 249, 249]
    assert backoffs(4, retry_back_off={"base_interval": "0.1s"}) == [99, 199, 399, 799]
    assert backoffs(3, retry_back_off={"base_interval": "0.1s", "max_interval": "0.1s"}) == [99, 99, 99]
    assert backoffs(1, retry_back_off={"base_interval": "0.0001s"}) == [0]
    assert backoffs(2, context({"upstream.base_retry_backoff_ms": "10"}).runtime) == [9, 19]


def test_back_off_is_random_from_zero():
    found = state(retry_on="5xx", num_retries=1000, retry_back_off={"base_interval": "0.1s", "max_interval": "0.1s"})
    delays = [found.backoff() * 1000 for _ in range(500)]
    assert min(delays) < 10
    assert 90 < max(delays) < 100


RESET = {
    "retry_on": "5xx",
    "num_retries": 9,
    "rate_limited_retry_back_off": {"reset_headers": [{"name": "Retry-After"}, {"name": "reset", "format": "UNIX_TIMESTAMP"}], "max_interval": "100s"},
}


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"retry_after": "10"}, 10, 15),
        ({"reset": "1020"}, 20, 30),
        ({"retry_after": "1000", "reset": "1020"}, 20, 30),
        ({"retry_after": "x", "reset": "1020"}, 20, 30),
        ({"reset": "999"}, 0, 0.025),
        ({"retry_after": "0"}, 0, 0.025),
        ({"retry_after": "101"}, 0, 0.025),
        ({}, 0, 0.025),
    ],
)
def test_back_off_that_the_response_asks_for(headers, low, high):
    cluster = Cluster()
    found = state(cluster=cluster, **RESET)
    assert found.should_retry_headers(response(503, **headers)) == RETRY
    assert low <= found.backoff() < high
    assert cluster.counts()["_backoff_ratelimited" if low else "_backoff_exponential"] == 1
    # It holds for that response only.
    found.should_retry_reset("remote reset", True)
    assert found.backoff() < 0.05


def test_back_off_error():
    with pytest.raises(ConfigError) as error:
        policy(retry_back_off={"base_interval": "1s", "max_interval": "0.5s"})
    assert error.value.problems[0].path == "retry_back_off.max_interval"


# -- hosts


def typed(kind: str, name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/envoy.extensions.retry.{kind}.{name}", **fields}}


def host(name: str, **attributes: Any) -> Any:
    return SimpleNamespace(**{"name": name, "canary": False, "metadata": None, "priority": 0, **attributes})


A, B, CANARY = host("a"), host("b"), host("canary", canary=True)
V2 = host("v2", metadata={"envoy.lb": {"version": "2", "tags": ["x", "y"]}})
LB = {"attempt": 0, "tried": (), "priority_load": None}


def pick(cluster: Cluster, tried: list[Any], **fields: Any) -> Any:
    found = state(cluster=cluster, retry_on="5xx", **fields)
    for one in tried:
        found.on_host_attempted(one)
    return found.pick(cluster, SimpleNamespace(**LB))


def test_without_predicates_one_pick():
    assert pick(Cluster((A, B)), [A]) is A


def test_previous_hosts():
    predicate = [typed("host", "previous_hosts.v3.PreviousHostsPredicate")]
    assert pick(Cluster((A, B)), [A], retry_host_predicate=predicate) is B
    assert pick(Cluster((A, A, B)), [A], retry_host_predicate=predicate) is A  # one more try by default, then the last pick holds
    cluster = Cluster((A, A, A, B))
    assert pick(cluster, [A], retry_host_predicate=predicate, host_selection_retry_max_attempts=3) is B
    assert cluster.attempts == [0, 1, 2, 3]
    assert pick(Cluster((None,)), [A], retry_host_predicate=predicate) is None


def test_omit_canary_hosts():
    assert pick(Cluster((CANARY, A)), [], retry_host_predicate=[typed("host", "omit_canary_hosts.v3.OmitCanaryHostsPredicate")]) is A


@pytest.mark.parametrize(("labels", "chosen"), [({"version": "2"}, A), ({"version": "2", "tags": "y"}, A), ({"tags": "z"}, V2), ({"other": "1"}, V2), ({}, V2)])
def test_omit_host_metadata(labels, chosen):
    predicate = typed("host", "omit_host_metadata.v3.OmitHostMetadataConfig", metadata_match={"filter_metadata": {"envoy.lb": labels}})
    assert pick(Cluster((V2, A)), [], retry_host_predicate=[predicate]) is chosen


def test_unknown_predicate():
    with pytest.raises(ConfigError) as error:
        policy(retry_host_predicate=[{"name": "x", "typed_config": {"@type": "type.googleapis.com/envoy.config.core.v3.Node"}}])
    assert error.value.problems[0].path == "retry_host_predicate[0].typed_config"


def host_set(priority: int, healthy: int, degraded: int = 0, total: int = 10) -> Any:
    everybody = [host(str(number)) for number in range(total)]
    return SimpleNamespace(
        priority=priority,
        hosts=everybody,
        excluded=[],
        healthy=everybody[:healthy],
        degraded=everybody[:degraded],
        weighted_health=False,
        overprovisioning_factor=140,
    )


ORIGINAL = SimpleNamespace(healthy_load=[100, 0], degraded_load=[0, 0])


def test_previous_priorities():
    config = typed("priority", "previous_priorities.v3.PreviousPrioritiesConfig", update_frequency=1)
    assert policy(retry_on="5xx", retry_priority=config).priority_update_frequency == 1
    tried: list[Any] = []
    load = retry_hosts.PreviousPriorities(1, tried)
    sets = [host_set(0, 10), host_set(1, 10)]
    assert load(sets, ORIGINAL) == ([100, 0], [0, 0])
    tried.append(host("a", priority=0))
    assert load(sets, ORIGINAL) == ([0, 100], [0, 0])
    # When every priority has been tried the past is forgotten: both are open again.
    tried.append(host("b", priority=1))
    assert load(sets, ORIGINAL) == ([100, 0], [0, 0])


def test_previous_priorities_spread():
    tried = [host("a", priority=0)]
    sets = [host_set(0, 10), host_set(1, 3, 1), host_set(2, 3)]
    # Availability 0, 42 + 14, 42: 98 in all; what rounding leaves goes to the first again.
    assert retry_hosts.PreviousPriorities(1, tried)(sets, ORIGINAL) == ([0, 44, 42], [0, 14, 0])


def test_previous_priorities_update_frequency():
    tried: list[Any] = []
    load = retry_hosts.PreviousPriorities(2, tried)
    sets = [host_set(0, 10), host_set(1, 10), host_set(2, 10)]
    seen = []
    for priority in (0, 1, 1):
        tried.append(host("x", priority=priority))
        seen.append(load(sets, ORIGINAL))
    assert seen == [([100, 0], [0, 0]), ([0, 0, 100], [0, 0, 0]), ([0, 0, 100], [0, 0, 0])]


def test_previous_priorities_with_nobody_left():
    tried = [host("a", priority=0)]
    assert retry_hosts.PreviousPriorities(1, tried)([host_set(0, 0), host_set(1, 0)], ORIGINAL) == ([100, 0], [0, 0])


def test_priority_load_is_given_to_the_balancer():
    config = typed("priority", "previous_priorities.v3.PreviousPrioritiesConfig", update_frequency=2)
    cluster = Cluster((A,))
    found = state(cluster=cluster, retry_on="5xx", retry_priority=config)
    lb = SimpleNamespace(**LB)
    found.on_host_attempted(B)
    assert found.pick(cluster, lb) is A
    assert lb.tried == [B]
    assert isinstance(lb.priority_load, retry_hosts.PreviousPriorities)
