"""Bad input at the start: one clear message each, exit status 1, nothing listening."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from tests.e2e.proxy import ADMIN, HELLO, PATIENCE, ROOT, Proxy, listener, refused

pytestmark = pytest.mark.slow


def run(*arguments, config=None, folder=None):
    """Exit status, standard output and standard error of a run that ends by itself."""
    if config is not None:
        path = folder / "config.yaml"
        path.write_text(config)
        arguments = ("-c", str(path), *arguments)
    done = subprocess.run([sys.executable, "-m", "meshproxy", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    return done.returncode, done.stdout, done.stderr


def test_validate_says_ok(tmp_path):
    status, out, err = run("--mode", "validate", config=ADMIN, folder=tmp_path)
    assert (status, out, err) == (0, f"configuration '{tmp_path / 'config.yaml'}' OK\n", "")


def test_every_problem_is_reported_at_once_with_its_path(tmp_path):
    config = """
static_resources:
  clusters:
  - {name: a, connect_timeout: -1s}
  - {name: "", connect_timeout: 1s}
  - {name: b, type: MAGIC}
  listeners:
  - {name: l, address: {socket_address: {address: 127.0.0.1, port_value: 99999}}}
"""
    status, _, err = run("--mode", "validate", config=config, folder=tmp_path)
    assert status == 1
    lines = err.splitlines()
    assert lines[0] == f"error initializing configuration '{tmp_path / 'config.yaml'}':"
    assert any(line.startswith("static_resources.clusters[2].type: ") for line in lines)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["-c", "/no/such/file.yaml"], "cannot read /no/such/file.yaml: No such file or directory"),
        ([], "no configuration: give a file (-c) or text (--config-yaml)"),
        (["--config-yaml", "{"], "1"),
        (["--config-yaml", "nonsense: 1"], "nonsense: "),
        (["--config-yaml", "{}", "-l", "bogus"], "invalid log level specified 'bogus'"),
        (["--config-yaml", "{}", "--component-log-level", "foo:debug"], "invalid component specified 'foo'"),
        (["--config-yaml", "{}", "--log-path", "/no/such/dir/x.log"], "cannot open log file '/no/such/dir/x.log': No such file or directory"),
    ],
)
def test_one_clear_message(flags, why):
    status, out, err = run(*flags)
    assert status == 1
    assert out == ""
    assert why in err
    assert "Traceback" not in err


def test_a_port_in_use_is_named_and_nothing_listens(tmp_path):
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        port, other = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        config = ADMIN + "static_resources:\n  listeners:" + listener(other, HELLO, name="fine") + listener(port, HELLO, name="taken")
        status, _, err = run(config=config, folder=tmp_path)
        assert status == 1
        assert f"static_resources.listeners[1].address: cannot bind '127.0.0.1:{port}': Address already in use" in err
        assert refused(other)


def test_an_admin_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = run(config=ADMIN.replace("port_value: 0", f"port_value: {port}"), folder=tmp_path)
    assert status == 1
    assert f"admin.address: cannot bind '127.0.0.1:{port}': Address already in use" in err


def test_a_missing_cluster_is_named(tmp_path):
    config = "static_resources:\n  listeners:" + listener(0, "{match: {prefix: /}, route: {cluster: nowhere}}")
    status, _, err = run(config=config, folder=tmp_path)
    assert status == 1
    assert "routes[0].route.cluster" in err
    assert "nowhere" in err


def test_unsupported_fields_are_errors_or_warnings(tmp_path):
    config = ADMIN + "static_resources:\n  clusters:\n  - {name: a, connect_timeout: 1s, track_cluster_stats: {timeout_budgets: true}}\n"
    status, _, err = run("--mode", "validate", config=config, folder=tmp_path)
    assert status == 1
    assert "static_resources.clusters[0].track_cluster_stats" in err
    status, out, err = run("--mode", "validate", "--unsupported", "warn", config=config, folder=tmp_path)
    assert status == 0
    assert "OK" in out
    assert "warning" in err
    assert "static_resources.clusters[0].track_cluster_stats" in err


def test_inline_yaml_is_merged_over_the_file(tmp_path):
    with Proxy(tmp_path, ADMIN, "--config-yaml", "{node: {id: inline}}", "--service-cluster", "flag", "--concurrency", "1") as proxy:
        info = proxy.admin("GET", "/server_info")[1]
        assert '"id": "inline"' in info
        assert '"cluster": "flag"' in info


def test_what_is_unknown_or_deprecated_is_said_and_counted(tmp_path):
    config = "typo: 1\n" + ADMIN.replace("admin: {", "admin: {access_log_path: /dev/null, ")
    flags = ("--concurrency", "1", "--allow-unknown-static-fields", "--stats-tag", "team:a", "--stats-tag", "zone:b")
    with Proxy(tmp_path, config, *flags) as proxy:
        assert "unknown field: typo: envoy.config.bootstrap.v3.Bootstrap has no such field" in proxy.stderr
        assert "deprecated field: admin.access_log_path" in proxy.stderr
        assert proxy.stat("server.static_unknown_fields") == 1
        assert proxy.stat("runtime.deprecated_feature_use") == 1
        assert proxy.stat("runtime.deprecated_feature_seen_since_process_start") == 1
        assert 'envoy_server_live{team="a",zone="b"} 1' in proxy.admin("GET", "/stats/prometheus")[1]
        assert json.loads(proxy.admin("GET", "/server_info")[1])["command_line_options"]["stats_tag"] == ["team:a", "zone:b"]
    with Proxy(tmp_path, config, "--concurrency", "1", "--allow-unknown-fields", "--skip-deprecated-logs") as proxy:
        assert "unknown field: typo" in proxy.stderr
        assert "deprecated" not in proxy.stderr
        assert proxy.stat("runtime.deprecated_feature_use") == 1


def test_mistakes_in_a_large_configuration_are_all_reported(tmp_path):
    """It is converted while main still imports, and compiled while it is still being checked."""

    def one(index, address, name="ok"):
        endpoints = [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": address, "port_value": 80}}}}]}]
        return {"name": f"cluster-{index}", "connect_timeout": "1s", "load_assignment": {"cluster_name": name, "endpoints": endpoints}}

    def validate(clusters, *flags):
        status, _, err = run("--mode", "validate", *flags, config=json.dumps({"static_resources": {"clusters": clusters}}), folder=tmp_path)
        return status, err

    def problems(clusters):
        status, err = validate(clusters)
        return status, [line.partition(": ")[0] for line in err.splitlines()[1:]]

    addresses = ["127.0.0.1"] * 3000
    assert problems([one(*pair) for pair in enumerate(addresses)]) == (0, [])
    addresses[1000] = addresses[2000] = "name.test"
    clusters = [one(*pair) for pair in enumerate(addresses)]
    where = "static_resources.clusters[{}].load_assignment.endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address"
    assert problems(clusters) == (1, [where.format(1000), where.format(2000)])
    clusters[500] = one(500, "127.0.0.1", name="")
    assert problems(clusters) == (1, ["static_resources.clusters[500].load_assignment.cluster_name"])
    clusters = [one(index, "127.0.0.1") for index in range(3000)]
    clusters[500]["typo"] = 1
    assert problems(clusters) == (1, ["static_resources.clusters[500].typo"])
    status, err = validate(clusters, "--allow-unknown-static-fields")
    assert status == 0
    assert "unknown field: static_resources.clusters[500].typo: " in err
