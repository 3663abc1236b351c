"""/certs: the certificates of the configuration, as they were read at the start; and when the first of them expires."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.admin.message import JSON, Request, Response, to_json
from meshproxy.api import datasource, registry, secrets
from meshproxy.api.errors import ConfigError
from meshproxy.net import sockets
from meshproxy.net.certificate import Certificate, pem_certificates
from meshproxy.record import Record, field

if TYPE_CHECKING:
    from meshproxy.observe.stats import Store
    from meshproxy.server import Server

_DAY = 86_400


class Bundle(Record):
    """The certificates of one TLS context, with where each came from. `prefix`: of the stats of its listener or cluster; `expirations`: name, Unix time."""

    prefix: str
    authorities: list[tuple[str, Certificate]] = field(default_factory=list)
    chains: list[tuple[str, Certificate]] = field(default_factory=list)
    expirations: list[tuple[str, int]] = field(default_factory=list)

    def add(self, to: list[tuple[str, Certificate]], found: list[tuple[str, Certificate]], name: str) -> None:
        """Add the certificates that one name stands for."""
        to += found
        self.expirations += [(name, certificate.not_after) for _, certificate in found[:1]]


def certs(request: Request, server: Server) -> Response:
    """JSON (envoy.admin.v3.Certificates)."""
    now = time.time()
    entries = [
        {
            "ca_cert": [_details(path, certificate, now) for path, certificate in bundle.authorities],
            "cert_chain": [_details(path, certificate, now) for path, certificate in bundle.chains],
        }
        for bundle in server.certificates
    ]
    return Response(to_json({"certificates": entries}), content_type=JSON)


def _details(path: str, certificate: Certificate, now: float) -> dict[str, Any]:
    names: list[dict[str, str]] = [{"dns": name} for name in certificate.dns_sans]
    names += [{"uri": name} for name in certificate.uri_sans]
    import ipaddress

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
    """Every TLS context of a bootstrap. It was compiled before, so what cannot be read is simply not shown."""
    known = secrets.Secrets(bootstrap.static_resources.secrets)
    bundles = []
    for prefix, context in _contexts(bootstrap):
        bundle = Bundle(prefix)
        names, authority = secrets.names(context)
        try:
            secrets.inline(context, known)
        except secrets.MissingSecret:
            continue  # by discovery, which has not begun
        for at, certificate in enumerate(context.tls_certificates):
            name = names[at] if names else _unnamed("cert", certificate.certificate_chain)
            bundle.add(bundle.chains, _read(certificate.certificate_chain)[:1], name)
        trusted = context.validation_context.trusted_ca
        bundle.add(bundle.authorities, _read(trusted), authority or _unnamed("ca_cert", trusted))
        bundles.append(bundle)
    return bundles


def _unnamed(kind: str, source: Any) -> str:
    """What Envoy calls a certificate that is no secret's. Those from files have no bytes of their own: it shows but one of them."""
    from hashlib import sha256

    return f"unnamed_{kind}_{sha256(source.inline_bytes).hexdigest()[:8]}"


def show_expirations(bundles: list[Bundle], stats: Store) -> None:
    """The gauges that say when certificates expire, in Unix seconds."""
    for bundle in bundles:
        scope = stats.scope(f"{bundle.prefix}ssl.certificate.")
        for name, not_after in bundle.expirations:
            scope.gauge(f"{name}.expiration_unix_time_seconds").n = not_after


def _read(source: Any) -> list[tuple[str, Certificate]]:
    path = source.filename or "<inline>"
    try:
        data = datasource.read(source)
        return [(path, certificate) for certificate in pem_certificates(data.encode() if isinstance(data, str) else data)]
    except (ConfigError, OSError, ValueError):
        return []


def _contexts(bootstrap: Any) -> Iterator[tuple[str, Any]]:
    """Every CommonTlsContext of the listeners and clusters, with the prefix of its stats."""
    for listener in bootstrap.static_resources.listeners:
        prefix = f"listener.{listener.stat_prefix or sockets.addresses(listener)[0].text}."
        for chain in (*listener.filter_chains, listener.default_filter_chain):
            yield from _inside(prefix, chain)
    for cluster in bootstrap.static_resources.clusters:
        prefix = f"cluster.{cluster.alt_stat_name or cluster.name}."
        for holder in (cluster, *cluster.transport_socket_matches):
            yield from _inside(prefix, holder)


def _inside(prefix: str, holder: Any) -> Iterator[tuple[str, Any]]:
    if holder.HasField("transport_socket"):
        config = registry.unpack(holder.transport_socket.typed_config)
        if "common_tls_context" in config.DESCRIPTOR.fields_by_name:
            yield prefix, config.common_tls_context
