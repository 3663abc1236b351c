"""Resources are looked at together, and what is wrong with one is still said of that one alone."""

from __future__ import annotations

import pytest

from meshproxy.api import convert, support
from meshproxy.api.errors import ConfigError
from meshproxy.xds.resources import ENDPOINTS, Resource
from meshproxy.xds.subscription import Rules


def resource(name: str, **fields) -> Resource:
    message = convert.to_message({"cluster_name": name, **fields}, ENDPOINTS.message)
    return Resource(name, "1", message)


def endpoint(**fields) -> dict:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": 80}}
    return {"endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}], **fields}]}


@pytest.fixture
def looks(monkeypatch):
    """How many messages were looked at by themselves."""
    seen = []
    real = support.check
    monkeypatch.setattr(support, "check", lambda message, *rest: (seen.append(message), real(message, *rest))[1])
    return seen


def test_many_that_are_right_are_looked_at_together(looks):
    rules, found = Rules(), [resource(f"c{number}", **endpoint()) for number in range(50)]
    with rules.prepared(found):
        assert rules.invalid(found) == {}
        for one in found:
            rules.check(one.message)
    assert looks == []
    rules.check(found[0].message)  # afterwards nothing is remembered
    assert looks == [found[0].message]


def test_one_that_is_wrong_is_named_and_looked_at_once(looks):
    rules = Rules()
    bad = resource("bad", **endpoint(priority=200))
    unsupported = resource("unsupported", **endpoint(), policy={"drop_overloads": [{"category": "a"}, {"category": ""}]})
    found = [resource("good", **endpoint()), bad, unsupported]
    with rules.prepared(found):
        invalid = rules.invalid(found)
        assert set(invalid) == {"bad", "unsupported"}
        assert invalid["bad"][0].path == "endpoints[0].priority"
        rules.check(found[0].message)
        with pytest.raises(ConfigError, match="priority"):
            rules.check(bad.message)
    assert len(looks) == 3
