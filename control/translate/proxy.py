"""Who asks: the proxy's node, as far as resources depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from control.model.service import NOWHERE, Locality
from meshproxy.api import convert

_KNOWN = ("NAME", "NAMESPACE", "GENERATOR")  # of metadata, what a key says itself
SIDECAR = "sidecar"
OURS = "meshproxy"  # the user agent of sidecars of ours
GRPC = "grpc"  # gRPC's own client, which is its own proxy


@dataclass(frozen=True, slots=True)
class ProxyKey:
    """`kind` is SIDECAR or GRPC. The workload is (namespace, name); labels and place that its node says go before those of the workload's document. `counts`:
    it is one of ours, which has the filters for Istio's metrics. `metadata`: what else its node says in texts."""

    kind: str
    name: str
    namespace: str
    labels: tuple[tuple[str, str], ...] = ()
    locality: Locality = NOWHERE
    counts: bool = False
    metadata: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.name}.{self.namespace}"


def of_node(node: Any) -> ProxyKey:
    """The key of an envoy.config.core.v3.Node.

    The id is `name.namespace`, or Istio's `sidecar~ADDRESS~name.namespace~DOMAIN`; the metadata NAME, NAMESPACE and LABELS, as Istio has them, go before it.
    A name without a namespace is of `default`.
    """
    metadata = convert.from_struct(node.metadata)
    parts = node.id.split("~")
    words = parts[2] if len(parts) == 4 else node.id
    name, dot, namespace = words.rpartition(".")
    if not dot:
        name, namespace = words, "default"
    kind = GRPC if metadata.get("GENERATOR") == "grpc" or node.user_agent_name.lower().startswith("grpc") else SIDECAR
    labels = metadata.get("LABELS")
    pairs = tuple(sorted((str(key), str(value)) for key, value in labels.items())) if isinstance(labels, dict) else ()
    here = node.locality
    return ProxyKey(
        kind,
        _text(metadata.get("NAME")) or name,
        _text(metadata.get("NAMESPACE")) or namespace,
        pairs,
        Locality(here.region, here.zone, here.sub_zone),
        node.user_agent_name == OURS,
        tuple(sorted((key, value) for key, value in metadata.items() if isinstance(value, str) and key not in _KNOWN)),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
