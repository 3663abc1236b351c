"""The admin interface: texts, shapes of JSON answers, errors, and the names of the stats."""

import json
import re
from typing import Any

from tests.differential.harness import (
    Case,
    Rig,
    bootstrap,
    check_cases,
    cluster,
    endpoint,
    filter_,
    get,
    http,
    listener,
    to,
)
from tests.differential.proxy import dechunk

CONFIG = bootstrap(
    http("main", to("a")),
    listener("tcp", filter_("tcp_proxy", stat_prefix="tcp", cluster="a")),
    listener("tls", chains=[{
        "filters": [filter_("tcp_proxy", stat_prefix="tls", cluster="a")],
        "transport_socket": {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": {
            "tls_certificates": [{"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}],
            "validation_context": {"trusted_ca": {"filename": "${pem:ca}"}}}}},
    }]),
    clusters=[
        cluster("a", endpoint("a", hostname="host-a", load_balancing_weight=3, metadata={"filter_metadata": {"envoy.lb": {"canary": True}}}),
                circuit_breakers={"thresholds": [{"max_connections": 7, "max_retries": 9}, {"priority": "HIGH", "max_requests": 5}]}),
        cluster("local", localities=[{"locality": {"region": "r", "zone": "z", "sub_zone": "s"}, "priority": 0, "lb_endpoints": [endpoint("b")]},
                                     {"priority": 1, "lb_endpoints": [endpoint("c", health_status="UNHEALTHY")]}],
                alt_stat_name="other_name", outlier_detection={"success_rate_minimum_hosts": 1}),
    ],
    stats_flush_interval="0.2s",
    layered_runtime={"layers": [{"name": "static", "static_layer": {"some.key": 1, "nested": {"key": "text"}, "on": True, "share": 0.5}},
                                {"name": "admin", "admin_layer": {}}]},
)  # fmt: skip


def asking(name: str, path: str, method: str = "GET", *, as_shape: bool = False, lines: str = "", only: str = "", **fields: Any) -> Case:
    """One admin request. `as_shape` compares the keys of the JSON answer instead of its values; `lines`: only lines that match."""

    async def run(rig: Rig) -> Any:
        await rig.get(get("/"))
        raw = await rig.proxy.admin_raw(f"{method} {path} HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\n\r\n".encode(), method)
        head, _, body = raw.partition(b"\r\n\r\n")
        status, body_text = head.partition(b"\r\n")[0].decode(), _body(rig, head, body)
        if as_shape:
            parsed = json.loads(body_text)
            shape = sorted(path for path in shape_of(parsed[only] if only else parsed) if not _ENVOYS_OWN.search(path))
            return {"status": status, "type": _content_type(head), "shape": shape}
        if "json" in _content_type(head):  # Envoy writes maps in any order
            body_text = json.dumps(json.loads(body_text), indent=1, sort_keys=True)
        if lines:
            body_text = "\n".join(sorted(line for line in body_text.splitlines() if re.search(lines, line)))
        return {"status": status, "type": _content_type(head), "body": body_text}

    return Case(f"admin_{name}", run, skip=("log", "stats", "upstream"), **fields)


# What only Envoy can say: which extensions it was built with, from which sources, and settings that have no meaning for us.
_ENVOYS_OWN = re.compile(r"node\.extensions|user_agent_build_version|hot_restart_initializing|log_stacktrace_single_entry|file_flush_min_size")


def _content_type(head: bytes) -> str:
    found = re.search(rb"(?i)content-type: ([^\r]*)", head)
    return found[1].decode() if found else "-"


def _body(rig: Rig, head: bytes, body: bytes) -> str:
    content = dechunk(body) if b"transfer-encoding: chunked" in head.lower() else body
    return rig.normaliser.bytes(content)


def shape_of(value: Any, path: str = "") -> set[str]:
    """The paths of all keys of a JSON value; elements of lists share a path."""
    if isinstance(value, dict):
        return {path} | {found for key, item in value.items() for found in shape_of(item, f"{path}.{key}")}
    if isinstance(value, list):
        return {path} | {found for item in value for found in shape_of(item, f"{path}[]")}
    kind = "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    return {f"{path}: {kind}"}


def stats_names(name: str, pattern: str) -> Case:
    """The names of all stats that match, used or not. Ours may have more."""

    async def run(rig: Rig) -> Any:
        await rig.get(get("/"))
        _, text = await rig.proxy.admin("GET", f"/stats?filter={pattern}")
        return sorted(line.partition(": ")[0] for line in text.splitlines() if not re.search(r"workers?_restart", line))

    return Case(f"stats_{name}", run, skip=("log", "stats", "upstream"))


def histograms() -> Case:
    """A histogram that nothing was ever recorded in, and the form of one that was. Values are shown once an interval is over."""

    async def run(rig: Rig) -> Any:
        await rig.get(get("/"))
        text = ""
        while not re.search(r"cluster.a.upstream_rq_time: P", text):
            _, text = await rig.proxy.admin("GET", "/stats?type=Histograms&filter=cluster.(a|other_name).upstream_(cx_connect_ms|rq_time|cx_length_ms)")
        return re.sub(r"\d+(\.\d+)?|nan", "N", text)

    return Case("stats_histograms", run, skip=("log", "stats", "upstream"))


def prometheus() -> Case:
    """Names and labels of the Prometheus form, for counters and histograms that were used.

    A gauge that is back at zero we no longer call used; how many connections one event brought, the event loop does not tell us.
    """

    async def run(rig: Rig) -> Any:
        await rig.get(get("/"))
        text = ""
        while "upstream_rq_time_bucket" not in text:
            _, text = await rig.proxy.admin("GET", "/stats/prometheus?usedonly&filter=^(cluster|http.main|listener.main)")
        gauges = re.findall(r"# TYPE (\w+) gauge", text)
        lines = [re.sub(r" [-+.\dnaife]+$", " N", line) for line in text.splitlines()]
        return [
            line
            for line in lines
            if not re.search(r"_bytes|_time|_ms|length|worker|per_socket_event", line) and not re.search(rf"\b({'|'.join(gauges)})\b", line)
        ]

    return Case("stats_prometheus", run, skip=("log", "stats", "upstream"))


async def counters_reset(rig: Rig) -> Any:
    await rig.get(get("/"))
    answer = await rig.proxy.admin("POST", "/reset_counters")
    _, text = await rig.proxy.admin("GET", "/stats?filter=^http.main.downstream_rq_total$")
    return [answer, text]


async def log_levels(rig: Rig) -> Any:
    return [
        await rig.proxy.admin("POST", "/logging?level=warning"),
        await rig.proxy.admin("POST", "/logging?nonsense=info"),
        await rig.proxy.admin("POST", "/logging?level=loud"),
        await rig.proxy.admin("POST", "/logging?level=error"),
    ]


async def draining(rig: Rig) -> Any:
    """Failing the health check says so in /server_info and makes connections close; then it is taken back."""

    async def state() -> Any:
        return json.loads((await rig.proxy.admin("GET", "/server_info"))[1])["state"], (await rig.proxy.admin("GET", "/ready"))

    return [await state(), await rig.proxy.admin("POST", "/healthcheck/fail"), await state(), await rig.get(get("/")),
            await rig.proxy.admin("POST", "/healthcheck/ok"), await state()]  # fmt: skip


CASES = [
    asking("ready", "/ready"),
    asking("server_info", "/server_info", as_shape=True),
    asking("listeners", "/listeners"),
    asking("listeners_json", "/listeners?format=json", as_shape=True),
    asking("clusters", "/clusters", lines=r"::"),
    asking("clusters_json", "/clusters?format=json", as_shape=True),
    asking("certs", "/certs", as_shape=True),
    asking("memory", "/memory", as_shape=True),
    asking("runtime", "/runtime", as_shape=True),
    asking("runtime_values", "/runtime"),
    asking("config_dump", "/config_dump", as_shape=True),
    asking("config_dump_of_clusters", "/config_dump?resource=static_clusters", as_shape=True),
    asking("config_dump_of_routes", "/config_dump?resource=static_route_configs", as_shape=True),
    asking("config_dump_unknown", "/config_dump?resource=nonsense"),
    asking("config_dump_masked", "/config_dump?mask=bootstrap.node.id"),
    asking("config_dump_by_name", "/config_dump?name_regex=.*local.*", as_shape=True),
    asking("config_dump_eds", "/config_dump?include_eds", as_shape=True),
    asking("stats_one", "/stats?filter=^http.main.downstream_rq_2xx$"),
    asking("stats_two", "/stats?filter=^cluster.a.membership_(total|healthy)$"),
    asking("stats_bad_filter", "/stats?filter=("),
    asking("stats_bad_format", "/stats?format=nonsense"),
    asking("stats_bad_type", "/stats?type=nonsense"),
    asking("stats_json", "/stats?format=json&filter=^cluster.a.membership"),
    asking("stats_counters_only", "/stats?type=Counters&filter=^cluster.a.(membership|update)"),
    asking("stats_gauges_only", "/stats?type=Gauges&filter=^cluster.a.(membership|update)"),
    asking("stats_nothing", "/stats?filter=^no.such.stat$"),
    asking(
        "help", "/help", lines=r"^  /(certs|clusters|config_dump|help|listeners|logging|ready|runtime|server_info|stats|memory|quitquitquit|reset_counters)"
    ),
    asking("unknown", "/nonsense", lines=r"^(invalid path|admin commands)"),
    asking("unknown_post", "/nonsense", "POST", lines=r"^(invalid path|admin commands)"),
    asking("get_for_post_quit", "/quitquitquit"),
    asking("get_for_post_logging", "/logging"),
    asking("get_for_post_fail", "/healthcheck/fail"),
    asking("post_for_get_ready", "/ready", "POST"),
    asking("put", "/ready", "PUT"),
    asking("healthcheck_ok", "/healthcheck/ok", "POST"),
    asking("reopen_logs", "/reopen_logs", "POST"),
    asking("logging_post", "/logging", "POST", lines=r"^active loggers|^  (http|router|upstream|connection|admin|main|config): "),
    asking("hot_restart_version", "/hot_restart_version", lines=r"^disabled"),
    stats_names("http", "^http.main"),
    stats_names("listener", "^listener.main"),
    stats_names("tls_listener", "^listener.tls"),
    stats_names("cluster", "^cluster.a[.]"),
    stats_names("cluster_with_alias", "^cluster.other_name"),
    stats_names("tcp", "^tcp"),
    stats_names("server", "^server"),
    stats_names("cluster_manager", "^cluster_manager"),
    stats_names("listener_manager", "^listener_manager"),
    stats_names("runtime", "^runtime"),
    stats_names("filesystem", "^filesystem"),
    histograms(),
    prometheus(),
    Case("reset_counters", counters_reset, skip=("log", "stats", "upstream")),
    Case("log_levels", log_levels, skip=("log", "stats", "upstream")),
    Case("healthcheck_fail_and_ok", draining, skip=("log", "stats", "upstream")),
]

test_case = check_cases(CASES)
