"""AuthorizationPolicies with the action CUSTOM, and the providers of the MeshConfig that they name, to filters."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from control.kinds.store import Store
from control.translate.proxy import ProxyKey
from control.translate.resource import LISTENER, ORDER
from control.translate.translator import Translator
from meshproxy.api import support
from tests.unit.control_help import MESH, WEB, listener, plain, snapshot, view_of

IN = "127.0.0.1_18000"
AUTHZ = """
apiVersion: v1
kind: Service
metadata: {name: ext-authz, namespace: foo}
spec: {selector: {app: ext-authz}, ports: [{name: http, port: 8000}, {name: grpc, port: 9000}]}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: ext-authz, namespace: foo, labels: {app: ext-authz}}
spec: {ports: {http: 18001, grpc: 19001}}
"""
HOST = "ext-authz.foo.svc.cluster.local"
HTTP, GRPC = f"outbound|8000||{HOST}", f"outbound|9000||{HOST}"
PROVIDERS = f"""
- name: by-http
  envoyExtAuthzHttp: {{service: foo/{HOST}, port: 8000, includeRequestHeadersInCheck: [x-ext-authz]}}
- name: by-grpc
  envoyExtAuthzGrpc: {{service: {HOST}, port: 9000}}
- name: nowhere
  envoyExtAuthzGrpc: {{service: other.example.org, port: 9000}}
"""


def mesh_config(providers: str = PROVIDERS) -> str:
    head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    extensionProviders:\n"
    return head + textwrap.indent(textwrap.dedent(providers).strip("\n"), "    ") + "\n"


def custom(provider: str, rules: str = "[{to: [{operation: {paths: [/headers]}}]}]", name: str = "ask") -> str:
    head = f"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}}}\n"
    return f"{head}spec: {{selector: {{matchLabels: {{app: web}}}}, action: CUSTOM, provider: {{name: {provider}}}, rules: {rules}}}\n"


def filters(*texts: str) -> list[dict[str, Any]]:
    view = view_of(AUTHZ, *texts)
    for url in ORDER:
        for resource in view.all(url):
            assert support.check(resource.message)[0] == []
    manager = listener(view, IN)["filter_chains"][0]["filters"][-1]["typed_config"]
    return list(manager["http_filters"])


def of(made: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(one["typed_config"] for one in made if one["name"] == name)


def problems(text: str) -> list[str]:
    store = Store()
    store.put("a.yaml", text.encode())
    store.settle()
    return [str(one.problem) for one in store.troubles]


def test_a_pair_of_filters_before_all_others():
    deny = custom("by-grpc", name="denied").replace("action: CUSTOM, provider: {name: by-grpc}", "action: DENY")
    made = filters(mesh_config(), custom("by-grpc"), deny)
    assert [one["name"] for one in made][:3] == [
        "envoy.filters.http.rbac.custom.by-grpc",
        "envoy.filters.http.ext_authz.by-grpc",
        "envoy.filters.http.rbac.deny",
    ]
    rbac = of(made, "envoy.filters.http.rbac.custom.by-grpc")
    assert rbac["shadow_rules_stat_prefix"] == "istio_ext_authz_"
    assert rbac["shadow_rules"]["action"] == "DENY"
    assert list(rbac["shadow_rules"]["policies"]) == ["istio-ext-authz-by-grpc-ns[default]-policy[ask]-rule[0]"]
    assert "rules" not in rbac
    asked = of(made, "envoy.filters.http.ext_authz.by-grpc")
    assert asked["grpc_service"] == {"envoy_grpc": {"cluster_name": GRPC, "authority": HOST}, "timeout": "600s"}
    assert asked["transport_api_version"] == "V3"
    assert asked["filter_enabled_metadata"] == {
        "filter": "envoy.filters.http.rbac",
        "path": [{"key": "istio_ext_authz_shadow_effective_policy_id"}],
        "value": {"string_match": {"prefix": "istio-ext-authz-by-grpc-ns["}},
    }


def test_all_that_a_provider_may_say():
    providers = f"""
    - name: by-http
      envoyExtAuthzHttp:
        service: {HOST}
        port: 8000
        timeout: 1.5s
        pathPrefix: /check
        failOpen: true
        statusOnError: '503'
        clearRouteCache: true
        includeRequestHeadersInCheck: [x-one, 'x-two*', '*-three']
        includeAdditionalHeadersInCheck: {{x-b: '2', x-a: '1'}}
        includeRequestBodyInCheck: {{maxRequestBytes: 100, allowPartialMessage: true, packAsBytes: true}}
        headersToUpstreamOnAllow: [x-up]
        headersToDownstreamOnDeny: [set-cookie]
        headersToDownstreamOnAllow: [x-ok]
    """
    asked = of(filters(mesh_config(providers), custom("by-http")), "envoy.filters.http.ext_authz.by-http")
    asked.pop("filter_enabled_metadata")
    asked.pop("@type")

    def exact(name: str) -> dict[str, Any]:
        return {"patterns": [{"exact": name, "ignore_case": True}]}

    assert asked == {
        "http_service": {
            "server_uri": {"uri": f"http://{HOST}", "cluster": HTTP, "timeout": "1.500s"},
            "path_prefix": "/check",
            "authorization_request": {"headers_to_add": [{"key": "x-a", "value": "1"}, {"key": "x-b", "value": "2"}]},
            "authorization_response": {
                "allowed_upstream_headers": exact("x-up"),
                "allowed_client_headers": exact("set-cookie"),
                "allowed_client_headers_on_success": exact("x-ok"),
            },
        },
        "transport_api_version": "V3",
        "failure_mode_allow": True,
        "clear_route_cache": True,
        "status_on_error": {"code": "ServiceUnavailable"},
        "with_request_body": {"max_request_bytes": 100, "allow_partial_message": True, "pack_as_bytes": True},
        "allowed_headers": {
            "patterns": [{"exact": "x-one", "ignore_case": True}, {"prefix": "x-two", "ignore_case": True}, {"suffix": "-three", "ignore_case": True}]
        },
    }


@pytest.mark.parametrize("provider", ["nobody", "nowhere"])
def test_who_cannot_be_asked_lets_nobody_in(provider):
    made = filters(mesh_config(), custom(provider))
    rbac = of(made, f"envoy.filters.http.rbac.custom.{provider}")
    assert rbac["rules"]["action"] == "DENY"
    assert list(rbac["rules"]["policies"]) == [f"istio-ext-authz-{provider}-ns[default]-policy[ask]-rule[0]-deny-due-to-bad-CUSTOM-action"]
    assert not any("ext_authz" in one["name"] for one in made)


def test_several_providers_have_a_pair_each():
    made = filters(mesh_config(), custom("by-http"), custom("by-grpc", name="other"), custom("by-grpc", name="more"))
    names = [one["name"] for one in made if "custom" in one["name"] or "ext_authz" in one["name"]]
    assert names == [f"envoy.filters.http.{kind}.{name}" for name in ("by-grpc", "by-http") for kind in ("rbac.custom", "ext_authz")]
    assert len(of(made, "envoy.filters.http.rbac.custom.by-grpc")["shadow_rules"]["policies"]) == 2


def test_without_rules_nothing_matches():
    made = filters(mesh_config(), custom("by-http", "[]"))
    (rule,) = of(made, "envoy.filters.http.rbac.custom.by-http")["shadow_rules"]["policies"].values()
    assert rule == {"permissions": [{"not_rule": {"any": True}}], "principals": [{"not_id": {"any": True}}]}


def test_other_workloads_ask_nobody():
    other = custom("by-http").replace("app: web", "app: other")
    assert not any("custom" in one["name"] for one in filters(mesh_config(), other))


def test_plain_connections():
    tcp = MESH.replace("ports: {http: 8000}", "ports: {tcp: 8000}")

    def chain(provider: str) -> list[dict[str, Any]]:
        view = Translator().view(WEB, snapshot(tcp, AUTHZ, mesh_config(), custom(provider, "[{to: [{operation: {ports: ['8000']}}]}]")))
        for resource in view.all(LISTENER):
            assert support.check(resource.message)[0] == []
        return list(listener(view, IN)["filter_chains"][0]["filters"])

    rbac, asked, _ = chain("by-grpc")
    assert rbac["typed_config"]["shadow_rules_stat_prefix"] == "istio_ext_authz_"
    assert asked["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"] == GRPC
    assert asked["typed_config"]["filter_enabled_metadata"]["filter"] == "envoy.filters.network.rbac"
    assert len(chain("by-http")) == 1, "who is asked by HTTP is not asked about connections"
    rbac, _ = chain("nobody")
    assert rbac["typed_config"]["rules"]["action"] == "DENY"


def test_grpc_servers_ask_nobody_and_deny():
    view = view_of(AUTHZ, mesh_config(), custom("by-grpc").replace("app: web", "app: reviews"), proxy=ProxyKey("grpc", "reviews-v1", "default"))
    for resource in view.all(LISTENER):
        assert "ext_authz." not in str(plain(view, LISTENER, resource.name)).replace("istio_ext_authz.", "")


def test_a_provider_needs_no_import():
    sidecar = "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {name: little}\nspec: {egress: [{hosts: ['./*']}]}\n"
    view = view_of(AUTHZ, mesh_config(), custom("by-grpc"), sidecar)
    names = {resource.name for url in ORDER for resource in view.all(url)}
    assert GRPC in names


@pytest.mark.parametrize(
    ("providers", "complaint"),
    [
        ("- {name: A, envoyExtAuthzGrpc: {service: a, port: 1}}", "data.mesh.extensionProviders[0].name: 'A' is no DNS label"),
        ("- {name: a, envoyExtAuthzGrpc: {service: a}}", "data.mesh.extensionProviders[0].envoyExtAuthzGrpc.port"),
        ("- {name: a, envoyExtAuthzGrpc: {service: a, port: 1, pathPrefix: /x}}", "data.mesh.extensionProviders[0].envoyExtAuthzGrpc.pathPrefix"),
        (
            "- {name: a, envoyExtAuthzHttp: {service: a, port: 1, pathPrefix: x}}",
            "data.mesh.extensionProviders[0].envoyExtAuthzHttp.pathPrefix: 'x' is no path",
        ),
        ("- {name: a, envoyExtAuthzHttp: {service: a, port: 1, statusOnError: '999'}}", "data.mesh.extensionProviders[0].envoyExtAuthzHttp.statusOnError"),
        (
            "- {name: a, envoyExtAuthzHttp: {service: a, port: 1, headersToUpstreamOnAllow: ['*']}}",
            "data.mesh.extensionProviders[0].envoyExtAuthzHttp.headersToUpstreamOnAllow[0]: a star alone",
        ),
        (
            "- {name: a, envoyExtAuthzHttp: {service: a, port: 1, includeRequestBodyInCheck: {}}}",
            "data.mesh.extensionProviders[0].envoyExtAuthzHttp.includeRequestBodyInCheck.maxRequestBytes",
        ),
        (
            "- {name: a, envoyExtAuthzGrpc: {service: a, port: 1}}\n- {name: a, envoyExtAuthzHttp: {service: a, port: 1}}",
            "data.mesh.extensionProviders: names must differ",
        ),
    ],
)
def test_mistakes(providers, complaint):
    found = problems(mesh_config(providers))
    assert any(one.startswith(complaint) for one in found), found


def test_dry_run_is_refused():
    text = custom("x").replace("{name: ask}", "{name: ask, annotations: {istio.io/dry-run: 'true'}}")
    assert any("dry-run of CUSTOM is not served" in one for one in problems(text))


def test_istios_sample_beside_the_application():
    sample = (Path(__file__).parents[1] / "data" / "istio_samples" / "extauthz" / "local-ext-authz.yaml").read_text()
    providers = """
    - {name: sample-ext-authz-http, envoyExtAuthzHttp: {service: ext-authz-http.local, port: 8000, includeRequestHeadersInCheck: [x-ext-authz]}}
    - {name: sample-ext-authz-grpc, envoyExtAuthzGrpc: {service: ext-authz-grpc.local, port: 9000}}
    """
    made = filters(sample, mesh_config(providers), custom("sample-ext-authz-http"), custom("sample-ext-authz-grpc", name="more"))
    assert of(made, "envoy.filters.http.ext_authz.sample-ext-authz-grpc")["grpc_service"]["envoy_grpc"]["cluster_name"] == "outbound|9000||ext-authz-grpc.local"
    service = of(made, "envoy.filters.http.ext_authz.sample-ext-authz-http")["http_service"]
    assert service["server_uri"]["cluster"] == "outbound|8000||ext-authz-http.local"
