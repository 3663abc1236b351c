"""SDS: certificates with their keys, and validation contexts, that TLS contexts refer to.

What a secret names of files is read here, once for all processes, and put into it: workers get bytes. Files are read again when something is moved into
their folders, or into the one that the secret names (`watched_directory`), as Envoy does it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.api import datasource, messages, secrets
from meshproxy.api.errors import ConfigError, fail, under
from meshproxy.net import tls_config
from meshproxy.xds.needs import Need, Wanted
from meshproxy.xds.resources import SECRETS

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.xds.resources import Update
    from meshproxy.xds.sources import Sources
    from meshproxy.xds.subscription import Rules

log = logging.getLogger("meshproxy.config")

ATTEMPTS = 5  # to read the files of a secret twice alike: somebody may be replacing them, one by one
# What of a secret is watched, if it is a file.
_WATCHED = {"tls_certificate": ("certificate_chain", "private_key"), "validation_context": ("trusted_ca", "crl")}
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
    """The watcher of one secret of a kind (`tls_certificate` or `validation_context`). `serialised`: as it is in use, without file names."""

    def __init__(self, reference: Any, kind: str, owner: Secrets) -> None:
        self._secret = secrets.key_of(reference)
        super().__init__(b"secret:" + self._secret)
        self.name: str = reference.name
        self.kind = kind
        self.version = ""
        self.serialised = b""
        self.updated_at = owner.context.wall()  # Unix time
        self._owner = owner
        self._proto: Any = None  # as it came
        self._came = b""
        self._watches: list[Callable[[], None]] = []
        scope = owner.context.stats.scope(f"sds.{self.name}.")
        self._failed_rotations = scope.counter("key_rotation_failed")
        with under("sds_config"):
            self.subscription = owner.sources.subscribe(reference.sds_config, SECRETS, self.name, self, scope)

    def updated(self, update: Update) -> None:
        """An answer. Raises ConfigError."""
        if not update.resources:
            if not update.removed:
                fail("", f"Missing SDS resources for {self.name} in onConfigUpdate()")
            self.settle()
            return  # as Envoy: what is in use stays
        if len(update.resources) != 1:
            fail("", f"Unexpected SDS secrets length: {len(update.resources)}")
        proto = update.resources[0].message
        if proto is None:
            return
        if proto.name != self.name:
            fail("", f"Unexpected SDS secret (expecting {self.name}): {proto.name}")
        serialised = proto.SerializeToString(deterministic=True)
        if serialised != self._came:
            self._owner.rules.check(proto)
            watches = self._watch(proto)
            try:
                self._use(self._resolved(proto))
            except ConfigError:
                _end(watches)
                raise
            _end(self._watches)
            self._watches = watches
            self._proto, self._came = proto, serialised
            self.version = update.version
            self.updated_at = self._owner.context.wall()
        self.settle()

    def _use(self, resolved: Any) -> None:
        """Take what has no file names any more. Raises ConfigError."""
        serialised = resolved.SerializeToString(deterministic=True)
        if serialised == self.serialised:
            return
        self._check(resolved)
        self.serialised = serialised
        self._owner.tell(self._secret, serialised)

    # -- files

    def _files(self, proto: Any) -> list[Any]:
        """The DataSources of a secret that are files."""
        material = getattr(proto, self.kind)
        return [source for name in _WATCHED[self.kind] if (source := getattr(material, name)).WhichOneof("specifier") == "filename"]

    def _resolved(self, proto: Any) -> Any:
        """The secret with what is in its files in the place of their names, read until it is twice the same. Raises ConfigError."""
        if proto.WhichOneof("type") != self.kind or not self._files(proto):
            return proto
        before = _inlined(proto, self._files)
        for _ in range(ATTEMPTS):
            now = _inlined(proto, self._files)
            if now == before:
                break
            before = now
        return before

    def _watch(self, proto: Any) -> list[Callable[[], None]]:
        """Watch the folders that tell of changes; returns what ends that. Raises ConfigError."""
        if proto.WhichOneof("type") != self.kind:
            return []
        files = self._files(proto)
        directory = getattr(proto, self.kind).watched_directory.path
        # As Envoy, which looks once for each of the files, and counts each failure.
        folders = [directory] if directory else [os.path.dirname(source.filename) or "." for source in files]
        watches: list[Callable[[], None]] = []
        try:
            for folder in folders if files else ():
                watches.append(self._owner.sources.watches.folder(folder, lambda: self._moved()))
        except OSError as error:
            _end(watches)
            fail("", f"unable to add filesystem watch for file {folder}: {error.strerror}")
        return watches

    def _moved(self) -> None:
        """Something was moved into a folder: if a file has become another, the secret has."""
        try:
            self._use(self._resolved(self._proto))
        except ConfigError as error:
            log.warning("%s: what was read before stays in use: %s", self.subscription, error)
            self._failed_rotations.n += 1

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
        _end(self._watches)
        self._owner.tell(self._secret, b"")


def _end(watches: list[Callable[[], None]]) -> None:
    for end in watches:
        end()
    watches.clear()


def _inlined(proto: Any, files: Callable[[Any], list[Any]]) -> Any:
    copy = type(proto)()
    copy.CopyFrom(proto)
    for source in files(copy):
        source.inline_bytes = datasource.read(source)
    return copy
