"""What tests do to an API server, over HTTP, in a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import yaml

from control.sources.kubernetes import KINDS

_PLURALS = {kind.kind: kind.plural for kind in KINDS} | {"NetworkPolicy": "networkpolicies"}
_CLUSTER = ("Node", "Namespace", "GatewayClass", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition")


class Client:
    """An administrator."""

    def __init__(self, server: Any, token: str = "admin-token") -> None:
        self.server = server
        self._http = httpx.Client(base_url=server.url, verify=False, headers={"authorization": f"Bearer {token}"}, timeout=60)

    def close(self) -> None:
        self._http.close()

    def create(self, document: dict[str, Any]) -> dict[str, Any]:
        return self._made(self._http.post(path(document).rpartition("/")[0], json=document))

    def check(self, document: dict[str, Any]) -> dict[str, Any]:
        """Have it looked at as if it were created; there must be no field that nobody knows."""
        about = {"dryRun": "All", "fieldValidation": "Strict"}
        return self._made(self._http.post(path(document).rpartition("/")[0], json=document, params=about))

    def get(self, document: dict[str, Any]) -> dict[str, Any]:
        return self._made(self._http.get(path(document)))

    def replace(self, document: dict[str, Any]) -> dict[str, Any]:
        """Whatever is there."""
        known = self.get(document)
        meta = {**document["metadata"], "resourceVersion": known["metadata"]["resourceVersion"]}
        return self._made(self._http.put(path(document), json={**document, "metadata": meta}))

    def patch(self, document: dict[str, Any], patch: dict[str, Any], subresource: str = "") -> dict[str, Any]:
        where = path(document) + (f"/{subresource}" if subresource else "")
        return self._made(self._http.patch(where, content=json.dumps(patch), headers={"content-type": "application/merge-patch+json"}))

    def delete(self, document: dict[str, Any]) -> None:
        self._made(self._http.request("DELETE", path(document), json={"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0}))

    def list(self, api: str, plural: str, namespace: str = "default") -> list[dict[str, Any]]:
        root = f"/apis/{api}" if "/" in api else f"/api/{api}"
        return self._made(self._http.get(f"{root}/namespaces/{namespace}/{plural}"))["items"]

    def token(self, account: dict[str, Any], *audiences: str) -> str:
        """A new one of a service account, as a kubelet projects it; without audiences, for the API server."""
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": list(audiences)}}
        return self._made(self._http.post(f"{path(account)}/token", json=request))["status"]["token"]

    @staticmethod
    def _made(response: httpx.Response) -> dict[str, Any]:
        assert response.is_success, response.text
        return response.json()


def path(document: dict[str, Any]) -> str:
    """Of an object."""
    api, kind, meta = document["apiVersion"], document["kind"], document["metadata"]
    root = f"/apis/{api}" if "/" in api else f"/api/{api}"
    plural = _PLURALS.get(kind, kind.lower() + "s")
    within = "" if kind in _CLUSTER else f"/namespaces/{meta.get('namespace', 'default')}"
    return f"{root}{within}/{plural}/{meta['name']}"


def kubeconfig(folder: Path, server: Any, user: dict[str, Any] | None = None, **more: Any) -> Path:
    """A kubeconfig for a server; `user`: as it says who one is; `more`: about the cluster, None for what it shall not say."""
    authority = server.authority
    cluster = {"server": server.url, "certificate-authority": None if authority is None else str(authority)} | more
    cluster = {key: value for key, value in cluster.items() if value is not None}
    found = folder / "kubeconfig"
    found.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": cluster}],
                "users": [{"name": "u", "user": user if user is not None else {"token": "admin-token"}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    return found


GATEWAY_API = "gateway.networking.k8s.io"


def gateway_api(server: Any) -> list[dict[str, Any]]:
    """The CustomResourceDefinitions of the Gateway API: the real ones for a real API server, if they are at hand."""
    folder = getattr(server, "crds", None)
    if folder is not None and folder.is_dir():
        found = [one for path in sorted(folder.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())]
        return [one for one in found if one and one["kind"] == "CustomResourceDefinition" and one["spec"]["group"] == GATEWAY_API]
    kinds = (("gatewayclasses", "GatewayClass"), ("gateways", "Gateway"), ("httproutes", "HTTPRoute"), ("grpcroutes", "GRPCRoute"))
    kinds += (("backendtlspolicies", "BackendTLSPolicy"),)
    made = [crd(GATEWAY_API, plural, kind, namespaced=kind != "GatewayClass") for plural, kind in kinds]
    return [*made, crd(GATEWAY_API, "referencegrants", "ReferenceGrant", "v1beta1")]


def istio(server: Any) -> list[dict[str, Any]]:
    """The same of Istio."""
    found = getattr(server, "crds", Path()) / "istio.yaml"
    if found.is_file():
        return [one for one in yaml.safe_load_all(found.read_text()) if one]
    kinds = [kind for kind in KINDS if kind.group.endswith("istio.io")]
    return [crd(kind.group, kind.plural, kind.kind) for kind in kinds]


def crd(group: str, plural: str, kind: str, version: str = "v1", *, namespaced: bool = True) -> dict[str, Any]:
    """A CustomResourceDefinition that takes anything."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": anything, "status": anything}}}
    annotations = {"annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/gateway-api"}} if group.endswith("k8s.io") else {}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}", **annotations},
        "spec": {
            "group": group,
            "scope": "Namespaced" if namespaced else "Cluster",
            "names": {"plural": plural, "singular": kind.lower(), "kind": kind},
            "versions": [{"name": version, "served": True, "storage": True, "schema": schema, "subresources": {"status": {}}}],
        },
    }
