"""A control plane in memory, small enough to be seen to be right: what it knows of each resource is a version."""

from __future__ import annotations

from collections import deque
from typing import Any

from meshproxy.api import messages
from meshproxy.xds.resources import WILDCARD, ResourceType

_D = "envoy.service.discovery.v3."


def make(type: ResourceType, name: str, version: str) -> Any:
    """A resource whose content says its version; cluster and route names are all that a session looks at."""
    message = type.message()
    setattr(message, type.name_field, name)
    if type.name_field == "name" and "alt_stat_name" in type.message.DESCRIPTOR.fields_by_name:
        message.alt_stat_name = version
    elif type.name_field == "cluster_name":
        message.endpoints.add().locality.zone = version
    return message


def version_of(message: Any) -> str:
    """What `make` put in."""
    return message.alt_stat_name if hasattr(message, "alt_stat_name") else message.endpoints[0].locality.zone


class _Talk:
    """What a server remembers of one type on one stream."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.named = False
        self.sent: dict[str, str] = {}
        self.nonce = ""
        self.unanswered: list[str] = []


class Server:
    """One stream at a time. `world`: type -> name -> version. `out`: serialised responses. `answers`: (type URL, nonce, accepted version, reason)."""

    def __init__(self, delta: bool) -> None:
        self.delta = delta
        self.world: dict[ResourceType, dict[str, str]] = {}
        self.answers: list[tuple[str, str, str, str]] = []
        self.out: deque[bytes] = deque()
        self.requests: list[Any] = []
        self._count = 0
        self._talks: dict[ResourceType, _Talk] = {}
        self._first = True

    def opened(self) -> None:
        """A new stream: nothing of the one before is known."""
        self._talks = {}
        self.out.clear()
        self._first = True

    def change(self, type: ResourceType, name: str, version: str | None) -> None:
        """The world changes."""
        known = self.world.setdefault(type, {})
        if version is None:
            known.pop(name, None)
        else:
            known[name] = version
        if type in self._talks:
            self._push(type)

    def receive(self, data: bytes, types: dict[str, ResourceType]) -> None:
        """A request."""
        request = messages.known(f"{_D}{'Delta' if self.delta else ''}DiscoveryRequest").FromString(data)
        self.requests.append(request)
        assert not self._first or request.node.id, "the first request of a stream says who we are"
        self._first = False
        type = types[request.type_url]
        first = type not in self._talks
        talk = self._talks.setdefault(type, _Talk())
        if request.response_nonce:
            assert request.response_nonce in talk.unanswered, f"{request.response_nonce} is answered twice, or was never sent on this stream"
            talk.unanswered.remove(request.response_nonce)
            version = "" if self.delta else request.version_info
            self.answers.append((type.url, request.response_nonce, version, request.error_detail.message))
        if self.delta:
            self._delta(talk, type, request, first)
        else:
            self._state_of_the_world(talk, type, request, first)

    def _state_of_the_world(self, talk: _Talk, type: ResourceType, request: Any, first: bool) -> None:
        if request.response_nonce != talk.nonce:
            return  # stale: a later one follows
        names = set(request.resource_names)
        if not names and not talk.named:
            names = {WILDCARD}
        talk.named |= bool(request.resource_names)
        added = names - talk.names
        talk.names = names
        for name in added:
            talk.sent.pop(name, None)  # to be sent again even if it was sent before
        if first and request.version_info and WILDCARD in names:
            talk.sent = {}
        if added or first:
            self._push(type, force=True)
        else:
            self._push(type)

    def _delta(self, talk: _Talk, type: ResourceType, request: Any, first: bool) -> None:
        subscribed = set(request.resource_names_subscribe)
        if first and not subscribed:
            subscribed = {WILDCARD}
        if first:
            talk.sent = dict(request.initial_resource_versions)
        else:
            assert not request.initial_resource_versions, "only the first request of a stream has them"
            for name in subscribed:
                talk.sent.pop(name, None)
        talk.names |= subscribed
        talk.names -= set(request.resource_names_unsubscribe)
        for name in request.resource_names_unsubscribe:
            if WILDCARD not in talk.names:
                talk.sent.pop(name, None)
        self._push(type, asked=subscribed)

    def _wanted(self, talk: _Talk, type: ResourceType) -> dict[str, str]:
        world = self.world.get(type, {})
        return dict(world) if WILDCARD in talk.names else {name: world[name] for name in talk.names if name in world}

    def _push(self, type: ResourceType, *, force: bool = False, asked: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        talk = self._talks[type]
        wanted = self._wanted(talk, type)
        news = {name: version for name, version in wanted.items() if talk.sent.get(name) != version}
        gone = [name for name in talk.sent if name not in wanted]
        missing = [name for name in asked if name not in wanted and name != WILDCARD]
        if self.delta:
            removed = sorted({*gone, *missing})
            if news or removed:
                self._send_delta(talk, type, news, removed)
            for name in gone:
                del talk.sent[name]
        elif type.complete:
            if force or news or gone:
                self._send(talk, type, wanted)
            talk.sent = {}
        elif news or (force and not talk.nonce):
            self._send(talk, type, news)
        talk.sent |= wanted if type.complete else news

    def _nonce(self, talk: _Talk) -> str:
        self._count += 1
        talk.nonce = str(self._count)
        talk.unanswered.append(talk.nonce)
        return talk.nonce

    def _send(self, talk: _Talk, type: ResourceType, resources: dict[str, str]) -> None:
        response = messages.known(f"{_D}DiscoveryResponse")(type_url=type.url, nonce=self._nonce(talk), version_info=f"v{self._count}")
        for name, version in sorted(resources.items()):
            response.resources.add().Pack(make(type, name, version))
        self.out.append(response.SerializeToString())

    def _send_delta(self, talk: _Talk, type: ResourceType, resources: dict[str, str], removed: list[str]) -> None:
        response = messages.known(f"{_D}DeltaDiscoveryResponse")(type_url=type.url, nonce=self._nonce(talk), removed_resources=removed)
        for name, version in sorted(resources.items()):
            entry = response.resources.add(name=name, version=version)
            entry.resource.Pack(make(type, name, version))
        self.out.append(response.SerializeToString())
