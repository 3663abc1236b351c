"""`meshctl proxy-config secrets`: the certificates and authorities that a proxy has. Nobody tells keys: neither the control plane nor a proxy's admin."""

from __future__ import annotations

import datetime as dt
import http.client
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from control.output import table
from control.query import QueryError
from meshproxy.api import messages

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_SECRET = "envoy.extensions.transport_sockets.tls.v3.Secret"
_MAX_BYTES = 64 << 20
_STATES = ("dynamic_active_secrets", "dynamic_warming_secrets", "static_secrets")
CERTIFICATE, AUTHORITY, OTHER = "certificate", "authority", "other"
_HEAD = ("NAME", "TYPE", "VALID", "SERIAL NUMBER", "NOT BEFORE", "NOT AFTER", "OF")


def of_admin(host: str, port: int, timeout_s: float = 10.0) -> list[Any]:
    """The Secrets that a proxy has, by what its admin endpoints say, ours or Envoy's; those that it waits for are empty. Raises QueryError."""
    return [messages.known(_SECRET).FromString(one.value) for state in _STATES for one in _dumped(host, port, state, timeout_s)]


def _dumped(host: str, port: int, state: str, timeout_s: float) -> Iterator[Any]:
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", f"/config_dump?resource={state}")
        answer = connection.getresponse()
        data = answer.read(_MAX_BYTES)
        if answer.status != 200:
            raise QueryError(f"{host}:{port}: {answer.status} {answer.reason}: {data[:200].decode(errors='replace')}")
        dump = messages.known("envoy.admin.v3.ConfigDump")()
        messages.known(_SECRET)  # so that it can be read within the dump
        messages.known("envoy.admin.v3.SecretsConfigDump")
        json_format.Parse(data, dump)
    except (OSError, http.client.HTTPException) as error:
        raise QueryError(f"{host}:{port}: {getattr(error, 'strerror', '') or error}") from error
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise QueryError(f"{host}:{port}: this is no admin address of a proxy: {error}") from error
    finally:
        connection.close()
    for packed in dump.configs:
        yield messages.known(messages.full_name(packed.type_url)).FromString(packed.value).secret


def secret_table(found: Iterable[Any], now: dt.datetime) -> str:
    """For people: a line for each certificate, with whom it is of. Of a chain, the first one."""
    return table([_HEAD, *(row for one in found for row in _rows(one, now))])


def _rows(secret: Any, now: dt.datetime) -> Iterator[tuple[str, ...]]:
    kind, source = _source(secret)
    where = source.filename if source is not None and source.filename else ""
    found = _certificates(source) if source is not None else []
    if not found:
        yield secret.name, kind, "-", "-", "-", "-", where or "-"
    for one in found[:1] if kind == CERTIFICATE else found:
        begin, end = one.not_valid_before_utc, one.not_valid_after_utc
        valid = "not yet" if now < begin else "expired" if now > end else "yes"
        yield secret.name, kind, valid, f"{one.serial_number:x}", _time(begin), _time(end), _whom(one)


def _source(secret: Any) -> tuple[str, Any]:
    which = secret.WhichOneof("type")
    if which == "tls_certificate":
        return CERTIFICATE, secret.tls_certificate.certificate_chain
    if which == "validation_context":
        return AUTHORITY, secret.validation_context.trusted_ca
    return (OTHER, None) if which else ("waits for it", None)


def _certificates(source: Any) -> list[Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(source.inline_bytes or source.inline_string.encode())
    except ValueError:  # there are none, or they are in a file of the proxy's machine
        return []


def _whom(one: Certificate) -> str:
    """The names that it is for: an identity, hosts, or else its subject."""
    from cryptography import x509

    try:
        names = one.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return one.subject.rfc4514_string() or "-"
    return ", ".join(str(name.value) for name in names) or "-"


def _time(when: dt.datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M:%SZ}"
