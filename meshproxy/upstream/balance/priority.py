"""Which priority a request goes to: Envoy's arithmetic of health, over-provisioning, spill-over, degraded hosts and panic, in whole percents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.record import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshproxy.upstream.host import HostSet


class PriorityState(Record):
    """For each priority: the percentage of all requests that goes to its healthy and to its degraded hosts, and whether it is in panic."""

    healthy_load: list[int]
    degraded_load: list[int]
    panic: list[bool]

    def choose(self, point: int) -> tuple[int, bool]:
        """(priority, degraded) at a point from 1 to 100 of the load."""
        return choose(point, self.healthy_load, self.degraded_load)


def choose(point: int, healthy_load: Sequence[int], degraded_load: Sequence[int]) -> tuple[int, bool]:
    """(priority, degraded) at a point from 1 to 100: healthy loads first, then degraded ones."""
    total = 0
    for degraded, loads in ((False, healthy_load), (True, degraded_load)):
        for priority, load in enumerate(loads):
            total += load
            if point <= total:
                return priority, degraded
    return 0, False  # loads that do not add up to 100: nobody is there anyway


def priority_state(host_sets: Sequence[HostSet], panic_threshold: int) -> PriorityState:
    """`panic_threshold` in percent of healthy (and degraded) hosts; 0 turns panic off."""
    health, degraded = [], []
    for host_set in host_sets:
        one, other = availability(host_set)
        health.append(one)
        degraded.append(other)
    total = min(100, sum(health) + sum(degraded))
    healthy_load, degraded_load = _spread(health, degraded, total)
    panic = [False] * len(host_sets)
    threshold = min(panic_threshold, 100)
    if threshold == 0 and total == 0:
        # Nobody is there and panic is off: the load must go somewhere, to be answered with "no healthy upstream".
        healthy_load[0] = 100
        return PriorityState(healthy_load, degraded_load, panic)
    if total < 100:
        panic = [in_panic(host_set, threshold) for host_set in host_sets]
        if all(panic):
            return PriorityState(_total_panic(host_sets), [0] * len(host_sets), panic)
    return PriorityState(healthy_load, degraded_load, panic)


def availability(host_set: HostSet) -> tuple[int, int]:
    """Health and degraded availability of one priority, each from 0 to 100, over-provisioning factor included."""
    count = len(host_set.hosts) - len(host_set.excluded)
    if count <= 0:
        return 0, 0
    if host_set.weighted_health:
        healthy = sum(host.weight for host in host_set.healthy)
        degraded = sum(host.weight for host in host_set.degraded)
        count = sum(host.weight for host in host_set.hosts) - sum(host.weight for host in host_set.excluded)
    else:
        healthy, degraded = len(host_set.healthy), len(host_set.degraded)
    factor = host_set.overprovisioning_factor
    return min(100, factor * healthy // count), min(100, factor * degraded // count)


def in_panic(host_set: HostSet, threshold: int) -> bool:
    """Whether too few of the hosts are healthy or degraded (excluded hosts do not count)."""
    count = len(host_set.hosts) - len(host_set.excluded)
    if count <= 0:
        return threshold > 0
    # Two sums in floating point, as Envoy does it: the last bit may decide.
    return 100.0 * len(host_set.healthy) / count + 100.0 * len(host_set.degraded) / count < threshold


def _spread(health: list[int], degraded: list[int], total: int) -> tuple[list[int], list[int]]:
    if total == 0:
        return [0] * len(health), [0] * len(health)
    left = 100
    loads: list[list[int]] = []
    for available in (health, degraded):
        load = []
        for part in available:
            share = min(left, part * 100 // total)
            load.append(share)
            left -= share
        loads.append(load)
    if left:  # rounding: to the first priority that has anybody, healthy before degraded
        for load, available in zip(loads, (health, degraded), strict=True):
            first = next((index for index, part in enumerate(available) if part > 0), None)
            if first is not None:
                load[first] += left
                break
    return loads[0], loads[1]


def _total_panic(host_sets: Sequence[HostSet]) -> list[int]:
    """Everything is in panic: the load follows the number of hosts, whatever their health."""
    total = sum(len(host_set.hosts) for host_set in host_sets)
    if total == 0:
        return [100] + [0] * (len(host_sets) - 1)
    loads = [100 * len(host_set.hosts) // total for host_set in host_sets]
    first = next(index for index, host_set in enumerate(host_sets) if host_set.hosts)
    loads[first] += 100 - sum(loads)
    return loads
