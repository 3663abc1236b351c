"""What one knows of the workload at the other end, as Istio's proxies tell it: by a header with the workload's metadata, or in the metadata of an endpoint.

Source: Istio's metadata exchange (contrib/istio in Envoy). The header `x-envoy-peer-metadata` is a serialised google.protobuf.Struct in base64, of which
`x-envoy-peer-metadata-id` is the name; the metadata of an endpoint is `workload;namespace;canonical-service;canonical-revision;cluster` under `istio`.
Whoever speaks to us may claim to be anybody: this is for statistics, and for nothing else. Principals are what certificates say.
"""

from __future__ import annotations

import base64
import binascii
from functools import lru_cache
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from meshproxy.api import messages
from meshproxy.api.convert import from_struct

HEADER = b"x-envoy-peer-metadata"
ID_HEADER = b"x-envoy-peer-metadata-id"
_CANONICAL_NAME = "service.istio.io/canonical-name"
_CANONICAL_REVISION = "service.istio.io/canonical-revision"
_MAX_HEADER = 8192
_MAX_TEXT = 256  # characters of what is said of one thing
_LABELS = (
    ("canonical_name", (_CANONICAL_NAME,)),
    ("canonical_revision", (_CANONICAL_REVISION,)),
    ("app", ("app.kubernetes.io/name", "app")),
    ("version", ("app.kubernetes.io/version", "version")),
)


class Peer(NamedTuple):
    """A workload; "" is what is not known of it. `owner`: what made it, as Kubernetes names that."""

    workload: str = ""
    namespace: str = ""
    canonical_name: str = ""
    canonical_revision: str = ""
    cluster: str = ""
    app: str = ""
    version: str = ""
    name: str = ""
    identity: str = ""
    owner: str = ""


NOBODY = Peer()


def of_header(value: bytes) -> Peer | None:
    """Who says so by a header; None where it cannot be read."""
    return _of_header(value) if len(value) <= _MAX_HEADER else None


@lru_cache(1024)  # proxies have few peers, each of which says the same again and again
def _of_header(value: bytes) -> Peer | None:
    bare = value.rstrip(b"=")
    try:
        data = base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
        return of_metadata(from_struct(messages.known("google.protobuf.Struct").FromString(data)))
    except (binascii.Error, DecodeError, RecursionError):
        return None


def of_endpoint(text: str) -> Peer | None:
    """Who is said to be at an endpoint, in the words of its metadata."""
    parts = text.split(";")
    return Peer(*parts[:5]) if len(parts) >= 5 else None


def of_metadata(metadata: dict[str, Any]) -> Peer:
    """The workload that the metadata of a node describes."""
    labels = metadata.get("LABELS")
    labels = labels if isinstance(labels, dict) else {}
    found = {field: next((text for name in names if (text := _text(labels.get(name)))), "") for field, names in _LABELS}
    return Peer(
        _text(metadata.get("WORKLOAD_NAME")),
        _text(metadata.get("NAMESPACE")),
        cluster=_text(metadata.get("CLUSTER_ID")),
        name=_text(metadata.get("NAME")),
        identity=_text(metadata.get("IDENTITY")),
        owner=_text(metadata.get("OWNER")),
        **found,
    )


def of_host(host: Any) -> Peer | None:
    """Who is at an upstream's address (upstream.host.Host), by the metadata that it came with."""
    metadata = None if host is None or host.metadata is None else host.metadata.get("istio")
    text = metadata.get("workload") if isinstance(metadata, dict) else None
    return of_endpoint(text) if isinstance(text, str) else None


def of_local(node: Any, listener: Any) -> Peer:
    """Who we are: by the metadata of our node (envoy.config.core.v3.Node), or, where that does not say it, by those of the listener, in the same words under
    `istio`: so the control plane can change them without a new start."""
    said = from_struct(node.metadata) if node is not None else {}
    if "WORKLOAD_NAME" in said or listener is None:
        return of_metadata(said)
    return of_metadata({**said, **from_struct(listener.metadata.filter_metadata["istio"])} if "istio" in listener.metadata.filter_metadata else said)


def to_header(peer: Peer) -> bytes:
    """What tells others who `peer` is."""
    labels = {
        name: value
        for name, value in (
            (_CANONICAL_NAME, peer.canonical_name),
            (_CANONICAL_REVISION, peer.canonical_revision),
            ("app", peer.app),
            ("version", peer.version),
        )
        if value
    }
    fields = {
        "NAME": peer.name,
        "NAMESPACE": peer.namespace,
        "WORKLOAD_NAME": peer.workload,
        "CLUSTER_ID": peer.cluster,
        "IDENTITY": peer.identity,
        "OWNER": peer.owner,
    }
    made = messages.known("google.protobuf.Struct")()
    made.update({name: value for name, value in fields.items() if value})
    made.update({"LABELS": labels})
    return base64.b64encode(made.SerializeToString(deterministic=True))


def _text(value: Any) -> str:
    return value[:_MAX_TEXT] if isinstance(value, str) and value.isprintable() else ""
