"""Outlier detection, by the rules of Envoy's detector."""

from __future__ import annotations

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.upstream import host as hosts
from meshproxy.upstream.cluster import Cluster
from meshproxy.upstream.outlier import ejection_threshold
from tests.unit import upstream_help as up


def make(count: int = 10, *, checks: bool = False, **detection) -> tuple[Cluster, up.Clock]:
    clock = up.Clock()
    config = up.static(up.group(*up.addresses(count)), outlier_detection=detection)
    if checks:
        config["health_checks"] = [{"timeout": "1s", "interval": "5s", "unhealthy_threshold": 1, "healthy_threshold": 1, "tcp_health_check": {}}]
    return up.cluster(config, up.context(clock=clock)), clock


def fail(cluster: Cluster, host: hosts.Host, times: int, status: int = 500) -> None:
    for _ in range(times):
        cluster.outlier.result(host, status)


def ejected(cluster: Cluster) -> list[int]:
    return [index for index, host in enumerate(cluster.hosts) if host.health_flags & hosts.FAILED_OUTLIER_CHECK]


def count(cluster: Cluster, name: str) -> int:
    return cluster.context.stats.value(f"cluster.c.outlier_detection.ejections_{name}")


def test_consecutive_5xx_eject_and_the_host_gets_no_requests():
    cluster, _ = make()
    fail(cluster, cluster.hosts[3], 4)
    assert ejected(cluster) == []
    fail(cluster, cluster.hosts[3], 1)
    assert ejected(cluster) == [3]
    assert cluster.hosts[3] not in {cluster.pick(None) for _ in range(50)}
    assert count(cluster, "enforced_consecutive_5xx") == count(cluster, "detected_consecutive_5xx") == count(cluster, "enforced_total") == 1
    assert count(cluster, "active") == 1


def test_any_success_starts_the_count_anew():
    cluster, _ = make()
    fail(cluster, cluster.hosts[0], 4)
    cluster.outlier.result(cluster.hosts[0], 404)
    fail(cluster, cluster.hosts[0], 4)
    assert ejected(cluster) == []


def test_ten_percent_of_nine_hosts_is_nobody():
    cluster, _ = make(9)
    fail(cluster, cluster.hosts[0], 5)
    assert ejected(cluster) == []
    assert count(cluster, "overflow") == 1
    cluster, _ = make(9, always_eject_one_host=True)
    fail(cluster, cluster.hosts[0], 5)
    fail(cluster, cluster.hosts[1], 5)
    assert ejected(cluster) == [0]


def test_gateway_failures_are_detected_but_not_enforced_by_default():
    cluster, _ = make(consecutive_5xx=100)
    fail(cluster, cluster.hosts[0], 5, 503)
    assert count(cluster, "detected_consecutive_gateway_failure") == 1
    assert ejected(cluster) == []
    cluster, _ = make(consecutive_5xx=100, enforcing_consecutive_gateway_failure=100)
    fail(cluster, cluster.hosts[0], 4, 503)
    fail(cluster, cluster.hosts[0], 1, 500)  # not a gateway's: starts that count anew, not the other one
    fail(cluster, cluster.hosts[0], 4, 504)
    assert ejected(cluster) == []
    fail(cluster, cluster.hosts[0], 1, 502)
    assert ejected(cluster) == [0]


def test_local_failures_count_as_503_and_504_unless_split():
    cluster, _ = make(consecutive_5xx=2)
    cluster.outlier.local_failure(cluster.hosts[0], "connect_failed")
    cluster.outlier.local_failure(cluster.hosts[0], "timeout")
    assert ejected(cluster) == [0]


def test_split_mode_keeps_local_failures_apart():
    cluster, _ = make(split_external_local_origin_errors=True, consecutive_5xx=2, consecutive_local_origin_failure=3)
    host = cluster.hosts[0]
    for _ in range(2):
        cluster.outlier.local_failure(host, "connect_failed")
    cluster.outlier.connected(host)
    cluster.outlier.local_failure(host, "timeout")
    assert ejected(cluster) == []
    cluster.outlier.local_failure(host, "reset")
    cluster.outlier.local_failure(host, "reset")
    assert ejected(cluster) == [0]
    assert count(cluster, "enforced_consecutive_local_origin_failure") == 1


def test_a_tcp_connection_is_a_success():
    cluster, _ = make(consecutive_5xx=2)
    for _ in range(3):
        cluster.outlier.local_failure(cluster.hosts[0], "connect_failed")
        cluster.outlier.connected(cluster.hosts[0], final=True)
    assert ejected(cluster) == []
    assert cluster.hosts[0].outlier.external.total == 6


def test_a_host_comes_back_after_base_time_times_its_ejections():
    cluster, clock = make(base_ejection_time="30s", interval="10s")
    host = cluster.hosts[0]
    fail(cluster, host, 5)
    clock.advance(29)
    cluster.outlier.sweep(clock.now)
    assert ejected(cluster) == [0]
    clock.advance(1)
    cluster.outlier.sweep(clock.now)
    assert ejected(cluster) == []
    assert count(cluster, "active") == 0
    fail(cluster, host, 5)  # a second time: twice as long
    clock.advance(59)
    cluster.outlier.sweep(clock.now)
    assert ejected(cluster) == [0]
    clock.advance(1)
    cluster.outlier.sweep(clock.now)
    assert ejected(cluster) == []
    for _ in range(2):  # an interval in peace takes one off
        clock.advance(10)
        cluster.outlier.sweep(clock.now)
    assert host.outlier.backoff == 0


def test_ejection_time_has_a_maximum():
    cluster, clock = make(base_ejection_time="30s", max_ejection_time="45s")
    for _ in range(4):
        fail(cluster, cluster.hosts[0], 5)
        clock.advance(45)
        cluster.outlier.sweep(clock.now)
        assert ejected(cluster) == []
    with pytest.raises(ConfigError, match=r"outlier_detection\.max_ejection_time"):
        make(base_ejection_time="30s", max_ejection_time="10s")


def test_jitter_prolongs_an_ejection():
    cluster, clock = make(base_ejection_time="30s", max_ejection_time_jitter="10s")
    fail(cluster, cluster.hosts[0], 5)
    jitter = cluster.hosts[0].outlier.jitter
    assert 0 < jitter <= 10
    clock.advance(30 + jitter / 2)
    cluster.outlier.sweep(clock.now)
    assert ejected(cluster) == [0]
    clock.advance(jitter / 2 + 0.001)
    cluster.outlier.sweep(clock.now)
    assert ejected(cluster) == []


def test_success_rate_threshold():
    assert ejection_threshold([50, 100, 100, 100, 100], 1.9) == (90, 52)


def requests(cluster: Cluster, index: int, good: int, bad: int) -> None:
    host = cluster.hosts[index]
    for _ in range(bad):
        cluster.outlier.result(host, 500)
        cluster.outlier.result(host, 200)
    for _ in range(good - bad):
        cluster.outlier.result(host, 200)


def test_success_rate_ejects_the_outlier():
    cluster, clock = make(5, max_ejection_percent=50)
    for index in range(5):
        requests(cluster, index, 100 if index else 50, 0 if index else 50)
    cluster.outlier.sweep(clock.now)
    assert ejected(cluster) == [0]
    assert cluster.hosts[0].outlier.external.success_rate == 50
    assert cluster.outlier.averages["success_rate"] == (90, 52)
    assert count(cluster, "enforced_success_rate") == 1
    clock.advance(10)
    cluster.outlier.sweep(clock.now)
    assert cluster.outlier.averages["success_rate"] == (-1, -1)


def test_success_rate_needs_hosts_and_volume():
    cluster, clock = make(4, max_ejection_percent=50)
    for index in range(4):
        requests(cluster, index, 100 if index else 50, 0 if index else 50)
    cluster.outlier.sweep(clock.now)
    assert ejected(cluster) == []
    cluster, clock = make(5, max_ejection_percent=50)
    for index in range(5):
        requests(cluster, index, 99 if index else 50, 0 if index else 49)
    cluster.outlier.sweep(clock.now)
    assert ejected(cluster) == []


def test_failure_percentage():
    cluster, clock = make(5, max_ejection_percent=50, enforcing_success_rate=0, enforcing_failure_percentage=100, failure_percentage_threshold=40)
    for index in range(5):
        requests(cluster, index, 50 if index else 30, 0 if index else 30)
    cluster.outlier.sweep(clock.now)
    assert ejected(cluster) == [0]
    assert count(cluster, "enforced_failure_percentage") == 1


def test_ejections_are_told_and_adopted():
    cluster, _ = make()
    told = []
    cluster.outlier.on_eject = told.append
    fail(cluster, cluster.hosts[0], 5)
    assert told == [cluster.hosts[0]]
    other, clock = make()
    other.outlier.adopt(other.hosts[0])
    assert ejected(other) == [0]
    assert count(other, "enforced_total") == 0  # counted where it was detected
    clock.advance(30)
    other.outlier.sweep(clock.now)
    assert ejected(other) == []


def test_a_passing_health_check_brings_a_host_back():
    cluster, _ = make(checks=True)
    addresses = [host.address.text for host in cluster.hosts]
    cluster.set_health(dict.fromkeys(addresses, 0))
    fail(cluster, cluster.hosts[0], 5)
    assert ejected(cluster) == [0]
    cluster.set_health({addresses[0]: 0})
    assert ejected(cluster) == []
    cluster, _ = make(checks=True, successful_active_health_check_uneject_host=False)
    cluster.set_health(dict.fromkeys(addresses, 0))
    fail(cluster, cluster.hosts[0], 5)
    cluster.set_health({addresses[0]: 0})
    assert ejected(cluster) == [0]


def test_a_host_that_leaves_takes_its_ejection_along():
    config = up.static(up.group(*up.addresses(10)), outlier_detection={})
    cluster = up.cluster(config)
    fail(cluster, cluster.hosts[0], 5)
    cluster.update_endpoints(up.proto(up.static(up.group(*up.addresses(9, start=2)))).load_assignment)
    assert count(cluster, "active") == 0
    assert len(cluster.outlier._monitors) == 9
