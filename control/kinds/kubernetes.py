"""Kubernetes: Service, Endpoints, EndpointSlice, Pod and Node, as far as they say where services are.

A Pod says by an annotation how its sidecar listens, as a Workload does in `spec.sidecar`:

metadata:
  annotations:
    meshproxy/sidecar: '{"inbound": [{"port": 8000, "listen": 18000}], "httpProxy": 15001, "identity": true}'
"""

from __future__ import annotations

from control.kinds.common import Meta, prefers
from control.kinds.fields import Fields
from control.kinds.workload import annotated_sidecar
from control.model.labels import Namespace, labels_of
from control.model.protocols import protocol_of_port
from control.model.service import EndpointSlice, Locality, NodePlace, Port, Resolution, Service, SliceAddress, Workload
from control.names import service_host

_SERVICE_NAME = "kubernetes.io/service-name"
_EXPORT_TO = "networking.istio.io/exportTo"
_REGION, _ZONE, _SUB_ZONE = "topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"
_OLD_REGION, _OLD_ZONE = "failure-domain.beta.kubernetes.io/region", "failure-domain.beta.kubernetes.io/zone"


def parse_service(meta: Meta, body: Fields) -> Service:
    """`spec` of a Service, and what its load balancer says."""
    ingress = body.rest_of("status").rest_of("loadBalancer").each("ingress", _ingress)
    spec = body.need("spec")
    # What concerns load balancers outside, DNS and kube-proxy, but no sidecar.
    spec.ignore(
        "allocateLoadBalancerNodePorts", "externalIPs", "externalTrafficPolicy", "healthCheckNodePort", "ipFamilies",
        "ipFamilyPolicy", "loadBalancerClass", "loadBalancerIP", "loadBalancerSourceRanges", "sessionAffinity",
        "sessionAffinityConfig",
    )  # fmt: skip
    near = prefers(meta, spec.text("trafficDistribution"))
    node_local = spec.text("internalTrafficPolicy", "Cluster", choices=("Cluster", "Local")) == "Local"
    kind = spec.text("type", "ClusterIP", choices=("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"))
    ports = spec.each("ports", _service_port)
    addresses = spec.texts("clusterIPs") or tuple(filter(None, [spec.text("clusterIP")]))
    spec.text("clusterIP")
    external = spec.text("externalName", required=kind == "ExternalName")
    selector = spec.string_map("selector") or None
    host, unready = service_host(meta.name, meta.namespace), spec.boolean("publishNotReadyAddresses") is True
    if kind == "ExternalName":
        return Service(host, meta.namespace, ports, (), Resolution.DNS, None, (Workload(meta.name, meta.namespace, external),), _export_to(meta))
    inside = tuple(one for one in addresses if one != "None")
    return Service(
        host,
        meta.namespace,
        ports,
        inside,
        Resolution.ENDPOINTS,
        selector,
        (),
        _export_to(meta),
        outside=ingress,
        publishes_unready=unready,
        prefers=near,
        node_local=node_local,
    )


def _ingress(fields: Fields) -> str | None:
    """Where a load balancer has a service."""
    fields.rest()
    return fields.text("ip") or fields.text("hostname") or None


def _export_to(meta: Meta) -> tuple[str, ...]:
    """Which namespaces see a Service: Istio has an annotation for it, with commas between them."""
    return tuple(one for part in meta.annotations.get(_EXPORT_TO, "").split(",") if (one := part.strip()))


def _service_port(fields: Fields) -> Port | None:
    fields.ignore("nodePort")
    transport = fields.text("protocol", "TCP", choices=("TCP", "UDP", "SCTP"))
    name = fields.text("name")
    made = Port(fields.port("port", required=True), name, protocol_of_port(name, fields.text("appProtocol")), fields.int_or_text("targetPort"))
    return made if transport == "TCP" else None


def parse_endpoint_slice(meta: Meta, body: Fields) -> EndpointSlice:
    """An EndpointSlice, which has no `spec`."""
    family = body.text("addressType", required=True, choices=("IPv4", "IPv6", "FQDN"))
    if family == "FQDN":
        body.error("addressType", "FQDN is not served; use a ServiceEntry with resolution DNS", "unsupported")
    service = meta.labels.get(_SERVICE_NAME, "")
    if not service:
        body.error(f"metadata.labels[{_SERVICE_NAME}]", "is needed: it names the Service")
    addresses = [one for some in body.each("endpoints", _slice_endpoint) for one in some]
    return EndpointSlice(service, meta.namespace, _ports(body), tuple(addresses))


def _ports(fields: Fields) -> dict[str, int]:
    return {name: number for name, number in fields.each("ports", _endpoint_port) if number}


def _endpoint_port(fields: Fields) -> tuple[str, int]:
    fields.ignore("appProtocol")
    transport = fields.text("protocol", "TCP", choices=("TCP", "UDP", "SCTP"))
    number = fields.port("port")
    return fields.text("name"), number if transport == "TCP" else 0


def _slice_endpoint(fields: Fields) -> list[SliceAddress]:
    fields.ignore("hostname", "nodeName", "deprecatedTopology", "hints")
    conditions = fields.child("conditions")
    healthy, draining = True, False
    if conditions is not None:
        healthy = conditions.boolean("ready", True) is not False
        serving, ending = conditions.boolean("serving", healthy), conditions.boolean("terminating", False)
        draining = bool(not healthy and serving and ending)
    zone, pod = fields.text("zone"), _pod(fields)
    return [SliceAddress(address, healthy, zone, pod, draining) for address in fields.texts("addresses", required=True)]


def _pod(fields: Fields) -> str:
    """The name of the pod that an endpoint is."""
    target = fields.child("targetRef")
    if target is None:
        return ""
    target.ignore("apiVersion", "fieldPath", "namespace", "resourceVersion", "uid")
    kind, name = target.text("kind"), target.text("name")
    return name if kind == "Pod" else ""


def parse_endpoints(meta: Meta, body: Fields) -> tuple[EndpointSlice, ...]:
    """Endpoints, the older form: each of its subsets is like a slice."""
    return body.each("subsets", lambda fields: _subset(meta, fields))


def _subset(meta: Meta, fields: Fields) -> EndpointSlice:
    ready = fields.each("addresses", lambda one: _address(one, True))
    waiting = fields.each("notReadyAddresses", lambda one: _address(one, False))
    return EndpointSlice(meta.name, meta.namespace, _ports(fields), ready + waiting)


def _address(fields: Fields, healthy: bool) -> SliceAddress:
    fields.ignore("hostname", "nodeName")
    return SliceAddress(fields.text("ip", required=True), healthy, "", _pod(fields))


def parse_namespace(meta: Meta, body: Fields) -> Namespace:
    """A Namespace, of which only the labels matter."""
    body.rest()
    return Namespace(meta.name, {**meta.labels, **labels_of(meta.name)})


def parse_pod(meta: Meta, body: Fields) -> Workload | None:
    """A Pod that has an address, and has not ended. Most of what a Pod says is for others."""
    status, spec = body.rest_of("status"), body.need("spec")
    address = status.text("podIP")
    account, node = spec.text("serviceAccountName", "default"), spec.text("nodeName")
    ports: dict[str, int] = {}
    for some in spec.each("containers", lambda container: container.rest_of("").each("ports", _container_port)):
        ports.update(some)
    spec.rest()
    healthy = not any(kind == "Ready" and value != "True" for kind, value in status.each("conditions", _condition))
    sidecar = annotated_sidecar(meta, body)
    if not address or status.text("phase") in ("Succeeded", "Failed"):  # the address may be another's by now
        return None
    named = {name: port for name, port in ports.items() if name}
    return Workload(meta.name, meta.namespace, address, meta.labels, named, account, healthy=healthy, sidecar=sidecar, node=node)


def parse_node(meta: Meta, body: Fields) -> NodePlace:
    """Where a Node is, by its labels."""
    body.ignore("spec")
    labels = meta.labels
    region, zone = labels.get(_REGION) or labels.get(_OLD_REGION, ""), labels.get(_ZONE) or labels.get(_OLD_ZONE, "")
    return NodePlace(meta.name, Locality(region, zone, labels.get(_SUB_ZONE, "")))


def _container_port(fields: Fields) -> tuple[str, int]:
    fields.rest()
    return fields.text("name"), fields.port("containerPort", required=True)


def _condition(fields: Fields) -> tuple[str, str]:
    fields.rest()
    return fields.text("type"), fields.text("status")
