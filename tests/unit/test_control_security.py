"""Mutual TLS and access: what policies say, and what becomes of it."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from control.kinds.store import Store
from control.model.security import AuthorizationPolicy, Mtls, PeerAuthentication, mtls_mode
from control.translate.proxy import ProxyKey
from control.translate.resource import LISTENER, ORDER
from meshproxy.api import support
from tests.unit.control_help import cluster, endpoints, plain, snapshot, view_despite, view_of
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


# --- documents that are wrong from the start


def served_of(*texts: str, store: Store | None = None, name: str = "a.yaml") -> tuple[Store, list[tuple[str, int, dict | None]]]:
    """The policies of a file: action, how many rules, selector."""
    store = store or Store()
    store.put(name, "\n---\n".join(texts).encode())
    store.settle()
    found = [one for one in store.objects.values() if isinstance(one, AuthorizationPolicy)]
    return store, [(one.action, len(one.rules), one.selector) for one in found]


@pytest.mark.parametrize(
    ("spec", "served"),
    [
        ("{selector: {matchLabels: {app: a}}, rules: [{form: []}]}", [("ALLOW", 0, {"app": "a"})]),
        ("{selector: {matchLabels: {app: 5}}, rules: [{}]}", [("ALLOW", 0, None)]),
        ("{selector: {matchExpressions: []}, rules: [{}]}", [("ALLOW", 0, None)]),
        ("{selector: [], rules: [{}]}", [("ALLOW", 0, None)]),
        ("{action: DENY, selector: {matchLabels: {app: a}}, rules: [{to: [{operation: {pths: [/admin]}}]}]}", [("DENY", 1, {"app": "a"})]),
        ("{action: DENNY, rules: [{}]}", [("DENY", 1, None)]),
        ("{action: [], rulez: 1}", [("ALLOW", 0, None)]),
        ("{action: CUSTOM, provider: {nam: a}, rules: [{}]}", [("DENY", 1, None)]),
        ("{action: AUDIT, rulez: [{}]}", []),
        ("{targetRefs: [{kind: Service, name: a}], rules: [{}]}", []),
        ("[]", [("ALLOW", 0, None)]),
    ],
)
def test_a_policy_that_is_wrong_from_the_start_opens_nothing(spec, served):
    """A control plane that is started anew does not know what it said when it was right."""
    store, found = served_of(access(spec))
    assert found == served
    assert all(("lets nobody in" in str(one)) is bool(served) for one in store.troubles)
    assert store.troubles
    assert store.right == 0


def test_a_policy_that_is_only_tried_stands_in_for_nothing():
    tried = json.loads(access("{rulez: []}"))
    tried["metadata"]["annotations"] = {"istio.io/dry-run": "true"}
    assert served_of(json.dumps(tried))[1] == []


def test_what_stands_in_gives_way_to_what_is_right_wherever_it_is():
    wrong, right = access("{selector: {matchLabels: {app: a}}, rulez: []}"), access("{rules: [{}]}")
    store, found = served_of(wrong)
    assert found == [("ALLOW", 0, {"app": "a"})]
    assert served_of(wrong.replace('"a"}}', '"b"}}'), store=store)[1] == [("ALLOW", 0, {"app": "b"})]
    assert served_of(right, store=store, name="b.yaml")[1] == [("ALLOW", 1, None)]
    store.remove("b.yaml")
    store.settle()
    assert served_of(right, store=store)[1] == [("ALLOW", 1, None)]
    store, found = served_of(wrong, store=store)
    assert found == [("ALLOW", 1, None)]
    assert "last good state" in str(store.troubles[0])


def test_a_new_policy_that_is_wrong_changes_nothing_while_we_run():
    store, _ = served_of(access("{rules: [{}]}", "good"))
    assert served_of(access("{action: DENY, rulez: []}"), store=store, name="b.yaml")[1] == [("ALLOW", 1, None)]


def strict_peers(*specs: str, **where: str) -> tuple[Store, tuple[PeerAuthentication, ...]]:
    """What a control plane serves that begins with these PeerAuthentications, p0 and so on."""
    store = Store()
    store.put("a.yaml", "\n---\n".join(peers(spec, f"p{index}", **where) for index, spec in enumerate(specs)).encode())
    store.settle()
    return store, tuple(one for one in store.objects.values() if isinstance(one, PeerAuthentication))


OPEN = "{selector: {matchLabels: {v: a}}, mtls: {mode: PERMISSIVE}}"


@pytest.mark.parametrize(
    ("specs", "strict"),
    [
        (["{selector: {matchLabels: {v: a}}, mtls: {mode: STRICTLY}}"], {"a"}),
        (["{selector: {matchLabels: {v: a}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {9000: {mode: DISABLED}}}"], {"a"}),
        ([OPEN, "{selector: {matchLabels: {v: a}}, mtls: {modus: STRICT}}"], {"a"}),
        (["{mtls: {mode: STRICTLY}}"], {"a", "b"}),
        (["{mtls: {mode: STRICTLY}}", OPEN], {"b"}),
        (["{selector: {matchLabels: {v: 5}}, mtls: {mode: STRICT}}", OPEN], {"a", "b"}),
        (["{selector: [], mtls: {mode: DISABLE}}", OPEN], {"a", "b"}),
        (["{seletcor: {matchLabels: {v: a}}, mtls: {mode: STRICT}}", OPEN], {"a", "b"}),
        (["[]", OPEN], {"a", "b"}),
    ],
)
def test_a_peer_authentication_that_is_wrong_from_the_start_is_strict(specs, strict):
    store, found = strict_peers(*specs)
    assert {v for v in ("a", "b") if mtls_mode(found, "default", {"v": v}, 9000) is Mtls.STRICT} == strict
    assert mtls_mode(found, "elsewhere", {"v": "a"}, 9000) is Mtls.PERMISSIVE
    assert store.troubles
    assert all("[until it is right, mutual TLS is STRICT there]" in str(one) for one in store.troubles)


@pytest.mark.parametrize(("spec", "where"), [("{mtls: {mode: X}}", Mtls.STRICT), ("{selector: 1}", Mtls.STRICT), (OPEN.replace("P", "X"), Mtls.PERMISSIVE)])
def test_one_of_the_mesh_that_is_wrong_from_the_start_is_strict_where_no_other_is(spec, where):
    _, found = strict_peers(spec, namespace="istio-system")
    assert mtls_mode(found, "default", {"v": "a"}, 9000) is where
    _, narrower = strict_peers("{mtls: {mode: DISABLE}}")
    assert mtls_mode((*found, *narrower), "default", {"v": "a"}, 9000) is Mtls.DISABLE


def test_a_peer_authentication_that_was_right_stays_as_it_was():
    store, _ = strict_peers("{mtls: {mode: DISABLE}}")
    store.put("a.yaml", peers("{mtls: {mode: X}}", "p0").encode())
    store.settle()
    assert [one.mode for one in store.objects.values()] == [Mtls.DISABLE]
    store.put("b.yaml", peers("{mtls: {mode: X}}", "new").encode())
    store.settle()
    assert len(store.objects) == 1


def test_listeners_are_strict_where_a_policy_is_wrong_from_the_start():
    listener = plain(view_despite(CALLED, peers("{mtls: {mode: X}}"), proxy=CALLED_KEY), LISTENER, "127.0.0.1_19000")
    (chain,) = listener["filter_chains"]
    assert chain["filter_chain_match"] == {"transport_protocol": "tls"}


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
    assert ports == {"not_rule": {"destination_port": 0}}, "another port of the application: it is not this one"
    assert port == {"destination_port": 19000}, "where the sidecar has it"


def test_templates_of_paths():
    ((_, policies),) = rbac(access("{rules: [{to: [{operation: {paths: ['/a.b/{*}/c/{**}', '/plain*']}}]}]}"))
    ((permission,),) = [policy["permissions"] for policy in policies.values()]
    template, plain_one = [one["url_path"]["path"] for one in permission["or_rules"]["rules"]]
    assert plain_one == {"prefix": "/plain"}
    pattern = template["safe_regex"]["regex"]
    for path, matches in (
        ("/a.b/x/c/", True),
        ("/a.b/x/c/y/z", True),
        ("/a.b/x/y/c/z", False),
        ("/a.b//c/z", False),
        ("/a-b/x/c/z", False),
        ("/a.b/x/c", False),
    ):
        assert bool(re.fullmatch(pattern, path)) is matches, path
    for path, why in (
        ("/a/{**}/b", "nothing can come after {**}"),
        ("/a/{name}", "'{name}' is neither plain text, nor {*} for one segment of the path, nor {**} for the rest of it"),
        ("/{*}x", "'{*}x' is neither plain text"),
        ("/{*}/*", "'*' is neither plain text"),
    ):
        (complaint,) = complaints(access(f"{{rules: [{{to: [{{operation: {{notPaths: ['{path}']}}}}]}}]}}"))
        assert complaint.startswith(f"spec.rules[0].to[0].operation.notPaths[0]: {why}")


def test_plain_connections_have_no_methods():
    by_method = "rules: [{to: [{operation: {methods: [GET], ports: ['9001']}}]}]"
    assert rbac(access(f"{{{by_method}}}"), port=19001) == [("ALLOW", {})]
    ((action, policies),) = rbac(access(f"{{action: DENY, {by_method}}}"), port=19001)
    assert action == "DENY"
    assert [one["permissions"] for one in policies.values()] == [[{"destination_port": 19001}]]


@pytest.mark.parametrize(
    ("number", "seen"),
    [
        ("9000", 19000),  # the application's
        ("9080", 19000),  # the service's, which names no other
        ("19000", 19000),  # the sidecar's
        ("9001", 0),  # another one's
        ("19001", 19001),  # that of nobody who comes here
    ],
)
def test_policies_mean_ports_of_the_application(number, seen):
    ((_, policies),) = rbac(access(f"{{action: DENY, rules: [{{to: [{{operation: {{ports: ['{number}']}}}}]}}]}}"))
    assert [one["permissions"] for one in policies.values()] == [[{"destination_port": seen}]]


def test_a_port_of_one_that_is_the_sidecars_of_another():
    mixed = workload("called", "reviews", "{inbound: [{port: 9000, listen: 9001}, {port: 9001, listen: 9000}]}", "{app: reviews, v: a}")
    policy = access("{rules: [{to: [{operation: {ports: ['9001']}}]}]}")
    for port, seen in ((9001, 0), (9000, 9000)):
        listener = plain(view_of(mixed, policy, proxy=CALLED_KEY), LISTENER, f"127.0.0.1_{port}")
        assert f"'destination_port': {seen}}}" in str(listener)


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
        (access("{rules: [{from: [{source: {principals: []}}]}]}"), "spec.rules[0].from[0].source: at least one field is needed"),
        (access("{rules: [{to: [{operation: {paths: [], methods: []}}]}]}"), "spec.rules[0].to[0].operation: at least one field is needed"),
        (access("{rules: [{from: []}]}"), "spec.rules[0].from: must not be empty"),
        (access("{rules: [{to: []}]}"), "spec.rules[0].to: must not be empty"),
        (access("{rules: [{when: []}]}"), "spec.rules[0].when: must not be empty"),
        (
            access("{rules: [{from: [{source: {notPrincipals: ['spiffe://a.test/ns/b/sa/c']}}]}]}"),
            "spec.rules[0].from[0].source.notPrincipals[0]: must begin with the trust domain, 'a.test/ns/b/sa/c'",
        ),
        (
            access("{rules: [{when: [{key: source.principal, values: ['spiffe://a']}]}]}"),
            "spec.rules[0].when[0].values[0]: must begin with the trust domain, 'a'",
        ),
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
