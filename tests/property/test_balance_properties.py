"""Balancers against slow and obvious versions of themselves."""

from __future__ import annotations

import heapq
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from meshproxy.upstream import host as hosts
from meshproxy.upstream.balance.edf import Edf
from meshproxy.upstream.balance.priority import choose, priority_state
from meshproxy.upstream.balance.ring_hash import murmur_hash_2
from meshproxy.upstream.cluster import Cluster, LbContext
from meshproxy.upstream.host import Host, HostSet
from tests.unit import upstream_help as up

weights = st.lists(st.integers(1, 128), min_size=1, max_size=12)


class PlainEdf:
    """Pick by pick, from nothing."""

    def __init__(self, entries: list[int], weight: dict[int, float]) -> None:
        self.weight = weight
        self.heap = [(1.0 / (weight[entry] + 1e-13), order, entry) for order, entry in enumerate(entries)]
        heapq.heapify(self.heap)
        self.order = len(entries)

    def pick(self) -> int:
        deadline, _, entry = heapq.heappop(self.heap)
        heapq.heappush(self.heap, (deadline + 1.0 / self.weight[entry], self.order, entry))
        self.order += 1
        return entry


@given(weights, st.integers(0, 500))
def test_edf_gives_everybody_its_share(many: list[int], picks: int):
    """In any run of as many picks as the weights add up to, nobody is more than one off."""
    edf = Edf(range(len(many)), lambda index: float(many[index]), picks)
    total = sum(many)
    counts = Counter(edf.pick() for _ in range(total))
    for index, weight in enumerate(many):
        assert abs(counts[index] - weight) <= 1


@given(weights)
def test_edf_without_picks_is_plain(many: list[int]):
    edf = Edf(range(len(many)), lambda index: float(many[index]))
    plain = PlainEdf(list(range(len(many))), dict(enumerate(map(float, many))))
    assert [edf.pick() for _ in range(300)] == [plain.pick() for _ in range(300)]


@given(st.lists(st.integers(1, 128), min_size=2, max_size=6, unique=True), st.integers(0, 2000))
def test_emulated_picks_are_picks(many: list[int], picks: int):
    """What is emulated in one step has the counts of picks made one by one."""
    emulated = Edf(range(len(many)), lambda index: float(many[index]), picks)
    one_by_one = Edf(range(len(many)), lambda index: float(many[index]))
    before = Counter(one_by_one.pick() for _ in range(picks))
    run = 3 * sum(many)
    ahead = Counter(emulated.pick() for _ in range(run))
    both = before + Counter(one_by_one.pick() for _ in range(run))
    for index in range(len(many)):
        assert abs(before[index] + ahead[index] - both[index]) <= 1


# -- priorities

shape = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=4)


def host_sets(shapes: list[tuple[int, int, int, int]], factor: int = 140) -> list[HostSet]:
    """For each priority: healthy, degraded, failed, excluded hosts."""
    flags = (0, hosts.DEGRADED_EDS_HEALTH, hosts.FAILED_EDS_HEALTH, hosts.FAILED_ACTIVE_HC | hosts.PENDING_ACTIVE_HC)
    return [
        HostSet(
            priority,
            [Host(None, None, priority=priority, health_flags=flag) for flag, count in zip(flags, counts, strict=True) for _ in range(count)],
            overprovisioning_factor=factor,
        )
        for priority, counts in enumerate(shapes)
    ]


@given(shape, st.integers(0, 100))
def test_loads_add_up(shapes, threshold: int):
    state = priority_state(host_sets(shapes), threshold)
    total = sum(state.healthy_load) + sum(state.degraded_load)
    nobody = not any(healthy or degraded for healthy, degraded, _, _ in shapes)
    assert total == 100 or (nobody and total == 0)
    assert all(load >= 0 for load in state.healthy_load + state.degraded_load)


@given(shape, st.integers(1, 100))
def test_load_goes_where_somebody_is(shapes, threshold: int):
    state = priority_state(host_sets(shapes), threshold)
    for (healthy, degraded, failed, excluded), to_healthy, to_degraded, panic in zip(shapes, state.healthy_load, state.degraded_load, state.panic, strict=True):
        if any(any(counts) for counts in shapes):
            assert not to_healthy or healthy or (panic and failed + excluded + degraded)
        assert not to_degraded or degraded


@given(shape, st.integers(1, 100))
def test_no_panic_while_there_is_enough(shapes, threshold: int):
    enough = sum(min(Fraction(100), Fraction(140 * (h + d), h + d + f)) for h, d, f, _ in shapes if h + d + f) >= 100 + 2 * len(shapes)
    if enough:
        assert not any(priority_state(host_sets(shapes), threshold).panic)


# Tables of Envoy's documentation (priority levels, degraded endpoints, over-provisioning, panic): healthy percentages in, loads out.
@pytest.mark.parametrize(
    ("healthy", "loads"),
    [
        ((100, 100), (100, 0)),
        ((72, 72), (100, 0)),
        ((71, 71), (99, 1)),
        ((50, 50), (70, 30)),
        ((25, 100), (35, 65)),
        ((25, 25), (50, 50)),
        ((100, 100, 100), (100, 0, 0)),
        ((72, 72, 0), (100, 0, 0)),
        ((71, 71, 0), (99, 1, 0)),
        ((50, 50, 50), (70, 30, 0)),
        ((25, 25, 100), (35, 35, 30)),
        ((20, 20, 10), (40, 40, 20)),
    ],
)
def test_priority_table(healthy, loads):
    state = priority_state(host_sets([(percent, 0, 100 - percent, 0) for percent in healthy]), 0)
    assert tuple(state.healthy_load) == pytest.approx(loads, abs=1)  # the documentation rounds
    assert sum(state.healthy_load) == 100


def test_rounding_goes_to_the_first_priority():
    state = priority_state(host_sets([(20, 0, 80, 0), (20, 0, 80, 0), (10, 0, 90, 0)]), 0)
    assert (state.healthy_load, state.degraded_load) == ([40, 40, 20], [0, 0, 0])
    state = priority_state(host_sets([(1, 1, 8, 0), (1, 0, 9, 0)]), 0)
    assert sum(state.healthy_load) + sum(state.degraded_load) == 100
    assert state.healthy_load[0] > state.healthy_load[1]


@pytest.mark.parametrize(
    ("healthy", "panic"),
    [
        ((72, 72), (False, False)),
        ((5, 65), (True, False)),
        ((1, 100), (False, False)),
        ((51, 20), (False, True)),
        ((25, 25), (True, True)),
        ((0, 0), (True, True)),
    ],
)
def test_panic_table(healthy, panic):
    assert tuple(priority_state(host_sets([(percent, 0, 100 - percent, 0) for percent in healthy]), 50).panic) == panic


def test_degraded_hosts_take_what_healthy_ones_leave():
    state = priority_state(host_sets([(1, 1, 2, 0)]), 0)
    assert (state.healthy_load, state.degraded_load) == ([50], [50])
    state = priority_state(host_sets([(50, 50, 0, 0)]), 50)
    assert (state.healthy_load, state.degraded_load) == ([70], [30])


def test_excluded_hosts_do_not_count():
    state = priority_state(host_sets([(2, 0, 0, 8)]), 50)
    assert (state.healthy_load, state.panic) == ([100], [False])


def test_total_panic_follows_the_number_of_hosts():
    state = priority_state(host_sets([(0, 0, 3, 0), (0, 0, 6, 0)]), 50)
    assert (state.healthy_load, state.panic) == ([34, 66], [True, True])


@given(shape)
def test_choose_is_the_running_sum(shapes):
    state = priority_state(host_sets(shapes), 50)
    counts = Counter(choose(point, state.healthy_load, state.degraded_load) for point in range(1, 101))
    if sum(state.healthy_load) + sum(state.degraded_load) == 100:
        for degraded, loads in ((False, state.healthy_load), (True, state.degraded_load)):
            for priority, load in enumerate(loads):
                assert counts[priority, degraded] == load


# -- consistent hashing


def slow_ring(cluster: Cluster, size: int) -> list[tuple[int, str]]:
    """All points of equal weights."""
    count = len(cluster.hosts)
    each = -(-size // count)
    return sorted((xxh64_intdigest(f"{host.address.text}_{point}".encode()), host.address.text) for host in cluster.hosts for point in range(each))


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(1, 200), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
def test_ring_is_the_next_point(count: int, size: int, hashes: list[int]):
    cluster = up.cluster(up.static(up.group(*up.addresses(count)), lb_policy="RING_HASH", ring_hash_lb_config={"minimum_ring_size": size}))
    ring = slow_ring(cluster, size)
    for value in [*hashes, ring[0][0], ring[-1][0], ring[-1][0] + 1, 0]:
        expected = next((owner for point, owner in ring if point >= value), ring[0][1])
        assert cluster.pick(LbContext(value)).address.text == expected


@settings(max_examples=10)
@given(st.integers(2, 20), st.integers(0, 2**64 - 1))
def test_a_lost_host_moves_only_its_own_keys(count: int, seed: int):
    def ring(many: int) -> Cluster:
        return up.cluster(up.static(up.group(*up.addresses(many)), lb_policy="RING_HASH", ring_hash_lb_config={"minimum_ring_size": 60 * many}))

    before, after = ring(count), ring(count - 1)
    lost = up.addresses(count)[-1]
    for index in range(200):
        value = xxh64_intdigest(b"%d %d" % (seed, index))
        owner = before.pick(LbContext(value)).address.text
        if owner != lost:
            assert after.pick(LbContext(value)).address.text == owner


def slow_maglev(keys: list[str], size: int) -> list[str]:
    """Listing 1 of the paper."""
    keys = sorted(keys)
    place = {key: (xxh64_intdigest(key.encode()) % size, xxh64_intdigest(key.encode(), 1) % (size - 1) + 1) for key in keys}
    nexts = dict.fromkeys(keys, 0)
    entry: list[str | None] = [None] * size
    filled = 0
    while True:
        for key in keys:
            offset, skip = place[key]
            while entry[(offset + nexts[key] * skip) % size] is not None:
                nexts[key] += 1
            entry[(offset + nexts[key] * skip) % size] = key
            filled += 1
            if filled == size:
                return entry  # type: ignore[return-value]


@settings(max_examples=20)
@given(st.integers(2, 12), st.sampled_from([2, 31, 101, 251]))
def test_maglev_is_the_paper(count: int, size: int):
    addresses = up.addresses(count)
    cluster = up.cluster(up.static(up.group(*addresses), lb_policy="MAGLEV", maglev_lb_config={"table_size": size}))
    assert [cluster.pick(LbContext(value)).address.text for value in range(size)] == slow_maglev(addresses, size)


@given(st.binary(max_size=40))
def test_murmur_is_64_bits(data: bytes):
    assert 0 <= murmur_hash_2(data) < 2**64


def test_murmur_known_values():
    # From libstdc++: std::hash<std::string>.
    assert murmur_hash_2(b"") == 6142509188972423790
    assert murmur_hash_2(b"hello") == 2762169579135187400


# -- everybody


@settings(max_examples=30)
@given(st.sampled_from(["ROUND_ROBIN", "LEAST_REQUEST", "RANDOM", "RING_HASH", "MAGLEV"]), shape)
def test_only_what_may_be_picked_is_picked(policy: str, shapes):
    statuses = ("HEALTHY", "DEGRADED", "UNHEALTHY", "DRAINING")
    groups = []
    free = iter(up.addresses(200))
    for priority, counts in enumerate(shapes):
        some = [up.endpoint(next(free), health_status=status) for status, count in zip(statuses, counts, strict=True) for _ in range(count)]
        groups.append(up.group(*some, priority=priority))
    maglev = {"maglev_lb_config": {"table_size": 31}} if policy == "MAGLEV" else {}
    cluster = up.cluster(up.static(*groups, lb_policy=policy, common_lb_config={"healthy_panic_threshold": {"value": 0}}, **maglev))
    for value in range(40):
        host = cluster.pick(LbContext(xxh64_intdigest(b"%d" % value)))
        assert host is None or not host.health_flags & hosts.UNHEALTHY
        if host is None:
            hashing = policy in ("RING_HASH", "MAGLEV")
            assert hashing or not any(healthy or degraded for healthy, degraded, _, _ in shapes)
