"""What is honoured: whatever is set beyond it is found with its path; the generated document is current."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from envoy.config.bootstrap.v3.bootstrap_pb2 import Bootstrap

import meshproxy
from meshproxy.api import bootstrap, convert, honoured, messages, registry, support
from meshproxy.api.errors import INVALID, UNSUPPORTED, ConfigError
from tests.polling import PATIENCE

T = "type.googleapis.com/envoy.extensions."
ROUTER = {"name": "router", "typed_config": {"@type": f"{T}filters.http.router.v3.Router"}}
BUFFER = {"name": "buffer", "typed_config": {"@type": f"{T}filters.http.buffer.v3.Buffer", "max_request_bytes": 5}}
LUA = {"name": "lua", "typed_config": {"@type": f"{T}filters.http.lua.v3.Lua"}}
CHAIN = "static_resources.listeners[0].filter_chains[0]"
MANAGER = f"{CHAIN}.filters[0].typed_config"


def config(http_filters=(ROUTER,), chain=None, manager=None, route=None, **fields):
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": "c"}, **(route or {})}]
    typed_config = {
        "@type": f"{T}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "x",
        "http_filters": list(http_filters),
        "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}]},
        **(manager or {}),
    }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    listener = {"name": "l", "address": address, "filter_chains": [{"filters": [{"name": "hcm", "typed_config": typed_config}], **(chain or {})}]}
    cluster = {"name": "c", "type": "STATIC", "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}, **fields}


def check(value, unsupported="reject"):
    return support.check(convert.to_message(value, Bootstrap), unsupported)


def test_plain_configuration_is_honoured():
    assert check(config([BUFFER, ROUTER], node={"id": "a", "cluster": "b", "locality": {"zone": "z"}, "metadata": {"x": 1}})) == ([], [])


@pytest.mark.parametrize(
    ("value", "path", "why", "kind"),
    [
        (config(watchdogs={}), "watchdogs", "is not supported", UNSUPPORTED),
        (config(overload_manager={"resource_monitors": [{"name": "x"}]}), "overload_manager", "is not supported", UNSUPPORTED),
        (config(manager={"path_normalization_options": {}}), f"{MANAGER}.path_normalization_options", "is not supported", UNSUPPORTED),
        (
            config([LUA, ROUTER]),
            f"{MANAGER}.http_filters[0].typed_config",
            "envoy.extensions.filters.http.lua.v3.Lua is not supported as http filter",
            UNSUPPORTED,
        ),
        (
            config([{"name": "x", "typed_config": {"@type": f"{T}filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "x", "cluster": "c"}}]),
            f"{MANAGER}.http_filters[0].typed_config",
            "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy cannot be used as http filter",
            INVALID,
        ),
        (
            config(chain={"transport_socket": {"name": "t", "typed_config": {"@type": f"{T}transport_sockets.tls.v3.UpstreamTlsContext"}}}),
            f"{CHAIN}.transport_socket.typed_config",
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext cannot be used as downstream transport socket",
            INVALID,
        ),
        (
            config(route={"typed_per_filter_config": {"lua": {"@type": f"{T}filters.http.lua.v3.LuaPerRoute", "disabled": True}}}),
            f'{MANAGER}.route_config.virtual_hosts[0].routes[0].typed_per_filter_config["lua"]',
            "envoy.extensions.filters.http.lua.v3.LuaPerRoute is not supported as per-route filter configuration",
            UNSUPPORTED,
        ),
        (
            config(manager={"access_log": [{"name": "x", "typed_config": {"@type": f"{T}access_loggers.grpc.v3.HttpGrpcAccessLogConfig", "common_config": {
                "log_name": "x", "grpc_service": {"envoy_grpc": {"cluster_name": "c"}}}}}]}),
            f"{MANAGER}.access_log[0].typed_config",
            "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig is not supported as access logger",
            UNSUPPORTED,
        ),
    ],
)  # fmt: skip
def test_one_problem(value, path, why, kind):
    (problem,), warnings = check(value)
    assert (problem.path, problem.why, problem.kind, warnings) == (path, why, kind, [])


def test_warnings_instead():
    problems, warnings = check(config([LUA, ROUTER], watchdogs={}), "warn")
    assert problems == []
    assert [problem.path for problem in warnings] == [f"{MANAGER}.http_filters[0].typed_config", "watchdogs"]
    problems, _ = check(config(manager={"stat_prefix": ""}), "warn")
    assert [str(problem) for problem in problems] == [f"{MANAGER}.stat_prefix: must not be empty"]


def test_what_is_unsupported_must_still_be_valid():
    problems, _ = check(config(overload_manager={"resource_monitors": [{"name": ""}]}))
    assert [(problem.path, problem.kind) for problem in problems] == [
        ("overload_manager", UNSUPPORTED),
        ("overload_manager.resource_monitors[0].name", INVALID),
    ]


NO_SUCH = {"name": "none", "typed_config": {"@type": "type.googleapis.com/xds.type.v3.TypedStruct", "type_url": "type.googleapis.com/no.such.Filter"}}


def test_optional_filters_may_be_unknown():
    assert check(config([{**LUA, "is_optional": True}, ROUTER])) == ([], [])
    assert check(config([{**NO_SUCH, "is_optional": True}, ROUTER])) == ([], [])
    unknown = ["unknown type 'type.googleapis.com/no.such.Filter'"]
    assert [problem.why for problem in check(config([NO_SUCH, ROUTER]))[0]] == unknown
    # What comes behind an optional filter is not optional.
    assert [problem.why for problem in check(config([{**ROUTER, "is_optional": True}], manager={"access_log": [NO_SUCH]}))[0]] == unknown


def test_validate_reports_everything(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(config([ROUTER, BUFFER], manager={"path_normalization_options": {}})))
    with pytest.raises(ConfigError) as caught:
        bootstrap.validate(str(file))
    assert [problem.path for problem in caught.value.problems] == [f"{MANAGER}.path_normalization_options"]
    with pytest.raises(ConfigError) as caught:
        bootstrap.validate(str(file), unsupported="warn")
    assert [problem.path for problem in caught.value.problems] == [f"{MANAGER}.http_filters[0]", f"{MANAGER}.http_filters[1]"]


def test_no_declaration_is_out_of_reach():
    """Whatever declares HONOURS is loaded by a core module or by an extension, and names fields that exist."""
    for module in support.all_modules():
        importlib.import_module(module)
    reached = {name for name, module in list(sys.modules.items()) if hasattr(module, "HONOURS")}
    for info in pkgutil.walk_packages(meshproxy.__path__, "meshproxy."):
        if not info.name.endswith("__main__"):
            assert not hasattr(importlib.import_module(info.name), "HONOURS") or info.name in reached, info.name
    for name, fields in support.Support().declared().items():
        assert fields <= set(messages.descriptor(name).fields_by_name), name


def test_what_is_honoured_has_honoured_contents():
    """A field that is honoured while nobody declares the message in it would reject everything set there."""
    for module in support.all_modules():
        importlib.import_module(module)
    declared = support.Support().declared()
    for name, fields in declared.items():
        for field in (messages.descriptor(name).fields_by_name[field] for field in fields):
            inner = field.message_type
            if inner is not None and inner.GetOptions().map_entry:
                inner = inner.fields_by_name["value"].message_type
            assert inner is None or inner.full_name.startswith("google.protobuf.") or inner.full_name in declared, f"{name}.{field.name}"


def test_kinds_of_fields_exist():
    for path, kind in honoured.KIND_OF_FIELD.items():
        message, _, field = path.rpartition(".")
        assert field in messages.descriptor(message).fields_by_name
        assert kind in registry.KINDS
    assert set(honoured.KIND_OF_FIELD.values()) == set(registry.KINDS)


def test_document_is_current():
    text = Path(__file__).parents[2].joinpath("docs", "api-support.md").read_text()
    assert text == support.render(), "run: python -m meshproxy.api.support > docs/api-support.md"


# Prints for each module of the arguments what is declared when it is the only extension. Run apart, because here everything is loaded.
DECLARED_ALONE = """
import importlib, json, os, sys
from meshproxy.api import support
for module in support.CORE_MODULES:
    importlib.import_module(module)
for module in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(module)
        print(json.dumps([module, {name: sorted(fields) for name, fields in support.Support().declared().items()}]), flush=True)
        os._exit(0)
    os.wait()
"""


def reachable(roots, declared):
    """The messages below `roots` that honoured fields lead to without an Any."""
    found, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or name.startswith("google.protobuf."):
            continue
        found.add(name)
        for field in map(messages.descriptor(name).fields_by_name.get, declared[name]):
            inner = field.message_type
            if inner is not None and inner.GetOptions().map_entry:
                inner = inner.fields_by_name["value"].message_type
            waiting += [] if inner is None else [inner.full_name]
    return found


def test_what_is_honoured_does_not_depend_on_the_rest_of_the_configuration():
    """A module is loaded when a configuration names it: what can be set in its messages must be declared then, without the help of another extension."""
    for module in support.all_modules():
        importlib.import_module(module)
    everything = support.Support().declared()
    roots = {"meshproxy.api.support": {"envoy.config.bootstrap.v3.Bootstrap"}}
    for table in registry.KINDS.values():
        for message, module in table.items():
            roots.setdefault(module, set()).add(message)
    output = subprocess.run([sys.executable, "-c", DECLARED_ALONE, *roots], capture_output=True, check=True, timeout=PATIENCE).stdout
    alone = dict(json.loads(line) for line in output.splitlines())
    assert set(alone) == set(roots)
    for module, own in roots.items():
        for message in reachable(own, everything):
            assert everything[message] == set(alone[module].get(message, ())), f"{message} when only {module} is loaded"
