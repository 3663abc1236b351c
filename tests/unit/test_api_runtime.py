"""Runtime layers: each value kind gives what the real Envoy gives for it (its verdicts are the table)."""

from __future__ import annotations

import random

import pytest
from envoy.config.bootstrap.v3.bootstrap_pb2 import LayeredRuntime
from envoy.config.core.v3.base_pb2 import RuntimeFeatureFlag, RuntimeFractionalPercent
from envoy.type.v3.percent_pb2 import FractionalPercent
from google.protobuf import struct_pb2

from meshproxy.api import convert, runtime
from meshproxy.api.errors import ConfigError
from meshproxy.api.runtime import Runtime


def make(*layers, **kwargs):
    return Runtime.from_proto(convert.to_message({"layers": list(layers)}, LayeredRuntime), **kwargs)


def fraction(numerator, key="", denominator="HUNDRED"):
    return convert.to_message({"default_value": {"numerator": numerator, "denominator": denominator}, "runtime_key": key}, RuntimeFractionalPercent)


@pytest.mark.parametrize(
    ("value", "never_becomes", "always_becomes"),
    [
        (100, True, True),
        ("100", True, True),
        (" 100 ", True, True),
        ("100.0", True, True),
        (1000, True, True),
        (0, False, False),
        (True, False, True),
        ("true", False, True),
        (-5, False, True),
        ("numerator: 100", False, True),
        ({"numerator": 100, "denominator": "HUNDRED"}, True, True),
        ({"numerator": 100}, True, True),
        ({"denominator": "HUNDRED"}, False, False),
        ({"numerator": 5, "foo": 1}, False, True),
    ],
)
def test_fractions_like_envoy(value, never_becomes, always_becomes):
    layers = make({"name": "s", "static_layer": {"key": value}})
    assert runtime.compile_fraction(fraction(0, "key"), layers, random.Random(1)) is never_becomes
    assert runtime.compile_fraction(fraction(100, "key"), layers, random.Random(1)) is always_becomes


def test_kinds_of_value():
    layers = make({"name": "s", "static_layer": {"a": 3.7, "b": -2, "c": True, "d": "x", "e": {"f": {"g": 1}}, "h": 0}})
    assert (layers.integer("a", 9), layers.integer("b", 9), layers.integer("c", 9), layers.integer("nope", 9)) == (3, 9, 9, 9)
    assert (layers.number("a", 9), layers.number("b", 9), layers.number("d", 9)) == (3.7, -2, 9)
    assert (layers.boolean("c", False), layers.boolean("h", True), layers.boolean("e.f.g", False), layers.boolean("a", False)) == (True, False, True, False)
    assert layers.size == 6


def test_later_layers_override_and_admin_modifies():
    layers = make({"name": "one", "static_layer": {"k": 1, "l": 1}}, {"name": "two", "static_layer": {"k": 2}}, {"name": "admin", "admin_layer": {}})
    assert layers.integer("k", 0) == 2
    layers.modify({"k": "3", "new": "true"})
    assert (layers.integer("k", 0), layers.boolean("new", False), layers.overrides) == (3, True, {"k": "3", "new": "true"})
    layers.modify({"k": ""})
    assert layers.integer("k", 0) == 2
    assert layers.dump() == {
        "layers": ["one", "two", "admin"],
        "entries": {
            "k": {"layer_values": ["1", "2", ""], "final_value": "2"},
            "l": {"layer_values": ["1", "", ""], "final_value": "1"},
            "new": {"layer_values": ["", "", "true"], "final_value": "true"},
        },
    }


def test_compiled_fractions_follow_the_admin_layer():
    layers = make({"name": "admin", "admin_layer": {}})
    applies = runtime.compile_fraction(fraction(0, "key"), layers, random.Random(1))
    chance = runtime.compile_chance(fraction(50, "key"), layers)
    assert callable(applies)
    assert callable(chance)
    assert (applies(), chance(49), chance(50), chance(149)) == (False, True, False, True)
    layers.modify({"key": "{numerator: 1, denominator: MILLION}"})
    assert (chance(0), chance(1)) == (True, False)
    layers.modify({"key": "100"})
    assert applies()
    assert not runtime.compile_fraction(fraction(0), layers, random.Random(1))


def test_constant_and_chance():
    still = make()
    generator = random.Random(7)
    assert runtime.compile_fraction(None, still, generator) is True
    assert runtime.compile_fraction(None, still, generator, default=False) is False
    assert runtime.compile_fraction(FractionalPercent(numerator=100), still, generator) is True
    assert runtime.compile_fraction(FractionalPercent(numerator=1_000_000, denominator=FractionalPercent.MILLION), still, generator) is True
    quarter = runtime.compile_fraction(fraction(2500, denominator="TEN_THOUSAND"), still, generator)
    assert callable(quarter)
    assert 200 < sum(quarter() for _ in range(1000)) < 300


def test_flags():
    flag = convert.to_message({"default_value": False, "runtime_key": "key"}, RuntimeFeatureFlag)
    assert runtime.compile_flag(None, make()) is True
    assert runtime.compile_flag(flag, make()) is False
    assert runtime.compile_flag(flag, make({"name": "s", "static_layer": {"key": True}})) is True
    layers = make({"name": "a", "admin_layer": {}})
    changing = runtime.compile_flag(flag, layers)
    assert callable(changing)
    assert not changing()
    layers.modify({"key": "true"})
    assert changing()


def test_disk_layer(tmp_path):
    (tmp_path / "v1" / "health").mkdir(parents=True)
    (tmp_path / "v1" / "health" / "min").write_text("# a comment\n42\n")
    (tmp_path / "v1" / "share").write_text("numerator: 1\ndenominator: MILLION\n")
    (tmp_path / "v1" / "mine").mkdir()
    (tmp_path / "v1" / "mine" / "only").write_text("true")
    (tmp_path / "current").symlink_to("v1")
    disk = {"symlink_root": str(tmp_path / "current")}
    layers = make({"name": "d", "disk_layer": disk})
    assert layers.integer("health.min", 0) == 42
    assert layers.fraction("share", (0, 100)) == (1, 1_000_000)
    assert layers.boolean("mine.only", False)
    own = make({"name": "d", "disk_layer": {**disk, "append_service_cluster": True}}, service_cluster="mine")
    assert (own.boolean("only", False), own.size, own.load_errors) == (True, 1, 0)


def test_missing_disk_layer_is_empty_and_counted():
    layers = make({"name": "d", "disk_layer": {"symlink_root": "/nonexistent"}})
    assert (layers.size, layers.load_errors) == (0, 1)


def test_a_layer_by_discovery_is_replaced_whole_and_read_anew():
    layers = make({"name": "base", "static_layer": {"kept": 1, "changed": 1}}, {"name": "found", "rtds_layer": {"name": "x"}})
    chance = runtime.compile_chance(RuntimeFractionalPercent(runtime_key="changed"), layers)
    assert (layers.integer("changed", 0), callable(chance)) == (1, True)
    layers.replace_layer("found", struct(changed=100.0, new="text"))
    assert (layers.integer("kept", 0), layers.integer("changed", 0), chance(1 << 63), layers.size) == (1, 100, True, 3)
    layers.replace_layer("found", struct(other=True))
    assert (layers.integer("changed", 0), layers.boolean("other", False), layers.size) == (1, True, 3)
    with pytest.raises(ConfigError):
        layers.replace_layer("found", struct(wrong=None))
    assert layers.boolean("other", False)


def struct(**values):
    made = struct_pb2.Struct()
    made.update(values)
    return made.SerializeToString()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([{"name": "a", "admin_layer": {}}, {"name": "b", "admin_layer": {}}], "layers[1].admin_layer: there can be only one admin layer"),
        ([{"name": "a", "admin_layer": {}}, {"name": "a", "static_layer": {}}], "layers[1].name: another layer is called 'a' too"),
        ([{"name": "a", "static_layer": {"x": {"y": [1]}}}], "layers[0].static_layer.x.y: a runtime value must be"),
        ([{"name": "a", "static_layer": {"x": None}}], "layers[0].static_layer.x: a runtime value must be"),
        ([{"name": "a"}], "layers[0]: static_layer, disk_layer, admin_layer or rtds_layer must be set"),
        ([{"name": "a", "disk_layer": {}}], "layers[0].disk_layer.symlink_root: must not be empty"),
        ([{"name": "a", "disk_layer": {"symlink_root": "/nonexistent/x"}}], "layers[0].disk_layer.symlink_root: the directory /nonexistent does not exist"),
    ],
)
def test_rejected_layers(layers, expected):
    with pytest.raises(ConfigError) as caught:
        make(*layers)
    assert str(caught.value).startswith(expected)


def test_modify_without_admin_layer():
    with pytest.raises(ConfigError, match="No admin layer specified"):
        make({"name": "s", "static_layer": {}}).modify({"a": "1"})
