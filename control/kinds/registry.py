"""Which documents mean something to us: `apiVersion` and `kind` -> parser."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from control.kinds import closed as kinds_closed
from control.kinds import (
    destination_rule,
    envoy_filter,
    gateway,
    gateway_api,
    gateway_route,
    kubernetes,
    secret,
    security,
    service_entry,
    sidecar,
    telemetry,
    virtual_service,
    workload,
)
from control.kinds.common import Meta, Parser
from control.kinds.fields import FLAW, Fields
from control.model.telemetry import MeshConfig
from meshproxy.api.errors import UNKNOWN, UNSUPPORTED, Problem

OWN = "meshproxy"
_CORE = ""
_ISTIO_NETWORKING = "networking.istio.io"
_ISTIO_SECURITY = "security.istio.io"

# (group, kind) -> (versions that we know, parser)
KINDS: dict[tuple[str, str], tuple[tuple[str, ...], Parser]] = {
    (_CORE, "Service"): (("v1",), kubernetes.parse_service),
    (_CORE, "Endpoints"): (("v1",), kubernetes.parse_endpoints),
    (_CORE, "Pod"): (("v1",), kubernetes.parse_pod),
    (_CORE, "Namespace"): (("v1",), kubernetes.parse_namespace),
    (_CORE, "Node"): (("v1",), kubernetes.parse_node),
    (_CORE, "Secret"): (("v1",), secret.parse_secret),
    (_CORE, "ConfigMap"): (("v1",), secret.parse_config_map),
    ("discovery.k8s.io", "EndpointSlice"): (("v1",), kubernetes.parse_endpoint_slice),
    (_ISTIO_NETWORKING, "VirtualService"): (("v1", "v1beta1", "v1alpha3"), virtual_service.parse),
    (_ISTIO_NETWORKING, "DestinationRule"): (("v1", "v1beta1", "v1alpha3"), destination_rule.parse),
    (_ISTIO_NETWORKING, "ServiceEntry"): (("v1", "v1beta1", "v1alpha3"), service_entry.parse),
    (_ISTIO_NETWORKING, "WorkloadEntry"): (("v1", "v1beta1", "v1alpha3"), service_entry.parse_workload_entry),
    (_ISTIO_NETWORKING, "WorkloadGroup"): (("v1", "v1beta1", "v1alpha3"), service_entry.parse_workload_group),
    (_ISTIO_NETWORKING, "Gateway"): (("v1", "v1beta1", "v1alpha3"), gateway.parse),
    (_ISTIO_NETWORKING, "Sidecar"): (("v1", "v1beta1", "v1alpha3"), sidecar.parse),
    (_ISTIO_NETWORKING, "EnvoyFilter"): (("v1alpha3",), envoy_filter.parse),
    (_ISTIO_SECURITY, "PeerAuthentication"): (("v1", "v1beta1"), security.parse_peer_authentication),
    (_ISTIO_SECURITY, "RequestAuthentication"): (("v1", "v1beta1"), security.parse_request_authentication),
    (_ISTIO_SECURITY, "AuthorizationPolicy"): (("v1", "v1beta1"), security.parse_authorization_policy),
    ("telemetry.istio.io", "Telemetry"): (("v1", "v1alpha1"), telemetry.parse),
    (gateway_api.GROUP, "Gateway"): (("v1", "v1beta1"), gateway_api.parse_gateway),
    gateway_api.LISTENER_SETS[0]: (("v1",), gateway_api.parse_listener_set),
    gateway_api.LISTENER_SETS[1]: (("v1alpha1",), gateway_api.parse_listener_set),
    (gateway_api.GROUP, "HTTPRoute"): (("v1", "v1beta1"), gateway_route.parse_http_route),
    (gateway_api.GROUP, "GRPCRoute"): (("v1", "v1alpha2"), gateway_route.parse_grpc_route),
    (gateway_api.GROUP, "TCPRoute"): (("v1", "v1alpha2"), gateway_route.parse_tcp_route),
    (gateway_api.GROUP, "TLSRoute"): (("v1", "v1alpha3", "v1alpha2"), gateway_route.parse_tls_route),
    (gateway_api.GROUP, "BackendTLSPolicy"): (("v1", "v1alpha3"), gateway_api.parse_backend_tls),
    (gateway_api.GROUP, "ReferenceGrant"): (("v1", "v1beta1", "v1alpha2"), secret.parse_reference_grant),
    (OWN, "Workload"): (("v1",), workload.parse),
}

# What stands beside those in the folders of mesh users, and is for others. An empty kind is every kind of the group.
_FOR_OTHERS = {
    *((_CORE, kind) for kind in ("Event", "LimitRange", "PersistentVolume", "PersistentVolumeClaim", "PodTemplate", "ReplicationController", "ResourceQuota")),
    (_CORE, "ServiceAccount"),
    *((group, "") for group in ("apps", "autoscaling", "batch", "cert-manager.io", "monitoring.coreos.com", "policy")),
    *((f"{name}.k8s.io", "") for name in ("admissionregistration", "apiextensions", "apiregistration", "coordination", "kustomize.config", "networking")),
    *((f"{name}.k8s.io", "") for name in ("node", "rbac.authorization", "scheduling", "storage")),
    (gateway_api.GROUP, "GatewayClass"),
}

_CLOSED: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] = {
    (_CORE, "ConfigMap"): kinds_closed.mesh_config,
    (_ISTIO_SECURITY, "AuthorizationPolicy"): kinds_closed.authorization_policy,
    (_ISTIO_SECURITY, "PeerAuthentication"): kinds_closed.peer_authentication,
    (_ISTIO_SECURITY, "RequestAuthentication"): kinds_closed.request_authentication,
}
_PRUNED = {_CORE, "discovery.k8s.io"}
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


class Identity(tuple[str, str, str, str]):
    """(group, kind, namespace, name): what makes two documents the same object."""

    __slots__ = ()

    def __str__(self) -> str:
        _, kind, namespace, name = self
        return f"{kind} {namespace}/{name}"


def identity(document: Any) -> Identity | None:
    """Which object a document describes; None when it does not say."""
    if not isinstance(document, dict):
        return None
    version, kind, meta = document.get("apiVersion"), document.get("kind"), document.get("metadata")
    if not isinstance(version, str) or not isinstance(kind, str) or not isinstance(meta, dict):
        return None
    name, namespace = meta.get("name"), meta.get("namespace") or "default"
    if not isinstance(name, str) or not isinstance(namespace, str) or not _NAME.fullmatch(name) or not _NAME.fullmatch(namespace):
        return None
    return Identity((_split(version)[0], kind, namespace, name))


def _split(version: str) -> tuple[str, str]:
    group, slash, number = version.rpartition("/")
    return (group, number) if slash else ("", version)


def for_others(group: str, kind: str) -> bool:
    """Whether documents of this kind say nothing to a mesh."""
    return (group, kind) in _FOR_OTHERS or (group, "") in _FOR_OTHERS


def parse(document: Any, *, pruned: bool = False, trust_domain: str = "") -> tuple[Any, list[Problem]]:
    """The object of a document, which is None when there are problems that are more than flaws, or when it is not for us.

    `pruned`: an API server has checked it. In kinds of Kubernetes itself, a field that we do not know is then a newer one, and no mistake of anybody.
    `trust_domain`: what is served, for documents that say it; "": nobody knows yet.
    """
    problems: list[Problem] = []
    if not isinstance(document, dict):
        return None, [Problem("", "a document must be a mapping with apiVersion, kind and metadata")]
    body = Fields(document, "", problems)
    group, version = _split(body.text("apiVersion", required=True))
    kind = body.text("kind", required=True)
    if not problems and for_others(group, kind):
        return None, []
    meta = _meta(body.need("metadata"))
    if problems:
        return None, problems
    known = KINDS.get((group, kind))
    if known is None:
        near = _near(group, kind)
        return None, [Problem("kind", f"{kind} of {group or 'core'} is not served by meshctl{f'; did you mean {near}?' if near else ''}", "unsupported")]
    versions, parser = known
    if version not in versions:
        return None, [Problem("apiVersion", f"{version} is not one of {', '.join(versions)}")]
    made = parser(meta, body)
    body.ignore("status")
    body.end()
    if isinstance(made, MeshConfig) and trust_domain and made.trust_domain not in ("", trust_domain):
        body.error("data.mesh.trustDomain", f"{made.trust_domain!r:.80} is not the one that is served, {trust_domain}: see --trust-domain", UNSUPPORTED)
    if pruned and group in _PRUNED:
        problems = [one for one in problems if one.kind != UNKNOWN or one.path.startswith("metadata.")]
    if any(one.kind != FLAW for one in problems):  # then there is no rest that could be served
        return None, [one if one.kind != FLAW else Problem(one.path, one.why) for one in problems]
    return made, problems


def _near(group: str, kind: str) -> str:
    """What a kind that we do not know may have been meant to be: another one of the group, or of another group."""
    kinds = {known.lower(): f"{known!r}" for of, known in KINDS if of == group}
    groups = {of: f"{of!r} in apiVersion" for of, known in KINDS if known == kind}
    for written, names in ((kind.lower(), kinds), (group, groups)):
        if found := difflib.get_close_matches(written, names, 1, 0.8):
            return names[found[0]]
    return ""


def closed(document: Any) -> Any:
    """What is served in place of a wrong document until it is right, if nothing of it is known: for rules about access, something that opens nothing."""
    one = identity(document)
    make = _CLOSED.get(one[:2]) if one is not None else None
    return make(document) if make is not None else None


def _meta(fields: Fields) -> Meta:
    name, namespace = fields.text("name", required=True), fields.text("namespace", "default") or "default"
    for field, text in (("name", name), ("namespace", namespace)):
        if text and not _NAME.fullmatch(text):
            fields.error(field, f"{text!r:.80} is not a name")
    labels, annotations = fields.string_map("labels"), fields.string_map("annotations")
    created = fields.rest().get("creationTimestamp")
    fields.rest()  # what a cluster adds: uid, managedFields ...
    return Meta(name, namespace, labels, annotations, str(created or ""))
