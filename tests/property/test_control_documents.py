"""Whatever stands in a folder, reading it gives objects or problems, and never an exception."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from control.kinds import registry
from control.kinds.store import Store
from control.model.snapshot import build
from control.translate.proxy import ProxyKey
from control.translate.resource import ORDER
from control.translate.translator import Translator
from meshproxy.api import support
from meshproxy.api.errors import INVALID

# Words of the API in the wrong places find more than random ones.
_WORDS = """
    apiVersion kind metadata name namespace labels annotations spec status hosts host http tcp tls route match destination subset port number weight gateways
    exportTo headers request response set add remove timeout retries attempts perTryTimeout retryOn fault delay abort fixedDelay percentage value httpStatus
    mirror mirrors rewrite uri redirect directResponse body string bytes corsPolicy allowOrigins exact prefix regex trafficPolicy loadBalancer simple
    consistentHash httpCookie connectionPool tcp outlierDetection portLevelSettings subsets ports endpoints address addresses resolution selector
    workloadSelector clusterIP targetPort protocol conditions targetRef containers podIP sidecar inbound outbound listen httpProxy locality items
    localityLbSetting distribute from to servers mode credentialName httpsRedirect sniHosts listeners certificateRefs data type
    configPatches applyTo context patch operation delegate failoverPriority caCertificateRefs subjectAltNames hostname targetRefs validation hostnames
""".split()
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(["1s", "*", "a.b", "10.0.0.1", "HTTP"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS) | st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)
_KINDS = st.sampled_from([(f"{group}/{versions[0]}" if group else versions[0], kind) for (group, kind), (versions, _) in registry.KINDS.items()])


@st.composite
def documents(draw):
    """A document of a kind that we know, with anything inside."""
    version, kind = draw(_KINDS)
    name = draw(st.sampled_from(["a", "b"]))
    made = {"apiVersion": version, "kind": kind, "metadata": {"name": name}}
    made.update(draw(st.dictionaries(st.sampled_from(["spec", "status", "endpoints", "ports", "subsets", "metadata"]), _VALUES, max_size=3)))
    return made


# What is right about a kind, so that mutations of it get further than the first check.
_RIGHT = [
    {"apiVersion": "v1", "kind": "Service", "spec": {"selector": {"app": "a"}, "ports": [{"port": 80, "name": "http", "targetPort": "web"}]}},
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "spec": {
            "hosts": ["a"],
            "http": [
                {
                    "match": [{"uri": {"prefix": "/"}, "headers": {"x": {"exact": "y"}}}],
                    "route": [{"destination": {"host": "a", "subset": "v1", "port": {"number": 80}}, "weight": 1}],
                    "retries": {"attempts": 1, "retryOn": "5xx,503"},
                    "fault": {"delay": {"fixedDelay": "1s", "percentage": {"value": 1}}},
                    "headers": {"request": {"set": {"a": "b"}}},
                }
            ],
        },
    },
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "spec": {
            "host": "a",
            "trafficPolicy": {
                "loadBalancer": {"consistentHash": {"httpCookie": {"name": "c", "ttl": "1s"}}},
                "connectionPool": {"tcp": {"maxConnections": 1}, "http": {"maxRetries": 1}},
                "outlierDetection": {"interval": "1s"},
                "portLevelSettings": [{"port": {"number": 80}}],
            },
            "subsets": [{"name": "v1", "labels": {"v": "1"}}],
        },
    },
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "spec": {
            "hosts": ["a.b"],
            "resolution": "STATIC",
            "ports": [{"number": 1, "name": "tcp"}],
            "endpoints": [{"address": "10.0.0.1", "ports": {"tcp": 2}}],
        },
    },
    {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "a", "port": 80}],
            "rules": [
                {
                    "matches": [{"path": {"type": "Exact", "value": "/"}, "headers": [{"name": "x", "value": "y"}], "method": "GET"}],
                    "filters": [
                        {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "b", "port": 80}, "percent": 5}},
                        {"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}}},
                    ],
                    "backendRefs": [{"name": "a", "port": 80, "weight": 1}],
                    "timeouts": {"request": "1s"},
                    "retry": {"codes": [500], "attempts": 1},
                }
            ],
        },
    },
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "Gateway",
        "spec": {"selector": {"a": "b"}, "servers": [{"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}]},
    },
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "Gateway",
        "spec": {
            "selector": {"a": "b"},
            "servers": [
                {"port": {"number": 443, "name": "tls", "protocol": "TLS"}, "hosts": ["a.b"], "tls": {"mode": "PASSTHROUGH"}},
                {
                    "port": {"number": 444, "name": "https", "protocol": "HTTPS"},
                    "hosts": ["a.b"],
                    "tls": {"mode": "ISTIO_MUTUAL", "minProtocolVersion": "TLSV1_2"},
                },
            ],
        },
    },
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "spec": {
            "hosts": ["a.b"],
            "gateways": ["default/a"],
            "tls": [{"match": [{"sniHosts": ["a.b"], "port": 443}], "route": [{"destination": {"host": "a", "port": {"number": 80}}, "weight": 1}]}],
        },
    },
    {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "TLSRoute",
        "spec": {"parentRefs": [{"name": "a"}], "hostnames": ["a.b"], "rules": [{"backendRefs": [{"name": "a", "port": 80, "namespace": "c"}]}]},
    },
    {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "BackendTLSPolicy",
        "spec": {
            "targetRefs": [{"group": "", "kind": "Service", "name": "a"}],
            "validation": {"hostname": "a.b", "wellKnownCACertificates": "System", "subjectAltNames": [{"type": "Hostname", "hostname": "c.d"}]},
        },
    },
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "spec": {"hosts": ["a"], "http": [{"match": [{"uri": {"prefix": "/"}}], "timeout": "1s", "delegate": {"name": "b"}}]},
    },
    {"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "spec": {"http": [{"route": [{"destination": {"host": "a"}}]}]}},
    {
        "apiVersion": "networking.istio.io/v1alpha3",
        "kind": "EnvoyFilter",
        "spec": {
            "configPatches": [
                {
                    "applyTo": "CLUSTER",
                    "match": {"context": "ANY", "cluster": {"portNumber": 80}},
                    "patch": {"operation": "MERGE", "value": {"connect_timeout": "1s", "name": "x"}},
                },
                {"applyTo": "HTTP_ROUTE", "match": {"routeConfiguration": {}}, "patch": {"operation": "MERGE", "value": {"route": {"timeout": "1s"}}}},
                {"applyTo": "HTTP_FILTER", "match": {"listener": {"portNumber": 80}}, "patch": {"operation": "REMOVE"}},
            ]
        },
    },
    {"apiVersion": "meshproxy/v1", "kind": "Workload", "spec": {"ports": {"web": 1}, "sidecar": {"inbound": [{"port": 1, "listen": 2}]}}},
]


@st.composite
def mutations(draw):
    """A right document, one value of which is something else."""
    made = json.loads(json.dumps(draw(st.sampled_from(_RIGHT))))
    made["metadata"] = {"name": draw(st.sampled_from(["a", "b"]))}
    holder = made
    while True:
        key = draw(st.sampled_from(list(holder))) if isinstance(holder, dict) else draw(st.integers(0, len(holder) - 1))
        below = holder[key]
        if not isinstance(below, (dict, list)) or not below or draw(st.integers(0, 4)) == 0:
            holder[key] = draw(_VALUES)
            return made
        holder = below


def constraints(message) -> list[str]:
    """What Envoy would refuse of a resource, as far as the constraints that the API declares tell."""
    return [str(problem) for problem in support.check(message)[0] if problem.kind == INVALID]


def _check(store: Store) -> None:
    store.settle()
    snapshot = build(store.objects)
    translator = Translator()
    for kind in ("sidecar", "grpc"):
        view = translator.view(ProxyKey(kind, "a", "default", (("a", "b"),)), snapshot)
        for url in ORDER:
            for resource in view.all(url):
                problems = constraints(resource.message)
                assert not problems, (resource, problems)
    for trouble in store.troubles:
        assert str(trouble)


@settings(max_examples=300)
@given(st.lists(documents() | mutations() | _VALUES, max_size=4))
def test_any_documents_give_problems_or_resources_that_are_valid(values):
    store = Store()
    store.put("a", "\n---\n".join(json.dumps(value) for value in values).encode())
    _check(store)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_gives_objects_or_problems(content):
    store = Store()
    store.put("a", content)
    _check(store)


@given(mutations())
def test_a_wrong_document_takes_down_no_other(value):
    store = Store()
    good = b"{apiVersion: v1, kind: Service, metadata: {name: good}, spec: {ports: [{port: 80, name: http}]}}\n---\n"
    store.put("a", good)
    store.settle()
    before = dict(store.objects)
    store.put("a", good + json.dumps(value).encode())
    store.settle()
    assert before.items() <= store.objects.items()
    assert store.troubles or len(store.objects) == 2
