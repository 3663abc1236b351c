"""What documents of several families have in common."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from control.kinds.fields import Fields
from control.model.labels import HOSTNAME, REGION, SUB_ZONE, ZONE, LabelSelector, Requirement
from control.model.service import Locality
from control.names import is_ip

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"
_HOST = re.compile(rf"\*|(?:\*\.)?{_LABEL}(?:\.{_LABEL})*\.?")
_MAX_HOST = 255
_DISTRIBUTION = "networking.istio.io/traffic-distribution"
_SAME_ZONE = REGION, ZONE
_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


@dataclass(frozen=True, slots=True)
class Meta:
    """Where an object is, and how it is labelled. `created`: in RFC 3339, as a cluster says it; "" where nobody does."""

    name: str
    namespace: str
    labels: dict[str, str]
    annotations: dict[str, str]
    created: str = ""


# A kind: the object of a document's body, which has `spec` and whatever else that kind has. Problems are noted in the Fields.
Parser = Callable[[Meta, Fields], Any]


def subnets_of(fields: Fields, name: str) -> tuple[str, ...]:
    """Ranges of addresses, or single ones, as ADDRESS/LENGTH, each once."""
    found = []
    for index, text in enumerate(fields.texts(name)):
        try:
            found.append(str(ipaddress.ip_network(text, strict=False)))
        except ValueError:
            fields.error(f"{name}[{index}]", f"{text!r:.80} is neither an address nor a range of them such as 10.0.0.0/8")
    return tuple(dict.fromkeys(found))


def prefers(meta: Meta, word: str = "") -> tuple[str, ...]:
    """What a service says of how near its endpoints should be: in Kubernetes' trafficDistribution, or in Istio's annotation."""
    said = (word or meta.annotations.get(_DISTRIBUTION, "")).lower()
    return {"preferclose": _SAME_ZONE, "prefersamezone": _SAME_ZONE, "prefersamenode": (*_SAME_ZONE, SUB_ZONE, HOSTNAME)}.get(said, ())


def locality_of(text: str) -> Locality:
    """`region/zone/sub-zone`, as Istio writes localities."""
    parts = (text.split("/") + ["", "", ""])[:3]
    return Locality(*parts)


def label_selector(fields: Fields) -> LabelSelector:
    """Kubernetes' LabelSelector."""
    return LabelSelector(fields.string_map("matchLabels"), fields.each("matchExpressions", _requirement))


def _requirement(fields: Fields) -> Requirement:
    operator, values = fields.text("operator", required=True, choices=_OPERATORS), fields.texts("values")
    if operator in ("In", "NotIn") and not values:
        fields.error("values", f"must not be empty for {operator}")
    return Requirement(fields.text("key", required=True), operator, values)


def export_to(spec: Fields, name: str = "exportTo") -> tuple[str, ...]:
    """Namespaces that may see an object: `*` all, `.` its own; none where it does not say."""
    return spec.texts(name)


def host_of(fields: Fields, path: str, text: str) -> str:
    """A host, or `*` or `*.suffix` for many, in small letters. What no proxy would take is noted: it would refuse what is beside it, too."""
    host = text.lower()
    if len(host) > _MAX_HOST or not (_HOST.fullmatch(host) or is_ip(host)):
        fields.error(path, f"{text!r:.80} is no host, and no pattern such as *.example.com")
    return host


def hosts_of(fields: Fields, name: str, *, required: bool = False) -> tuple[str, ...]:
    """The hosts of a list, each once."""
    found = [host_of(fields, f"{name}[{index}]", text) for index, text in enumerate(fields.texts(name, required=required))]
    return tuple(dict.fromkeys(found))
