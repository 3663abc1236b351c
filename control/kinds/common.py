"""What documents of several families have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from control.kinds.fields import Fields
from control.model.service import Locality


@dataclass(frozen=True, slots=True)
class Meta:
    """Where an object is, and how it is labelled."""

    name: str
    namespace: str
    labels: dict[str, str]
    annotations: dict[str, str]


# A kind: the object of a document's body, which has `spec` and whatever else that kind has. Problems are noted in the Fields.
Parser = Callable[[Meta, Fields], Any]


def locality_of(text: str) -> Locality:
    """`region/zone/sub-zone`, as Istio writes localities."""
    parts = (text.split("/") + ["", "", ""])[:3]
    return Locality(*parts)


def export_to(spec: Fields, name: str = "exportTo") -> tuple[str, ...]:
    """Namespaces that may see an object: `*` all, `.` its own."""
    return spec.texts(name) or ("*",)
