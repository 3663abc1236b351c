"""`--scope observed`: what a proxy is sent that asks for what it calls, and what is taken away again."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from control.ads.hub import Connection, Hub, Scope
from control.ads.interest import MAX_UNKNOWN
from control.ads.server import XdsServer
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ROUTES, VIRTUAL_HOST
from control.translate.translator import MAX_ASKED, Asked, Translator
from meshproxy.api import messages, spiffe
from tests.unit.control_help import MESH, WEB, istio, plain, snapshot

_D = "envoy.service.discovery.v3."
_Request, _Response = messages.known(f"{_D}DeltaDiscoveryRequest"), messages.known(f"{_D}DeltaDiscoveryResponse")
_Report = messages.known("envoy.service.load_stats.v3.LoadStatsRequest")
REVIEWS = "outbound|9080||reviews.default.svc.cluster.local"
HTTP_ONLY = MESH.replace("    outbound: [{host: reviews, port: 9080, listen: 19090}, {host: db, port: 3306, listen: 13306}]\n", "")
MORE = """
apiVersion: v1
kind: Service
metadata: {name: ratings}
spec: {ports: [{name: http, port: 80}]}
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Proxy:
    """The client's end of a stream, without a wire. `has`: names of what it has, by type."""

    def __init__(self, hub: Hub, *, agent: str = "meshproxy", delta: bool = True, only: str = "") -> None:
        self.hub = hub
        self.agent = agent
        self.connection: Connection = hub.open(delta=delta, only=only)
        self.has: dict[str, set[str]] = {}
        self.bytes = 0
        self.nothing: set[str] = set()

    def ask(self, url: str, *names: str, gone: tuple[str, ...] = (), known: tuple[str, ...] = (), nonce: str = "") -> None:
        request = _Request(type_url=url, resource_names_subscribe=names, resource_names_unsubscribe=gone, response_nonce=nonce)
        request.initial_resource_versions.update(dict.fromkeys(known, "old"))
        request.node.id, request.node.user_agent_name = "web.default", self.agent
        self.connection.receive(request.SerializeToString())

    def settle(self) -> None:
        """Take and acknowledge all that comes."""
        while sent := list(self.connection.responses()):
            for data in sent:
                self.bytes += len(data)
                response = _Response.FromString(data)
                has = self.has.setdefault(response.type_url, set())
                for one in response.resources:
                    (has if one.HasField("resource") else self.nothing).add(one.name)
                    assert one.HasField("resource") or list(one.aliases) == [one.name]
                has -= set(response.removed_resources)
                gone = tuple(response.removed_resources) if response.type_url == VIRTUAL_HOST and self.agent == "meshproxy" else ()
                self.ask(response.type_url, nonce=response.nonce, gone=gone)

    def start(self, *known: str) -> Proxy:
        self.ask(CLUSTER, known=known)
        self.ask(ENDPOINTS, "any")
        self.ask(LISTENER)
        self.ask(ROUTES, "http_proxy")
        self.settle()
        return self

    def call(self, host: str) -> None:
        self.ask(VIRTUAL_HOST, f"http_proxy/{host}")
        self.settle()

    def clusters(self) -> set[str]:
        return {name for name in self.has[CLUSTER] if name.startswith("outbound|")}


def serve(*texts: str, scope: Scope = Scope(observed=True), mesh: str = HTTP_ONLY) -> tuple[Hub, Clock]:  # noqa: B008  immutable
    clock = Clock()
    return Hub(snapshot(mesh, MORE, *texts), scope, clock), clock


def test_nothing_before_the_first_call_and_what_is_called_after_it():
    hub, _ = serve()
    proxy = Proxy(hub).start()
    proxy.ask(VIRTUAL_HOST)
    proxy.settle()
    assert proxy.clusters() == set()
    assert proxy.nothing == {"http_proxy/"}, "an answer without any resource would be none to Envoy"
    proxy.call("reviews:9080")
    assert proxy.clusters() == {REVIEWS}
    assert proxy.has[VIRTUAL_HOST] == {"http_proxy/reviews:9080"}
    proxy.call("nobody")
    assert "http_proxy/nobody" in proxy.has[VIRTUAL_HOST], "it is answered as it is without a scope"


def test_what_is_declared_is_there_from_the_beginning():
    hub, _ = serve(mesh=MESH)
    assert Proxy(hub).start().clusters() == {REVIEWS, "outbound|3306||db.default.svc.cluster.local"}


@pytest.mark.parametrize("stream", [{"delta": False}, {"delta": True, "only": CLUSTER}], ids=["state of the world", "a stream of its own"])
def test_who_cannot_ask_gets_everything(stream):
    hub, _ = serve()
    connection = hub.open(**stream)
    made: Any = messages.known(f"{_D}DeltaDiscoveryRequest" if stream["delta"] else f"{_D}DiscoveryRequest")(type_url=CLUSTER)
    made.node.id = "web.default"
    connection.receive(made.SerializeToString())
    (data,) = connection.responses()
    assert data.count(b"outbound|") >= 3


@pytest.mark.parametrize(("mesh", "says", "scoped"), [("observed", "", True), ("all", "", False), ("observed", "all", False), ("all", "observed", True)])
def test_a_workload_goes_before_the_mesh(mesh, says, scoped):
    texts = HTTP_ONLY.replace("httpProxy: 15001", f"httpProxy: 15001\n    scope: {says}" if says else "httpProxy: 15001")
    hub, _ = serve(scope=Scope(observed=mesh == "observed"), mesh=texts)
    assert bool(Proxy(hub).start().clusters()) is not scoped


def test_what_it_brings_is_kept_until_it_says_what_it_asks_for():
    hub, _ = serve()
    proxy = Proxy(hub).start(REVIEWS, "outbound|80||gone.default.svc.cluster.local")
    assert proxy.clusters() == {REVIEWS}
    proxy.ask(VIRTUAL_HOST, "*", "http_proxy/ratings", known=("http_proxy/",))
    proxy.settle()
    assert proxy.clusters() == {"outbound|80||ratings.default.svc.cluster.local"}


def test_a_virtual_host_is_what_it_would_be_among_all_others():
    rule = istio("VirtualService", "reviews", "hosts: [reviews]\nhttp: [{route: [{destination: {host: ratings}}], timeout: 3s}]")
    patch = istio(
        "EnvoyFilter",
        "more",
        """
        configPatches:
        - applyTo: VIRTUAL_HOST
          match: {context: SIDECAR_OUTBOUND, routeConfiguration: {vhost: {name: "reviews.default.svc.cluster.local:9080"}}}
          patch: {operation: MERGE, value: {request_headers_to_remove: [x-secret]}}
        """,
    ).replace("networking.istio.io/v1", "networking.istio.io/v1alpha3")
    made = snapshot(HTTP_ONLY, MORE, rule, patch)
    whole = plain(Translator().view(WEB, made), ROUTES, "http_proxy")["virtual_hosts"]
    alone = plain(Translator().view(WEB, made, Asked(frozenset(["http_proxy/reviews:9080"]))), VIRTUAL_HOST, "http_proxy/reviews:9080")
    expected = next(one for one in whole if "reviews:9080" in one["domains"])
    assert expected["request_headers_to_remove"] == ["x-secret"]
    assert alone == expected | {"name": "http_proxy/reviews:9080", "domains": ["reviews:9080"]}


def test_what_was_asked_for_long_ago_is_forgotten_within_a_snapshot():
    """An application that calls thousands of hosts, in a mesh of which nothing changes."""
    made, translator = snapshot(HTTP_ONLY, MORE), Translator()
    for number in range(3 * MAX_ASKED):
        translator.view(WEB, made, Asked(frozenset(["http_proxy/reviews:9080", f"http_proxy/{number}.test"])))
    assert translator.remembered < 2.5 * MAX_ASKED
    view = translator.view(WEB, made, Asked(frozenset(["http_proxy/reviews:9080"])))
    fresh = Translator().view(WEB, made, Asked(frozenset(["http_proxy/reviews:9080"])))
    assert {one.name: one.version for one in view.all(CLUSTER)} == {one.name: one.version for one in fresh.all(CLUSTER)}


def test_where_rules_send_requests_comes_along():
    rule = istio("VirtualService", "reviews", "hosts: [reviews]\nhttp: [{route: [{destination: {host: ratings}}]}]")
    hub, _ = serve(rule)
    proxy = Proxy(hub).start()
    proxy.call("reviews:9080")
    assert proxy.clusters() == {REVIEWS, "outbound|80||ratings.default.svc.cluster.local"}


def report(hub: Hub, *clusters: str, stream: Any = None) -> Any:
    stream = stream or hub.loads.open()
    made = _Report()
    made.node.id = "web.default"
    for name in clusters:
        made.cluster_stats.add(cluster_name=name).upstream_locality_stats.add(total_issued_requests=1)
    stream.receive(made.SerializeToString())
    return stream


@pytest.mark.parametrize("agent", ["meshproxy", "envoy"])
def test_what_is_not_called_any_more_is_taken_from_those_who_ask_again(agent):
    hub, clock = serve(scope=Scope(observed=True, forget_s=100.0))
    proxy = Proxy(hub, agent=agent).start()
    for host in ("reviews:9080", "ratings"):
        proxy.call(host)
    loads = report(hub)
    for _ in range(15):
        clock.now += 10
        report(hub, REVIEWS, stream=loads)
        hub.tidy()
        proxy.settle()
    ratings = "outbound|80||ratings.default.svc.cluster.local"
    assert proxy.clusters() == ({REVIEWS} if agent == "meshproxy" else {REVIEWS, ratings})
    if agent == "meshproxy":
        assert proxy.has[VIRTUAL_HOST] == {"http_proxy/reviews:9080"}
        proxy.call("ratings")
        assert proxy.clusters() == {REVIEWS, ratings}


def test_nothing_is_taken_from_who_does_not_report():
    hub, clock = serve(scope=Scope(observed=True, forget_s=100.0))
    proxy = Proxy(hub).start()
    proxy.call("ratings")
    clock.now += 1000
    hub.tidy()
    proxy.settle()
    assert proxy.clusters()
    report(hub)  # it only begins to
    clock.now += 50
    hub.tidy()
    proxy.settle()
    assert proxy.clusters()


def test_names_of_nothing_are_not_remembered_without_end():
    hub, clock = serve()
    proxy = Proxy(hub).start()
    proxy.call("reviews:9080")
    for index in range(MAX_UNKNOWN + 50):
        clock.now += 1
        proxy.ask(VIRTUAL_HOST, f"http_proxy/nobody{index}")
    proxy.settle()
    assert proxy.has[VIRTUAL_HOST] == {"http_proxy/reviews:9080", *(f"http_proxy/nobody{index}" for index in range(50, MAX_UNKNOWN + 50))}


def test_a_change_elsewhere_concerns_nobody_who_did_not_call_it():
    made = snapshot(HTTP_ONLY, MORE)
    hub = Hub(made, Scope(observed=True))
    proxy = Proxy(hub).start()
    proxy.call("reviews:9080")
    sent = proxy.bytes
    hub.publish(snapshot(HTTP_ONLY, MORE, MORE.replace("ratings", "another"), before=made))
    proxy.settle()
    assert proxy.bytes == sent


class Caller:
    """Of a call by TLS."""

    def __init__(self) -> None:
        self.code: Any = None

    def auth_context(self) -> Any:
        return {"transport_security_type": (b"ssl",)}

    async def abort(self, code: Any, why: str) -> None:
        self.code = code
        raise RuntimeError(why)


@pytest.mark.parametrize(("account", "code"), [("default", None), ("other", grpc.StatusCode.PERMISSION_DENIED)])
async def test_what_is_used_says_only_whose_it_is(account, code):
    """Nobody keeps, or takes away, what another one calls."""
    hub, _ = serve()

    async def identify(context: Any) -> Any:
        return spiffe.parse(f"spiffe://cluster.local/ns/default/sa/{account}")

    async def requests() -> Any:
        made = _Report()
        made.node.id = "web.default"
        yield made.SerializeToString()

    caller = Caller()
    server = XdsServer(hub, identify=identify)
    answers = server._load_stats(requests(), caller)  # type: ignore[arg-type]  # as much of a context as it needs
    if code is None:
        assert len([one async for one in answers]) == 1
    else:
        with pytest.raises(RuntimeError, match=r"may not have the configuration of web\.default"):
            await anext(answers)
    assert caller.code == code
    assert not hub.loads.streams
    await server.stop()
