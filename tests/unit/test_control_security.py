"""Mutual TLS and access: what policies say, and what becomes of it."""

from __future__ import annotations

import json

import pytest
import yaml

from control.model.security import Mtls, mtls_mode
from control.translate.proxy import ProxyKey
from control.translate.resource import LISTENER, ORDER
from meshproxy.api import support
from tests.unit.control_help import cluster, endpoints, plain, snapshot, view_of
from tests.unit.test_control_kinds import complaints

REVIEWS = "outbound|9080||reviews.default.svc.cluster.local"


def workload(name: str, account: str, sidecar: str, labels: str) -> str:
    return (
        f"{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: {name}, labels: {labels}}},"
        f" spec: {{serviceAccount: {account}, ports: {{http: 9000, tcp: 9001}}, sidecar: {sidecar}}}}}"
    )


CALLER = workload("caller", "caller", "{identity: true}", "{app: caller}")
CALLED = workload("called", "reviews", "{identity: true, inbound: [{port: 9000, listen: 19000}, {port: 9001, listen: 19001}]}", "{app: reviews, v: a}")
CALLER_KEY, CALLED_KEY = ProxyKey("sidecar", "caller", "default"), ProxyKey("sidecar", "called", "default")


def peers(spec: str = "{}", name: str = "p", namespace: str = "default") -> str:
    return f"{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"


def access(spec: str, name: str = "a", namespace: str = "default") -> str:
    head = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": name, "namespace": namespace}}
    return json.dumps({**head, "spec": yaml.safe_load(spec)})


def called(*texts: str, port: int = 19000):
    """The listener of a port of the workload that is called."""
    return plain(view_of(CALLED, *texts, proxy=CALLED_KEY), LISTENER, f"127.0.0.1_{port}")


# --- mutual TLS


def test_callers_speak_mutual_tls_to_those_who_take_it():
    view = view_of(CALLER, CALLED, proxy=CALLER_KEY)
    mutual, plain_one = cluster(view, REVIEWS)["transport_socket_matches"]
    assert mutual["match"] == {"tlsMode": "istio"}
    assert "match" not in plain_one or not plain_one["match"]
    tls = mutual["transport_socket"]["typed_config"]
    assert tls["sni"] == "outbound_.9080_._.reviews.default.svc.cluster.local"
    common = tls["common_tls_context"]
    assert common["alpn_protocols"] == ["istio"]
    names = common["combined_validation_context"]["default_validation_context"]["match_typed_subject_alt_names"]
    assert [one["matcher"]["exact"] for one in names] == ["spiffe://cluster.local/ns/default/sa/reviews"]
    found = {
        one["endpoint"]["address"]["socket_address"]["port_value"]: one["metadata"]["filter_metadata"].get("envoy.transport_socket_match")
        for group in endpoints(view, REVIEWS)["endpoints"]
        for one in group["lb_endpoints"]
    }
    assert found == {19080: None, 19081: None, 19000: {"tlsMode": "istio"}}


def test_callers_without_certificates_speak_plain():
    assert "transport_socket_matches" not in cluster(view_of(CALLED), REVIEWS)


def test_rules_of_callers_go_first():
    rule = "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: r}, spec: {host: reviews, trafficPolicy: {tls: {mode: DISABLE}}}}"
    made = cluster(view_of(CALLER, CALLED, rule, proxy=CALLER_KEY), REVIEWS)
    assert "transport_socket_matches" not in made
    assert "transport_socket" not in made


def test_by_default_a_port_takes_both():
    listener = called()
    mutual, plain_chain = listener["filter_chains"]
    assert mutual["filter_chain_match"]["transport_protocol"] == "tls"
    assert "istio" in mutual["filter_chain_match"]["application_protocols"]
    tls = mutual["transport_socket"]["typed_config"]
    assert tls["require_client_certificate"] is True
    names = tls["common_tls_context"]["combined_validation_context"]["default_validation_context"]["match_typed_subject_alt_names"]
    assert names[0]["matcher"] == {"prefix": "spiffe://cluster.local/"}
    assert "transport_socket" not in plain_chain
    assert listener["listener_filters"][0]["name"] == "envoy.filters.listener.tls_inspector"
    assert mutual["filters"][0]["typed_config"]["forward_client_cert_details"] == "APPEND_FORWARD"


def test_strict_and_disabled():
    (chain,) = called(peers("{mtls: {mode: STRICT}}"))["filter_chains"]
    assert chain["filter_chain_match"] == {"transport_protocol": "tls"}
    (chain,) = called(peers("{mtls: {mode: DISABLE}}"))["filter_chains"]
    assert "transport_socket" not in chain
    view = view_of(CALLER, CALLED, peers("{mtls: {mode: DISABLE}}"), proxy=CALLER_KEY)
    assert "envoy.transport_socket_match" not in str(endpoints(view, REVIEWS))


@pytest.mark.parametrize(
    ("policies", "mode"),
    [
        ([], Mtls.PERMISSIVE),
        ([peers("{mtls: {mode: STRICT}}", namespace="istio-system")], Mtls.STRICT),
        ([peers("{mtls: {mode: STRICT}}", namespace="istio-system"), peers("{mtls: {mode: DISABLE}}")], Mtls.DISABLE),
        ([peers("{mtls: {mode: STRICT}}", namespace="elsewhere")], Mtls.PERMISSIVE),
        ([peers("{mtls: {mode: STRICT}}"), peers("{selector: {matchLabels: {v: a}}, mtls: {mode: PERMISSIVE}}", "w")], Mtls.PERMISSIVE),
        ([peers("{mtls: {mode: STRICT}}"), peers("{selector: {matchLabels: {v: a}}, mtls: {mode: UNSET}}", "w")], Mtls.STRICT),
        ([peers("{mtls: {mode: STRICT}}"), peers("{selector: {matchLabels: {v: b}}, mtls: {mode: DISABLE}}", "w")], Mtls.STRICT),
        ([peers("{selector: {matchLabels: {v: a}}, mtls: {mode: STRICT}, portLevelMtls: {9000: {mode: DISABLE}}}")], Mtls.DISABLE),
        ([peers("{selector: {matchLabels: {v: a}}, mtls: {mode: STRICT}, portLevelMtls: {1: {mode: DISABLE}}}")], Mtls.STRICT),
    ],
)
def test_the_narrowest_policy_counts(policies, mode):
    config = snapshot(*policies).config
    assert mtls_mode(config.security.peer_authentication, "default", {"v": "a"}, 9000) is mode


# --- access


def rbac(*policies: str, port: int = 19000):
    """(action, policies) of the filters in front of a port."""
    chain = called(*policies, port=port)["filter_chains"][-1]
    filters = chain["filters"][0]["typed_config"].get("http_filters", chain["filters"])
    return [(one["typed_config"]["rules"].get("action", "ALLOW"), one["typed_config"]["rules"].get("policies", {})) for one in filters if "rbac" in one["name"]]


def test_no_policy_no_filter():
    assert rbac() == []
    assert rbac(access("{rules: [{}]}", namespace="elsewhere")) == []
    assert rbac(access("{selector: {matchLabels: {app: other}}, rules: [{}]}")) == []


def test_an_allow_of_nothing_and_one_of_everything():
    assert rbac(access("{}")) == [("ALLOW", {})]
    ((_, policies),) = rbac(access("{rules: [{}]}"))
    assert policies == {"ns[default]-policy[a]-rule[0]": {"permissions": [{"any": True}], "principals": [{"any": True}]}}


def test_deny_comes_first():
    found = rbac(access("{rules: [{}]}"), access("{action: DENY, rules: [{to: [{operation: {methods: [POST]}}]}]}", "d", "istio-system"))
    assert [action for action, _ in found] == ["DENY", "ALLOW"]


def test_all_that_a_rule_can_say():
    ((_, policies),) = rbac(
        access("""
        rules:
        - from:
          - source: {principals: ["cluster.local/ns/default/sa/web", "*/sa/x", "td/*"], notNamespaces: [evil]}
          - source: {ipBlocks: ["10.0.0.0/8"], notRemoteIpBlocks: ["10.1.2.3"]}
          to:
          - operation: {methods: [GET], paths: ["/api/*", "*.png", "/"], hosts: ["*.example.com"], notPorts: ["9001"]}
          when:
          - {key: "request.headers[x-user]", values: ["a*", "*"]}
          - {key: source.serviceAccount, notValues: [shop/web]}
          - {key: destination.port, values: ["9000"]}
        """)
    )
    (policy,) = policies.values()
    first, second = policy["principals"]
    principals, namespaces, headers, account = first["and_ids"]["ids"]
    assert [one["authenticated"]["principal_name"] for one in principals["or_ids"]["ids"]] == [
        {"exact": "spiffe://cluster.local/ns/default/sa/web"},
        {"safe_regex": {"regex": "spiffe://.*/sa/x"}},
        {"prefix": "spiffe://td/"},
    ]
    assert namespaces["not_id"]["authenticated"]["principal_name"]["safe_regex"]["regex"] == ".*/ns/evil/.*"
    assert [one["header"] for one in headers["or_ids"]["ids"]] == [
        {"name": "x-user", "string_match": {"prefix": "a"}},
        {"name": "x-user", "present_match": True},
    ]
    assert account["not_id"]["authenticated"]["principal_name"] == {"exact": "spiffe://cluster.local/ns/shop/sa/web"}
    assert second["and_ids"]["ids"][0] == {"direct_remote_ip": {"address_prefix": "10.0.0.0", "prefix_len": 8}}
    (permission,) = policy["permissions"]
    hosts, methods, paths, ports, port = permission["and_rules"]["rules"]
    assert hosts["header"]["string_match"] == {"suffix": ".example.com", "ignore_case": True}
    assert methods["header"] == {"name": ":method", "string_match": {"exact": "GET"}}
    assert [one["url_path"]["path"] for one in paths["or_rules"]["rules"]] == [{"prefix": "/api/"}, {"suffix": ".png"}, {"exact": "/"}]
    assert ports == {"not_rule": {"destination_port": 9001}}
    assert port == {"destination_port": 9000}


def test_plain_connections_have_no_methods():
    by_method = "rules: [{to: [{operation: {methods: [GET], ports: ['9001']}}]}]"
    assert rbac(access(f"{{{by_method}}}"), port=19001) == [("ALLOW", {})]
    ((action, policies),) = rbac(access(f"{{action: DENY, {by_method}}}"), port=19001)
    assert action == "DENY"
    assert [one["permissions"] for one in policies.values()] == [[{"destination_port": 9001}]]


def test_all_of_it_is_valid_and_honoured_by_our_sidecar():
    policy = access("{rules: [{from: [{source: {principals: ['*'], namespaces: [a]}}], to: [{operation: {paths: ['*'], methods: [GET]}}]}]}")
    for key in (CALLER_KEY, CALLED_KEY):
        view = view_of(CALLER, CALLED, policy, proxy=key)
        for url in ORDER:
            for resource in view.all(url):
                problems, _ = support.check(resource.message)
                assert not problems, resource


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (peers("{mtls: {mode: MAYBE}}"), "spec.mtls.mode: 'MAYBE' is not one of"),
        (peers("{portLevelMtls: {80: {mode: STRICT}}}"), "spec.portLevelMtls: needs a selector"),
        (access("{action: CUSTOM}"), "spec.provider: is required"),
        (access("{action: DENY, provider: {name: x}, rules: [{}]}"), "spec.provider: only the action CUSTOM asks somebody"),
        (access("{action: CUSTOM, provider: {}}"), "spec.provider.name"),
        (
            access("{action: CUSTOM, provider: {name: x}, rules: [{when: [{key: 'request.auth.claims[a]', values: [b]}]}]}"),
            "spec.rules[0]: what is in a token",
        ),
        (access("{action: DENY}"), "spec.rules: a DENY without rules denies nothing"),
        (access("{rules: [{from: [{source: {}}]}]}"), "spec.rules[0].from[0].source: at least one field is needed"),
        (access("{targetRef: {kind: Service, name: x}}"), "spec.targetRef.kind: Service of core is nothing that meshctl serves policies for"),
        (access("{selector: {matchLabels: {a: b}}, targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: x}]}"), "spec.selector: there are"),
        (access("{rules: [{from: [{source: {ipBlocks: [x]}}]}]}"), "spec.rules[0].from[0].source.ipBlocks[0]: 'x' is no IP address"),
        (access("{rules: [{to: [{operation: {ports: ['0']}}]}]}"), "spec.rules[0].to[0].operation.ports[0]: '0' is no port"),
        (access("{rules: [{when: [{key: a, values: [b]}]}]}"), "spec.rules[0].when[0].key: 'a' is not served"),
    ],
)
def test_mistakes(text, complaint):
    found = complaints(text)
    assert any(one.startswith(complaint) for one in found), found
