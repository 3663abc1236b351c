"""Telemetry policies and MeshConfig to tracing in listeners."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

from control.kinds.store import Store
from control.model.snapshot import build
from control.model.telemetry import to_collector
from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, ORDER
from control.translate.translator import Translator
from meshproxy.api import support
from tests.unit.control_help import MESH, WEB, cluster, listener, snapshot, view_of

COLLECTOR = "tracing|4317||otel.example.org"
IN, OUT = "127.0.0.1_18000", "127.0.0.1_19090"


def mesh_config(text: str) -> str:
    return "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n" + textwrap.indent(
        textwrap.dedent(text), "    "
    )


def telemetry(tracing: str, name: str = "t", namespace: str = "istio-system", selector: str = "{}") -> str:
    head = f"apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
    return head + f"spec: {{selector: {{matchLabels: {selector}}}, tracing: {tracing}}}\n"


PROVIDER = "extensionProviders: [{name: otel, opentelemetry: {service: otel.example.org, port: 4317}}]\n"
DEFAULT = mesh_config(PROVIDER + "defaultProviders: {tracing: [otel]}")


def manager(view: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = listener(view, name)["filter_chains"][0]["filters"][-1]["typed_config"]
    return found


def tracing(view: Any, name: str = OUT) -> dict[str, Any] | None:
    return manager(view, name).get("tracing")


def tags(made: dict[str, Any]) -> dict[str, Any]:
    return {one["tag"]: {key: value for key, value in one.items() if key != "tag"} for one in made["custom_tags"]}


def problems(text: str) -> list[str]:
    store = Store()
    store.put("a.yaml", text.encode())
    store.settle()
    return [str(one.problem) for one in store.troubles]


def test_without_a_provider_nothing_is_traced():
    assert tracing(view_of()) is None
    assert tracing(view_of(mesh_config(PROVIDER))) is None
    assert tracing(view_of(telemetry("[{randomSamplingPercentage: 100}]"))) is None


def test_a_default_provider_traces_both_sides_of_all():
    view = view_of(DEFAULT)
    for name in (IN, OUT, "127.0.0.1_15001"):
        made = tracing(view, name)
        assert made is not None
        assert made["random_sampling"] == {"value": 1.0}
        assert made["client_sampling"] == made["overall_sampling"] == {"value": 100.0}
        provider = made["provider"]["typed_config"]
        assert provider["grpc_service"]["envoy_grpc"] == {"cluster_name": COLLECTOR, "authority": "otel.example.org"}
        assert provider["service_name"] == "web.default"
        assert tags(made)["istio.canonical_service"] == {"literal": {"value": "web"}}
    made = cluster(view, COLLECTOR)
    assert made["type"] == "STRICT_DNS"
    assert "http2_protocol_options" in str(made["typed_extension_protocol_options"])


def test_what_is_served_is_what_our_proxy_takes():
    view = view_of(DEFAULT, telemetry("[{customTags: {a: {literal: {value: b}}, f: {formatter: {value: '%REQ(:PATH)%'}}}}]"))
    for url in ORDER:
        for resource in view.all(url):
            assert support.check(resource.message)[0] == []


@pytest.mark.parametrize(
    ("policies", "sampling"),
    [
        ([telemetry("[{randomSamplingPercentage: 10}]")], 10),
        ([telemetry("[{randomSamplingPercentage: 10}]"), telemetry("[{randomSamplingPercentage: 20}]", "near", "default")], 20),
        ([telemetry("[{randomSamplingPercentage: 20}]", "near", "default"), telemetry("[{randomSamplingPercentage: 30}]", "w", "default", "{app: web}")], 30),
        ([telemetry("[{randomSamplingPercentage: 30}]", "w", "default", "{app: other}")], 1),
        ([telemetry("[{randomSamplingPercentage: 40}]", "o", "other")], 1),
        ([telemetry("[{randomSamplingPercentage: 40, disableSpanReporting: true}]")], 0),
        ([telemetry("[{disableSpanReporting: true}]"), telemetry("[{disableSpanReporting: false}]", "near", "default")], 1),
        ([telemetry("[{randomSamplingPercentage: 50, match: {mode: SERVER}}]")], 1),
        ([telemetry("[{randomSamplingPercentage: 50, match: {mode: CLIENT}}]")], 50),
    ],
)
def test_policies_narrow_down(policies, sampling):
    made = tracing(view_of(DEFAULT, *policies))
    assert made is not None
    assert made["random_sampling"].get("value", 0.0) == sampling


def test_tags_replace_those_of_the_policy_around():
    around = telemetry("[{customTags: {gone: {literal: {value: x}}}}]")
    own = "{env: {environment: {name: E, defaultValue: d}}, who: {header: {name: x-user}}, path: {formatter: {value: '%REQ(:PATH)%'}}}"
    made = tracing(view_of(DEFAULT, around, telemetry(f"[{{customTags: {own}}}]", "near", "default")))
    assert made is not None
    found = tags(made)
    assert "gone" not in found
    assert found["env"] == {"environment": {"name": "E", "default_value": "d"}}
    assert found["who"] == {"request_header": {"name": "x-user"}}
    assert found["path"] == {"value": "%REQ(:PATH)%"}


def test_a_provider_that_is_a_service_of_the_mesh_is_reached_as_one():
    service = "apiVersion: v1\nkind: Service\nmetadata: {name: otel}\nspec: {selector: {app: otel}, ports: [{name: grpc-otlp, port: 4317}]}\n"
    config = mesh_config("""
        extensionProviders: [{name: otel, opentelemetry: {service: default/otel.default.svc.cluster.local, port: 4317, maxTagLength: 99}}]
        defaultProviders: {tracing: [otel]}
        defaultConfig: {tracing: {sampling: 42.5}}
        """)
    view = view_of(service, config)
    made = tracing(view)
    assert made is not None
    assert made["provider"]["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"] == "outbound|4317||otel.default.svc.cluster.local"
    assert made["random_sampling"] == {"value": 42.5}
    assert made["max_path_tag_length"] == 99
    assert not [one.name for one in view.all(CLUSTER) if one.name.startswith("tracing|")]


def test_a_provider_may_take_http():
    http = "http: {path: /v1/traces, timeout: 2s, headers: [{name: x-token, value: secret}]}"
    view = view_of(
        mesh_config(f"""
        extensionProviders: [{{name: otel, opentelemetry: {{service: "2001:db8::1", port: 4318, {http}}}}}]
        defaultProviders: {{tracing: [otel]}}
        """)
    )
    made = tracing(view)
    assert made is not None
    assert made["provider"]["typed_config"]["http_service"] == {
        "http_uri": {"uri": "http://[2001:db8::1]:4318/v1/traces", "cluster": "tracing|4318||2001:db8::1", "timeout": "2s"},
        "request_headers_to_add": [{"header": {"key": "x-token", "value": "secret"}}],
    }
    assert "typed_extension_protocol_options" not in cluster(view, "tracing|4318||2001:db8::1")
    for url in ORDER:
        for resource in view.all(url):
            assert support.check(resource.message)[0] == []


def test_sampling_may_be_independent_of_request_ids():
    view = view_of(DEFAULT, telemetry("[{useRequestIdForTraceSampling: false}]"))
    assert manager(view, OUT)["request_id_extension"]["typed_config"]["use_request_id_for_trace_sampling"] is False


def test_the_command_line_names_a_collector_for_everything():
    objects = {}
    store = Store()
    store.put("mesh.yaml", MESH.encode())
    store.settle()
    objects = store.objects
    view = Translator().view(WEB, build(objects, None, "cluster.local", to_collector("[::1]:4317")))
    made = tracing(view)
    assert made is not None
    assert made["random_sampling"] == {"value": 100.0}
    assert cluster(view, "tracing|4317||::1")["type"] == "STATIC"
    for wrong in ("here", "here:", ":1", "here:0", "here:x", "here:99999"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            to_collector(wrong)


def test_only_what_a_policy_concerns_is_made_anew():
    translator = Translator()
    other = ProxyKey("sidecar", "nobody", "elsewhere")
    before = snapshot(MESH, DEFAULT)
    first = listener(translator.view(WEB, before), OUT)
    after = snapshot(MESH, DEFAULT, telemetry("[{randomSamplingPercentage: 7}]", "near", "elsewhere"))
    assert listener(translator.view(WEB, after), OUT) == first
    translator.view(other, after)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (telemetry("[{randomSamplingPercentage: 101}]"), "spec.tracing[0].randomSamplingPercentage: 101 is not within 0 to 100"),
        (telemetry("[{customTags: {a: {}}}]"), "spec.tracing[0].customTags.a: one of literal"),
        (telemetry("[{providers: [{name: a}, {name: b}]}]"), "spec.tracing[0].providers: a proxy sends"),
        (telemetry("[{match: {mode: ALL}}]"), "spec.tracing[0].match.mode"),
        (telemetry("[{unheardOf: 1}]"), "spec.tracing[0].unheardOf"),
        (mesh_config("extensionProviders: [{name: z, zipkin: {service: z, port: 9411}}]"), "data.mesh.extensionProviders[0].zipkin: "),
        (
            mesh_config("extensionProviders: [{name: o, opentelemetry: {service: o, port: 1, http: {path: v1}}}]"),
            "data.mesh.extensionProviders[0].opentelemetry.http.path: 'v1' is no path",
        ),
        (mesh_config("defaultProviders: {tracing: [nobody]}"), "data.mesh.defaultProviders.tracing[0]: there is no provider"),
        (mesh_config("outboundTrafficPolicy: {mode: ALLOW}"), "data.mesh.outboundTrafficPolicy.mode"),
        (mesh_config("pathNormalization: {normalization: SOME}"), "data.mesh.pathNormalization.normalization"),
        (mesh_config("[1, 2]"), "data.mesh: must be a mapping"),
    ],
)
def test_mistakes_have_their_place(text, why):
    assert any(one.startswith(why) for one in problems(text)), problems(text)
