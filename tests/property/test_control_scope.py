"""Whatever documents say: a proxy gets nothing that is not exported to it, and nothing depends on which file says what."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from control.kinds.store import Store
from control.model.snapshot import build, visible
from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, ENDPOINTS, ORDER, ROUTES
from control.translate.translator import Translator

_NAMES, _NAMESPACES = ["a", "b", "c"], ["x", "y", "z"]
_hosts = st.builds(lambda name, namespace: f"{name}.{namespace}.svc.cluster.local", st.sampled_from(_NAMES), st.sampled_from(_NAMESPACES))
_export = st.lists(st.sampled_from([".", "*", "~", *_NAMESPACES]), max_size=2)
_imports = st.builds(
    "{}/{}".format,
    st.sampled_from([".", "*", "~", *_NAMESPACES]),
    st.one_of(st.just("*"), _hosts, st.sampled_from(["*.x.svc.cluster.local", "*.svc.cluster.local"])),
)


def _document(kind: str, group: str, spec: st.SearchStrategy, namespaces: list[str] = _NAMESPACES) -> st.SearchStrategy:
    meta = st.fixed_dictionaries({"name": st.sampled_from(_NAMES), "namespace": st.sampled_from(namespaces)})
    return st.fixed_dictionaries({"apiVersion": st.just(group), "kind": st.just(kind), "metadata": meta, "spec": spec})


_ports = st.just([{"name": "http", "port": 80}])
_service = st.builds(
    lambda document, export: {
        **document,
        "metadata": {**document["metadata"], **({"annotations": {"networking.istio.io/exportTo": ",".join(export)}} if export else {})},
    },
    _document("Service", "v1", st.fixed_dictionaries({"selector": st.builds(lambda app: {"app": app}, st.sampled_from(_NAMES)), "ports": _ports})),
    _export,
)
_workload = st.builds(
    lambda document, app: {**document, "metadata": {**document["metadata"], "labels": {"app": app}}},
    _document("Workload", "meshproxy/v1", st.just({"ports": {"http": 8080}, "sidecar": {"inbound": [{"port": 8080, "listen": 18080}], "httpProxy": 15001}})),
    st.sampled_from(_NAMES),
)
_destination = st.builds(lambda host: {"destination": {"host": host, "subset": "v1"}}, _hosts)
_rules = _document(
    "VirtualService",
    "networking.istio.io/v1",
    st.fixed_dictionaries(
        {"hosts": st.lists(_hosts, min_size=1, max_size=2), "http": st.builds(lambda one: [{"route": [one]}], _destination), "exportTo": _export}
    ),
)
_entry = _document(
    "ServiceEntry",
    "networking.istio.io/v1",
    st.fixed_dictionaries(
        {
            "hosts": st.just(["ext.test"]),
            "ports": st.just([{"number": 80, "name": "http", "protocol": "HTTP"}]),
            "resolution": st.just("STATIC"),
            "endpoints": st.builds(lambda last: [{"address": f"10.0.0.{last}"}], st.integers(1, 9)),
            "exportTo": _export,
        }
    ),
)
_policy = _document(
    "DestinationRule", "networking.istio.io/v1", st.fixed_dictionaries({"host": _hosts, "subsets": st.just([{"name": "v1"}]), "exportTo": _export})
)
_sidecar = _document(
    "Sidecar",
    "networking.istio.io/v1",
    st.one_of(
        st.fixed_dictionaries({"egress": st.lists(st.fixed_dictionaries({"hosts": st.lists(_imports, min_size=1, max_size=3)}), min_size=1, max_size=2)}),
        st.fixed_dictionaries(
            {
                "workloadSelector": st.builds(lambda app: {"labels": {"app": app}}, st.sampled_from(_NAMES)),
                "egress": st.builds(lambda hosts: [{"hosts": hosts}], st.lists(_imports, min_size=1, max_size=3)),
                "outboundTrafficPolicy": st.sampled_from([{"mode": "ALLOW_ANY"}, {"mode": "REGISTRY_ONLY"}]),
            }
        ),
    ),
    [*_NAMESPACES, "istio-system"],
)
_documents = st.lists(
    st.one_of(_service, _service, _workload, _rules, _policy, _sidecar, _entry),
    max_size=14,
    unique_by=lambda one: (one["kind"], one["metadata"]["name"], one["metadata"]["namespace"]),
)
_proxies = st.builds(ProxyKey, st.sampled_from(["sidecar", "grpc"]), st.sampled_from(_NAMES), st.sampled_from(_NAMESPACES))


def _snapshot(files):
    store = Store()
    for name, documents in files.items():
        store.put(name, "\n---\n".join(json.dumps(one) for one in documents).encode())
    store.settle()
    assert not store.troubles
    return build(store.objects)


def _outbound(view, url):
    """(host, subset) of the clusters, or of the endpoints."""
    return {(parts[3], parts[2]) for one in view.all(url) if (parts := one.name.split("|"))[0] == "outbound"}


@settings(max_examples=200, deadline=None)
@given(_documents, _proxies)
def test_nothing_comes_that_is_not_exported(documents, proxy):
    made = _snapshot({"a": documents})
    view = Translator().view(proxy, made)
    clusters = _outbound(view, CLUSTER)
    for host, subset in clusters:
        candidates = [made.config.services[host], *made.config.others.get(host, ())]
        assert any(visible(one, proxy.namespace) for one in candidates), host
        if subset:
            rules = [one for one in made.config.destination_rules if one.host == host]
            assert any(visible(one, proxy.namespace) for one in rules), host
    assert _outbound(view, ENDPOINTS) == clusters
    exported = [one for one in made.config.route_rules if visible(one, proxy.namespace)]
    may = {host for host, _ in clusters} | {host for one in exported for host in one.hosts} | {host for one in exported for host in one.destinations()}
    text = " ".join(str(one.message) for one in view.all(ROUTES))
    for host, service in made.config.services.items():
        if host not in may:
            assert host not in text, service


def _exported(to, where, namespace):
    return not to or "*" in to or namespace in to or ("." in to and where == namespace)


@settings(max_examples=100, deadline=None)
@given(_documents, _proxies)
def test_a_host_of_several_services_is_one_that_is_seen(documents, proxy):
    entries = [one for one in documents if one["kind"] == "ServiceEntry"]
    view = Translator().view(proxy, _snapshot({"a": documents}))
    found = view.get(ENDPOINTS, "outbound|80||ext.test")
    if found is None:
        return
    address = found.message.endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address
    seen = [one for one in entries if _exported(one["spec"]["exportTo"], one["metadata"]["namespace"], proxy.namespace)]
    assert address in {one["spec"]["endpoints"][0]["address"] for one in seen}
    assert view.get(CLUSTER, "outbound|80||ext.test") is not None


@settings(max_examples=100, deadline=None)
@given(_documents, _proxies)
def test_a_sidecar_never_gives_more_than_there_is_without(documents, proxy):
    """Neither does it give another resource than everybody has under that name, but for routes, which depend on what else is seen."""
    with_sidecars = Translator().view(proxy, _snapshot({"a": documents}))
    without = Translator().view(proxy, _snapshot({"a": [one for one in documents if one["kind"] != "Sidecar"]}))
    for url in (CLUSTER, ENDPOINTS):
        for one in with_sidecars.all(url):
            if one.name.startswith("outbound|") and not one.name.endswith("|ext.test"):  # which of several it is depends on imports
                other = without.get(url, one.name)
                assert other is not None
                assert other.version == one.version


@settings(max_examples=100, deadline=None)
@given(_documents, _proxies, st.randoms(use_true_random=False))
def test_the_order_of_files_changes_nothing(documents, proxy, random):
    shuffled = random.sample(documents, len(documents))
    one = Translator().view(proxy, _snapshot({"a": documents}))
    other = Translator().view(proxy, _snapshot({f"{index:02}": [document] for index, document in enumerate(shuffled)}))
    for url in ORDER:
        assert [part.digest for part in one.parts(url)] == [part.digest for part in other.parts(url)]
        assert [resource.name for resource in one.all(url)] == [resource.name for resource in other.all(url)]


@settings(max_examples=100, deadline=None)
@given(_documents, _documents, _proxies)
def test_what_is_kept_from_before_is_what_would_be_made_anew(before, after, proxy):
    """A translator that has seen other documents gives the same as a fresh one."""
    translator, store = Translator(), Store()
    made = None
    for documents in (before, after, before):
        store.put("a", "\n---\n".join(json.dumps(one) for one in documents).encode())
        store.settle()
        made = build(store.objects, made)
        view, fresh = translator.view(proxy, made), Translator().view(proxy, build(store.objects))
        for url in ORDER:
            assert {one.name: one.version for one in view.all(url)} == {one.name: one.version for one in fresh.all(url)}
