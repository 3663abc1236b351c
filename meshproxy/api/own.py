"""Message types that xds-protos does not carry, defined here without generated code.

PeakEwma has the name, fields and numbers of Envoy's contrib extension, so that one configuration drives both; so have the messages of Istio's filters
(docs/metrics.md). The Python filter is our own: a `module` with the code and its `config` (wrappers where a string would do, so that all fields are
messages). So is Workload, see docs/identity.md.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, struct_pb2, wrappers_pb2

_DURATION = duration_pb2.Duration.DESCRIPTOR.full_name
_UINT32 = wrappers_pb2.UInt32Value.DESCRIPTOR.full_name
_DOUBLE = wrappers_pb2.DoubleValue.DESCRIPTOR.full_name
_STRING = wrappers_pb2.StringValue.DESCRIPTOR.full_name
_STRUCT = struct_pb2.Struct.DESCRIPTOR.full_name

# (package, message) -> its message-typed fields in the order of their numbers.
_MESSAGES: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("envoy.extensions.load_balancing_policies.peak_ewma.v3alpha", "PeakEwma"): (
        ("decay_time", _DURATION),
        ("aggregation_interval", _DURATION),
        ("max_samples_per_host", _UINT32),
        ("default_rtt", _DURATION),
        ("penalty_value", _DOUBLE),
    ),
    ("meshproxy.python.v1", "Filter"): (
        ("module", _STRING),
        ("config", _STRUCT),
    ),
    ("meshproxy.identity.v1", "Workload"): (
        ("authority", _STRING),
        ("workload_api", _STRING),
        ("identity", _STRING),
        ("life", _DURATION),
        ("token_file", _STRING),
        ("join_token_file", _STRING),
        ("serves", _STRING),
    ),
}

# Istio's packages: message -> its fields as (number, name, type, whether there are many); enum -> its values in order. A type is a message or an enum of the
# same package, a well-known message, or one of `_SCALARS`; `map` is map<string, string>.
_ISTIO: dict[str, dict[str, tuple[Any, ...]]] = {
    "stats": {
        "MetricType": ("COUNTER", "GAUGE", "HISTOGRAM"),
        "Reporter": ("UNSPECIFIED", "SERVER_GATEWAY"),
        "MetricConfig": (
            (1, "dimensions", "map", True),
            (2, "name", "string", False),
            (3, "tags_to_remove", "string", True),
            (4, "match", "string", False),
            (5, "drop", "bool", False),
        ),
        "MetricDefinition": ((1, "name", "string", False), (2, "value", "string", False), (3, "type", "MetricType", False)),
        "PluginConfig": (
            (6, "disable_host_header_fallback", "bool", False),
            (7, "tcp_reporting_duration", _DURATION, False),
            (8, "metrics", "MetricConfig", True),
            (9, "definitions", "MetricDefinition", True),
            (10, "reporter", "Reporter", False),
            (11, "rotation_interval", _DURATION, False),
            (12, "graceful_deletion_interval", _DURATION, False),
        ),
    },
    "io.istio.http.peer_metadata": {
        "Config.Baggage": (),
        "Config.WorkloadDiscovery": (),
        "Config.IstioHeaders": ((1, "skip_external_clusters", "bool", False),),
        "Config.UpstreamFilterState": ((1, "peer_metadata_key", "string", False),),
        # Of the last two the fields are a oneof, `method_specifier`.
        "Config.DiscoveryMethod": (
            (1, "baggage", "Config.Baggage", False),
            (2, "workload_discovery", "Config.WorkloadDiscovery", False),
            (3, "istio_headers", "Config.IstioHeaders", False),
            (4, "upstream_filter_state", "Config.UpstreamFilterState", False),
        ),
        "Config.PropagationMethod": ((1, "istio_headers", "Config.IstioHeaders", False), (2, "baggage", "Config.Baggage", False)),
        "Config": (
            (1, "downstream_discovery", "Config.DiscoveryMethod", True),
            (2, "upstream_discovery", "Config.DiscoveryMethod", True),
            (3, "downstream_propagation", "Config.PropagationMethod", True),
            (4, "upstream_propagation", "Config.PropagationMethod", True),
            (5, "shared_with_upstream", "bool", False),
            (6, "additional_labels", "string", True),
        ),
    },
}
SHORT = frozenset(("stats",))  # packages of one word
_ONEOFS = frozenset(("Config.DiscoveryMethod", "Config.PropagationMethod"))
_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {"string": _FIELD.TYPE_STRING, "bool": _FIELD.TYPE_BOOL}
_DEPENDENCIES = [duration_pb2.DESCRIPTOR.name, struct_pb2.DESCRIPTOR.name, wrappers_pb2.DESCRIPTOR.name]


def define(package: str, message: str) -> bool:
    """Put `message` into the default descriptor pool; False when it is not one of ours. Call it once per message, of Istio's packages once per package."""
    if package in _ISTIO:
        return _define_istio(package, message)
    fields = _MESSAGES.get((package, message))
    if fields is None:
        return False
    file = descriptor_pb2.FileDescriptorProto(
        name=f"meshproxy/{package}.{message}.proto",
        package=package,
        syntax="proto3",
        dependency=_DEPENDENCIES,
    )
    proto = file.message_type.add(name=message)
    for number, (name, type_name) in enumerate(fields, 1):
        proto.field.add(
            name=name,
            number=number,
            type_name=f".{type_name}",
            type=_FIELD.TYPE_MESSAGE,
            label=_FIELD.LABEL_OPTIONAL,
        )
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    return True


def _define_istio(package: str, message: str) -> bool:
    """Put the whole package into the pool, if it has such a message."""
    known = _ISTIO[package]
    if message not in known:
        return False
    file = descriptor_pb2.FileDescriptorProto(name=f"meshproxy/{package}.proto", package=package, syntax="proto3", dependency=_DEPENDENCIES)
    protos: dict[str, Any] = {}
    for name in sorted(known):  # the outer one before those within
        entries = known[name]
        outer, _, own = name.rpartition(".")
        if entries and isinstance(entries[0], str):
            enum = file.enum_type.add(name=name)
            for number, value in enumerate(entries):
                enum.value.add(name=value, number=number)
            continue
        proto = protos[name] = protos[outer].nested_type.add(name=own) if outer else file.message_type.add(name=own)
        if name in _ONEOFS:
            proto.oneof_decl.add(name="method_specifier")
    for name, proto in protos.items():
        for number, field, kind, many in known[name]:
            made = proto.field.add(name=field, number=number, label=_FIELD.LABEL_REPEATED if many else _FIELD.LABEL_OPTIONAL)
            if name in _ONEOFS:
                made.oneof_index = 0
            if kind in _SCALARS:
                made.type = _SCALARS[kind]
                continue
            if kind == "map":
                entry = proto.nested_type.add(name=f"{field.capitalize()}Entry", options=descriptor_pb2.MessageOptions(map_entry=True))
                for place, part in enumerate(("key", "value"), 1):
                    entry.field.add(name=part, number=place, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
                kind = f"{name}.{entry.name}"
            of_package = kind in known or kind.startswith(f"{name}.")
            is_enum = of_package and kind in known and bool(known[kind]) and isinstance(known[kind][0], str)
            made.type = _FIELD.TYPE_ENUM if is_enum else _FIELD.TYPE_MESSAGE
            made.type_name = f".{package}.{kind}" if of_package else f".{kind}"
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    return True
