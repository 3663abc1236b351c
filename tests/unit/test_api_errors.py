"""Configuration errors: paths are put together from the inside out, and nothing found is lost."""

from __future__ import annotations

import pytest

from meshproxy.api import errors
from meshproxy.api.errors import INVALID, UNSUPPORTED, Collector, ConfigError, Problem


@pytest.mark.parametrize(
    ("prefix", "path", "whole"),
    [("a", "b", "a.b"), ("a", "[0].b", "a[0].b"), ("", "b", "b"), ("a", "", "a"), ("a.b", '["x.y"]', 'a.b["x.y"]')],
)
def test_join(prefix, path, whole):
    assert errors.join(prefix, path) == whole


def test_under_prefixes_every_problem():
    with pytest.raises(ConfigError) as caught, errors.under("listeners[0]"), errors.under("filter_chains[1]"):
        raise ConfigError([Problem("name", "is empty"), Problem("", "is odd", UNSUPPORTED)])
    assert caught.value.problems == [
        Problem("listeners[0].filter_chains[1].name", "is empty", INVALID),
        Problem("listeners[0].filter_chains[1]", "is odd", UNSUPPORTED),
    ]
    assert str(caught.value) == "listeners[0].filter_chains[1].name: is empty\nlisteners[0].filter_chains[1]: is odd"


def test_fail_and_text_only():
    with pytest.raises(ConfigError, match=r"^a\.b: why$"):
        errors.fail("a.b", "why")
    assert str(ConfigError("the whole is wrong")) == "the whole is wrong"


def test_collector_goes_on_and_reports_all():
    problems = Collector()
    for i in range(3):
        with problems.under(f"clusters[{i}]"):
            if i != 1:
                errors.fail("name", "bad")
    problems.add("admin", "worse")
    with pytest.raises(ConfigError) as caught:
        problems.raise_any()
    assert [problem.path for problem in caught.value.problems] == ["clusters[0].name", "clusters[2].name", "admin"]


def test_collector_is_silent_when_all_is_well():
    Collector().raise_any()
