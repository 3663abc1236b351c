"""Policies with a fixed random: slow start, active requests, latency, zones, bounded load, retries of a selection."""

from __future__ import annotations

from collections import Counter

import pytest

from meshproxy.upstream import host as hosts
from meshproxy.upstream.cluster import Cluster, LbContext
from meshproxy.upstream.cluster_manager import ClusterManager
from tests.unit import upstream_help as up

FIVE = up.addresses(5)
_COMMON = "type.googleapis.com/envoy.extensions.load_balancing_policies"


def typed(name: str, version: str = "v3", **config):
    kind = "".join(word.capitalize() for word in name.split("_"))
    packed = {"name": name, "typed_config": {"@type": f"{_COMMON}.{name}.{version}.{kind}", **config}}
    return {"load_balancing_policy": {"policies": [{"typed_extension_config": packed}]}}


def shares(cluster: Cluster, rounds: int = 4000) -> dict[str, float]:
    counts = Counter(cluster.pick(None).address.text for _ in range(rounds))
    return {address: count / rounds for address, count in counts.items()}


# -- round robin


def test_turns_go_on_after_a_change():
    cluster = up.cluster(up.static(up.group(*FIVE)))
    order = [cluster.pick(None).address.text for _ in range(10)]
    assert order[:5] == order[5:]
    assert sorted(order[:5]) == sorted(FIVE)
    before = cluster.pick(None).address.text
    cluster.set_flags(cluster.hosts[0], hosts.FAILED_EDS_HEALTH)
    after = [cluster.pick(None).address.text for _ in range(4)]
    assert sorted(after) == sorted(FIVE[1:])
    assert before in FIVE


def test_proxies_do_not_start_with_the_same_host():
    first = {up.cluster(up.static(up.group(*FIVE)), up.context(seed=seed)).pick(None).address.text for seed in range(40)}
    assert first == set(FIVE)


def test_a_single_priority_is_picked_without_detour():
    cluster = up.cluster(up.static(up.group(*FIVE)))
    assert cluster.pick.__qualname__ == "_Turn.pick"


# -- least request


def test_least_request_prefers_the_idle_host():
    cluster = up.cluster(up.static(up.group(*FIVE[:2]), lb_policy="LEAST_REQUEST"))
    busy, idle = cluster.hosts
    busy.rq_active = 10
    found = shares(cluster)
    # Two draws with replacement: the busy one only when it is drawn twice.
    assert found[busy.address.text] == pytest.approx(0.25, abs=0.03)
    assert found[idle.address.text] == pytest.approx(0.75, abs=0.03)


def test_more_choices_and_full_scan():
    cluster = up.cluster(up.static(up.group(*FIVE), lb_policy="LEAST_REQUEST", least_request_lb_config={"choice_count": 8}))
    for host in cluster.hosts[1:]:
        host.rq_active = 1
    assert shares(cluster)[FIVE[0]] == pytest.approx(1 - 0.8**8, abs=0.03)
    cluster = up.cluster(up.static(up.group(*FIVE), **typed("least_request", selection_method="FULL_SCAN")))
    for host in cluster.hosts[2:]:
        host.rq_active = 1
    assert shares(cluster) == {FIVE[0]: pytest.approx(0.5, abs=0.03), FIVE[1]: pytest.approx(0.5, abs=0.03)}


def test_weighted_least_request_counts_active_requests():
    weighted = [up.endpoint(FIVE[0], load_balancing_weight=2), up.endpoint(FIVE[1], load_balancing_weight=1)]
    cluster = up.cluster(up.static(up.group(*weighted), lb_policy="LEAST_REQUEST"))
    assert shares(cluster)[FIVE[0]] == pytest.approx(2 / 3, abs=0.01)
    cluster.hosts[0].rq_active = 3
    assert shares(cluster)[FIVE[0]] == pytest.approx(1 / 3, abs=0.01)  # 2/4 against 1
    without = up.cluster(
        up.static(up.group(*weighted), lb_policy="LEAST_REQUEST", least_request_lb_config={"active_request_bias": {"default_value": 0.0, "runtime_key": "x"}})
    )
    without.hosts[0].rq_active = 3
    assert shares(without)[FIVE[0]] == pytest.approx(2 / 3, abs=0.01)


# -- slow start


def test_slow_start_gives_a_new_host_its_share_little_by_little():
    clock = up.Clock()
    config = up.static(up.group(*FIVE[:2]), round_robin_lb_config={"slow_start_config": {"slow_start_window": "60s"}})
    cluster = up.cluster(config, up.context(clock=clock))
    assert shares(cluster)[FIVE[0]] == pytest.approx(0.5, abs=0.01)  # all are new: nobody is behind
    clock.advance(100)
    cluster.update_endpoints(up.proto(up.static(up.group(*FIVE[:3]))).load_assignment)
    clock.advance(0.001)
    assert shares(cluster)[FIVE[2]] == pytest.approx(0.1 / 2.1, abs=0.01)
    clock.advance(30)
    assert shares(cluster)[FIVE[2]] == pytest.approx(0.5 / 2.5, abs=0.01)
    clock.advance(31)
    assert shares(cluster)[FIVE[2]] == pytest.approx(1 / 3, abs=0.01)


def test_slow_start_aggression_and_least_weight():
    clock = up.Clock()
    slow = {"slow_start_window": "100s", "aggression": {"default_value": 2.0, "runtime_key": "x"}, "min_weight_percent": {"value": 30}}
    cluster = up.cluster(up.static(up.group(FIVE[0]), lb_policy="LEAST_REQUEST", least_request_lb_config={"slow_start_config": slow}), up.context(clock=clock))
    clock.advance(1000)
    cluster.update_endpoints(up.proto(up.static(up.group(*FIVE[:2]))).load_assignment)
    clock.advance(1)
    assert shares(cluster)[FIVE[1]] == pytest.approx(0.3 / 1.3, abs=0.01)
    clock.advance(35)
    assert shares(cluster)[FIVE[1]] == pytest.approx(0.6 / 1.6, abs=0.01)  # (36/100) ^ (1/2)


def test_slow_start_begins_when_a_host_becomes_healthy():
    clock = up.Clock()
    checks = [{"timeout": "1s", "interval": "5s", "unhealthy_threshold": 1, "healthy_threshold": 1, "tcp_health_check": {}}]
    config = up.static(up.group(*FIVE[:2]), health_checks=checks, round_robin_lb_config={"slow_start_config": {"slow_start_window": "60s"}})
    cluster = up.cluster(config, up.context(clock=clock))
    cluster.set_health({FIVE[0]: 0})
    clock.advance(300)
    cluster.set_health({FIVE[1]: 0})
    clock.advance(15)
    assert shares(cluster)[FIVE[1]] == pytest.approx(0.25 / 1.25, abs=0.01)


# -- peak EWMA


def ewma(clock: up.Clock, *addresses: str, **config) -> Cluster:
    return up.cluster(up.static(up.group(*addresses), **typed("peak_ewma", "v3alpha", **config)), up.context(clock=clock))


def test_the_faster_host_is_preferred():
    clock = up.Clock()
    cluster = ewma(clock, *FIVE[:2])
    assert cluster.observes_latency
    slow, fast = cluster.hosts
    cluster.observe(slow, 0.1)
    cluster.observe(fast, 0.01)
    assert shares(cluster) == {fast.address.text: 1}
    fast.rq_active = 20
    assert shares(cluster) == {slow.address.text: 1}


def test_a_peak_counts_at_once_and_decays():
    clock = up.Clock()
    cluster = ewma(clock, *FIVE[:2], decay_time="10s")
    one, other = cluster.hosts
    for host in cluster.hosts:
        cluster.observe(host, 0.01)
    cluster.observe(one, 1.0)
    assert one.latency.seconds == 1.0
    cluster.observe(one, 0.01)  # at the same moment: no weight yet
    assert one.latency.seconds == 1.0
    clock.advance(10)
    cluster.observe(one, 0.0)
    assert one.latency.seconds == pytest.approx(0.3679, abs=0.0001)
    clock.advance(60)  # idle: tried again after a while
    cluster.observe(other, 0.01)
    assert shares(cluster) == {one.address.text: 1}


def test_a_host_that_never_answered_does_not_fill_up():
    clock = up.Clock()
    cluster = ewma(clock, *FIVE[:3])
    known, fresh, hanging = cluster.hosts
    cluster.observe(known, 0.02)
    hanging.rq_active = 1
    found = shares(cluster)
    assert hanging.address.text not in found
    assert found[fresh.address.text] > found[known.address.text]  # 10 ms until it is known better


# -- localities


def zoned(addresses: list[str], zone: str, **more):
    return up.group(*addresses, locality={"zone": zone}, **more)


def test_locality_weights_follow_availability():
    groups = (zoned(up.addresses(4), "a", load_balancing_weight=1), zoned(up.addresses(4, start=10), "b", load_balancing_weight=1))
    cluster = up.cluster(up.static(*groups, common_lb_config={"locality_weighted_lb_config": {}}))
    assert sum(share for address, share in shares(cluster).items() if address in up.addresses(4)) == pytest.approx(0.5, abs=0.01)
    for host in cluster.hosts[:2]:
        cluster.set_flags(host, hosts.FAILED_EDS_HEALTH)
    # Half of them at 1.4: 0.7 against 1.
    assert sum(share for address, share in shares(cluster).items() if address in up.addresses(4)) == pytest.approx(0.7 / 1.7, abs=0.01)


def test_localities_without_weight_get_nothing():
    groups = (zoned(FIVE[:2], "a"), zoned(FIVE[2:], "b", load_balancing_weight=1))
    cluster = up.cluster(up.static(*groups, common_lb_config={"locality_weighted_lb_config": {}}))
    assert set(shares(cluster)) == set(FIVE[2:])


def test_wrr_locality_wraps_a_policy():
    groups = (zoned(FIVE[:1], "a", load_balancing_weight=3), zoned(FIVE[1:2], "b", load_balancing_weight=1))
    inner = typed("least_request")["load_balancing_policy"]
    cluster = up.cluster(up.static(*groups, **typed("wrr_locality", endpoint_picking_policy=inner)))
    assert shares(cluster) == {FIVE[0]: pytest.approx(0.75, abs=0.01), FIVE[1]: pytest.approx(0.25, abs=0.01)}


def zone_aware(local: dict[str, int], upstream: dict[str, int], **config) -> Cluster:
    """Seen from zone a: so many proxies and so many hosts in each zone."""
    return zone_aware_manager(local, upstream, **config).get("c")


def zone_aware_manager(local: dict[str, int], upstream: dict[str, int], **config) -> ClusterManager:
    from envoy.config.bootstrap.v3 import bootstrap_pb2

    def groups(counts: dict[str, int], start: int):
        return [zoned(up.addresses(count, start=start + 20 * index), zone) for index, (zone, count) in enumerate(counts.items())]

    common = {"zone_aware_lb_config": {"min_cluster_size": 1, **config}}
    return up.manager(
        up.static(*groups(local, 300), name="us"),
        up.static(*groups(upstream, 0), common_lb_config=common),
        ctx=up.context(zone="a"),
        config=bootstrap_pb2.Bootstrap(cluster_manager={"local_cluster_name": "us"}).cluster_manager,
    )


def zone_shares(cluster: Cluster) -> dict[str, float]:
    counts = Counter(cluster.pick(None).locality.zone for _ in range(4000))
    return {zone: pytest.approx(count / 4000, abs=0.03) for zone, count in counts.items()}


def value(cluster: Cluster, name: str) -> int:
    return cluster.context.stats.value(f"cluster.c.{name}")


def test_zone_aware_stays_at_home_when_it_can():
    cluster = zone_aware({"a": 1, "b": 1}, {"a": 2, "b": 2})
    assert zone_shares(cluster) == {"a": 1.0}
    assert value(cluster, "lb_zone_routing_all_directly") == 4000


def test_zone_aware_sends_away_what_is_too_much():
    # Half of the proxies but a quarter of the hosts are here: half of what we have stays, the rest goes where capacity is left.
    cluster = zone_aware({"a": 2, "b": 2}, {"a": 2, "b": 6})
    assert zone_shares(cluster) == {"a": 0.5, "b": 0.5}
    # 40 %, 40 %, 20 % of the proxies and 25 %, 50 %, 25 % of the hosts: residual capacity 10 and 5.
    cluster = zone_aware({"a": 4, "b": 4, "c": 2}, {"a": 2, "b": 4, "c": 2})
    assert zone_shares(cluster) == {"a": 0.625, "b": 0.25, "c": 0.125}
    assert value(cluster, "lb_zone_routing_sampled") + value(cluster, "lb_zone_routing_cross_zone") == 4000


def test_zone_aware_is_off_for_small_clusters_and_unknown_zones():
    cluster = zone_aware({"a": 1, "b": 1}, {"a": 2, "b": 2}, min_cluster_size=5)
    assert zone_shares(cluster) == {"a": 0.5, "b": 0.5}
    assert value(cluster, "lb_zone_cluster_too_small") == 1
    cluster = zone_aware({"b": 1, "c": 1}, {"a": 2, "b": 2})
    assert zone_shares(cluster) == {"a": 0.5, "b": 0.5}
    assert value(cluster, "lb_local_cluster_not_ok") == 1


def test_zone_aware_follows_the_local_cluster():
    manager = zone_aware_manager({"a": 1, "b": 1}, {"a": 2, "b": 2})
    cluster = manager.get("c")
    assert zone_shares(cluster) == {"a": 1.0}
    three_here = (zoned(up.addresses(3, start=300), "a"), zoned(up.addresses(1, start=320), "b"))
    manager.update_endpoints("us", up.proto(up.static(*three_here, name="us")).load_assignment)
    assert zone_shares(cluster) == {"a": 0.667, "b": 0.333}


# -- consistent hashing


def test_the_next_attempt_is_another_host():
    for policy in ("RING_HASH", "MAGLEV"):
        cluster = up.cluster(up.static(up.group(*up.addresses(20)), lb_policy=policy))
        found = {cluster.pick(LbContext(123456789, attempt=attempt)).address.text for attempt in range(6)}
        assert len(found) > 2


def test_without_a_hash_any_host():
    for policy in ("RING_HASH", "MAGLEV"):
        cluster = up.cluster(up.static(up.group(*FIVE), lb_policy=policy))
        assert {cluster.pick(None).address.text for _ in range(200)} == set(FIVE)


def test_bounded_load_spreads_a_hot_key():
    hashing = {"consistent_hashing_lb_config": {"hash_balance_factor": 120}}
    cluster = up.cluster(up.static(up.group(*FIVE), lb_policy="RING_HASH", common_lb_config=hashing))
    for _ in range(50):
        host = cluster.pick(LbContext(42))
        host.rq_active += 1
        cluster.limits[0].rq += 1
    active = [host.rq_active for host in cluster.hosts]
    assert sum(active) == 50
    assert max(active) <= 13  # 1.2 times the average, and one for the first
    order = [cluster.pick(LbContext(42)).address.text for _ in range(5)]
    assert len(set(order)) == 1  # the way out is always the same


# -- retries


def test_priority_load_of_a_retry_plugin():
    cluster = up.cluster(up.static(up.group(*FIVE[:2]), up.group(*FIVE[2:], priority=1)))
    assert set(shares(cluster)) == set(FIVE[:2])
    context = LbContext(priority_load=lambda host_sets, state: ([0, 100], [0, 0]))
    assert {cluster.pick(context).address.text for _ in range(50)} == set(FIVE[2:])
