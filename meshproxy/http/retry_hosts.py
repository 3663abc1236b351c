"""Retry host predicates and retry priorities: the extensions that keep a retry away from where earlier tries failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from meshproxy.api import registry
from meshproxy.api.errors import under
from meshproxy.upstream.balance.priority import availability

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2
    from google.protobuf.any_pb2 import Any as AnyProto

    from meshproxy.upstream.balance.priority import PriorityState
    from meshproxy.upstream.host import Host, HostSet

_E = "envoy.extensions.retry"
_PREVIOUS_HOSTS = f"{_E}.host.previous_hosts.v3.PreviousHostsPredicate"
_OMIT_CANARY = f"{_E}.host.omit_canary_hosts.v3.OmitCanaryHostsPredicate"
_OMIT_METADATA = f"{_E}.host.omit_host_metadata.v3.OmitHostMetadataConfig"
_PREVIOUS_PRIORITIES = f"{_E}.priority.previous_priorities.v3.PreviousPrioritiesConfig"

HONOURS = {
    _PREVIOUS_HOSTS: "",
    _OMIT_CANARY: "",
    _OMIT_METADATA: "metadata_match",
    _PREVIOUS_PRIORITIES: "update_frequency",
}

Predicate = Callable[["Host", Sequence["Host"]], bool]  # candidate and hosts already tried -> whether to choose another one

_LB = "envoy.lb"


def compile_predicates(protos: Iterable[route_components_pb2.RetryPolicy.RetryHostPredicate]) -> tuple[Predicate, ...]:
    """`retry_host_predicate` of a retry policy. Raises ConfigError."""
    predicates = []
    for index, proto in enumerate(protos):
        with under(f"retry_host_predicate[{index}].typed_config"):
            registry.module(registry.type_url(proto.typed_config), "retry host predicate")
            predicates.append(_compile(registry.unpack(proto.typed_config)))
    return tuple(predicates)


def _compile(message: Any) -> Predicate:
    name = message.DESCRIPTOR.full_name
    if name == _PREVIOUS_HOSTS:
        return _was_tried
    if name == _OMIT_CANARY:
        return _is_canary
    from google.protobuf.json_format import MessageToDict  # large, and seldom needed

    labels: dict[str, Any] = MessageToDict(message.metadata_match).get("filterMetadata", {}).get(_LB, {})
    return _OmitMetadata(labels)


def _was_tried(host: Host, tried: Sequence[Host]) -> bool:
    return any(host is other for other in tried)


def _is_canary(host: Host, tried: Sequence[Host]) -> bool:
    return host.canary


class _OmitMetadata:
    """Rejects hosts whose `envoy.lb` metadata has all of some labels; a list in the host's metadata matches by any of its values."""

    __slots__ = ("_labels",)

    def __init__(self, labels: dict[str, Any]) -> None:
        self._labels = labels

    def __call__(self, host: Host, tried: Sequence[Host]) -> bool:
        labels = self._labels
        metadata = (host.metadata or {}).get(_LB)
        return bool(labels) and metadata is not None and all(_has(metadata, key, value) for key, value in labels.items())


def _has(metadata: dict[str, Any], key: str, value: Any) -> bool:
    if key not in metadata:
        return False
    found = metadata[key]
    return value in found if isinstance(found, list) else bool(found == value)


def compile_priority(packed: AnyProto) -> int:
    """`retry_priority`: the update frequency of previous_priorities. Raises ConfigError."""
    registry.module(registry.type_url(packed), "retry priority")
    message: Any = registry.unpack(packed)
    return int(message.update_frequency)


class PreviousPriorities:
    """`LbContext.priority_load` of one request: the load of the priorities that its tries have not been to yet.

    The choice is made anew after every `frequency` tries. When no other priority has hosts, all tries so far are forgotten; when nobody has, the
    balancer's own loads hold.
    """

    __slots__ = ("_counted", "_excluded", "_frequency", "_loads", "_tried")

    def __init__(self, frequency: int, tried: list[Host]) -> None:
        """`tried` is the request's list of hosts tried so far, which grows."""
        self._frequency = frequency
        self._tried = tried
        self._counted = 0  # tries that were forgotten
        self._excluded: set[int] = set()
        self._loads: tuple[Sequence[int], Sequence[int]] | None = None

    def __call__(self, host_sets: Sequence[HostSet], state: PriorityState) -> tuple[Sequence[int], Sequence[int]]:
        tried = self._tried[self._counted :]
        if len(tried) >= self._frequency and len(tried) % self._frequency == 0:
            self._excluded.update(host.priority for host in tried)
            self._loads = self._spread(host_sets)
        return self._loads or (state.healthy_load, state.degraded_load)

    def _spread(self, host_sets: Sequence[HostSet]) -> tuple[Sequence[int], Sequence[int]] | None:
        available = [availability(host_set) for host_set in host_sets]
        parts, total = self._without_excluded(available)
        if not total:
            self._excluded.clear()
            self._counted = len(self._tried)
            parts, total = self._without_excluded(available)
            if not total:
                return None
        count = len(available)
        loads = [0] * (2 * count)
        left = 100
        while left:  # again, until rounding has left nothing over
            for index, part in enumerate(parts):
                share = min(left, part * 100 // total)
                loads[index] += share
                left -= share
        return loads[:count], loads[count:]

    def _without_excluded(self, available: list[tuple[int, int]]) -> tuple[list[int], int]:
        """The availability of healthy, then of degraded hosts, 0 where excluded; and its sum, at most 100."""
        parts = [0 if index in self._excluded else both[kind] for kind in (0, 1) for index, both in enumerate(available)]
        return parts, min(100, sum(parts))
