"""Meshes for the tests of the control plane."""

from __future__ import annotations

import textwrap
from typing import Any

from google.protobuf import json_format

from control.kinds.store import Store
from control.model.security import DEFAULT_TRUST_DOMAIN
from control.model.snapshot import MeshSnapshot, build
from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ROUTES
from control.translate.translator import Translator
from control.translate.view import View

MESH = """
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec:
  clusterIP: 10.0.0.1
  selector: {app: reviews}
  ports: [{name: http, port: 9080}]
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec:
  selector: {app: db}
  ports: [{name: tcp, port: 3306}]
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: reviews-v1, labels: {app: reviews, version: v1}}
spec: {ports: {http: 19080}, locality: eu/a}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: reviews-v2, labels: {app: reviews, version: v2}}
spec: {ports: {http: 19081}, locality: eu/b}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: web, labels: {app: web}}
spec:
  ports: {http: 8000}
  locality: eu/b
  sidecar:
    inbound: [{port: 8000, listen: 18000}]
    httpProxy: 15001
    outbound: [{host: reviews, port: 9080, listen: 19090}, {host: db, port: 3306, listen: 13306}]
"""
WEB = ProxyKey("sidecar", "web", "default")
GRPC_CLIENT = ProxyKey("grpc", "client", "default")


def snapshot(*texts: str, before: MeshSnapshot | None = None, store: Store | None = None, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> MeshSnapshot:
    """The snapshot of some texts, which must be right; each is a file."""
    store = store or Store()
    for index, text in enumerate(texts):
        store.put(f"{index}.yaml", textwrap.dedent(text).encode())
    store.settle()
    assert [str(trouble) for trouble in store.troubles] == []
    return build(store.objects, before, trust_domain)


def istio(kind: str, name: str, spec: str) -> str:
    """A document of networking.istio.io."""
    head = f"apiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:\n"
    return head + textwrap.indent(textwrap.dedent(spec).strip("\n"), "  ") + "\n"


def plain(view: View, url: str, name: str) -> Any:
    """A resource in JSON form, with the names of the API."""
    resource = view.get(url, name)
    assert resource is not None, f"{name} is not among {[one.name for one in view.all(url)]}"
    return json_format.MessageToDict(resource.message, preserving_proto_field_name=True)


def view_of(*texts: str, proxy: ProxyKey = WEB) -> View:
    return Translator().view(proxy, snapshot(MESH, *texts))


def view_despite(*texts: str, proxy: ProxyKey = WEB) -> View:
    """What a control plane serves that begins with these texts, some of which are wrong."""
    store = Store()
    for index, text in enumerate((MESH, *texts)):
        store.put(f"{index}.yaml", textwrap.dedent(text).encode())
    store.settle()
    assert store.troubles
    return Translator().view(proxy, build(store.objects))


def cluster(view: View, name: str) -> Any:
    return plain(view, CLUSTER, name)


def endpoints(view: View, name: str) -> Any:
    return plain(view, ENDPOINTS, name)


def listener(view: View, name: str) -> Any:
    return plain(view, LISTENER, name)


def routes(view: View, name: str = "reviews.default.svc.cluster.local:9080") -> Any:
    """The routes of the first virtual host."""
    return plain(view, ROUTES, name)["virtual_hosts"][0]["routes"]
