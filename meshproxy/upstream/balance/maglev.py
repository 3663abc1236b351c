"""MAGLEV: consistent hashing by a table that every host fills in an order of its own (Maglev, NSDI 2016)."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from xxhash import xxh64_intdigest

from meshproxy.api import errors
from meshproxy.upstream.balance.hashing import HONOURS as _HASHING
from meshproxy.upstream.balance.hashing import MAX_HASH, HashBalancer, Weights

if TYPE_CHECKING:
    from meshproxy.observe.stats import Scope
    from meshproxy.upstream.balance.base import Balancer, Deps
    from meshproxy.upstream.host import Host

TYPE_URL = "type.googleapis.com/envoy.extensions.load_balancing_policies.maglev.v3.Maglev"
HONOURS = {
    "envoy.extensions.load_balancing_policies.maglev.v3.Maglev": "table_size consistent_hashing_lb_config locality_weighted_lb_config",
    **_HASHING,
}

TABLE_SIZE = 65537
MAX_TABLE_SIZE = 5000011


def compile(proto: Any, deps: Deps) -> Balancer:
    """The balancer that a Maglev message asks for. Raises ConfigError."""
    common = proto.consistent_hashing_lb_config
    return maglev(
        deps,
        size=proto.table_size.value if proto.HasField("table_size") else TABLE_SIZE,
        use_hostname=common.use_hostname_for_hashing,
        balance_factor=common.hash_balance_factor.value,
        locality_weighted=proto.HasField("locality_weighted_lb_config"),
    )


def maglev(deps: Deps, *, size: int = TABLE_SIZE, use_hostname: bool = False, balance_factor: int = 0, locality_weighted: bool = False) -> HashBalancer:
    """A Maglev balancer. Raises ConfigError when the table size will not do."""
    if size > MAX_TABLE_SIZE:
        errors.fail("table_size.value", f"value must be less than or equal to {MAX_TABLE_SIZE}")
    if not _is_prime(size):
        errors.fail("table_size", "The table size of maglev must be prime number")

    def build(weights: Weights) -> Maglev:
        return Maglev(weights, size, use_hostname, deps.scope)

    return HashBalancer(build, deps, locality_weighted=locality_weighted, balance_factor=balance_factor)


class Maglev:
    """The table: `size` entries of 2 bytes (4 with more than 65,535 hosts), filled when it is first used."""

    __slots__ = ("_hosts", "_scope", "_size", "_table", "_weights")

    def __init__(self, weights: Weights, size: int, use_hostname: bool, scope: Scope | None) -> None:
        self._size = size
        self._scope = scope
        # In the order of their keys: equal sets of hosts must give equal tables.
        ordered = sorted(((host.hash_key(use_hostname).encode(), host, weight) for host, weight in weights), key=lambda entry: entry[0])
        self._hosts: list[Host] = [host for _, host, _ in ordered]
        self._weights = [(key, weight) for key, _, weight in ordered]
        self._table: array[int] | None = None

    def choose(self, hash: int, attempt: int) -> Host | None:
        """The host of the entry that `hash` falls into."""
        hosts = self._hosts
        if len(hosts) < 2:
            return self._single()
        table = self._table
        if table is None:
            table = self._table = self._fill()
        if attempt > 0:
            hash ^= MAX_HASH - attempt + 1
        return hosts[table[hash % self._size]]

    def _single(self) -> Host | None:
        if not self._hosts:
            return None
        self._gauge(1, 1)  # a table of one host has one entry, says Envoy
        return self._hosts[0]

    def _gauge(self, fewest: int, most: int) -> None:
        if self._scope is not None:
            self._scope.gauge("maglev_lb.min_entries_per_host", shared=True).n = fewest
            self._scope.gauge("maglev_lb.max_entries_per_host", shared=True).n = most

    def _fill(self) -> array[int]:
        size = self._size
        heaviest = max(weight for _, weight in self._weights)
        offsets = [xxh64_intdigest(key) % size for key, _ in self._weights]
        skips = [xxh64_intdigest(key, 1) % (size - 1) + 1 for key, _ in self._weights]
        weights = [weight for _, weight in self._weights]
        targets = [0.0] * len(weights)
        counts = [0] * len(weights)
        owner = [-1] * size
        filled = 0
        iteration = 0
        while filled < size:
            iteration += 1
            for index, weight in enumerate(weights):
                if iteration * weight < targets[index]:
                    continue  # a host of a third of the greatest weight has its turn every third time
                targets[index] += heaviest
                place, skip = offsets[index], skips[index]
                while owner[place] >= 0:
                    place += skip
                    if place >= size:
                        place -= size
                owner[place] = index
                place += skip
                offsets[index] = place - size if place >= size else place
                counts[index] += 1
                filled += 1
                if filled == size:
                    break
        self._gauge(min(counts), max(counts))
        return array("H" if len(weights) <= 0xFFFF else "L", owner)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
