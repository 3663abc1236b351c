"""The objects of a Kubernetes cluster, as documents: each kind that `kinds` knows is listed and watched, and what comes goes into the store at once.

Of an object only what says something to a mesh is looked at, and an object that says the same as before is the same: the kubelet's notes in a Pod, a
controller's in a status, are no changes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from control.api_server import ApiServer
from control.kinds import registry
from control.kinds.secret import is_for_us
from control.kinds.store import Document, Store
from control.kinds.workload import SIDECAR
from control.sources.reflector import Discovery, Kind, Pace, Reach, Reflector, State

_ISTIO, _SECURITY, _GATEWAY = "networking.istio.io", "security.istio.io", "gateway.networking.k8s.io"
_NO_SECRETS_OF_OTHERS = "type!=helm.sh/release.v1,type!=kubernetes.io/service-account-token,type!=kubernetes.io/dockerconfigjson"
_BY_HAND = "kubectl.kubernetes.io/last-applied-configuration"
_PLURALS = {
    (_ISTIO, "VirtualService"): "virtualservices",
    (_ISTIO, "DestinationRule"): "destinationrules",
    (_ISTIO, "ServiceEntry"): "serviceentries",
    (_ISTIO, "WorkloadEntry"): "workloadentries",
    (_ISTIO, "WorkloadGroup"): "workloadgroups",
    (_ISTIO, "Gateway"): "gateways",
    (_ISTIO, "Sidecar"): "sidecars",
    (_ISTIO, "EnvoyFilter"): "envoyfilters",
    (_SECURITY, "PeerAuthentication"): "peerauthentications",
    (_SECURITY, "RequestAuthentication"): "requestauthentications",
    (_SECURITY, "AuthorizationPolicy"): "authorizationpolicies",
    ("telemetry.istio.io", "Telemetry"): "telemetries",
    (_GATEWAY, "Gateway"): "gateways",
    (_GATEWAY, "ListenerSet"): "listenersets",
    ("gateway.networking.x-k8s.io", "XListenerSet"): "xlistenersets",
    (_GATEWAY, "HTTPRoute"): "httproutes",
    (_GATEWAY, "GRPCRoute"): "grpcroutes",
    (_GATEWAY, "TCPRoute"): "tcproutes",
    (_GATEWAY, "TLSRoute"): "tlsroutes",
    (_GATEWAY, "BackendTLSPolicy"): "backendtlspolicies",
    (_GATEWAY, "ReferenceGrant"): "referencegrants",
}
KINDS = (
    Kind("", "Service", "services", ("v1",)),
    # EndpointSlices that are nobody's Service are somebody else's business; Endpoints are mirrored into slices.
    Kind("discovery.k8s.io", "EndpointSlice", "endpointslices", ("v1",), labels="kubernetes.io/service-name"),
    Kind("", "Pod", "pods", ("v1",)),
    Kind("", "Node", "nodes", ("v1",), namespaced=False, optional=True, partial=True),
    Kind("", "Namespace", "namespaces", ("v1",), namespaced=False, optional=True, partial=True),
    Kind("", "Secret", "secrets", ("v1",), optional=True, fields=_NO_SECRETS_OF_OTHERS),
    Kind("", "ConfigMap", "configmaps", ("v1",), optional=True, fields="metadata.name!=kube-root-ca.crt"),
    Kind(_GATEWAY, "GatewayClass", "gatewayclasses", ("v1", "v1beta1"), namespaced=False, optional=True),
    *(Kind(group, kind, plural, registry.KINDS[group, kind][0]) for (group, kind), plural in _PLURALS.items()),
)


class About(NamedTuple):
    """What an API server says of an object besides. `document`: all of it, for kinds that ask for that."""

    api_version: str
    uid: str
    generation: int
    document: dict[str, Any] | None


class _Read(NamedTuple):
    name: str
    document: Document
    about: About


class Status(NamedTuple):
    """How far one is with a kind, for people."""

    kind: str
    namespace: str
    state: State
    objects: int
    resource_version: str
    lists: int
    problem: str


class _Objects:
    """The objects of a kind, in a namespace or in all. `wake` is called when anything is different."""

    def __init__(self, kind: Kind, store: Store, about: dict[str, About], wake: Callable[[], None], whole: bool) -> None:
        self._kind = kind
        self._store = store
        self._about = about
        self._wake = wake
        self._whole = whole
        self.names: set[str] = set()

    def read(self, document: dict[str, Any]) -> _Read | None:
        name = _name(document)
        said = trimmed(document)
        if not name or said is None:
            return None
        meta = document["metadata"]
        digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()
        about = About(document["apiVersion"], str(meta.get("uid") or ""), int(meta.get("generation") or 0), document if self._whole else None)
        return _Read(name, self._store.read_object(name, digest, said), about)

    def replace(self, read: Iterable[_Read]) -> None:
        there = {one.name: one for one in read}
        for name in self.names - there.keys():
            self._drop(name)
        for one in there.values():
            self._place(one)

    def put(self, document: dict[str, Any]) -> None:
        one = self.read(document)
        if one is not None:
            self._place(one)
        else:
            self.remove(document)

    def remove(self, document: dict[str, Any]) -> None:
        name = _name(document)
        if name in self.names:
            self._drop(name)

    def _place(self, one: _Read) -> None:
        self.names.add(one.name)
        known = self._about.get(one.name)
        self._about[one.name] = one.about
        if self._store.place(one.name, one.document) or (self._whole and one.about != known):
            self._wake()

    def _drop(self, name: str) -> None:
        self.names.discard(name)
        self._about.pop(name, None)
        self._store.remove(name)
        self._wake()


class Kubernetes:
    """A cluster, or some of its namespaces. `whole`: kinds of which everything is kept, see `about`.

    What comes goes into the store, and `changed` is set; `take` says whether anything came since it was called last.
    """

    def __init__(self, server: ApiServer, store: Store, namespaces: Sequence[str] = (), pace: Pace = Pace(), whole: frozenset[str] = frozenset()) -> None:  # noqa: B008
        self.store = store
        self.changed = asyncio.Event()
        self.about: dict[str, About] = {}  # by the name that the store knows an object by
        self._dirty = False
        self._reach, self._discovery = Reach(pace), Discovery(server, pace.absent / 4)
        self._parts: list[tuple[Reflector, _Objects]] = []
        for kind in KINDS:
            for namespace in (namespaces or ("",)) if kind.namespaced else ("",):
                objects = _Objects(kind, store, self.about, self._wake, kind.group in whole)
                self._parts.append((Reflector(server, kind, namespace, objects, self._reach, self._discovery), objects))

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for reflector, _ in self._parts:
                    group.create_task(reflector.run(), name=f"watch {reflector.kind.plural}")
        finally:
            await self._discovery.close()

    async def wait_settled(self) -> None:
        """Until everything is known that there is: not less, since what is not there is taken away from proxies."""
        await self.wait_until(lambda: all(one.settled for one, _ in self._parts))

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until something is so about how far we are with kinds."""
        await self._reach.wait_until(condition)

    def take(self) -> bool:
        """Whether anything came since the last time."""
        dirty, self._dirty = self._dirty, False
        self.changed.clear()
        return dirty

    def statistics(self) -> list[Status]:
        """One for each kind and namespace."""
        return [
            Status(f"{one.kind.kind}.{one.kind.group}".rstrip("."), one.namespace, one.state, len(objects.names), one.resource_version, one.lists, one.problem)
            for one, objects in self._parts
        ]

    def _wake(self) -> None:
        self._dirty = True
        self.changed.set()


def _name(document: dict[str, Any]) -> str:
    """By which the store, and messages, know an object; "" for one without a name."""
    found = registry.identity(document)
    return "" if found is None else f"kubernetes: {found[1]}{'.' if found[0] else ''}{found[0]} {found[2]}/{found[3]}"


def trimmed(document: dict[str, Any]) -> dict[str, Any] | None:
    """What of an object says something to a mesh; None for nothing. The object itself stays as it is."""
    kind, meta = document["kind"], document.get("metadata") or {}
    annotations = {key: value for key, value in (meta.get("annotations") or {}).items() if key != _BY_HAND}
    if kind in ("Pod", "Node", "Namespace"):
        annotations = {key: value for key, value in annotations.items() if key == SIDECAR}
    about = {"name": meta.get("name"), "namespace": meta.get("namespace") or "", "labels": meta.get("labels") or {}, "annotations": annotations}
    if meta.get("creationTimestamp") and str(document.get("apiVersion")).startswith("gateway.networking."):  # of two that say the same, the older one counts
        about["creationTimestamp"] = meta["creationTimestamp"]
    said = {key: value for key, value in document.items() if key not in ("metadata", "status")}
    if kind == "Pod":
        said["spec"], said["status"] = _spec_of_pod(document.get("spec") or {}), _status_of_pod(document.get("status") or {})
    elif kind == "Service":
        outside = ((document.get("status") or {}).get("loadBalancer") or {}).get("ingress")
        said |= {"status": {"loadBalancer": {"ingress": outside}}} if outside else {}
    elif kind in ("Secret", "ConfigMap") and not is_for_us(document):
        return None
    return {**said, "metadata": about}


def _spec_of_pod(spec: dict[str, Any]) -> dict[str, Any]:
    containers = [{"ports": one["ports"]} for one in spec.get("containers") or () if one.get("ports")]
    account = spec.get("serviceAccountName") or "default"
    return {"containers": containers, "serviceAccountName": account, "nodeName": spec.get("nodeName") or ""}


def _status_of_pod(status: dict[str, Any]) -> dict[str, Any]:
    ready = [{"type": one["type"], "status": one.get("status")} for one in status.get("conditions") or () if one.get("type") == "Ready"]
    phase = status.get("phase")
    ended = {"phase": phase} if phase in ("Succeeded", "Failed") else {}
    return {"podIP": status.get("podIP") or "", "conditions": ready, **ended}
