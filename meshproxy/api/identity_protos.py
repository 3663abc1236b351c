"""Messages by which identities are asked for, of APIs that xds-protos does not carry: Istio's CreateCertificate and SPIFFE's Workload API.

Declared here, in a pool of their own: what others load into the default pool under the same names is none of our business. Fields that nobody here reads
are left out; they are kept as unknown fields. Sources: istio/api security/v1alpha1/ca.proto; spiffe/spiffe standards/workloadapi.proto.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

CREATE_CERTIFICATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
FETCH_X509_SVID = "/SpiffeWorkloadAPI/FetchX509SVID"
FETCH_X509_BUNDLES = "/SpiffeWorkloadAPI/FetchX509Bundles"
WORKLOAD_HEADER = ("workload.spiffe.io", "true")  # the Workload API refuses calls without it: browsers and the like cannot send it

_Field = descriptor_pb2.FieldDescriptorProto
_TYPES = {"string": _Field.TYPE_STRING, "bytes": _Field.TYPE_BYTES, "int64": _Field.TYPE_INT64}
_MAP = "map of bytes"

# Full name -> (name, number, type, repeated). A type that is none of the above is a message of the same package.
_MESSAGES: dict[str, tuple[tuple[str, int, str, bool], ...]] = {
    "istio.v1.auth.IstioCertificateRequest": (("csr", 1, "string", False), ("validity_duration", 3, "int64", False)),
    "istio.v1.auth.IstioCertificateResponse": (("cert_chain", 1, "string", True),),
    "X509SVIDRequest": (),
    "X509SVID": (
        ("spiffe_id", 1, "string", False),
        ("x509_svid", 2, "bytes", False),
        ("x509_svid_key", 3, "bytes", False),
        ("bundle", 4, "bytes", False),
        ("hint", 5, "string", False),
    ),
    "X509SVIDResponse": (("svids", 1, "X509SVID", True), ("crl", 2, "bytes", True), ("federated_bundles", 3, _MAP, True)),
    "X509BundlesRequest": (),
    "X509BundlesResponse": (("crl", 1, "bytes", True), ("bundles", 2, _MAP, True)),
}


def message(name: str) -> Any:
    """The class of one of the messages above, by full name."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))


@cache
def _pool() -> Any:
    pool = descriptor_pool.DescriptorPool()
    files: dict[str, Any] = {}
    for full_name, fields in _MESSAGES.items():
        package, _, name = full_name.rpartition(".")
        file = files.get(package)
        if file is None:
            file = files[package] = descriptor_pb2.FileDescriptorProto(name=f"{package or 'workload'}.proto", package=package, syntax="proto3")
        _declare(file.message_type.add(name=name), f"{package}." if package else "", fields)
    for file in files.values():
        pool.AddSerializedFile(file.SerializeToString())
    return pool


def _declare(proto: Any, prefix: str, fields: tuple[tuple[str, int, str, bool], ...]) -> None:
    for name, number, type, repeated in fields:
        field = proto.field.add(name=name, number=number, label=_Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL)
        if type == _MAP:
            entry = proto.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
            entry.field.add(name="value", number=2, type=_Field.TYPE_BYTES, label=_Field.LABEL_OPTIONAL)
            field.type, field.type_name = _Field.TYPE_MESSAGE, f".{prefix}{proto.name}.{entry.name}"
        elif type in _TYPES:
            field.type = _TYPES[type]
        else:
            field.type, field.type_name = _Field.TYPE_MESSAGE, f".{prefix}{type}"
