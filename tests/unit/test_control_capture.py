"""Sidecars to which what their application opens is redirected: what they listen for, and where it goes."""

from __future__ import annotations

import pytest

from control.kinds.store import Store
from control.model.snapshot import build
from control.plan.loose import loose_ends
from control.translate.resource import CLUSTER, LISTENER, ROUTES
from control.translate.translator import Translator
from control.translate.workloads import asks
from tests.unit.control_help import MESH, WEB, cluster, istio, listener, plain, view_of

CAPTURED = """
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: web, labels: {app: web}}
spec: {sidecar: {capture: 15001}}
"""
WITHOUT = MESH.partition("---\napiVersion: meshproxy/v1\nkind: Workload\nmetadata: {name: web")[0]
DB = "{apiVersion: v1, kind: Service, metadata: {name: vip}, spec: {clusterIP: 10.0.0.9, ports: [{name: tcp, port: 3306}]}}"


def entry(hosts: str, ports: str, resolution: str = "NONE") -> str:
    return istio("ServiceEntry", "outside", f"{{hosts: [{hosts}], resolution: {resolution}, ports: [{ports}]}}")


def captured(*texts: str):
    """What `web` gets."""
    store = Store()
    for index, text in enumerate((WITHOUT.rstrip("-\n"), CAPTURED, *texts)):
        store.put(f"{index}.yaml", text.encode())
    store.settle()
    assert [str(one) for one in store.troubles] == []
    return Translator().view(WEB, build(store.objects))


def terminal(chain) -> str:
    """The cluster of a plain chain."""
    return chain["filters"][-1]["typed_config"]["cluster"]


@pytest.mark.parametrize(("mode", "to"), [("", "BlackHoleCluster"), ("REGISTRY_ONLY", "BlackHoleCluster"), ("ALLOW_ANY", "PassthroughCluster")])
def test_what_is_no_service_is_as_the_policy_says(mode, to):
    view = captured(*([istio("Sidecar", "default", f"{{outboundTrafficPolicy: {{mode: {mode}}}}}")] if mode else []))
    made = listener(view, "virtualOutbound")
    assert (made["address"]["socket_address"], made["use_original_dst"]) == ({"address": "0.0.0.0", "port_value": 15001}, True)
    direct, rest = made["filter_chains"]
    assert (direct["filter_chain_match"], terminal(direct)) == ({"destination_port": 15001}, "BlackHoleCluster")
    assert terminal(rest) == to
    assert view.get(CLUSTER, to) is not None


def test_requests_are_told_by_their_names_on_each_port():
    view = captured()
    made = listener(view, "0.0.0.0_9080")
    assert made["bind_to_port"] is False
    assert made["filter_chains"][0]["filters"][-1]["typed_config"]["rds"]["route_config_name"] == "captured.9080"
    hosts = {one["name"]: one["domains"] for one in plain(view, ROUTES, "captured.9080")["virtual_hosts"]}
    assert {"reviews", "reviews:9080", "10.0.0.1", "10.0.0.1:9080"} <= set(hosts["reviews.default.svc.cluster.local:9080"])
    assert hosts["block_all"] == ["*"]


def test_connections_are_told_by_their_addresses():
    """Without one, nothing says which are meant."""
    view = captured(DB)
    made = listener(view, "10.0.0.9_3306")
    assert (made["bind_to_port"], terminal(made["filter_chains"][-1])) == (False, "outbound|3306||vip.default.svc.cluster.local")
    assert {one.name for one in view.all(LISTENER)} == {"virtualOutbound", "0.0.0.0_9080", "10.0.0.9_3306"}


def test_what_is_resolved_by_nobody_goes_where_it_was_meant_to():
    texts = entry("a.test", "{number: 9999, name: tcp, protocol: TCP}")
    view = captured(texts)
    made = cluster(view, "outbound|9999||a.test")
    assert (made["type"], made["lb_policy"], "load_assignment" in made, "dns_lookup_family" in made) == ("ORIGINAL_DST", "CLUSTER_PROVIDED", False, False)
    assert terminal(listener(view, "0.0.0.0_9999")["filter_chains"][-1]) == "outbound|9999||a.test"
    assert cluster(view_of(texts), "outbound|9999||a.test")["type"] == "STRICT_DNS", "others resolve it"


def test_names_under_a_host():
    ports = "{number: 8081, name: http, protocol: HTTP}, {number: 443, name: tls, protocol: TLS}"
    view = captured(entry("'*.a.test'", ports))
    hosts = {one["name"]: one["domains"] for one in plain(view, ROUTES, "captured.8081")["virtual_hosts"]}
    assert hosts["*.a.test:8081"] == ["*.a.test", "*.a.test:8081"]
    chain, rest = listener(view, "0.0.0.0_443")["filter_chains"]
    assert (chain["filter_chain_match"], terminal(chain), terminal(rest)) == ({"server_names": ["*.a.test"]}, "outbound|443||*.a.test", "BlackHoleCluster")
    others = view_of(entry("'*.a.test'", ports))
    assert "*.a.test" not in str(plain(others, ROUTES, "http_proxy"))
    assert cluster(others, "outbound|8081||*.a.test")["type"] == "ORIGINAL_DST"


def test_tls_to_a_service_without_an_address_is_told_by_its_name():
    view = captured(entry("b.test", "{number: 443, name: tls, protocol: HTTPS}", "DNS"))
    chain, _ = listener(view, "0.0.0.0_443")["filter_chains"]
    assert (chain["filter_chain_match"], terminal(chain)) == ({"server_names": ["b.test"]}, "outbound|443||b.test")
    assert cluster(view, "outbound|443||b.test")["type"] == "STRICT_DNS"


def test_tls_to_where_it_was_meant_has_the_name_that_a_request_says():
    rule = istio("DestinationRule", "many", "{host: '*.a.test', trafficPolicy: {tls: {mode: SIMPLE}}}")
    made = cluster(captured(entry("'*.a.test'", "{number: 443, name: http, protocol: HTTP}"), rule), "outbound|443||*.a.test")
    options = made["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"]
    assert options["upstream_http_protocol_options"] == {"auto_sni": True, "auto_san_validation": True}
    assert "auto_host_sni" not in made["transport_socket"]["typed_config"]


def test_what_is_redirected_is_not_asked_for():
    both = CAPTURED.replace("capture: 15001", "capture: 15001, httpProxy: 15002, scope: observed")
    assert not asks(next(iter(workloads_of(both))))


def workloads_of(text: str) -> list:
    store = Store()
    store.put("a.yaml", text.encode())
    store.settle()
    return list(build(store.objects).workloads.values())


def test_a_sidecars_own_listeners_stay_beside():
    egress = "{egress: [{hosts: [./*], port: {number: 9080, protocol: HTTP}}, {hosts: [./*]}]}"
    view = captured(istio("Sidecar", "default", egress))
    assert {"127.0.0.1_9080", "0.0.0.0_9080"} <= {one.name for one in view.all(LISTENER)}
    assert {"9080", "captured.9080"} <= {one.name for one in view.all(ROUTES)}


def test_a_note_says_that_nobody_reaches_names_under_a_host():
    def notes(*texts: str) -> list[str]:
        store = Store()
        for index, text in enumerate(texts):
            store.put(f"{index}.yaml", text.encode())
        store.settle()
        return [what for _, what in loose_ends(store.objects, build(store.objects).config)]

    many = entry("'*.a.test'", "{number: 443, name: tls, protocol: TLS}")
    assert notes(many) == ["*.a.test is reached by sidecars with a capture only, and there is none"]
    assert notes(many, CAPTURED) == []


def test_a_port_is_taken_once():
    store = Store()
    store.put("a.yaml", CAPTURED.replace("capture: 15001", "capture: 15001, httpProxy: 15001").encode())
    store.settle()
    assert [str(one.problem) for one in store.troubles] == ["spec.sidecar.capture: the sidecar listens on 15001 already"]
