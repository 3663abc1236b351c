"""Folders of documents: services, what is behind them, and workloads with sidecars."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PORT = 80


def write(folder: Path, name: str, *documents: Mapping[str, Any]) -> None:
    """Put a file into the folder at once, as editors and git do. JSON is YAML, and is written faster."""
    scratch = folder / f".{name}"
    scratch.write_text("\n---\n".join(json.dumps(one) for one in documents))
    scratch.rename(folder / name)


def service(name: str, selector: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A Service with one HTTP port."""
    spec = {"ports": [{"name": "http", "port": PORT, "targetPort": "http"}], **({"selector": selector} if selector else {})}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def slice_of(name: str, addresses: Iterable[str], port: int = 8080) -> dict[str, Any]:
    """The EndpointSlice of a service."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-1", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
    }


def addresses(index: int, count: int = 10) -> list[str]:
    """Addresses of the endpoints of one of many services, which nobody asks."""
    return [f"10.{index >> 8}.{index & 255}.{host}" for host in range(1, count + 1)]


def workload(name: str, ports: Mapping[str, int], sidecar: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A Workload whose label `app` is its name."""
    return {
        "apiVersion": "meshproxy/v1",
        "kind": "Workload",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"serviceAccount": name, "ports": dict(ports), **({"sidecar": dict(sidecar)} if sidecar else {})},
    }


def many_services(folder: Path, count: int) -> None:
    """So many services of ten endpoints, a file for each."""
    for index in range(count):
        name = f"service-{index:04d}"
        write(folder, f"{name}.yaml", service(name), slice_of(name, addresses(index)))


def rule(name: str, http: list[dict[str, Any]]) -> dict[str, Any]:
    """A VirtualService of the service of that name."""
    return {"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": name}, "spec": {"hosts": [name], "http": http}}
