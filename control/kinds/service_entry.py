"""Istio's ServiceEntry and WorkloadEntry: services and machines that nothing else describes."""

from __future__ import annotations

from dataclasses import replace

from control.kinds.common import Meta, export_to, hosts_of, locality_of, prefers
from control.kinds.fields import Fields
from control.kinds.health import parse_probe
from control.kinds.workload import annotated_sidecar
from control.model.protocols import PROTOCOL_NAMES, protocol_of
from control.model.registration import WorkloadGroup
from control.model.service import Port, Protocol, Resolution, Service, Workload
from control.names import is_ip

_GROUP = "istio.io/autoRegistrationGroup"  # the WorkloadGroup that an entry is in, as Istio notes it
_RESOLUTIONS = {
    "STATIC": Resolution.ENDPOINTS,
    "DNS": Resolution.DNS,
    "DNS_ROUND_ROBIN": Resolution.DNS_ROUND_ROBIN,
    "NONE": Resolution.DNS,  # where the application meant to go: it leaves resolving to its sidecar, which is its HTTP proxy or listens for it
    "DYNAMIC_DNS": None,
}


def parse(meta: Meta, body: Fields) -> tuple[Service, ...]:
    """`spec` of a ServiceEntry: one service for each of its hosts."""
    spec = body.need("spec")
    names = spec.texts("subjectAltNames")
    spec.text("location", choices=("MESH_EXTERNAL", "MESH_INTERNAL"))
    hosts = hosts_of(spec, "hosts", required=True)
    addresses = spec.texts("addresses")
    ports = spec.each("ports", _port, required=True)
    _check_unique(spec, ports)
    word = spec.text("resolution", "NONE", choices=_RESOLUTIONS)
    resolution = _RESOLUTIONS[word]
    if resolution is None:
        spec.error("resolution", f"{word} is not served: it needs a proxy that resolves names as they are asked for", "unsupported")
        resolution = Resolution.DNS
    spec.one_of("endpoints", "workloadSelector")
    endpoints = spec.each("endpoints", lambda fields: workload_of(meta, fields))
    selector = spec.child("workloadSelector")
    labels = selector.string_map("labels") if selector is not None else None
    for index, host in enumerate(hosts):
        if host.startswith("*") and resolution is not Resolution.ENDPOINTS and word != "NONE":
            spec.error(f"hosts[{index}]", f"{host!r} cannot be resolved by DNS")
    for index, endpoint in enumerate(endpoints):
        if resolution is Resolution.ENDPOINTS and not is_ip(endpoint.address):
            spec.error(f"endpoints[{index}].address", f"{endpoint.address!r} is no IP address, as STATIC resolution needs")
    if word == "NONE" and (endpoints or labels is not None):
        spec.error("endpoints" if endpoints else "workloadSelector", "cannot be with resolution NONE, by which connections go where they were meant to")
    if resolution is Resolution.ENDPOINTS and not endpoints and labels is None:
        spec.error("endpoints", "STATIC resolution needs endpoints or a workloadSelector")
    exported = export_to(spec)
    made = Service(
        "", meta.namespace, ports, addresses, resolution, labels, endpoints, exported, subject_alt_names=names, prefers=prefers(meta), as_meant=word == "NONE"
    )
    return tuple(replace(made, host=host) for host in hosts)


def _port(fields: Fields) -> Port:
    protocol = _protocol(fields)
    tls = fields.text("protocol").upper() in ("TLS", "HTTPS")
    return Port(fields.port("number", required=True), fields.text("name", required=True), protocol, fields.port("targetPort") or "", tls)


def _protocol(fields: Fields) -> Protocol:
    word = fields.text("protocol", "TCP")
    protocol = protocol_of(word)
    if protocol is None:
        fields.error("protocol", f"{word!r} is not one of {', '.join(PROTOCOL_NAMES)}")
        return Protocol.TCP
    return protocol


def _check_unique(spec: Fields, ports: tuple[Port, ...]) -> None:
    seen: set[object] = set()
    for index, port in enumerate(ports):
        for what in (port.number, port.name):
            if what in seen:
                spec.error(f"ports[{index}]", f"there are two ports {what!r}")
            seen.add(what)


def parse_workload_entry(meta: Meta, body: Fields) -> Workload:
    """`spec` of a WorkloadEntry."""
    return replace(workload_of(meta, body.need("spec")), sidecar=annotated_sidecar(meta, body))


def parse_workload_group(meta: Meta, body: Fields) -> WorkloadGroup:
    """`spec` of a WorkloadGroup. Its workloads are those that register themselves, and WorkloadEntries that say that they are in it."""
    spec = body.need("spec")
    template, given, probe = spec.child("template"), spec.child("metadata"), spec.child("probe")
    labels, annotations = (given.string_map("labels"), given.string_map("annotations")) if given is not None else ({}, {})
    inner = Meta(meta.name, meta.namespace, {}, annotations)
    one = workload_of(inner, template or Fields({}), anywhere=True)
    return WorkloadGroup(
        meta.name,
        meta.namespace,
        {**one.labels, **labels},
        one.ports,
        one.service_account,
        one.weight,
        one.locality,
        annotated_sidecar(inner, spec),
        parse_probe(probe) if probe is not None else None,
    )


def workload_of(meta: Meta, fields: Fields, *, anywhere: bool = False) -> Workload:
    """What WorkloadEntry and the endpoints of a ServiceEntry have in common, and templates of them, which are `anywhere`. A ServiceEntry's endpoints are part
    of it, and have no names."""
    fields.ignore("network")
    address = fields.text("address", required=not anywhere)
    if "/" in address:
        fields.error("address", "addresses of Unix sockets are not served", "unsupported")
    return Workload(
        meta.name,
        meta.namespace,
        address,
        {**meta.labels, **fields.string_map("labels")},
        fields.mapping("ports", lambda below, key: below.port(key)),
        fields.text("serviceAccount", "default"),
        fields.integer("weight", 1, low=1, high=2**32 - 1) or 1,
        locality_of(fields.text("locality")),
        group=meta.annotations.get(_GROUP, ""),
    )
