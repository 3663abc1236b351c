"""What a format is compiled with: values as Python expressions, and the function that is put together from them.

A format becomes one Python function of a stream `s`, so that an access log line costs attribute reads and one `%` operation (`Line`). An expression may
use the names that `Code` binds and the functions of `stream_values` under `v`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from meshproxy.observe import flags, json_text, stream_values
from meshproxy.record import Record, replace


class Value(Record, frozen=True):
    """What an operator evaluates to.

    `kind`: "bytes", "text" (str), "int", or "plain" (what JSON can say). `optional`: it may be None. `length`: cut after so many bytes. `key`: a cheap
    expression that decides the value and takes few values itself; empty when there is none. `unique`: bytes that hardly ever come twice, so that
    remembering them is no use. `safe`: bytes that need no escaping in JSON. `planned`: how to say it of a stream with `facts`: COMMON to all of a kind,
    the SAME expression, one that uses the facts by their names, or not at all (empty). `of_request`: it is the first of these of the request's fields that is
    there (or is made of ANY), and so is COMMON only to those that repeat a request.
    """

    kind: str
    expression: str
    optional: bool = True
    length: int | None = None
    key: str = ""
    unique: bool = False
    safe: bool = False
    planned: str = ""
    of_request: tuple[str, ...] = ()


COMMON, SAME = "common", "same"
ANY = "*"
FACTS = "kind, repeated, connection, host, exchange, sent, request_id, service_time, start, end, start_wall"  # the names of StreamInfo.facts in expressions
_REPEATED, _NEW = "repeated is True", "repeated is False"
_REQUEST_ID = b"x-request-id"


class Code:
    """The function being generated: statements so far, and what its global names are bound to. Equal expressions are evaluated once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.lines: list[str] = []
        self._clocks = clock, wall
        self.names: dict[str, Any] = {
            "v": stream_values,
            "short": flags.short,
            "long": flags.long,
            "clock": clock,
            "wall": wall,
            "quoted": json_text.quoted,
            "quote": json_text.quote,
            "unescaped": json_text.UNESCAPED,
            "dump": json_text.dump,
        }
        self._locals: dict[str, str] = {}
        self.response_headers: set[bytes] = set()  # that were asked for, in any branch

    def another(self) -> Code:
        """Code for another branch of the same function: it has locals of its own."""
        code = Code(*self._clocks)
        code.names = self.names
        code.response_headers = self.response_headers
        return code

    def bind(self, value: Any) -> str:
        """A global name for an object."""
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    def local(self, expression: str) -> str:
        """A local variable that holds the expression's value."""
        name = self._locals.get(expression)
        if name is None:
            name = self._locals[expression] = self.fresh()
            self.lines.append(f"{name} = {expression}")
        return name

    def fresh(self) -> str:
        """A new local name."""
        name = f"x{len(self._locals)}"
        self._locals[name] = name
        return name

    def head(self, attribute: str) -> str:
        """The lookup function of `s.request`, `s.response` or trailers, which finds nothing when there are none."""
        key = f"lookup {attribute}"
        name = self._locals.get(key)
        if name is None:
            head = self.local(f"s.{attribute}")
            name = self._locals[key] = self.fresh()
            nothing = self.bind(_nothing)
            # The index behind `get` is used directly: a dict's own `get` costs a quarter of a Python method.
            self.lines += [
                f"if {head} is None:",
                f"    {name} = {nothing}",
                "else:",
                f"    if {head}._index is None:",
                f"        {head}.get(b'')",
                f"    {name} = {head}._index.get",
            ]
        return name

    def function(self, parameters: str = "s") -> Callable[..., bytes]:
        """The function of all statements; the last one returns."""
        body = "\n".join(f"    {line}" for line in self.lines)
        names = dict(self.names)
        # Our own text: parameters of commands appear in it as literals only.
        exec(compile(f"def render({parameters}):\n{body}\n", "<format>", "exec"), names)
        render: Callable[..., bytes] = names["render"]
        return render


def _nothing(name: bytes) -> None:
    """The lookup function of headers that are not there."""


Convert = Callable[[Code, Value], tuple[bytes, str]]  # a value's conversion, such as `%d`, and the expression for it


class Line:
    """Bytes put together from literals and values by `%`, in two steps: what many streams have in common is filled in once and kept.

    Status, flags, route, cluster and the like (values with a `key`) come in few combinations, and a stream costs one look-up for them together. Streams of one
    kind (StreamInfo.facts) have nearly everything in common: where the rest can be said of them (`Value.planned`), they have branches of their own.
    """

    def __init__(self, code: Code) -> None:
        self._code = code
        self._general = _Steps(code)
        # Of streams with facts: those that repeat a request, and those that do not.
        self._planned: dict[str, _Steps] = {branch: _Steps(code.another()) for branch in (_REPEATED, _NEW)}
        self._keys: list[str] = []
        self._parts: list[bytes | tuple[Callable[[Code], Value], Convert]] = []

    def literal(self, text: bytes) -> None:
        """Add text as it is."""
        self._parts.append(text)
        for steps in (self._general, *self._planned.values()):
            steps.literal(text)

    def value(self, parse: Callable[[Code], Value], convert: Convert) -> None:
        """Add a value: `parse` finds it for one branch of the function."""
        self._parts.append((parse, convert))
        steps = self._general
        value = parse(steps.each)
        if value.key:
            if value.key not in self._keys:
                self._keys.append(value.key)
            steps.add_once(*convert(steps.once, parse(steps.once)))
        else:
            steps.add(*convert(steps.each, value))
        if not value.planned:
            self._planned.clear()
        for branch, steps in self._planned.items():
            steps.add_planned(parse, convert, SAME if value.of_request and branch == _NEW else value.planned)

    def function(self) -> Callable[[Any], bytes]:
        """The line as a function of the stream."""
        lines: list[str] = []
        if self._planned:
            lines += ["facts = s.facts", "if facts is not None:", f"    {FACTS} = facts"]
            for branch, steps in self._planned.items():
                known, learn = steps.memo()
                lines += [
                    f"    if {branch}:",
                    "        try:",
                    f"            line = {known}[kind]",
                    "        except KeyError:",
                    f"            {learn}(kind, s)",  # which reads all of it: from here on it is a stream like others
                    "        else:",
                    *(f"            {line}" for line in steps.each.lines),
                    f"            return {steps.filled('line')}",
                ]
            shapes = _Shapes(self._code, self._parts)
            known, learn = self._code.bind(shapes.known), self._code.bind(shapes.learn)
            lines += [
                "    if repeated is not True and repeated is not False:",
                "        try:",
                f"            line, render = {known}[kind]",
                "        except KeyError:",
                f"            {learn}(kind, s)",
                "        else:",
                "            return render(line, s, facts)",
            ]
        lines += self._code.lines
        if self._keys:
            known, learn = self._general.memo()
            lines += [
                f"key = {self._keys[0]}" if len(self._keys) == 1 else f"key = ({', '.join(self._keys)})",
                "try:",
                f"    line = {known}[key]",
                "except KeyError:",
                f"    line = {learn}(key, s)",
            ]
        lines.append(f"return {self._general.filled('line' if self._keys else '')}")
        self._code.lines = lines
        render = self._code.function()
        render.response_headers = frozenset(self._code.response_headers)  # type: ignore[attr-defined]  # for `AccessLog`
        return render


class _Shapes:
    """A line for streams of one kind whose requests differ in a few values (http.shape_plan), which go into what they have in common.

    Which values those are depends on the kind, and so does the function, of which there are few.
    """

    _LIMIT = 512  # kinds remembered; a full memo is emptied
    _FUNCTIONS = 64

    def __init__(self, code: Code, parts: list[bytes | tuple[Callable[[Code], Value], Convert]]) -> None:
        self._code = code
        self._parts = parts
        self._functions: dict[tuple[str, ...], tuple[Callable[..., bytes], Callable[..., bytes]]] = {}
        # kind -> the template, and what fills it: (template, stream, facts) -> line
        self.known: dict[Any, tuple[bytes, Callable[..., bytes]]] = {}

    def learn(self, kind: Any, stream: Any) -> None:
        """Remember a kind, of which this is a stream."""
        plan = kind[0]
        values = [part[0](self._code.another()) for part in self._parts if isinstance(part, tuple)]
        ways = (*(_way(value, plan) for value in values),)
        functions = self._functions.get(ways)
        if functions is None:
            if len(self._functions) >= self._FUNCTIONS:
                self._functions.clear()
            functions = self._functions[ways] = self._make(ways)
        fill, render = functions
        if len(self.known) >= self._LIMIT:
            self.known.clear()
        self.known[kind] = fill(stream), render

    def _make(self, ways: tuple[str, ...]) -> tuple[Callable[..., bytes], Callable[..., bytes]]:
        steps = _Steps(self._code.another())
        remaining = iter(ways)
        for part in self._parts:
            if isinstance(part, bytes):
                steps.literal(part)
            else:
                steps.add_planned(*part, next(remaining))
        each = steps.each
        each.lines[:0] = [f"{FACTS} = facts"]
        each.lines.append(f"return {steps.filled('line')}")
        return steps.fill(), each.function("line, s, facts")


def _way(value: Value, plan: Any) -> str:
    """How to say a value of streams whose requests have this plan (http.shape_plan.ShapedPlan); see `Value.planned`."""
    for text in value.of_request:
        if text == ANY:
            return SAME
        name = text.encode()
        if name == _REQUEST_ID and (plan.new_id is not None or name in plan.places):
            return "request_id" if plan.new_id is not None else f"repeated[{plan.places[name]}]"
        if name in plan.places:
            return f"repeated[{plan.places[name]}]"
        if name in plan.names or name[:1] == b":" or name == b"host":
            return COMMON
    return COMMON if value.of_request else value.planned


class _Steps:
    """A line in two steps: values that many streams have in common make the template that is filled for each."""

    _LIMIT = 512  # templates kept; a full memo is emptied

    def __init__(self, each: Code) -> None:
        self.each = each
        self.once = each.another()
        self._template = b""
        self._common: list[str] = []
        self._own: list[str] = []

    def literal(self, text: bytes) -> None:
        self._template += text.replace(b"%", b"%%%%")

    def add(self, conversion: bytes, expression: str) -> None:
        """A value that each stream has for itself: an expression of `each`."""
        self._template += conversion.replace(b"%", b"%%")
        self._own.append(expression)

    def add_once(self, conversion: bytes, expression: str) -> None:
        """A value that streams have in common: an expression of `once`."""
        self._template += b"%b"
        self._common.append(f"({percent(conversion, [expression])}).replace(b'%', b'%%')")

    def add_planned(self, parse: Callable[[Code], Value], convert: Convert, how: str) -> None:
        """A value of streams with facts. `how`: see `Value.planned`."""
        if how == COMMON:
            self.add_once(*convert(self.once, parse(self.once)))
        elif how == SAME:
            self.add(*convert(self.each, parse(self.each)))
        else:
            value = parse(self.each.another())
            self.add(*convert(self.each, replace(value, expression=how, unique=value.unique or how.startswith("repeated["))))

    def filled(self, template: str = "") -> str:
        """The second step, as an expression. `template`: the variable that holds what the first step made; empty when there is nothing in common."""
        return f"{template} % ({_tuple(self._own)})" if template else percent(self._template % (), self._own)

    def fill(self) -> Callable[..., bytes]:
        """The first step, as a function of a stream."""
        self.once.lines.append(f"return {percent(self._template, self._common)}")
        return self.once.function()

    def memo(self) -> tuple[str, str]:
        """Names of the memo of templates, and of the function that adds one: (key, stream) -> template."""
        fill = self.fill()
        templates: dict[Any, bytes] = {}

        def learn(key: Any, stream: Any) -> bytes:
            if len(templates) >= self._LIMIT:
                templates.clear()
            template = templates[key] = fill(stream)
            return template

        return self.each.bind(templates), self.each.bind(learn)


def percent(template: bytes, arguments: list[str]) -> str:
    """The expression that fills a template."""
    if template == b"%b":
        return arguments[0]
    return f"{template!r} % ({_tuple(arguments)})"


def _tuple(arguments: list[str]) -> str:
    return "".join(f"{argument}, " for argument in arguments)


def as_bytes(code: Code, value: Value) -> str:
    """A local variable with the value as the bytes that a text format shows, or None."""
    cut = "" if value.length is None else f"[:{value.length}]"
    if value.kind == "bytes" and not cut:
        return code.local(value.expression)
    source = code.local(value.expression)
    if value.kind == "int":
        shown = f"b'%d' % {source}"
    elif value.kind == "bytes":
        shown = source
    elif value.kind == "text":
        shown = f"{code.bind(encode)}({source})"
    else:
        shown = f"{code.bind(plain_bytes)}({source})"
    if cut:
        shown = f"({shown}){cut}"
    return code.local(f"None if {source} is None else {shown}" if value.optional else shown)


def encode(value: str | bytes) -> bytes:
    """Text as bytes. Some values come from headers and are bytes already."""
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")


def plain_bytes(value: Any) -> bytes:
    """Metadata in a text format: strings as they are, everything else as JSON."""
    return encode(value) if isinstance(value, (str, bytes)) else json_text.dump(value)
