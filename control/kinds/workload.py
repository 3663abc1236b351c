"""Workload, a kind of our own: a process that serves, and where its sidecar listens.

apiVersion: meshproxy/v1
kind: Workload
metadata: {name: reviews-v1, labels: {app: reviews, version: v1}}
spec:
  address: 127.0.0.1
  ports: {http: 9080}
  readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 5}
  sidecar:
    inbound: [{port: 9080, listen: 19080}]
    identity: true
    httpProxy: 15001
    scope: observed
    outbound: [{host: ratings, port: 9080, listen: 19081}]

For `meshctl up`, `run` says how to start the process; then all ports of the sidecar, and those of the process that are 0, may be left to it.
"""

from __future__ import annotations

from control.kinds.common import Meta, locality_of
from control.kinds.fields import Fields
from control.kinds.health import parse_probe
from control.model.service import ALL, OBSERVED, Outbound, Run, SidecarPorts, Workload
from control.names import is_ip, resolve_host
from meshproxy.api import document
from meshproxy.api.errors import ConfigError, join

SIDECAR = "meshproxy/sidecar"  # an annotation of Pods, WorkloadEntries and WorkloadGroups


def parse(meta: Meta, body: Fields) -> Workload:
    """`spec` of a Workload."""
    spec = body.child("spec") or Fields({})
    address = spec.text("address", "127.0.0.1")
    if not is_ip(address):
        spec.error("address", f"{address!r} is no IP address")
    sidecar, run, readiness = spec.child("sidecar"), spec.child("run"), spec.child("readinessProbe")
    lowest = 1 if run is None else 0
    ports = spec.mapping("ports", lambda below, key: below.integer(key, low=lowest, high=65535))
    probe = parse_probe(readiness) if readiness is not None else None
    if probe is not None and readiness is not None and isinstance(probe.port, str) and probe.port not in ports:
        readiness.error("", f"there is no port {probe.port!r:.80} among the workload's")
    return Workload(
        meta.name,
        meta.namespace,
        address,
        meta.labels,
        ports,
        spec.text("serviceAccount", "default"),
        spec.integer("weight", 1, low=1) or 1,
        locality_of(spec.text("locality")),
        spec.boolean("healthy", True) is not False,
        parse_sidecar(meta, sidecar, chosen=run is not None) if sidecar is not None else None,
        Run(run.texts("command"), tuple(run.string_map("env").items()), run.text("workingDirectory")) if run is not None else None,
        readiness=probe,
    )


def annotated_sidecar(meta: Meta, fields: Fields) -> SidecarPorts | None:
    """What an annotation says of how a sidecar listens: the same, in JSON or YAML. `fields`: whose metadata that is."""
    text = meta.annotations.get(SIDECAR, "")
    if not text:
        return None
    name = f"metadata.annotations[{SIDECAR}]"
    try:
        value = document.parse(text)
    except ConfigError as error:
        fields.error(name, str(error))
        return None
    if not isinstance(value, dict):
        fields.error(name, "must be a mapping, in YAML or JSON")
        return None
    below = Fields(value, join(fields.path, name), fields.problems)
    made = parse_sidecar(meta, below)
    below.end()
    return made


def parse_sidecar(meta: Meta, fields: Fields, *, chosen: bool = False) -> SidecarPorts:
    """How a sidecar listens. `chosen`: where it listens for other services may be left open."""
    inbound = fields.each("inbound", lambda one: (one.port("port", required=True), one.port("listen", required=True)))
    outbound = fields.each(
        "outbound",
        lambda one: Outbound(
            one.port("listen", required=not chosen), resolve_host(one.text("host", required=True), meta.namespace), one.port("port", required=True)
        ),
    )
    http_proxy, capture = fields.port("httpProxy"), fields.port("capture")
    taken: set[int] = set()
    for where, port in [
        *((f"inbound[{index}].listen", listen) for index, (_, listen) in enumerate(inbound)),
        ("httpProxy", http_proxy),
        ("capture", capture),
        *((f"outbound[{index}].listen", one.listen) for index, one in enumerate(outbound)),
    ]:
        if port and port in taken:
            fields.error(where, f"the sidecar listens on {port} already")
        taken.add(port)
    scope = fields.text("scope", choices=(ALL, OBSERVED))
    return SidecarPorts(dict(inbound), http_proxy, outbound, bool(fields.boolean("identity", chosen)), scope=scope, capture=capture)
