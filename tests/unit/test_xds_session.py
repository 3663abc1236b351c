"""What an xDS session says, request by request. How it fares against a control plane: tests/property/test_xds_session.py."""

from __future__ import annotations

from typing import Any

import pytest

from meshproxy.api import messages
from meshproxy.xds.resources import CLUSTER, ENDPOINTS, LISTENER, ROUTES, WILDCARD
from meshproxy.xds.session import MAX_DETAIL, ProtocolError, Refusal, Session

D = "envoy.service.discovery.v3."
NODE = messages.known("envoy.config.core.v3.Node")(id="me")
Request, Response = messages.known(f"{D}DiscoveryRequest"), messages.known(f"{D}DiscoveryResponse")
DeltaRequest, DeltaResponse = messages.known(f"{D}DeltaDiscoveryRequest"), messages.known(f"{D}DeltaDiscoveryResponse")
Envelope = messages.known(f"{D}Resource")


def sent(session: Session) -> list[Any]:
    cls = DeltaRequest if session.delta else Request
    return [cls.FromString(data) for data in session.requests()]


def world(type, version: str, nonce: str, *names: str) -> bytes:
    response = Response(type_url=type.url, version_info=version, nonce=nonce)
    for name in names:
        response.resources.add().Pack(type.message(**{type.name_field: name}))
    return response.SerializeToString()


def delta(type, nonce: str, removed: tuple[str, ...] = (), **versions: str) -> bytes:
    response = DeltaResponse(type_url=type.url, nonce=nonce, removed_resources=removed)
    for name, version in versions.items():
        response.resources.add(name=name, version=version).resource.Pack(type.message(**{type.name_field: name}))
    return response.SerializeToString()


def opened(*wanted: tuple[Any, str], **options: Any) -> Session:
    session = Session(NODE, **{"delta": False, **options})
    for type, name in wanted:
        session.subscribe(type, name)
    session.opened()
    return session


def test_nothing_is_said_without_a_stream():
    session = Session(NODE, delta=False)
    session.subscribe(CLUSTER, WILDCARD)
    assert sent(session) == []
    session.opened()
    assert len(sent(session)) == 1
    assert sent(session) == []


def test_types_are_asked_for_before_what_refers_to_them():
    session = opened((ROUTES, "r"), (LISTENER, WILDCARD), (ENDPOINTS, "e"), (CLUSTER, WILDCARD))
    assert [one.type_url for one in sent(session)] == [CLUSTER.url, ENDPOINTS.url, LISTENER.url, ROUTES.url]


@pytest.mark.parametrize(("node_once", "nodes"), [(False, ["me", "me"]), (True, ["me", ""])])
def test_the_node_is_in_every_request_or_in_the_first(node_once, nodes):
    session = opened((CLUSTER, WILDCARD), (LISTENER, WILDCARD), node_once=node_once)
    assert [one.node.id for one in sent(session)] == nodes


def test_an_accepted_response_is_acknowledged_with_its_version_and_nonce():
    session = opened((CLUSTER, WILDCARD))
    first = sent(session)[0]
    assert (first.version_info, first.response_nonce, list(first.resource_names)) == ("", "", [])
    update = session.receive(world(CLUSTER, "1", "n1", "a", "b"))
    assert [one.name for one in update.resources] == ["a", "b"]
    assert update.complete
    session.accept(update)
    (ack,) = sent(session)
    assert (ack.version_info, ack.response_nonce, ack.HasField("error_detail")) == ("1", "n1", False)


def test_a_refused_response_keeps_the_version_and_says_why():
    session = opened((CLUSTER, WILDCARD))
    sent(session)
    session.accept(session.receive(world(CLUSTER, "1", "n1", "a")))
    session.reject(session.receive(world(CLUSTER, "2", "n2", "a")), "a: no good" + "!" * MAX_DETAIL)
    ack, nack = sent(session)
    assert ack.response_nonce == "n1"
    assert (nack.version_info, nack.response_nonce, nack.error_detail.code) == ("1", "n2", 3)
    assert nack.error_detail.message.startswith("a: no good")
    assert len(nack.error_detail.message) == MAX_DETAIL


def test_versions_are_kept_over_streams_and_nonces_are_not():
    session = opened((CLUSTER, WILDCARD))
    sent(session)
    session.accept(session.receive(world(CLUSTER, "1", "n1", "a")))
    session.closed()
    assert sent(session) == []
    session.opened()
    (first,) = sent(session)
    assert (first.version_info, first.response_nonce) == ("1", "")


def test_names_that_nobody_wants_any_more_are_ignored():
    session = opened((ENDPOINTS, "a"), (ENDPOINTS, "b"))
    assert list(sent(session)[0].resource_names) == ["a", "b"]
    session.unsubscribe(ENDPOINTS, "b")
    assert list(sent(session)[0].resource_names) == ["a"]
    update = session.receive(world(ENDPOINTS, "1", "n1", "a", "b"))
    assert [one.name for one in update.resources] == ["a"]
    assert not update.complete


def test_after_the_last_name_an_empty_list_means_nothing():
    session = opened((ENDPOINTS, "a"))
    sent(session)
    session.unsubscribe(ENDPOINTS, "a")
    assert list(sent(session)[0].resource_names) == []
    session.subscribe(ENDPOINTS, WILDCARD)
    assert list(sent(session)[0].resource_names) == [WILDCARD]


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (Response(type_url=CLUSTER.url, nonce="n1", resources=[{"type_url": LISTENER.url}]).SerializeToString(), "of type"),
        (Response(type_url=CLUSTER.url, nonce="n1", resources=[{"type_url": CLUSTER.url, "value": b"\xff"}]).SerializeToString(), "not a serialised"),
        (
            Response(type_url=CLUSTER.url, nonce="n1", resources=[{"type_url": f"type.googleapis.com/{D}Resource", "value": b"\xff"}]).SerializeToString(),
            "envelope",
        ),
    ],
    ids=["another type", "garbage", "garbage in an envelope"],
)  # fmt: skip
def test_what_no_response_may_be_is_refused_at_once(response, why):
    session = opened((CLUSTER, WILDCARD))
    sent(session)
    refusal = session.receive(response)
    assert isinstance(refusal, Refusal)
    (nack,) = sent(session)
    assert nack.response_nonce == "n1"
    assert why in nack.error_detail.message
    assert refusal == (CLUSTER, nack.error_detail.message)


def test_two_things_of_one_name():
    """Of clusters and listeners the first is used, and who subscribed says what is wrong; an answer of anything else is refused as a whole."""
    session = opened((CLUSTER, WILDCARD), (ENDPOINTS, "a"))
    sent(session)
    update = session.receive(world(CLUSTER, "1", "n1", "a", "b", "a"))
    assert ([one.name for one in update.resources], update.repeated) == (["a", "b"], ["a"])
    assert session.receive(world(ENDPOINTS, "1", "n2", "a", "a")) == (ENDPOINTS, "duplicate resource a found")


@pytest.mark.parametrize(
    ("names", "removed", "why"),
    [
        (("a", "a"), (), "duplicate name a found among added/updated resources"),
        (("a",), ("b", "a"), "duplicate name a found in the union of added+removed resources"),
        ((), ("b", "b"), "duplicate name b found in the union of added+removed resources"),
    ],
)
def test_two_things_of_one_name_by_delta(names, removed, why):
    session = opened((CLUSTER, WILDCARD), delta=True)
    sent(session)
    response = DeltaResponse(type_url=CLUSTER.url, nonce="n1", removed_resources=removed)
    for name in names:
        response.resources.add(name=name, version="1").resource.Pack(CLUSTER.message(name=name))
    assert session.receive(response.SerializeToString()) == (CLUSTER, why)
    assert [one.error_detail.message for one in sent(session)] == [why]


def test_a_cluster_is_called_what_it_says():
    """Whatever its envelope says, as in Envoy; and so it comes twice if two envelopes have it."""
    session = opened((CLUSTER, WILDCARD), delta=True)
    sent(session)
    response = DeltaResponse(type_url=CLUSTER.url, nonce="n1")
    for name in ("a", "b"):
        response.resources.add(name=name, version="1").resource.Pack(CLUSTER.message(name="a"))
    update = session.receive(response.SerializeToString())
    assert ([one.name for one in update.resources], update.repeated) == (["a"], ["a"])


def test_garbage_ends_the_stream_and_strangers_are_ignored():
    session = opened((CLUSTER, WILDCARD))
    sent(session)
    with pytest.raises(ProtocolError, match=r"DiscoveryResponse"):
        session.receive(b"\xff\xff")
    assert session.receive(world(ROUTES, "1", "n", "r")) is None
    assert sent(session) == []


def test_envelopes_carry_versions_lives_and_heartbeats():
    session = opened((CLUSTER, WILDCARD))
    sent(session)
    response = Response(type_url=CLUSTER.url, version_info="7", nonce="n1")
    full = Envelope(name="a", version="3")
    full.resource.Pack(CLUSTER.message(name="a"))
    full.ttl.FromMilliseconds(1500)
    response.resources.add().Pack(full)
    beat = Envelope(name="b")
    beat.ttl.FromSeconds(2)
    response.resources.add().Pack(beat)
    one, two = session.receive(response.SerializeToString()).resources
    assert (one.name, one.version, one.ttl, one.message.name) == ("a", "3", 1.5, "a")
    assert (two.name, two.version, two.ttl, two.message) == ("b", "7", 2.0, None)


# -- delta


def test_delta_says_differences_only():
    session = opened((CLUSTER, WILDCARD), (ENDPOINTS, "a"), delta=True)
    clusters, endpoints = sent(session)
    assert (clusters.node.id, list(clusters.resource_names_subscribe)) == ("me", [])
    assert (endpoints.node.id, list(endpoints.resource_names_subscribe)) == ("", ["a"])
    session.subscribe(ENDPOINTS, "b")
    session.unsubscribe(ENDPOINTS, "a")
    (change,) = sent(session)
    assert (list(change.resource_names_subscribe), list(change.resource_names_unsubscribe), change.response_nonce) == (["b"], ["a"], "")


def test_delta_answers_with_nonces_and_changes_alike():
    session = opened((ENDPOINTS, "a"), delta=True)
    sent(session)
    session.accept(session.receive(delta(ENDPOINTS, "n1", a="1")))
    session.subscribe(ENDPOINTS, "b")
    (ack,) = sent(session)
    assert (ack.response_nonce, list(ack.resource_names_subscribe)) == ("n1", ["b"])
    session.reject(session.receive(delta(ENDPOINTS, "n2", b="1")), "no")
    (nack,) = sent(session)
    assert (nack.response_nonce, nack.error_detail.message, list(nack.resource_names_subscribe)) == ("n2", "no", [])


def test_delta_tells_a_new_stream_what_it_has():
    session = opened((CLUSTER, WILDCARD), (ENDPOINTS, "e"), (ENDPOINTS, "f"), delta=True)
    sent(session)
    session.accept(session.receive(delta(CLUSTER, "n1", a="1", b="1")))
    session.accept(session.receive(delta(CLUSTER, "n2", ("b",), a="2", c="1")))
    session.accept(session.receive(delta(ENDPOINTS, "n3", e="5", f="6")))
    session.forget(CLUSTER, "c")
    session.unsubscribe(ENDPOINTS, "f")
    session.closed()
    session.opened()
    clusters, endpoints = sent(session)
    assert dict(clusters.initial_resource_versions) == {"a": "2"}
    assert dict(endpoints.initial_resource_versions) == {"e": "5"}


def test_asking_again_is_said_again():
    session = opened((ENDPOINTS, "a"), delta=True)
    sent(session)
    session.accept(session.receive(delta(ENDPOINTS, "n1", a="1")))
    sent(session)
    session.subscribe(ENDPOINTS, "a")
    (again,) = sent(session)
    assert list(again.resource_names_subscribe) == ["a"]


def test_what_was_removed_is_told_to_those_who_asked():
    session = opened((ENDPOINTS, "a"), delta=True)
    sent(session)
    update = session.receive(delta(ENDPOINTS, "n1", ("a", "stranger")))
    assert update.removed == ["a"]
    assert not update.complete


def test_what_is_asked_for_again_patiently_is_asked_for_unless_it_was_told():
    session = opened((ENDPOINTS, "a"), (ENDPOINTS, "b"), (ENDPOINTS, "c"), delta=True)
    sent(session)
    assert not session.subscribe(ENDPOINTS, "d", patient=True)  # for the first time
    assert [list(one.resource_names_subscribe) for one in sent(session)] == [["d"]]
    for name in "abcd":
        assert session.subscribe(ENDPOINTS, name, patient=True)
    assert sent(session) == []
    session.accept(session.receive(delta(ENDPOINTS, "n1", a="1", removed=("b",))))
    session.unsubscribe(ENDPOINTS, "d")
    session.ask_again()
    (request,) = sent(session)
    assert (list(request.resource_names_subscribe), list(request.resource_names_unsubscribe), request.response_nonce) == (["c"], ["d"], "n1")
    session.ask_again()
    assert sent(session) == []


def test_a_new_stream_asks_for_everything_and_waits_for_nothing():
    session = opened((ENDPOINTS, "a"), delta=True)
    sent(session)
    session.subscribe(ENDPOINTS, "a", patient=True)
    session.closed()
    session.opened()
    assert [list(one.resource_names_subscribe) for one in sent(session)] == [["a"]]
    session.ask_again()
    assert sent(session) == []


def test_what_an_earlier_process_had_is_said_to_the_next_stream():
    session = opened((CLUSTER, WILDCARD), delta=True)
    sent(session)
    session.remember(CLUSTER, {"a": "1", "b": "2"})
    assert sent(session) == []
    session.opened()
    (request,) = sent(session)
    assert dict(request.initial_resource_versions) == {"a": "1", "b": "2"}
    session.accept(session.receive(delta(CLUSTER, "n1", removed=("b",), a="3")))
    session.remember(CLUSTER, {"a": "1", "c": "2"})  # what was heard since counts more
    session.opened()
    (request,) = sent(session)
    assert dict(request.initial_resource_versions) == {"a": "3", "c": "2"}


def test_a_heartbeat_tells_nothing_of_what_is_asked_for_again():
    session = opened((ENDPOINTS, "a"), delta=True)
    sent(session)
    session.accept(session.receive(delta(ENDPOINTS, "n1", a="1")))
    sent(session)
    assert session.subscribe(ENDPOINTS, "a", patient=True)
    beat = DeltaResponse(type_url=ENDPOINTS.url, nonce="n2")
    beat.resources.add(name="a", version="1").ttl.seconds = 5
    session.accept(session.receive(beat.SerializeToString()))
    session.ask_again()
    (request,) = sent(session)
    assert list(request.resource_names_subscribe) == ["a"]
