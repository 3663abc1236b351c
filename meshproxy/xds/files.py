"""Subscriptions to files: a DiscoveryResponse as YAML, JSON, text or binary, read again whenever another file takes its place."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from meshproxy.api import convert, document, messages
from meshproxy.api.errors import ConfigError, Problem
from meshproxy.xds.resources import Update, check_names, once, unpack
from meshproxy.xds.subscription import Rules, Subscription

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope
    from meshproxy.xds.inotify import Watches
    from meshproxy.xds.resources import ResourceType
    from meshproxy.xds.subscription import Watcher

log = logging.getLogger("meshproxy.config")
_RESPONSE = "envoy.service.discovery.v3.DiscoveryResponse"


class FileSubscription(Subscription):
    """What is in a file. `watched`: the folder that tells of changes instead of the file's own, or ""."""

    def __init__(
        self, path: str, watched: str, watches: Watches, type: ResourceType, name: str, watcher: Watcher, scope: Scope, context: Context, rules: Rules
    ) -> None:
        super().__init__(type, name, watcher, scope, context, rules, init_timeout=0.0)
        self._path = path
        self._watched = watched
        self._watches = watches
        self._end: Callable[[], None] | None = None

    def start(self) -> None:
        super().start()
        try:
            self._end = self._watches.folder(self._watched, self._read) if self._watched else self._watches.file(self._path, self._read)
        except OSError as error:
            log.warning("%s: cannot watch %s: %s", self, self._watched or self._path, error.strerror)
        self._read()

    def close(self) -> None:
        super().close()
        if self._end is not None:
            self._end()
            self._end = None

    def _read(self) -> None:
        self.attempts.n += 1
        try:
            response = read(self._path, self.rules)
        except ConfigError as error:
            log.warning("%s: %s: %s", self, self._path, error)
            self.lost()
            self._watcher.failed()
            return
        try:
            resources = [unpack(one, self.type, response.version_info) for one in response.resources]
            repeated: list[str] = []
            if self.type.complete:
                resources, repeated = once(resources)
            else:
                check_names(resources)
        except ValueError as error:
            self.refused(ConfigError(str(error)))
            return
        try:
            self.answered(Update(self.type, response.version_info, resources, complete=self.type.complete, repeated=repeated))
        except ConfigError:
            return  # it has been said
        except Exception as error:  # a defect shall cost what is in this file, and nothing else
            log.exception("%s: %s could not be taken", self, self._path)
            self.refused(ConfigError(f"internal error: {type(error).__name__}"))


def read(path: str, rules: Rules) -> Any:
    """The DiscoveryResponse in a file. Raises ConfigError."""
    [(form, content)] = document.read(path)
    cls = messages.known(_RESPONSE)
    if form == "pb":
        try:
            return cls.FromString(content)
        except DecodeError as error:
            raise ConfigError(f"not a serialised {_RESPONSE}") from error
    if form == "pb_text":
        from google.protobuf import text_format  # large, and seldom needed

        try:
            return text_format.Parse(content.decode(), cls())
        except (UnicodeDecodeError, text_format.ParseError, RecursionError) as error:
            raise ConfigError(f"not text format: {error}") from error
    if content is None:
        raise ConfigError("the file is empty")
    unknown: list[Problem] = []
    message = convert.to_message(content, cls, None if rules.reject_unknown else unknown)
    if unknown:
        rules.unknown(f"type {_RESPONSE} reason {unknown[0]}")  # as Envoy, the first tells
    return message
