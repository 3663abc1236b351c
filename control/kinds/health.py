"""Readiness probes, as Kubernetes writes them: of our Workloads, and of Istio's WorkloadGroups."""

from __future__ import annotations

import re

from control.kinds.fields import Fields
from control.model.health import GRPC, HTTP, TCP, Probe
from control.names import is_ip

_KINDS = {"httpGet": HTTP, "tcpSocket": TCP, "grpc": GRPC}
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LOW_S = 0.05  # of times
_HIGH_S = 86400.0


def parse_probe(fields: Fields) -> Probe:
    """A Probe. Its times may have fractions."""
    fields.not_honoured("exec", why="proxies ask, and they run no commands: httpGet, tcpSocket or grpc is needed")
    # Whoever has not answered yet gets nothing, however soon it is asked; and nobody is killed for not being ready.
    fields.ignore("initialDelaySeconds", "terminationGracePeriodSeconds")
    which = fields.one_of(*_KINDS, required=True)
    action = (fields.child(which) if which else None) or Fields({})
    kind = _KINDS.get(which, TCP)
    host = action.text("host") if kind != GRPC else ""
    if host and not is_ip(host):
        action.error("host", f"{host!r:.80} is no IP address")
    path, headers = "/", []
    if kind == HTTP:
        path = action.text("path", "/") or "/"
        if not path.startswith("/"):
            path = f"/{path}"
        if any(not "!" <= one <= "~" for one in path):
            action.error("path", "must be printable ASCII without spaces")
        headers = list(action.each("httpHeaders", _header))
    return Probe(
        kind,
        action.int_or_text("port") or _no_port(action, needed=bool(which)),
        host,
        path,
        kind == HTTP and action.text("scheme", "HTTP", choices=("HTTP", "HTTPS")) == "HTTPS",
        tuple(headers),
        action.text("service") if kind == GRPC else "",
        fields.number("periodSeconds", 10.0, low=_LOW_S, high=_HIGH_S),
        fields.number("timeoutSeconds", 1.0, low=_LOW_S, high=_HIGH_S),
        fields.integer("successThreshold", 1, low=1) or 1,
        fields.integer("failureThreshold", 3, low=1) or 3,
    )


def _no_port(action: Fields, *, needed: bool) -> int:
    if needed and "port" not in action:
        action.error("port", "is needed")
    return 0


def _header(fields: Fields) -> tuple[str, str]:
    name, value = fields.text("name", required=True), fields.text("value")
    if name and not _HEADER.fullmatch(name):
        fields.error("name", f"{name!r:.80} is no name of a header")
    if any(one != "\t" and not " " <= one <= "~" for one in value):
        fields.error("value", "must be printable ASCII")
    elif "%" in value:
        fields.error("value", "a per cent sign begins a command of Envoy's", "unsupported")
    return name, value
