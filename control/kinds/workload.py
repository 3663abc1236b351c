"""Workload, a kind of our own: a process that serves, and where its sidecar listens.

apiVersion: meshproxy/v1
kind: Workload
metadata: {name: reviews-v1, labels: {app: reviews, version: v1}}
spec:
  address: 127.0.0.1
  ports: {http: 9080}
  sidecar:
    inbound: [{port: 9080, listen: 19080}]
    identity: true
        httpProxy: 15001
    outbound: [{host: ratings, port: 9080, listen: 19081}]
"""

from __future__ import annotations

from control.kinds.common import Meta, locality_of
from control.kinds.fields import Fields
from control.model.service import Outbound, SidecarPorts, Workload
from control.names import is_ip, resolve_host


def parse(meta: Meta, body: Fields) -> Workload:
    """`spec` of a Workload."""
    spec = body.child("spec") or Fields({})
    address = spec.text("address", "127.0.0.1")
    if not is_ip(address):
        spec.error("address", f"{address!r} is no IP address")
    sidecar = spec.child("sidecar")
    return Workload(
        meta.name,
        meta.namespace,
        address,
        meta.labels,
        spec.mapping("ports", lambda below, key: below.port(key)),
        spec.text("serviceAccount", "default"),
        spec.integer("weight", 1, low=1) or 1,
        locality_of(spec.text("locality")),
        spec.boolean("healthy", True) is not False,
        _sidecar(meta, sidecar) if sidecar is not None else None,
    )


def _sidecar(meta: Meta, fields: Fields) -> SidecarPorts:
    inbound = fields.each("inbound", lambda one: (one.port("port", required=True), one.port("listen", required=True)))
    outbound = fields.each(
        "outbound",
        lambda one: Outbound(one.port("listen", required=True), resolve_host(one.text("host", required=True), meta.namespace), one.port("port", required=True)),
    )
    http_proxy = fields.port("httpProxy")
    taken: set[int] = set()
    for where, port in [
        *((f"inbound[{index}].listen", listen) for index, (_, listen) in enumerate(inbound)),
        ("httpProxy", http_proxy),
        *((f"outbound[{index}].listen", one.listen) for index, one in enumerate(outbound)),
    ]:
        if port and port in taken:
            fields.error(where, f"the sidecar listens on {port} already")
        taken.add(port)
    return SidecarPorts(dict(inbound), http_proxy, outbound, bool(fields.boolean("identity")))
