"""YAML text to plain values, as Envoy reads it.

YAML goes through libyaml's event stream, not through PyYAML's loader: it is seven times faster, cannot overflow the C stack on nested input, and the
scalar rules are ours: Envoy's are those of yaml-cpp, which differ from PyYAML's (`yes` is true, `0.5` and dates stay text until a field asks for a number).

Beyond Envoy: a duplicate key is an error instead of the last one winning, a second YAML document is an error instead of being ignored, and `<<` merges.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml
from yaml._yaml import CParser
from yaml.events import AliasEvent, DocumentStartEvent, MappingEndEvent, MappingStartEvent, ScalarEvent, SequenceEndEvent, StreamEndEvent

from meshproxy.api.document import MAX_DEPTH
from meshproxy.api.errors import ConfigError

MAX_ALIASED = 2_000_000  # values that aliases may add up to: a few lines of YAML can describe 2**100 of them

_INT = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_TRUE = ("y", "yes", "true", "on")
_FALSE = ("n", "no", "false", "off")
# yaml-cpp takes a word in lower case, upper case or capitalised.
_BOOLS = {form(word): flag for flag, words in ((True, _TRUE), (False, _FALSE)) for word in words for form in (str.lower, str.upper, str.capitalize)}
_IGNORE = "!ignore"  # Envoy drops keys with this tag: a place for anchors
_MERGE = "<<"


def parse(text: str) -> Any:
    """The value of a YAML text, made of dict, list, str, int, bool and None. Raises ConfigError with line and column."""
    return _Yaml(text).document()


class _Yaml:
    """One YAML text. Collections under construction are on an explicit stack; `_memo` remembers what plain scalars mean."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._memo: dict[str, Any] = {}
        self._anchors: dict[str, Any] = {}
        self._aliased = 0

    def document(self) -> Any:
        """The only document of the text; None when the text is empty."""
        try:
            parser = CParser(self._text)
            try:
                return self._read(parser.get_event)
            finally:
                parser.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            raise ConfigError(f"{where}{error.problem or error.context or 'not YAML'}") from error
        except yaml.YAMLError as error:
            raise ConfigError(" ".join(str(error).split())) from error

    def _read(self, next_event: Any) -> Any:
        seen = False
        result = None
        while True:
            event = next_event()
            kind = event.__class__
            if kind is StreamEndEvent:
                return result
            if kind is DocumentStartEvent:
                if seen:
                    _fail(event, "a second document; a configuration is one document")
                seen = True
                result = self._value(next_event)

    def _value(self, next_event: Any) -> Any:
        """One node and all that is below it: the hot loop of loading."""
        stack: list[tuple[Any, Any, str | None]] = []
        holder: Any = None  # the collection being filled
        key: Any = None  # the key whose value comes next; None: a key comes next
        anchor: str | None = None  # of the collection being filled; it names nothing until its end: no value can hold itself
        memo = self._memo
        while True:
            event = next_event()
            kind = event.__class__
            if kind is ScalarEvent:
                if key is None and holder.__class__ is dict:
                    key = self._key(event, holder)
                    continue
                if event.implicit[0]:
                    text = event.value
                    value = memo.get(text, memo)
                    if value is memo:
                        value = memo[text] = _plain(text)
                else:
                    value = _tagged(event)
                if event.anchor:
                    self._anchors[event.anchor] = value
            elif kind is MappingEndEvent or kind is SequenceEndEvent:
                value = holder
                if _MERGE in holder and kind is MappingEndEvent:
                    _merge(holder, holder.pop(_MERGE))
                if anchor:
                    self._anchors[anchor] = value
                holder, key, anchor = stack.pop()
            elif kind is AliasEvent:
                value = self._alias(event)
                if key is None and holder.__class__ is dict:
                    _fail(event, "a key must be a scalar, not an alias")
            else:
                if key is None and holder.__class__ is dict:
                    _fail(event, "a key must be a scalar")
                if len(stack) >= MAX_DEPTH:
                    _fail(event, "nested too deeply")
                stack.append((holder, key, anchor))
                holder = {} if kind is MappingStartEvent else []
                key = None
                anchor = event.anchor
                if anchor:
                    self._anchors.pop(anchor, None)
                continue
            if holder is None:
                return value
            if holder.__class__ is list:
                holder.append(value)
                continue
            if key is not _DROP:
                holder[key] = value
            key = None

    def _key(self, event: ScalarEvent, holder: dict[str, Any]) -> Any:
        if event.tag == _IGNORE:
            return _DROP
        key = event.value
        if key in holder:
            _fail(event, f"duplicate key {key!r}")
        if event.anchor:
            self._anchors[event.anchor] = key
        return key

    def _alias(self, event: AliasEvent) -> Any:
        if event.anchor not in self._anchors:
            _fail(event, f"the anchor {event.anchor!r} is not defined before this line")
        value = self._anchors[event.anchor]
        self._aliased += _size(value, MAX_ALIASED - self._aliased)
        if self._aliased > MAX_ALIASED:
            _fail(event, f"aliases expand to more than {MAX_ALIASED} values")
        return value


_DROP = object()


def _fail(event: Any, why: str) -> NoReturn:
    mark = event.start_mark
    raise ConfigError(f"line {mark.line + 1}, column {mark.column + 1}: {why}")


def _plain(text: str) -> Any:
    """What a plain (unquoted) scalar means. Fractions stay text: the field that they are for knows how to read them."""
    if text in _NULLS:
        return None
    flag = _BOOLS.get(text)
    if flag is not None:
        return flag
    if _INT.fullmatch(text) and len(text) < 25:
        digits = text.lstrip("+-")
        value = int(digits, 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10)
        if text[0] == "-":
            value = -value
        if -(1 << 63) <= value < 1 << 63:
            return value if -(1 << 31) <= value < 1 << 31 else str(value)
    return text


def _tagged(event: ScalarEvent) -> Any:
    # Quoted and block scalars are text. An explicit tag does not change how Envoy reads a plain scalar, but !!str says what its author wants.
    if event.style is not None or event.tag in (None, "!", "tag:yaml.org,2002:str"):
        return event.value
    return _plain(event.value)


def _merge(holder: dict[str, Any], value: Any) -> None:
    sources = value if isinstance(value, list) else [value]
    for source in sources:
        if not isinstance(source, dict):
            raise ConfigError("the value of a merge key (<<) must be a mapping or a list of mappings")
        for key, item in source.items():
            holder.setdefault(key, item)


def _size(value: Any, limit: int) -> int:
    """How many values are in `value`, counting no further than just over `limit`."""
    total = 1
    todo = [value]
    while todo and total <= limit:
        item = todo.pop()
        if item.__class__ is dict:
            total += len(item)
            todo.extend(item.values())
        elif item.__class__ is list:
            total += len(item)
            todo.extend(item)
    return total
