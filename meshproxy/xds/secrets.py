"""SDS: certificates with their keys, and validation contexts, that TLS contexts refer to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.api import messages, secrets
from meshproxy.api.errors import fail, under
from meshproxy.net import tls_config
from meshproxy.xds.needs import Need, Wanted
from meshproxy.xds.resources import SECRETS

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.xds.resources import Update
    from meshproxy.xds.sources import Sources
    from meshproxy.xds.subscription import Rules

_CommonTlsContext = "envoy.extensions.transport_sockets.tls.v3.CommonTlsContext"


class Secrets:
    """What all of them have in common. `tell(key, serialised)` is how this process and the workers hear of a new one, empty when nobody needs it any more."""

    def __init__(self, sources: Sources, context: Context, rules: Rules, tell: Callable[[bytes, bytes], None]) -> None:
        self.sources = sources
        self.context = context
        self.rules = rules
        self.tell = tell

    def wanted(self, holder: Any) -> Iterator[Wanted]:
        """What a Listener or a Cluster needs of it."""
        for reference, kind in secrets.references(holder):
            key = b"secret:" + secrets.key_of(reference)
            yield Wanted(key, lambda reference=reference, kind=kind: SecretSubscription(reference, kind, self))  # type: ignore[misc]


class SecretSubscription(Need):
    """The watcher of one secret of a kind (`tls_certificate` or `validation_context`)."""

    def __init__(self, reference: Any, kind: str, owner: Secrets) -> None:
        self._secret = secrets.key_of(reference)
        super().__init__(b"secret:" + self._secret)
        self.name: str = reference.name
        self.kind = kind
        self.version = ""
        self.serialised = b""
        self.updated_at = owner.context.wall()  # Unix time
        self._owner = owner
        scope = owner.context.stats.scope(f"sds.{self.name}.")
        scope.declare("counter", ("key_rotation_failed",))
        with under("sds_config"):
            self.subscription = owner.sources.subscribe(reference.sds_config, SECRETS, self.name, self, scope)

    def updated(self, update: Update) -> None:
        """An answer. Raises ConfigError."""
        if not update.resources:
            if not update.removed:
                fail("", f"Missing SDS resources for {self.name} in onConfigUpdate()")
            return  # as Envoy: what is in use stays
        if len(update.resources) != 1:
            fail("", f"Unexpected SDS secrets length: {len(update.resources)}")
        proto = update.resources[0].message
        if proto is None:
            return
        if proto.name != self.name:
            fail("", f"Unexpected SDS secret (expecting {self.name}): {proto.name}")
        serialised = proto.SerializeToString(deterministic=True)
        if serialised != self.serialised:
            self._owner.rules.check(proto)
            self._check(proto)
            self.serialised = serialised
            self.version = update.version
            self.updated_at = self._owner.context.wall()
            self._owner.tell(self._secret, serialised)
        self.settle()

    def _check(self, proto: Any) -> None:
        """Read it as a TLS context would."""
        if proto.WhichOneof("type") != self.kind:
            fail("", f"secret {self.name} is no {self.kind}")
        common = messages.known(_CommonTlsContext)()
        if self.kind == "tls_certificate":
            common.tls_certificates.append(proto.tls_certificate)
        else:
            common.validation_context.CopyFrom(proto.validation_context)
        tls_config.compile_common(common, server_side=False)

    def dropped(self) -> None:
        """Nobody needs it any more."""
        self._owner.tell(self._secret, b"")
