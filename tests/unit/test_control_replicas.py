"""Control planes over the same folder are the same to a proxy: one that moves from one to another is sent what changed meanwhile, and nothing else."""

from __future__ import annotations

import pytest

from control.ads.hub import Hub
from control.ads.session import State
from control.app import Mesh
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ORDER, ROUTES
from meshproxy.api import messages
from tests.unit.control_help import MESH, istio

_D = "envoy.service.discovery.v3."
RULES = istio("VirtualService", "reviews", "{hosts: [reviews], http: [{timeout: 5s, route: [{destination: {host: reviews, subset: v1}}]}]}")
SUBSETS = istio("DestinationRule", "reviews", "{host: reviews, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}")


class Replica:
    """A control plane, without its server."""

    def __init__(self, folder) -> None:
        self.mesh = Mesh(str(folder), "cluster.local")
        self.hub = Hub(self.mesh.snapshot)

    def look(self) -> None:
        self.mesh.look()
        self.mesh.settle()
        self.hub.publish(self.mesh.snapshot)


class Proxy:
    """A delta client: it remembers what it has, and says so to whom it comes next. `received` are (type, name) of all that it was sent, in order."""

    def __init__(self) -> None:
        self.has: dict[str, dict[str, str]] = {url: {} for url in ORDER}
        self.received: list[tuple[str, str]] = []

    def connect(self, replica: Replica) -> None:
        self.connection = replica.hub.open(delta=True)
        names = {ENDPOINTS: [], ROUTES: []}
        for url in (CLUSTER, LISTENER):
            self._say(url)
        for url in names:
            wanted = sorted(self.has[url]) or self._referred(url)
            self._say(url, resource_names_subscribe=wanted)

    def _referred(self, url: str) -> list[str]:
        if url == ENDPOINTS:
            return [name for name in self.has[CLUSTER] if name.startswith("outbound|")]
        return ["http_proxy", "reviews.default.svc.cluster.local:9080"]

    def _say(self, url: str, **fields) -> None:
        request = messages.known(f"{_D}DeltaDiscoveryRequest")(type_url=url, initial_resource_versions=self.has[url], **fields)
        request.node.id = "web.default"
        self.connection.receive(request.SerializeToString())
        self.hear()

    def hear(self) -> None:
        while responses := list(self.connection.responses()):
            for data in responses:
                response = messages.known(f"{_D}DeltaDiscoveryResponse").FromString(data)
                has = self.has[response.type_url]
                for one in response.resources:
                    has[one.name] = one.version
                    self.received.append((response.type_url, one.name))
                for name in response.removed_resources:
                    has.pop(name, None)
                answer = messages.known(f"{_D}DeltaDiscoveryRequest")(type_url=response.type_url, response_nonce=response.nonce)
                self.connection.receive(answer.SerializeToString())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mesh.yaml").write_text(MESH)
    (tmp_path / "rules.yaml").write_text(f"{RULES}---\n{SUBSETS}")
    return tmp_path


def test_a_move_sends_nothing(folder):
    one, other = Replica(folder), Replica(folder)
    one.look()
    # The other one has come to the same by another way: what is in one file there was in two before, and something else was there in between.
    (folder / "rules.yaml").write_text(RULES.replace("5s", "7s"))
    other.look()
    (folder / "rules.yaml").unlink()
    other.look()
    (folder / "a.yaml").write_text(SUBSETS)
    (folder / "z.yaml").write_text(RULES)
    other.look()

    proxy = Proxy()
    proxy.connect(one)
    assert {url for url, _ in proxy.received} == {CLUSTER, ENDPOINTS, LISTENER, ROUTES}
    has = {url: dict(found) for url, found in proxy.has.items()}
    proxy.received.clear()
    proxy.connect(other)
    assert proxy.received == []
    assert proxy.has == has
    states = {url: one.state for url, one in proxy.connection.session.subscriptions.items()}
    assert states == dict.fromkeys((CLUSTER, ENDPOINTS, LISTENER, ROUTES), State.SYNCED)


def test_a_move_sends_what_changed_meanwhile(folder):
    one, other = Replica(folder), Replica(folder)
    one.look()
    proxy = Proxy()
    proxy.connect(one)
    proxy.received.clear()
    (folder / "rules.yaml").write_text(f"{RULES.replace('5s', '7s')}---\n{SUBSETS.replace('v2', 'v3')}")
    other.look()
    proxy.connect(other)
    name = "outbound|{}|v3|reviews.default.svc.cluster.local".format
    assert set(proxy.received) == {
        (CLUSTER, name(9080)),
        (ROUTES, "http_proxy"),
        (ROUTES, "reviews.default.svc.cluster.local:9080"),
    }
    assert not any("|v2|" in one for one in proxy.has[CLUSTER])
