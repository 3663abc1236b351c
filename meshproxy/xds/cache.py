"""The last accepted configuration on disk (`--config-cache DIR`): a sidecar that is restarted while its control plane is away comes up with it.

A file for each subscription to a control plane, a DiscoveryResponse with its resources in envelopes; its nonce is a digest of all the rest. Secrets are never
written: an identity has to be obtained anew. The folder is ours alone (mode 0700), files are replaced whole, and go with the last who subscribes. A disk that
is full costs the cache, never the configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from xxhash import xxh64_hexdigest

from meshproxy.api import messages
from meshproxy.api.errors import ConfigError
from meshproxy.scheduling import turns
from meshproxy.xds.resources import SECRETS, Update, unpack

if TYPE_CHECKING:
    import asyncio

    from meshproxy.xds.resources import Resource, ResourceType

log = logging.getLogger("meshproxy.config")

_D = "envoy.service.discovery.v3."
DELAY = 0.5  # seconds between the first of some changes and their being written
RETRY = 5.0  # seconds until what could not be written is tried again


class Cache:
    """The folder. Construction makes it; raises ConfigError."""

    def __init__(self, folder: str, loop: asyncio.AbstractEventLoop) -> None:
        self._folder = folder
        self._loop = loop
        self._entries: dict[str, Entry] = {}
        self._due: set[Entry] = set()
        self._failing: set[Entry] = set()  # those of which the log has been told
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if os.stat(folder).st_mode & 0o022:
                raise ConfigError(f"--config-cache: others may write to {folder}")
        except OSError as error:
            raise ConfigError(f"--config-cache: {folder}: {error.strerror}") from error

    def entry(self, type: ResourceType, name: str, source: Any) -> Entry | None:
        """What is kept of a subscription, which is to `close` it; None for what must not be kept. `source`: the ConfigSource, as different ones may each have
        something else of that name."""
        if type is SECRETS:
            return None
        api = source.api_config_source.SerializeToString(deterministic=True)  # nothing where it is ADS
        digest = hashlib.sha256(name.encode() + b"\0" + api).hexdigest()[:24]
        file = f"{type.kind.lower()}-{digest}.pb"
        if file not in self._entries:
            self._entries[file] = Entry(self, os.path.join(self._folder, file), type)
        self._entries[file].users += 1
        return self._entries[file]

    def dismiss(self, entry: Entry) -> None:
        """Nobody subscribes any more: what it was is not wanted at the next start."""
        self._entries.pop(os.path.basename(entry.path), None)
        self._due.discard(entry)
        self._failing.discard(entry)
        with contextlib.suppress(OSError):
            os.unlink(entry.path)

    def changed(self, entry: Entry) -> None:
        """Write it soon."""
        if not self._due:
            self._loop.call_later(DELAY, self.flush)
        self._due.add(entry)

    def flush(self) -> None:
        """Write what has changed. What cannot be written now is tried again."""
        due, self._due = self._due, set()
        for entry in due:
            turns.give_way()
            try:
                entry.write()
            except OSError as error:
                self._due.add(entry)
                if entry not in self._failing:
                    log.warning("--config-cache: cannot write %s: %s", entry.path, error.strerror)
            else:
                self._failing.discard(entry)
        if self._due:
            self._failing |= self._due
            self._loop.call_later(RETRY, self.flush)


class Entry:
    """What was accepted of one subscription. `users`: those who subscribe to the same."""

    def __init__(self, cache: Cache, path: str, type: ResourceType) -> None:
        self.path = path
        self.users = 0
        self._cache = cache
        self._type = type
        self._version = ""
        self._kept: dict[str, tuple[str, bytes]] = {}  # name -> version, serialised
        self._when = 0.0  # Unix time of what is in `_kept`; 0.0: nothing is yet

    def close(self) -> None:
        """One user less."""
        self.users -= 1
        if not self.users:
            self._cache.dismiss(self)

    def accepted(self, update: Update, when: float) -> None:
        """Keep what an answer says."""
        if update.complete:
            self._kept.clear()
        self._version, self._when = update.version, when
        for one in update.resources:
            if one.message is not None:
                self._kept[one.name] = one.version, one.message.SerializeToString(deterministic=True)
        for name in update.removed:
            self._kept.pop(name, None)
        self._cache.changed(self)

    def _response(self) -> Any:
        response = messages.known(f"{_D}DiscoveryResponse")(version_info=self._version, type_url=self._type.url)
        for name, (version, serialised) in sorted(self._kept.items()):
            envelope = messages.known(f"{_D}Resource")(name=name, version=version)
            envelope.resource.type_url = self._type.url
            envelope.resource.value = serialised
            response.resources.add().Pack(envelope)
        return response

    def write(self) -> None:
        """Replace the file. Raises OSError."""
        response = self._response()
        response.nonce = _digest(response)
        scratch = f"{self.path}.new"
        try:
            with open(scratch, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(response.SerializeToString(deterministic=True))
            os.replace(scratch, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(scratch)  # the half of it would fill the disk
            raise

    def read(self) -> tuple[Update, float] | None:
        """What was accepted, mostly by an earlier process, and when (Unix time); None when there is nothing (good)."""
        try:
            response, when = (self._response(), self._when) if self._when else self._from_file()
            resources: list[Resource] = [unpack(one, self._type, response.version_info) for one in response.resources]
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("--config-cache: cannot read %s: %s", self.path, error.strerror)
            return None
        except (DecodeError, ValueError) as error:
            log.warning("--config-cache: cannot use %s: %s", self.path, error)
            return None
        if not self._when:  # an answer of delta will only say what is different
            self._version, self._when = response.version_info, when
            self._kept = {one.name: (one.version, one.message.SerializeToString(deterministic=True)) for one in resources if one.message is not None}
        return Update(self._type, response.version_info, resources, complete=self._type.complete), when

    def _from_file(self) -> tuple[Any, float]:
        """What is in the file, and since when. Raises OSError, DecodeError and ValueError."""
        with open(self.path, "rb") as file:
            response = messages.known(f"{_D}DiscoveryResponse").FromString(file.read())
            when = os.fstat(file.fileno()).st_mtime
        digest, response.nonce = response.nonce, ""
        if response.type_url != self._type.url or digest != _digest(response):
            raise ValueError("it is damaged, or of another version")
        return response, when


def _digest(response: Any) -> str:
    """Of a DiscoveryResponse without a nonce."""
    return str(xxh64_hexdigest(response.SerializeToString(deterministic=True)))
