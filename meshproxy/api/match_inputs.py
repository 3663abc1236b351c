"""Inputs of match trees that look at a StreamInfo: addresses, TLS, headers, metadata. The tables at the end say where which may be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meshproxy.api import errors, matchers
from meshproxy.api.match_tree import INSUFFICIENT, METADATA, Input

_NETWORK = "envoy.extensions.matching.common_inputs.network.v3."
_SSL = "envoy.extensions.matching.common_inputs.ssl.v3."
_HEADER = "envoy.type.matcher.v3.HttpRequestHeaderMatchInput"

HONOURS = {
    f"{_NETWORK}DestinationIPInput": "",
    f"{_NETWORK}DestinationPortInput": "",
    f"{_NETWORK}SourceIPInput": "",
    f"{_NETWORK}SourcePortInput": "",
    f"{_NETWORK}DirectSourceIPInput": "",
    f"{_NETWORK}ServerNameInput": "",
    f"{_NETWORK}NetworkNamespaceInput": "",
    f"{_NETWORK}FilterStateInput": "key",
    f"{_NETWORK}DynamicMetadataInput": "filter path",
    f"{_NETWORK}DynamicMetadataInput.PathSegment": "key",
    f"{_SSL}UriSanInput": "",
    f"{_SSL}DnsSanInput": "",
    f"{_SSL}SubjectInput": "",
    _HEADER: "header_name",
}


def _ip(address: Callable[[Any], Any]) -> Callable[[Any], Input]:
    def read(info: Any) -> bytes | None:
        found = address(info)
        return found.ip.encode() if found.kind == "ip" else None

    return lambda _: Input(read)


def _port(address: Callable[[Any], Any]) -> Callable[[Any], Input]:
    def read(info: Any) -> bytes | None:
        found = address(info)
        return b"%d" % found.port if found.kind == "ip" else None

    return lambda _: Input(read)


def _local(info: Any) -> Any:
    return info.connection.local


def _remote(info: Any) -> Any:
    return info.remote or info.connection.remote


def _direct_remote(info: Any) -> Any:
    return info.connection.direct_remote


def _server_name(_: Any) -> Input:
    return Input(lambda info: (info.connection.server_name or "").encode() or None)


def _certificate(text: Callable[[Any], str]) -> Callable[[Any], Input]:
    def read(info: Any) -> Any:
        tls = info.connection.tls
        if tls is None:
            return INSUFFICIENT
        certificate = tls.peer_certificate
        return None if certificate is None else text(certificate).encode() or None

    return lambda _: Input(read)


def _header(proto: Any) -> Input:
    name = proto.header_name.lower().encode()

    def read(info: Any) -> bytes | None:
        values = info.request.get_all(name)
        return b",".join(values) if values else None

    return Input(read, repeatable=name != b"x-request-id")


def _metadata(proto: Any) -> Input:
    if not proto.filter:
        errors.fail("filter", "must not be empty")
    if not proto.path:
        errors.fail("path", "at least one is needed")
    namespace, path = proto.filter, tuple(segment.key for segment in proto.path)
    return Input(lambda info: matchers.metadata_value(info.metadata, namespace, path), METADATA, repeatable=False)


def _filter_state(proto: Any) -> Input:
    if not proto.key:
        errors.fail("key", "must not be empty")
    key = proto.key

    def read(info: Any) -> bytes | None:
        value = info.filter_state.get(key)
        if isinstance(value, str):
            return value.encode("utf-8", "surrogateescape")
        return value if isinstance(value, bytes) else None

    return Input(read, repeatable=False)


# What the network RBAC filter may look at.
CONNECTION: dict[str, Callable[[Any], Input]] = {
    f"{_NETWORK}DestinationIPInput": _ip(_local),
    f"{_NETWORK}DestinationPortInput": _port(_local),
    f"{_NETWORK}SourceIPInput": _ip(_remote),
    f"{_NETWORK}SourcePortInput": _port(_remote),
    f"{_NETWORK}DirectSourceIPInput": _ip(_direct_remote),
    f"{_NETWORK}ServerNameInput": _server_name,
    # Listeners are in no namespace but the process's own (network_namespace_filepath is refused), which has no name.
    f"{_NETWORK}NetworkNamespaceInput": lambda _: Input(lambda info: None),
    f"{_NETWORK}FilterStateInput": _filter_state,
    f"{_SSL}UriSanInput": _certificate(lambda certificate: ",".join(certificate.uri_sans)),
    f"{_SSL}DnsSanInput": _certificate(lambda certificate: ",".join(certificate.dns_sans)),
    f"{_SSL}SubjectInput": _certificate(lambda certificate: certificate.subject),
}
# What the HTTP RBAC filter may look at.
REQUEST = CONNECTION | {_HEADER: _header, f"{_NETWORK}DynamicMetadataInput": _metadata}
