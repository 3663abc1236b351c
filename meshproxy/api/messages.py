"""Protobuf message types by name or type URL, loaded when first needed.

Importing every generated module of the Envoy API costs seconds and a hundred megabytes; a configuration uses a few dozen. A message lives in the Python
package of its proto package, so that looking at the few files of that package finds it. Generated modules are read, not imported: of what they do only
handing their serialised descriptor to protobuf is needed, and a class for each message that somebody uses. That is a third of the time, which the hundred
files behind a bootstrap make the start wait for (docs/decisions/0005-start-up.md).
"""

from __future__ import annotations

import codecs
import importlib
import os
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from meshproxy.deferred import defer

# What the descriptor pool in Python needs, for where there is no compiled protobuf.
defer("google.protobuf.internal.python_message", "google.protobuf.descriptor_database", "google.protobuf.text_encoding")

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, reflection  # noqa: E402
from google.protobuf.internal import api_implementation  # noqa: E402
from google.protobuf.message import Message  # noqa: E402

from meshproxy.api import own  # noqa: E402

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

# Type URLs reach us from configuration that others wrote: they must never name a module outside the API.
_ROOTS = ("envoy", "xds", "udpa", "google")
_LITERAL = b"AddSerializedFile(b'", b"')\n"  # what is before and after it

# Well-known types are needed by nearly every configuration, and google.protobuf has too many files to search.
_GOOGLE = {
    "Any": "any_pb2",
    "Duration": "duration_pb2",
    "Empty": "empty_pb2",
    "Struct": "struct_pb2",
    "Value": "struct_pb2",
    "ListValue": "struct_pb2",
    "Timestamp": "timestamp_pb2",
    **dict.fromkeys(
        ("BoolValue", "BytesValue", "DoubleValue", "FloatValue", "Int32Value", "Int64Value", "StringValue", "UInt32Value", "UInt64Value"), "wrappers_pb2"
    ),
}


def full_name(type_url: str) -> str:
    """The message name at the end of a type URL; whatever stands before the last slash does not matter, as in Envoy."""
    return type_url.rpartition("/")[2]


@lru_cache(4096)  # names come from outside too: the memo must not grow with what a hostile peer makes up
def descriptor(name: str) -> Descriptor | None:
    """The descriptor of a message of the Envoy API, xDS or protobuf itself; None when there is no such message."""
    if "." not in name or not name.isascii() or not all(map(str.isidentifier, name.split("."))):
        return None
    pool = descriptor_pool.Default()
    try:
        return pool.FindMessageTypeByName(name)
    except KeyError:
        pass
    package, _, message = name.rpartition(".")
    while package:  # a nested message is in the package of the message around it
        if ("." in package or package in own.SHORT) and _load(package, message):
            try:
                return pool.FindMessageTypeByName(name)
            except KeyError:
                return None
        package, _, message = package.rpartition(".")
    return None


@lru_cache(4096)
def message_class(name: str) -> type[Message] | None:
    """The class of a message by full name, or None."""
    found = descriptor(name)
    return class_of(found) if found is not None else None


def class_of(found: Descriptor) -> type[Message]:
    """The class of a message, by its descriptor.

    Compiled protobuf makes the classes of the messages in it when they are first seen, most of them never. GetMessageClass would make all: 350 for a bootstrap.
    """
    if api_implementation.Type() != "upb":
        return message_factory.GetMessageClass(found)
    made: Any = getattr(found, "_concrete_class", None) or reflection.GeneratedProtocolMessageType(
        found.name, (Message,), {"DESCRIPTOR": found, "__module__": None}
    )
    return made


def known(name: str) -> Any:
    """The class of a message that the API certainly has: what a module would import from generated code, without importing it."""
    found = message_class(name)
    if found is None:
        raise LookupError(f"{name}: this version of xds-protos does not have it")
    return found


def _load(package: str, message: str) -> bool:
    """Put the file of `package` that defines the top-level `message` into the pool; False when there is none."""
    if own.define(package, message):
        return True
    if package.partition(".")[0] not in _ROOTS:
        return False
    if package == "google.protobuf":
        if message in _GOOGLE:
            importlib.import_module(f"google.protobuf.{_GOOGLE[message]}")
        return message in _GOOGLE
    for folder in _folders(package):
        for file in sorted(name for name in os.listdir(folder) if name.endswith("_pb2.py")):
            # Generated code keeps each message's place in the serialised file under its upper-case name.
            with open(f"{folder}/{file}", "rb") as code:
                found = f"['_{message.upper()}']".encode() in code.read()
            if found:
                module = f"{package}.{file.removesuffix('.py')}"
                _define(module)
                try:
                    descriptor_pool.Default().FindMessageTypeByName(f"{package}.{message}")
                except KeyError:
                    continue  # a nested message of that name
                return True
    return False


@cache
def _define(module: str) -> None:
    """Do what importing a generated module does for the default pool: add its file, after those that it refers to."""
    package, _, name = module.rpartition(".")
    serialised = None if package == "google.protobuf" else _serialised(package, name)
    if serialised is None:
        importlib.import_module(module)
        return
    for file in descriptor_pb2.FileDescriptorProto.FromString(serialised).dependency:
        _define(file.removesuffix(".proto").replace("-", "_").replace("/", ".") + "_pb2")
    descriptor_pool.Default().AddSerializedFile(serialised)


def _serialised(package: str, name: str) -> bytes | None:
    """The descriptor in the source of a generated module; None when there is no source, or one of another form."""
    for folder in _folders(package):
        try:
            with open(f"{folder}/{name}.py", "rb") as code:
                _, found, rest = code.read().partition(_LITERAL[0])
        except OSError:
            continue
        literal, end, _ = rest.partition(_LITERAL[1])
        if found and end:
            return codecs.escape_decode(literal)[0]
    return None


@lru_cache(256)
def _folders(package: str) -> tuple[str, ...]:
    parts = package.split(".")
    try:
        root = importlib.import_module(parts[0])
    except ImportError:
        return ()
    return tuple(folder for base in root.__path__ if os.path.isdir(folder := os.path.join(base, *parts[1:])))
