"""Message types that xds-protos does not carry, defined here without generated code.

PeakEwma has the name, fields and numbers of Envoy's contrib extension, so that one configuration drives both. The Python filter is our own: a `module` with
the code and its `config` (wrappers where a string would do, so that all fields are messages). So is Workload, see docs/identity.md.
"""

from __future__ import annotations

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


def define(package: str, message: str) -> bool:
    """Put `message` into the default descriptor pool; False when it is not one of ours. Call it once per message."""
    fields = _MESSAGES.get((package, message))
    if fields is None:
        return False
    file = descriptor_pb2.FileDescriptorProto(
        name=f"meshproxy/{package}.{message}.proto",
        package=package,
        syntax="proto3",
        dependency=[duration_pb2.DESCRIPTOR.name, struct_pb2.DESCRIPTOR.name, wrappers_pb2.DESCRIPTOR.name],
    )
    proto = file.message_type.add(name=message)
    for number, (name, type_name) in enumerate(fields, 1):
        proto.field.add(
            name=name,
            number=number,
            type_name=f".{type_name}",
            type=descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE,
            label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL,
        )
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    return True
