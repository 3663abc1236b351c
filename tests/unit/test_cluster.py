"""Clusters: compilation, endpoints and health over time, limits, drops, what admin shows."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.api.runtime import Layer, Runtime, parse_entry
from meshproxy.codec.headers import RequestHead
from meshproxy.net.address import Address
from meshproxy.net.shared import Cells
from meshproxy.observe.stats import Store
from meshproxy.upstream import host as hosts
from meshproxy.upstream import limits, status
from meshproxy.upstream.cluster import Cluster, LbContext
from meshproxy.upstream.cluster_manager import Validator, validate
from tests.unit import upstream_help as up

FIVE = up.addresses(5)


def picked(cluster: Cluster, times: int = 40) -> set[str]:
    return {host.address.text for host in (cluster.pick(None) for _ in range(times)) if host is not None}


def assignment(*groups, policy=None):
    return up.proto(up.static(*groups, policy=policy)).load_assignment


class Pool:
    drained = False

    def drain(self) -> None:
        self.drained = True


# -- options


def test_defaults_are_envoys():
    cluster = up.cluster(up.static(up.group(*FIVE)))
    assert (cluster.connect_timeout, cluster.per_connection_buffer_limit, cluster.idle_timeout, cluster.max_requests_per_connection) == (5, 1 << 20, 3600, 0)
    assert (cluster.tcp_pool_idle_timeout, cluster.max_connection_duration, cluster.drops, cluster.outlier, cluster.transport) == (600, 0, None, None, None)
    assert (cluster.needs_context, cluster.needs_hash, cluster.checks_health, cluster.auto_sni) == (False, False, False, False)
    assert [one.max_rq for one in cluster.limits] == [1024, 1024]
    assert cluster.limits[0].max_retries == 3


def test_http_options():
    options = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "common_http_protocol_options": {"idle_timeout": "7s", "max_requests_per_connection": 9, "max_headers_count": 11, "max_connection_duration": "3s"},
        "upstream_http_protocol_options": {"auto_sni": True, "override_auto_sni_header": "X-Name"},
        "explicit_http_config": {"http_protocol_options": {"header_key_format": {"proper_case_words": {}}}},
    }
    key = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    cluster = up.cluster(up.static(up.group(*FIVE), typed_extension_protocol_options={key: options}))
    assert (cluster.idle_timeout, cluster.max_requests_per_connection, cluster.max_connection_duration, cluster.auto_sni) == (7, 9, 3, True)
    assert (cluster.h1_options.max_headers, cluster.options.header_style, cluster.auto_sni_header) == (11, "proper", b"x-name")


@pytest.mark.parametrize(
    ("host", "name"),
    [(b"a.example", "a.example"), (b"a.example:8080", "a.example"), (b"[::1]:80", None), (b"::1", None), (b"127.0.0.1:80", None), (None, None)],
)
def test_server_name(host, name):
    cluster = up.cluster(up.static(up.group(*FIVE), upstream_http_protocol_options={"auto_sni": True}))
    head = RequestHead(b"GET", b"/", host or b"", [])
    pool = cluster.pool_for(cluster.hosts[0], 0, head)
    assert pool.server_name == name
    assert cluster.pool_for(cluster.hosts[0], 0, head) is pool
    assert pool.san is None
    verifying = up.cluster(up.static(up.group(*FIVE), upstream_http_protocol_options={"auto_san_validation": True}))
    verified = verifying.pool_for(verifying.hosts[0], 0, head)
    assert (verified.server_name, verified.san) == (None, name or (host and host.decode().removeprefix("[").removesuffix("]:80").removesuffix(":80")))


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"type": "EDS"}, "eds_cluster_config.eds_config"),
        ({"connect_timeout": "0s"}, "connect_timeout"),
        ({"type": "LOGICAL_DNS", "load_assignment": {"cluster_name": "c", "endpoints": [up.group("a:1", "b:1")]}}, "load_assignment.endpoints"),
        ({"type": "ORIGINAL_DST", "load_assignment": None}, "lb_policy"),
        ({"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED"}, "load_assignment"),
        ({"lb_policy": "CLUSTER_PROVIDED"}, "lb_policy"),
        ({"lb_policy": "LOAD_BALANCING_POLICY_CONFIG"}, "load_balancing_policy"),
        ({"lb_policy": "MAGLEV", "maglev_lb_config": {"table_size": 100}}, "maglev_lb_config.table_size"),
        (
            {"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 10, "maximum_ring_size": 5}},
            "ring_hash_lb_config.minimum_ring_size",
        ),
        ({"circuit_breakers": {"per_host_thresholds": [{"max_retries": 1}]}}, "circuit_breakers.per_host_thresholds[0].max_retries"),
        (
            {"max_requests_per_connection": 1, "common_http_protocol_options": {"max_requests_per_connection": 2}},
            "max_requests_per_connection",
        ),
        (
            {"load_assignment": {"cluster_name": "c", "endpoints": [up.group("127.0.0.1:1", "example.com:1")]}},
            "load_assignment.endpoints[0].lb_endpoints[1].endpoint.address.socket_address.address",
        ),
        ({"upstream_bind_config": {"source_address": {"address": "nonsense", "port_value": 0}}}, "upstream_bind_config.source_address.address"),
        ({"health_checks": [{"timeout": "1s", "interval": "1s"}, {"timeout": "1s", "interval": "1s"}]}, "health_checks"),
    ],
)
def test_mistakes_have_paths(change, path):
    config = up.static(up.group(*FIVE))
    config.update(change)
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(ConfigError) as error:
        validate(up.proto(config), up.context())
    assert [problem.path for problem in error.value.problems] == [path]


def test_all_mistakes_are_reported():
    with pytest.raises(ConfigError) as error:
        validate(up.proto(up.static(up.group("x:1", "y:2"), connect_timeout="0s", lb_policy="MAGLEV", maglev_lb_config={"table_size": 4})), up.context())
    assert len(error.value.problems) == 4


def test_clusters_of_one_kind_are_told_apart_where_it_matters():
    validator = Validator(up.context())
    validator.check(up.proto(up.static(up.group("1.1.1.1:1"), name="a")))
    validator.check(up.proto(up.static(up.group("1.1.1.1:1", "2.2.2.2:2"), name="b")))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^load_assignment\.endpoints\[0\]\.lb_endpoints\[1\]\.endpoint\.address\.socket_address\.address: malformed"):
            validator.check(up.proto(up.static(up.group("1.1.1.1:1", "x:2"), name="c")))
    for name in ("d", "e"):
        with pytest.raises(ConfigError, match="maglev"):
            validator.check(up.proto(up.static(up.group("1.1.1.1:1"), name=name, lb_policy="MAGLEV", maglev_lb_config={"table_size": 4})))
    logical = {"type": "LOGICAL_DNS", "load_assignment": {"endpoints": [up.group("x:1")]}}
    validator.check(up.proto({"name": "f", **logical}))
    validator.check(up.proto({"name": "g", **logical}))
    logical["load_assignment"] = {"endpoints": [up.group("x:1", "y:2")]}
    with pytest.raises(ConfigError, match="single lb_endpoint"):
        validator.check(up.proto({"name": "h", **logical}))


def test_unknown_policies_are_skipped_if_a_known_one_follows():
    common = "type.googleapis.com/envoy.extensions.load_balancing_policies"
    subset = {"typed_extension_config": {"name": "s", "typed_config": {"@type": f"{common}.subset.v3.Subset", "default_subset": {}}}}
    rr = {"typed_extension_config": {"name": "r", "typed_config": {"@type": f"{common}.round_robin.v3.RoundRobin"}}}
    assert up.cluster(up.static(up.group(*FIVE), load_balancing_policy={"policies": [subset, rr]})).pick(None) is not None
    with pytest.raises(ConfigError, match=r"policies\[0\].typed_extension_config.typed_config"):
        up.cluster(up.static(up.group(*FIVE), load_balancing_policy={"policies": [subset]}))


# -- endpoints


def test_hosts_keep_their_state_over_updates():
    cluster = up.cluster(up.static(up.group(*FIVE)))
    first = cluster.find(Address.parse(FIVE[0]))
    gone = cluster.find(Address.parse(FIVE[4]))
    first.rq_total, pool = 17, Pool()
    gone.pools = {0: pool}
    assert cluster.update_endpoints(assignment(up.group(up.endpoint(FIVE[0], load_balancing_weight=3), *FIVE[1:4], "127.9.9.9:1")))
    assert cluster.find(Address.parse(FIVE[0])) is first
    assert (first.rq_total, first.weight) == (17, 3)
    assert pool.drained
    assert picked(cluster) == {*FIVE[:4], "127.9.9.9:1"}
    stats = cluster.context.stats
    assert stats.value("cluster.c.membership_change") == 2
    assert stats.value("cluster.c.max_host_weight") == 3
    assert not cluster.update_endpoints(assignment(up.group(up.endpoint(FIVE[0], load_balancing_weight=3), *FIVE[1:4], "127.9.9.9:1")))
    assert stats.value("cluster.c.update_no_rebuild") == 1


def test_health_status_of_endpoints():
    cluster = up.cluster(up.static(up.group(*FIVE)))
    cluster.update_endpoints(assignment(up.group(*FIVE[:3], up.endpoint(FIVE[3], health_status="DRAINING"), up.endpoint(FIVE[4], health_status="TIMEOUT"))))
    assert picked(cluster) == set(FIVE[:3])
    assert cluster.context.stats.value("cluster.c.membership_excluded") == 1


def test_a_host_moves_between_priorities():
    cluster = up.cluster(up.static(up.group(*FIVE)))
    host = cluster.find(Address.parse(FIVE[0]))
    cluster.update_endpoints(assignment(up.group(*FIVE[1:]), up.group(FIVE[0], priority=1)))
    assert (host.priority, [len(one.hosts) for one in cluster.host_sets]) == (1, [4, 1])
    assert picked(cluster) == set(FIVE[1:])


def test_duplicates_count_once_after_an_update():
    cluster = up.cluster(up.static(up.group(*FIVE)))
    cluster.update_endpoints(assignment(up.group(*FIVE[:2], *FIVE[:2])))
    assert len(cluster.hosts) == 2


def test_a_wrong_assignment_changes_nothing():
    cluster = up.cluster(up.static(up.group(*FIVE)))
    with pytest.raises(ConfigError):
        cluster.update_endpoints(assignment(up.group("example.com:1")))
    assert picked(cluster) == set(FIVE)


def test_locality_change_makes_a_new_host():
    cluster = up.cluster(up.static(up.group(FIVE[0], locality={"zone": "a"})))
    before = cluster.hosts[0]
    cluster.update_endpoints(assignment(up.group(FIVE[0], locality={"zone": "b"})))
    assert cluster.hosts[0] is not before
    assert cluster.hosts[0].locality.zone == "b"


# -- active health

CHECKS = {"health_checks": [{"timeout": "1s", "interval": "5s", "unhealthy_threshold": 1, "healthy_threshold": 1, "tcp_health_check": {}}]}


def test_hosts_wait_for_their_first_check():
    cluster = up.cluster(up.static(up.group(*FIVE), common_lb_config={"healthy_panic_threshold": {"value": 0}}, **CHECKS))
    assert cluster.pick(None) is None
    cluster.set_health({FIVE[1]: 0})
    assert picked(cluster) == {FIVE[1]}
    host = cluster.find(Address.parse(FIVE[1]))
    host.pools = {0: (pool := Pool())}
    cluster.set_health({FIVE[1]: hosts.FAILED_ACTIVE_HC})
    assert cluster.pick(None) is None
    assert pool.drained
    assert host.pools is None


def test_a_healthy_host_stays_after_it_left_the_assignment():
    cluster = up.cluster(up.static(up.group(*FIVE[:2]), **CHECKS))
    cluster.set_health(dict.fromkeys(FIVE[:2], 0))
    cluster.update_endpoints(assignment(up.group(FIVE[0])))
    assert picked(cluster) == set(FIVE[:2])
    assert "/pending_dynamic_removal" in hosts.flags_text(cluster.find(Address.parse(FIVE[1])).health_flags)
    cluster.set_health({FIVE[1]: hosts.FAILED_ACTIVE_HC})
    assert [host.address.text for host in cluster.hosts] == [FIVE[0]]
    ignoring = up.cluster(up.static(up.group(*FIVE[:2]), ignore_health_on_host_removal=True, **CHECKS))
    ignoring.set_health(dict.fromkeys(FIVE[:2], 0))
    ignoring.update_endpoints(assignment(up.group(FIVE[0])))
    assert len(ignoring.hosts) == 1


def test_immediate_failure_excludes_and_is_told():
    cluster = up.cluster(up.static(up.group(*FIVE), **CHECKS))
    cluster.set_health(dict.fromkeys(FIVE, 0))
    told = []
    cluster.on_immediate_failure = told.append
    cluster.fail_immediately(cluster.hosts[0])
    cluster.fail_immediately(cluster.hosts[0])
    assert told == [cluster.hosts[0]]
    assert FIVE[0] not in picked(cluster)
    assert cluster.context.stats.value("cluster.c.membership_excluded") == 1


def test_connections_are_dropped_when_the_host_set_changes():
    cluster = up.cluster(up.static(up.group(*FIVE), common_lb_config={"close_connections_on_host_set_change": True}))
    cluster.hosts[0].pools = {0: (pool := Pool())}
    cluster.update_endpoints(assignment(up.group(*FIVE[:4])))
    assert pool.drained


# -- limits and drops


def test_thresholds():
    breakers = {
        "thresholds": [
            {"max_connections": 1, "max_pending_requests": 2, "max_requests": 3, "max_retries": 4, "track_remaining": True},
            {"priority": "HIGH", "retry_budget": {"budget_percent": {"value": 25}, "min_retry_concurrency": 5}},
            {"max_connections": 100},
        ],
        "per_host_thresholds": [{"max_connections": 7}],
    }
    cluster = up.cluster(up.static(up.group(*FIVE), circuit_breakers=breakers))
    default, high = cluster.limits
    assert (default.max_cx, default.max_pending, default.max_rq, default.max_retries, default.max_cx_per_host) == (1, 2, 3, 4, 7)
    assert high.retry_limit() == 5
    high.rq, high.pending = 30, 10
    assert high.retry_limit() == 10
    high.retries = 10
    assert not high.can_retry()
    default.rq = 3
    cluster.publish()
    value = cluster.context.stats.value
    assert (value("cluster.c.circuit_breakers.default.rq_open"), value("cluster.c.circuit_breakers.default.remaining_rq")) == (1, 0)
    assert (value("cluster.c.circuit_breakers.default.cx_open"), value("cluster.c.circuit_breakers.default.remaining_cx")) == (0, 1)
    assert value("cluster.c.circuit_breakers.high.rq_retry_open") == 1


def test_runtime_overrides_limits():
    runtime = Runtime([Layer("l", {"circuit_breakers.c.default.max_requests": parse_entry("5")})])
    assert up.cluster(up.static(up.group(*FIVE)), up.context(runtime=runtime)).limits[0].max_rq == 5


def test_limits_of_several_workers_add_up():
    cells = Cells.create(64)
    breakers = up.proto({"name": "c", "circuit_breakers": {"thresholds": [{"max_requests": 10, "max_retries": 3}]}}).circuit_breakers
    workers = [limits.compile_limits(breakers, "c", up.context(worker_id=index, concurrency=3, cells=cells))[0] for index in range(3)]
    one, other, third = workers
    one.rq += 4
    other.rq += 5
    assert [worker.max_rq - worker.rq for worker in workers] == [1, 1, 1]
    third.rq += 1
    assert not any(worker.rq < worker.max_rq for worker in workers)
    one.retries += 3
    assert not other.can_retry()
    one.rq -= 4
    assert other.rq < other.max_rq
    again = limits.compile_limits(breakers, "c", up.context(worker_id=0, concurrency=3, cells=cells))[0]
    assert (again.rq, again.retries) == (0, 0)  # a replaced worker starts with nothing
    assert other.can_retry()


def test_without_shared_memory_workers_have_a_share_each():
    assert limits.compile_limits(up.proto({"name": "c"}).circuit_breakers, "c", up.context(concurrency=3))[0].max_rq == 342


def test_drop_overload():
    policy = {"drop_overloads": [{"category": "x", "drop_percentage": {"numerator": 30}}]}
    cluster = up.cluster(up.static(up.group(*FIVE), policy=policy))
    dropped = [cluster.drops(random.Random(seed)) for seed in range(1000)]
    assert set(dropped) == {None, "drop_overload"}
    assert 230 < dropped.count("drop_overload") < 370
    cluster.update_endpoints(assignment(up.group(*FIVE), policy={"drop_overloads": [{"category": "x", "drop_percentage": {"numerator": 100}}]}))
    assert cluster.drops(random.Random(1)) == "unconditional"
    cluster.update_endpoints(assignment(up.group(*FIVE)))
    assert cluster.drops is None


def test_maintenance_mode():
    runtime = Runtime([Layer("l", {"upstream.maintenance_mode.c": parse_entry("100")})])
    assert up.cluster(up.static(up.group(*FIVE)), up.context(runtime=runtime)).drops(random.Random(1)) == "maintenance"


# -- transport sockets


def test_transport_socket_matches_choose_by_metadata():
    tls = {"name": "t", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", "sni": "x"}}
    raw = {"name": "r", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"}}
    wants = {"filter_metadata": {"envoy.transport_socket_match": {"mtls": True}}}
    matches = [{"name": "secure", "match": {"mtls": True}, "transport_socket": tls}, {"name": "plain", "match": {}, "transport_socket": raw}]
    cluster = up.cluster(
        up.static(up.group(up.endpoint(FIVE[0], metadata=wants), FIVE[1]), up.group(FIVE[2], metadata=wants), transport_socket_matches=matches)
    )
    # An empty match fits every endpoint, so the locality's metadata of the last one is never asked for.
    assert [host.transport is not None for host in cluster.hosts] == [True, False, False]
    assert cluster.context.stats.value("cluster.c.secure.total_match_count") == 1
    assert cluster.context.stats.value("cluster.c.plain.total_match_count") == 2


def test_a_host_whose_metadata_changes_is_reached_another_way():
    """As when a workload begins, or ends, to take mutual TLS: its address stays, and no request goes on over connections of before."""
    tls = {"name": "t", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", "sni": "x"}}
    matches = [{"name": "secure", "match": {"mtls": True}, "transport_socket": tls}]
    wants = {"filter_metadata": {"envoy.transport_socket_match": {"mtls": True}}}
    cluster = up.cluster(up.static(up.group(up.endpoint(FIVE[0], metadata=wants), FIVE[1]), transport_socket_matches=matches))
    first, second = cluster.hosts
    pools = [Draining(), Draining()]
    first.pools, second.pools = {"key": pools[0]}, {"key": pools[1]}
    cluster.update_endpoints(assignment(up.group(FIVE[0], up.endpoint(FIVE[1], metadata={"filter_metadata": {"other": {"a": "b"}}}))))
    assert cluster.hosts == [first, second]
    assert (first.transport, second.transport, [pool.drained for pool in pools], first.pools) == (None, None, [1, 0], None)
    cluster.update_endpoints(assignment(up.group(FIVE[0], up.endpoint(FIVE[1], metadata=wants))))
    assert (first.transport, second.transport is not None, [pool.drained for pool in pools]) == (None, True, [1, 1])


class Draining:
    """A pool that notes that it was drained."""

    drained = 0

    def drain(self) -> None:
        self.drained += 1


# -- the manager


def test_nothing_is_compiled_before_it_is_used():
    manager = up.manager(up.static(up.group(*FIVE), name="a"), up.static(up.group(*FIVE), name="b"))
    assert manager.names() == ["a", "b"]
    assert list(manager.compiled()) == []
    assert manager.get("a") is manager.get("a")
    assert [cluster.name for cluster in manager.compiled()] == ["a"]
    assert manager.get("c") is None


def test_a_worker_inherits_what_main_knows_and_declares_no_statistics_again():
    main = up.manager(up.static(up.group(*FIVE), name="a"), up.static(up.group("127.9.9.9:1"), name="b"))
    worker = up.manager()
    worker.inherit(main)
    stats = worker.context.stats
    assert worker.names() == ["a", "b"]
    assert [host.address.text for host in worker.get("b").hosts] == ["127.9.9.9:1"]
    assert list(main.compiled()) == []
    assert (stats.value("cluster_manager.cluster_added"), stats.value("cluster_manager.active_clusters")) == (2, 2)
    assert "cluster.a.upstream_cx_total" in main.context.stats.names("counter")
    assert "cluster.a.upstream_cx_total" not in stats.names("counter")


def test_what_was_learnt_meanwhile_is_applied():
    manager = up.manager({"name": "c", "type": "STRICT_DNS", **CHECKS, "common_lb_config": {"healthy_panic_threshold": {"value": 0}}})
    manager.update_endpoints("c", assignment(up.group(*FIVE)).SerializeToString())
    manager.set_health("c", {FIVE[2]: 0})
    cluster = manager.get("c")
    assert picked(cluster) == {FIVE[2]}
    manager.set_health("c", {FIVE[3]: 0})
    assert picked(cluster) == {FIVE[2], FIVE[3]}


def test_replacing_a_cluster():
    manager = up.manager(up.static(up.group(*FIVE)))
    cluster = manager.get("c")
    assert not manager.add(up.proto(up.static(up.group(*FIVE))))
    assert manager.get("c") is cluster
    assert manager.add(up.proto(up.static(up.group(*FIVE[:1]))))
    assert len(manager.get("c").hosts) == 1
    assert manager.remove("c")
    assert manager.get("c") is None
    assert not [name for name in manager.context.stats.names("counter") if name.startswith("cluster.c.")]


def test_unused_clusters_show_their_members():
    manager = up.manager(up.static(up.group(*FIVE, up.endpoint("127.9.9.9:1", health_status="DEGRADED"))))
    list(manager.publish_unused())
    stats = manager.context.stats
    assert [stats.value(f"cluster.c.membership_{name}") for name in ("total", "healthy", "degraded", "change")] == [6, 5, 1, 1]
    assert list(manager.compiled()) == []
    stats.reset_counters()
    assert list(manager.publish_unused()) == []
    assert [stats.value(f"cluster.c.membership_{name}") for name in ("total", "healthy", "change")] == [6, 5, 0]
    manager.update_endpoints("c", assignment(up.group(*FIVE[:2])))
    assert list(manager.publish_unused()) == [None]
    assert [stats.value(f"cluster.c.membership_{name}") for name in ("total", "healthy", "degraded", "change")] == [2, 2, 0, 1]


def test_what_a_worker_says_of_members_counts():
    manager = up.manager(up.static(up.group(*FIVE)))
    list(manager.publish_unused())
    worker = Store()
    worker.scope("cluster.c.").gauge("membership_total", shared=True).n = 4
    stats = manager.context.stats
    stats.merge(0, worker.deltas())
    list(manager.publish_unused())
    assert [stats.value(f"cluster.c.membership_{name}") for name in ("total", "healthy")] == [4, 0]
    assert list(manager.publish_unused()) == []


@pytest.mark.parametrize("refused", [("membership_total",), ("membership_total", "membership_change")])
def test_what_a_worker_says_of_members_is_counted_once_whatever_is_refused(refused):
    manager = up.manager(up.static(up.group(*FIVE)))
    stats = manager.context.stats
    stats.accepts = lambda name: not name.endswith(refused)
    worker = Store()
    scope = worker.scope("cluster.c.")
    scope.gauge("membership_total", shared=True).n = 5
    scope.counter("membership_change", shared=True).n = 1
    scope.counter("default.total_match_count", shared=True).n = 5
    stats.merge(0, worker.deltas())
    list(manager.publish_unused())
    assert stats.value("cluster.c.default.total_match_count") == 5
    if "membership_change" not in refused:
        assert stats.value("cluster.c.membership_change") == 1


def test_ejections_reach_the_manager():
    manager = up.manager(up.static(up.group(*up.addresses(10)), outlier_detection={}))
    told = []
    manager.on_eject = lambda cluster, address: told.append((cluster, address))
    cluster = manager.get("c")
    for _ in range(5):
        cluster.outlier.result(cluster.hosts[0], 500)
    assert told == [("c", cluster.hosts[0].address.text)]
    manager.eject("c", cluster.hosts[1].address.text)  # another worker has judged, and that is not judged again
    assert cluster.hosts[1].health_flags == hosts.FAILED_OUTLIER_CHECK
    manager.eject("nobody", "1.2.3.4:5")


# -- original destinations


def stream(local: str = "127.0.0.1:1", restored: str | None = None, head: dict[bytes, bytes] | None = None, state: dict | None = None):
    connection = SimpleNamespace(direct_local=Address.parse(local), local=Address.parse(restored or local))
    return SimpleNamespace(
        connection=connection, request=None if head is None else SimpleNamespace(get=head.get), filter_state=state or {}, _filter_state=state
    )


def original(**config) -> Cluster:
    return up.cluster({"name": "c", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", **({"original_dst_lb_config": config} if config else {})})


def test_original_destination():
    cluster = original()
    assert cluster.needs_context
    assert cluster.pick(None) is None
    assert cluster.pick(LbContext(stream=stream())) is None  # nobody redirected it
    host = cluster.pick(LbContext(stream=stream(restored="10.0.0.1:80")))
    assert host.address.text == "10.0.0.1:80"
    assert cluster.pick(LbContext(stream=stream(restored="10.0.0.1:80"))) is host
    assert cluster.context.stats.value("cluster.c.membership_total") == 1
    cluster.sweep()
    cluster.sweep()
    assert cluster.hosts == []


def test_original_destination_host_in_use_stays():
    cluster = original()
    host = cluster.pick(LbContext(stream=stream(restored="10.0.0.1:80")))
    host.cx_active = 1
    cluster.sweep()
    cluster.sweep()
    assert cluster.hosts == [host]


def test_original_destination_by_header_and_port():
    cluster = original(use_http_header=True, upstream_port_override=8080)
    found = cluster.pick(LbContext(stream=stream(head={b"x-envoy-original-dst-host": b"10.0.0.2:80"})))
    assert found.address.text == "10.0.0.2:8080"
    assert cluster.pick(LbContext(stream=stream(head={b"x-envoy-original-dst-host": b"nonsense"}))) is None
    assert cluster.context.stats.value("cluster.c.original_dst_host_invalid") == 1
    named = original(use_http_header=True, http_header_name="X-Dst")
    assert named.pick(LbContext(stream=stream(head={b"x-dst": b"[::1]:9"}))).address.text == "[::1]:9"


# -- /clusters


def test_text_and_json():
    config = up.static(
        up.group(up.endpoint(FIVE[0], hostname="h", load_balancing_weight=4), locality={"region": "r", "zone": "z"}),
        up.group(up.endpoint(FIVE[1], health_status="UNHEALTHY"), priority=1),
        alt_stat_name="other",
        outlier_detection={},
    )
    manager = up.manager(config, up.static(up.group("[::1]:1"), name="unused"))
    manager.get("c").hosts[0].rq_total = 3
    snapshot = status.snapshot(manager)
    again = json.loads(json.dumps(snapshot))
    text = status.render_text(status.collect(manager, [snapshot, again])).splitlines()
    assert text[:2] == ["c::observability_name::other", "c::outlier::success_rate_average::-1"]
    assert f"c::{FIVE[0]}::rq_total::6" in text
    assert f"c::{FIVE[0]}::region::r" in text
    assert f"c::{FIVE[1]}::health_flags::/failed_eds_health" in text
    assert "unused::[::1]:1::health_flags::healthy" in text
    parsed = json.loads(status.render_json(status.collect(manager, [snapshot])))
    first, second = parsed["cluster_statuses"]
    assert (first["name"], second["name"]) == ("c", "unused")
    assert first["host_statuses"][0]["weight"] == 4
    assert first["host_statuses"][1]["health_status"] == {"eds_health_status": "UNHEALTHY"}
    assert second["host_statuses"][0]["address"] == {"socket_address": {"address": "::1", "port_value": 1}}
    assert list(manager.compiled()) == [manager.get("c")]


def test_response_code_counters():
    cluster = up.cluster(up.static(up.group(*FIVE)))
    cluster.stats.charge(503, internal=False, canary=True)
    cluster.stats.charge(200, internal=True)
    cluster.stats.charge_prefixed("retry.", 503)
    cluster.publish()
    value = cluster.context.stats.value
    names = ("upstream_rq_503", "upstream_rq_5xx", "canary.upstream_rq_503", "external.upstream_rq_5xx", "internal.upstream_rq_200", "retry.upstream_rq_503")
    assert [value(f"cluster.c.{name}") for name in names] == [1] * 6
    assert value("cluster.c.upstream_rq_completed") == 2
