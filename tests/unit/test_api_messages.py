"""Message types by name: read out of generated code as importing it would give them."""

from __future__ import annotations

import importlib

import pytest
from envoy.config.bootstrap.v3 import bootstrap_pb2

from meshproxy.api import messages


def files(descriptor):
    """A file and everything that it imports."""
    found = {descriptor.name: descriptor}
    for needed in descriptor.dependencies:
        found |= files(needed) if needed.name not in found else {}
    return found


def test_what_is_read_is_what_the_generated_modules_register():
    ours = {name: file for name, file in files(bootstrap_pb2.DESCRIPTOR).items() if not name.startswith("google/")}
    assert len(ours) > 50
    for name, file in ours.items():
        package, _, module = (name.removesuffix(".proto").replace("/", ".") + "_pb2").rpartition(".")
        assert messages._serialised(package, module) == importlib.import_module(f"{package}.{module}").DESCRIPTOR.serialized_pb == file.serialized_pb


def test_a_class_is_the_generated_modules():
    for name in ("Bootstrap", "Bootstrap.StaticResources", "Admin"):
        expected = bootstrap_pb2
        for part in name.split("."):
            expected = getattr(expected, part)
        assert messages.known(f"envoy.config.bootstrap.v3.{name}") is expected


def test_code_of_another_form_is_imported(monkeypatch):
    monkeypatch.setattr(messages, "_LITERAL", (b"no such text", b"')\n"))
    assert messages._serialised("envoy.config.bootstrap.v3", "bootstrap_pb2") is None
    messages._define.__wrapped__("envoy.config.bootstrap.v3.bootstrap_pb2")


@pytest.mark.parametrize("name", ["envoy.config.bootstrap.v3.Nothing", "envoy.nowhere.v3.Bootstrap", "os.path", ""])
def test_what_does_not_exist_is_not_known(name):
    assert messages.message_class(name) is None
    with pytest.raises(LookupError):
        messages.known(name)
