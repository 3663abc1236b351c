"""The sidecar's session against the control plane's, in memory: whatever changes, is refused or is lost on the way, in the end they agree."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from control.ads.session import ProtocolError
from control.ads.session import Session as ServerSession
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ROUTES, ResourceSet, make
from control.translate.view import View
from meshproxy.api import messages
from meshproxy.xds import resources as wire
from meshproxy.xds.session import Session as ClientSession

NODE = messages.known("envoy.config.core.v3.Node")(id="n")
TYPES = {CLUSTER: wire.CLUSTER, ENDPOINTS: wire.ENDPOINTS, LISTENER: wire.LISTENER, ROUTES: wire.ROUTES}
BAD = "bad"
NAMES = st.sampled_from("abc")
NAMED = st.sampled_from((ENDPOINTS, ROUTES))
STEP = st.one_of(
    st.tuples(st.just("change"), st.sampled_from(tuple(TYPES)), NAMES, st.sampled_from(("1", "2", BAD, None))),
    st.tuples(st.just("want"), NAMED, NAMES),
    st.tuples(st.just("leave"), NAMED, NAMES),
    st.tuples(st.just("send")),
    st.tuples(st.just("serve"), st.integers(1, 3)),
    st.tuples(st.just("hear"), st.integers(1, 3)),
    st.tuples(st.just("lose")),
    st.tuples(st.just("connect")),
)


def resource(url: str, name: str, version: str):
    """A resource whose content says its version."""
    value = {
        CLUSTER: {"name": name, "alt_stat_name": version},
        ENDPOINTS: {"cluster_name": name, "endpoints": [{"locality": {"zone": version}}]},
        LISTENER: {"name": name, "stat_prefix": version},
        ROUTES: {"name": name, "virtual_hosts": [{"name": version, "domains": ["*"], "routes": []}]},
    }[url]
    return make(url, name, value)


def version_of(url: str, message) -> str:
    if url == CLUSTER:
        return message.alt_stat_name
    if url == ENDPOINTS:
        return message.endpoints[0].locality.zone
    return message.stat_prefix if url == LISTENER else message.virtual_hosts[0].name


class Rig:
    """A client that takes everything but what is bad, and a line that keeps the order of each direction and nothing else."""

    def __init__(self, delta: bool) -> None:
        self.delta = delta
        self.client = ClientSession(NODE, delta=delta)
        self.client.subscribe(wire.CLUSTER, wire.WILDCARD)
        self.client.subscribe(wire.LISTENER, wire.WILDCARD)
        self.world: dict[str, dict[str, str]] = {url: {} for url in TYPES}
        self.have: dict[str, dict[str, str]] = {url: {} for url in TYPES}
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.server: ServerSession | None = None
        self.streams = 0
        self.view = View({})
        self.publish()

    def publish(self) -> None:
        self.view = View({url: (ResourceSet(resource(url, *one) for one in self.world[url].items()),) for url in TYPES})
        if self.server is not None:
            self.server.update(self.view)

    def change(self, url: str, name: str, version: str | None) -> None:
        if version is None:
            self.world[url].pop(name, None)
        else:
            self.world[url][name] = version
        self.publish()

    def want(self, url: str, name: str) -> None:
        self.client.subscribe(TYPES[url], name)

    def leave(self, url: str, name: str) -> None:
        self.client.unsubscribe(TYPES[url], name)
        self.have[url].pop(name, None)

    def connect(self) -> None:
        if self.server is None:
            self.streams += 1
            self.server = ServerSession(delta=self.delta, prefix=f"{self.streams}/")
            self.server.update(self.view)
            self.client.opened()

    def lose(self) -> None:
        if self.server is not None:
            self.server = None
            self.client.closed()
            self.up.clear()
            self.down.clear()

    def send(self) -> None:
        self.up.extend(self.client.requests())

    def serve(self, count: int) -> None:
        if self.server is not None:
            for _ in range(min(count, len(self.up))):
                self.server.receive(self.up.popleft())
            self.down.extend(self.server.responses())

    def hear(self, count: int) -> None:
        for _ in range(min(count, len(self.down))):
            update = self.client.receive(self.down.popleft())
            if update is None:
                continue
            url = update.type.url
            new = {one.name: version_of(url, one.message) for one in update.resources}
            bad = BAD in new.values()
            if bad and not self.delta:
                self.client.reject(update, "bad")
                continue
            if update.complete:
                self.have[url].clear()
            self.have[url].update({name: version for name, version in new.items() if version != BAD})
            for name in update.removed:
                self.have[url].pop(name, None)
            if bad:  # what is right in a refused answer of delta is used
                self.client.reject(update, "bad")
            else:
                self.client.accept(update)

    def settle(self) -> None:
        for _ in range(200):
            self.send()
            self.serve(100)
            self.hear(100)
            if not self.up and not self.down and not (pending := list(self.client.requests())):
                break
            self.up.extend(pending if not self.up and not self.down else ())
        else:
            raise AssertionError("they never come to rest")


@settings(max_examples=400)
@given(st.booleans(), st.lists(STEP, max_size=40))
def test_in_the_end_both_agree(delta, steps):
    rig = Rig(delta)
    rig.connect()
    for kind, *arguments in steps:
        getattr(rig, kind)(*arguments)
    rig.connect()
    for url in TYPES:  # what was refused is mended
        for name, version in list(rig.world[url].items()):
            if version == BAD:
                rig.change(url, name, "mended")
    rig.settle()
    assert rig.server is not None
    assert rig.server.idle
    for url in (CLUSTER, LISTENER):
        assert rig.have[url] == rig.world[url]
    for url in (ENDPOINTS, ROUTES):
        wanted = rig.client.wanted(TYPES[url])
        expected = {name: version for name, version in rig.world[url].items() if name in wanted}
        if delta:
            assert rig.have[url] == expected
        else:  # the state of the world has no way to say that such a resource is gone
            assert expected.items() <= rig.have[url].items()


@given(st.booleans(), st.lists(st.binary(max_size=40), max_size=4))
def test_garbage_is_a_protocol_error_and_nothing_else(delta, pieces):
    session = ServerSession(delta=delta)
    session.update(Rig(delta).view)
    for piece in pieces:
        try:
            session.receive(piece)
            list(session.responses())
        except ProtocolError:
            pass
