"""Regular expressions as Envoy runs them: RE2, on bytes.

RE2 answers in time linear in the text, whatever the pattern, so a hostile path or pattern cannot stall a worker. Patterns are compiled in Latin-1 mode,
as Envoy does since 1.39: every byte is one character, so a header value with bytes that are not UTF-8 still matches `.` and a deny rule cannot be
avoided by sending one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail, under

if TYPE_CHECKING:
    from envoy.type.matcher.v3 import regex_pb2

BytesPredicate = Callable[[bytes], bool]

DEFAULT_MAX_PROGRAM_SIZE = 100  # runtime key re2.max_program_size.error_level
_SIZE_KEY = "re2.max_program_size.error_level"

HONOURS = {
    "envoy.type.matcher.v3.RegexMatcher": "google_re2 regex",
    "envoy.type.matcher.v3.RegexMatcher.GoogleRE2": "max_program_size",
    "envoy.type.matcher.v3.RegexMatchAndSubstitute": "pattern substitution",
    "envoy.extensions.regex_engines.v3.GoogleRE2": "",
}


def compile_regex(proto: regex_pb2.RegexMatcher, runtime: Any = None) -> BytesPredicate:
    """`RegexMatcher` -> whether the whole of a text matches. Raises ConfigError for a bad pattern or one beyond the program size limit.

    `runtime` (api.runtime.Runtime) may raise that limit; without it the default of 100 instructions holds.
    """
    program, both, _ = _program(proto, runtime, captures=False)
    match = program.Match

    def matches(text: bytes) -> bool:
        # Without captures the answer is one span, (-1, -1) when there is no match.
        return match(both, text, 0, len(text))[0][0] == 0

    return matches


def compile_substitution(proto: regex_pb2.RegexMatchAndSubstitute, runtime: Any = None) -> Callable[[bytes], bytes]:
    r"""`RegexMatchAndSubstitute` -> a function that replaces every match in a text.

    `\0` to `\9` in the substitution stand for the match and its groups, `\\` for a backslash. Raises ConfigError, also where Envoy only fails at run time:
    for a substitution that is malformed or names a group which the pattern has not.
    """
    with under("pattern"):
        program, _, unanchored = _program(proto.pattern, runtime, captures=True)
    pieces = _parse_rewrite(proto.substitution.encode())
    groups = program.NumberOfCapturingGroups()
    highest = max((piece for piece in pieces if isinstance(piece, int)), default=0)
    if highest > groups:
        fail("substitution", f"group \\{highest} does not exist: the pattern has {groups}")
    match = program.Match

    def substitute(text: bytes) -> bytes:
        size = len(text)
        out = bytearray()
        position, last_end = 0, -1
        while position <= size:
            spans = match(unanchored, text, position, size)
            start, end = spans[0]
            if start < 0:
                break
            out += text[position:start]
            if start == end == last_end:
                # An empty match right after a match is not replaced, as in RE2::GlobalReplace: one byte is copied and the search goes on.
                out += text[position : position + 1]
                position += 1
                continue
            for piece in pieces:
                out += piece if isinstance(piece, bytes) else _group(text, spans[piece])
            position = last_end = end
        if last_end < 0:
            return text
        out += text[position:]
        return bytes(out)

    return substitute


def compile_captures(pattern: str) -> tuple[Callable[[bytes], list[bytes] | None], dict[str, int]]:
    """For patterns of our own making: a function from a text to its groups (0 is the whole match; None: no full match), and the numbers of named groups."""
    program, both, _ = _compile(pattern, captures=True)
    match = program.Match

    def captures(text: bytes) -> list[bytes] | None:
        spans = match(both, text, 0, len(text))
        return None if spans[0][0] < 0 else [_group(text, span) for span in spans]

    return captures, {name.decode(): index for name, index in program.NamedCapturingGroups()}


def _group(text: bytes, span: tuple[int, int]) -> bytes:
    start, end = span
    return text[start:end] if start >= 0 else b""


def _parse_rewrite(text: bytes) -> list[bytes | int]:
    """Split a substitution into literal pieces and group numbers."""
    pieces: list[bytes | int] = []
    literal = bytearray()
    position = 0
    while position < len(text):
        char = text[position : position + 1]
        if char != b"\\":
            literal += char
            position += 1
            continue
        escaped = text[position + 1 : position + 2]
        if escaped == b"\\":
            literal += b"\\"
        elif escaped.isdigit():
            if literal:
                pieces.append(bytes(literal))
                literal.clear()
            pieces.append(int(escaped))
        else:
            fail("substitution", "a backslash must be followed by a digit or another backslash")
        position += 2
    if literal:
        pieces.append(bytes(literal))
    return pieces


def _program(proto: regex_pb2.RegexMatcher, runtime: Any, *, captures: bool) -> tuple[Any, Any, Any]:
    """Compile and check the size, which Envoy measures with the capturing groups in."""
    if not proto.regex:
        fail("regex", "value length must be at least 1 characters")
    compiled = _compile(proto.regex, captures=True)
    size = compiled[0].ProgramSize()
    if proto.google_re2.ListFields():  # max_program_size, which the xds.type.matcher form has not
        limit, which = proto.google_re2.max_program_size.value, ""
    else:
        limit, which = (
            DEFAULT_MAX_PROGRAM_SIZE if runtime is None else runtime.integer(_SIZE_KEY, DEFAULT_MAX_PROGRAM_SIZE),
            " set for the error level threshold",
        )
    if size > limit:
        fail(
            "regex",
            f"regex '{proto.regex}' RE2 program size of {size} > max program size of {limit}{which}. Increase configured max program size if necessary.",
        )
    if captures or "(" not in proto.regex:
        return compiled
    return _compile(proto.regex, captures=False)


def _compile(pattern: str, *, captures: bool) -> tuple[Any, Any, Any]:
    """The RE2 object, and the anchors for a full and for a partial match."""
    # The module is half a megabyte that a sidecar without regular expressions does not need.
    import re2

    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.log_errors = False
    options.never_capture = not captures
    try:
        wrapper = re2.compile(pattern.encode(), options)
    except re2.error as error:
        why = error.args[0]
        fail("regex", why.decode("utf-8", "replace") if isinstance(why, bytes) else str(why))
    # The wrapper's own methods build generators and match objects: four times the price of the match itself. Its inner object is what they call.
    return wrapper._regexp, re2._Anchor.ANCHOR_BOTH, re2._Anchor.UNANCHORED
