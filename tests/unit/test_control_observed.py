"""What proxies have been seen to call, as Sidecars."""

from __future__ import annotations

import yaml

from control.ads.hub import Hub
from control.ads.status import client_status
from control.observed import observed, sidecars
from control.translate.resource import CLUSTER, LISTENER, ORDER, ROUTES
from control.translate.translator import Translator
from meshproxy.api import messages
from tests.unit.control_help import MESH, WEB, istio, snapshot

_D = "envoy.service.discovery.v3."
REVIEWS, DB = "reviews.default.svc.cluster.local", "db.default.svc.cluster.local"
MORE = """
apiVersion: v1
kind: Service
metadata: {name: more}
spec: {selector: {app: reviews}, ports: [{name: http, port: 80}]}
"""
# A host that is no service, and one whose requests go elsewhere.
FRONT = istio("VirtualService", "front", "{hosts: [front.test], http: [{route: [{destination: {host: reviews}}]}]}")
MOVED = istio("VirtualService", "more", "{hosts: [more], http: [{route: [{destination: {host: reviews, port: {number: 9080}}}]}]}")


def status(*texts: str, loads: dict[str, int]):
    """ClientStatusResponse of `web`, which has everything and has reported so many requests by cluster."""
    hub = Hub(snapshot(MESH, *texts))
    connection = hub.open(delta=True)
    for url in (CLUSTER, LISTENER, ROUTES):
        names = [] if url != ROUTES else ["http_proxy"]
        request = messages.known(f"{_D}DeltaDiscoveryRequest")(type_url=url, resource_names_subscribe=names)
        request.node.id = "web.default"
        connection.receive(request.SerializeToString())
    assert list(connection.responses())
    report = messages.known("envoy.service.load_stats.v3.LoadStatsRequest")()
    report.node.id = "web.default"
    for name, count in loads.items():
        report.cluster_stats.add(cluster_name=name).upstream_locality_stats.add(total_issued_requests=count)
    hub.loads.open().receive(report.SerializeToString())
    return client_status(hub.connections, lambda _: True, contents=True, loads=hub.loads)


def test_who_calls_nobody_sees_what_its_listeners_lead_to():
    (web,) = observed(status(loads={}))
    assert (web.name, web.namespace, dict(web.requests), web.hosts) == ("web", "default", {}, {DB})  # connections are not reported


def test_what_is_called_is_seen_with_all_that_leads_there():
    (web,) = observed(status(MORE, FRONT, MOVED, loads={f"outbound|9080||{REVIEWS}": 7, "inbound|8000||": 3}))
    assert dict(web.requests) == {REVIEWS: 7}
    assert web.hosts == {REVIEWS, DB, "front.test", "more.default.svc.cluster.local"}


def test_with_the_sidecars_the_same_requests_go_the_same_way():
    texts = (MORE, FRONT)
    used = f"outbound|9080||{REVIEWS}"
    (document,) = sidecars(observed(status(*texts, loads={used: 1})))
    assert document["metadata"] == {"name": "observed", "namespace": "default"}
    before = Translator().view(WEB, snapshot(MESH, *texts))
    after = Translator().view(WEB, snapshot(MESH, *texts, yaml.safe_dump(document)))
    for url in ORDER:
        for one in after.all(url):
            if one.name != "http_proxy":
                assert before.get(url, one.name).version == one.version
    assert after.get(CLUSTER, used) is not None
    assert after.get(CLUSTER, f"outbound|3306||{DB}") is not None
    assert after.get(CLUSTER, "outbound|80||more.default.svc.cluster.local") is None
    assert {one.name for one in after.all(LISTENER)} == {one.name for one in before.all(LISTENER)}
    hosts = {one.name: one for one in after.get(ROUTES, "http_proxy").message.virtual_hosts}
    assert hosts.keys() == {f"{REVIEWS}:9080", "front.test:80", "block_all"}
    for one in before.get(ROUTES, "http_proxy").message.virtual_hosts:
        assert hosts.get(one.name, one) == one
