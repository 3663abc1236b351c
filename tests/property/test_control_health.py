"""Reports of health, in any order: what is known is what was said last, by whoever is there or has left not long ago."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from control.ads.health import BURST, GRACE_S, PER_S, Health
from tests.unit.control_help import snapshot
from tests.unit.test_control_health import SERVICE, Clock, hello, report, workload

NAMES = ("a", "b")
SNAPSHOT = snapshot(SERVICE, *(workload("readinessProbe: {tcpSocket: {port: 1}}", name) for name in NAMES))
STEPS = st.one_of(
    st.tuples(st.just("come"), st.sampled_from(NAMES)),
    st.tuples(st.just("say"), st.integers(0, 5), st.sampled_from((1, 2, 4))),
    st.tuples(st.just("go"), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.sampled_from((0.1, 1.0, GRACE_S))),
)


@given(st.lists(STEPS, max_size=60))
def test_what_is_known(steps):
    clock, told = Clock(), []
    health = Health(clock, lambda: told.append(health.unready))
    streams, said, gone = [], {}, {}
    for what, *rest in steps:
        if what == "come":
            streams.append((rest[0], health.open(lambda: None)))
            streams[-1][1].receive(hello(f"{rest[0]}.default"))
        elif what == "wait":
            clock.now += rest[0]
            health.tidy()
            for name in [name for name, when in gone.items() if clock.now - when >= GRACE_S]:
                del gone[name]
                said.pop(name, None)
        elif streams and what == "say":
            name, stream = streams[rest[0] % len(streams)]
            stream.receive(report(rest[1]))
            health.heard(stream, SNAPSHOT)
            said[name] = rest[1] == 1
            gone.pop(name, None)
        elif streams:
            name, stream = streams.pop(rest[0] % len(streams))
            health.close(stream)
            if name in said and name not in [other for other, _ in streams]:
                gone[name] = clock.now
        assert not told or told[-1] == health.unready
        assert all(one != other for one, other in itertools.pairwise(told))
        known = {name: ready for name in NAMES if (ready := health.is_ready(("default", name))) is not None}
        assert known.keys() == said.keys()
        assert health.unready == {("default", name) for name, ready in known.items() if not ready}
    # When all have rested, everything that was said is known.
    for name in [name for name in gone if name in said]:
        del said[name]
    clock.now += max(GRACE_S, BURST / PER_S)
    health.tidy()
    assert {name: health.is_ready(("default", name)) for name in said} == said
    assert {key[1] for key in health.unready} == {name for name, ready in said.items() if not ready}
