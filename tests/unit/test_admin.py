"""The admin endpoints, as functions. tests/e2e/test_process_admin.py compares them with the real Envoy's."""

from __future__ import annotations

import inspect
import json
import marshal
import re
from html.parser import HTMLParser

import pytest
from envoy.config.bootstrap.v3 import bootstrap_pb2

from meshproxy import logs
from meshproxy.admin import endpoints
from meshproxy.admin.certs import Certificates
from meshproxy.admin.message import HTML, JSON, Request, Response, parse_query
from meshproxy.api import bootstrap as bootstraps
from meshproxy.api.runtime import Runtime
from meshproxy.channel import Kind
from meshproxy.cli import Options
from meshproxy.net.address import Address
from meshproxy.observe.stats import Store
from meshproxy.server import Listener, Server

CONFIG = """
node: {id: n1, cluster: c1}
layered_runtime: {layers: [{name: base, static_layer: {a: {b: 5}}}, {name: admin, admin_layer: {}}]}
static_resources:
  secrets:
  - {name: s1, generic_secret: {secret: {inline_string: HIDDEN}}}
  - name: t1
    tls_certificate: {certificate_chain: {inline_string: PUBLIC}, private_key: {filename: HIDDEN}, password: {inline_bytes: SElEREVO}}
  listeners:
  - name: l1
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context: {tls_certificates: [{certificate_chain: {inline_string: PUBLIC}, private_key: {inline_string: HIDDEN}}]}
      filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: x
          route_config: {name: r1, virtual_hosts: [{name: v, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: c1}}]}]}
  clusters:
  - {name: c2, connect_timeout: 2s}
  - {name: c1, connect_timeout: 1s}
"""


class Workers:
    """Notes what it is told; answers what it was given."""

    def __init__(self):
        self.told = []
        self.answers = {}

    def broadcast(self, kind, body=b""):
        self.told.append((kind, marshal.loads(body) if body else None))

    async def gather(self, kind, body=b"", *, timeout):
        self.told.append((kind, body))
        return self.answers.get((kind, body), [])


@pytest.fixture
def server():
    bootstrap = bootstraps.parse(CONFIG)
    server = Server(
        options=Options(config_path="x.yaml", drain_time_s=30),
        bootstrap_bytes=bootstrap.SerializeToString(),
        node=bootstrap.node,
        stats=Store(),
        levels=logs.Levels("error"),
        log_handler=logs.Handler(None, "%v"),
        workers=Workers(),
        shut_down=lambda: server.workers.told.append("end"),
        runtime=Runtime.from_proto(bootstrap.layered_runtime),
        certificates=Certificates(type(bootstrap)(), b""),
        concurrency=2,
    )
    server.initialized = True
    return server


@pytest.fixture
def ask(server):
    async def ask(method, target, body=b"", content_type=""):
        answer = endpoints.handle(Request.from_target(method, target, body, content_type), server)
        return await answer if inspect.isawaitable(answer) else answer

    return ask


async def body(answer):
    return json.loads((await answer).body)


@pytest.mark.parametrize(
    ("state", "status", "text"),
    [
        ({}, 200, "LIVE\n"),
        ({"initialized": False}, 503, "INITIALIZING\n"),
        ({"health_failed": True}, 503, "DRAINING\n"),
        ({"terminating": True}, 503, "DRAINING\n"),
    ],
)
async def test_ready_says_the_state(server, ask, state, status, text):
    for name, value in state.items():
        setattr(server, name, value)
    answer = await ask("GET", "/ready")
    assert (answer.status, answer.body) == (status, text)


async def test_mutations_are_post_only(server, ask):
    for endpoint in endpoints.ENDPOINTS:
        if endpoint.mutates:
            answer = await ask("GET", endpoint.path)
            assert (answer.status, answer.body) == (405, "Method GET not allowed, POST required.")
    assert server.workers.told == []


async def test_an_unknown_path_is_answered_with_the_help(ask):
    answer = await ask("GET", "/nope<script>")
    assert answer.status == 404
    assert answer.body.startswith("invalid path. admin commands are:\n  /: Admin home page\n")
    assert "script" not in answer.body


@pytest.mark.parametrize("target", ["/ready?x=1", "//ready", "/%72eady"])
async def test_paths_are_normalised(ask, target):
    assert (await ask("GET", target)).body == "LIVE\n"


async def test_every_handler_exists(server, ask):
    for endpoint in endpoints.ENDPOINTS:
        module, _, function = endpoint.handler.partition(":")
        assert callable(getattr(__import__(f"meshproxy.admin.{module}", fromlist=[function]), function)), endpoint


def test_query_parameters_are_decoded_and_the_first_counts():
    assert parse_query("a=1&a=2&b&c=%41%20b&=x&d=e=f") == {"a": "1", "b": "", "c": "A b", "d": "e=f"}


async def test_the_index_is_html_without_script(server, ask):
    server.node.id = "<script>alert(1)</script>"
    answer = await ask("GET", "/")
    assert answer.content_type == HTML
    seen = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append(tag)

    Parser().feed(answer.body)
    assert "script" not in seen
    assert "&lt;script&gt;" in answer.body
    for endpoint in endpoints.ENDPOINTS[1:]:
        assert f"'{endpoint.path}'" in answer.body


# -- changes


async def test_health_can_be_failed_and_restored(server, ask):
    assert (await ask("POST", "/healthcheck/fail")).body == "OK\n"
    assert server.health_failed
    assert (await ask("POST", "/healthcheck/ok")).body == "OK\n"
    assert not server.health_failed
    assert server.workers.told == [(Kind.HEALTHCHECK_FAIL, True), (Kind.HEALTHCHECK_FAIL, False)]


def listeners(server):
    server.listeners += [
        Listener("in", [Address.parse("127.0.0.1:80")], inbound=True, sockets=[[], []]),
        Listener("out", [Address.parse("127.0.0.1:81"), Address.parse("[::1]:82"), Address.pipe("/run/x")], inbound=False, sockets=[[], []]),
    ]


async def test_listeners_are_listed_with_all_addresses(server, ask):
    listeners(server)
    assert (await ask("GET", "/listeners")).body == "in::127.0.0.1:80\nout::127.0.0.1:81\nout::[::1]:82\nout::/run/x\n"
    statuses = (await body(ask("GET", "/listeners?format=json")))["listener_statuses"]
    assert statuses[0] == {"name": "in", "local_address": {"socket_address": {"address": "127.0.0.1", "port_value": 80}}}
    assert statuses[1]["additional_local_addresses"][1] == {"pipe": {"path": "/run/x"}}


async def test_an_immediate_drain_stops_listeners_and_tells_connections(server, ask):
    listeners(server)
    assert (await ask("POST", "/drain_listeners?inboundonly")).body == "OK\n"
    assert (await ask("GET", "/listeners")).body.startswith("out::")
    assert server.workers.told == [(Kind.DRAIN, {"inbound_only": True}), (Kind.STOP_LISTENERS, {"inbound_only": True})]


async def test_a_graceful_drain_keeps_accepting_and_starts_once(server, ask):
    listeners(server)
    await ask("POST", "/drain_listeners?graceful")
    await ask("POST", "/drain_listeners?graceful")
    await ask("POST", "/drain_listeners?graceful&inboundonly")
    assert server.workers.told == [(Kind.DRAIN, {"inbound_only": False})]
    assert not any(listener.stopped for listener in server.listeners)


async def test_skip_exit_never_stops_listeners(server, ask):
    listeners(server)
    await ask("POST", "/drain_listeners?skip_exit")
    assert server.workers.told == [(Kind.DRAIN, {"inbound_only": False})]


async def test_quitquitquit_ends_the_server(server, ask):
    assert (await ask("POST", "/quitquitquit")).body == "OK\n"
    assert server.workers.told == ["end"]


async def test_reset_counters_gathers_first(server, ask):
    counter = server.stats.counter("x")
    counter.n = 5
    assert (await ask("POST", "/reset_counters")).body == "OK\n"
    assert server.workers.told == [(Kind.STATS, b"")]
    assert counter.n == 0


# -- logging


async def test_log_levels_are_listed_as_envoy_does(ask):
    answer = await ask("POST", "/logging")
    assert answer.body.startswith("active loggers:\n  a2a: error\n  admin: error\n")
    assert answer.body.endswith("  ip_tagging: error\n\n")


@pytest.mark.parametrize("target", ["/logging?upstream=debug", "/logging?paths=upstream:debug"])
async def test_one_log_level_is_changed_everywhere(server, ask, target):
    answer = await ask("POST", target)
    assert "  upstream: debug\n" in answer.body
    assert "  http: error\n" in answer.body
    assert server.workers.told == [(Kind.LOG_LEVEL, {"upstream": "debug"})]


async def test_all_log_levels_are_changed(server, ask):
    await ask("POST", "/logging?level=info")
    assert set(server.levels.by_component.values()) == {"info"}
    server.levels.update(dict.fromkeys(logs.COMPONENTS, "error"))


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("level=bogus", "unknown logger level"),
        ("level=warn", "unknown logger level"),
        ("nonex=info", "unknown logger name"),
        ("paths=http:off,main:zz", "unknown logger level"),
        ("paths=http", "empty logger name or empty logger level"),
        ("a=info&b=info", "invalid number of parameters"),
        ("group=http:info", "group parameter requires fine-grain logging to be enabled"),
    ],
)
async def test_wrong_log_levels_change_nothing(server, ask, query, why):
    answer = await ask("POST", f"/logging?{query}")
    assert answer.status == 400
    assert answer.body.startswith(
        f"error: {why}\n\nusage: /logging?<name>=<level> (change single level)\nusage: /logging?paths=name1:level1,name2:level2,... (change multiple levels)\n"
    )
    assert "levels: trace debug info warning error critical off \nactive loggers:\n" in answer.body
    assert server.workers.told == []
    assert set(server.levels.by_component.values()) == {"error"}


# -- runtime


async def test_runtime_shows_layers_and_overrides(server, ask):
    assert (await ask("POST", "/runtime_modify?a.b=7&new=x")).body == "OK\n"
    runtime = await body(ask("GET", "/runtime"))
    assert runtime["layers"] == ["base", "admin"]
    assert runtime["entries"]["a.b"] == {"layer_values": ["5", "7"], "final_value": "7"}
    assert server.workers.told == [(Kind.RUNTIME, {"a.b": "7", "new": "x"})]
    await ask("POST", "/runtime_modify", b"new=", "application/x-www-form-urlencoded")
    assert "new" not in (await body(ask("GET", "/runtime")))["entries"]


async def test_runtime_modify_without_parameters_explains_itself(ask):
    answer = await ask("POST", "/runtime_modify")
    assert answer.status == 400
    assert answer.body.startswith("usage: /runtime_modify?key1=value1&key2=value2&keyN=valueN\n")


async def test_runtime_cannot_change_without_an_admin_layer(server, ask):
    server.runtime = Runtime([])
    answer = await ask("POST", "/runtime_modify?a=b")
    assert (answer.status, answer.body) == (503, "No admin layer specified")


# -- dumps


async def test_config_dump_has_envoys_sections_in_order(ask):
    dump = await body(ask("GET", "/config_dump"))
    names = [section["@type"].rpartition(".")[2] for section in dump["configs"]]
    assert names == ["BootstrapConfigDump", "ClustersConfigDump", "ListenersConfigDump", "ScopedRoutesConfigDump", "RoutesConfigDump", "SecretsConfigDump"]
    clusters = dump["configs"][1]["static_clusters"]
    assert [entry["cluster"]["name"] for entry in clusters] == ["c1", "c2"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", clusters[0]["last_updated"])
    assert dump["configs"][4]["static_route_configs"][0]["route_config"]["name"] == "r1"


async def test_config_dump_hides_secrets_everywhere(ask):
    text = (await ask("GET", "/config_dump")).body
    assert "HIDDEN" not in text
    assert "SElEREVO" not in text
    assert text.count("PUBLIC") == 4
    assert "[redacted]" in text


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("resource=static_clusters", ["c1", "c2"]),
        ("resource=static_clusters&name_regex=c.", ["c1", "c2"]),
        ("resource=static_clusters&name_regex=c", []),
        ("resource=static_clusters&name_regex=.*2", ["c2"]),
    ],
)
async def test_resources_are_selected_by_whole_name(ask, query, names):
    dump = await body(ask("GET", f"/config_dump?{query}"))
    assert [entry["cluster"]["name"] for entry in dump.get("configs", [])] == names


async def test_masks_reach_into_resources(ask):
    dump = await body(ask("GET", "/config_dump?resource=static_clusters&mask=cluster.name&name_regex=c1"))
    assert dump["configs"] == [
        {
            "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump.StaticCluster",
            "cluster": {"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "c1"},
        }
    ]


async def test_a_mask_leaves_out_sections_that_it_does_not_fit(ask):
    dump = await body(ask("GET", "/config_dump?mask=bootstrap.node.id"))
    assert dump["configs"] == [{"@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump", "bootstrap": {"node": {"id": "n1"}}}]


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ("resource=bogus", 404, "bogus not found in config dump"),
        ("resource=bootstrap", 400, "bootstrap is not a repeated field. Use ?mask=bootstrap to get only this field"),
        ("mask=bogus", 400, "FieldMask bogus could not be successfully applied to any configs."),
        ("name_regex=(", 400, "INVALID_ARGUMENT: Error while parsing name_regex from (: missing ): ("),
        ("resource=static_clusters&mask=zz", 400, 'FieldMask paths: "zz"\n could not be successfully used.'),
    ],
)
async def test_config_dump_refuses_as_envoy_does(ask, query, status, text):
    answer = await ask("GET", f"/config_dump?{query}")
    assert (answer.status, answer.body, answer.content_type) == (status, text, "text/plain")


async def test_server_info_has_the_command_line_and_the_node(ask):
    info = await body(ask("GET", "/server_info"))
    assert (info["state"], info["hot_restart_version"]) == ("LIVE", "disabled")
    assert info["command_line_options"]["drain_time"] == "30s"
    assert info["command_line_options"]["concurrency"] == 2
    assert info["command_line_options"]["config_path"] == "x.yaml"
    assert (info["node"]["id"], info["node"]["cluster"]) == ("n1", "c1")
    assert len(info["version"].split("/")) == 5


async def test_memory_adds_up_all_processes(server, ask):
    server.workers.answers[Kind.COLLECT, b"memory"] = [marshal.dumps({"allocated": 1 << 40})]
    answer = await ask("GET", "/memory")
    assert answer.content_type == JSON
    figures = json.loads(answer.body)
    assert int(figures["allocated"]) > 1 << 40
    assert set(figures) == {"allocated", "heap_size", "pageheap_unmapped", "pageheap_free", "total_thread_cache", "total_physical_bytes"}


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/hot_restart_version", 200, "disabled"),
        ("GET", "/contention", 200, "Mutex contention tracing is not enabled. To enable, run Envoy with flag --enable-mutex-tracing."),
        ("GET", "/init_dump", 200, "{}\n"),
        ("GET", "/certs", 200, '{\n "certificates": []\n}\n'),
        ("POST", "/heapprofiler", 501, "The current build does not support heap profiler"),
        ("POST", "/cpuprofiler", 400, "?enable=<y|n>\n"),
    ],
)
async def test_small_endpoints(ask, method, path, status, text):
    answer = await ask(method, path)
    assert isinstance(answer, Response)
    assert (answer.status, answer.body) == (status, text)


def test_redaction_of_unknown_types_shows_nothing():
    from google.protobuf import any_pb2

    from meshproxy.api.redact import redact

    bootstrap = bootstrap_pb2.Bootstrap()
    secret = bootstrap.static_resources.secrets.add(name="x")
    secret.generic_secret.secret.inline_string = "HIDDEN"
    unknown = any_pb2.Any(type_url="type.googleapis.com/no.such.Type", value=b"HIDDEN")
    redact(unknown, sensitive=True)
    redact(bootstrap)
    assert b"HIDDEN" not in unknown.SerializeToString() + bootstrap.SerializeToString()


async def test_the_status_of_a_client_without_anything_dynamic(ask):
    answer = await ask("POST", "/v3/discovery:client_status", b'{"exclude_resource_contents": true}')
    (config,) = json.loads(answer.body)["config"]
    assert "generic_xds_configs" not in config
    for wrong, why in ((b"[", "not a ClientStatusRequest"), (b'{"nodes": 1}', "no such field"), (b'{"node_matchers": [{}]}', "node_matchers")):
        answer = await ask("POST", "/v3/discovery:client_status", wrong)
        assert answer.status == 400
        assert why in answer.body
