"""Loading a bootstrap: by suffix, merged with text from the command line, with one clear message for what cannot be read."""

from __future__ import annotations

import json

import pytest
from envoy.config.bootstrap.v3.bootstrap_pb2 import Bootstrap
from google.protobuf import text_format

from meshproxy.api import bootstrap
from meshproxy.api.errors import DEPRECATED, UNKNOWN, ConfigError

RAW = {"name": "raw", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"}}
CONFIG = {"node": {"id": "a"}, "static_resources": {"clusters": [{"name": "c", "connect_timeout": "0.5s", "transport_socket": RAW}]}}


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json", "conf", "JSON", "pb", "pb_text"])
def test_formats(tmp_path, suffix):
    wanted = bootstrap.parse(json.dumps(CONFIG))
    data = {"pb": wanted.SerializeToString(), "pb_text": text_format.MessageToString(wanted).encode()}.get(suffix, json.dumps(CONFIG).encode())
    file = tmp_path / f"config.{suffix}"
    file.write_bytes(data)
    assert bootstrap.load(str(file)) == wanted


def test_merging(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("node: {id: a, cluster: x}\nstatic_resources: {clusters: [{name: one}]}")
    merged = bootstrap.load(str(file), "node: {id: b}\nstatic_resources: {clusters: [{name: two}]}")
    assert merged == bootstrap.parse("node: {id: b, cluster: x}\nstatic_resources: {clusters: [{name: one}, {name: two}]}")
    assert bootstrap.load(config_yaml="node: {id: b}").node.id == "b"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("c.yaml", b"", "the configuration is empty"),
        ("c.yaml", b"[]", "expected a mapping with the fields of envoy.config.bootstrap.v3.Bootstrap, got a list"),
        ("c.yaml", b"a: [", "line 2, column 1: did not find expected node content"),
        ("c.json", b"a: b", "line 1, column 1: Expecting value"),
        ("c.yaml", b"\xff", "not UTF-8: byte 0 is 0xff"),
        ("c.pb", b"\xff", "not a serialised envoy.config.bootstrap.v3.Bootstrap"),
        ("c.pb_text", b"nope: 1", 'not text format: 1:1 : Message type "envoy.config.bootstrap.v3.Bootstrap" has no field named "nope"'),
    ],
)
def test_errors(tmp_path, name, content, why):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        bootstrap.load(str(file))
    assert str(caught.value).startswith(why)


def test_unreadable_files(tmp_path):
    for path, why in [
        (str(tmp_path / "nope.yaml"), f"cannot read {tmp_path}/nope.yaml: No such file or directory"),
        (str(tmp_path), f"cannot read {tmp_path}: Is a directory"),
        ("a\0b", "'a\\x00b' is not a file name"),
        ("", "no configuration: give a file (-c) or text (--config-yaml)"),
    ]:
        with pytest.raises(ConfigError) as caught:
            bootstrap.load(path)
        assert str(caught.value) == why


def test_dry_run_adds_what_only_compiling_shows():
    calls = []

    def dry_run(message: Bootstrap) -> None:
        calls.append(message)
        raise ConfigError.at("static_resources.clusters[0]", "does not compile")

    with pytest.raises(ConfigError) as caught:
        bootstrap.validate(config_yaml="static_resources: {clusters: [{name: a}, {name: a}]}", dry_run=dry_run)
    assert [problem.path for problem in caught.value.problems] == ["static_resources.clusters[1].name", "static_resources.clusters[0]"]
    with pytest.raises(ConfigError):
        bootstrap.validate(config_yaml="static_resources: {clusters: [{}]}", dry_run=dry_run)
    assert len(calls) == 1


def test_warnings_come_back():
    message, warnings = bootstrap.validate(config_yaml="node: {id: a}\nwatchdogs: {}", unsupported="warn")
    assert (message.node.id, [problem.path for problem in warnings]) == ("a", ["watchdogs"])


def test_unknown_fields_may_be_allowed():
    text = "{typo: 1, static_resources: {listeners: [{name: l, filter_chains: [{filters: [{typed_config: {'@type': x.y/%s, ports: 3}}]}]}]}}"
    text %= "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
    with pytest.raises(ConfigError) as caught:
        bootstrap.load(config_yaml=text)
    paths = ["typo", "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.ports"]
    assert [problem.path for problem in caught.value.problems] == paths
    unknown = []
    loaded = bootstrap.load(config_yaml=text, unknown=unknown)
    assert [(problem.path, problem.kind) for problem in unknown] == [(path, UNKNOWN) for path in paths]
    assert loaded.static_resources.listeners[0].filter_chains[0].filters[0].typed_config.type_url.endswith(".TcpProxy")
    with pytest.raises(ConfigError, match="name: expected a string") as caught:  # other mistakes stay mistakes
        bootstrap.load(config_yaml="{static_resources: {clusters: [{name: 1, typo: 2}]}}", unknown=[])
    assert len(caught.value.problems) == 1


def test_allowed_unknown_fields_and_deprecated_ones_are_warnings():
    text = "{typo: 1, admin: {access_log_path: /dev/null, address: {pipe: {path: /a}}}}"
    _, warnings = bootstrap.validate(config_yaml=text, allow_unknown=True)
    assert [(problem.path, problem.kind) for problem in warnings] == [("typo", UNKNOWN), ("admin.access_log_path", DEPRECATED)]
    assert str(warnings[1]) == "admin.access_log_path: envoy.config.bootstrap.v3.Admin.access_log_path is deprecated"
