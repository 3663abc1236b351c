"""SPIFFE IDs: the standard's syntax."""

from __future__ import annotations

import pytest

from meshproxy.api import spiffe


@pytest.mark.parametrize(
    ("text", "trust_domain", "path"),
    [
        ("spiffe://mesh.test", "mesh.test", ""),
        ("spiffe://mesh.test/ns/default/sa/web", "mesh.test", "/ns/default/sa/web"),
        ("spiffe://a_b-c.1/X.Y_z-0", "a_b-c.1", "/X.Y_z-0"),
        ("spiffe://mesh.test/...", "mesh.test", "/..."),
    ],
)
def test_ids(text, trust_domain, path):
    found = spiffe.parse(text)
    assert (found.trust_domain, found.path, str(found)) == (trust_domain, path, text)


@pytest.mark.parametrize(
    "text",
    [
        "", "spiffe:", "spiffe://", "spiffe:///path", "http://mesh.test/a", "SPIFFE://mesh.test/a", "spiffe://Mesh.test/a", "spiffe://mesh.test/",
        "spiffe://mesh.test/a/", "spiffe://mesh.test//a", "spiffe://mesh.test/./a", "spiffe://mesh.test/a/..", "spiffe://mesh.test/a%2fb", "spiffe://mesh.test:1/a",
        "spiffe://user@mesh.test/a", "spiffe://mesh.test/a?b", "spiffe://mesh.test/a#b", "spiffe://mesh.test/ä", "spiffe://mesh.test/a\n", "spiffe://mesh.test/a\0b",
        "spiffe://" + "d" * 256, "spiffe://d/" + "a" * 2048, "spiffe://mesh.test\n/a", "spiffe://mesh.test/a b",
    ],
)  # fmt: skip
def test_what_is_none(text):
    with pytest.raises(ValueError):
        spiffe.parse(text)


def test_workloads():
    assert str(spiffe.workload("mesh.test", "shop", "web")) == "spiffe://mesh.test/ns/shop/sa/web"
    for parts in [("mesh.test", "a/b", "c"), ("mesh.test", "a", ""), ("mesh.test", "..", "c"), ("Mesh", "a", "b")]:
        with pytest.raises(ValueError):
            spiffe.workload(*parts)
