"""RequestAuthentication, and access by what is in tokens: what documents say, and what becomes of it."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import yaml

from control.kinds.store import Store
from control.translate.proxy import ProxyKey
from control.translate.resource import LISTENER, ORDER, ROUTES
from meshproxy.api import support
from meshproxy.api.rbac_engine import compile_rules
from meshproxy.http.filters import jwt_authn as jwt_filter
from tests.jwt_help import ISSUER, jwk, jwks, token
from tests.unit.control_help import GRPC_CLIENT, istio, plain, view_despite, view_of
from tests.unit.filter_help import Stream, context, proto
from tests.unit.test_control_kinds import complaints
from tests.unit.test_control_security import CALLED, CALLED_KEY, access, called, rbac

KEYS = jwks("rsa")
EDGE = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {istio: ingressgateway}}, spec: {sidecar: {identity: true}}}"
EDGE_KEY = ProxyKey("sidecar", "edge", "default")
GATEWAY = istio("Gateway", "gw", "{selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}")
API_GATEWAY = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: api}
spec: {gatewayClassName: istio, listeners: [{name: http, port: 8080, protocol: HTTP}]}
"""
API = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: api, labels: {gateway.networking.k8s.io/gateway-name: api}}}"
API_KEY = ProxyKey("sidecar", "api", "default")
AT_API = "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: api}]"


def tokens(spec: str, name: str = "t", namespace: str = "default") -> str:
    head = {"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": name, "namespace": namespace}}
    return json.dumps({**head, "spec": yaml.safe_load(spec)})


def rule(issuer: str = "issuer", **fields: Any) -> dict[str, Any]:
    return {"issuer": issuer, **({} if "jwksUri" in fields else {"jwks": KEYS}), **fields}


def rules(*some: dict[str, Any], **more: Any) -> str:
    return json.dumps({"jwtRules": list(some), **more})


def filters(listener: Any) -> list[Any]:
    """The HTTP filters of a listener's last chain."""
    return listener["filter_chains"][-1]["filters"][-1]["typed_config"]["http_filters"]


def jwt_authn(*documents: str) -> Any:
    """The filter's configuration in front of the workload that is called."""
    found = [one["typed_config"] for one in filters(called(*documents)) if "jwt" in one["name"]]
    assert len(found) < 2
    return found[0] if found else None


# --- RequestAuthentication


def test_one_issuer_may_be_missing_and_must_not_be_wrong():
    made = jwt_authn(tokens(rules(rule())))
    assert made["rules"] == [
        {"match": {"prefix": "/"}, "requires": {"requires_any": {"requirements": [{"provider_name": "origins-0"}, {"allow_missing": {}}]}}},
    ]
    assert made["bypass_cors_preflight"] is True
    assert made["providers"] == {
        "origins-0": {
            "issuer": "issuer",
            "local_jwks": {"inline_string": KEYS},
            "payload_in_metadata": "payload",
            "normalize_payload_in_metadata": {"space_delimited_claims": ["permission", "scope"]},
        }
    }


def test_several_issuers_are_in_order_and_may_share_a_place():
    made = jwt_authn(tokens(rules(rule("b"))), tokens(rules(rule("a")), "other", "istio-system"))
    assert [made["providers"][f"origins-{index}"]["issuer"] for index in range(2)] == ["a", "b"]
    one, other, both = made["rules"][0]["requires"]["requires_any"]["requirements"]
    assert (one, other) == ({"provider_name": "origins-0"}, {"provider_name": "origins-1"})
    assert [each["requires_any"]["requirements"][1] for each in both["requires_all"]["requirements"]] == [{"allow_missing": {}}] * 2


def test_all_that_a_rule_can_say():
    full = rule(
        audiences=["x"], fromHeaders=[{"name": "X-Token", "prefix": "T "}, {"name": "y"}], fromParams=["p"], fromCookies=["c"],
        outputPayloadToHeader="x-payload",
        forwardOriginalToken=True, outputClaimToHeaders=[{"header": "x-sub", "claim": "sub.x"}], spaceDelimitedClaims=["roles", "scope"],
    )  # fmt: skip
    provider = jwt_authn(tokens(rules(full)))["providers"]["origins-0"]
    assert {name: value for name, value in provider.items() if name not in ("issuer", "local_jwks", "payload_in_metadata")} == {
        "audiences": ["x"],
        "from_headers": [{"name": "X-Token", "value_prefix": "T "}, {"name": "y"}],
        "from_params": ["p"],
        "from_cookies": ["c"],
        "forward": True,
        "forward_payload_header": "x-payload",
        "claim_to_headers": [{"header_name": "x-sub", "claim_name": "sub.x"}],
        "normalize_payload_in_metadata": {"space_delimited_claims": ["permission", "roles", "scope"]},
    }


@pytest.mark.parametrize(
    ("uri", "cluster"),
    [
        ("http://reviews:9080/keys", "outbound|9080||reviews.default.svc.cluster.local"),
        ("http://reviews.default:9080/keys", "outbound|9080||reviews.default.svc.cluster.local"),
        ("http://reviews.default.svc:9080/", "outbound|9080||reviews.default.svc.cluster.local"),
        ("https://issuer.test/keys", "outbound|443||issuer.test"),
        ("http://nowhere.test/keys", "outbound|80||nowhere.test"),
    ],
)
def test_keys_from_afar_come_over_a_cluster_of_the_mesh(uri, cluster):
    entry = istio("ServiceEntry", "e", "{hosts: [issuer.test], ports: [{number: 443, name: https, protocol: HTTPS}], resolution: DNS}")
    remote = jwt_authn(entry, tokens(rules(rule(jwksUri=uri, timeout="1.5s"))))["providers"]["origins-0"]["remote_jwks"]
    assert remote == {"http_uri": {"uri": uri, "cluster": cluster, "timeout": "1.500s"}, "cache_duration": "300s"}


def test_who_is_meant():
    assert jwt_authn(tokens(rules(rule()), namespace="elsewhere")) is None
    assert jwt_authn(tokens(rules(rule(), selector={"matchLabels": {"app": "other"}}))) is None
    assert jwt_authn(tokens(rules(rule(), selector={"matchLabels": {"app": "reviews"}}))) is not None
    assert jwt_authn(tokens(rules())) is None


def test_tokens_are_verified_before_access_is_decided():
    policies = access("{rules: [{}]}"), access("{action: AUDIT, rules: [{}]}", "b"), access("{action: DENY, rules: [{}]}", "c")
    names = [one["name"] for one in filters(called(tokens(rules(rule())), *policies))]
    assert [name.removeprefix("envoy.filters.http.") for name in names] == ["jwt_authn", "rbac.audit", "rbac.deny", "rbac.allow", "fault", "router"]


def edge(key: ProxyKey, name: str, *documents: str) -> Any:
    return filters(plain(view_of(EDGE, GATEWAY, API_GATEWAY, API, *documents, proxy=key), LISTENER, name))


def test_gateways_have_policies_too():
    policies = tokens(rules(rule())), access("{rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}")
    for key, name in ((EDGE_KEY, "0.0.0.0_80"), (API_KEY, "0.0.0.0_8080")):
        first, second, *_ = edge(key, name, *policies)
        assert (first["name"], second["name"]) == ("envoy.filters.http.jwt_authn", "envoy.filters.http.rbac.allow")
        assert first["typed_config"]["providers"]["origins-0"]["clear_route_cache"] is True


def test_policies_for_one_gateway():
    policies = tokens(f"{{jwtRules: [{json.dumps(rule())}], {AT_API}}}"), access(f"{{{AT_API}, rules: [{{}}]}}")
    assert edge(API_KEY, "0.0.0.0_8080", *policies)[0]["name"] == "envoy.filters.http.jwt_authn"
    assert edge(API_KEY, "0.0.0.0_8080", *policies)[1]["name"] == "envoy.filters.http.rbac.allow"
    assert edge(EDGE_KEY, "0.0.0.0_80", *policies)[0]["name"] == "envoy.filters.http.cors"
    assert filters(called(API_GATEWAY, *policies))[0]["name"] == "envoy.filters.http.fault"


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (rules({"jwks": KEYS}), "spec.jwtRules[0].issuer: is needed"),
        (rules({"issuer": "x"}), "spec.jwtRules[0].issuer: 'x' is no http or https URL, so that it cannot be asked where its keys are"),
        (rules({"issuer": "x", "jwks": KEYS, "jwksUri": "http://a/"}), "spec.jwtRules[0].jwks: there is 'jwksUri' already"),
        (rules(rule(jwks="no")), "spec.jwtRules[0].jwks: holds no key that can be used"),
        (rules(rule(jwks='{"keys": []}')), "spec.jwtRules[0].jwks: holds no key that can be used"),
        (rules(rule(jwks=json.dumps({"keys": [jwk("rsa", n=None)]}))), "spec.jwtRules[0].jwks: holds no key that can be used"),
        (rules(rule(jwksUri="ftp://a/")), "spec.jwtRules[0].jwksUri: 'ftp://a/' is no http or https URL"),
        (rules(rule(jwksUri="http://a b/")), "spec.jwtRules[0].jwksUri: 'http://a b/' is no http"),
        (rules(rule(fromHeaders=[{"prefix": "x"}])), "spec.jwtRules[0].fromHeaders[0].name: is needed"),
        (rules(rule(outputPayloadToHeader="a b")), "spec.jwtRules[0].outputPayloadToHeader: 'a b' is no name of a header"),
        (rules(rule(outputClaimToHeaders=[{"header": "x"}])), "spec.jwtRules[0].outputClaimToHeaders[0].claim: is needed"),
        (rules(rule(timeout="soon")), "spec.jwtRules[0].timeout: must be a duration"),
        (rules(rule(what=1)), "spec.jwtRules[0].what: no such field"),
    ],
)
def test_mistakes(spec, complaint):
    found = complaints(tokens(spec))
    assert any(one.startswith(complaint) for one in found), found


# --- documents that are wrong from the start


def begun(*documents: str) -> list[Any]:
    """The HTTP filters in front of the workload that is called, when the control plane begins with a mistake in these documents."""
    return filters(plain(view_despite(CALLED, *documents, proxy=CALLED_KEY), LISTENER, "127.0.0.1_19000"))


async def answered(first: Any, head: Stream) -> int:
    """The status with which a jwt_authn filter ends a request; 0: it lets it pass."""
    config = proto("envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication", json.dumps({k: v for k, v in first["typed_config"].items() if k != "@type"}))
    verdict = jwt_filter.compile(config, context(clusters={})).request_headers(head, True)
    if inspect.isawaitable(verdict):
        verdict = await verdict
    return 0 if verdict is None else verdict.status


def bearing(text: str | None, *more: tuple[bytes, bytes], path: bytes = b"/") -> Stream:
    return Stream(path, [*([(b"authorization", f"Bearer {text}".encode())] if text is not None else []), *more])


WRONG = [rules(rule(ISSUER, what=1)), rules(rule(ISSUER, jwks="no")), "{jwtRulez: []}", "{jwtRules: 5}", "[]", rules(rule(ISSUER), selector=[])]


@pytest.mark.parametrize("spec", WRONG)
async def test_no_token_is_verified_by_what_is_wrong_from_the_start(spec):
    first = begun(tokens(spec))[0]
    assert await answered(first, bearing(token())) == 401
    assert await answered(first, bearing(token(iss="another"))) == 401
    assert await answered(first, bearing(None, path=b"/?access_token=" + token().encode())) == 401
    assert await answered(first, bearing(None)) == 0


@pytest.mark.parametrize("spec", WRONG)
async def test_policies_that_ask_for_tokens_match_nobody_then(spec):
    chain = begun(tokens(spec), access("{rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}"))
    assert [one["name"].removeprefix("envoy.filters.http.") for one in chain[:2]] == ["jwt_authn", "rbac.allow"]
    stream = bearing(token())
    assert await answered(chain[0], stream) == 401
    assert not stream.metadata
    engine = compile_rules(proto("envoy.config.rbac.v3.RBAC", json.dumps(chain[1]["typed_config"]["rules"])))
    assert not engine.allowed(engine.match(stream))


async def test_headers_that_were_to_come_from_tokens_come_from_nobody_then():
    made = rules(rule(ISSUER, what=1, outputPayloadToHeader="x-payload", outputClaimToHeaders=[{"header": "x-user", "claim": "sub"}, {"header": "a b"}, 7]))
    stream = bearing(None, (b"x-user", b"admin"), (b"x-payload", b"e30"), (b"x-other", b"stays"))
    assert await answered(begun(tokens(made))[0], stream) == 0
    assert [name for name, _ in stream.request.items if name.startswith(b"x-")] == [b"x-other"]


async def test_tokens_are_looked_for_where_the_wrong_document_has_them():
    places = {"fromHeaders": [{"name": "x-token", "prefix": "t "}, {"name": 5}], "fromParams": ["token", {}], "fromCookies": "none"}
    first = begun(tokens(rules(rule(ISSUER, what=1, **places))))[0]
    assert await answered(first, bearing(None, (b"x-token", b"t " + token().encode()))) == 401
    assert await answered(first, bearing(None, path=b"/?token=" + token().encode())) == 401
    assert await answered(first, bearing("of the application's own")) == 0


async def test_a_policy_that_is_right_verifies_its_tokens_beside_one_that_is_wrong():
    first = begun(tokens(rules(rule("another", what=1)), "wrong"), tokens(rules(rule(ISSUER)), "right"))[0]
    good = bearing(token())
    assert await answered(first, good) == 0
    assert await answered(first, bearing(token(iss="another"))) == 401


@pytest.mark.parametrize(
    ("spec", "served"),
    [
        (rules(rule(what=1), selector={"matchLabels": {"app": "x"}}), [({"app": "x"}, ())]),
        (rules(rule(what=1), selector={"matchLabels": {"app": 1}}), [(None, ())]),
        (rules(rule(what=1), targetRefs=[{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "api"}]), [(None, ("api",))]),
        (rules(rule(what=1), targetRef={"kind": "Gatway", "name": "api"}), [(None, ())]),
        (rules(rule(), targetRefs=[{"kind": "Service", "name": "a"}]), []),
    ],
)
def test_for_whom_a_wrong_document_stands(spec, served):
    store = Store()
    store.put("a.yaml", tokens(spec).encode())
    store.settle()
    assert [(one.selector, one.targets) for one in store.objects.values()] == served
    assert all(("[until it is right, no token is good there]" in str(one)) is bool(served) for one in store.troubles)


# --- access


def decide(spec: str, claims: dict[str, Any] | None) -> bool:
    """Whether an ALLOW lets a request with a token of these claims in, as our own RBAC sees it."""
    ((action, policies),) = rbac(access(spec))
    engine = compile_rules(proto("envoy.config.rbac.v3.RBAC", json.dumps({"action": action, "policies": policies})))
    stream = Stream()
    if claims is not None:
        stream.metadata["envoy.filters.http.jwt_authn"] = {"payload": claims}
    return engine.allowed(engine.match(stream))


ISS = "https://a.test/x"
CLAIMS = {"iss": ISS, "sub": "ann", "aud": ["one", "two"], "azp": "app", "groups": ["dev", "ops"], "nested": {"role": "admin"}, "scope": ["read", "write"]}


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("*", True), (f"{ISS}/ann", True), (f"{ISS}/bob", False), ("https://a.test/ann", False), (f"{ISS}/*", True),
        ("https://b.test/*", False), (f"{ISS}/a*", True),
        ("*/ann", True), ("*/bob", False), ("*x/ann", True), ("*y/ann", False),
        ("https*", True), ("http:*", False), ("*nn", True), ("ann", False), (ISS, False),
    ],
)  # fmt: skip
def test_request_principals(value, allowed):
    spec = f"{{rules: [{{from: [{{source: {{requestPrincipals: ['{value}']}}}}]}}]}}"
    assert decide(spec, CLAIMS) is allowed
    assert decide(spec, None) is False
    assert decide(spec.replace("requestPrincipals", "notRequestPrincipals"), CLAIMS) is not allowed
    assert decide(spec.replace("requestPrincipals", "notRequestPrincipals"), None) is True
    assert decide(f"{{rules: [{{when: [{{key: request.auth.principal, values: ['{value}']}}]}}]}}", CLAIMS) is allowed


@pytest.mark.parametrize(
    ("key", "values", "allowed"),
    [
        ("request.auth.audiences", "[one]", True), ("request.auth.audiences", "[three, two]", True), ("request.auth.audiences", "[three]", False),
        ("request.auth.presenter", "[app]", True), ("request.auth.presenter", "['a*']", True), ("request.auth.presenter", "[ap]", False),
        ("request.auth.claims[groups]", "[ops]", True), ("request.auth.claims[groups]", "[admin, 'd*']", True),
        ("request.auth.claims[groups]", "[admin]", False),
        ("request.auth.claims[nested][role]", "[admin]", True), ("request.auth.claims[nested][role]", "[user]", False),
        ("request.auth.claims[nested]", "['*']", False),
        ("request.auth.claims[scope]", "['*rite']", True), ("request.auth.claims[sub]", "['*']", True), ("request.auth.claims[none]", "['*']", False),
    ],
)  # fmt: skip
def test_claims(key, values, allowed):
    assert decide(f"{{rules: [{{when: [{{key: '{key}', values: {values}}}]}}]}}", CLAIMS) is allowed
    assert decide(f"{{rules: [{{when: [{{key: '{key}', notValues: {values}}}]}}]}}", CLAIMS) is not allowed
    assert decide(f"{{rules: [{{when: [{{key: '{key}', values: {values}}}]}}]}}", None) is False


def test_plain_connections_have_no_tokens():
    by_token = "rules: [{from: [{source: {requestPrincipals: ['*'], ipBlocks: ['10.0.0.0/8']}}], when: [{key: 'request.auth.claims[a]', values: [b]}]}]"
    assert rbac(access(f"{{{by_token}}}"), port=19001) == [("ALLOW", {})]
    ((action, policies),) = rbac(access(f"{{action: DENY, {by_token}}}"), port=19001)
    assert action == "DENY"
    assert [one["principals"] for one in policies.values()] == [[{"direct_remote_ip": {"address_prefix": "10.0.0.0", "prefix_len": 8}}]]
    assert jwt_authn(tokens(rules(rule()))) is not None
    assert "jwt" not in str(called(tokens(rules(rule())), port=19001))


def test_audit_only_notes():
    assert [action for action, _ in rbac(access("{action: AUDIT, rules: [{}]}"))] == ["LOG"]
    assert [action for action, _ in rbac(access("{action: AUDIT, rules: [{}]}"), port=19001)] == ["LOG"]


def test_a_dry_run_decides_nothing():
    tried = json.loads(access("{action: DENY, rules: [{}]}"))
    tried["metadata"]["annotations"] = {"istio.io/dry-run": "true"}
    for port in (19000, 19001):
        chain = called(json.dumps(tried), access("{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}", "real"), port=port)["filter_chains"][-1]
        found = chain["filters"][0]["typed_config"].get("http_filters", chain["filters"])[0]["typed_config"]
        assert list(found["shadow_rules"]["policies"]) == ["ns[default]-policy[a]-rule[0]"]
        assert list(found["rules"]["policies"]) == ["ns[default]-policy[real]-rule[0]"]
        assert found["shadow_rules_stat_prefix"] == "istio_dry_run_deny_"


# --- routes by claims


def by_claim(match: str) -> str:
    route = "route: [{destination: {host: reviews}}]"
    return istio("VirtualService", "v", f"{{hosts: ['*'], gateways: [gw], http: [{{match: [{match}], {route}}}, {{{route}}}]}}")


def claim_match(value: dict[str, Any], *path: str) -> dict[str, Any]:
    wanted = {"or_match": {"value_matchers": [{"list_match": {"one_of": value}}, value]}}
    return {"filter": "envoy.filters.http.jwt_authn", "path": [{"key": key} for key in ("payload", *path)], "value": wanted}


@pytest.mark.parametrize(
    ("match", "wanted", "headers"),
    [
        ("headers: {'@request.auth.claims.sub': {exact: ann}}", [claim_match({"string_match": {"exact": "ann"}}, "sub")], None),
        ("headers: {'@request.auth.claims.a.B': {prefix: x}}", [claim_match({"string_match": {"prefix": "x"}}, "a", "B")], None),
        ("headers: {'@request.auth.claims[a.b][c]': {exact: x}, y: {exact: z}}", [claim_match({"string_match": {"exact": "x"}}, "a.b", "c")], ["y"]),
        ("withoutHeaders: {'@request.auth.claims[a]': {exact: x}}", [claim_match({"string_match": {"exact": "x"}}, "a") | {"invert": True}], None),
    ],
)
def test_routes_by_claims(match, wanted, headers):
    view = view_of(EDGE, GATEWAY, by_claim(f"{{{match}}}"), proxy=EDGE_KEY)
    (host,) = plain(view, ROUTES, "http.80")["virtual_hosts"]
    first, second = host["routes"]
    assert first["match"].get("dynamic_metadata") == wanted
    assert [one["name"] for one in first["match"].get("headers", [])] == (headers or [])
    assert "dynamic_metadata" not in second["match"]


def test_grpc_clients_know_no_claims():
    spec = "{hosts: [reviews], http: [{match: [{headers: {'@request.auth.claims.sub': {exact: ann}}}], route: [{destination: {host: reviews}}]}]}"
    view = view_of(istio("VirtualService", "v", spec), proxy=GRPC_CLIENT)
    (host,) = plain(view, ROUTES, "outbound|9080||reviews.default.svc.cluster.local")["virtual_hosts"]
    (route,) = host["routes"]
    assert route["match"] == {"prefix": "/", "headers": [{"name": "@request.auth.claims.sub", "string_match": {"exact": "ann"}}]}  # which no request has


@pytest.mark.parametrize(
    ("match", "complaint"),
    [
        ("'@request.auth.claims': {exact: x}", "@request.auth.claims: is no claim"),
        ("'@request.auth.claims.a..b': {exact: x}", "@request.auth.claims.a..b: is no claim"),
        ("'@else': {exact: x}", "@else: is no claim"),
        ("'@request.auth.claims.a': {}", "@request.auth.claims.a: needs one of exact, prefix, regex"),
    ],
)
def test_mistakes_in_claims(match, complaint):
    found = complaints(by_claim(f"{{headers: {{{match}}}}}"))
    assert any(complaint in one for one in found), found


def test_all_of_it_is_valid_and_honoured_by_our_sidecar():
    full = rule(
        "b", audiences=["x"], fromHeaders=[{"name": "x", "prefix": "T "}], fromParams=["p"], fromCookies=["c"], jwksUri="http://reviews:9080/", timeout="1s"
    )
    more = rule("c", outputClaimToHeaders=[{"header": "x-sub", "claim": "sub"}], forwardOriginalToken=True, outputPayloadToHeader="x-payload")
    policy = access("{rules: [{from: [{source: {requestPrincipals: ['a/*', '*']}}], when: [{key: 'request.auth.claims[a][b]', values: [c, 'd*']}]}]}")
    for key in (CALLED_KEY, EDGE_KEY):
        routed = by_claim("{headers: {'@request.auth.claims[a][b]': {exact: x}}}")
        view = view_of(CALLED, EDGE, GATEWAY, routed, tokens(rules(rule(), full, more)), policy, access("{action: AUDIT, rules: [{}]}", "audit"), proxy=key)
        for url in ORDER:
            for resource in view.all(url):
                problems, _ = support.check(resource.message)
                assert not problems, resource
