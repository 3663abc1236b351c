"""A mesh by the manifests of examples/kubernetes, with the real API server: what a user applies, and nothing that we are allowed besides.

There is no kubelet: it is this test that runs what the Pods say, tells the API server about it, and projects their tokens.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from control.api_server import Access, ApiServer
from control.ca.attestation import Rejected
from control.ca.kubernetes import AUDIENCE, KubernetesTokens
from control.ca.token_review import TokenReviews
from control.status.conditions import CONTROLLER
from tests.e2e.control_plane import ControlPlane, Ports, Service
from tests.e2e.proxy import ROOT, Proxy, wait_until
from tests.kube.client import GATEWAY_API, Client, crd, gateway_api, istio, kubeconfig
from tests.kube.real import WHY_NOT, RealApiServer, assets

pytestmark = [pytest.mark.slow, pytest.mark.skipif(assets() is None, reason=WHY_NOT)]
EXAMPLES = ROOT / "examples"
US, OURS = "system:serviceaccount:mesh-system:meshctl", "spiffe://cluster.local/ns/default/sa/web"
READING = {"get", "list", "watch"}


def documents(*names):
    return [one for name in names for one in yaml.safe_load_all((EXAMPLES / name).read_text()) if one]


def chosen(kind, name="kubernetes/meshctl.yaml"):
    return next(one for one in documents(name) if one["kind"] == kind)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = RealApiServer(tmp_path_factory.mktemp("kubernetes"))
    experimental = [crd(GATEWAY_API, plural, kind, "v1alpha2") for plural, kind in (("tcproutes", "TCPRoute"), ("tlsroutes", "TLSRoute"))]
    known = gateway_api(made)
    if not any(one["spec"]["names"]["kind"] == "ListenerSet" for one in known):  # which is younger than some of those that are at hand
        known.append(crd(GATEWAY_API, "listenersets", "ListenerSet"))
    made.install([*known, *experimental, *istio(made)])
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(server):
    made = Client(server)
    for one in documents("kubernetes/meshctl.yaml", "kubernetes/web.yaml"):
        made.create(one)
    yield made
    made.close()


@pytest.mark.parametrize(
    "path", [path.relative_to(EXAMPLES) for folder in ("kubernetes", "mesh") for path in sorted((EXAMPLES / folder).glob("*.yaml"))], ids=str
)
def test_no_field_is_unknown(client, path):
    for one in documents(path):
        if not one["apiVersion"].startswith("meshproxy/"):  # which are of folders
            one["metadata"]["name"] = f"again-{one['metadata']['name']}"
            client.check(one)


@pytest.mark.parametrize("name", ["kubernetes/meshctl.yaml", "kubernetes/web.yaml"])
def test_pods_have_no_more_rights_than_they_need(client, name):
    """They fit into a namespace that asks for the strictest of the Pod Security Standards."""
    if name == "kubernetes/web.yaml":
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": labels}})
    namespace = "mesh-system" if name == "kubernetes/meshctl.yaml" else "strict"
    template = chosen("Deployment", name)["spec"]["template"]
    client.check({"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "one", "namespace": namespace}, "spec": template["spec"]})
    loose = {**template["spec"], "securityContext": {}}
    with pytest.raises(AssertionError, match="violates PodSecurity"):
        client.check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one", "namespace": namespace}, "spec": loose})


def account(name, namespace):
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}}


class Mesh:
    """The control plane of the manifest, with the token of its service account, and the pod of web.yaml, here on this machine."""

    def __init__(self, server: RealApiServer, client: Client, work: Path) -> None:
        self.work, self.client, self.ports = work, client, Ports()
        self._made: list[dict] = []
        self.service = Service("web")
        self.inbound, self.http_proxy = self.ports.take(), self.ports.take()
        (work / "us").write_text(client.token(account("meshctl", "mesh-system")))
        self.kubeconfig = kubeconfig(work, server, {"tokenFile": str(work / "us")})
        given = {"--ca-dir": work / "ca", "--tls-listen": "127.0.0.1:0", "--mtls-listen": "127.0.0.1:0", "--status-listen": "127.0.0.1:0"}
        (container,) = chosen("Deployment")["spec"]["template"]["spec"]["containers"]
        flags = [f"{name}={given.get(name, value)}" if value else name for name, _, value in (one.partition("=") for one in container["args"][1:])]
        self.control = ControlPlane(None, work, flags=[*flags, "--kubeconfig", str(self.kubeconfig), "--tls-name=localhost"])
        self.control.start()
        self.proxy: Proxy | None = None

    def create(self, document: dict) -> None:
        """For as long as this lasts."""
        self.client.create(document)
        self._made.append(document)

    def run_pod(self) -> None:
        """As the controller of Deployments and a kubelet do. There is no EndpointSlice: it could not have an address of this machine alone."""
        ports = [{"name": "http", "port": 80, "targetPort": self.service.port}]
        self.client.patch(chosen("Service", "kubernetes/web.yaml"), {"spec": {"ports": ports}})
        template = chosen("Deployment", "kubernetes/web.yaml")["spec"]["template"]
        sidecar = {"inbound": [{"port": self.service.port, "listen": self.inbound}], "httpProxy": self.http_proxy, "identity": True}
        meta = {**template["metadata"], "name": "web-1", "namespace": "default", "annotations": {"meshproxy/sidecar": json.dumps(sidecar)}}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}
        self.create(pod)
        status = {"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}], "conditions": [{"type": "Ready", "status": "True"}]}
        self.client.patch(pod, {"status": status}, "status")

    def start_sidecar(self) -> None:
        """As the init container and the sidecar of the pod do."""
        (self.work / "roots.pem").write_text(self.meshctl("certs", "--ca-dir", str(self.work / "ca"), "--bundle"))
        (self.work / "token").write_text(self.client.token(account("web", "default"), AUDIENCE))
        tls, mtls = (re.search(rf"{word} on 127.0.0.1:(\d+)", self.control.log())[1] for word in ("(?<!mutual )TLS", "mutual TLS"))
        flags = ["--server", f"localhost:{mtls}", "--tls", "--authority", f"localhost:{tls}"]
        made = self.meshctl("bootstrap", "web-1.default", *flags, "--roots", str(self.work / "roots.pem"), "--token-file", str(self.work / "token"))
        (self.work / "web").mkdir()
        self.proxy = Proxy(self.work / "web", made, "--concurrency", "1", "-l", "error")

    @staticmethod
    def meshctl(*arguments: str) -> str:
        return subprocess.run([sys.executable, "-m", "control", *arguments], capture_output=True, text=True, cwd=ROOT, check=True).stdout

    def close(self) -> None:
        for one in reversed(self._made):
            self.client.delete(one)
        if self.proxy is not None:
            self.proxy.__exit__()
        self.control.kill()
        self.service.close()
        self.ports.close()


@pytest.fixture
def mesh(server, client, tmp_path):
    made = Mesh(server, client, tmp_path)
    yield made
    made.close()


def granted(*kinds):
    """What the manifest allows, as (group, resource, verb)."""
    rules = [rule for kind in kinds for rule in chosen(kind)["rules"]]
    return {(group, resource, verb) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]}


async def test_a_mesh_by_the_manifests(server, client, mesh):
    """Its pod serves, by mutual TLS; statuses, Events and the Lease are written; and the service account needs just what it is allowed."""
    mesh.run_pod()
    mesh.start_sidecar()

    def answer():
        response = httpx.get("http://web.default.svc.cluster.local/", proxy=f"http://127.0.0.1:{mesh.http_proxy}", timeout=60)
        return response.json() if response.status_code == 200 else None

    told = wait_until(answer)
    assert told["name"] == "web"
    assert OURS in told["headers"]["x-forwarded-client-cert"]

    # --- what is written
    about = {"namespace": "default"}
    gateway = {"apiVersion": f"{GATEWAY_API}/v1", "kind": "Gateway", "metadata": {"name": "edge", **about}}
    listeners = [{"name": name, "port": port, "protocol": word} for name, port, word in (("http", 80, "HTTP"), ("tcp", 81, "TCP"))]
    listeners.append({"name": "tls", "port": 82, "protocol": "TLS", "tls": {"mode": "Passthrough"}})
    gateway["spec"] = {"gatewayClassName": "ours", "listeners": listeners}
    made = [{"apiVersion": f"{GATEWAY_API}/v1", "kind": "GatewayClass", "metadata": {"name": "ours"}, "spec": {"controllerName": CONTROLLER}}, gateway]
    for kind, version in (("HTTPRoute", "v1"), ("GRPCRoute", "v1"), ("TCPRoute", "v1alpha2"), ("TLSRoute", "v1alpha2")):
        spec = {"parentRefs": [{"name": "edge"}], "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]}
        made.append({"apiVersion": f"{GATEWAY_API}/{version}", "kind": kind, "metadata": {"name": "a", **about}, "spec": spec})
    validation = {"hostname": "web.test", "wellKnownCACertificates": "System"}
    policy = {"targetRefs": [{"group": "", "kind": "Service", "name": "web"}], "validation": validation}
    made.append({"apiVersion": f"{GATEWAY_API}/v1", "kind": "BackendTLSPolicy", "metadata": {"name": "a", **about}, "spec": policy})
    added = {"parentRef": {"name": "edge"}, "listeners": [{"name": "more", "port": 83, "protocol": "HTTP"}]}
    listener_set = {"apiVersion": f"{GATEWAY_API}/v1", "kind": "ListenerSet", "metadata": {"name": "a", **about}, "spec": added}
    elsewhere = {"type": "ExtensionRef", "extensionRef": {"group": "a.test", "kind": "B", "name": "c"}}
    spec = {"parentRefs": [{"name": "edge"}], "rules": [{"filters": [elsewhere]}]}
    refused = {"apiVersion": f"{GATEWAY_API}/v1", "kind": "HTTPRoute", "metadata": {"name": "wrong", **about}, "spec": spec}
    for one in (*made, listener_set, refused):
        mesh.create(one)

    def is_told(one):
        status = client.get(one).get("status", {})
        ours = [entry for name in ("parents", "ancestors") for entry in status.get(name, ()) if entry["controllerName"] == CONTROLLER] or [status]
        return any(condition["type"] == "Accepted" and condition["status"] == "True" for condition in ours[0].get("conditions", ()))

    for one in made:
        wait_until(lambda one=one: is_told(one))
    wait_until(lambda: client.get(listener_set).get("status", {}).get("conditions", [{}])[0].get("reason") == "NotAllowed")
    wait_until(lambda: [one for one in client.list("v1", "events") if one["involvedObject"]["name"] == "wrong"])

    # --- whose tokens are whose
    api = ApiServer(Access(str(mesh.kubeconfig)))
    tokens = KubernetesTokens("cluster.local", TokenReviews(api))
    assert str(await tokens.identity(client.token(account("web", "default"), AUDIENCE))) == OURS
    for other in (client.token(account("web", "default")), client.token(account("web", "default"), "of-others"), "x"):
        with pytest.raises(Rejected):
            await tokens.identity(other)
    await api.close()

    # --- what for
    used, denied = set(), []
    for event in server.asked_by(US):
        thing = event.get("objectRef", {})
        if event["annotations"]["authorization.k8s.io/decision"] != "allow":
            denied.append((event["verb"], event["requestURI"]))
        elif thing.get("resource"):
            name = thing["resource"] + (f"/{thing['subresource']}" if thing.get("subresource") else "")
            used.add((thing.get("apiGroup", ""), name, event["verb"]))
    assert denied == []
    allowed = granted("ClusterRole", "Role")
    assert {one for one in used if one[2] not in READING} == {one for one in allowed if one[2] not in READING}
    assert {one[:2] for one in allowed if one[2] in READING and one[1] != "*"} <= {one[:2] for one in used if one[2] in READING}
