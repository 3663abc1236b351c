"""EnvoyFilters through our control plane: the real Envoy and our own sidecar take what they make, and do it."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import fetch
from tests.e2e.proxy import wait_until
from tests.e2e.test_control_traffic import Mesh

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

HCM = "envoy.filters.network.http_connection_manager"
T = "type.googleapis.com/envoy.extensions.filters.http"


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Mesh(tmp_path, request.param)
    yield made
    made.close()


def document(name: str, *patches: str) -> str:
    meta = {"name": name, "namespace": "istio-system"}
    spec = {"workloadSelector": {"labels": {"app": "web"}}, "configPatches": [yaml.safe_load(one) for one in patches]}
    return json.dumps({"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter", "metadata": meta, "spec": spec})


def test_patches_happen_and_go(mesh):
    edge = mesh.sidecar()
    header = "{header: {key: x-patched, value: 'yes'}}"
    headers = document(
        "headers",
        f"""
        applyTo: HTTP_FILTER
        match: {{context: SIDECAR_OUTBOUND, listener: {{filterChain: {{filter: {{name: {HCM}, subFilter: {{name: envoy.filters.http.router}}}}}}}}}}
        patch:
          operation: INSERT_BEFORE
          value: {{name: headers, typed_config: {{"@type": {T}.header_mutation.v3.HeaderMutation, mutations: {{request_mutations: [{{append: {header}}}]}}}}}}
        """,
        """
        applyTo: HTTP_ROUTE
        match: {context: SIDECAR_OUTBOUND, routeConfiguration: {vhost: {name: "reviews.default.svc.cluster.local:9080"}}}
        patch: {operation: INSERT_FIRST, value: {name: own, match: {path: /teapot}, direct_response: {status: 418}}}
        """,
        """
        applyTo: CLUSTER
        match: {cluster: {service: reviews.default.svc.cluster.local}}
        patch: {operation: MERGE, value: {connect_timeout: 0.25s, alt_stat_name: patched}}
        """,
        """
        applyTo: CLUSTER
        match: {context: SIDECAR_OUTBOUND}
        patch: {operation: ADD, value: {name: own, type: STATIC, connect_timeout: 1s, load_assignment: {cluster_name: own}}}
        """,
        """
        applyTo: LISTENER
        match: {context: SIDECAR_INBOUND}
        patch: {operation: MERGE, value: {per_connection_buffer_limit_bytes: 32768}}
        """,
        """
        applyTo: FILTER_CHAIN
        match: {context: SIDECAR_INBOUND}
        patch: {operation: MERGE, value: {transport_socket_connect_timeout: 3s}}
        """,
        """
        applyTo: VIRTUAL_HOST
        match: {context: SIDECAR_OUTBOUND}
        patch: {operation: MERGE, value: {response_headers_to_add: [{header: {key: x-host, value: patched}}]}}
        """,
    )
    mesh.write("patches.yaml", headers)
    wait_until(lambda: fetch(mesh.port)[1]["headers"].get("x-patched") == "yes")
    wait_until(lambda: fetch(mesh.port, "/teapot")[0] == 418)
    wait_until(lambda: fetch(mesh.port)[0] == 200 and edge.stat("cluster.patched.upstream_rq_total") > 0)  # the old one serves until the new one is warm
    assert "own::" in edge.admin("GET", "/clusters")[1]
    status = mesh.control.status("web.default")
    assert [status[column] for column in ("CDS", "EDS", "LDS", "RDS")] == ["SYNCED"] * 4
    (mesh.folder / "patches.yaml").unlink()
    wait_until(lambda: "x-patched" not in fetch(mesh.port)[1]["headers"])
    wait_until(lambda: fetch(mesh.port, "/teapot")[0] == 200)


def test_istios_sample_of_a_local_rate_limit(mesh):
    """Its filter is a TypedStruct, and its limit stands at the routes of an inbound listener."""
    from tests.unit.test_control_istio_samples import SAMPLES

    edge = mesh.sidecar()
    text = (SAMPLES / "ratelimit/local-rate-limit-service.yaml").read_text()
    inbound = f"inbound|http|{mesh.services['v1'].port}"
    limited = text.replace("app: productpage", "app: web").replace("inbound|http|8000", inbound).replace("max_tokens: 10\n", "max_tokens: 2\n")
    mesh.write("limit.yaml", limited.replace("tokens_per_fill: 10\n", "tokens_per_fill: 2\n"))
    wait_until(lambda: edge.stat("listener_manager.listener_modified") > 0 or edge.stat("listener_manager.listener_in_place_updated") > 0)
    wait_until(lambda: fetch(mesh.inbound, "/productpage")[0] == 429)
    assert fetch(mesh.inbound, "/other")[0] == 200  # a hundred of them are allowed


def test_listener_filters_and_extensions_by_discovery(mesh):
    web = mesh.sidecar()
    assert fetch(mesh.port)[0] == 200
    header = "{header: {key: x-later, value: 'yes'}}"
    source = "{ads: {}, resource_api_version: V3}"
    mesh.write(
        "patches.yaml",
        document(
            "later",
            f"""
            applyTo: EXTENSION_CONFIG
            match: {{context: SIDECAR_OUTBOUND}}
            patch:
              operation: ADD
              value: {{name: later, typed_config: {{"@type": {T}.header_mutation.v3.HeaderMutation, mutations: {{request_mutations: [{{append: {header}}}]}}}}}}
            """,
            f"""
            applyTo: HTTP_FILTER
            match: {{context: SIDECAR_OUTBOUND, listener: {{filterChain: {{filter: {{name: {HCM}, subFilter: {{name: envoy.filters.http.router}}}}}}}}}}
            patch:
              operation: INSERT_BEFORE
              value: {{name: later, config_discovery: {{config_source: {source}, type_urls: ["{T}.header_mutation.v3.HeaderMutation"]}}}}
            """,
            """
            applyTo: LISTENER_FILTER
            match: {context: SIDECAR_OUTBOUND}
            patch:
              operation: ADD
              value: {name: http, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector}}
            """,
        ),
    )
    wait_until(lambda: fetch(mesh.port)[1].get("headers", {}).get("x-later") == "yes")
    wait_until(lambda: fetch(mesh.port)[0] == 200 and web.stat("http_inspector.http11_found") > 0)
    assert web.stat("listener_manager.lds.update_rejected") == 0
