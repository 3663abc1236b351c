"""Settings of DestinationRules and VirtualServices that are one value each: what becomes of them."""

from __future__ import annotations

from control.translate.resource import ORDER
from meshproxy.api import support
from tests.unit.control_help import cluster, istio, listener, routes, view_of

NAME = "outbound|9080||reviews.default.svc.cluster.local"

NAME_IN = "inbound|8000||"


def view(*texts: str):
    made = view_of(*texts)
    for url in ORDER:
        for one in made.all(url):
            assert not support.check(one.message)[0], one
    return made


def rule(policy: str):
    return view(istio("DestinationRule", "r", f"{{host: reviews, trafficPolicy: {policy}}}"))


def test_budgets_of_retries():
    (threshold,) = cluster(rule("{retryBudget: {percent: 12.5, minRetryConcurrency: 0}}"), NAME)["circuit_breakers"]["thresholds"]
    assert threshold["retry_budget"] == {"budget_percent": {"value": 12.5}, "min_retry_concurrency": 0}
    (threshold,) = cluster(rule("{retryBudget: {}, connectionPool: {tcp: {maxConnections: 5}}}"), NAME)["circuit_breakers"]["thresholds"]
    assert threshold["retry_budget"] == {"budget_percent": {"value": 20.0}, "min_retry_concurrency": 3}
    assert threshold["max_connections"] == 5


def test_connections_to_applications():
    """The inbound cluster is limited as a Sidecar says, or else as rules for callers of the service do."""

    def limit(*texts: str) -> int:
        made = cluster(
            view("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{name: http, port: 8000}]}}", *texts), NAME_IN
        )
        return made["circuit_breakers"]["thresholds"][0]["max_connections"]

    def pool(count: int) -> str:
        return f"{{tcp: {{maxConnections: {count}}}}}"

    rule = istio("DestinationRule", "web", f"{{host: web, trafficPolicy: {{connectionPool: {pool(1)}}}}}")
    assert limit() == 2**32 - 1
    assert limit(rule) == 1
    whole = istio("Sidecar", "s", f"{{workloadSelector: {{labels: {{app: web}}}}, inboundConnectionPool: {pool(2)}}}")
    assert limit(rule, whole) == 2
    port = f"ingress: [{{port: {{number: 8000, protocol: HTTP, name: http}}, defaultEndpoint: '127.0.0.1:9000', connectionPool: {pool(3)}}}]"
    assert limit(rule, whole.replace("inboundConnectionPool", f"{port}, inboundConnectionPool")) == 3
    (options,) = cluster(view(whole.replace(pool(2), "{http: {useClientProtocol: true, idleTimeout: 5s}}")), NAME_IN)[
        "typed_extension_protocol_options"
    ].values()
    assert options["common_http_protocol_options"] == {"idle_timeout": "5s"}
    assert "use_downstream_protocol_config" in options


def test_warming_up():
    made = cluster(rule("{loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 30s, minimumPercent: 25, aggression: 1.5}}}"), NAME)
    start = made["round_robin_lb_config"]["slow_start_config"]
    assert (start["slow_start_window"], start["min_weight_percent"], start["aggression"]["default_value"]) == ("30s", {"value": 25.0}, 1.5)
    made = cluster(rule("{loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 30s}}}"), NAME)
    assert made["round_robin_lb_config"]["slow_start_config"] == {"slow_start_window": "30s"}


def test_attributes_of_cookies():
    cookie = "{name: c, ttl: 5s, attributes: [{name: SameSite, value: Strict}, {name: Secure}]}"
    (route,) = routes(rule(f"{{loadBalancer: {{consistentHash: {{httpCookie: {cookie}}}}}}}"))
    (policy,) = route["route"]["hash_policy"]
    assert policy["cookie"]["attributes"] == [{"name": "SameSite", "value": "Strict"}, {"name": "Secure"}]


def test_retries_elsewhere():
    text = "hosts: [reviews]\nhttp: [{retries: {attempts: 3, retryRemoteLocalities: %s}, route: [{destination: {host: reviews}}]}]"
    (route,) = routes(view(istio("VirtualService", "v", text % "true")))
    assert route["route"]["retry_policy"]["retry_priority"]["typed_config"]["update_frequency"] == 1
    (route,) = routes(view(istio("VirtualService", "v", text % "false")))
    assert "retry_priority" not in route["route"]["retry_policy"]


def test_several_matches_of_connections():
    for port, target in ((3306, "reviews"), (1, "db")):
        text = f"hosts: [db]\ntcp: [{{match: [{{port: 7}}, {{port: {port}}}], route: [{{destination: {{host: reviews, port: {{number: 9080}}}}}}]}}]"
        made = listener(view(istio("VirtualService", "v", text)), "127.0.0.1_13306")
        assert f"||{target}.default" in made["filter_chains"][0]["filters"][-1]["typed_config"]["cluster"]
