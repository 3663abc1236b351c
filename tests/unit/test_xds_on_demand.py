"""What main remembers of what clients have asked for: so many names, and no more. What it does with answers is in tests/differential."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from meshproxy.api import convert, messages
from meshproxy.http import demand
from meshproxy.xds.on_demand import OnDemandClusters
from meshproxy.xds.resources import CLUSTER, VIRTUAL_HOST, Resource, Update
from meshproxy.xds.virtual_hosts import VirtualHosts
from tests.unit import upstream_help as up

Routes = messages.known("envoy.config.route.v3.RouteConfiguration")
ROUTES = convert.to_message({"name": "r", "vhds": {"config_source": {"ads": {}}}}, Routes)


class Subscription:
    """One, and what is asked for by it."""

    def __init__(self, asked: list[str], name: str = "") -> None:
        self._asked = asked
        self._name = name

    def start(self) -> None:
        if self._name:
            self.ask(self._name)

    def close(self) -> None:
        if self._name:
            self.let_go(self._name)

    def ask(self, name: str) -> None:
        self._asked.append(name)

    def let_go(self, name: str) -> None:
        self._asked.remove(name)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "MAX_NAMES", 4)


def hosts() -> tuple[VirtualHosts, list[str], list[str]]:
    """Virtual hosts of r, what is asked for, and who was answered."""
    asked: list[str] = []
    answered: list[str] = []
    sources: Any = SimpleNamespace(subscribe=lambda *of, **more: Subscription(asked))
    scope = up.context().stats.scope("x.")
    return VirtualHosts(ROUTES, sources, scope, lambda hosts, version: None, answered.append, lambda: None), asked, answered


def says(*names: str, absent: tuple[str, ...] = ()) -> Update:
    there = [Resource(f"r/{name}", "1", VIRTUAL_HOST.message(name=f"r/{name}", domains=[name])) for name in names]
    return Update(VIRTUAL_HOST, "1", [*there, *(Resource(f"r/{name}", "1", None) for name in absent)], [])


def test_hosts_that_are_not_there_are_forgotten_when_there_are_many():
    made, asked, answered = hosts()
    for name in ("a", "b"):
        made.demand(name)
    made.updated(says("a", "b"))
    for number in range(100):
        made.demand(f"none{number}")
        made.updated(says(absent=(f"none{number}",)))
        assert len(asked) <= 2 + 4
    assert asked[:2] == ["r/a", "r/b"], "those that are there stay"
    assert asked[-1] == "r/none99"
    assert answered == ["a", "b", *(f"none{number}" for number in range(100))]
    made.demand("none99")
    assert answered[-1] == "none99", "it is known that there is none"
    made.demand("none0")
    assert asked[-1] == "r/none0", "this one is asked for again"


def test_of_very_many_hosts_without_an_answer_the_oldest_waits_in_vain():
    made, asked, answered = hosts()
    for number in range(7):
        made.demand(f"h{number}")
    assert answered == ["h0", "h1", "h2"]
    assert asked == ["r/h3", "r/h4", "r/h5", "r/h6"]
    made.close()
    assert not asked
    assert answered[3:] == ["h3", "h4", "h5", "h6"]


def clusters(*there: str) -> tuple[OnDemandClusters, Any, list[str], list[tuple[str, bool]]]:
    """Clusters on demand, those that are there, names that are asked for, answers."""
    asked: list[str] = []
    answered: list[tuple[str, bool]] = []
    known = SimpleNamespace(active=dict.fromkeys(there), warming={}, take=lambda update: None)
    known.manager = known.active
    mux = SimpleNamespace(ask=lambda kind, name: asked.append(name))
    sources: Any = SimpleNamespace(shared=lambda *of: mux, on_shared=lambda mux, source, kind, name, *of: Subscription(asked, name))
    context: Any = SimpleNamespace(stats=up.context().stats, loop=SimpleNamespace(call_later=lambda *of: SimpleNamespace(cancel=lambda: None)))
    made = OnDemandClusters(None, sources, known, context, lambda name, found: answered.append((name, found)))  # type: ignore[arg-type]
    return made, known, asked, answered


def test_clusters_that_are_not_there_are_forgotten_when_there_are_many():
    made, known, asked, answered = clusters()
    for name in ("a", "b"):
        made.demand(name, 1.0)
        known.active[name] = None
        made.took(name, Update(CLUSTER, "1", [], []))
    for number in range(100):
        made.demand(f"none{number}", 1.0)
        made.settle(f"none{number}", False)  # its time is over
        assert len(asked) <= 2 + 4
    assert asked[:2] == ["a", "b"]
    assert asked[-1] == "none99"
    assert answered == [("a", True), ("b", True), *((f"none{number}", False) for number in range(100))]


def test_while_very_many_clusters_are_waited_for_nobody_asks_for_more():
    made, _, asked, answered = clusters()
    for number in range(6):
        made.demand(f"c{number}", 1.0)
    assert asked == ["c0", "c1", "c2", "c3"]
    assert answered == [("c4", False), ("c5", False)]


def test_a_cluster_that_cds_took_away_is_asked_for_again():
    made, known, asked, answered = clusters()
    made.demand("a", 1.0)
    known.active["a"] = None
    made.took("a", Update(CLUSTER, "1", [], []))
    del known.active["a"]
    made.demand("a", 1.0)
    made.demand("a", 1.0)
    assert asked == ["a", "a"]
    known.warming["a"] = None
    made.took("a", Update(CLUSTER, "1", [], []))
    made.demand("a", 1.0)
    assert asked == ["a", "a"], "it has come, and will soon be there"
    known.active["a"] = known.warming.pop("a")
    made.settle("a", True)
    assert answered == [("a", True), ("a", True)]
