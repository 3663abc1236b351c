"""/certs: the certificates in use, as they were read when their configuration came; and when the first of them expires."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.admin.message import JSON, Request, Response, to_json
from meshproxy.api import datasource, messages, registry, secrets
from meshproxy.api.errors import ConfigError
from meshproxy.net.certificate import Certificate, pem_certificates
from meshproxy.net.listener_stats import stat_prefix
from meshproxy.record import Record, field

if TYPE_CHECKING:
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
        for bundle in server.certificates.bundles(server)
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


class Certificates:
    """Every TLS context of the process: those of the bootstrap from the start on, those of dynamic configuration as far as it has come.

    What is in use was compiled before, so what cannot be read is simply not shown.
    """

    def __init__(self, bootstrap: Any, serialised: bytes) -> None:
        """`serialised`: the same bootstrap. Few of a thousand clusters have TLS contexts, and most often none has."""
        self._known = secrets.Secrets(bootstrap.static_resources.secrets)
        self._waiting: list[tuple[str, Any]] = []  # of the bootstrap, with secrets by discovery
        self._static: list[Bundle] = []
        self._dynamic: dict[tuple[str, bytes, tuple[bytes, ...]], Bundle] = {}
        self._seen: object = None
        for prefix, context in _contexts(bootstrap) if secrets.TLS in serialised else ():
            if any(True for _ in secrets.discovered(context)):
                self._waiting.append((prefix, context))
            else:
                self._static.append(_bundle(prefix, context, self._known))

    def bundles(self, server: Server) -> list[Bundle]:
        """All of them, now."""
        self.refresh(server)
        return [*self._static, *self._dynamic.values()]

    def refresh(self, server: Server) -> None:
        """Look at what has changed, and bring the gauges up to date that say when certificates expire (Unix seconds)."""
        dynamic, manager = server.dynamic, server.listeners_manager
        now = (dynamic.generation, manager.generation) if dynamic is not None else 0
        if now == self._seen:
            return
        new = self._static if self._seen is None else []
        self._seen = now
        if dynamic is not None:
            before, self._dynamic = self._dynamic, {}
            known = dynamic.known_secrets
            for prefix, context in (*self._waiting, *_dynamic_contexts(server)):
                came = [known.discovered.get(secrets.key_of(reference)) for reference, _ in secrets.discovered(context)]
                if None in came:
                    continue  # nobody can use it yet
                key = prefix, context.SerializeToString(deterministic=True), tuple(came)
                self._dynamic[key] = before.get(key) or _bundle(prefix, context, known)
            new = [*new, *self._dynamic.values()]
        for bundle in new:
            scope = server.stats.scope(f"{bundle.prefix}ssl.certificate.")
            for name, not_after in bundle.expirations:
                scope.gauge(f"{name}.expiration_unix_time_seconds").n = not_after


def _bundle(prefix: str, context: Any, known: secrets.Secrets) -> Bundle:
    bundle = Bundle(prefix)
    names, authority = secrets.names(context)
    whole = type(context)()
    whole.CopyFrom(context)
    secrets.inline(whole, known)
    for at, certificate in enumerate(whole.tls_certificates):
        name = names[at] if names else _unnamed("cert", certificate.certificate_chain)
        bundle.add(bundle.chains, _read(certificate.certificate_chain)[:1], name)
    trusted = whole.validation_context.trusted_ca
    bundle.add(bundle.authorities, _read(trusted), authority or _unnamed("ca_cert", trusted))
    return bundle


def _unnamed(kind: str, source: Any) -> str:
    """What Envoy calls a certificate that is no secret's. Those from files have no bytes of their own: it shows but one of them."""
    from hashlib import sha256

    return f"unnamed_{kind}_{sha256(source.inline_bytes).hexdigest()[:8]}"


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
        yield from _of_listener(listener)
    for cluster in bootstrap.static_resources.clusters:
        yield from _of_cluster(cluster)


def _dynamic_contexts(server: Server) -> Iterator[tuple[str, Any]]:
    """The same of what came by an API."""
    listeners = [one for one in server.listeners if one.via_api] + [one.listener for one in server.listeners_manager.draining if not one.chains]
    for one in listeners:
        if secrets.TLS in one.serialised:
            yield from _of_listener(messages.known("envoy.config.listener.v3.Listener").FromString(one.serialised))
    for active in server.dynamic.clusters.active.values() if server.dynamic.clusters is not None else ():
        if secrets.TLS in active.serialised:
            yield from _of_cluster(messages.known("envoy.config.cluster.v3.Cluster").FromString(active.serialised))


def _of_listener(listener: Any) -> Iterator[tuple[str, Any]]:
    for chain in (*listener.filter_chains, listener.default_filter_chain):
        yield from _inside(stat_prefix(listener), chain)


def _of_cluster(cluster: Any) -> Iterator[tuple[str, Any]]:
    for holder in (cluster, *cluster.transport_socket_matches):
        yield from _inside(f"cluster.{cluster.alt_stat_name or cluster.name}.", holder)


def _inside(prefix: str, holder: Any) -> Iterator[tuple[str, Any]]:
    if holder.HasField("transport_socket"):
        socket = secrets.innermost(holder.transport_socket)
        if socket.WhichOneof("config_type") is None:
            return
        config = registry.unpack(socket.typed_config)
        if "common_tls_context" in config.DESCRIPTOR.fields_by_name:
            yield prefix, config.common_tls_context
