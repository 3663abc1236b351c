"""Endpoints that differ from right ones in nothing but their addresses are not looked at again; and what an update costs, in calls."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from meshproxy.api import convert, messages, support, unknown
from meshproxy.api.errors import ConfigError
from meshproxy.upstream import endpoints
from meshproxy.upstream.shapes import MOST, Shapes
from meshproxy.xds.client import Backoff, Mux, StreamSubscription
from meshproxy.xds.endpoints import Eds
from meshproxy.xds.resources import ENDPOINTS, Resource, Update
from meshproxy.xds.session import Session
from meshproxy.xds.subscription import Rules
from tests.unit import upstream_help as up

Response = messages.known("envoy.service.discovery.v3.DeltaDiscoveryResponse")
Cluster = messages.known("envoy.config.cluster.v3.Cluster")


def endpoint(address="10.0.0.1", port=80, **more):
    return {"endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}}, **more}


def assignment(*found, name="a", group=(), **fields):
    return convert.to_message({"cluster_name": name, "endpoints": [{"lb_endpoints": list(found), **dict(group)}], **fields}, ENDPOINTS.message)


RIGHT = assignment(endpoint(), endpoint(load_balancing_weight=3), endpoint(metadata={"filter_metadata": {"a": {"b": 1}}}))


@pytest.fixture
def shapes():
    made = Shapes()
    made.learn(RIGHT)
    return made


@pytest.mark.parametrize(
    "message",
    [
        assignment(endpoint("1.2.3.4"), name="b"),
        assignment(endpoint("2001:db8::1"), endpoint("::1", load_balancing_weight=3)),
        assignment(endpoint("1.2.3.4", load_balancing_weight=3)),
        assignment(endpoint("fe80::1%eth0")),
        assignment(),
    ],
)
def test_other_names_addresses_and_numbers_of_endpoints_are_known(shapes, message):
    before = message.SerializeToString(deterministic=True)
    assert message in shapes
    assert message.SerializeToString(deterministic=True) == before
    assert support.check(message) == ([], [])
    assert unknown.find(message) == []
    endpoints.check(message)


def strange():
    """With a field that nobody knows in its second endpoint."""
    found = assignment(endpoint(), endpoint())
    found.endpoints[0].lb_endpoints[1].MergeFromString(bytes([0xFA, 0x3F, 1, 1]))
    return found


@pytest.mark.parametrize(
    "message",
    [
        assignment(endpoint("localhost")),
        assignment(endpoint("10.0.0.1", port=81)),
        assignment(endpoint(), endpoint("10.0.0.256")),
        assignment(endpoint(), endpoint("")),
        assignment(endpoint("1.2.3.4\0")),
        assignment(endpoint(load_balancing_weight=4)),
        assignment(endpoint(health_status="DRAINING")),
        assignment(endpoint(), {"endpoint": {"address": {"pipe": {"path": "/x"}}}}),
        assignment(endpoint(), {"endpoint": {"hostname": "x"}}),
        assignment(endpoint(), {"endpoint_name": "x"}),
        assignment(endpoint(), {}),
        assignment(endpoint(), group={"priority": 1}),
        assignment(endpoint(), policy={"overprovisioning_factor": 0}),
        assignment(endpoint(), name=""),
        strange(),
    ],
)
def test_anything_else_is_not(shapes, message):
    before = message.SerializeToString(deterministic=True)
    assert message not in shapes
    assert message.SerializeToString(deterministic=True) == before


def test_what_is_remembered_is_bounded(shapes):
    for weight in range(1, MOST + 1):
        one = assignment(endpoint(load_balancing_weight=weight), group={"priority": weight % 100})
        shapes.learn(one)
        assert one in shapes
    assert RIGHT not in shapes
    shapes.learn(assignment(*(endpoint(port=port) for port in range(1, MOST + 10))))
    assert sum(len(known) for known in (shapes._frames, shapes._endpoints)) <= 2 * MOST


def test_only_what_was_right_is_remembered():
    rules = Rules()
    for wrong, why in (
        (assignment(endpoint("localhost")), "malformed"),
        (assignment(endpoint(), group={"priority": 200}), "priority"),
        (assignment(endpoint(), policy={"drop_overloads": [{"category": "a"}, {"category": "b"}]}), "one"),
    ):
        for _ in range(2):
            with rules.prepared([]), pytest.raises(ConfigError, match=why):
                found = rules.invalid([Resource("a", "1", wrong)])
                assert bool(found) == (why == "priority")
                rules.check_endpoints(wrong)
    for _ in range(2):
        with rules.prepared([]):
            rules.invalid([Resource("a", "1", strange())])
            rules.check_endpoints(strange())
    assert strange() not in rules._shapes


class _Sources:
    """Subscriptions on one stream."""

    def __init__(self, mux, context, rules):
        self._mux = mux
        self._rest = context, rules

    def subscribe(self, source, type, name, watcher, scope):
        return StreamSubscription(self._mux, False, type, name, watcher, scope, *self._rest, 0.0)


class Plane:
    """Endpoints of many clusters over one stream by delta. `changed`: the names of clusters whose endpoints were said to have changed."""

    def __init__(self, count):
        context, self.rules, self.changed = up.context(), Rules(), []
        self._session = Session(context.node, delta=True)
        self._mux = Mux(None, "method", self._session, context.stats.scope("x."), context, Backoff(lambda: 0.5))
        sources = _Sources(self._mux, context, self.rules)
        self._names = [f"c{number}" for number in range(count)]
        self._context = context
        for name in self._names:
            cluster = Cluster(name=name, type="EDS")
            scope = context.stats.scope(f"cluster.{name}.")
            Eds(cluster, scope, lambda changed: self.changed.append(changed.cluster_name), sources, context, self.rules).start()
        self._session.opened()
        list(self._session.requests())

    def say(self, *found, version="1"):
        """An answer with so many endpoints for each; returns the calls, of Python and of C, that it takes."""
        response = Response(type_url=ENDPOINTS.url, nonce=version)
        for name in self._names:
            one = response.resources.add(name=name, version=version)
            one.resource.Pack(assignment(*found, name=name), deterministic=True)
            one.resource.type_url = ENDPOINTS.url
        data, calls = response.SerializeToString(), Counter()
        sys.setprofile(lambda frame, event, argument: calls.update([event]))
        try:
            self._mux._receive(data)
        finally:
            sys.setprofile(None)
        answer = messages.known("envoy.service.discovery.v3.DeltaDiscoveryRequest").FromString(list(self._session.requests())[-1])
        assert not answer.HasField("error_detail"), answer
        return calls["call"] + calls["c_call"]


@pytest.fixture
def looks(monkeypatch):
    """How often something was looked at in detail."""
    seen = Counter()

    def count(where, name):
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *arguments: (seen.update([name]), real(*arguments))[1])

    for where, name in ((support, "check"), (support, "all_right"), (unknown, "find"), (endpoints, "check")):
        count(where, name)
    return seen


COUNT = 100


def test_what_an_update_costs(looks):
    plane = Plane(COUNT)
    first = [endpoint(f"10.0.0.{host}") for host in range(10)]
    plane.say(*first)
    assert looks["check"] or looks["all_right"]
    assert len(plane.changed) == COUNT
    looks.clear()
    plane.changed.clear()
    other = plane.say(*(endpoint(f"10.0.1.{host}") for host in range(11)), version="2")
    assert (len(plane.changed), looks) == (COUNT, Counter())
    same = plane.say(*(endpoint(f"10.0.1.{host}") for host in range(11)), version="3")
    assert (len(plane.changed), looks) == (COUNT, Counter())
    print(f"calls for the endpoints of a cluster: {other / COUNT:.0f} for 11 others, {same / COUNT:.0f} for the same")
    assert other <= COUNT * CALLS_OTHER
    assert same <= COUNT * CALLS_SAME


CALLS_OTHER, CALLS_SAME = 150, 90


def test_an_update_with_one_that_is_wrong_names_it():
    plane = Plane(3)
    plane.say(endpoint())
    with pytest.raises(AssertionError, match="localhost"):
        plane.say(endpoint(), endpoint("localhost"), version="2")


def test_heartbeats_and_what_has_gone_are_no_resources_to_look_at(looks):
    rules = Rules()
    with rules.prepared([Resource("a", "1", None)]):
        assert rules.invalid([Resource("a", "1", None)]) == {}
    assert looks == Counter()
    assert Update(ENDPOINTS, "1", []).removed == []
