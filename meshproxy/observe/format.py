"""Format strings with `%COMMAND(...)%` operators, compiled to Python functions of a stream.

Used for access log lines (text and JSON), header values, and bodies of local replies. Formats are bytes at heart: header values pass through unchanged,
whatever they hold. What may be said in a format is in `operators`.

Source: envoy.config.core.v3.SubstitutionFormatString.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf import struct_pb2

from meshproxy.api import datasource
from meshproxy.api.errors import UNSUPPORTED, ConfigError, fail, under
from meshproxy.observe import codegen, json_text, operators
from meshproxy.observe.codegen import Code, Line, Value, percent

if TYPE_CHECKING:
    from envoy.config.core.v3 import extension_pb2, substitution_format_string_pb2

    from meshproxy.observe.stream_info import StreamInfo

Format = Callable[["StreamInfo"], bytes]
Segment = bytes | Value

HONOURS = {
    "envoy.config.core.v3.SubstitutionFormatString": (
        "text_format text_format_source json_format omit_empty_values content_type formatters json_format_options"
    ),
    "envoy.config.core.v3.JsonFormatOptions": "sort_properties",
    "envoy.extensions.formatter.metadata.v3.Metadata": "",
    "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery": "",
}

DEFAULT = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% '
    '%DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" "%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" '
    '"%UPSTREAM_HOST%"\n'
)

# Formatter extensions by the type they are configured with -> the commands that they add. METADATA is built in by now.
_EXTENSIONS = {
    "envoy.extensions.formatter.metadata.v3.Metadata": (),
    "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery": ("REQ_WITHOUT_QUERY",),
}

# Patterns are compiled when a format is: few configurations have formats.
_COMMAND = r"%([A-Z0-9_]+)(?:\(([^\n]*?)\))?(?::([0-9]+))?%"
_LENGTH_LIMIT = 1 << 64
_LENGTH_DIGITS = 20  # Python refuses to read numbers of some thousands of digits
# Older spellings that Envoy still takes in header values.
_ARRAY_PARAMETER = r'%(UPSTREAM_METADATA|DYNAMIC_METADATA)\(\[((?:\s*"[^"]*"\s*,?)+)\]\)%'
_QUOTED = r'"([^"]*)"'
_PER_REQUEST_STATE = r"%PER_REQUEST_STATE\(([^)]*)\)%"
_UNSAFE_IN_HEADERS = bytes.maketrans(b"\r\n\0", b"   ")


class Compiler:
    """Compiles formats that share the same clocks and extensions."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time, commands: Iterable[str] = ()) -> None:
        self._clock = clock
        self._wall = wall
        self._enabled = frozenset(commands)

    def parse(self, code: Code, text: str) -> list[Segment]:
        """Literals and values. ConfigError for what is no format."""
        return [part if isinstance(part, bytes) else self._command(code, part) for part in _parts(text)]

    def _command(self, code: Code, match: re.Match[str]) -> Value:
        length = None if match[3] is None else int(match[3])
        return operators.value_of(code, match[1], match[2] or "", length, self._enabled)

    def text(self, text: str, *, omit_empty: bool = False) -> bytes | Format:
        """A text format; a constant when nothing in it varies. Missing values are `-`, or nothing with `omit_empty`."""
        parts = _parts(text)
        if all(isinstance(part, bytes) for part in parts):
            return b"".join(parts)  # type: ignore[arg-type]
        line = Line(self._code())
        for part in parts:
            if isinstance(part, bytes):
                line.literal(part)
            else:
                self._add_text(line, part, b"" if omit_empty else b"-")
        return line.function()

    def _add_text(self, line: Line, match: re.Match[str], empty: bytes) -> None:
        line.value(lambda code: self._command(code, match), lambda code, value: _text_of(code, value, empty))

    def header_value(self, text: str) -> bytes | Format:
        """The value of a header. Missing values are empty, and what could end the header line early becomes a space (RFC 9110 section 5.5)."""
        text = re.sub(_PER_REQUEST_STATE, r"%FILTER_STATE(\1:PLAIN)%", re.sub(_ARRAY_PARAMETER, _colons, text))
        code = self._code()
        segments = self.parse(code, text)
        if all(isinstance(segment, bytes) for segment in segments):
            return b"".join(segments)  # type: ignore[arg-type]
        value = code.local(_concatenation(code, segments, b""))
        safe = code.bind(_UNSAFE_IN_HEADERS)
        code.lines.append(f"if b'\\n' in {value} or b'\\r' in {value} or b'\\0' in {value}: {value} = {value}.translate({safe})")
        code.lines.append(f"return {value}")
        return code.function()

    def json(self, fields: struct_pb2.Struct, *, omit_empty: bool = False) -> Format:
        """A JSON object as one line. A string that is one command keeps the type of its value; missing values are null, or left out."""
        code = self._code()
        if omit_empty:
            name = _Sparse(self, code).object(fields)
            code.lines.append(f"return b'{{}}\\n' if {name} is None else {name} + b'\\n'")
            return code.function()
        line = Line(code)
        self._object(line, fields)
        line.literal(b"\n")
        return line.function()

    def _code(self) -> Code:
        return Code(self._clock, self._wall)

    def _object(self, line: Line, fields: struct_pb2.Struct) -> None:
        separator = b"{"
        for key in sorted(fields.fields):
            line.literal(separator + json_text.quote(key) + b":")
            with under(key):
                self._value(line, fields.fields[key])
            separator = b","
        line.literal(b"}" if fields.fields else b"{}")

    def _value(self, line: Line, value: struct_pb2.Value) -> None:
        kind = value.WhichOneof("kind")
        if kind == "struct_value":
            self._object(line, value.struct_value)
        elif kind == "list_value":
            separator = b"["
            for item in value.list_value.values:
                line.literal(separator)
                self._value(line, item)
                separator = b","
            line.literal(b"]" if value.list_value.values else b"[]")
        elif kind != "string_value":
            line.literal(constant(value))
        else:
            self._string(line, value.string_value)

    def _string(self, line: Line, text: str) -> None:
        parts = _parts(text)
        if all(isinstance(part, bytes) for part in parts):
            line.literal(json_text.quote(b"".join(parts)))  # type: ignore[arg-type]
        elif len(parts) == 1:
            line.value(lambda code: self._command(code, parts[0]), _json_part)  # type: ignore[arg-type]
        else:
            # As Envoy, piece by piece: one that is not UTF-8 does not change how the others are escaped.
            line.literal(b'"')
            for part in parts:
                if isinstance(part, bytes):
                    line.literal(json_text.quote(part)[1:-1])
                else:
                    line.value(lambda code, part=part: self._command(code, part), _json_piece)  # type: ignore[misc]
            line.literal(b'"')


class _Sparse:
    """JSON without the fields that have no value: objects are put together field by field."""

    def __init__(self, compiler: Compiler, code: Code) -> None:
        self._compiler = compiler
        self._code = code

    def object(self, fields: struct_pb2.Struct) -> str:
        """A local variable with the object's bytes, None when it is empty."""
        parts = self._parts()
        for key in sorted(fields.fields):
            with under(key):
                self._append(parts, fields.fields[key], json_text.quote(key) + b":")
        return self._join(parts, b"{", b"}", fields.fields)

    def _list(self, values: struct_pb2.ListValue) -> str:
        parts = self._parts()
        for value in values.values:
            self._append(parts, value, b"")
        return self._join(parts, b"[", b"]", values.values)

    def _parts(self) -> str:
        name = self._code.fresh()
        self._code.lines.append(f"{name} = []")
        return name

    def _join(self, parts: str, start: bytes, end: bytes, had: Any) -> str:
        name = self._code.fresh()
        # An object that was configured empty is a value; one that lost all its fields is not.
        kept = f"if {parts} else None" if had else ""
        self._code.lines.append(f"{name} = {start!r} + b','.join({parts}) + {end!r} {kept}")
        return name

    def _append(self, parts: str, value: struct_pb2.Value, prefix: bytes) -> None:
        code = self._code
        kind = value.WhichOneof("kind")
        if kind in ("struct_value", "list_value"):
            name = self.object(value.struct_value) if kind == "struct_value" else self._list(value.list_value)
        elif kind != "string_value":
            if kind not in (None, "null_value"):
                code.lines.append(f"{parts}.append({prefix + constant(value)!r})")
            return
        else:
            segments = self._compiler.parse(code, value.string_value)
            if all(isinstance(segment, bytes) for segment in segments):
                code.lines.append(f"{parts}.append({prefix + json_text.quote(b''.join(segments))!r})")  # type: ignore[arg-type]
                return
            if len(segments) > 1:
                pieces = [repr(json_text.quote(s)[1:-1]) if isinstance(s, bytes) else _quoted_piece(code, s, b"") for s in segments]
                code.lines.append(f"{parts}.append({prefix!r} + b'\"' + {' + '.join(pieces)} + b'\"')")
                return
            name = code.local(_nullable(code, segments[0], None))  # type: ignore[arg-type]
        code.lines.append(f"if {name} is not None: {parts}.append({prefix!r} + {name})")


# -- expressions


def _parts(text: str) -> list[bytes | re.Match[str]]:
    """Literals and commands. ConfigError for what is no format."""
    parts: list[bytes | re.Match[str]] = []
    literal: list[str] = []
    position = 0
    while (percent := text.find("%", position)) >= 0:
        literal.append(text[position:percent])
        if text.startswith("%%", percent):
            literal.append("%")
            position = percent + 2
            continue
        match = re.compile(_COMMAND).match(text, percent)
        if match is None or (match[3] is not None and (len(match[3]) > _LENGTH_DIGITS or int(match[3]) >= _LENGTH_LIMIT)):
            raise ConfigError(f"Incorrect configuration: {text}. Couldn't find valid command at position {percent}")
        if any(literal):
            parts.append("".join(literal).encode())
        literal = []
        parts.append(match)
        position = match.end()
    literal.append(text[position:])
    if any(literal):
        parts.append("".join(literal).encode())
    return parts


def _concatenation(code: Code, segments: list[Segment], empty: bytes) -> str:
    """One expression for all segments put together, as text."""
    template: list[bytes] = []
    arguments: list[str] = []
    for segment in segments:
        if isinstance(segment, bytes):
            template.append(segment.replace(b"%", b"%%"))
        else:
            conversion, expression = _text_of(code, segment, empty)
            template.append(conversion)
            arguments.append(expression)
    return percent(b"".join(template), arguments)


def _text_of(code: Code, value: Value, empty: bytes) -> tuple[bytes, str]:
    """Conversion and expression for a value in a text."""
    if value.kind == "int" and not value.optional:
        return b"%d", value.expression
    name = codegen.as_bytes(code, value)
    if value.optional:
        name = code.local(f"{empty!r} if {name} is None else {name}")
    return b"%b", name


def _json_part(code: Code, value: Value) -> tuple[bytes, str]:
    """Conversion and expression for a single value in JSON."""
    if value.kind == "int" and not value.optional:
        return b"%d", value.expression
    if value.safe and value.length is None and not value.optional:
        return b'"%b"', value.expression
    return b"%b", code.local(_nullable(code, value, b"null"))


def _json_piece(code: Code, value: Value) -> tuple[bytes, str]:
    """Conversion and expression for a value that is a part of a JSON string."""
    if value.kind == "int" and not value.optional:
        return b"%d", value.expression
    return b"%b", _quoted_piece(code, value, b"-")


def _quoted_piece(code: Code, value: Value, empty: bytes) -> str:
    """The inside of a JSON string."""
    conversion, expression = _text_of(code, value, empty)
    text = expression if conversion == b"%b" else f"b'%d' % {expression}"
    return f"quote({text})[1:-1]"


def _nullable(code: Code, value: Value, null: bytes | None) -> str:
    """The JSON of a value that may be None, then `null`."""
    if value.kind in ("bytes", "text") and value.length is None and not value.unique and null is not None:
        return f"quoted[{value.expression}]"
    name = code.local(value.expression)
    return f"({null!r} if {name} is None else {_json_of(code, value, name)})" if value.optional else _json_of(code, value, name)


def _json_of(code: Code, value: Value, name: str) -> str:
    """The JSON of a local variable that is not None."""
    if value.kind == "int":
        return f"b'%d' % {name}"
    if value.kind == "plain":
        return f"dump({name})" if value.length is None else f"dump({code.bind(_cut)}({name}, {value.length}))"
    if value.length is not None:
        return f"quote({code.bind(codegen.encode)}({name})[:{value.length}])"
    if value.unique:
        return f"(b'\"' + {name} + b'\"' if {name}.translate(unescaped) is {name} else quote({name}))"
    return f"quoted[{name}]"


def _cut(value: Any, length: int) -> Any:
    """Metadata shortened: strings only, structures are never cut."""
    return codegen.encode(value)[:length] if isinstance(value, str) else value


def constant(value: struct_pb2.Value) -> bytes:
    """A number, boolean or null of the configuration."""
    kind = value.WhichOneof("kind")
    return json_text.dump(None if kind in (None, "null_value") else getattr(value, kind))


def _colons(match: re.Match[str]) -> str:
    keys = ":".join(re.findall(_QUOTED, match[2]))
    return f"%{match[1]}({keys})%"


# -- what others call


def compile_format(text: str) -> Callable[[StreamInfo], str]:
    """A text format as a function to str. Bytes that are not UTF-8 become surrogates."""
    compiled = Compiler().text(text)
    if isinstance(compiled, bytes):
        fixed = compiled.decode()
        return lambda _: fixed
    return lambda stream: compiled(stream).decode("utf-8", "surrogateescape")


def compile_header_value(text: str) -> bytes | Format:
    """The value of a header: a constant, or a function. It never holds CR, LF or NUL of a formatted value. ConfigError for what is no format."""
    return Compiler().header_value(text)


def compile_json(fields: struct_pb2.Struct | Mapping[str, Any], *, omit_empty: bool = False) -> Format:
    """A JSON format as a function to one line with its newline."""
    if not isinstance(fields, struct_pb2.Struct):
        struct = struct_pb2.Struct()
        struct.update(fields)
        fields = struct
    return Compiler().json(fields, omit_empty=omit_empty)


def compile_substitution_format(
    proto: substitution_format_string_pb2.SubstitutionFormatString,
    *,
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
) -> Format:
    """A SubstitutionFormatString as a function. `content_type` is up to the caller."""
    compiler = Compiler(clock=clock, wall=wall, commands=_extension_commands(proto.formatters))
    omit = proto.omit_empty_values
    kind = proto.WhichOneof("format")
    if kind == "json_format":
        with under(kind):
            return compiler.json(proto.json_format, omit_empty=omit)
    if kind is None:
        fail("format", "is required")
    with under(kind):
        text = proto.text_format if kind == "text_format" else datasource.read_text(proto.text_format_source, allow_empty=True)
        compiled = compiler.text(text, omit_empty=omit)
    return compiled if not isinstance(compiled, bytes) else _always(compiled)


def default_format(clock: Callable[[], float] = time.monotonic) -> Format:
    """Envoy's default access log line."""
    compiled = Compiler(clock=clock).text(DEFAULT)
    assert not isinstance(compiled, bytes)
    return compiled


def _always(text: bytes) -> Format:
    return lambda _: text


def _extension_commands(formatters: Iterable[extension_pb2.TypedExtensionConfig]) -> list[str]:
    commands: list[str] = []
    for index, extension in enumerate(formatters):
        name = extension.typed_config.TypeName()
        if name not in _EXTENSIONS:
            fail(f"formatters[{index}].typed_config", f"the formatter extension {name or extension.name} is not supported", UNSUPPORTED)
        commands += _EXTENSIONS[name]
    return commands
