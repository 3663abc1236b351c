"""Labels, and who is chosen by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

NAMESPACE_NAME = "kubernetes.io/metadata.name"  # the label that Kubernetes gives each namespace


class Requirement(NamedTuple):
    """`operator` is In, NotIn, Exists or DoesNotExist."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """As Kubernetes has it: who lacks a label is not in any of its values."""
        value = labels.get(self.key)
        if self.operator in ("Exists", "DoesNotExist"):
            return (value is None) is (self.operator == "DoesNotExist")
        return (value in self.values) is (self.operator == "In")


# Labels of places, as Kubernetes and Istio have them.
REGION, ZONE, SUB_ZONE = "topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"
HOSTNAME = "kubernetes.io/hostname"


@dataclass(frozen=True, slots=True, eq=False)
class LabelSelector:
    """Chooses whatever has all of these labels and meets all requirements."""

    labels: Mapping[str, str]
    requirements: tuple[Requirement, ...] = ()

    def chooses(self, labels: Mapping[str, str]) -> bool:
        return self.labels.items() <= labels.items() and all(one.holds(labels) for one in self.requirements)


@dataclass(frozen=True, slots=True, eq=False)
class Namespace:
    """A namespace that a document describes, with all its labels."""

    name: str
    labels: Mapping[str, str]


def labels_of(name: str) -> Mapping[str, str]:
    """Those of a namespace that no document describes."""
    return {NAMESPACE_NAME: name}
