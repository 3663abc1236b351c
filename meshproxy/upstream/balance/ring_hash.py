"""RING_HASH: ketama-like consistent hashing. Each host owns points on a ring of 64-bit hashes; a request goes to the owner of the next point."""

from __future__ import annotations

import bisect
import math
from array import array
from typing import TYPE_CHECKING, Any

from xxhash import xxh64_intdigest

from meshproxy.api import errors
from meshproxy.upstream.balance.hashing import HONOURS as _HASHING
from meshproxy.upstream.balance.hashing import HashBalancer, Weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.observe.stats import Scope
    from meshproxy.upstream.balance.base import Balancer, Deps
    from meshproxy.upstream.host import Host

TYPE_URL = "type.googleapis.com/envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash"
HONOURS = {
    "envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash": (
        "hash_function minimum_ring_size maximum_ring_size use_hostname_for_hashing hash_balance_factor consistent_hashing_lb_config"
        " locality_weighted_lb_config"
    ),
    **_HASHING,
}

MIN_RING_SIZE = 1024
MAX_RING_SIZE = 8 * 1024 * 1024
MURMUR_SEED = 0xC70F6907


def compile(proto: Any, deps: Deps) -> Balancer:
    """The balancer that a RingHash message asks for. Raises ConfigError."""
    common = proto.consistent_hashing_lb_config
    nested = proto.HasField("consistent_hashing_lb_config")
    factor = common if nested else proto
    return ring_hash(
        deps,
        min_size=proto.minimum_ring_size.value if proto.HasField("minimum_ring_size") else MIN_RING_SIZE,
        max_size=proto.maximum_ring_size.value if proto.HasField("maximum_ring_size") else MAX_RING_SIZE,
        murmur=proto.hash_function == 2,
        use_hostname=common.use_hostname_for_hashing if nested else proto.use_hostname_for_hashing,
        balance_factor=factor.hash_balance_factor.value,
        locality_weighted=proto.HasField("locality_weighted_lb_config"),
    )


def ring_hash(
    deps: Deps,
    *,
    min_size: int = MIN_RING_SIZE,
    max_size: int = MAX_RING_SIZE,
    murmur: bool = False,
    use_hostname: bool = False,
    balance_factor: int = 0,
    locality_weighted: bool = False,
) -> HashBalancer:
    """A ring hash balancer. Raises ConfigError when the sizes contradict each other."""
    if min_size > max_size:
        errors.fail("minimum_ring_size", f"ring hash: minimum_ring_size ({min_size}) > maximum_ring_size ({max_size})")
    hash = murmur_hash_2 if murmur else xxh64_intdigest

    def build(weights: Weights) -> Ring:
        return Ring(weights, min_size, max_size, hash, use_hostname, deps.scope)

    return HashBalancer(build, deps, locality_weighted=locality_weighted, balance_factor=balance_factor)


class Ring:
    """The points of all hosts in order, 8 bytes for a point and 8 for its owner."""

    __slots__ = ("_hashes", "_owners")

    def __init__(self, weights: Weights, min_size: int, max_size: int, hash: Callable[[bytes], int], use_hostname: bool, scope: Scope | None) -> None:
        points: list[tuple[int, int, Host]] = []
        if weights:
            # The lightest host gets a whole number of points; the others what their weight says, fractions carried over from host to host.
            least = min(weight for _, weight in weights)
            scale = min(math.ceil(least * min_size) / least, float(max_size))
            fewest, most = math.ceil(scale), 0
            made, target = 0, 0.0
            for host, weight in weights:
                key = host.hash_key(use_hostname).encode() + b"_"
                target += scale * weight
                own = 0
                while made < target:
                    points.append((hash(key + b"%d" % own), made, host))
                    own += 1
                    made += 1
                fewest, most = min(fewest, own), max(most, own)
            points.sort(key=_by_hash)
            if scope is not None:
                for name, value in (("size", math.ceil(scale)), ("min_hashes_per_host", fewest), ("max_hashes_per_host", most)):
                    scope.gauge(f"ring_hash_lb.{name}", shared=True).n = value
        self._hashes = array("Q", [point[0] for point in points])
        self._owners = [point[2] for point in points]

    def choose(self, hash: int, attempt: int) -> Host | None:
        """The owner of the first point at or after `hash`, or `attempt` points further on."""
        owners = self._owners
        if not owners:
            return None
        index = bisect.bisect_left(self._hashes, hash) + attempt
        return owners[index % len(owners)]

    def __len__(self) -> int:
        return len(self._owners)


def _by_hash(point: tuple[int, int, Host]) -> int:
    return point[0]


_MULTIPLIER = 0xC6A4A7935BD1E995
_MASK = 0xFFFFFFFFFFFFFFFF


def murmur_hash_2(data: bytes, seed: int = MURMUR_SEED) -> int:
    """MurmurHash2 of 64 bits for 64-bit machines (libstdc++'s std::hash of a string)."""
    length = len(data)
    whole = length & ~7
    value = seed ^ (length * _MULTIPLIER & _MASK)
    for offset in range(0, whole, 8):
        block = int.from_bytes(data[offset : offset + 8], "little") * _MULTIPLIER & _MASK
        block = (block ^ (block >> 47)) * _MULTIPLIER & _MASK
        value = (value ^ block) * _MULTIPLIER & _MASK
    if length & 7:
        value = (value ^ int.from_bytes(data[whole:], "little")) * _MULTIPLIER & _MASK
    value = (value ^ (value >> 47)) * _MULTIPLIER & _MASK
    return value ^ (value >> 47)
