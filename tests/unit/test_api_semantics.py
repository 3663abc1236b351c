"""Checks of the whole configuration. Each case was given to the real Envoy first: it rejects what is rejected here, unless a comment says otherwise."""

from __future__ import annotations

import pytest
from envoy.config.bootstrap.v3.bootstrap_pb2 import Bootstrap

from meshproxy.api import convert, semantics

T = "type.googleapis.com/envoy.extensions."
ROUTER = {"name": "router", "typed_config": {"@type": f"{T}filters.http.router.v3.Router"}}
BUFFER = {"name": "buf", "typed_config": {"@type": f"{T}filters.http.buffer.v3.Buffer", "max_request_bytes": 5}}
RBAC = {"name": "rbac", "typed_config": {"@type": f"{T}filters.network.rbac.v3.RBAC", "stat_prefix": "x"}}
TCP = {"name": "tcp", "typed_config": {"@type": f"{T}filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "t", "cluster": "nope"}}
L0 = "static_resources.listeners[0]"
MANAGER = f"{L0}.filter_chains[0].filters[0].typed_config"
ROUTE = f"{MANAGER}.route_config.virtual_hosts[0].routes[0].route"


def hcm(route=None, http_filters=(ROUTER,), upgrades=(), **table):
    routes = [{"match": {"prefix": "/"}, "route": route or {"cluster": "c"}}]
    config = {
        "@type": f"{T}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "x",
        "http_filters": list(http_filters),
        "upgrade_configs": [{"upgrade_type": str(at), "filters": list(filters)} for at, filters in enumerate(upgrades)],
        "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}], **table},
    }
    return {"name": "hcm", "typed_config": config}


def address(port=0):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def listener(name="l", port=0, chains=None, **fields):
    return {"name": name, "address": address(port), "filter_chains": [{"filters": [hcm()]}] if chains is None else chains, **fields}


def one(*filters, **fields):
    return [listener(chains=[{"filters": list(filters), **fields}])]


def chains(*matches):
    return [listener(chains=[{"filter_chain_match": match, "filters": [TCP]} for match in matches])]


def check(listeners=None, clusters=("c",), **fields):
    resources = {"listeners": listeners or [], "clusters": [{"name": name} for name in clusters]}
    return [str(problem) for problem in semantics.check(convert.to_message({"static_resources": resources, **fields}, Bootstrap))]


WEIGHTED = {"weighted_clusters": {"clusters": [{"name": "c", "weight": 1}, {"name": "nope", "weight": 1}]}}
MIRROR = {"cluster": "c", "request_mirror_policies": [{"cluster": "c"}, {"cluster": "nope"}]}
TAKEN = "127.0.0.1:1001 is already an address of static_resources.listeners[0]"
OVERLAP = f"{L0}.filter_chains[1].filter_chain_match: matches the same connections as filter_chains[0]"


@pytest.mark.parametrize(
    "listeners",
    [
        [listener()],
        [listener("a"), listener("b")],
        [listener("", 1001), listener("", 1002)],
        [listener("a", 1001), listener("b", 1001, bind_to_port=False)],
        [listener("a", 1001, additional_addresses=[{"address": address(1001)}])],
        one(hcm({"cluster": "nope"}, validate_clusters=False)),
        one(hcm({"cluster_header": "x"})),
        one(TCP),  # a TCP proxy may name a cluster that comes later
        one(RBAC, TCP),
        one(),
        one(hcm(http_filters=[])),
        one(hcm(http_filters=[BUFFER, BUFFER, ROUTER])),
        one(hcm(upgrades=[[], [BUFFER, ROUTER], [ROUTER]])),
        [listener(chains=[], default_filter_chain={"filters": [TCP]})],
        chains({"destination_port": 1}, {"destination_port": 2}),
        chains({"server_names": ["a.com"]}, {"server_names": ["*.a.com"]}, {}),
        chains({"prefix_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 8}]}, {"prefix_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 9}]}),
    ],
)
def test_fine(listeners):
    assert check(listeners) == []


@pytest.mark.parametrize(
    ("listeners", "expected"),
    [
        # Envoy drops the second one without a word.
        ([listener("a"), listener("a")], "static_resources.listeners[1].name: 'a' is already the name of static_resources.listeners[0]"),
        ([listener("a", 1001), listener("b", 1001)], f"static_resources.listeners[1].address: {TAKEN}"),
        (
            [listener("a", 1001), listener("b", 1002, additional_addresses=[{"address": address(1001)}])],
            f"static_resources.listeners[1].additional_addresses[0].address: {TAKEN}",
        ),
        ([{"name": "x", "filter_chains": [{"filters": [TCP]}]}], f"{L0}.address: is required"),
        ([listener(chains=[])], f"{L0}.filter_chains: must not be empty: without a filter chain nothing can be done with a connection"),
        (one(hcm({"cluster": "nope"})), f"{ROUTE}.cluster: no cluster is called 'nope'"),
        (one(hcm(WEIGHTED)), f"{ROUTE}.weighted_clusters.clusters[1].name: no cluster is called 'nope'"),
        (one(hcm(MIRROR)), f"{ROUTE}.request_mirror_policies[1].cluster: no cluster is called 'nope'"),
        (
            one(hcm(request_mirror_policies=[{"cluster": "nope"}])),
            f"{MANAGER}.route_config.request_mirror_policies[0].cluster: no cluster is called 'nope'",
        ),
        (one(hcm(http_filters=[BUFFER])), f"{MANAGER}.http_filters[0]: 'buf' is not a terminal filter: it cannot be the last one"),
        (
            one(hcm(upgrades=[[ROUTER], [ROUTER, BUFFER, ROUTER]])),
            f"{MANAGER}.upgrade_configs[1].filters[0]: 'router' is a terminal filter: it must be the last one",
        ),
        (one(RBAC), f"{L0}.filter_chains[0].filters[0]: 'rbac' is not a terminal filter: it cannot be the last one"),
        (one(hcm(), TCP), f"{L0}.filter_chains[0].filters[0]: 'hcm' is a terminal filter: it must be the last one"),
        (one({"name": "tcp"}), f"{L0}.filter_chains[0].filters[0].typed_config: is required: it says what 'tcp' is"),
        (one(TCP, transport_socket={"name": "tls"}), f"{L0}.filter_chains[0].transport_socket.typed_config: is required: it says what 'tls' is"),
        (
            [listener(listener_filters=[{"name": "envoy.filters.listener.tls_inspector"}])],
            f"{L0}.listener_filters[0].typed_config: is required: it says what 'envoy.filters.listener.tls_inspector' is",
        ),
        (chains({}, {}), OVERLAP),
        (chains({"server_names": ["a", "b"]}, {"server_names": ["c", "b"]}), OVERLAP),
        (chains({"server_names": ["A.com"]}, {"server_names": ["a.com"]}), OVERLAP),
        (
            chains({"prefix_ranges": [{"address_prefix": "10.0.0.1", "prefix_len": 8}]}, {"prefix_ranges": [{"address_prefix": "10.9.0.2", "prefix_len": 8}]}),
            OVERLAP,
        ),
        (
            chains({"server_names": ["*a.com"]}),
            f"{L0}.filter_chains[0].filter_chain_match: server_names: '*a.com': a wildcard must be a whole first label, such as '*.example.com'",
        ),
        (
            chains({"prefix_ranges": [{"address_prefix": "10.0.0.x", "prefix_len": 8}]}),
            f"{L0}.filter_chains[0].filter_chain_match: '10.0.0.x' is not an IP address",
        ),
    ],
)
def test_one_problem(listeners, expected):
    assert check(listeners) == [expected]


def test_a_listener_filter_chain_match_of_many_names_is_no_burden():
    many = {"server_names": [f"h{i}" for i in range(400)], "source_ports": list(range(1, 400))}
    assert check(chains(many, many)) == []  # more combinations than are looked at


def test_terminal_filter_before_the_last():
    assert check(one(hcm(http_filters=[ROUTER, BUFFER]))) == [
        f"{MANAGER}.http_filters[0]: 'router' is a terminal filter: it must be the last one",
        f"{MANAGER}.http_filters[1]: 'buf' is not a terminal filter: it cannot be the last one",
    ]


def test_clusters():
    assert check(clusters=("a", "b", "a")) == ["static_resources.clusters[2].name: 'a' is already the name of static_resources.clusters[0]"]
    assert check(cluster_manager={"local_cluster_name": "nope"}) == ["cluster_manager.local_cluster_name: no cluster is called 'nope'"]
