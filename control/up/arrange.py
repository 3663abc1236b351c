"""What documents leave open: the ports of workloads that are run here and of their sidecars, and that mutual TLS is the rule."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from control.model.health import TCP, Probe
from control.model.security import ROOT_NAMESPACE, Mtls, PeerAuthentication
from control.model.service import Outbound, SidecarPorts, Workload
from control.model.telemetry import MeshConfig
from control.up.ports import Ports, Use

_log = logging.getLogger("meshctl.up")
_STRICT = PeerAuthentication("default", ROOT_NAMESPACE, None, Mtls.STRICT)
ADMIN = "admin"
_PERIOD_S = 1.0  # between looks at whether a process listens, whose document does not say how it is asked


class Arrangement:
    """Objects of documents -> complete objects; the same ones again for the same ones, with the same ports for the same workload.

    One that gets no ports is told of in the log, and not run.
    """

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._strict = _STRICT
        self._known: dict[Any, tuple[Workload, Workload]] = {}

    def __call__(self, objects: Mapping[Any, Any]) -> Mapping[Any, Any]:
        made = dict(objects)
        root = next((one.general.root for one in objects.values() if isinstance(one, MeshConfig)), ROOT_NAMESPACE)
        if not any(isinstance(one, PeerAuthentication) and one.selector is None and one.namespace == root for one in objects.values()):
            if self._strict.namespace != root:
                self._strict = replace(_STRICT, namespace=root)
            made["security.istio.io", "PeerAuthentication", root, "default"] = self._strict
        known, self._known = self._known, {}
        for identity, one in objects.items():
            if isinstance(one, Workload) and one.run is not None:
                pair = known.get(identity)
                if pair is None or pair[0] is not one:
                    try:
                        pair = one, self._complete(one)
                    except OSError as error:
                        _log.error("%s cannot be run, it has no ports at %s: %s", identity, one.address, error.strerror)
                        continue
                self._known[identity] = pair
                made[identity] = pair[1]
        return made

    def running(self) -> list[Workload]:
        """The complete workloads that are to be run here."""
        return [made for _, made in self._known.values()]

    def _complete(self, one: Workload) -> Workload:
        def port(what: str, said: int = 0) -> int:
            return said or self._ports.take(Use(one.namespace, one.name, what), one.address)

        said = one.sidecar if one.sidecar is not None else SidecarPorts(identity=True)
        numbers = {name: port(f"port {name}", number) for name, number in one.ports.items()}
        sidecar = SidecarPorts(
            {number: port(f"inbound {name}", said.inbound.get(number, 0)) for name, number in numbers.items()}
            | {number: listen for number, listen in said.inbound.items() if number not in numbers.values()},
            port("http proxy", said.http_proxy),
            tuple(Outbound(port(f"outbound {item.host}:{item.port}", item.listen), item.host, item.port) for item in said.outbound),
            said.identity,
            scope=said.scope,
            capture=said.capture,
        )
        return Workload(one.name, one.namespace, one.address, one.labels, numbers, one.service_account, one.weight, one.locality, one.healthy, sidecar, one.run,
            readiness=one.readiness if one.readiness is not None else _default_probe(one),
        )  # fmt: skip


def _default_probe(one: Workload) -> Probe | None:
    """Whoever is run has to listen."""
    assert one.run is not None
    port = next(iter(one.ports), "")
    return Probe(TCP, port, period_s=_PERIOD_S, failures=1) if port and one.run.command else None


def environment(workload: Workload) -> dict[str, str]:
    """What a process is told: where to listen, and how to reach others through its sidecar. What the document says goes before it."""
    assert workload.sidecar is not None
    assert workload.run is not None
    local = "[::1]" if ":" in workload.address else "127.0.0.1"
    proxy = f"http://{local}:{workload.sidecar.http_proxy}"
    made = {"HOST": workload.address, "http_proxy": proxy, "HTTP_PROXY": proxy, "no_proxy": "127.0.0.1,localhost,::1", "PYTHONUNBUFFERED": "1"}
    for name, number in workload.ports.items():
        made.setdefault("PORT", str(number))
        made[f"PORT_{_variable(name)}"] = str(number)
    for one in workload.sidecar.outbound:
        name = _variable(one.host.partition(".")[0])
        made.setdefault(f"{name}_ADDRESS", f"{local}:{one.listen}")
        made.setdefault(f"{name}_URL", f"http://{local}:{one.listen}")
    return {**made, **dict(workload.run.environment)}


def _variable(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "_", name.upper())
