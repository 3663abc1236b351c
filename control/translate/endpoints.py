"""Endpoints: the load assignments of EDS, and of clusters that are resolved by DNS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from control.model.labels import REGION, SUB_ZONE, ZONE
from control.model.service import NOWHERE, Endpoint, Locality
from control.model.traffic import LocalitySettings, TrafficPolicy
from control.translate import mtls

Labels = tuple[tuple[str, str], ...]
_NO_SETTINGS = LocalitySettings()


def load_assignment(
    name: str, endpoints: Iterable[Endpoint], policy: TrafficPolicy | None = None, here: Locality | None = None, labels: Labels = ()
) -> dict[str, Any]:
    """The endpoints of a cluster, by locality.

    As in Istio: with `distribute`, localities weigh what it says for callers `here`. Otherwise, where outlier detection tells which endpoints fail, the
    nearest are used first (same zone part, zone, region, then the rest), or those that are most like the caller in its `labels`; with `failover` as well, of
    those that are equally like it the nearest. Otherwise a locality weighs as much as its endpoints.
    """
    settings = (policy.load_balancer.locality if policy is not None and policy.load_balancer is not None else None) or _NO_SETTINGS
    chosen = _distribution(settings, here or NOWHERE)
    if settings.priority and settings.enabled and not chosen and policy is not None and fails_over(policy):
        return {"cluster_name": name, "endpoints": _most_alike(endpoints, settings, here or NOWHERE, labels)}
    made = _by_locality(endpoints)
    if policy is not None and here is not None and here != NOWHERE and settings.enabled:
        if chosen is not None:
            made = _distribute(made, chosen)
        elif fails_over(policy):
            _prioritise(made, settings, here)
    return {"cluster_name": name, "endpoints": [group for _, group in made]}


def _by_locality(endpoints: Iterable[Endpoint]) -> list[tuple[Locality, dict[str, Any]]]:
    groups: dict[Locality, list[Endpoint]] = defaultdict(list)
    for one in endpoints:
        groups[one.locality].append(one)
    made = []
    for locality in sorted(groups, key=_order):
        group: dict[str, Any] = {
            # gRPC's clients refuse a group without a locality, even if it is nowhere.
            "locality": {"region": locality.region, "zone": locality.zone, "sub_zone": locality.sub_zone},
            "lb_endpoints": [_endpoint(one) for one in groups[locality]],
            "load_balancing_weight": min(sum(one.weight for one in groups[locality]), 2**32 - 1),
        }
        made.append((locality, group))
    return made


def with_place(labels: Labels, place: Locality) -> dict[str, str]:
    """Labels with those that Kubernetes has for places, where they do not say it themselves."""
    parts = {REGION: place.region, ZONE: place.zone, SUB_ZONE: place.sub_zone}
    return {**{key: value for key, value in parts.items() if value}, **dict(labels)}


def _most_alike(endpoints: Iterable[Endpoint], settings: LocalitySettings, here: Locality, labels: Labels) -> list[dict[str, Any]]:
    """Endpoints count as far as they are like the caller before the first label in which they are not; numbered without gaps."""
    caller = with_place(labels, here)
    wanted = [(key, value if equals else caller.get(key)) for key, equals, value in (one.partition("=") for one in settings.priority)]
    ranked: dict[tuple[int, int], list[Endpoint]] = defaultdict(list)
    for one in endpoints:
        has = with_place(one.labels, one.locality)
        alike = next((index for index, (key, value) in enumerate(wanted) if has.get(key) != value), len(wanted))
        ranked[len(wanted) - alike, _distance(one.locality, settings, here) if settings.failover or settings.zone_aware else 0].append(one)
    made = []
    for number, rank in enumerate(sorted(ranked)):
        for _, group in _by_locality(ranked[rank]):
            made.append({**group, **({"priority": number} if number else {})})
    return made


def fails_over(policy: TrafficPolicy) -> bool:
    """Whether some endpoints are only for when others fail."""
    settings = policy.load_balancer.locality if policy.load_balancer is not None else None
    return policy.outlier_detection is not None or (settings is not None and settings.always)


def priority_labels(policy: TrafficPolicy) -> frozenset[str]:
    """The labels of callers that a load assignment depends on."""
    settings = policy.load_balancer.locality if policy.load_balancer is not None else None
    if settings is None or not fails_over(policy):
        return frozenset()
    return frozenset(one for one in settings.priority if "=" not in one)


def depends_on_locality(policy: TrafficPolicy) -> bool:
    """Whether callers in different places get different load assignments."""
    settings = policy.load_balancer.locality if policy.load_balancer is not None else None
    return bool(fails_over(policy) or (settings is not None and settings.distribute))


def _order(locality: Locality) -> tuple[str, str, str]:
    return locality.region, locality.zone, locality.sub_zone


def _endpoint(one: Endpoint) -> dict[str, Any]:
    made: dict[str, Any] = {
        "endpoint": {"address": {"socket_address": {"address": one.address, "port_value": one.port}}},
        "load_balancing_weight": one.weight,
    }
    if not one.healthy:
        made["health_status"] = "DRAINING" if one.draining else "UNHEALTHY"
    metadata: dict[str, Any] = {}
    if one.workload:
        metadata["istio"] = {"workload": one.workload}
    if one.mtls:
        metadata["envoy.transport_socket_match"] = {mtls.TLS_MODE: mtls.MUTUAL}
    if metadata:
        made["metadata"] = {"filter_metadata": metadata}
    return made


def _distribution(settings: LocalitySettings, here: Locality) -> dict[str, int] | None:
    for origin, weights in settings.distribute:
        if _covers(origin, here):
            return dict(weights)
    return None


def _covers(pattern: str, locality: Locality) -> bool:
    """Whether `region/zone/*` or the like includes a locality."""
    parts = (locality.region, locality.zone, locality.sub_zone)
    wanted = pattern.split("/")
    for index, want in enumerate(wanted[:3]):
        if want == "*":
            return True
        if want != parts[index]:
            return False
    return True


def _distribute(made: list[tuple[Locality, dict[str, Any]]], weights: dict[str, int]) -> list[tuple[Locality, dict[str, Any]]]:
    """Each pattern's share, among its localities by what they weigh; localities without a share are left out. A locality belongs to its longest pattern."""
    chosen: dict[str, list[tuple[Locality, dict[str, Any]]]] = defaultdict(list)
    for locality, group in made:
        patterns = [pattern for pattern in weights if _covers(pattern, locality)]
        if patterns:
            chosen[max(patterns, key=lambda pattern: len(pattern.rstrip("*")))].append((locality, group))
    kept = []
    for pattern, members in chosen.items():
        total = sum(group["load_balancing_weight"] for _, group in members) or 1
        for locality, group in members:
            share = weights[pattern] * group["load_balancing_weight"] / total
            kept.append((locality, {**group, "load_balancing_weight": max(1, round(share))}))
    return sorted(kept, key=lambda one: _order(one[0]))


def _prioritise(made: list[tuple[Locality, dict[str, Any]]], settings: LocalitySettings, here: Locality) -> None:
    """Nearest first, numbered without gaps, as Envoy needs them."""
    ranks = [_distance(locality, settings, here) for locality, _ in made]
    numbers = {rank: number for number, rank in enumerate(sorted(set(ranks)))}
    for rank, (_, group) in zip(ranks, made, strict=True):
        if numbers[rank]:
            group["priority"] = numbers[rank]
    made.sort(key=lambda one: one[1].get("priority", 0))


def _distance(locality: Locality, settings: LocalitySettings, here: Locality) -> int:
    if settings.zone_aware and locality.region == here.region:
        return 0  # of its zones the proxy chooses itself
    if locality.region != here.region:
        targets = [to for origin, to in settings.failover if origin == here.region]
        return 4 if targets and locality.region not in targets else 3
    if locality.zone != here.zone:
        return 2
    return 0 if locality.sub_zone == here.sub_zone else 1
