"""Fields of load balancing that few set: options of the policies, zones, what retries leave out, and metadata that no subset is made for."""

from __future__ import annotations

import re
from typing import Any

from tests.differential.harness import Case, Close, Echo, Play, Request, Rig, answer, bootstrap, check_cases, cluster, endpoint, filter_, get, http, listener

NAMES = "abcd"
UPSTREAMS: dict[str, Any] = {name: [Request(), answer(x_who=name)] for name in NAMES}
_LB = "envoy.extensions.load_balancing_policies"


def labelled(upstream: str, **labels: Any) -> dict:
    return endpoint(upstream, metadata={"filter_metadata": {"envoy.lb": labels}})


def metadata(**labels: Any) -> dict:
    return {"filter_metadata": {"envoy.lb": labels}}


def vhost(name: str, to: str | None = None, **route: Any) -> dict:
    target = {} if "weighted_clusters" in route else {"cluster": to or name}
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": target | route}]}


def zone(name: str, *hosts: Any, priority: int = 0, weight: int = 0) -> dict:
    """A locality."""
    weighted = {"load_balancing_weight": weight} if weight else {}
    hosts_of = [endpoint(host) if isinstance(host, str) else host for host in hosts]
    return {"locality": {"region": "r1", "zone": name}, "priority": priority, "lb_endpoints": hosts_of, **weighted}


def policy(kind: str, **fields: Any) -> dict:
    """`load_balancing_policy` with one policy, by the last part of its package and its name."""
    package, _, message = kind.partition(".")
    return {
        "load_balancing_policy": {"policies": [{"typed_extension_config": {"name": kind, "typed_config": {"@": f"{_LB}.{package}.v3.{message}", **fields}}}]}
    }


def retry(predicate: dict | None = None, **fields: Any) -> dict:
    """A retry policy that tries often at once."""
    found = {"retry_on": "5xx", "num_retries": 1, "retry_back_off": {"base_interval": "0.001s"}, "host_selection_retry_max_attempts": 30, **fields}
    return {"retry_policy": found | ({"retry_host_predicate": [{"name": "p", "typed_config": predicate}]} if predicate else {})}


SLOW = {"slow_start_config": {"slow_start_window": "60s", "aggression": {"default_value": 2, "runtime_key": "aggression"}, "min_weight_percent": {"value": 20}}}
WEIGHTED_LOCALITIES = {"locality_lb_config": {"locality_weighted_lb_config": {}}}
ZONES = [zone("z1", "a", "b"), zone("z2", "c", "d")]
ONE_EMPTY = [zone("z1", "a", "b", weight=1), zone("z2", "c", weight=0), zone("z3", "d", weight=1)]


def zone_aware(**fields: Any) -> dict:
    return {"locality_lb_config": {"zone_aware_lb_config": {"min_cluster_size": 2, **fields}}}


PRIORITIES = {"retry_priority": {"name": "p", "typed_config": {
    "@": "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig", "update_frequency": 1}}}  # fmt: skip
BY_LABELS = [labelled("a", version="1", stage="prod"), labelled("b", version="2", stage="prod"), labelled("c", version="2", stage="test"), labelled("d")]


def weights(*clusters: dict) -> dict:
    return {"weighted_clusters": {"clusters": [{"name": "subsets", "weight": 1, **one} for one in clusters]}}


V1, V2_TEST = metadata(version="1"), metadata(version="2", stage="test")
SPREAD = {
    "full_scan": policy("least_request.LeastRequest", selection_method="FULL_SCAN"),
    "choices": policy("least_request.LeastRequest", choice_count=4, active_request_bias={"default_value": 0.5, "runtime_key": "bias"}, **SLOW),
    "least_zones": policy("least_request.LeastRequest", **zone_aware(routing_enabled={"value": 100})),
    "random_zones": policy("random.Random", **zone_aware(routing_enabled={"value": 100})),
    "zones_off": policy("round_robin.RoundRobin", **zone_aware(routing_enabled={"value": 0})),
    "zones_small": policy("round_robin.RoundRobin", **zone_aware(min_cluster_size=9)),
    "zones_forced": policy("random.Random", **zone_aware(force_local_zone={"min_size": 1})),
    "zones_forced_small": policy("random.Random", **zone_aware(force_local_zone={"min_size": 3})),
    "zones_direct": policy("round_robin.RoundRobin", **zone_aware(force_locality_direct_routing=True)),
    "slow": policy("round_robin.RoundRobin", **SLOW),
    "slow_old": {"round_robin_lb_config": SLOW},
    "least_old": {"lb_policy": "LEAST_REQUEST", "least_request_lb_config": {"choice_count": 3, **SLOW}},
    "bounded_ring": policy("ring_hash.RingHash", consistent_hashing_lb_config={"hash_balance_factor": 150}),
    "bounded_old": {"lb_policy": "MAGLEV", "common_lb_config": {"consistent_hashing_lb_config": {"hash_balance_factor": 120}}},
}
IN_ZONES = {
    "round_robin_localities": policy("round_robin.RoundRobin", **WEIGHTED_LOCALITIES),
    "least_localities": policy("least_request.LeastRequest", **WEIGHTED_LOCALITIES),
    "random_localities": policy("random.Random", **WEIGHTED_LOCALITIES),
}


def tcp(name: str, **fields: Any) -> dict:
    return listener(name, filter_("tcp_proxy", stat_prefix=name, **({} if "weighted_clusters" in fields else {"cluster": "subsets"}), **fields))


def assignment(name: str, localities: list[dict], **fields: Any) -> dict:
    """A cluster whose assignment has a policy."""
    made = cluster(name, localities=localities, lb_policy="RANDOM")
    made["load_assignment"]["policy"] = fields
    return made


SICK = {"health_status": "UNHEALTHY"}
HALF_SICK = [zone("z1", "a", endpoint("b", **SICK), weight=0), zone("z2", "c", priority=1)]
CONFIG = bootstrap(
    http("main", [
        vhost("one_label", "subsets", metadata_match=V1), vhost("two_labels", "subsets", metadata_match=V2_TEST),
        vhost("no_label", "subsets"), vhost("other_label", "subsets", metadata_match=metadata(version="9")),
        vhost("weighted", **weights({"metadata_match": V1})),
        vhost("weighted_both", metadata_match=metadata(stage="test", version="1"), **weights({"metadata_match": metadata(version="2")})),
        *(vhost(name, hash_policy=[{"header": {"header_name": "x-user"}}]) for name in (*SPREAD, *IN_ZONES)),
        vhost("omit", "omitting", **retry({"@": "omit_metadata", "metadata_match": metadata(avoid=True)})),
        vhost("priorities", **retry(num_retries=2, **PRIORITIES)),
        vhost("weighted_health"), vhost("unweighted_health"),
    ]),
    tcp("tcp_label", metadata_match=V2_TEST),
    tcp("tcp_weighted", weighted_clusters={"clusters": [{"name": "subsets", "weight": 1, "metadata_match": V1}]}),
    clusters=[
        cluster("subsets", *BY_LABELS),
        *(cluster(name, localities=ZONES, **fields) for name, fields in SPREAD.items()),
        *(cluster(name, localities=ONE_EMPTY, **fields) for name, fields in IN_ZONES.items()),
        cluster("local", localities=[zone("z1", endpoint("a")), zone("z2", endpoint("b"))]),
        cluster("omitting", labelled("a", avoid=True), "b"),
        cluster("priorities", localities=[zone("z1", "a"), zone("z2", "b", priority=1), zone("z3", "c", priority=2)]),
        assignment("weighted_health", HALF_SICK, weighted_priority_health=True, overprovisioning_factor=100),
        assignment("unweighted_health", HALF_SICK, overprovisioning_factor=1000),
    ],
    cluster_manager={"local_cluster_name": "local"},
)  # fmt: skip


def who(response: str) -> str:
    return response.partition("x-who: ")[2][:1] or response[9:12]


def hosts(name: str, count: int = 80) -> Case:
    """Who answers at all; and whether the cluster was found too small for zones, which Envoy counts whenever it looks, and we when it is first used."""

    async def run(rig: Rig) -> Any:
        wire = await rig.connect()
        seen = {who(await rig.exchange(wire, get("/", f"X-User: {n}", host=f"{name}.test"))) for n in range(count)}
        _, small = await rig.proxy.admin("GET", f"/stats?filter=cluster[.]{name}[.]lb_zone_(cluster_too_small|no_capacity_left|routing_all_directly)")
        if name in IN_ZONES:  # Envoy counts it of clusters whose localities have weights, too, where zones play no part; we do not
            return "".join(sorted(seen))
        return ["".join(sorted(seen)), re.sub(r"\b[1-9]\d*\b", "some", small)]

    return Case(f"hosts_{name}", run, UPSTREAMS, skip=("upstream", "log"), skip_stats=("upstream_cx_", "lb_recalculate", "lb_zone_", "zone."))


def tried(name: str, fail: str) -> Case:
    """Each of several requests, which fails at some hosts, and is tried anew."""
    ups = {up: [Request(), answer("503 No" if up in fail else "200 OK", x_who=up)] for up in NAMES}

    async def run(rig: Rig) -> str:
        wire = await rig.connect()
        return "".join(sorted({who(await rig.exchange(wire, get(host=f"{name}.test"))) for _ in range(20)}))

    return Case(f"tried_{name}", run, ups, skip=("upstream", "log", "stats"), note="which host is first is by chance")


ECHO = Play([[Echo(), Close()]], on_connect=True)


def tcp_hosts(name: str) -> Case:
    async def run(rig: Rig) -> Any:
        for _ in range(8):
            wire = await rig.connect(name)
            wire.send(b"ping")
            await wire.until(lambda wire=wire: b"ping" in wire.buffer)
        return sorted(name for name, upstream in rig.upstreams.items() if upstream.connections)

    return Case(f"hosts_{name}", run, ECHO, skip=("upstream",))


CASES = [
    *(hosts(name) for name in ("one_label", "two_labels", "no_label", "other_label", "weighted", "weighted_both", *SPREAD, *IN_ZONES,
                               "weighted_health", "unweighted_health")),
    tried("omit", "a"), tried("priorities", "ab"),
    *(tcp_hosts(name) for name in ("tcp_label", "tcp_weighted")),
]  # fmt: skip

test_case = check_cases(CASES)
