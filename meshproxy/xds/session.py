"""The client's side of one xDS stream, sans-IO: what is wanted goes in, requests come out; responses go in, updates come out.

State of the world and delta, for one type or for many on one stream (ADS). A session outlives its streams: `opened` and `closed` tell it of them, and what
it had accepted is said again at the beginning of the next one. Source: envoy's xds_protocol; what a server may do is in tests/unit/xds_model.py.

    session = Session(node, delta=False)
    session.subscribe(CLUSTER, WILDCARD)
    session.opened()
    for request in session.requests(): ...        # send
    update = session.receive(data)                # a response
    session.accept(update) or session.reject(update, "why")
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from meshproxy.api import messages
from meshproxy.xds.resources import ORDER, TYPES, WILDCARD, ResourceType, Update, check_delta_names, check_names, of_envelope, once, unpack

_INVALID_ARGUMENT = 3  # google.rpc.Code, of every refusal
TOGETHER = 20  # resources that are read in one go
MAX_DETAIL = 4096  # characters of a refusal: servers put them into logs and status fields
_D = "envoy.service.discovery.v3."


class ProtocolError(Exception):
    """What came is no response: the stream cannot go on."""


class Refusal(NamedTuple):
    """A response was refused as a whole: none of its resources is as good as read."""

    type: ResourceType
    why: str


class _State:
    """One type on the stream. What `versions` says survives the stream; the rest is of this one."""

    __slots__ = ("again", "answers", "due", "later", "names", "named", "nonce", "said", "type", "version", "versions")

    def __init__(self, type: ResourceType) -> None:
        self.type = type
        self.names: set[str] = set()  # wanted
        self.version = ""  # of the last accepted response (state of the world)
        self.versions: dict[str, str] = {}  # of each accepted resource
        self.fresh()

    def fresh(self) -> None:
        """A stream begins, or there is none."""
        self.nonce = ""
        self.said: set[str] | None = None  # the names that this stream was told; None: nothing was said yet
        self.named = False  # names were said, so an empty list no longer means everything
        self.again: set[str] = set()  # names to be asked for once more (delta)
        self.later: set[str] = set()  # names to be asked for once more, unless they are told meanwhile
        self.answers: deque[tuple[str, str]] = deque()  # (nonce, why not): responses to be answered
        self.due = bool(self.names)


class Session:
    """One stream and those that replace it. `node`: envoy.config.core.v3.Node. `node_once`: only a stream's first request says it (it always does in delta).

    `give_way` is called now and then while a long response is read.
    """

    def __init__(self, node: Any, *, delta: bool, node_once: bool = False, give_way: Callable[[], None] = lambda: None) -> None:
        self.delta = delta
        self.open = False
        self.refusals = 0  # since the beginning
        self.identifier = ""  # what the control plane calls itself
        self._give_way = give_way
        self._node = node
        self._node_once = node_once or delta
        self._node_said = False
        self._types: dict[str, _State] = {}

    # -- what is wanted

    def subscribe(self, type: ResourceType, name: str, *, patient: bool = False) -> bool:
        """Ask for a resource, or for all with WILDCARD. Asking again is a request, too: it wants to be answered even if nothing has changed; `patient`: it is
        one only with the next `ask_again`, unless an answer comes before. Returns whether that is to be waited for."""
        state = self._types.get(type.url)
        if state is None:
            state = self._types[type.url] = _State(type)
        state.names.add(name)
        again = state.said is not None and name in state.said
        if again and patient:
            state.later.add(name)
            return True
        if again:
            state.again.add(name)
        state.due = True
        return False

    def ask_again(self) -> None:
        """What was asked for again, patiently, has not been told."""
        for state in self._types.values():
            if state.later:
                state.again |= state.later
                state.later.clear()
                state.due = True

    def unsubscribe(self, type: ResourceType, name: str) -> None:
        """No longer ask for it."""
        state = self._types.get(type.url)
        if state is None or name not in state.names:
            return
        state.names.discard(name)
        state.again.discard(name)
        state.later.discard(name)
        if WILDCARD not in state.names:
            state.versions.pop(name, None)
        state.due = True

    def wanted(self, type: ResourceType) -> frozenset[str]:
        """The names asked for."""
        state = self._types.get(type.url)
        return frozenset(state.names) if state is not None else frozenset()

    # -- the stream

    def opened(self) -> None:
        """A stream has begun: everything is asked for, with what was accepted before."""
        self.open = True
        self._node_said = False
        for state in self._types.values():
            state.fresh()

    def closed(self) -> None:
        """The stream is gone."""
        self.open = False
        for state in self._types.values():
            state.fresh()

    def requests(self) -> Iterator[bytes]:
        """What is to be sent now, serialised; nothing while there is no stream. What the caller does not take comes the next time."""
        if not self.open:
            return
        for url in sorted(self._types, key=_rank):
            state = self._types[url]
            while state.answers:
                nonce, why = state.answers.popleft()
                yield self._answer(state, nonce, why)
            if state.due:
                state.due = False
                request = self._delta_request(state) if self.delta else self._request(state)
                if request is not None:
                    yield self._serialise(request)

    @property
    def pending(self) -> int:
        """How many requests there are to be sent, at most."""
        return sum(len(state.answers) + state.due for state in self._types.values()) if self.open else 0

    def receive(self, data: bytes) -> Update | Refusal | None:
        """A response. Returns what it says of what is wanted, to be answered by `accept` or `reject`; a Refusal when it was answered here; None when it
        concerns nobody.

        Raises ProtocolError for what is no response.
        """
        cls = messages.known(f"{_D}DeltaDiscoveryResponse" if self.delta else f"{_D}DiscoveryResponse")
        try:
            response = cls.FromString(data)
        except DecodeError as error:
            raise ProtocolError(f"not a serialised {cls.DESCRIPTOR.full_name}") from error
        self.identifier = response.control_plane.identifier or self.identifier
        state = self._types.get(response.type_url)
        if state is None or state.said is None:
            return None  # of a type that nobody asked for: it has no request to be answered with
        state.nonce = response.nonce
        if state.later:
            told = [one.name for one in response.resources if not self.delta or one.HasField("resource")]  # a heartbeat tells nothing
            state.later.difference_update(told, response.removed_resources if self.delta else ())
        version = response.system_version_info if self.delta else response.version_info
        repeated: list[str] = []
        try:
            if self.delta:
                check_delta_names(response)
            resources = []
            for number, one in enumerate(response.resources):
                if not number % TOGETHER:
                    self._give_way()
                resources.append(of_envelope(one, state.type, one.version) if self.delta else unpack(one, state.type, version))
            if state.type.complete:
                resources, repeated = once(resources)
            elif not self.delta:
                check_names(resources)
        except ValueError as error:
            self.refusals += 1
            why = str(error)[:MAX_DETAIL]
            state.answers.append((response.nonce, why))
            return Refusal(state.type, why)
        wanted = state.names
        if WILDCARD not in wanted:
            resources = [one for one in resources if one.name in wanted]
        complete = not self.delta and state.type.complete and WILDCARD in wanted
        removed = [name for name in response.removed_resources if WILDCARD in wanted or name in wanted] if self.delta else []
        return Update(state.type, version, resources, removed, complete, response.nonce, repeated)

    def accept(self, update: Update) -> None:
        """Acknowledge a response."""
        state = self._types[update.type.url]
        state.version = update.version
        if update.complete:
            state.versions.clear()
        self._keep(state, update)
        state.answers.append((update.nonce, ""))

    def reject(self, update: Update, why: str) -> None:
        """Refuse a response: the version stays the one before."""
        self.refusals += 1
        self._types[update.type.url].answers.append((update.nonce, why[:MAX_DETAIL] or "rejected"))

    def remember(self, type: ResourceType, versions: dict[str, str]) -> None:
        """What an earlier process had accepted, and this one uses: the next stream says that we have it, so that by delta we hear of what has gone since."""
        state = self._types.get(type.url)
        if state is not None:
            state.versions = versions | state.versions

    def forget(self, type: ResourceType, name: str) -> None:
        """A resource is no longer there (its time is over): the next stream shall not say that we have it."""
        state = self._types.get(type.url)
        if state is not None:
            state.versions.pop(name, None)

    def _keep(self, state: _State, update: Update) -> None:
        for one in update.resources:
            state.versions[one.name] = one.version
        for name in update.removed:
            state.versions.pop(name, None)

    # -- requests

    def _serialise(self, request: Any) -> bytes:
        if not (self._node_once and self._node_said):
            request.node.CopyFrom(self._node)
            self._node_said = True
        return bytes(request.SerializeToString())

    def _request(self, state: _State) -> Any:
        """The state of the world: all names, each time."""
        names = state.names
        if state.said is None and not names:
            return None
        state.said = set(names)
        request = messages.known(f"{_D}DiscoveryRequest")(type_url=state.type.url, version_info=state.version, response_nonce=state.nonce)
        if names != {WILDCARD} or state.named:
            # Never having named anything means everything; afterwards an empty list means nothing, and everything must be asked for by its name.
            request.resource_names.extend(sorted(names))
            state.named |= bool(names)
        return request

    def _delta_request(self, state: _State) -> Any:
        """Delta: what is asked for now and was not before, and the other way round."""
        said = state.said
        first = said is None
        added = (state.names - (said or set())) | state.again
        gone = (said or set()) - state.names
        state.again = set()
        if not added and not gone:
            return None
        state.said = set(state.names)
        request = messages.known(f"{_D}DeltaDiscoveryRequest")(type_url=state.type.url)
        if first:
            known = state.versions
            request.initial_resource_versions.update(known if WILDCARD in state.names else {name: known[name] for name in state.names if name in known})
        if not (first and added == {WILDCARD}):
            request.resource_names_subscribe.extend(sorted(added))
        request.resource_names_unsubscribe.extend(sorted(gone))
        return request

    def _answer(self, state: _State, nonce: str, why: str) -> bytes:
        """ACK, or NACK with the reason."""
        if self.delta:
            request = self._delta_request(state) if state.due else None
            state.due = False
            if request is None:
                request = messages.known(f"{_D}DeltaDiscoveryRequest")(type_url=state.type.url)
            request.response_nonce = nonce
        else:
            state.due = False
            request = self._request(state)
            request.response_nonce = nonce
        if why:
            request.error_detail.code = _INVALID_ARGUMENT
            request.error_detail.message = why
        return self._serialise(request)


def _rank(url: str) -> int:
    return ORDER.index(url) if url in TYPES else len(ORDER)
