"""What becomes of an answer before and after its watcher has it."""

from __future__ import annotations

import pytest

from meshproxy.api import messages
from meshproxy.api.errors import ConfigError
from meshproxy.xds.resources import CLUSTER, WILDCARD, Resource, Update
from meshproxy.xds.subscription import Rules, Subscription
from tests.unit import upstream_help as up

Cluster = messages.known("envoy.config.cluster.v3.Cluster")


class Looked(Rules):
    """Notes whose constraints were looked at."""

    def __init__(self):
        super().__init__()
        self.at = []

    def invalid(self, resources):
        self.at += [one.name for one in resources]
        return super().invalid(resources)


class Watcher:
    def __init__(self):
        self.seen = []
        self.failures = 0

    def updated(self, update):
        self.seen.append([one.name for one in update.resources])

    def failed(self):
        self.failures += 1


@pytest.fixture
def rules():
    return Looked()


@pytest.fixture
def watcher():
    return Watcher()


@pytest.fixture
def subscription(rules, watcher):
    context = up.context()
    return Subscription(CLUSTER, WILDCARD, watcher, context.stats.scope("x."), context, rules, 0.0)


def cluster(name, **fields):
    return Resource(name, "1", Cluster(name=name, **fields))


def bad(name):
    one = Cluster(name=name)
    one.connect_timeout.seconds = -1
    return Resource(name, "1", one)


def answer(*resources, complete=True, removed=()):
    return Update(CLUSTER, "1", list(resources), list(removed), complete)


def test_what_has_not_changed_is_not_looked_at_again(subscription, rules, watcher):
    subscription.answered(answer(cluster("a"), cluster("b")))
    subscription.answered(answer(cluster("a"), cluster("b", alt_stat_name="other")))
    subscription.answered(answer(cluster("b", alt_stat_name="other")))
    subscription.answered(answer(cluster("a")))
    assert rules.at == ["a", "b", "b", "a"]
    assert watcher.seen == [["a", "b"], ["a", "b"], ["b"], ["a"]]


def test_what_breaks_a_constraint_refuses_the_whole_answer_each_time(subscription, rules, watcher):
    for _ in range(2):
        with pytest.raises(ConfigError, match="b: -1s"):
            subscription.answered(answer(cluster("a"), bad("b")))
    assert (watcher.seen, watcher.failures) == ([], 2)
    assert rules.at == ["a", "b", "b"]
    assert subscription.scope.counter("update_rejected").n == 2


def test_in_parts_the_rest_is_used(subscription, watcher):
    subscription.in_parts = True
    with pytest.raises(ConfigError, match="b: -1s"):
        subscription.answered(answer(cluster("a"), bad("b"), complete=False))
    assert watcher.seen == [["a"]]


def test_statistics_say_what_was_accepted(subscription):
    subscription.answered(answer(cluster("a")))
    scope = subscription.scope
    assert (scope.counter("update_success").n, scope.text("version_text").value, scope.gauge("version").n) == (1, "1", 13237225503670494420)


def test_what_came_twice_is_told_and_used_once(subscription, watcher):
    update = answer(cluster("a"), cluster("b"))
    update.repeated = ["a"]
    with pytest.raises(ConfigError, match=r"^a: duplicate cluster a found$"):
        subscription.answered(update)
    assert watcher.seen == [["a", "b"]]
    assert watcher.failures == 1
