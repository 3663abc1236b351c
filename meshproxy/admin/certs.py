"""/certs: the certificates of the configuration, as they were read at the start; and when the first of them expires."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.admin.message import JSON, Request, Response, to_json
from meshproxy.api import datasource, registry
from meshproxy.api.errors import ConfigError
from meshproxy.net.certificate import Certificate, pem_certificates
from meshproxy.record import Record, field

if TYPE_CHECKING:
    from meshproxy.server import Server

_DAY = 86_400


class Bundle(Record):
    """The certificates of one TLS context, with where each came from."""

    authorities: list[tuple[str, Certificate]] = field(default_factory=list)
    chains: list[tuple[str, Certificate]] = field(default_factory=list)


def certs(request: Request, server: Server) -> Response:
    """JSON (envoy.admin.v3.Certificates)."""
    now = time.time()
    entries = []
    for bundle in server.certificates:
        entry = {}
        if bundle.authorities:
            entry["ca_cert"] = [_details(path, certificate, now) for path, certificate in bundle.authorities]
        if bundle.chains:
            entry["cert_chain"] = [_details(path, certificate, now) for path, certificate in bundle.chains]
        entries.append(entry)
    return Response(to_json({"certificates": entries}), content_type=JSON)


def _details(path: str, certificate: Certificate, now: float) -> dict[str, Any]:
    names: list[dict[str, str]] = [{"dns": name} for name in certificate.dns_sans]
    names += [{"uri": name} for name in certificate.uri_sans]
    names += [{"ip_address": str(ipaddress.ip_address(packed))} for packed in certificate.ip_sans]
    return {
        "path": path,
        "serial_number": certificate.serial,
        "subject_alt_names": names,
        "days_until_expiration": str(_days_left(certificate, now)),
        "valid_from": _timestamp(certificate.not_before),
        "expiration_time": _timestamp(certificate.not_after),
    }


def _days_left(certificate: Certificate, now: float) -> int:
    return max(0, int((certificate.not_after - now) // _DAY))


def _timestamp(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def days_until_first_expires(bundles: list[Bundle], now: float, default: int) -> int:
    """Days until the first certificate expires; `default` when there is none."""
    days = [_days_left(certificate, now) for bundle in bundles for _, certificate in (*bundle.chains, *bundle.authorities)]
    return min(days, default=default)


# -- gathering -----------------------------------------------------------------------------------------------------------------------------------------------


def collect(bootstrap: Any) -> list[Bundle]:
    """Every TLS context of a bootstrap that has certificates. It was compiled before, so what cannot be read is simply not shown."""
    bundles = []
    for context in _contexts(bootstrap):
        bundle = Bundle()
        for certificate in context.tls_certificates:
            bundle.chains += _read(certificate.certificate_chain)[:1]
        which = context.WhichOneof("validation_context_type")
        if which in ("validation_context", "combined_validation_context"):
            validation = context.validation_context if which == "validation_context" else context.combined_validation_context.default_validation_context
            if validation.HasField("trusted_ca"):
                bundle.authorities += _read(validation.trusted_ca)
        if bundle.chains or bundle.authorities:
            bundles.append(bundle)
    return bundles


def _read(source: Any) -> list[tuple[str, Certificate]]:
    path = source.filename or "<inline>"
    try:
        data = datasource.read(source)
        return [(path, certificate) for certificate in pem_certificates(data.encode() if isinstance(data, str) else data)]
    except (ConfigError, OSError, ValueError):
        return []


def _contexts(bootstrap: Any) -> Iterator[Any]:
    """Every CommonTlsContext of the listeners and clusters."""
    for listener in bootstrap.static_resources.listeners:
        for chain in (*listener.filter_chains, listener.default_filter_chain):
            yield from _inside(chain)
    for cluster in bootstrap.static_resources.clusters:
        yield from _inside(cluster)
        for match in cluster.transport_socket_matches:
            yield from _inside(match)


def _inside(holder: Any) -> Iterator[Any]:
    if holder.HasField("transport_socket"):
        config = registry.unpack(holder.transport_socket.typed_config)
        if "common_tls_context" in config.DESCRIPTOR.fields_by_name:
            yield config.common_tls_context
