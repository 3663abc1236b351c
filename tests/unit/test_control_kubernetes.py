"""A cluster as the source of documents, with an API server in memory, and with the real one where it is at hand."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from control.api_server import Access, ApiServer, Refused, Unreachable
from control.kinds.store import Store
from control.model.service import Locality
from control.model.snapshot import build
from control.sources import reflector
from control.sources.kubernetes import Kubernetes
from control.sources.reflector import Pace, State
from tests.kube.client import Client, crd, kubeconfig
from tests.kube.memory import MemoryApiServer
from tests.kube.real import WHY_NOT, RealApiServer, assets

PATIENCE = 60.0
QUICK = Pace(first=0.02, most=0.2, absent=0.1)
ISTIO = "networking.istio.io"
VIRTUAL_SERVICE = crd(ISTIO, "virtualservices", "VirtualService")
_numbers = itertools.count(1)


@pytest.fixture(scope="module", params=["memory", pytest.param("real", marks=pytest.mark.slow)])
def server(request, tmp_path_factory):
    if request.param == "real" and assets() is None:
        pytest.skip(WHY_NOT)
    made = MemoryApiServer() if request.param == "memory" else RealApiServer(tmp_path_factory.mktemp("kubernetes"))
    made.install([VIRTUAL_SERVICE])
    yield made
    made.close()


@pytest.fixture
def memory():
    made = MemoryApiServer()
    yield made
    made.close()


@pytest.fixture
def client(request):
    made = Client(request.getfixturevalue("server" if "server" in request.fixturenames else "memory"))
    yield made
    made.close()


@pytest.fixture
def namespace(client):
    """A new one for each test: the server is for all of them."""
    name = f"test-{next(_numbers)}"
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


class Source:
    """A cluster that is read, and what is known of it. For use with `async with`."""

    def __init__(self, server, tmp_path, namespace="", *, user=None) -> None:
        self.api = ApiServer(Access(str(kubeconfig(tmp_path, server, user))))
        self.store = Store()
        self.kubernetes = Kubernetes(self.api, self.store, (namespace,) if namespace else (), QUICK)
        self._task: asyncio.Task | None = None

    async def __aenter__(self):
        self.start()
        return self

    async def __aexit__(self, *_):
        await self.pause()
        await self.api.close()

    def start(self):
        self._task = asyncio.create_task(self.kubernetes.run())

    async def pause(self):
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()

    async def settled(self):
        async with asyncio.timeout(PATIENCE):
            await self.kubernetes.wait_settled()
        self.store.settle()

    async def until(self, condition):
        """Wait for changes until something is so."""
        async with asyncio.timeout(PATIENCE):
            while True:
                self.kubernetes.take()
                self.store.settle()
                if condition():
                    return
                await self.kubernetes.changed.wait()

    async def until_state(self, plural, *states):
        """Of a kind; states come without changes of objects."""
        async with asyncio.timeout(PATIENCE):
            await self.kubernetes.wait_until(lambda: self.part(plural).state in states)

    def part(self, plural):
        return next(one for one, _ in self.kubernetes._parts if one.kind.plural == plural)

    def names(self, kind, namespace):
        return {name for _, found, where, name in self.store.objects if (found, where) == (kind, namespace)}

    def value(self, kind, name):
        return next((value for (_, found, _, called), value in self.store.objects.items() if (found, called) == (kind, name)), None)


def service(namespace, name, port=80):
    spec = {"selector": {"app": name}, "ports": [{"name": "http", "port": port}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def endpoint_slice(namespace, service, *addresses, **conditions):
    endpoints = [{"addresses": [one], "conditions": conditions or {"ready": True}, "targetRef": {"kind": "Pod", "name": f"pod-{one}"}} for one in addresses]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{service}-1", "namespace": namespace, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints,
    }


def pod(namespace, address, node="", **annotations):
    meta = {"name": f"pod-{address}", "namespace": namespace, "labels": {"app": "web"}, "annotations": annotations}
    spec = {"containers": [{"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 8080}]}], "serviceAccountName": "web"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {**spec, **({"nodeName": node} if node else {})}}


RUNNING = {"phase": "Running", "podIP": "10.1.0.1", "podIPs": [{"ip": "10.1.0.1"}], "conditions": [{"type": "Ready", "status": "True"}]}


def virtual_service(namespace, host="web", **spec):
    body = {"hosts": [host], "http": [{"route": [{"destination": {"host": host}}]}], **spec}
    return {"apiVersion": f"{ISTIO}/v1", "kind": "VirtualService", "metadata": {"name": "rules", "namespace": namespace}, "spec": body}


async def test_what_is_there_and_what_changes(server, client, namespace, tmp_path):
    client.create(service(namespace, "web"))
    client.create(endpoint_slice(namespace, "web", "10.1.0.1"))
    async with Source(server, tmp_path, namespace) as source:
        await source.settled()
        assert source.names("Service", namespace) == {"web"}
        assert [one.address for one in source.value("EndpointSlice", "web-1").addresses] == ["10.1.0.1"]
        client.replace(endpoint_slice(namespace, "web", "10.1.0.1", "10.1.0.2"))
        await source.until(lambda: len(source.value("EndpointSlice", "web-1").addresses) == 2)
        client.create(service(namespace, "other"))
        await source.until(lambda: source.names("Service", namespace) == {"web", "other"})
        client.delete(service(namespace, "web"))
        await source.until(lambda: source.names("Service", namespace) == {"other"})
        assert source.store.troubles == []
        assert {one.lists for one in source.kubernetes.statistics() if one.state is State.WATCHING} == {1}


async def test_endpoints_know_their_pod_and_its_place(server, client, namespace, tmp_path):
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"node-{namespace}"}}
    node["metadata"]["labels"] = {"topology.kubernetes.io/region": "eu", "topology.kubernetes.io/zone": "eu-1"}
    client.create(node)
    client.create(service(namespace, "web"))
    client.create(endpoint_slice(namespace, "web", "10.1.0.1"))
    sidecar = json.dumps({"inbound": [{"port": 8080, "listen": 18080}], "identity": True})
    client.create(pod(namespace, "10.1.0.1", f"node-{namespace}", **{"meshproxy/sidecar": sidecar, "more": "of others"}))
    client.patch(pod(namespace, "10.1.0.1"), {"status": RUNNING}, "status")
    async with Source(server, tmp_path, namespace) as source:
        await source.settled()
        (found,) = build(source.store.objects).endpoints[f"web.{namespace}.svc.cluster.local", 80]
        assert (found.address, found.port, found.locality) == ("10.1.0.1", 18080, Locality("eu", "eu-1"))
        assert found.workload.startswith(f"pod-10.1.0.1;{namespace};web;")
        assert (found.labels, found.mtls, found.healthy) == ((("app", "web"), ("kubernetes.io/hostname", f"node-{namespace}")), True, True)
        assert build(source.store.objects).workloads[namespace, "pod-10.1.0.1"].service_account == "web"

        known = source.value("Pod", "pod-10.1.0.1")  # what others write into a Pod is no change
        client.patch(pod(namespace, "10.1.0.1"), {"metadata": {"annotations": {"more": "and more"}}})
        client.patch(pod(namespace, "10.1.0.1"), {"status": {"message": "noted"}}, "status")
        client.create(service(namespace, "later"))
        version = client.get(pod(namespace, "10.1.0.1"))["metadata"]["resourceVersion"]
        async with asyncio.timeout(PATIENCE):
            await source.kubernetes.wait_until(lambda: source.part("pods").resource_version == version)
        source.store.settle()
        assert source.value("Pod", "pod-10.1.0.1") is known

        client.patch(node, {"metadata": {"labels": {"topology.kubernetes.io/zone": "eu-2"}}})
        await source.until(lambda: build(source.store.objects).workloads[namespace, "pod-10.1.0.1"].locality == Locality("eu", "eu-2"))
        client.patch(pod(namespace, "10.1.0.1"), {"status": {"phase": "Succeeded"}}, "status")
        await source.until(lambda: (namespace, "pod-10.1.0.1") not in build(source.store.objects).workloads)


async def test_a_wrong_object_keeps_its_last_good_state(server, client, namespace, tmp_path):
    client.create(virtual_service(namespace))
    async with Source(server, tmp_path, namespace) as source:
        await source.settled()
        good = source.value("VirtualService", "rules")
        client.replace(virtual_service(namespace, http=[{"route": [{"destination": {"host": "web"}}], "timeot": "1s"}]))
        await source.until(lambda: source.store.troubles)
        (trouble,) = map(str, source.store.troubles)
        assert trouble.startswith(f"kubernetes: VirtualService.networking.istio.io {namespace}/rules: spec.http[0].timeot: no such field; did you mean")
        assert trouble.endswith("[its last good state is kept]")
        assert source.value("VirtualService", "rules") is good
        client.replace(virtual_service(namespace, host="other"))
        await source.until(lambda: not source.store.troubles)
        assert source.value("VirtualService", "rules") is not good


async def test_kinds_that_come_and_go(server, client, namespace, tmp_path):
    sidecars = crd(ISTIO, "sidecars", "Sidecar")
    async with Source(server, tmp_path, namespace) as source:
        await source.settled()
        assert source.part("sidecars").state is State.ABSENT
        server.install([sidecars])
        document = {"apiVersion": f"{ISTIO}/v1", "kind": "Sidecar", "metadata": {"name": "default", "namespace": namespace}, "spec": {}}
        client.create(document)
        await source.until(lambda: source.names("Sidecar", namespace) == {"default"})
        server.uninstall(ISTIO, "sidecars")
        await source.until(lambda: not source.names("Sidecar", namespace))
        await source.until_state("sidecars", State.ABSENT)


async def test_lists_in_pages(server, client, namespace, tmp_path, monkeypatch):
    monkeypatch.setattr(reflector, "_PAGE", 2)
    for index in range(5):
        client.create(service(namespace, f"s{index}", 80))
    async with Source(server, tmp_path, namespace) as source:
        await source.settled()
        assert source.names("Service", namespace) == {f"s{index}" for index in range(5)}
        if isinstance(server, MemoryApiServer):
            asked = [path for method, path in server.requests if method == "GET" and f"/namespaces/{namespace}/services" in path and "watch" not in path]
            assert len(asked) == 3
            assert ["limit=2" in path for path in asked] == [True] * 3


async def test_a_version_that_is_too_old(server, client, namespace, tmp_path):
    client.create(service(namespace, "web"))
    async with Source(server, tmp_path, namespace) as source:
        await source.settled()
        await source.pause()
        client.delete(service(namespace, "web"))
        client.create(service(namespace, "other"))
        await asyncio.to_thread(server.compact)
        source.part("services").resource_version = "1"
        source.start()
        await source.until(lambda: source.names("Service", namespace) == {"other"})
        assert source.part("services").lists == 2


async def test_an_api_server_that_is_away_and_comes_back(server, client, namespace, tmp_path):
    client.create(service(namespace, "web"))
    async with Source(server, tmp_path, namespace) as source:
        await source.settled()
        server.stop()
        try:
            await source.until_state("services", State.AWAY)
            source.store.settle()
            assert source.names("Service", namespace) == {"web"}
            assert source.part("services").problem
        finally:
            await asyncio.to_thread(server.start)
        await source.until_state("services", State.WATCHING)
        client.create(service(namespace, "other"))
        await source.until(lambda: source.names("Service", namespace) == {"web", "other"})
        assert source.part("services").problem == ""


async def test_only_what_is_selected_is_read(server, client, namespace, tmp_path):
    plain = endpoint_slice(namespace, "web", "10.1.0.1")
    plain["metadata"] = {"name": "nobodys", "namespace": namespace}
    client.create(plain)
    about = {"namespace": namespace}
    client.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "password", **about}, "data": {"password": base64.b64encode(b"x").decode()}})
    client.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings", **about}, "data": {"a": "b"}})
    client.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "broken", **about}, "data": {"ca.crt": base64.b64encode(b"secret!").decode()}})
    async with Source(server, tmp_path, namespace) as source:
        await source.settled()
        assert {name for _, kind, _, name in source.store.objects if kind in ("Secret", "ConfigMap", "EndpointSlice")} == set()
        (trouble,) = source.store.troubles
        assert trouble.identity[3] == "broken"
        assert "secret!" not in str(trouble)


MANIFEST = Path(__file__).resolve().parents[2] / "examples/kubernetes/meshctl.yaml"


async def test_what_our_manifest_lets_us_do(server, client, tmp_path):
    """It is whole, the API server takes it, and with it nothing is forbidden."""
    if not isinstance(server, RealApiServer):
        pytest.skip("only the real one knows about rights")
    for document in yaml.safe_load_all(MANIFEST.read_text()):
        client.create(document)
    async with Source(server, tmp_path, user={"token": "meshctl-token"}) as source:
        await source.settled()
        assert {one.kind: one.problem for one in source.kubernetes.statistics() if one.problem} == {}
        assert source.names("Service", "mesh-system") == {"meshctl"}
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "admin-token"}}
        assert (await source.api.send("POST", "/apis/authentication.k8s.io/v1/tokenreviews", review))["status"]["authenticated"]
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "meshctl", "namespace": "mesh-system"}}
        await source.api.send("POST", "/apis/coordination.k8s.io/v1/namespaces/mesh-system/leases", lease)
        for path in ("/apis/apps/v1/deployments", "/apis/coordination.k8s.io/v1/namespaces/default/leases"):
            with pytest.raises(Refused, match="403"):
                await source.api.get(path)


@pytest.mark.parametrize("turns", [0, 1])
async def test_who_waits_after_a_failure_can_be_ended(turns):
    """Also in the moment in which it need not wait any longer."""
    reach = reflector.Reach(Pace(first=1000.0, most=1000.0), lambda: 1.0)
    waiting = asyncio.create_task(_pause_for_ever(reach))
    for _ in range(5):
        await asyncio.sleep(0)
    reach.answered()
    for _ in range(turns):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting], timeout=PATIENCE)
    assert waiting.cancelled()


async def _pause_for_ever(reach):
    while True:
        await reach.pause(1)


# --- what only the one in memory can be made to do


async def test_watches_go_on_where_they_ended(memory, client, tmp_path):
    async with Source(memory, tmp_path) as source:
        await source.settled()
        memory.drop_watches()
        client.create(service("default", "web"))
        await source.until(lambda: source.names("Service", "default") == {"web"})
        assert source.part("services").lists == 1


async def test_bookmarks_keep_a_silent_watch_young(memory, client, tmp_path):
    memory.bookmark_every_s = 0.01
    async with Source(memory, tmp_path) as source:
        await source.settled()
        made = client.create(service("default", "web"))
        async with asyncio.timeout(PATIENCE):
            await source.kubernetes.wait_until(lambda: int(source.part("secrets").resource_version) >= int(made["metadata"]["resourceVersion"]))
        assert source.part("secrets").lists == 1


async def test_an_api_server_that_was_set_back(memory, client, tmp_path):
    async with Source(memory, tmp_path) as source:
        await source.settled()
        await source.pause()
        client.create(service("default", "web"))
        source.part("services").resource_version = "999999"
        source.start()
        await source.until(lambda: source.names("Service", "default") == {"web"})
        assert source.part("services").lists == 2


async def test_what_we_may_not_read(memory, client, tmp_path):
    client.create(service("default", "web"))
    memory.forbidden = {"secrets", "services"}
    async with Source(memory, tmp_path) as source:
        await source.until_state("services", State.FORBIDDEN)
        await source.until_state("secrets", State.FORBIDDEN)
        assert source.part("secrets").settled  # we can do without
        assert not source.part("services").settled
        memory.forbidden = {"secrets"}
        await source.settled()
        assert source.names("Service", "default") == {"web"}
        memory.forbidden = {"services"}
        memory.drop_watches()
        await source.until_state("services", State.FORBIDDEN)
        source.store.settle()
        assert source.names("Service", "default") == {"web"}


async def test_errors_of_the_api_server_change_nothing(memory, client, tmp_path):
    client.create(service("default", "web"))
    async with Source(memory, tmp_path) as source:
        await source.settled()
        memory.failing = 500
        memory.drop_watches()
        await source.until_state("services", State.AWAY)
        memory.failing = 0
        await source.until_state("services", State.WATCHING)
        assert source.names("Service", "default") == {"web"}
        assert source.part("services").lists == 1


async def test_a_token_that_is_rotated(memory, client, tmp_path):
    token = tmp_path / "token"
    token.write_text("first\n")
    memory.tokens["first"] = "us"
    async with Source(memory, tmp_path, user={"tokenFile": str(token)}) as source:
        await source.settled()
        token.write_text("second\n")
        del memory.tokens["first"]
        memory.tokens["second"] = "us"
        memory.drop_watches()
        client.create(service("default", "web"))
        await source.until(lambda: source.names("Service", "default") == {"web"})
        assert source.part("services").lists == 1
        assert source.part("services").state is State.WATCHING


async def test_a_plugin_says_who_we_are(memory, client, tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(f"""
import json, os, pathlib
info = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
token = pathlib.Path({str(tmp_path / "token")!r}).read_text()
print(json.dumps({{"apiVersion": info["apiVersion"], "kind": "ExecCredential", "status": {{"token": token}}}}))
""")
    (tmp_path / "token").write_text("one")
    memory.tokens["one"] = "us"
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": [str(plugin)], "interactiveMode": "Never"}}
    async with Source(memory, tmp_path, user=user) as source:
        await source.settled()
        (tmp_path / "token").write_text("two")
        memory.tokens = {"admin-token": "admin", "two": "us"}
        assert (await source.api.get("/api/v1/namespaces/default/pods"))["items"] == []
        memory.tokens = {}
        with pytest.raises(Refused, match="401"):
            await source.api.get("/api/v1/namespaces/default/pods")


async def test_a_list_that_expires_between_its_pages(memory, client, tmp_path, monkeypatch):
    monkeypatch.setattr(reflector, "_PAGE", 1)
    for index in range(3):
        client.create(service("default", f"s{index}"))
    source = Source(memory, tmp_path)
    get = source.api.get

    async def forgetful(path, parameters=None, *rest):
        if parameters is not None and "continue" in parameters and path.endswith("services"):
            await asyncio.to_thread(memory.compact)
        return await get(path, parameters, *rest)

    monkeypatch.setattr(source.api, "get", forgetful)
    async with source:
        await source.settled()
        assert source.names("Service", "default") == {"s0", "s1", "s2"}
        assert [path for _, path in memory.requests if path == "/api/v1/services"]  # in one piece


@pytest.mark.parametrize("kubernetes", [{}, {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}])
async def test_nowhere_to_find_an_api_server(tmp_path, monkeypatch, kubernetes):
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in kubernetes.items():
        monkeypatch.setenv(name, value)
    server = ApiServer(Access(mount=str(tmp_path)))
    with pytest.raises(Unreachable, match=r"does not exist|no such kubeconfig"):
        await server.get("/api")
    await server.close()


async def test_a_kubeconfig_that_says_nothing(tmp_path):
    for text in ("", "[]", "{}", "current-context: x", "\0"):
        (tmp_path / "config").write_text(text)
        server = ApiServer(Access(str(tmp_path / "config")))
        with pytest.raises(Unreachable, match="how to find the API server"):
            await server.get("/api")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(tmp_path / "config")
