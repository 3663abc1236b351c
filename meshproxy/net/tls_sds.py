"""TLS whose certificates or authorities come by discovery: made anew whenever one of them changes.

Connections that have shaken hands keep what they have; the next handshake takes the new material. Until all secrets are there, nobody can shake hands.
"""

from __future__ import annotations

import logging
import ssl
from typing import TYPE_CHECKING, Any

from meshproxy.api import secrets
from meshproxy.api.errors import ConfigError, under
from meshproxy.net import tls_stats
from meshproxy.net.tls import DownstreamTls, UpstreamTls, compile_downstream, compile_upstream

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.net.tls import HandshakeObject
    from meshproxy.observe.stats import Scope

log = logging.getLogger(__name__)


class _Discovered:
    """What both sides have in common: the message with its references, and the compiler. `counter`: of times when there was no secret yet."""

    ready = False

    def _watch(self, proto: Any, known: secrets.Secrets, compile: Callable[[Any], Any], scope: Scope, counter: str) -> None:
        self._references = proto
        self._known = known
        self._compile = compile
        self._scope = scope
        self._not_ready = counter
        keys = {secrets.key_of(reference) for reference, _ in secrets.discovered(proto.common_tls_context)}
        known.watch(keys, self)
        # As Envoy, which makes something of each as it comes.
        self._updates = scope.counter("ssl_context_update_by_sds", shared=True)
        self._updates.n += sum(key in known.discovered for key in keys)
        self._make(first=True)

    def secrets_changed(self) -> None:
        """One of them is new."""
        self._updates.n += 1
        self._make()

    def _make(self, *, first: bool = False) -> None:
        """Compile, if everything is there. Raises ConfigError the first time; later what was there before stays."""
        proto = type(self._references)()
        proto.CopyFrom(self._references)
        try:
            with under("common_tls_context"):
                secrets.inline(proto.common_tls_context, self._known)
        except secrets.MissingSecret:
            return
        try:
            made = self._compile(proto)
        except ConfigError as error:
            if first:
                raise
            log.warning("secrets cannot be used: %s", error)
            return
        self.__dict__.update(made.__dict__)
        self.ready = True

    def _refuse(self) -> ssl.SSLError:
        self._scope.counter(self._not_ready).n += 1
        return ssl.SSLError("Secret is not supplied by SDS")


class DownstreamSds(_Discovered, DownstreamTls):
    """For the connections of a filter chain; `ready`: whether they can shake hands."""

    def __init__(self, proto: Any, scope: Scope, known: secrets.Secrets, ticket_seed: bytes = b"") -> None:
        tls_stats.declare(scope, server_side=True)
        factory = scope.scope("server_ssl_socket_factory.")
        self._watch(proto, known, lambda whole: compile_downstream(whole, scope, None, ticket_seed), factory, "downstream_context_secrets_not_ready")

    def refuse(self) -> None:
        """A connection came too early."""
        self._refuse()


class UpstreamSds(_Discovered, UpstreamTls):
    """For the connections to a cluster."""

    def __init__(self, proto: Any, scope: Scope, known: secrets.Secrets) -> None:
        self.sni = proto.sni
        self.auto_host_sni = proto.auto_host_sni
        self.auto_sni_san_validation = proto.auto_sni_san_validation
        self.alpn = tuple(proto.common_tls_context.alpn_protocols)
        tls_stats.declare(scope, server_side=False)
        factory = scope.scope("client_ssl_socket_factory.")
        self._watch(proto, known, lambda whole: compile_upstream(whole, scope), factory, "upstream_context_secrets_not_ready")

    def wrap(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **names: Any) -> HandshakeObject:
        """See UpstreamTls. Raises ssl.SSLError while there are no secrets."""
        if not self.ready:
            raise self._refuse()
        return super().wrap(incoming, outgoing, **names)
