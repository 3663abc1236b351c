"""Single constraints of `validate.rules`, compiled: what a value must be, and what to say when it is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from validate import validate_pb2

_HEADER_NAME = re.compile(r":?[0-9a-zA-Z!#$%&'*+\-.^_|~`,]+")
_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_HEADER_STRING = re.compile(r"[^\x00\r\n]*")


class Limit(NamedTuple):
    """One constraint of a value."""

    holds: Callable[[Any], bool]
    why: Callable[[Any], str]


def compile_limits(field: Any, rules: validate_pb2.FieldRules) -> tuple[Limit, ...]:
    """The constraints of a value of the field's type."""
    kind = rules.WhichOneof("type")
    if kind is None:
        return ()
    own = getattr(rules, kind)
    if kind == "string":
        limits = tuple(_string_limits(own))
    elif kind == "bytes":
        limits = tuple(_length_limits(own, "min_len", "max_len", len, "bytes"))
    elif kind == "enum":
        limits = tuple(_enumcompile_limits(field, own))
    elif kind == "bool":
        limits = (Limit(lambda value: value is own.const, lambda _: f"must be {str(own.const).lower()}"),) if own.HasField("const") else ()
    elif kind in ("message", "repeated", "map", "any", "duration", "timestamp"):
        return ()
    else:
        limits = tuple(numeric_limits(own, lambda value: value, str))
    if getattr(own, "ignore_empty", False):
        limits = tuple(Limit(_or_empty(limit.holds), limit.why) for limit in limits)
    return limits


def _or_empty(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: not value or holds(value)


def numeric_limits(rules: Any, key: Callable[[Any], Any], text: Callable[[Any], str]) -> list[Limit]:
    """Bounds, constants and sets, for numbers and (by `key`) for durations."""
    limits: list[Limit] = []
    low, high = next((name for name in ("gt", "gte") if rules.HasField(name)), None), next((name for name in ("lt", "lte") if rules.HasField(name)), None)
    above = _bound(low, key(getattr(rules, low)), key) if low else None
    below = _bound(high, key(getattr(rules, high)), key) if high else None
    words = {"gt": "greater than", "gte": "at least", "lt": "less than", "lte": "at most"}
    wanted = " and ".join(f"{words[name]} {text(getattr(rules, name))}" for name in (low, high) if name)
    if above and below and key(getattr(rules, low)) > key(getattr(rules, high)):  # type: ignore[arg-type]
        # Bounds the wrong way round mean "outside of".
        limits.append(Limit(lambda value: above(value) or below(value), lambda value: f"{text(value)} must be {wanted.replace(' and ', ' or ')}"))
    elif above and below:
        limits.append(Limit(lambda value: above(value) and below(value), lambda value: f"{text(value)} is out of range: must be {wanted}"))
    elif above or below:
        limits.append(Limit(above or below, lambda value: f"{text(value)} is out of range: must be {wanted}"))  # type: ignore[arg-type]
    if rules.HasField("const"):
        limits.append(Limit(lambda value: key(value) == key(rules.const), lambda value: f"{text(value)} must be {text(rules.const)}"))
    for name, inside in (("in", True), ("not_in", False)):
        chosen = [key(item) for item in getattr(rules, name)]
        if chosen:
            listed = ", ".join(text(item) for item in getattr(rules, name))
            limits.append(_membership(chosen, listed, key, text, inside=inside))
    return limits


def _bound(name: str, limit: Any, key: Callable[[Any], Any]) -> Callable[[Any], bool]:
    if name == "gt":
        return lambda value: key(value) > limit
    if name == "gte":
        return lambda value: key(value) >= limit
    if name == "lt":
        return lambda value: key(value) < limit
    return lambda value: key(value) <= limit


def _membership(chosen: list[Any], listed: str, key: Callable[[Any], Any], text: Callable[[Any], str], *, inside: bool) -> Limit:
    if inside:
        return Limit(lambda value: key(value) in chosen, lambda value: f"{text(value)} is not one of {listed}")
    return Limit(lambda value: key(value) not in chosen, lambda value: f"{text(value)} is not allowed here")


def _string_limits(rules: validate_pb2.StringRules) -> Iterable[Limit]:
    yield from _length_limits(rules, "min_len", "max_len", len, "characters")
    yield from _length_limits(rules, "min_bytes", "max_bytes", lambda value: len(value.encode()), "bytes")
    if rules.pattern:
        pattern = re.compile(rules.pattern)
        yield Limit(lambda value: pattern.fullmatch(value) is not None, lambda value: f"{_quote(value)} does not match {rules.pattern}")
    if rules.prefix:
        yield Limit(lambda value: value.startswith(rules.prefix), lambda value: f"{_quote(value)} must start with {rules.prefix!r}")
    if rules.suffix:
        yield Limit(lambda value: value.endswith(rules.suffix), lambda value: f"{_quote(value)} must end with {rules.suffix!r}")
    if rules.HasField("const"):
        yield Limit(lambda value: value == rules.const, lambda value: f"{_quote(value)} must be {rules.const!r}")
    for name, inside in (("in", True), ("not_in", False)):
        chosen = list(getattr(rules, name))
        if chosen:
            yield _membership(chosen, ", ".join(map(_quote, chosen)), lambda value: value, _quote, inside=inside)
    known = rules.well_known_regex
    if known == validate_pb2.HTTP_HEADER_NAME and rules.strict:
        yield Limit(lambda value: _HEADER_NAME.fullmatch(value) is not None, lambda value: f"{_quote(value)} is not a header name")
    elif known == validate_pb2.HTTP_HEADER_VALUE and rules.strict:
        yield Limit(lambda value: _HEADER_VALUE.fullmatch(value) is not None, lambda value: f"{_quote(value)} is not a header value")
    elif known:
        yield Limit(lambda value: _HEADER_STRING.fullmatch(value) is not None, lambda value: f"{_quote(value)} must not hold line breaks or NUL")


def _length_limits(rules: Any, low: str, high: str, measure: Callable[[Any], int], unit: str) -> Iterable[Limit]:
    least = getattr(rules, low)
    most = getattr(rules, high)
    if least == 1:
        yield Limit(bool, lambda _: "must not be empty")
    elif least:
        yield Limit(lambda value: measure(value) >= least, lambda value: f"must have at least {least} {unit}, has {measure(value)}")
    if rules.HasField(high):
        yield Limit(lambda value: measure(value) <= most, lambda value: f"must have at most {most} {unit}, has {measure(value)}")


def _enumcompile_limits(field: Any, rules: validate_pb2.EnumRules) -> Iterable[Limit]:
    names = {value.number: value.name for value in field.enum_type.values}
    if rules.defined_only:
        yield Limit(names.__contains__, lambda value: f"{value} is not one of {', '.join(names.values())}")
    if rules.HasField("const"):
        yield Limit(lambda value: value == rules.const, lambda _: f"must be {names[rules.const]}")
    for name, inside in (("in", True), ("not_in", False)):
        chosen = list(getattr(rules, name))
        if chosen:
            text = lambda value: names.get(value, str(value))  # noqa: E731
            yield _membership(chosen, ", ".join(map(text, chosen)), lambda value: value, text, inside=inside)


def _quote(value: str) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
