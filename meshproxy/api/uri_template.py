"""URI templates: the path patterns of `UriTemplateMatchConfig` and the rewrites of `UriTemplateRewriteConfig`.

A pattern is `/` and segments: literals, `*` (one segment), `**` (any number, last), `{name}` and `{name=pattern}`. It becomes a regular expression with
named groups; a rewrite is literals and `{name}`s that refer to them. Rules and limits are Envoy's (source/extensions/path/uri_template_lib).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from meshproxy.api.errors import fail
from meshproxy.api.regex import compile_captures

_LITERAL_CHARS = r"a-zA-Z0-9\-._~%!$&'()+,;:@=*"
_REWRITE_LITERAL = f"[{_LITERAL_CHARS}/]+"
_NAME = r"[a-zA-Z][a-zA-Z0-9_]*"
_PRINTABLE = r"/[!-~]*"
_GLOB = f"[{_LITERAL_CHARS}]+"
_TEXT_GLOB = f"[{_LITERAL_CHARS}/]*"
_MAX_VARIABLES = 5
_MAX_NAME_LENGTH = 16

Rewrite = Callable[[bytes], "bytes | None"]


class UriTemplate:
    """A compiled pattern."""

    __slots__ = ("_captures", "groups", "text")

    def __init__(self, text: str) -> None:
        """Raises ConfigError when `text` is not a valid pattern."""
        self.text = text
        self._captures, self.groups = compile_captures(_Parser(text).parse())

    def matches(self, path: bytes) -> bool:
        """Whether a path without query matches as a whole."""
        return self._captures(path) is not None

    def captures(self, path: bytes) -> list[bytes] | None:
        """The groups of a matching path; `groups` has their numbers by name."""
        return self._captures(path)


def compile_rewrite(text: str, template: UriTemplate) -> Rewrite:
    """A function from a path without query to its new form, or None when the path does not match `template`."""
    pieces = [piece if isinstance(piece, bytes) else _group(piece, template) for piece in _parse_rewrite(text)]

    def rewrite(path: bytes) -> bytes | None:
        groups = template.captures(path)
        if groups is None:
            return None
        return b"".join(piece if isinstance(piece, bytes) else groups[piece] for piece in pieces)

    return rewrite


def _group(name: str, template: UriTemplate) -> int:
    number = template.groups.get(name)
    if number is None:
        fail("", f"mismatch between variables in path_match_policy {template.text} and path_rewrite_policy: Nonexisting variable name {name!r}")
    return number


def _parse_rewrite(text: str) -> list[bytes | str]:
    """Literals as bytes, variable names as str."""
    if not text.startswith("/"):
        fail("", "Invalid rewrite variable placement")
    if "//" in text:
        fail("", "Invalid rewrite literal")
    pieces: list[bytes | str] = []
    while text:
        literal, brace, rest = text.partition("{")
        if literal:
            if not re.fullmatch(_REWRITE_LITERAL, literal):
                fail("", "Invalid rewrite literal pattern")
            pieces.append(literal.encode())
        if not brace:
            break
        name, closing, text = rest.partition("}")
        if not closing:
            fail("", "Unmatched variable bracket")
        if not re.fullmatch(_NAME, name):
            fail("", "Invalid variable name")
        pieces.append(name)
    return pieces


class _Parser:
    """Turns a pattern into a regular expression, one segment after the other."""

    def __init__(self, text: str) -> None:
        self._rest = text
        self._names: list[str] = []
        self._after_text_glob = False

    def parse(self) -> str:
        if not re.fullmatch(_PRINTABLE, self._rest):
            fail("", f'Invalid pattern: "{self._rest}"')
        self._rest = self._rest[1:]
        segments: list[str] = []
        suffix = ""
        while self._rest:
            segments.append(self._segment())
            if self._rest == "/":
                segments.append("")
                break
            if self._rest.startswith("/"):
                self._rest = self._rest[1:]
            elif self._rest:
                suffix = self._literal()
                if self._rest:
                    fail("", "Prefix match not supported.")
        return "/" + "/".join(segments) + suffix

    def _segment(self) -> str:
        if self._rest.startswith("*"):
            return self._operator()
        if self._rest.startswith("{"):
            return self._variable()
        return self._literal()

    def _operator(self) -> str:
        if self._after_text_glob:
            fail("", "Glob after text glob.")
        if self._rest.startswith("**"):
            self._rest = self._rest[2:]
            self._after_text_glob = True
            return _TEXT_GLOB
        self._rest = self._rest[1:]
        return _GLOB

    def _literal(self) -> str:
        literal = self._rest.partition("/")[0]
        if not re.fullmatch(_GLOB, literal):
            fail("", f'Invalid literal: "{literal}"')
        self._rest = self._rest[len(literal) :]
        return re.escape(literal)

    def _variable(self) -> str:
        body, closing, after = self._rest[1:].partition("}")
        if not closing:
            fail("", f'Unmatched variable bracket in "{self._rest}"')
        name, equals, pattern = body.partition("=")
        self._declare(name)
        if not equals:
            if self._after_text_glob:
                fail("", "Implicit variable path glob after text glob.")
            inner = _GLOB
        else:
            inner = self._inner(pattern)
        self._rest = after
        return f"(?P<{name}>{inner})"

    def _declare(self, name: str) -> None:
        if not re.fullmatch(_NAME, name):
            fail("", f'Invalid variable name: "{name}"')
        if len(name) > _MAX_NAME_LENGTH:
            fail("", f'Invalid variable name length (length of "{name}" should be at least 1 and no more than {_MAX_NAME_LENGTH})')
        if len(self._names) >= _MAX_VARIABLES:
            fail("", f"Exceeded variable count limit ({_MAX_VARIABLES})")
        if name in self._names:
            fail("", f'Repeated variable name: "{name}"')
        self._names.append(name)

    def _inner(self, pattern: str) -> str:
        """The pattern of a variable: operators and literals separated by slashes."""
        if not pattern:
            fail("", "Empty variable match")
        self._rest = pattern
        pieces: list[str] = []
        while self._rest:
            pieces.append(self._operator() if self._rest.startswith("*") else self._literal())
            if self._rest:
                if not self._rest.startswith("/") or self._rest == "/":
                    fail("", f'Invalid variable match: "{self._rest}"')
                self._rest = self._rest[1:]
        return "/".join(pieces)
