"""Load balancing against the real Envoy: bit-exact for hash policies, the same sequence or the same shares for the others."""

from __future__ import annotations

import socket
from collections import Counter
from contextlib import ExitStack, closing
from typing import Any

import pytest
from xxhash import xxh64_intdigest

from meshproxy.upstream.cluster import Cluster, LbContext
from tests.unit import upstream_help as up
from tests.unit.envoy_help import BINARY, Envoy

pytestmark = [pytest.mark.envoy, pytest.mark.slow, pytest.mark.skipif(BINARY is None, reason="no Envoy binary")]

_HOSTS = up.addresses(7)
_MANY = up.addresses(40, start=100)
_COMMON = "type.googleapis.com/envoy.extensions.load_balancing_policies"


def _weighted(*weights: int) -> list[dict[str, Any]]:
    return [up.endpoint(address, load_balancing_weight=weight) for address, weight in zip(_MANY, weights, strict=False)]


def _unhealthy(addresses: list[str], status: str = "UNHEALTHY") -> list[dict[str, Any]]:
    return [up.endpoint(address, health_status=status) for address in addresses]


def _typed(name: str, **config: Any) -> dict[str, Any]:
    kind = "".join(word.capitalize() for word in name.split("_"))
    packed = {"name": name, "typed_config": {"@type": f"{_COMMON}.{name}.v3.{kind}", **config}}
    return {"load_balancing_policy": {"policies": [{"typed_extension_config": packed}]}}


_LOCALITIES = (
    up.group(*_HOSTS[:2], locality={"zone": "a"}, load_balancing_weight=1),
    up.group(*_HOSTS[2:4], *_unhealthy(_HOSTS[4:5]), locality={"zone": "b"}, load_balancing_weight=3),
    up.group(*_unhealthy(_HOSTS[5:7]), locality={"zone": "c"}, load_balancing_weight=2),
)

HASHED = {
    "ring": up.static(up.group(*_HOSTS), lb_policy="RING_HASH"),
    "ring_weights": up.static(up.group(*_weighted(1, 5, 3, 128, 7)), lb_policy="RING_HASH"),
    "ring_sizes": up.static(up.group(*_MANY), lb_policy="RING_HASH", ring_hash_lb_config={"minimum_ring_size": 16, "maximum_ring_size": 100}),
    "ring_tiny": up.static(up.group(*_MANY), lb_policy="RING_HASH", ring_hash_lb_config={"minimum_ring_size": 1, "maximum_ring_size": 7}),
    "ring_large": up.static(up.group(*_weighted(1, 2, 3)), lb_policy="RING_HASH", ring_hash_lb_config={"minimum_ring_size": 5000}),
    "ring_murmur": up.static(up.group(*_HOSTS), lb_policy="RING_HASH", ring_hash_lb_config={"hash_function": "MURMUR_HASH_2"}),
    "ring_localities": up.static(*_LOCALITIES, lb_policy="RING_HASH", common_lb_config={"locality_weighted_lb_config": {}}),
    "ring_one": up.static(up.group(_HOSTS[0]), lb_policy="RING_HASH"),
    "ring_hostnames": up.static(
        up.group(*(up.endpoint(address, hostname=f"host-{index}") for index, address in enumerate(_HOSTS))),
        **_typed("ring_hash", consistent_hashing_lb_config={"use_hostname_for_hashing": True}),
    ),
    "ring_keys": up.static(
        up.group(*(up.endpoint(address, metadata={"filter_metadata": {"envoy.lb": {"hash_key": f"k{index}"}}}) for index, address in enumerate(_HOSTS))),
        lb_policy="RING_HASH",
    ),
    "ring_panic": up.static(up.group(*_HOSTS[:2], *_unhealthy(_HOSTS[2:])), lb_policy="RING_HASH"),
    "ring_priorities": up.static(up.group(*_HOSTS[:2], *_unhealthy(_HOSTS[2:5])), up.group(*_MANY[:4], priority=1), lb_policy="RING_HASH"),
    "ring_typed": up.static(up.group(*_MANY), **_typed("ring_hash", minimum_ring_size=200)),
    "maglev": up.static(up.group(*_HOSTS), lb_policy="MAGLEV"),
    "maglev_one": up.static(up.group(_HOSTS[0]), lb_policy="MAGLEV"),
    "maglev_weights": up.static(up.group(*_weighted(1, 5, 3, 128, 7)), lb_policy="MAGLEV"),
    "maglev_small": up.static(up.group(*_MANY), lb_policy="MAGLEV", maglev_lb_config={"table_size": 101}),
    "maglev_smaller": up.static(up.group(*_MANY), lb_policy="MAGLEV", maglev_lb_config={"table_size": 31}),
    "maglev_localities": up.static(*_LOCALITIES, lb_policy="MAGLEV", common_lb_config={"locality_weighted_lb_config": {}}),
    "maglev_typed": up.static(up.group(*_MANY), **_typed("maglev", table_size=1009, consistent_hashing_lb_config={"hash_balance_factor": 150})),
}
ROUND_ROBIN = {
    "rr": up.static(up.group(*_HOSTS)),
    "rr_weights": up.static(up.group(*_weighted(1, 2, 3))),
    "rr_weights_odd": up.static(up.group(*_weighted(7, 13, 1, 1, 29, 5))),
    "rr_weights_equal": up.static(up.group(*_weighted(4, 4, 4))),
    "lr_weights": up.static(up.group(*_weighted(2, 5, 1)), lb_policy="LEAST_REQUEST"),
}
BY_LOCALITY = {
    "rr_localities": up.static(*_LOCALITIES, common_lb_config={"locality_weighted_lb_config": {}}),
    "rr_typed": up.static(*_LOCALITIES, **_typed("round_robin", locality_lb_config={"locality_weighted_lb_config": {}})),
}
SHARES = {
    "random": up.static(up.group(*_HOSTS), lb_policy="RANDOM"),
    "lr": up.static(up.group(*_HOSTS), lb_policy="LEAST_REQUEST"),
    "lr_scan": up.static(up.group(*_HOSTS), **_typed("least_request", selection_method="FULL_SCAN")),
    "p0_partly": up.static(up.group(*_HOSTS[:2], *_unhealthy(_HOSTS[2:5])), up.group(*_MANY[:2], priority=1)),
    "p0_degraded": up.static(
        up.group(_HOSTS[0], *_unhealthy(_HOSTS[1:4], "DEGRADED"), *_unhealthy(_HOSTS[4:5])), up.group(_MANY[0], *_unhealthy(_MANY[1:3]), priority=1)
    ),
    "three": up.static(
        up.group(_HOSTS[0], *_unhealthy(_HOSTS[1:7])), up.group(*_MANY[:1], *_unhealthy(_MANY[1:5]), priority=1), up.group(*_MANY[5:9], priority=2)
    ),
    "panic_all": up.static(up.group(_HOSTS[0], *_unhealthy(_HOSTS[1:4])), up.group(*_unhealthy(_MANY[:6]), priority=1)),
    "panic_some": up.static(up.group(_HOSTS[0], *_unhealthy(_HOSTS[1:4])), up.group(*_MANY[:1], *_unhealthy(_MANY[1:2]), priority=1)),
    "panic_off": up.static(up.group(*_unhealthy(_HOSTS)), common_lb_config={"healthy_panic_threshold": {"value": 0}}),
    "panic_fails": up.static(up.group(*_unhealthy(_HOSTS)), common_lb_config={"zone_aware_lb_config": {"fail_traffic_on_panic": True}}),
    "draining": up.static(up.group(*_HOSTS[:3], *_unhealthy(_HOSTS[3:6], "DRAINING"))),
    "overprovisioned": up.static(up.group(*_HOSTS[:4], *_unhealthy(_HOSTS[4:5])), up.group(*_MANY[:2], priority=1), policy={"overprovisioning_factor": 100}),
    "weighted_health": up.static(
        up.group(*_weighted(1, 1), up.endpoint(_HOSTS[0], load_balancing_weight=8, health_status="UNHEALTHY")),
        up.group(_HOSTS[5], priority=1),
        policy={"weighted_priority_health": True},
    ),
}
ALL = {**HASHED, **ROUND_ROBIN, **BY_LOCALITY, **SHARES}


@pytest.fixture(scope="module")
def envoy():
    one = Envoy([{**config, "name": name, "load_assignment": {**config["load_assignment"], "cluster_name": name}} for name, config in ALL.items()])
    yield one
    one.close()


def _cluster(name: str) -> Cluster:
    return up.cluster({**ALL[name], "name": name})


def _pick(cluster: Cluster, value: str | None = None) -> str | None:
    host = cluster.pick(LbContext(None if value is None else xxh64_intdigest(value.encode())))
    return None if host is None else host.address.text


@pytest.mark.parametrize("name", HASHED)
def test_hash_policies_pick_the_same_host(envoy, name):
    cluster = _cluster(name)
    values = [f"user-{index}" for index in range(250)]
    assert [_pick(cluster, value) for value in values] == [envoy.pick(name, value) for value in values]


def test_bounded_load_goes_the_same_way():
    """The order in which a hot key overflows from host to host depends only on its hash."""
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(5)]
        hosts = [f"127.0.0.1:{one.getsockname()[1]}" for one in silent]
        weighted = [up.endpoint(address, load_balancing_weight=weight) for address, weight in zip(hosts, (1, 2, 1, 3, 1), strict=True)]
        hashing = {"consistent_hashing_lb_config": {"hash_balance_factor": 130}}
        config = up.static(up.group(*weighted), name="bounded", lb_policy="RING_HASH", common_lb_config=hashing)
        one = stack.enter_context(closing(Envoy([config])))
        cluster = up.cluster(config)
        for index in range(40):
            value = f"key-{index % 3}"
            host = cluster.pick(LbContext(xxh64_intdigest(value.encode())))
            host.rq_active += 1
            cluster.limits[0].rq += 1
            stack.enter_context(one.hold("bounded", value))
            while sum((active := one.active("bounded")).values()) <= index:
                pass
            assert active == {host.address.text: host.rq_active for host in cluster.hosts}


@pytest.mark.parametrize("name", ["ring", "ring_weights", "ring_sizes", "ring_tiny", "ring_large", "ring_one"])
def test_ring_gauges(envoy, name):
    cluster = _cluster(name)
    for gauge in ("size", "min_hashes_per_host", "max_hashes_per_host"):
        full = f"cluster.{name}.ring_hash_lb.{gauge}"
        assert cluster.context.stats.value(full) == envoy.stat(full), full


@pytest.mark.parametrize("name", ["maglev", "maglev_weights", "maglev_small", "maglev_one"])
def test_maglev_gauges(envoy, name):
    cluster = _cluster(name)
    _pick(cluster, "x")
    for gauge in ("min_entries_per_host", "max_entries_per_host"):
        full = f"cluster.{name}.maglev_lb.{gauge}"
        assert cluster.context.stats.value(full) == envoy.stat(full), full


@pytest.mark.parametrize("name", ROUND_ROBIN)
def test_round_robin_has_the_same_cycle(envoy, name):
    cluster = _cluster(name)
    assert _cycles_alike([_pick(cluster) for _ in range(400)], [envoy.pick(name) for _ in range(120)])


@pytest.mark.parametrize("name", BY_LOCALITY)
def test_weighted_localities_have_the_same_cycle(envoy, name):
    """The cycle of localities and the cycle of hosts within each start independently of each other."""
    cluster = _cluster(name)
    zone_of = {host.address.text: host.locality.zone for host in cluster.hosts}
    ours, theirs = [_pick(cluster) for _ in range(600)], [envoy.pick(name) for _ in range(150)]
    assert _cycles_alike([zone_of[one] for one in ours], [zone_of[one] for one in theirs])
    for zone in set(zone_of.values()):
        assert _cycles_alike([one for one in ours if zone_of[one] == zone], [one for one in theirs if zone_of[one] == zone])


def _cycles_alike(ours: list[str | None], theirs: list[str | None]) -> bool:
    """Whether one is found in the other: both start somewhere in the same cycle."""
    return any(ours[start : start + len(theirs)] == theirs for start in range(len(ours) - len(theirs) + 1))


@pytest.mark.parametrize("name", SHARES)
def test_shares(envoy, name):
    cluster = _cluster(name)
    rounds = 1500
    ours = Counter(_pick(cluster) for _ in range(rounds))
    theirs = Counter(envoy.pick(name) for _ in range(rounds))
    for address in ours | theirs:
        # Six standard deviations of the difference of two binomial counts.
        share = (ours[address] + theirs[address]) / (2 * rounds)
        assert abs(ours[address] - theirs[address]) <= 6 * (2 * rounds * share * (1 - share)) ** 0.5 + 1, (name, address, ours, theirs)
    panics = f"cluster.{name}.lb_healthy_panic"
    assert (cluster.context.stats.value(panics) > 0) == (envoy.stat(panics) > 0)


@pytest.mark.parametrize("name", ALL)
def test_membership(envoy, name):
    cluster = _cluster(name)
    for gauge in ("membership_total", "membership_healthy", "membership_degraded", "membership_excluded"):
        full = f"cluster.{name}.{gauge}"
        assert cluster.context.stats.value(full) == envoy.stat(full), full
