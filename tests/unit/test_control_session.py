"""What a control plane's session sends, and when."""

from __future__ import annotations

import gc
import weakref

import pytest

from control.ads.session import ProtocolError, Session, State
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ROUTES, ResourceSet, make
from control.translate.view import View
from meshproxy.api import messages

_D = "envoy.service.discovery.v3."


def view(clusters="", endpoints="", listeners="", routes=""):
    """Resources by their names; a name with a digit after it is another version: "a b2"."""

    def made(url, names):
        field = "cluster_name" if url == ENDPOINTS else "name"
        for word in names.split():
            name, version = word[0], int(word[1:] or 1)
            extra = {
                CLUSTER: {"connect_timeout": f"{version}s"},
                ENDPOINTS: {"policy": {"overprovisioning_factor": version}},
                LISTENER: {"tcp_backlog_size": version},
                ROUTES: {"most_specific_header_mutations_wins": version > 1},
            }[url]
            yield make(url, name, {field: name, **extra})

    return View(
        {url: (ResourceSet(made(url, names)),) for url, names in ((CLUSTER, clusters), (ENDPOINTS, endpoints), (LISTENER, listeners), (ROUTES, routes))}
    )


class Client:
    """Writes requests and reads responses of one session."""

    def __init__(self, delta: bool, first: View) -> None:
        self.delta = delta
        self.session = Session(delta=delta)
        self.session.update(first)

    def say(self, url, *names, nonce="", why="", **fields):
        if self.delta:
            request = messages.known(f"{_D}DeltaDiscoveryRequest")(type_url=url, response_nonce=nonce, resource_names_subscribe=names, **fields)
        else:
            request = messages.known(f"{_D}DiscoveryRequest")(type_url=url, response_nonce=nonce, resource_names=names, **fields)
        request.node.id = "n"
        if why:
            request.error_detail.message = why
        self.session.receive(request.SerializeToString())
        return self.hear()

    def hear(self):
        """(kind, names, names that are gone, nonce) of each response."""
        out = []
        for data in self.session.responses():
            response = messages.known(f"{_D}DeltaDiscoveryResponse" if self.delta else f"{_D}DiscoveryResponse").FromString(data)
            kind = response.type_url.rpartition(".")[2]
            if self.delta:
                out.append((kind, sorted(one.name for one in response.resources), sorted(response.removed_resources), response.nonce))
            else:
                cls = messages.known(response.type_url.rpartition("/")[2])
                found = [cls.FromString(one.value) for one in response.resources]
                out.append((kind, sorted(one.cluster_name if kind == "ClusterLoadAssignment" else one.name for one in found), [], response.nonce))
        return out

    def update(self, new):
        self.session.update(new)
        return self.hear()


@pytest.fixture(params=[False, True], ids=["sotw", "delta"])
def client(request):
    return Client(request.param, view("a b", "a b", "l", "r"))


def test_a_wildcard_gets_everything_once(client):
    assert client.say(CLUSTER) == [("Cluster", ["a", "b"], [], "1")]
    assert client.say(CLUSTER, nonce="1") == []


def test_named_resources(client):
    assert client.say(ENDPOINTS, "a", "x") == [("ClusterLoadAssignment", ["a"], ["x"] if client.delta else [], "1")]


def test_a_wildcard_of_nothing_is_answered(client):
    client.session.update(view())
    assert client.say(LISTENER) == [("Listener", [], [], "1")]


def test_one_response_at_a_time_and_changes_in_between_put_together(client):
    client.say(CLUSTER)
    assert client.update(view("a2 b", "a b", "l", "r")) == []
    assert client.update(view("a2 b3", "a b", "l", "r")) == []
    assert client.session.subscriptions[CLUSTER].state is State.STALE
    assert client.say(CLUSTER, nonce="1") == [("Cluster", ["a", "b"], [], "2")]
    assert client.say(CLUSTER, nonce="2") == []
    assert client.session.subscriptions[CLUSTER].state is State.SYNCED


def test_a_refusal_is_kept_and_not_answered(client):
    client.say(CLUSTER)
    assert client.say(CLUSTER, nonce="1", why="no such thing") == []
    state = client.session.subscriptions[CLUSTER]
    assert (state.state, state.detail) == (State.ERROR, "no such thing")
    assert [kind for kind, *_ in client.update(view("a2 b", "a b", "l", "r"))] == ["Cluster"]


def test_an_old_nonce_is_not_an_answer(client):
    client.say(CLUSTER)
    client.say(CLUSTER, nonce="1")
    client.update(view("a2 b"))
    client.say(CLUSTER, nonce="1")
    assert client.session.subscriptions[CLUSTER].state is State.STALE


def test_what_is_referred_to_is_sent_first_and_clusters_are_taken_away_last(client):
    nonces = {}

    def note(responses):
        nonces.update({kind: nonce for kind, _, _, nonce in responses})
        return [(kind, names, gone) for kind, names, gone, _ in responses]

    for url, names in ((CLUSTER, ()), (ENDPOINTS, ("a", "b")), (LISTENER, ()), (ROUTES, ("r",))):
        note(client.say(url, *names))

    def ack(url, *names):
        kind = url.rpartition(".")[2]
        return note(client.say(url, *(() if client.delta else names), nonce=nonces[kind]))

    for url, names in ((CLUSTER, ()), (ENDPOINTS, ("a", "b")), (LISTENER, ()), (ROUTES, ("r",))):
        assert ack(url, *names) == []
    got = note(client.update(view("a c", "a c", "l2", "r2")))
    assert [kind for kind, *_ in got] == ["Cluster", "Listener", "RouteConfiguration"]
    assert got[0] == ("Cluster", ["c"] if client.delta else ["a", "b", "c"], [])  # b is still there
    assert ack(CLUSTER) == []
    assert ack(LISTENER) == []
    assert ack(ROUTES, "r") == [("Cluster", [] if client.delta else ["a", "c"], ["b"] if client.delta else [])]
    assert ack(CLUSTER) == ([("ClusterLoadAssignment", [], ["b"])] if client.delta else [])  # still asked for


def test_endpoints_are_sent_again_after_their_cluster(client):
    client.say(CLUSTER)
    client.say(CLUSTER, nonce="1")
    client.say(ENDPOINTS, "a", "b")
    client.say(ENDPOINTS, *(() if client.delta else ("a", "b")), nonce="2")
    assert [(kind, names) for kind, names, *_ in client.update(view("a2 b", "a b", "l", "r"))] == [
        ("Cluster", ["a"] if client.delta else ["a", "b"]),
        ("ClusterLoadAssignment", ["a"]),
    ]


def test_names_may_be_more_and_fewer(client):
    client.say(ENDPOINTS, "a")
    names = ("b",) if client.delta else ("a", "b")
    assert [names for _, names, *_ in client.say(ENDPOINTS, *names, nonce="1")] == [["b"]]
    if client.delta:
        client.say(ENDPOINTS, nonce="2", resource_names_unsubscribe=["a"])
    else:
        client.say(ENDPOINTS, "b", nonce="2")
    assert client.update(view("a b", "a2 b", "l", "r")) == []


def test_what_a_client_has_from_an_earlier_stream_is_not_sent_again():
    before = view("a b c")
    client = Client(True, before)
    versions = {one.name: one.version for one in before.all(CLUSTER)}
    client.session.update(view("a b2 d"))
    assert client.say(CLUSTER, initial_resource_versions=versions) == [("Cluster", ["b", "d"], ["c"], "1")]


def test_asking_once_more_by_name_is_answered():
    client = Client(False, view("", "a"))
    client.say(ENDPOINTS, "a")
    assert client.say(ENDPOINTS, "a", nonce="1") == []
    assert client.say(ENDPOINTS, "a", nonce="1") == [("ClusterLoadAssignment", ["a"], [], "2")]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff", f"not a serialised {_D}DiscoveryRequest"),
        (messages.known(f"{_D}DiscoveryRequest")(type_url=CLUSTER).SerializeToString(), "the first request does not say which node it is from"),
        (b"", "a request of type '' on a stream of 'all types'"),
    ],
)
def test_what_is_no_request_ends_the_stream(data, why):
    with pytest.raises(ProtocolError) as caught:
        Session(delta=False).receive(data)
    assert str(caught.value) == why


def test_a_stream_for_one_type_needs_no_type_and_takes_no_other():
    session = Session(delta=False, only=CLUSTER)
    request = messages.known(f"{_D}DiscoveryRequest")(node={"id": "n"})
    session.receive(request.SerializeToString())
    assert [*session.subscriptions] == [CLUSTER]
    request.type_url = LISTENER
    with pytest.raises(ProtocolError, match=f"of type '{LISTENER}' on a stream of '{CLUSTER}'"):
        session.receive(request.SerializeToString())


def test_sets_of_earlier_times_are_let_go():
    """What differs is asked of the newest set, which must not keep all that were before it."""
    old = []

    class Set(ResourceSet):
        __slots__ = ("__weakref__",)

    latest = Set()
    for number in range(5):
        before, latest = latest, Set([make(CLUSTER, "a", {"name": "a", "alt_stat_name": str(number)})])
        old.append(weakref.ref(before))
        assert latest.since(before) is latest.since(before)
        assert [one.name for one in latest.since(before).changed] == ["a"]
    del before
    gc.collect()
    assert [one() is not None for one in old] == [False] * 4 + [True]
