"""What a format is compiled with: values as Python expressions, and the function that is put together from them.

A format becomes one Python function of a stream `s`, so that an access log line costs attribute reads and one `%` operation (`Line`). An expression may
use the names that `Code` binds and the functions of `stream_values` under `v`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from meshproxy.observe import flags, json_text, stream_values
from meshproxy.record import Record


class Value(Record, frozen=True):
    """What an operator evaluates to.

    `kind`: "bytes", "text" (str), "int", or "plain" (what JSON can say). `optional`: it may be None. `length`: cut after so many bytes. `key`: a cheap
    expression that decides the value and takes few values itself; empty when there is none. `unique`: bytes that hardly ever come twice, so that
    remembering them is no use. `safe`: bytes that need no escaping in JSON.
    """

    kind: str
    expression: str
    optional: bool = True
    length: int | None = None
    key: str = ""
    unique: bool = False
    safe: bool = False


class Code:
    """The function being generated: statements so far, and what its global names are bound to. Equal expressions are evaluated once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.lines: list[str] = []
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

    def function(self) -> Callable[[Any], bytes]:
        """The function of all statements; the last one returns."""
        body = "\n".join(f"    {line}" for line in self.lines)
        names = dict(self.names)
        # Our own text: parameters of commands appear in it as literals only.
        exec(compile(f"def render(s):\n{body}\n", "<format>", "exec"), names)
        render: Callable[[Any], bytes] = names["render"]
        return render


def _nothing(name: bytes) -> None:
    """The lookup function of headers that are not there."""


class Line:
    """Bytes put together from literals and values by `%`, in two steps where values have keys.

    Status, flags, route, cluster and the like come in few combinations: a line in which all of those are filled in is kept for each combination, so that a
    stream costs one look-up for them together. `code` evaluates what is left, `fill` the values with keys.
    """

    _LIMIT = 256  # combinations; a full memo is emptied

    def __init__(self, code: Code, fill: Code) -> None:
        self.code = code
        self.fill = fill
        self._parts: list[bytes | tuple[bytes, str, bool]] = []  # literals, and (conversion, expression, whether it is one of `fill`)
        self._keys: list[str] = []

    def literal(self, text: bytes) -> None:
        """Add text as it is."""
        self._parts.append(text)

    def value(self, conversion: bytes, expression: str) -> None:
        """Add a value: `%b` or `%d`, and an expression of `code`."""
        self._parts.append((conversion, expression, False))

    def keyed(self, key: str, expression: str) -> None:
        """Add bytes that depend on `key` alone: an expression of `fill`."""
        if key not in self._keys:
            self._keys.append(key)
        self._parts.append((b"%b", expression, True))

    def function(self) -> Callable[[Any], bytes]:
        """The line as a function of the stream."""
        code = self.code
        template, arguments = self._template(filling=False)
        if not self._keys:
            code.lines.append(f"return {percent(template, arguments)}")
            return code.function()
        inner, values = self._template(filling=True)
        self.fill.lines.append(f"return {percent(inner, values)}")
        fill = self.fill.function()
        templates: dict[Any, bytes] = {}

        def remember(key: Any, stream: Any) -> bytes:
            if len(templates) >= self._LIMIT:
                templates.clear()
            filled = templates[key] = fill(stream)
            return filled

        known, add = code.bind(templates), code.bind(remember)
        code.lines += [
            f"key = {self._keys[0]}" if len(self._keys) == 1 else f"key = ({', '.join(self._keys)})",
            "try:",
            f"    line = {known}[key]",
            "except KeyError:",
            f"    line = {add}(key, s)",
            f"return line % ({''.join(f'{argument}, ' for argument in arguments)})",
        ]
        return code.function()

    def _template(self, *, filling: bool) -> tuple[bytes, list[str]]:
        """Template and arguments of the whole line, or (`filling`) of the step that makes such a template by filling keyed values in."""
        template: list[bytes] = []
        arguments: list[str] = []
        for part in self._parts:
            if isinstance(part, bytes):
                template.append(part.replace(b"%", b"%%%%" if filling else b"%%"))
            elif part[2] == filling:
                template.append(part[0])
                arguments.append(f"({part[1]}).replace(b'%', b'%%')" if filling else part[1])
            elif filling:
                template.append(b"%" + part[0])
        return b"".join(template), arguments


def percent(template: bytes, arguments: list[str]) -> str:
    """The expression that fills a template."""
    if template == b"%b":
        return arguments[0]
    return f"{template!r} % ({''.join(f'{argument}, ' for argument in arguments)})"


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
