"""Whatever is wanted, changes, is refused or is lost on the way: in the end client and control plane agree."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.api import messages
from meshproxy.xds.resources import CLUSTER, ENDPOINTS, TYPES, WILDCARD, Update
from meshproxy.xds.session import ProtocolError, Session
from tests.unit.xds_model import Server, version_of

NODE = messages.known("envoy.config.core.v3.Node")(id="n")
NAMES = st.sampled_from("abc")
BAD = "bad"
STEP = st.one_of(
    st.tuples(st.just("change"), st.sampled_from((CLUSTER, ENDPOINTS)), NAMES, st.sampled_from(("1", "2", BAD, None))),
    st.tuples(st.just("want"), NAMES),
    st.tuples(st.just("leave"), NAMES),
    st.tuples(st.just("send"), st.integers(1, 3)),
    st.tuples(st.just("serve"), st.integers(1, 3)),
    st.tuples(st.just("hear"), st.integers(1, 3)),
    st.tuples(st.just("lose")),
    st.tuples(st.just("connect")),
)


class Rig:
    """A client that takes everything but what is bad, and a line that keeps the order of each direction and nothing else."""

    def __init__(self, delta: bool, node_once: bool) -> None:
        self.session = Session(NODE, delta=delta, node_once=node_once)
        self.server = Server(delta)
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.have: dict = {CLUSTER: {}, ENDPOINTS: {}}
        self.refused = 0
        self.session.subscribe(CLUSTER, WILDCARD)

    def step(self, kind: str, *arguments) -> None:
        getattr(self, kind)(*arguments)

    def change(self, type, name, version) -> None:
        self.server.change(type, name, version)

    def want(self, name: str) -> None:
        self.session.subscribe(ENDPOINTS, name)

    def leave(self, name: str) -> None:
        self.session.unsubscribe(ENDPOINTS, name)
        self.have[ENDPOINTS].pop(name, None)

    def connect(self) -> None:
        if not self.session.open:
            self.session.opened()
            self.server.opened()

    def lose(self) -> None:
        if self.session.open:
            self.session.closed()
            self.server.opened()
            self.up.clear()
            self.down.clear()

    def send(self, count: int) -> None:
        """The client's requests go onto the line."""
        if count:
            self.up.extend(self.session.requests())

    def serve(self, count: int) -> None:
        for _ in range(min(count, len(self.up))):
            self.server.receive(self.up.popleft(), TYPES)
        self.down.extend(self.server.out) if self.session.open else None
        self.server.out.clear()

    def hear(self, count: int) -> None:
        for _ in range(min(count, len(self.down))):
            update = self.session.receive(self.down.popleft())
            assert isinstance(update, Update)
            bad = [one.name for one in update.resources if version_of(one.message) == BAD]
            if bad and not self.session.delta:
                self.refused += 1
                self.session.reject(update, f"{bad} cannot be used")
                continue
            have = self.have[update.type]
            if update.complete:
                have.clear()
            have.update({one.name: version_of(one.message) for one in update.resources if one.name not in bad})
            for name in update.removed:
                have.pop(name, None)
            if bad:  # a server does not say again what was right in a refused answer, so that has to be used
                self.refused += 1
                self.session.reject(update, f"{bad} cannot be used")
            else:
                self.session.accept(update)

    def settle(self) -> None:
        self.connect()
        for _ in range(200):
            self.send(1)
            self.serve(100)
            self.hear(100)
            if not self.up and not self.down and not list(self.session.requests()):
                return
        raise AssertionError("they never come to rest")


@given(st.booleans(), st.booleans(), st.lists(STEP, max_size=40))
def test_client_and_server_agree_in_the_end(delta, node_once, steps):
    rig = Rig(delta, node_once)
    for step in steps:
        rig.step(*step)
    for type, world in rig.server.world.items():  # what was refused is repaired, for then there is one right answer
        for name in [name for name, version in world.items() if version == BAD]:
            rig.change(type, name, "3")
    rig.settle()
    assert rig.have[CLUSTER] == rig.server.world.get(CLUSTER, {})
    wanted = rig.session.wanted(ENDPOINTS)
    known = {name: version for name, version in rig.server.world.get(ENDPOINTS, {}).items() if name in wanted}
    have = rig.have[ENDPOINTS]
    # Without delta nobody says that endpoints are gone: they live as long as what refers to them.
    assert known.items() <= have.items()
    assert have == known or not delta
    assert sum(bool(why) for *_, why in rig.server.answers) <= rig.refused


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_a_response_or_an_error(data, delta):
    session = Session(NODE, delta=delta)
    session.subscribe(CLUSTER, WILDCARD)
    session.opened()
    assert len(list(session.requests())) == 1
    try:
        assert not isinstance(session.receive(data), Update)
    except ProtocolError:
        pass
    assert session.open
