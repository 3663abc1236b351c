"""What an authorisation service is told: the CheckRequest of a request or of a connection.

Source: envoy.service.auth.v3.AttributeContext. What is text there and not UTF-8 here has an exclamation mark for each byte that is none.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from meshproxy.api import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from meshproxy.codec.headers import RequestHead
    from meshproxy.net.address import Address
    from meshproxy.net.connection import ConnectionInfo

    Matches = Callable[[bytes], bool]

PARTIAL_BODY = b"x-envoy-auth-partial-body"
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


class Attributes:
    """How the requests of one filter are told. `labels`: of the destination; `allows`, `disallows`: of headers, by name, None: all and none of them."""

    def __init__(
        self,
        *,
        certificate: bool = False,
        session: bool = False,
        labels: Mapping[str, str] | None = None,
        raw_headers: bool = False,
        raw_body: bool = False,
        allows: Matches | None = None,
        disallows: Matches | None = None,
    ) -> None:
        self._certificate = certificate
        self._session = session
        self._labels = dict(labels or {})
        self._raw_headers = raw_headers
        self._raw_body = raw_body
        self._allows = allows
        self._disallows = disallows
        self._request: Any = messages.known("envoy.service.auth.v3.CheckRequest")

    def of_connection(self, connection: ConnectionInfo) -> Any:
        """The CheckRequest for a connection."""
        made = self._request()
        self._ends(made.attributes, connection, service=b"", server_name=connection.server_name or "")
        return made

    def of_request(self, stream: Any, number: int, extensions: Mapping[str, str], size: int, body: tuple[bytes, bool] | None) -> Any:
        """The CheckRequest for a request. `number`: any, of 64 bits; `size`: of the body so far; `body`: its beginning, and whether there is more of it."""
        made = self._request()
        attributes = made.attributes
        head: RequestHead = stream.request
        self._ends(attributes, stream.connection, service=head.get(b"x-envoy-downstream-service-cluster") or b"", server_name="")
        attributes.request.time.FromNanoseconds(round(stream.start_wall * 1e9))
        http = attributes.request.http
        http.id = str(number)
        http.method = text(head.method)
        http.path = text(head.path)
        http.host = text(head.authority)
        http.scheme = text(head.scheme)
        http.size = size
        http.protocol = stream.protocol
        fields = self._fields(head)
        if body is not None:
            data, partial = body
            if self._raw_body:
                http.raw_body = data
            else:
                http.body = text(data)
            fields.append((PARTIAL_BODY, b"true" if partial else b"false"))
        if self._raw_headers:
            http.header_map.SetInParent()
            for name, value in fields:
                http.header_map.headers.add(key=text(name), raw_value=value)
        else:
            headers = http.headers
            for name, value in fields:
                key = text(name)
                headers[key] = f"{headers[key]},{text(value)}" if key in headers else text(value)
        attributes.context_extensions.update(extensions)
        return made

    def _ends(self, attributes: Any, connection: ConnectionInfo, *, service: bytes, server_name: str) -> None:
        source, destination = attributes.source, attributes.destination
        _set_address(source.address, connection.remote)
        _set_address(destination.address, connection.local)
        tls = connection.tls
        if tls is not None:
            peer = tls.peer_certificate
            source.principal = _principal(peer)
            destination.principal = _principal(tls.local_certificate)
            if self._certificate and peer is not None:
                source.certificate = quote(peer.pem, safe="")
        if service:
            source.service = text(service)
        if server_name:
            destination.service = server_name
        destination.labels.update(self._labels)
        if self._session:
            attributes.tls_session.SetInParent()
            if connection.server_name:
                attributes.tls_session.sni = connection.server_name

    def _fields(self, head: RequestHead) -> list[tuple[bytes, bytes]]:
        """The headers that the service gets, pseudo-headers first."""
        pseudo = ((b":authority", head.authority), (b":path", head.path), (b":method", head.method), (b":scheme", head.scheme))
        fields = [(name, value) for name, value in pseudo if value]
        if head.protocol:
            fields.append((b":protocol", head.protocol))
        fields += head.items
        allows, disallows = self._allows, self._disallows
        return [
            pair for pair in fields if pair[0] != PARTIAL_BODY and not (disallows is not None and disallows(pair[0])) and (allows is None or allows(pair[0]))
        ]


def add_metadata(proto: Any, namespaces: tuple[str, ...], sources: tuple[Mapping[str, Any] | None, ...]) -> None:
    """Put into a Metadata what the first of the sources that knows a namespace has in it."""
    for name in namespaces:
        for source in sources:
            if source is not None and name in source:
                proto.filter_metadata[name].update(source[name])
                break


def bootstrap_labels(key: str, node: Any) -> dict[str, str]:
    """The labels of the destination: what the bootstrap's node has in its metadata under `key`."""
    if node is None or key not in node.metadata.fields:
        return {}
    return {name: value.string_value for name, value in node.metadata.fields[key].struct_value.fields.items()}


def text(value: bytes) -> str:
    """Bytes as the text of a message."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return _NOT_UTF8.sub("!", value.decode("utf-8", "surrogateescape"))


def _set_address(proto: Any, address: Address) -> None:
    if address.kind == "pipe":
        proto.pipe.path = address.path
        return
    proto.socket_address.address = address.ip
    proto.socket_address.port_value = address.port


def _principal(certificate: Any) -> str:
    """Whose certificate it is: by its first URI, DNS name, or its subject."""
    if certificate is None:
        return ""
    names = certificate.uri_sans or certificate.dns_sans
    return text(names[0].encode("latin-1")) if names else certificate.subject
