"""Telemetry policies to Istio's metrics and access logs in listeners."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from envoy.config.core.v3.base_pb2 import Node

from control.translate.proxy import of_node
from control.translate.resource import ORDER
from control.translate.translator import Translator
from meshproxy.api import support
from tests.unit.control_help import MESH, WEB, cluster, endpoints, listener, snapshot, view_of
from tests.unit.test_control_telemetry import IN, OUT, mesh_config, problems

OURS = replace(WEB, counts=True)
TCP = "127.0.0.1_13306"


def policy(spec: str, name: str = "t", namespace: str = "istio-system", selector: str = "") -> str:
    chosen = f"selector: {{matchLabels: {selector}}}, " if selector else ""
    return f"apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{chosen}{spec}}}\n"


def metrics(overrides: str, **more: str) -> str:
    return policy(f"metrics: [{{overrides: [{overrides}]}}]", **more)


def view(*texts: str) -> Any:
    return view_of(*texts, proxy=OURS)


def manager(made: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = listener(made, name)["filter_chains"][0]["filters"][-1]["typed_config"]
    return found


def stats(made: Any, name: str) -> dict[str, Any] | None:
    found = [one["typed_config"] for one in manager(made, name)["http_filters"] if one["name"] == "istio.stats"]
    return found[0] if found else None


def dropped(made: Any, name: str) -> set[str]:
    found = stats(made, name)
    assert found is not None
    return {one["name"] for one in found.get("metrics", ()) if one.get("drop")}


# -- metrics


def test_sidecars_of_ours_count_and_say_who_they_are():
    made = view()
    names = [one["name"] for one in manager(made, OUT)["http_filters"]]
    assert names == ["istio.metadata_exchange", "envoy.filters.http.cors", "envoy.filters.http.fault", "istio.stats", "envoy.filters.http.router"]
    assert manager(made, IN)["http_filters"][0]["typed_config"]["downstream_discovery"] == [{"istio_headers": {}}]
    assert stats(made, OUT) == {"@type": "type.googleapis.com/stats.PluginConfig"}
    assert stats(made, IN) == {"@type": "type.googleapis.com/stats.PluginConfig", "disable_host_header_fallback": True}
    said = listener(made, IN)["metadata"]["filter_metadata"]["istio"]
    assert (said["WORKLOAD_NAME"], said["NAMESPACE"], said["CLUSTER_ID"]) == ("web", "default", "Kubernetes")
    assert said["LABELS"] == {"app": "web", "service.istio.io/canonical-name": "web", "service.istio.io/canonical-revision": "latest"}
    for url in ORDER:
        for resource in made.all(url):
            assert support.check(resource.message)[0] == []


def test_others_do_not():
    made = view_of()
    assert stats(made, OUT) is None
    assert "metadata" not in listener(made, IN)


def test_who_is_of_ours():
    assert of_node(Node(id="web.default", user_agent_name="meshproxy")).counts
    assert not of_node(Node(id="web.default", user_agent_name="envoy")).counts


def test_what_serves_is_named():
    made = view("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8000}]}\n")
    assert cluster(made, "inbound|8000||")["metadata"]["filter_metadata"]["istio"]["services"][0]["name"] == "web"


@pytest.mark.parametrize(
    ("texts", "client", "server"),
    [
        ([metrics("{match: {metric: REQUEST_SIZE}, disabled: true}")], {"request_bytes"}, {"request_bytes"}),
        ([metrics("{match: {metric: REQUEST_SIZE, mode: CLIENT}, disabled: true}")], {"request_bytes"}, set()),
        ([metrics("{match: {mode: SERVER}, disabled: true}")], set(), None),
        ([metrics("{disabled: true}")], None, None),
        ([metrics("{disabled: true}"), metrics("{match: {metric: REQUEST_COUNT}, disabled: false}", name="near", namespace="default")], set(), set()),
        ([metrics("{disabled: true}", selector="{app: other}", namespace="default")], set(), set()),
        ([metrics("{match: {metric: REQUEST_SIZE}, disabled: true}, {match: {metric: REQUEST_SIZE}, disabled: false}")], set(), set()),
        ([policy("metrics: [{providers: [{name: nobody}]}]")], None, None),
        ([mesh_config("defaultProviders: {metrics: []}")], None, None),
        ([mesh_config("defaultProviders: {metrics: []}"), policy("metrics: [{providers: [{name: prometheus}]}]")], set(), set()),
    ],
)
def test_what_is_counted(texts, client, server):
    made = view(*texts)
    for name, wanted in ((OUT, client), (IN, server)):
        if wanted is None:
            assert stats(made, name) is None
        else:
            assert dropped(made, name) == wanted


def test_labels_that_go_and_labels_that_come():
    tags = "{response_code: {operation: REMOVE}, who: {value: \"request.headers['x-user']\"}}"
    around = metrics(f"{{match: {{metric: REQUEST_COUNT}}, tagOverrides: {tags}}}")
    near = metrics("{match: {metric: REQUEST_COUNT, mode: SERVER}, tagOverrides: {who: {value: \"'me'\"}}}", name="near", namespace="default")
    made = view(around, near)
    found = {name: stats(made, name)["metrics"] for name in (IN, OUT)}  # type: ignore[index]
    assert found[OUT] == [{"name": "requests_total", "tags_to_remove": ["response_code"], "dimensions": {"who": "request.headers['x-user']"}}]
    assert found[IN] == [{"name": "requests_total", "tags_to_remove": ["response_code"], "dimensions": {"who": "'me'"}}]


def test_how_often_connections_are_reported():
    found = stats(view(policy("metrics: [{reportingInterval: 7s}]")), OUT)
    assert found is not None
    assert found["tcp_reporting_duration"] == "7s"


def test_messages_are_counted_where_they_are_asked_for():
    made = view(metrics("{match: {metric: GRPC_REQUEST_MESSAGES}, disabled: false}"))
    assert "envoy.filters.http.grpc_stats" in [one["name"] for one in manager(made, OUT)["http_filters"]]


# -- access logs

STDOUT = policy("accessLogging: [{providers: [{name: envoy}]}]")


def logs(made: Any, name: str = OUT) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manager(made, name).get("access_log", [])
    return found


def test_nobody_logs_who_was_not_told_to():
    assert logs(view()) == []


def test_the_provider_that_is_always_there():
    made = view_of(STDOUT)  # for any proxy
    for name in (IN, OUT):
        [one] = logs(made, name)
        assert one["typed_config"]["path"] == "/dev/stdout"
        assert one["typed_config"]["log_format"]["text_format_source"]["inline_string"].startswith("[%START_TIME%] ")
    for url in ORDER:
        for resource in made.all(url):
            assert support.check(resource.message)[0] == []


@pytest.mark.parametrize(
    ("texts", "client", "server"),
    [
        ([policy("accessLogging: [{match: {mode: CLIENT}, providers: [{name: envoy}]}]")], 1, 0),
        ([STDOUT, policy("accessLogging: [{disabled: true}]", name="near", namespace="default")], 0, 0),
        ([STDOUT, policy("accessLogging: [{disabled: true, match: {mode: SERVER}}]", name="near", namespace="default")], 1, 0),
        ([STDOUT, policy("accessLogging: [{disabled: true}]", name="near", namespace="default", selector="{app: other}")], 1, 1),
        ([mesh_config("defaultProviders: {accessLogging: [envoy]}")], 1, 1),
        ([mesh_config("accessLogFile: /dev/stderr")], 1, 1),
        ([policy("accessLogging: [{providers: [{name: nobody}]}]")], 0, 0),
    ],
)
def test_who_logs(texts, client, server):
    made = view(*texts)
    assert (len(logs(made, OUT)), len(logs(made, IN))) == (client, server)


def test_providers_of_the_mesh():
    config = mesh_config("""
        extensionProviders:
        - {name: text, envoyFileAccessLog: {path: /var/log/a, logFormat: {text: "%PROTOCOL%"}}}
        - {name: json, envoyFileAccessLog: {path: /var/log/b, logFormat: {labels: {code: "%RESPONSE_CODE%"}}}}
        - {name: scraped, prometheus: {}}
        defaultProviders: {accessLogging: [text, json], metrics: [scraped]}
        """)
    made = view(config)
    json, text = [one["typed_config"] for one in logs(made)]
    assert (text["path"], text["log_format"]["text_format_source"]["inline_string"]) == ("/var/log/a", "%PROTOCOL%\n")
    assert (json["path"], json["log_format"]["json_format"]) == ("/var/log/b", {"code": "%RESPONSE_CODE%"})
    assert stats(made, OUT) is not None


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("response.code >= 400", ("GE", 400)),
        ("response.code > 399", ("GE", 400)),
        ("response.code == 503", ("EQ", 503)),
        ("response.code<=204", ("LE", 204)),
    ],
)
def test_entries_for_some_codes(expression, wanted):
    [one] = logs(view(policy(f"accessLogging: [{{providers: [{{name: envoy}}], filter: {{expression: '{expression}'}}}}]")))
    comparison = one["filter"]["status_code_filter"]["comparison"]
    assert (comparison.get("op", "EQ"), comparison["value"]["default_value"]) == wanted


def test_conditions_together():
    expression = "response.code >= 400 && response.code < 500 || response.code == 200"
    [one] = logs(view(policy(f"accessLogging: [{{providers: [{{name: envoy}}], filter: {{expression: '{expression}'}}}}]")))
    first, second = one["filter"]["or_filter"]["filters"]
    assert len(first["and_filter"]["filters"]) == 2
    assert second["status_code_filter"]["comparison"]["value"]["default_value"] == 200


def test_gateways_may_be_targets():
    text = policy(
        "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: edge}], accessLogging: [{providers: [{name: envoy}]}]", namespace="default"
    )
    assert problems(text) == []
    assert logs(view(text)) == []  # web serves no gateway


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (metrics("{match: {customMetric: mine}}"), "spec.metrics[0].overrides[0].match.customMetric: there are Istio's standard metrics"),
        (metrics("{match: {metric: NONE}}"), "spec.metrics[0].overrides[0].match.metric: 'NONE' is not one of"),
        (metrics("{tagOverrides: {a: {value: 'request.size + 1'}}}"), "spec.metrics[0].overrides[0].tagOverrides.a.value: 'request.size + 1' is neither"),
        (policy("accessLogging: [{filter: {expression: 'request.size > 1'}}]"), "spec.accessLogging[0].filter.expression: 'request.size > 1' is no comparison"),
        (policy("targetRef: {group: '', kind: Service, name: a}"), "spec.targetRef.kind: Service of core"),
        (mesh_config("defaultProviders: {metrics: [nobody]}"), "data.mesh.defaultProviders.metrics[0]: there is no provider"),
        (mesh_config("defaultProviders: {accessLogging: [nobody]}"), "data.mesh.defaultProviders.accessLogging[0]: there is no provider"),
        (mesh_config("accessLogEncoding: XML"), "data.mesh.accessLogEncoding: "),
    ],
)
def test_mistakes_have_their_place(text, why):
    assert any(one.startswith(why) for one in problems(text)), problems(text)


def test_a_label_that_no_metric_has_changes_no_listener():
    """A listener says who it is by labels that metrics have: it must not be made anew for others."""
    before, after = (Translator().view(replace(OURS, labels=(("app", "web"), ("other", value))), snapshot(MESH)) for value in "ab")
    assert listener(before, IN) == listener(after, IN)


def test_endpoints_say_who_is_there():
    found = endpoints(view_of(), "outbound|9080||reviews.default.svc.cluster.local")["endpoints"]
    said = {one["metadata"]["filter_metadata"]["istio"]["workload"] for group in found for one in group["lb_endpoints"]}
    assert "reviews-v2;default;reviews;v2;Kubernetes" in said
