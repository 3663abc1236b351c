"""The server's side of one xDS stream, sans-IO: requests go in, views go in, responses come out.

State of the world and delta, for one type or for many on one stream (ADS). What the session does beyond the letter of the protocol:

- It sends what is referred to before what refers to it (clusters, endpoints, listeners, routes), and takes clusters away only when everything else is
  acknowledged, so that no route points at nothing in between.
- It has one response of a type under way at a time. What changes meanwhile is put together and sent when the client has answered.
- After a cluster was sent its endpoints are sent again, even if they are the same: a client that warms the new cluster waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

from google.protobuf.message import DecodeError

from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ORDER, VIRTUAL_HOST, Held, Resource, ResourceSet, field
from control.translate.view import View
from meshproxy.api import messages

WILDCARD = "*"
_COMPLETE = (CLUSTER, LISTENER)  # a response of the state of the world names all there are
_LAST = (CLUSTER, ENDPOINTS)  # these are taken away when nothing refers to them any more
_D = "envoy.service.discovery.v3."
MAX_DETAIL = 4096  # characters of a client's complaint that are kept


class ProtocolError(Exception):
    """What came is no request: the stream cannot go on."""


class State(Enum):
    """How a client stands with one type, by the names that `istioctl proxy-status` has for it."""

    NOT_SENT = "NOT SENT"
    SYNCED = "SYNCED"
    STALE = "STALE"  # a response is not answered yet
    ERROR = "ERROR"  # the last response was refused


class Subscription:
    """One type on the stream. `names` without `wildcard` are all that is wanted. `has`: the sets of which the client was told last; None before the first."""

    __slots__ = (
        "again",
        "answered",
        "brought",
        "detail",
        "has",
        "known",
        "lingering",
        "names",
        "lost",
        "nonce",
        "refused",
        "said",
        "sent",
        "returning",
        "under_way",
        "url",
        "version",
        "wildcard",
    )

    def __init__(self, url: str) -> None:
        self.url = url
        self.wildcard = False
        self.names: set[str] = set()
        self.has: tuple[ResourceSet, ...] | None = None
        self.again: set[str] = set()  # names to be answered, changed or not
        self.known: dict[str, str] = {}  # name -> version that the client brought from an earlier stream (delta)
        self.brought = False  # and that was all it wants
        self.lingering: dict[str, Resource] = {}  # no longer there, but not yet taken away
        self.said = False  # names were said on this stream
        self.returning = False  # the client has something from an earlier stream
        self.nonce = ""  # of the last response
        self.answered = True
        self.refused = False
        self.detail = ""  # why, as the client says
        self.sent = ""  # version of the last response
        self.under_way: list[Resource] = []  # what is in it, as long as it is not answered, where a refusal loses what was right
        self.lost: set[str] = set()  # names of what was in a response that was refused
        self.version = ""  # of the last one that was accepted

    @property
    def state(self) -> State:
        if not self.nonce:
            return State.SYNCED if self.brought else State.NOT_SENT
        if not self.answered:
            return State.STALE
        return State.ERROR if self.refused else State.SYNCED

    def wants(self, name: str) -> bool:
        """Whether a resource of this name is asked for."""
        return self.wildcard or name in self.names


class Session:
    """One stream. `only` is the type of a stream that is there for one; `node` is what the first request said of the client."""

    def __init__(self, *, delta: bool, only: str = "", prefix: str = "") -> None:
        self.delta = delta
        self.node: Any = None
        self.subscriptions: dict[str, Subscription] = {}
        self.only = only
        self._prefix = prefix  # of nonces, so that those of an earlier stream are not mistaken for ours
        self._count = 0
        self._view: View | None = None
        self.brought: frozenset[str] = frozenset()  # clusters that the client had when it came (delta)
        self.asked_anew: dict[str, None] = {}  # names of virtual hosts in requests, in their order; whoever looks empties it
        self.refusals: dict[str, str] = {}  # type -> why it was refused; whoever looks empties it

    # --- what comes in

    def update(self, view: View) -> None:
        """What the client shall have from now on."""
        self._view = view

    def receive(self, data: bytes) -> None:
        """A request. Raises ProtocolError."""
        cls = messages.known(f"{_D}DeltaDiscoveryRequest" if self.delta else f"{_D}DiscoveryRequest")
        try:
            request = cls.FromString(data)
        except DecodeError as error:
            raise ProtocolError(f"not a serialised {cls.DESCRIPTOR.full_name}") from error
        url = request.type_url or self.only
        if not url or (self.only and url != self.only):
            raise ProtocolError(f"a request of type {url!r} on a stream of {self.only or 'all types'!r}")
        if self.node is None:
            if not request.HasField("node"):
                raise ProtocolError("the first request does not say which node it is from")
            self.node = request.node
        if len(self.subscriptions) >= 100 and url not in self.subscriptions:
            raise ProtocolError("too many types on one stream")
        first = url not in self.subscriptions
        state = self.subscriptions.setdefault(url, Subscription(url))
        if self.delta:
            self._receive_delta(state, request, first)
        else:
            self._receive(state, request, first)

    def _answer(self, state: Subscription, request: Any) -> None:
        state.answered = True
        state.refused = request.HasField("error_detail")
        state.detail = request.error_detail.message[:MAX_DETAIL] if state.refused else ""
        if not state.refused:
            state.version = state.sent
        else:
            self.refusals[state.url] = state.detail
            state.lost |= {one.name for one in state.under_way}
        state.under_way = []

    def _receive(self, state: Subscription, request: Any, first: bool) -> None:
        if not first and state.nonce and request.response_nonce != state.nonce:
            return  # it crossed a response of ours; the answer to that one says again what is wanted
        state.returning |= first and bool(request.version_info)
        answer = bool(state.nonce) and not state.answered
        if answer:
            self._answer(state, request)
        names = set(request.resource_names)
        wildcard = WILDCARD in names or (not names and not state.said and state.url in _COMPLETE)
        names.discard(WILDCARD)
        state.said |= bool(names)
        more = names - state.names
        if state.url in _COMPLETE and (more or (wildcard and not state.wildcard)):
            state.has = None  # a response that is complete says everything again
        if more:
            state.again |= more
        elif not answer and not first and names == state.names and state.url not in _COMPLETE:
            state.again |= names  # it asks once more, as clients do for a cluster that they warm
        state.wildcard = wildcard
        state.names = self._interned(state.url, names)

    def _receive_delta(self, state: Subscription, request: Any, first: bool) -> None:
        if request.response_nonce and request.response_nonce == state.nonce and not state.answered:
            self._answer(state, request)
        added, gone = set(request.resource_names_subscribe), set(request.resource_names_unsubscribe)
        if WILDCARD in added or (first and not added):
            if not state.wildcard:
                state.wildcard, state.has = True, None
            added.discard(WILDCARD)
        if WILDCARD in gone:
            state.wildcard = False
            gone.discard(WILDCARD)
        if first:
            state.known = dict(request.initial_resource_versions)
            state.returning = bool(state.known)
            if state.url == CLUSTER:
                self.brought = frozenset(state.known)
        state.again |= {name for name in added if name not in state.known}
        if state.url == VIRTUAL_HOST:
            self.asked_anew.update(dict.fromkeys(name for name in request.resource_names_subscribe if name in added))
        state.names |= self._interned(state.url, added)
        state.names -= gone
        state.again -= gone
        if state.wildcard:  # what was also asked for by name is still there, or is not: say which
            state.again |= gone
        for name in gone:
            state.known.pop(name, None)

    def _interned(self, url: str, names: set[str]) -> set[str]:
        """The same names as the resources' own strings: thousands of streams would each keep copies of them."""
        if self._view is None:
            return names
        return {found.name if (found := self._view.get(url, name)) is not None else name for name in names}

    # --- what goes out

    def responses(self) -> Iterator[bytes]:
        """What is to be sent now, serialised; nothing before the first view."""
        view = self._view
        if view is None:
            return
        for url in (*ORDER, *(url for url in self.subscriptions if url not in ORDER)):
            state = self.subscriptions.get(url)
            if state is not None and state.answered:
                yield from self._of_type(state, view.parts(url))
        for url in _LAST:
            state = self.subscriptions.get(url)
            if state is not None and state.lingering and self.idle:
                yield from self._take_away(state, view.parts(url))

    @property
    def idle(self) -> bool:
        """Whether the client has answered everything."""
        return all(state.answered for state in self.subscriptions.values())

    def _of_type(self, state: Subscription, parts: tuple[ResourceSet, ...]) -> Iterator[bytes]:
        before = state.has
        first = before is None
        again, state.again = state.again, set()
        known = bool(state.known)
        if first:
            changed = self._unknown(state, parts)
            gone = [name for name in state.known if state.wants(name) and not _find(parts, name)]
            gone += [name for name in again if not _find(parts, name) and name not in state.known]
            state.known = {}
        else:
            changed, gone = self._difference(state, parts, again)
        if state.returning:
            changed = [one for one in changed if not isinstance(one, Held)]
        state.has = parts
        if state.url in _LAST:
            gone = self._linger(state, before or (), changed, gone)
        nothing = not changed and not gone
        if nothing and not (first and (state.wildcard or state.url in _COMPLETE)):
            if first and known:
                state.brought, state.version = True, _version(state)
            return
        if state.url == CLUSTER:
            self._warm_endpoints(changed)
        if self.delta:
            yield self._delta_response(state, changed, gone)
        elif state.url in _COMPLETE:
            yield self._response(state, self._everything(state, parts))
        elif changed:
            state.under_way = changed
            yield self._response(state, changed)

    def _unknown(self, state: Subscription, parts: tuple[ResourceSet, ...]) -> list[Resource]:
        """Everything that is wanted, but for what the client has from an earlier stream."""
        return [one for one in self._wanted(state, parts) if state.known.get(one.name) != one.version]

    def _wanted(self, state: Subscription, parts: tuple[ResourceSet, ...]) -> Iterable[Resource]:
        if state.wildcard:
            return [one for part in parts for one in part.values()]
        return [one for name in state.names if (one := _find(parts, name)) is not None]

    def _difference(self, state: Subscription, parts: tuple[ResourceSet, ...], again: set[str]) -> tuple[list[Resource], list[str]]:
        assert state.has is not None
        if state.lost and any(new is not old and new.since(old) for new, old in zip(parts, state.has, strict=True)):
            again = again | {name for name in state.lost if state.wants(name)}
            state.lost = set()
        changed = {name: one for name in again if (one := _find(parts, name)) is not None}
        gone = [name for name in again if name not in changed]
        for new, old in zip(parts, state.has, strict=True):
            if new is old:
                continue
            diff = new.since(old)
            changed.update((one.name, one) for one in diff.changed if state.wants(one.name))
            gone += [name for name in diff.removed if state.wants(name) and not _find(parts, name)]
        return list(changed.values()), gone

    def _linger(self, state: Subscription, before: tuple[ResourceSet, ...], changed: Iterable[Resource], gone: list[str]) -> list[str]:
        """Clusters and their endpoints go last; returns what is gone at once."""
        for one in changed:
            state.lingering.pop(one.name, None)
        at_once = []
        for name in gone:
            old = _find(before, name)
            if old is not None:
                state.lingering[name] = old
            else:
                at_once.append(name)
        return at_once

    def _take_away(self, state: Subscription, parts: tuple[ResourceSet, ...]) -> Iterator[bytes]:
        names = [name for name in state.lingering if state.wants(name)]
        state.lingering = {}
        if self.delta and names:
            yield self._delta_response(state, [], names)
        elif not self.delta and state.url in _COMPLETE:
            yield self._response(state, self._everything(state, parts))

    def _everything(self, state: Subscription, parts: tuple[ResourceSet, ...]) -> list[Resource]:
        return [*self._wanted(state, parts), *state.lingering.values()]

    def _warm_endpoints(self, changed: Iterable[Resource]) -> None:
        endpoints = self.subscriptions.get(ENDPOINTS)
        if endpoints is not None and endpoints.has is not None:
            endpoints.again |= {one.name for one in changed if endpoints.wants(one.name)}

    # --- bytes

    def _begin(self, state: Subscription, version: str) -> None:
        self._count += 1
        state.nonce = f"{self._prefix}{self._count}"
        state.answered = False
        state.sent = version

    def _response(self, state: Subscription, resources: Iterable[Resource]) -> bytes:
        """DiscoveryResponse: version_info = 1, resources = 2, type_url = 4, nonce = 5."""
        self._begin(state, _version(state))
        body = b"".join([one.packed for one in resources])
        return field(1, state.sent.encode()) + body + field(4, state.url.encode()) + field(5, state.nonce.encode())

    def _delta_response(self, state: Subscription, resources: Iterable[Resource], gone: Iterable[str]) -> bytes:
        """DeltaDiscoveryResponse: system_version_info = 1, resources = 2, type_url = 4, nonce = 5, removed_resources = 6."""
        self._begin(state, _version(state))
        body = b"".join([one.envelope for one in resources])
        removed = b"".join([field(6, name.encode()) for name in gone])
        return field(1, state.sent.encode()) + body + field(4, state.url.encode()) + field(5, state.nonce.encode()) + removed


def _find(parts: Iterable[ResourceSet], name: str) -> Resource | None:
    return next((part[name] for part in parts if name in part), None)


def _version(state: Subscription) -> str:
    """What the type is like as a whole."""
    return ".".join(part.digest for part in state.has or ())
