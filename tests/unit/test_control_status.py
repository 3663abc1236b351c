"""What a control plane writes into a cluster: conditions, Events, and which of several replicas does."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

from control.api_server import Access, ApiServer
from control.app import Mesh
from control.kinds.registry import Identity
from control.kinds.store import Store, Trouble
from control.model.snapshot import build
from control.sources.kubernetes import About, Kubernetes
from control.sources.reflector import Pace
from control.status.conditions import CONTROLLER
from control.status.gateway_api import FEATURES
from control.status.lease import Leadership
from control.status.writer import Writer
from meshproxy.api.errors import Problem
from tests.differential.pki import Authority
from tests.kube.client import GATEWAY_API, Client, gateway_api, kubeconfig
from tests.kube.memory import MemoryApiServer
from tests.kube.real import WHY_NOT, RealApiServer, assets

PATIENCE = 60.0
_numbers = itertools.count(1)


@pytest.fixture(scope="module", params=["memory", pytest.param("real", marks=pytest.mark.slow)])
def server(request, tmp_path_factory):
    if request.param == "real" and assets() is None:
        pytest.skip(WHY_NOT)
    made = MemoryApiServer() if request.param == "memory" else RealApiServer(tmp_path_factory.mktemp("kubernetes"))
    made.install(gateway_api(made))
    yield made
    made.close()


@pytest.fixture
def client(server):
    made = Client(server)
    yield made
    made.close()


@pytest.fixture
def namespace(client):
    name = f"status-{next(_numbers)}"
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


@pytest.fixture
async def api(server, tmp_path):
    made = ApiServer(Access(str(kubeconfig(tmp_path, server))))
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def reading(api, *namespaces):
    """A cluster that is read, and what is to be written about it."""
    made = Mesh("", "cluster.local", cluster=lambda store: Kubernetes(api, store, namespaces, Pace(first=0.02, absent=0.1), frozenset({GATEWAY_API})))
    task = asyncio.create_task(made.cluster.run())
    async with asyncio.timeout(PATIENCE):
        await made.cluster.wait_settled()
    yield made
    task.cancel()
    await asyncio.wait([task])


@pytest.fixture
async def mesh(api, namespace):
    async with reading(api, namespace) as made:
        yield made


def document(kind, name, namespace, spec, version="v1"):
    return {"apiVersion": f"{GATEWAY_API}/{version}", "kind": kind, "metadata": {"name": name, **({"namespace": namespace} if namespace else {})}, "spec": spec}


def gateway(namespace, of_class, *listeners):
    chosen = listeners or ({"name": "http", "port": 80, "protocol": "HTTP", "hostname": "*.example.com"},)
    return document("Gateway", "edge", namespace, {"gatewayClassName": of_class, "listeners": list(chosen)})


def route(namespace, backend="web", host="a.example.com", **parent):
    backends = [{"name": backend, "port": 80}] if isinstance(backend, str) else [backend]
    spec = {"parentRefs": [{"name": "edge", **parent}], "hostnames": [host], "rules": [{"backendRefs": backends}]}
    return document("HTTPRoute", "a", namespace, spec)


def said(conditions):
    return {one["type"]: (one["status"], one["reason"]) for one in conditions}


async def until(mesh, writer, condition):
    """Look, write, and look whether it is so."""
    async with asyncio.timeout(PATIENCE):
        while True:
            mesh.look()
            mesh.settle()
            assert await writer.write()
            if await asyncio.to_thread(condition):
                return
            await mesh.cluster.changed.wait()


async def test_conditions(api, mesh, client, namespace):
    ours, theirs = f"ours-{namespace}", f"theirs-{namespace}"
    classes = [
        document("GatewayClass", ours, "", {"controllerName": CONTROLLER}),
        document("GatewayClass", theirs, "", {"controllerName": "example.com/other"}),
    ]
    for one in (*classes, gateway(namespace, ours), route(namespace)):
        client.create(one)
    writer = Writer(api, mesh)

    def parents():
        return client.get(route(namespace)).get("status", {}).get("parents", [])

    def of_route():
        return said(parents()[0]["conditions"]) if parents() else {}

    await until(mesh, writer, lambda: of_route() == {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("False", "BackendNotFound")})
    assert parents()[0]["controllerName"] == CONTROLLER
    assert said(client.get(classes[0])["status"]["conditions"])["Accepted"] == ("True", "Accepted")
    assert [one["name"] for one in client.get(classes[0])["status"]["supportedFeatures"]] == sorted(FEATURES.split())
    other = said(client.get(classes[1]).get("status", {}).get("conditions", []))
    assert other.get("Accepted", ("Unknown", ""))[0] == "Unknown"  # as the API server itself has it at first
    client.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": namespace}, "spec": {"ports": [{"port": 80}]}})
    await until(mesh, writer, lambda: of_route() == {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")})

    def of_gateway():
        return client.get(gateway(namespace, ours))["status"]

    (listener,) = of_gateway()["listeners"]
    assert (listener["name"], listener["attachedRoutes"]) == ("http", 1)
    assert said(of_gateway()["conditions"]) == {
        "Accepted": ("True", "Accepted"),
        "Programmed": ("False", "Pending"),
        "ResolvedRefs": ("True", "ResolvedRefs"),
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "edge", "namespace": namespace, "labels": {f"{GATEWAY_API}/gateway-name": "edge"}}}
    client.create({**pod, "spec": {"containers": [{"name": "c", "image": "i"}]}})
    client.patch(pod, {"status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]}}, "status")
    await until(mesh, writer, lambda: said(of_gateway()["conditions"])["Programmed"] == ("True", "Programmed"))
    assert said(of_gateway()["listeners"][0]["conditions"]) == {
        "Accepted": ("True", "Accepted"),
        "Conflicted": ("False", "NoConflicts"),
        "ResolvedRefs": ("True", "ResolvedRefs"),
        "Programmed": ("True", "Programmed"),
    }

    for changed, condition in [
        (route(namespace, host="other.test"), ("Accepted", "NoMatchingListenerHostname")),
        (route(namespace, sectionName="https"), ("Accepted", "NoMatchingParent")),
        (route(namespace, {"name": "web", "namespace": "elsewhere", "port": 80}), ("ResolvedRefs", "RefNotPermitted")),
    ]:
        client.replace(changed)
        await until(mesh, writer, lambda: of_route().get(condition[0]) == ("False", condition[1]))  # noqa: B023
    client.replace(route(namespace))
    await until(mesh, writer, lambda: of_route() == {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")})
    assert parents()[0]["conditions"][0]["observedGeneration"] == client.get(route(namespace))["metadata"]["generation"]

    tls = {"name": "tls", "port": 443, "protocol": "HTTPS", "tls": {"certificateRefs": [{"name": "none"}]}}
    client.replace(gateway(namespace, ours, *gateway(namespace, ours)["spec"]["listeners"], tls))
    await until(mesh, writer, lambda: len(of_gateway()["listeners"]) == 2)
    assert said(of_gateway()["listeners"][1]["conditions"])["ResolvedRefs"] == ("False", "InvalidCertificateRef")

    before = writer.written
    assert await writer.write()  # all is said
    await until(mesh, writer, lambda: True)
    assert writer.written == before


def value(kind, name, namespace, **rest):
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, **rest}


async def test_where_a_gateway_is_reached(api, mesh, client, namespace):
    """By its pods, by the Service before them, and by that one's load balancer, the more outside the better."""
    ours = f"ours-{namespace}"
    for one in (document("GatewayClass", ours, "", {"controllerName": CONTROLLER}), gateway(namespace, ours)):
        client.create(one)
    writer = Writer(api, mesh)
    label = {f"{GATEWAY_API}/gateway-name": "edge"}

    def addresses():
        return [(one["type"], one["value"]) for one in client.get(gateway(namespace, ours)).get("status", {}).get("addresses", ())]

    pod = value("Pod", "edge", namespace, spec={"containers": [{"name": "c", "image": "i"}]})
    client.create({**pod, "metadata": {**pod["metadata"], "labels": label}})
    client.patch(pod, {"status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]}}, "status")
    await until(mesh, writer, lambda: addresses() == [("IPAddress", "10.0.0.1")])
    before = value("Service", "edge", namespace, spec={"type": "LoadBalancer", "selector": label, "ports": [{"port": 80}]})
    (inside,) = client.create(before)["spec"].get("clusterIPs") or ["10.0.0.1"]
    await until(mesh, writer, lambda: addresses() == [("IPAddress", inside)])
    client.patch(before, {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.7"}, {"hostname": "edge.example.com"}]}}}, "status")
    await until(mesh, writer, lambda: addresses() == [("IPAddress", "192.0.2.7"), ("Hostname", "edge.example.com")])
    client.delete(pod)
    await until(mesh, writer, lambda: addresses() == [])
    assert said(client.get(gateway(namespace, ours))["status"]["conditions"])["Programmed"] == ("False", "Pending")


async def test_why_a_listener_has_no_certificate_and_takes_no_such_routes(api, mesh, client, namespace):
    ours = f"ours-{namespace}"
    tls = {"certificateRefs": [{"name": "theirs", "namespace": "elsewhere"}]}
    kinds = {"kinds": [{"kind": "HTTPRoute"}, {"kind": "TCPRoute"}]}
    listeners = ({"name": "tls", "port": 443, "protocol": "HTTPS", "tls": tls}, {"name": "http", "port": 80, "protocol": "HTTP", "allowedRoutes": kinds})
    wrong = document("GatewayClass", f"wrong-{namespace}", "", {"controllerName": CONTROLLER, "parametersRef": {"group": "", "kind": "ConfigMap", "name": "x"}})
    for one in (document("GatewayClass", ours, "", {"controllerName": CONTROLLER}), wrong, gateway(namespace, ours, *listeners)):
        client.create(one)
    writer = Writer(api, mesh)

    def of_listeners():
        return {one["name"]: said(one["conditions"]) for one in client.get(gateway(namespace, ours)).get("status", {}).get("listeners", ())}

    await until(mesh, writer, lambda: of_listeners().get("tls", {}).get("ResolvedRefs") == ("False", "RefNotPermitted"))
    assert of_listeners()["tls"]["Programmed"] == ("False", "Invalid")
    assert of_listeners()["http"]["ResolvedRefs"] == ("False", "InvalidRouteKinds")
    assert [one["kind"] for one in client.get(gateway(namespace, ours))["status"]["listeners"][1]["supportedKinds"]] == ["HTTPRoute"]
    assert said(client.get(wrong)["status"]["conditions"])["Accepted"] == ("False", "InvalidParameters")


async def test_what_may_be_referred_to_changes(api, client, namespace):
    """A ReferenceGrant comes and goes; what refers to something by it says so."""
    ours, there = f"ours-{namespace}", f"{namespace}-there"
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": there}})
    beyond = route(namespace, {"name": "web", "namespace": there, "port": 80})
    documents = (document("GatewayClass", ours, "", {"controllerName": CONTROLLER}), gateway(namespace, ours), beyond)
    for one in (*documents, value("Service", "web", there, spec={"ports": [{"port": 80}]})):
        client.create(one)
    origin = {"group": GATEWAY_API, "kind": "HTTPRoute", "namespace": namespace}
    grant = document("ReferenceGrant", "all", there, {"from": [origin], "to": [{"group": "", "kind": "Service"}]}, "v1beta1")

    def resolved():
        parents = client.get(beyond).get("status", {}).get("parents", [])
        return said(parents[0]["conditions"])["ResolvedRefs"] if parents else None

    async with reading(api, namespace, there) as mesh:
        writer = Writer(api, mesh)
        await until(mesh, writer, lambda: resolved() == ("False", "RefNotPermitted"))
        client.create(grant)
        await until(mesh, writer, lambda: resolved() == ("True", "ResolvedRefs"))
        client.delete(grant)
        await until(mesh, writer, lambda: resolved() == ("False", "RefNotPermitted"))
    (parent,) = client.get(beyond)["status"]["parents"]
    assert said(parent["conditions"])["Accepted"] == ("True", "Accepted")  # whatever becomes of its backends


async def test_policies_of_backends(api, mesh, client, namespace, tmp_path):
    ours = f"ours-{namespace}"

    def policy(name, target="web"):
        validation = {"hostname": "web.test", "caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "roots"}]}
        return document("BackendTLSPolicy", name, namespace, {"targetRefs": [{"group": "", "kind": "Service", "name": target}], "validation": validation})

    def told(name):
        """Of the only entry of ours."""
        (one,) = [one for one in client.get(policy(name)).get("status", {}).get("ancestors", ()) if one["controllerName"] == CONTROLLER] or [None]
        return one and (one["ancestorRef"]["kind"], one["ancestorRef"]["name"], *said(one["conditions"]).values())

    good = (("True", "Accepted"), ("True", "ResolvedRefs"))
    client.create(value("Service", "web", namespace, spec={"ports": [{"port": 80}]}))
    for one in (policy("a"), policy("b"), policy("c", "none")):
        client.create(one)
    condition = {"type": "Accepted", "status": "True", "reason": "Accepted", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    theirs = {"ancestorRef": {"name": "edge"}, "controllerName": "example.com/other", "conditions": [condition]}
    client.patch(policy("a"), {"status": {"ancestors": [theirs]}}, "status")
    writer = Writer(api, mesh)
    unresolved = ("False", "InvalidCACertificateRef")
    await until(mesh, writer, lambda: told("a") == ("Service", "web", ("False", "NoValidCACertificate"), unresolved))
    assert told("b") == ("Service", "web", ("False", "Conflicted"), unresolved)
    assert told("c") == ("Service", "none", ("False", "TargetNotFound"), unresolved)
    Authority(tmp_path, "roots")
    client.create(value("ConfigMap", "roots", namespace, data={"ca.crt": (tmp_path / "roots.pem").read_text()}))
    await until(mesh, writer, lambda: told("a") == ("Service", "web", *good))
    for one in (document("GatewayClass", ours, "", {"controllerName": CONTROLLER}), gateway(namespace, ours), route(namespace)):
        client.create(one)
    await until(mesh, writer, lambda: told("a") == ("Gateway", "edge", *good))
    assert client.get(policy("a"))["status"]["ancestors"][0]["controllerName"] == "example.com/other"
    client.delete(policy("a"))
    await until(mesh, writer, lambda: told("b") == ("Gateway", "edge", *good))


async def test_others_entries_stay(api, mesh, client, namespace):
    ours = f"ours-{namespace}"
    for one in (document("GatewayClass", ours, "", {"controllerName": CONTROLLER}), gateway(namespace, ours), route(namespace)):
        client.create(one)
    condition = {"type": "Accepted", "status": "True", "reason": "Accepted", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    theirs = {"parentRef": {"name": "edge"}, "controllerName": "example.com/other", "conditions": [condition]}
    client.patch(route(namespace), {"status": {"parents": [theirs]}}, "status")
    writer = Writer(api, mesh)
    await until(mesh, writer, lambda: len(client.get(route(namespace))["status"]["parents"]) == 2)
    assert client.get(route(namespace))["status"]["parents"][0]["conditions"] == [condition]


async def test_why_an_object_is_refused(api, mesh, client, namespace):
    """As a condition where there are conditions, and as an Event, once."""
    ours = f"ours-{namespace}"
    wrong = route(namespace)
    wrong["spec"]["rules"][0]["filters"] = [{"type": "ExtensionRef", "extensionRef": {"group": "a", "kind": "B", "name": "c"}}]
    slices = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bad", "namespace": namespace}, "data": {"ca.crt": "eA=="}}
    for one in (document("GatewayClass", ours, "", {"controllerName": CONTROLLER}), gateway(namespace, ours), wrong, slices):
        client.create(one)
    writer = Writer(api, mesh)

    def accepted():
        parents = client.get(wrong).get("status", {}).get("parents", [])
        return next((one for one in parents[0]["conditions"] if one["type"] == "Accepted"), {}) if parents else {}

    await until(mesh, writer, lambda: accepted().get("reason") == "UnsupportedValue")
    assert "ExtensionRef is not served" in accepted()["message"]

    def events():
        return {one["involvedObject"]["name"]: one for one in client.list("v1", "events", namespace) if one["reason"] == "Refused"}

    await until(mesh, writer, lambda: set(events()) == {"a", "bad"})
    assert events()["bad"]["message"] == "data[ca.crt]: no certificates in PEM"
    assert events()["a"]["involvedObject"]["uid"] == client.get(wrong)["metadata"]["uid"]
    assert await Writer(api, mesh).write()  # another replica
    assert len([one for one in client.list("v1", "events", namespace) if one["reason"] == "Refused"]) == 2


async def test_one_of_several_replicas_writes(api, client, namespace):
    changed = asyncio.Event()
    replicas = [Leadership(api, namespace, "meshctl", name, changed.set, duration_s=2.0) for name in ("one", "two")]
    tasks = [asyncio.create_task(one.run()) for one in replicas]

    async def leader():
        async with asyncio.timeout(PATIENCE):
            while True:
                found = [index for index, one in enumerate(replicas) if one.holds]
                assert len(found) <= 1
                if found:
                    return found[0]
                changed.clear()
                await changed.wait()

    first = await leader()
    tasks[first].cancel()  # it gives the Lease back
    await asyncio.wait([tasks[first]])
    second = await leader()
    assert second != first
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "meshctl", "namespace": namespace}}
    assert client.get(lease)["spec"]["holderIdentity"] == ("one", "two")[second]
    assert client.get(lease)["spec"]["leaseTransitions"] >= 1
    tasks[second].cancel()
    await asyncio.wait([tasks[second]])


async def test_a_lease_that_is_not_renewed_is_taken(api, client, namespace):
    """Of a replica that ended without a word; its clock, far ahead, does not count."""
    about = {"name": "meshctl", "namespace": namespace}
    spec = {"holderIdentity": "gone", "leaseDurationSeconds": 1, "renewTime": "2099-01-01T00:00:00.000000Z"}
    client.create({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": about, "spec": spec})
    changed = asyncio.Event()
    ours = Leadership(api, namespace, "meshctl", "ours", changed.set, duration_s=1.5)
    task = asyncio.create_task(ours.run())
    async with asyncio.timeout(PATIENCE):
        while not ours.holds:  # it may be lost again for a while, on a machine that stands still
            changed.clear()
            await changed.wait()
    lease = client.get({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": about})
    assert lease["spec"]["holderIdentity"] == "ours"
    task.cancel()
    await asyncio.wait([task])


class Told:
    """An API server that takes everything, and what happens meanwhile."""

    def __init__(self, meanwhile):
        self.names = []
        self._meanwhile = meanwhile

    async def send(self, method, path, body, **_):
        self.names.append(body["involvedObject"]["name"])
        self._meanwhile(self.names)


class Wrong:
    """A mesh with objects of a cluster that are wrong."""

    def __init__(self, *names):
        self.cluster, self.store, self.snapshot = self, Store(), build({})
        self.about = {f"kubernetes: {name}": About("v1", f"uid {name}", 1, None) for name in names}
        self.troubles = [Trouble(f"kubernetes: {name}", -1, Identity(("", "Service", "default", name)), Problem("spec", "no"), False) for name in names]


async def test_an_object_that_goes_while_others_are_told_of_ends_nothing():
    mesh = Wrong("a", "b", "c")
    api = Told(lambda names: mesh.about.pop("kubernetes: b", None))
    writer = Writer(api, mesh)
    assert await writer.write()
    assert api.names == ["a", "c"]
    assert await writer.write()
    assert api.names == ["a", "c"], "each is told once"
    del mesh.about["kubernetes: a"]
    assert await writer.write()
    mesh.about["kubernetes: a"] = About("v1", "uid a", 1, None)
    assert await writer.write()
    assert api.names == ["a", "c", "a"], "what is wrong no more is forgotten"


async def test_who_loses_the_lease_in_the_middle_stops():
    api = Told(lambda names: None)
    assert await Writer(api, Wrong("a", "b", "c")).write(lambda: len(api.names) < 2)
    assert api.names == ["a", "b"]
