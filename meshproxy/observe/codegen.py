"""What a format is compiled with: values as Python expressions, and the function that is put together from them.

A format becomes one Python function of a stream `s`, so that an access log line costs attribute reads and one `%` operation. An expression may use the
names that `Code` binds and the functions of `stream_values` under `v`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshproxy.observe import flags, json_text, stream_values


@dataclass(frozen=True, slots=True)
class Value:
    """What an operator evaluates to.

    `kind`: "bytes", "text" (str), "int", or "plain" (what JSON can say). `optional`: it may be None. `length`: cut after so many bytes.
    """

    kind: str
    expression: str
    optional: bool = True
    length: int | None = None


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
            "known": json_text.known,
            "quote": json_text.quote,
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
            name = self._locals[key] = self.fresh()
            nothing = self.bind(_nothing)
            # The index behind `get` is used directly: a dict's own `get` costs a quarter of a Python method.
            self.lines += [
                f"{name} = s.{attribute}",
                f"if {name} is None:",
                f"    {name} = {nothing}",
                "else:",
                f"    if {name}._index is None:",
                f"        {name}.get(b'')",
                f"    {name} = {name}._index.get",
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
