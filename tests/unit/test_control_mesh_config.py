"""The MeshConfig as Istio's installations write it: what is honoured, what says nothing here, and what is refused."""

from __future__ import annotations

import re

import pytest

from control.kinds import registry
from control.kinds.store import Store
from control.model.sidecar import Unknown
from control.model.snapshot import build
from control.model.telemetry import MeshConfig
from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, LISTENER, ROUTES
from control.translate.translator import Translator
from tests.unit.control_help import MESH, cluster, endpoints, istio, listener, plain, routes, snapshot, view_despite, view_of
from tests.unit.test_control_security import CALLED, CALLED_KEY, CALLER, CALLER_KEY, access, peers, rbac
from tests.unit.test_control_telemetry import DEFAULT, PROVIDER, mesh_config, problems, tags, tracing

AS_INSTALLED = """
accessLogFile: /dev/stdout
defaultConfig:
  discoveryAddress: istiod.istio-system.svc:15012
  concurrency: 2
  drainDuration: 45s
  holdApplicationUntilProxyStarts: true
  image: {imageType: distroless}
  meshId: mesh1
  proxyMetadata: {ISTIO_META_DNS_CAPTURE: "true"}
  proxyStatsMatcher: {inclusionRegexps: [".*"]}
  gatewayTopology: {numTrustedProxies: 0}
  tracing: {}
defaultProviders: {metrics: [prometheus]}
defaultServiceExportTo: ["*"]
defaultVirtualServiceExportTo: ["*"]
defaultDestinationRuleExportTo: ["*"]
connectTimeout: 10s
dnsRefreshRate: 60s
enableAutoMtls: true
enablePrometheusMerge: true
enableTracing: true
h2UpgradePolicy: DO_NOT_UPGRADE
inboundTrafficPolicy: {mode: PASSTHROUGH}
ingressClass: istio
ingressControllerMode: STRICT
ingressSelector: ingressgateway
ingressService: istio-ingressgateway
localityLbSetting: {enabled: true}
meshMTLS: {minProtocolVersion: TLSV1_2}
outboundTrafficPolicy: {mode: ALLOW_ANY}
pathNormalization: {normalization: BASE}
protocolDetectionTimeout: 0.100s
proxyListenPort: 15001
rootNamespace: istio-system
trustDomain: cluster.local
trustDomainAliases: [old.example]
extensionProviders:
- {name: otel, opentelemetry: {service: otel.example.org, port: 4317}}
"""


def config_of(text: str, trust_domain: str = "cluster.local") -> tuple[list[str], MeshConfig | None]:
    """What is wrong with a MeshConfig, and what is served of it."""
    store = Store(trust_domain)
    store.put("a.yaml", mesh_config(text).encode())
    store.settle()
    found = [one for one in store.objects.values() if isinstance(one, MeshConfig)]
    return [str(one.problem) for one in store.troubles], found[0] if found else None


def test_what_an_installation_writes_is_taken():
    found, made = config_of(AS_INSTALLED)
    assert found == []
    assert made is not None
    assert (made.unknown, made.trust_domain, made.aliases) == (Unknown.ALLOW_ANY, "cluster.local", ("old.example",))
    assert list(made.providers) == ["otel"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rootNamespace: Mesh", "rootNamespace: 'Mesh' is no name of a namespace"),
        ("proxyHttpPort: 15002", "proxyHttpPort: "),
        ("connectTimeout: 0s", "connectTimeout: "),
        ("dnsRefreshRate: 0s", "dnsRefreshRate: "),
        ("enableEnvoyAccessLogService: true", "enableEnvoyAccessLogService: "),
        ("h2UpgradePolicy: MAYBE", "h2UpgradePolicy: "),
        ("defaultServiceExportTo: [a/b]", "defaultServiceExportTo[0]: 'a/b' is neither a namespace, nor one of *, ., ~"),
        ("meshMTLS: {minProtocolVersion: TLSV1_1}", "meshMTLS.minProtocolVersion: "),
        ("meshMTLS: {cipherSuites: [a]}", "meshMTLS.cipherSuites[0]: 'a' is not one of"),
        ("meshMTLS: {ecdhCurves: [P-256]}", "meshMTLS.ecdhCurves: "),
        ("tlsDefaults: {ecdhCurves: [a]}", "tlsDefaults.ecdhCurves[0]: 'a' is not one of P-256"),
        ("tlsDefaults: {ecdhCurves: [P-256, P-384]}", "tlsDefaults.ecdhCurves: our sidecar can be held to one curve"),
        ("pathNormalization: {normalization: SOME}", "pathNormalization.normalization: "),
        ("localityLbSetting: {failover: [{from: a}]}", "localityLbSetting.failover[0].to: "),
        ("zoneAwareLbSetting: {distribute: []}", "zoneAwareLbSetting.distribute: "),
        ("tcpKeepalive: {tme: 10s}", "tcpKeepalive.tme: "),
        ("defaultHttpRetryPolicy: {attempt: 1}", "defaultHttpRetryPolicy.attempt: "),
        ("defaultTrafficPolicy: {tls: {mode: SIMPLE}}", "defaultTrafficPolicy.tls: "),
        ("caCertificates: [{pem: a}]", "caCertificates: "),
        ("discoverySelectors: [{matchLabels: {a: b}}]", "discoverySelectors: "),
        ("defaultConfig: {gatewayTopology: {numTrustedProxies: -1}}", "defaultConfig.gatewayTopology.numTrustedProxies: "),
        ("defaultConfig: {gatewayTopology: {forwardClientCertDetails: ALL}}", "defaultConfig.gatewayTopology.forwardClientCertDetails: "),
        ("defaultConfig: {tracing: {zipkin: {address: 'zipkin:9411'}}}", "defaultConfig.tracing.zipkin: spans go to a provider"),
        ("defaultConfig: {tracing: {maxPathTagLength: 100}}", "defaultConfig.tracing.maxPathTagLength: maxTagLength"),
        ("defaultConfig: {runtimeValues: {a: b}}", "defaultConfig.runtimeValues: "),
        ("trustDomainAliases: [a/b]", "trustDomainAliases[0]: 'a/b' is no trust domain"),
        ("trustDomain: other.example", "trustDomain: 'other.example' is not the one that is served, cluster.local: see --trust-domain"),
        ("enableAutoMTLS: true", "enableAutoMTLS: no such field; did you mean 'enableAutoMtls'?"),
        ("accessLogEncoding: JSON\naccessLogFormat: '[1]'", "accessLogFormat: must be a mapping"),
        ("accessLogEncoding: JSON\naccessLogFormat: '{a: 1}'", "accessLogFormat: must be a mapping"),
    ],
)
def test_what_would_change_the_mesh_is_refused_with_its_place(text, why):
    found, made = config_of(text)
    assert len(found) == 1
    assert found[0].startswith(f"data.mesh.{why}")
    assert made is None


def test_tracers_say_nothing_where_nothing_is_traced():
    assert config_of("enableTracing: false\ndefaultConfig: {tracing: {zipkin: {address: 'zipkin:9411'}}}")[0] == []


def test_the_trust_domain_is_only_checked_where_it_is_known():
    assert problems(mesh_config("trustDomain: other.example")) == []
    assert config_of("trustDomain: other.example", "other.example")[0] == []
    document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": "trustDomain: a"}}
    assert [one.path for one in registry.parse(document, pruned=True, trust_domain="b")[1]] == ["data.mesh.trustDomain"]
    store = Store("b")
    store.place("x", store.read_object("x", "1", document))
    store.settle()
    assert [one.problem.path for one in store.troubles] == ["data.mesh.trustDomain"]


def test_a_refused_field_opens_nothing():
    """Who was to be asked is denied, and what is not in the mesh is reached by nobody."""
    refused = mesh_config(
        "connectTimeout: x\noutboundTrafficPolicy: {mode: ALLOW_ANY}\nextensionProviders: [{name: g, envoyExtAuthzGrpc: {service: g, port: 1}}]"
    )
    asking = access("{action: CUSTOM, provider: {name: g}, rules: [{}]}")
    made = plain(view_despite(CALLED, asking, refused, proxy=CALLED_KEY), LISTENER, "127.0.0.1_19000")
    filters = [one for chain in made["filter_chains"] for one in chain["filters"][-1]["typed_config"]["http_filters"]]
    assert [one["typed_config"]["rules"].get("action", "ALLOW") for one in filters if "rbac" in one["name"]] == ["DENY"] * len(made["filter_chains"])
    store = Store("cluster.local")
    store.put("a.yaml", refused.encode())
    store.settle()
    assert build(store.objects).config.telemetry.mesh.unknown is None


@pytest.mark.parametrize(
    ("action", "fields", "grows"),
    [
        ("DENY", "principals", True), ("ALLOW", "principals", False), ("DENY", "notPrincipals", False), ("ALLOW", "notPrincipals", True),
        ("AUDIT", "principals", True),
    ],
)  # fmt: skip
def test_aliases_of_what_is_refused_from_the_start_let_in_fewer(action, fields, grows):
    policy = access(f"{{action: {action}, rules: [{{from: [{{source: {{{fields}: [old.example/ns/a/sa/b]}}}}]}}]}}")
    refused = mesh_config("connectTimeout: x\ntrustDomainAliases: [old.example, 5]")
    made = plain(view_despite(CALLED, policy, refused, proxy=CALLED_KEY), LISTENER, "127.0.0.1_19000")
    assert ("spiffe://cluster.local/ns/a/sa/b" in str(made["filter_chains"][-1]["filters"])) is grows


@pytest.mark.parametrize("text", ["connectTimeout: x", "trustDomainAliases: 5", "[1", "[1]", "trustDomainAliases: [5]", "rootNamespace: 5", "a: [", "''"])
def test_without_what_makes_a_mesh_stricter_nothing_stands_in(text):
    found, made = config_of(text)
    assert found
    assert made is None


def test_what_makes_a_mesh_stricter_counts_also_while_the_rest_is_refused():
    """A policy of the namespace that is for all, and what policies see of paths."""
    strict = "rootNamespace: mesh\npathNormalization: {normalization: MERGE_SLASHES}\nmeshMTLS: {minProtocolVersion: TLSV1_3}\nconnectTimeout: x"
    made = plain(view_despite(CALLED, mesh_config(strict), access("{}", namespace="mesh"), proxy=CALLED_KEY), LISTENER, "127.0.0.1_19000")
    manager = made["filter_chains"][-1]["filters"][-1]["typed_config"]
    assert manager["merge_slashes"] is True
    assert [one["typed_config"]["rules"] for one in manager["http_filters"] if "rbac" in one["name"]] == [{}], "nobody is let in"
    params = made["filter_chains"][0]["transport_socket"]["typed_config"]["common_tls_context"]["tls_params"]
    assert params == {"tls_minimum_protocol_version": "TLSv1_3"}


def test_it_is_said_what_stands_in():
    store = Store()
    store.put("a.yaml", mesh_config("connectTimeout: x\ntrustDomainAliases: [old.example]").encode())
    store.settle()
    assert "[until it is right, of it only rootNamespace, pathNormalization, meshMTLS.minProtocolVersion, and, against" in str(store.troubles[0])
    assert store.right == 0


# --- what is honoured


ALIASES = mesh_config("trustDomainAliases: [old.example]")
BOTH = ["spiffe://cluster.local/ns/a/sa/b", "spiffe://old.example/ns/a/sa/b"]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("old.example/ns/a/sa/b", BOTH),
        ("cluster.local/ns/a/sa/b", BOTH),
        ("other.example/ns/a/sa/b", ["spiffe://other.example/ns/a/sa/b"]),
    ],
)
@pytest.mark.parametrize("rule", ["{{from: [{{source: {{principals: [{0}]}}}}]}}", "{{when: [{{key: source.principal, values: [{0}]}}]}}"])
def test_principals_of_an_alias_are_those_of_the_trust_domain(said, meant, rule):
    policy = access(f"{{action: DENY, rules: [{rule.format(said)}]}}")
    (principal,) = next(iter(rbac(policy, ALIASES)[0][1].values()))["principals"]
    found = principal.get("or_ids", {"ids": [principal]})["ids"]
    assert [one["authenticated"]["principal_name"]["exact"] for one in found] == meant


@pytest.mark.parametrize("rule", ["{from: [{source: {serviceAccounts: [a/b]}}]}", "{when: [{key: source.serviceAccount, values: [a/b]}]}"])
def test_a_service_account_is_that_of_an_alias_too(rule):
    (principal,) = next(iter(rbac(access(f"{{action: DENY, rules: [{rule}]}}"), ALIASES)[0][1].values()))["principals"]
    assert [one["authenticated"]["principal_name"]["exact"] for one in principal["or_ids"]["ids"]] == BOTH


def test_peers_may_have_names_of_an_alias():
    def names(view, url: str, name: str) -> list[str]:
        found = re.findall(r"'(?:exact|prefix)': '(spiffe://[^']*)'", repr(plain(view, url, name)))
        return list(dict.fromkeys(found))

    service = "outbound|9080||reviews.default.svc.cluster.local"
    for texts, domains in (((), ["cluster.local"]), ((ALIASES,), ["cluster.local", "old.example"])):
        view = Translator().view(CALLED_KEY, snapshot(MESH, CALLED, CALLER, *texts))
        assert names(view, LISTENER, "127.0.0.1_19000") == [f"spiffe://{one}/" for one in domains]
        view = Translator().view(CALLER_KEY, snapshot(MESH, CALLED, CALLER, *texts))
        assert sorted(names(view, CLUSTER, service)) == [f"spiffe://{one}/ns/default/sa/reviews" for one in domains]


def test_what_is_no_principal_of_a_trust_domain_stays():
    policy = access("{rules: [{from: [{source: {notPrincipals: ['*', '*/sa/b', 'old.example/ns/a/*']}}]}]}")
    (principal,) = next(iter(rbac(policy, ALIASES)[0][1].values()))["principals"]
    names = [next(iter(one["authenticated"]["principal_name"].values())) for one in principal["not_id"]["or_ids"]["ids"]]
    assert names[2:] == ["spiffe://cluster.local/ns/a/", "spiffe://old.example/ns/a/"]
    assert len(names) == 4


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("cluster.local/ns/a/sa/b", ["spiffe://new.example/ns/a/sa/b", "spiffe://old.example/ns/a/sa/b"]),
        ("new.example/ns/a/sa/b", ["spiffe://new.example/ns/a/sa/b", "spiffe://old.example/ns/a/sa/b"]),
        ("other.example/ns/a/sa/b", ["spiffe://other.example/ns/a/sa/b"]),
        ("*/ns/a/sa/b", ["spiffe://.*/ns/a/sa/b"]),
        ("*.example/ns/a/sa/b", ["spiffe://.*\\.example/ns/a/sa/b"]),
        ("*new.example/ns/a/sa/b", ["spiffe://.*new\\.example/ns/a/sa/b", "spiffe://old.example/ns/a/sa/b"]),
        ("*else/ns/a/sa/b", ["spiffe://.*else/ns/a/sa/b"]),
    ],
)
def test_cluster_local_is_whatever_the_trust_domain_is_called(said, meant):
    policy = access(f"{{rules: [{{from: [{{source: {{principals: ['{said}']}}}}]}}]}}")
    view = Translator().view(CALLED_KEY, snapshot(MESH, CALLED, policy, ALIASES, trust_domain="new.example"))
    assert principals_of(plain(view, LISTENER, "127.0.0.1_19000")) == meant


def principals_of(made) -> list[str]:
    """What the only policy of a listener compares callers with."""
    filters = made["filter_chains"][-1]["filters"][-1]["typed_config"]["http_filters"]
    (rbac_filter,) = [one["typed_config"]["rules"] for one in filters if "rbac" in one["name"]]
    ((principal,),) = [one["principals"] for one in rbac_filter["policies"].values()]
    found = [one["authenticated"]["principal_name"] for one in principal.get("or_ids", {"ids": [principal]})["ids"]]
    return [one.get("exact") or one["safe_regex"]["regex"] for one in found]


def test_cluster_local_is_the_trust_domain_also_while_the_mesh_config_is_refused():
    store = Store("new.example")
    policy = access("{rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/b]}}]}]}")
    for name, text in (("a", MESH), ("b", CALLED), ("c", policy), ("d", mesh_config("connectTimeout: x\ntrustDomainAliases: [old.example]"))):
        store.put(f"{name}.yaml", text.encode())
    store.settle()
    assert len(store.troubles) == 1
    view = Translator().view(CALLED_KEY, build(store.objects, None, "new.example"))
    assert principals_of(plain(view, LISTENER, "127.0.0.1_19000")) == ["spiffe://new.example/ns/a/sa/b"], "an alias lets nobody in meanwhile"


def test_service_accounts_without_a_namespace_are_of_the_policys_own():
    policy = access("{rules: [{from: [{source: {serviceAccounts: [web, shop/web]}}]}]}", namespace="istio-system")
    view = view_of(CALLED, policy, proxy=CALLED_KEY)
    assert principals_of(plain(view, LISTENER, "127.0.0.1_19000")) == [
        "spiffe://cluster.local/ns/istio-system/sa/web",
        "spiffe://cluster.local/ns/shop/sa/web",
    ]
    policy = access("{action: DENY, rules: [{when: [{key: source.serviceAccount, values: [web]}]}]}", namespace="istio-system")
    view = view_of(CALLED, policy, proxy=CALLED_KEY)
    assert principals_of(plain(view, LISTENER, "127.0.0.1_19000")) == ["spiffe://cluster.local/ns/istio-system/sa/web"]


def test_policies_are_the_same_objects_as_long_as_nothing_changes():
    texts = (access("{rules: [{from: [{source: {principals: [old.example/ns/a/sa/b]}}]}]}"), ALIASES)
    store = Store()
    before = snapshot(*texts, store=store)
    assert build(store.objects, before).config is before.config


def test_custom_tags_of_the_mesh():
    made = tracing(view_of(mesh_config(PROVIDER + "defaultProviders: {tracing: [otel]}\ndefaultConfig: {tracing: {customTags: {a: {literal: {value: b}}}}}")))
    assert made is not None
    assert tags(made)["a"] == {"literal": {"value": "b"}}
    other = tracing(view_of(DEFAULT))
    assert other is not None
    assert "a" not in tags(other)


@pytest.mark.parametrize(("form", "names"), [("", {"authority", "start_time"}), ('accessLogFormat: \'{"a": "%DURATION%"}\'', {"a"})])
def test_access_logs_as_json(form, names):
    _, made = config_of(f"accessLogFile: /dev/stdout\naccessLogEncoding: JSON\n{form}")
    assert made is not None
    assert made.beside.log_file is not None
    assert made.beside.log_file.labels is not None
    assert names <= dict(made.beside.log_file.labels).keys()
    manager = plain(view_of(CALLED, mesh_config(f"accessLogFile: /dev/stdout\naccessLogEncoding: JSON\n{form}"), proxy=CALLED_KEY), LISTENER, "127.0.0.1_19000")
    (log,) = manager["filter_chains"][-1]["filters"][-1]["typed_config"]["access_log"]
    assert log["typed_config"]["log_format"]["json_format"].keys() == dict(made.beside.log_file.labels).keys()


# --- what holds where nothing else says it


REVIEWS = "outbound|9080||reviews.default.svc.cluster.local"


def rule(policy: str) -> str:
    return istio("DestinationRule", "reviews", f"{{host: reviews, trafficPolicy: {policy}}}")


def test_policies_of_another_root_namespace_are_for_all():
    config = mesh_config("rootNamespace: mesh")
    policies = [access("{}", "a", "mesh"), peers("{mtls: {mode: STRICT}}", "p", "mesh"), peers("{mtls: {mode: DISABLE}}", "p", "istio-system")]
    made = plain(view_of(CALLED, config, *policies, proxy=CALLED_KEY), LISTENER, "127.0.0.1_19000")
    (chain,) = made["filter_chains"]
    assert chain["filter_chain_match"] == {"transport_protocol": "tls"}
    assert "rbac" in str(chain["filters"])
    made = plain(view_of(CALLED, *policies, proxy=CALLED_KEY), LISTENER, "127.0.0.1_19000")
    assert "transport_socket" not in str(made), "those of istio-system are, without it"
    assert "rbac" not in str(made)


def test_rules_and_sidecars_of_another_root_namespace():
    def timeout(*texts: str) -> str:
        spec = "{host: reviews.default.svc.cluster.local, trafficPolicy: {connectionPool: {tcp: {connectTimeout: 3s}}}}"
        return cluster(view_of(istio("DestinationRule", "reviews", spec).replace("{name: reviews}", "{name: reviews, namespace: mesh}"), *texts), REVIEWS)[
            "connect_timeout"
        ]

    assert timeout() == "10s"
    assert timeout(mesh_config("rootNamespace: mesh")) == "3s"
    scope = istio("Sidecar", "default", "{egress: [{hosts: ['~/*']}]}").replace("{name: default}", "{name: default, namespace: mesh}")
    assert view_of(scope).get(CLUSTER, REVIEWS) is not None
    assert view_of(scope, mesh_config("rootNamespace: mesh")).get(CLUSTER, REVIEWS) is None
    log = "{apiVersion: telemetry.istio.io/v1, kind: Telemetry, metadata: {name: t, namespace: mesh}, spec: {accessLogging: [{providers: [{name: envoy}]}]}}"
    assert "access_log" not in listener(view_of(log), "127.0.0.1_18000")["filter_chains"][0]["filters"][-1]["typed_config"]
    assert "access_log" in listener(view_of(log, mesh_config("rootNamespace: mesh")), "127.0.0.1_18000")["filter_chains"][0]["filters"][-1]["typed_config"]


@pytest.mark.parametrize(
    ("kind", "field", "spec"),
    [
        ("VirtualService", "defaultVirtualServiceExportTo", "{hosts: [reviews.default.svc.cluster.local], http: [{directResponse: {status: 418}}]}"),
        ("DestinationRule", "defaultDestinationRuleExportTo", "{host: reviews.default.svc.cluster.local, subsets: [{name: v1}]}"),
    ],
)
def test_who_sees_rules_that_do_not_say_it(kind, field, spec):
    """They are of the service's namespace, and asked is another one."""
    other = ProxyKey("sidecar", "any", "other")
    workload = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: any, namespace: other}, spec: {sidecar: {httpProxy: 15001}}}"

    def applies(*texts: str, said: str = "") -> bool:
        view = view_of(workload, istio(kind, "reviews", spec.replace("{", f"{{{said}", 1)), *texts, proxy=other)
        return "418" in str(plain(view, ROUTES, "http_proxy")) or view.get(CLUSTER, "outbound|9080|v1|reviews.default.svc.cluster.local") is not None

    assert applies()
    assert not applies(mesh_config(f"{field}: [.]"))
    assert applies(mesh_config(f"{field}: [other]"))
    assert applies(mesh_config(f"{field}: [., '*']"))
    assert applies(mesh_config(f"{field}: [.]"), said="exportTo: ['*'], ")


def test_who_sees_services_that_do_not_say_it():
    other = ProxyKey("sidecar", "any", "other")
    entry = istio("ServiceEntry", "api", "{hosts: [api.test], resolution: DNS, ports: [{number: 80, name: http}]}")

    def seen(*texts: str) -> set[str]:
        return {one.name.split("|")[3].split(".")[0] for one in view_of(entry, *texts, proxy=other).all(CLUSTER)}

    assert seen() == {"api", "reviews", "db"}
    assert seen(mesh_config("defaultServiceExportTo: [.]")) == set()
    assert seen(mesh_config("defaultServiceExportTo: ['~']")) == set()
    said = "{apiVersion: v1, kind: Service, metadata: {name: x, annotations: {networking.istio.io/exportTo: other}}, spec: {ports: [{name: http, port: 1}]}}"
    assert seen(mesh_config("defaultServiceExportTo: [.]"), said) == {"x"}
    assert seen(mesh_config("defaultServiceExportTo: [other]")) == {"api", "reviews", "db"}


def test_the_same_services_are_the_same_objects_whoever_sees_them():
    store, texts = Store(), (MESH, mesh_config("defaultServiceExportTo: [.]"))
    before = snapshot(*texts, store=store)
    assert build(store.objects, before).config is before.config


def test_time_to_connect_and_keepalive():
    config = mesh_config("connectTimeout: 2s\ntcpKeepalive: {probes: 3, time: 10s, interval: 1s}\ndnsRefreshRate: 5s")
    made = cluster(view_of(config), REVIEWS)
    assert made["connect_timeout"] == "2s"
    assert made["upstream_connection_options"]["tcp_keepalive"] == {"keepalive_probes": 3, "keepalive_time": 10, "keepalive_interval": 1}
    assert cluster(view_of(config), "inbound|8000||")["connect_timeout"] == "2s"
    made = cluster(view_of(config, rule("{connectionPool: {tcp: {connectTimeout: 3s, tcpKeepalive: {probes: 4}}}}")), REVIEWS)
    assert (made["connect_timeout"], made["upstream_connection_options"]["tcp_keepalive"]) == ("3s", {"keepalive_probes": 4})
    entry = istio("ServiceEntry", "api", "{hosts: [api.test], resolution: DNS, ports: [{number: 80, name: http}]}")
    assert cluster(view_of(config, entry), "outbound|80||api.test")["dns_refresh_rate"] == "5s"


@pytest.mark.parametrize(
    ("policy", "h2"),
    [
        ("{}", True),
        ("{connectionPool: {http: {maxRetries: 3}}}", True),
        ("{connectionPool: {http: {h2UpgradePolicy: DO_NOT_UPGRADE}}}", False),
        ("{connectionPool: {http: {useClientProtocol: true}}}", False),
    ],
)
def test_http_goes_on_as_http2(policy, h2):
    view = view_of(mesh_config("h2UpgradePolicy: UPGRADE"), rule(policy))
    assert ("explicit_http_config" in str(cluster(view, REVIEWS)) and "http2_protocol_options" in str(cluster(view, REVIEWS))) is h2
    assert "http2_protocol_options" not in str(cluster(view, "outbound|3306||db.default.svc.cluster.local")), "which is no HTTP"
    assert "http2_protocol_options" not in str(cluster(view, "inbound|8000||")), "applications speak what they speak"


def test_mutual_tls_that_is_not_automatic():
    config = mesh_config("enableAutoMtls: false")
    assert "transport_socket_matches" in cluster(view_of(CALLER, CALLED, proxy=CALLER_KEY), REVIEWS)
    made = cluster(view_of(CALLER, CALLED, config, proxy=CALLER_KEY), REVIEWS)
    assert "transport_socket" not in str(made)
    made = cluster(view_of(CALLER, CALLED, config, rule("{tls: {mode: ISTIO_MUTUAL}}"), proxy=CALLER_KEY), REVIEWS)
    assert made["transport_socket"]["typed_config"]["sni"].startswith("outbound_.9080")


def localities(view) -> list[tuple[str, int, int]]:
    """(zone, priority, weight) of endpoints of reviews."""
    found = endpoints(view, REVIEWS)["endpoints"]
    return [(one["locality"].get("zone", ""), one.get("priority", 0), one["load_balancing_weight"]) for one in found]


def test_where_requests_go_by_locality():
    """`web` is in eu/b, its endpoints are in eu/a and eu/b."""
    outlier = "outlierDetection: {consecutive5xxErrors: 1}"
    assert localities(view_of(rule(f"{{{outlier}}}"))) == [("b", 0, 1), ("a", 1, 1)]
    off = mesh_config("localityLbSetting: {enabled: false}")
    assert localities(view_of(rule(f"{{{outlier}}}"), off)) == [("a", 0, 1), ("b", 0, 1)]
    shares = mesh_config("localityLbSetting: {distribute: [{from: eu/b/*, to: {eu/a/*: 80, eu/b/*: 20}}]}")
    assert localities(view_of(shares)) == [("a", 0, 80), ("b", 0, 20)]
    assert localities(view_of(shares, rule("{loadBalancer: {localityLbSetting: {enabled: false}}}"))) == [("a", 0, 1), ("b", 0, 1)]
    zones = mesh_config("localityLbSetting: {enabled: true}\nzoneAwareLbSetting: {minClusterSize: 4}")
    assert cluster(view_of(zones), REVIEWS)["common_lb_config"]["zone_aware_lb_config"] == {"min_cluster_size": "4"}


def test_limits_and_outliers_of_services_without_a_rule():
    config = mesh_config("defaultTrafficPolicy: {connectionPool: {tcp: {maxConnections: 7, idleTimeout: 9s}}, outlierDetection: {consecutive5xxErrors: 3}}")
    made = cluster(view_of(config), REVIEWS)
    assert made["circuit_breakers"]["thresholds"][0]["max_connections"] == 7
    assert made["outlier_detection"]["consecutive_5xx"] == 3
    proxy = listener(view_of(config), "127.0.0.1_13306")["filter_chains"][-1]["filters"][-1]["typed_config"]
    assert proxy["idle_timeout"] == "9s"
    made = cluster(view_of(config, rule("{connectionPool: {tcp: {connectTimeout: 3s}}}")), REVIEWS)
    assert made["circuit_breakers"]["thresholds"][0]["max_connections"] == 2**32 - 1, "a rule's own take the place of all of them"
    assert made["outlier_detection"]["consecutive_5xx"] == 3


def test_idle_connections_are_as_a_rule_says_also_with_defaults_of_the_mesh():
    idle = istio("DestinationRule", "db", "{host: db, trafficPolicy: {connectionPool: {tcp: {idleTimeout: 5s}}, portLevelSettings: [{port: {number: 3306}}]}}")
    made = listener(view_of(idle, mesh_config("connectTimeout: 2s")), "127.0.0.1_13306")
    assert made["filter_chains"][-1]["filters"][-1]["typed_config"]["idle_timeout"] == "5s"


def test_how_often_requests_are_tried():
    config = mesh_config("defaultHttpRetryPolicy: {attempts: 5, retryOn: reset, perTryTimeout: 1s}")

    def retry(*texts: str) -> dict:
        return routes(view_of(*texts))[0]["route"].get("retry_policy", {})

    assert (retry(config)["num_retries"], retry(config)["retry_on"], retry(config)["per_try_timeout"]) == (5, "reset", "1s")
    own = istio("VirtualService", "reviews", "{hosts: [reviews], http: [{route: [{destination: {host: reviews}}]}]}")
    assert retry(config, own)["num_retries"] == 5
    assert retry(config, own.replace("http: [{", "http: [{retries: {attempts: 1}, "))["num_retries"] == 1
    assert retry(mesh_config("defaultHttpRetryPolicy: {attempts: 0}")) == {}
    assert retry()["num_retries"] == 2


@pytest.mark.parametrize(
    ("word", "normalised", "merged", "action"),
    [
        ("NONE", False, False, None),
        ("BASE", True, False, None),
        ("DEFAULT", True, False, None),
        ("MERGE_SLASHES", True, True, None),
        ("DECODE_AND_MERGE_SLASHES", True, True, "UNESCAPE_AND_FORWARD"),
    ],
)
def test_what_is_done_to_paths(word, normalised, merged, action):
    view = view_of(mesh_config(f"pathNormalization: {{normalization: {word}}}"))
    for name in ("127.0.0.1_18000", "127.0.0.1_15001"):
        manager = listener(view, name)["filter_chains"][0]["filters"][-1]["typed_config"]
        found = manager["normalize_path"], manager.get("merge_slashes", False), manager.get("path_with_escaped_slashes_action")
        assert found == (normalised, merged, action)


EDGE = istio("Gateway", "edge", """
    selector: {app: web}
    servers:
    - {port: {number: 8080, name: http, protocol: HTTP}, hosts: [a.test]}
    - {port: {number: 8443, name: https, protocol: HTTPS}, hosts: [a.test], tls: {mode: SIMPLE, serverCertificate: /a.pem, privateKey: /a.key}}
    """)  # fmt: skip
TO_REVIEWS = istio("VirtualService", "edge", "{hosts: [a.test], gateways: [edge], http: [{route: [{destination: {host: reviews}}]}]}")


def test_who_stands_in_front_of_gateways():
    def manager(*texts: str, port: int = 8080) -> tuple[dict, list]:
        made = listener(view_of(EDGE, TO_REVIEWS, *texts), f"0.0.0.0_{port}")
        return made["filter_chains"][0]["filters"][-1]["typed_config"], [one["name"] for one in made.get("listener_filters", [])]

    made, filters = manager()
    assert ("xff_num_trusted_hops" in made, "forward_client_cert_details" in made, filters) == (False, False, [])
    topology = "defaultConfig: {gatewayTopology: {numTrustedProxies: 2, forwardClientCertDetails: %s, proxyProtocol: {}}}"
    made, filters = manager(mesh_config(topology % "FORWARD_ONLY"))
    assert (made["xff_num_trusted_hops"], made["forward_client_cert_details"], filters) == (2, "FORWARD_ONLY", ["envoy.filters.listener.proxy_protocol"])
    assert "set_current_client_cert_details" not in made
    made, filters = manager(mesh_config(topology % "APPEND_FORWARD"), port=8443)
    assert made["set_current_client_cert_details"] == {"subject": True, "cert": True, "dns": True, "uri": True}
    assert filters == ["envoy.filters.listener.proxy_protocol", "envoy.filters.listener.tls_inspector"]
    inner = listener(view_of(mesh_config(topology % "SANITIZE")), "127.0.0.1_18000")["filter_chains"][0]["filters"][-1]["typed_config"]
    assert "xff_num_trusted_hops" not in inner, "which is no gateway"


def test_limits_of_tls():
    suites = "cipherSuites: [ECDHE-RSA-AES256-GCM-SHA384]"
    config = mesh_config(f"meshMTLS: {{minProtocolVersion: TLSV1_3}}\ntlsDefaults: {{minProtocolVersion: TLSV1_3, {suites}, ecdhCurves: [P-256]}}")
    made = listener(view_of(CALLED, config, proxy=CALLED_KEY), "127.0.0.1_19000")["filter_chains"][0]["transport_socket"]["typed_config"]
    assert made["common_tls_context"]["tls_params"] == {"tls_minimum_protocol_version": "TLSv1_3"}
    others = {"cipher_suites": ["ECDHE-RSA-AES256-GCM-SHA384"], "ecdh_curves": ["P-256"]}

    def of_gateway(*texts: str) -> dict:
        chains = listener(view_of(TO_REVIEWS, config, *texts), "0.0.0.0_8443")["filter_chains"]
        return chains[0]["transport_socket"]["typed_config"]["common_tls_context"]["tls_params"]

    assert of_gateway(EDGE) == {"tls_minimum_protocol_version": "TLSv1_3", **others}
    assert of_gateway(EDGE.replace("mode: SIMPLE", "mode: SIMPLE, minProtocolVersion: TLSV1_2")) == {"tls_minimum_protocol_version": "TLSv1_2", **others}
    assert of_gateway(EDGE.replace("mode: SIMPLE", "mode: SIMPLE, maxProtocolVersion: TLSV1_2")) == {"tls_maximum_protocol_version": "TLSv1_2", **others}
    begun = cluster(view_of(config, rule("{tls: {mode: SIMPLE, sni: a.test}}")), REVIEWS)["transport_socket"]["typed_config"]
    assert begun["common_tls_context"]["tls_params"] == others, "whoever is called may be older"
