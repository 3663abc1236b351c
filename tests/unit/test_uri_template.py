"""URI templates."""

from __future__ import annotations

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.api.uri_template import UriTemplate, compile_rewrite


@pytest.mark.parametrize(
    ("template", "yes", "no"),
    [
        ("/", [b"/"], [b"/a", b""]),
        ("/a/b", [b"/a/b"], [b"/a/b/", b"/a", b"/a/bc"]),
        ("/a/", [b"/a/"], [b"/a"]),
        ("/a/*", [b"/a/b", b"/a/b.c", b"/a/*"], [b"/a/", b"/a/b/c"]),
        ("/a/**", [b"/a/", b"/a/b", b"/a/b/c"], [b"/a", b"/b/"]),
        ("/a/**.txt", [b"/a/b/c.txt"], [b"/a/b/c"]),
        ("/{x}/b", [b"/1/b"], [b"//b", b"/1/2/b"]),
        ("/{x=a/*/c}/d", [b"/a/b/c/d"], [b"/a/b/d"]),
        ("/a.b+(c)$", [b"/a.b+(c)$"], [b"/axb+(c)$"]),
    ],
)
def test_matching(template, yes, no):
    compiled = UriTemplate(template)
    assert [compiled.matches(path) for path in yes] == [True] * len(yes)
    assert [compiled.matches(path) for path in no] == [False] * len(no)


@pytest.mark.parametrize(
    "template",
    [
        "a", "", "/a//b", "/{", "/{x", "/{}", "/{1}", "/{x}/{x}", "/{x=}", "/{x=a/}", "/{abcdefghijklmnopq}", "/**/**",
        "/**/*", "/**/{x}", "/a b", "/{a}{b}", "/*a/b",
        "/{a}/{b}/{c}/{d}/{e}/{f}",
    ],
)  # fmt: skip
def test_bad_templates(template):
    with pytest.raises(ConfigError):
        UriTemplate(template)


@pytest.mark.parametrize(
    ("template", "rewrite", "path", "new"),
    [
        ("/ut/{a}/{b=**}", "/n/{b}/{a}", b"/ut/1/2/3", b"/n/2/3/1"),
        ("/{a}", "/x", b"/1", b"/x"),
        ("/{a}", "/{a}{a}-", b"/1", b"/11-"),
        ("/{a}", "/x", b"/1/2", None),
    ],
)
def test_rewriting(template, rewrite, path, new):
    assert compile_rewrite(rewrite, UriTemplate(template))(path) == new


@pytest.mark.parametrize("rewrite", ["x", "", "//x", "/{b}", "/{", "/{a", "/{1}", "/x y"])
def test_bad_rewrites(rewrite):
    with pytest.raises(ConfigError):
        compile_rewrite(rewrite, UriTemplate("/{a}"))
