"""What a control plane writes into a cluster: conditions, Events, and which of several replicas does."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from control.api_server import Access, ApiServer
from control.app import Mesh
from control.sources.kubernetes import Kubernetes
from control.sources.reflector import Pace
from control.status.gateway_api import CONTROLLER
from control.status.lease import Leadership
from control.status.writer import Writer
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


@pytest.fixture
async def mesh(api, namespace):
    """A cluster that is read, and what is to be written about it."""
    made = Mesh("", "cluster.local", cluster=lambda store: Kubernetes(api, store, (namespace,), Pace(first=0.02, absent=0.1), frozenset({GATEWAY_API})))
    task = asyncio.create_task(made.cluster.run())
    async with asyncio.timeout(PATIENCE):
        await made.cluster.wait_settled()
    yield made
    task.cancel()
    await asyncio.wait([task])


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
    other = said(client.get(classes[1]).get("status", {}).get("conditions", []))
    assert other.get("Accepted", ("Unknown", ""))[0] == "Unknown"  # as the API server itself has it at first
    client.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": namespace}, "spec": {"ports": [{"port": 80}]}})
    await until(mesh, writer, lambda: of_route() == {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")})

    def of_gateway():
        return client.get(gateway(namespace, ours))["status"]

    (listener,) = of_gateway()["listeners"]
    assert (listener["name"], listener["attachedRoutes"]) == ("http", 1)
    assert said(of_gateway()["conditions"]) == {"Accepted": ("True", "Accepted"), "Programmed": ("False", "Pending")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "edge", "namespace": namespace, "labels": {f"{GATEWAY_API}/gateway-name": "edge"}}}
    client.create({**pod, "spec": {"containers": [{"name": "c", "image": "i"}]}})
    client.patch(pod, {"status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]}}, "status")
    await until(mesh, writer, lambda: said(of_gateway()["conditions"])["Programmed"] == ("True", "Programmed"))
    assert said(of_gateway()["listeners"][0]["conditions"]) == {
        "Accepted": ("True", "Accepted"),
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
        await changed.wait()
    assert ours.holds
    task.cancel()
    await asyncio.wait([task])
