"""The constraints that the API's protos declare for themselves (`validate.rules`): ranges, lengths, patterns, required fields and oneofs.

A `Checker` walks a whole message, through every Any, and returns all violations. A plan is compiled per message type on first use; types below which nothing
is constrained are not entered. Beyond the declared rules every Duration must be positive, as Envoy requires where it reads one.

With a `Policy` the same walk also finds what is not honoured; `support.py` has the one that matters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from validate import validate_pb2

from meshproxy.api import registry
from meshproxy.api.errors import INVALID, UNSUPPORTED, ConfigError, Problem, join

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

MAX_DEPTH = 400  # Any inside Any inside Any is bounded by nothing else

_ANY = "google.protobuf.Any"
_DURATION = "google.protobuf.Duration"
_OPAQUE = frozenset(("google.protobuf.Struct", "google.protobuf.Value", "google.protobuf.ListValue", "google.protobuf.Timestamp", "google.protobuf.FieldMask"))
_WRAPPERS = re.compile(r"google\.protobuf\.(?:Bool|Bytes|Double|Float|U?Int32|U?Int64|String)Value")

_HEADER_NAME = re.compile(r":?[0-9a-zA-Z!#$%&'*+\-.^_|~`,]+")
_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_HEADER_STRING = re.compile(r"[^\x00\r\n]*")

_Check = Callable[[Any, "_Walk"], None]  # of a value whose path is on the walk's stack, or of a whole message


class Policy(Protocol):
    """What is honoured, for a Checker to find what is not."""

    def fields(self, message: str) -> frozenset[str] | None:
        """The honoured fields of a message, by full name; None when the message is not honoured at all."""

    def kind(self, field: str) -> str | None:
        """The kind of extension (a key of registry.KINDS) that belongs into a field or into the message in it; None: what belongs into the field around it."""

    def refusal(self, kind: str | None, message: str) -> Problem | None:
        """Why an extension of the type `message` cannot be where one of `kind` belongs; None when it can."""


def check(message: Message) -> list[Problem]:
    """Everything in `message`, and in what it contains, that breaks a declared constraint. Paths are relative to the message."""
    return _RULES_ONLY.check(message)


class _Walk:
    """Where a check is, what it found, and what kind of extension the next Any should hold."""

    __slots__ = ("clean", "kind", "optional", "problems", "stack")

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.problems: list[Problem] = []
        self.kind: str | None = None
        self.optional = False  # the extension may be left out
        self.clean: set[tuple[str | None, bytes]] = set()  # short Any values without problems: many clusters hold the same

    def report(self, why: str, below: str = "", kind: str = INVALID) -> None:
        path = ""
        for part in (*self.stack, below):
            path = join(path, part)
        self.problems.append(Problem(path, why, kind))


class _Limit(NamedTuple):
    """One constraint of a value."""

    holds: Callable[[Any], bool]
    why: Callable[[Any], str]


class Checker:
    """Checks messages by the rules of their protos and, if there is one, by a policy. Plans are kept: use one Checker for many messages."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy
        self._plans: dict[str, _Plan] = {}

    def check(self, message: Message) -> list[Problem]:
        """Everything that is wrong in `message` and in what it contains. Paths are relative to the message."""
        walk = _Walk()
        self.plan(message.DESCRIPTOR)(message, walk)
        return walk.problems

    def plan(self, descriptor: Descriptor) -> _Plan:
        plan = self._plans.get(descriptor.full_name)
        if plan is None:
            plan = self._plans[descriptor.full_name] = _Plan(descriptor, self)
        return plan

    def inner(self, descriptor: Descriptor, rules: validate_pb2.FieldRules) -> _Check | None:
        """The check of a nested message, None when there is nothing to check in it."""
        name = descriptor.full_name
        if name == _ANY:
            return self._check_any
        if name == _DURATION:
            return _duration_check(rules.duration)
        if _WRAPPERS.fullmatch(name):
            limits = _limits(descriptor.fields_by_name["value"], rules)
            check_value = _value_check(limits)
            return (lambda wrapper, walk: check_value(wrapper.value, walk)) if limits else None
        if name in _OPAQUE or rules.message.skip:
            return None
        return self.plan(descriptor) if self.policy is not None or _constrained(name, descriptor) else None

    def _check_any(self, packed: Any, walk: _Walk) -> None:
        if not packed.type_url and not packed.value:
            return  # what an empty typed_config means is for its reader to say
        kind = walk.kind
        key = (kind, packed.SerializeToString())
        if key in walk.clean:
            return
        before = len(walk.problems)
        try:
            message = registry.unpack(packed)
        except ConfigError as error:
            for problem in error.problems:
                walk.report(problem.why, problem.path)
            return
        if self.policy is not None:
            refusal = self.policy.refusal(kind, message.DESCRIPTOR.full_name)
            if refusal is not None:
                if not walk.optional:
                    walk.report(refusal.why, kind=refusal.kind)
                return
        walk.kind = None
        self.plan(message.DESCRIPTOR)(message, walk)
        walk.kind = kind
        if len(walk.problems) == before and len(key[1]) < 512:
            walk.clean.add(key)


class _Plan:
    """How to check the messages of one type: what must hold even for unset fields, and what must hold for each field that is set."""

    __slots__ = ("_always", "_checker", "_descriptor", "_set")

    def __init__(self, descriptor: Descriptor, checker: Checker) -> None:
        self._descriptor = descriptor
        self._checker = checker
        self._always: list[_Check] | None = None
        self._set: dict[int, _Check] = {}

    def __call__(self, message: Any, walk: _Walk) -> None:
        always = self._always
        if always is None:  # on first use, because message types refer to each other in circles
            always = self._compile()
        if len(walk.stack) > MAX_DEPTH:
            walk.report("nested too deeply")
            return
        for check_unset in always:
            check_unset(message, walk)
        checks = self._set
        for field, value in message.ListFields():
            check_set = checks.get(field.number)
            if check_set is not None:
                check_set(value, walk)

    def _compile(self) -> list[_Check]:
        self._always = always = []
        descriptor = self._descriptor
        policy = self._checker.policy
        honoured = policy.fields(descriptor.full_name) if policy is not None else None
        if policy is not None and honoured is None:
            always.append(_unsupported_message(descriptor.full_name))
        if "is_optional" in descriptor.fields_by_name:
            always.append(_remember_optional)
        for oneof in descriptor.oneofs:
            if oneof.GetOptions().Extensions[validate_pb2.required]:
                always.append(_required_oneof(oneof.name, " or ".join(field.name for field in oneof.fields)))
        for field in descriptor.fields:
            check_set = self._compile_field(field, always)
            if policy is not None:
                kind = policy.kind(field.full_name)
                if kind is not None and check_set is not None:
                    check_set = _with_kind(kind, check_set)
                if honoured is not None and field.name not in honoured:
                    check_set = _unsupported_field(field.name, check_set)
            if check_set is not None:
                self._set[field.number] = check_set
        return always

    def _compile_field(self, field: FieldDescriptor, always: list[_Check]) -> _Check | None:
        rules = field.GetOptions().Extensions[validate_pb2.rules]
        if field.is_repeated or field.message_type is not None:
            must = _must_be_there(field, rules)
            if must is not None:
                always.append(must)
            if field.is_repeated:
                return _repeated(field, rules, self._checker)
            inner = self._checker.inner(field.message_type, rules)
            return _below(field.name, inner) if inner is not None else None
        limits = _limits(field, rules)
        if not limits:
            return None
        broken = next((limit for limit in limits if not field.has_presence and not limit.holds(field.default_value)), None)
        if broken is not None:
            always.append(_not_default(field.name, broken.why(field.default_value)))
        return _below(field.name, _value_check(limits))


# -- what the policy finds


def _unsupported_message(name: str) -> _Check:
    return lambda _, walk: walk.report(f"{name} is not supported", kind=UNSUPPORTED)


def _unsupported_field(name: str, inner: _Check | None) -> _Check:
    def check_field(value: Any, walk: _Walk) -> None:
        walk.report("is not supported", name, UNSUPPORTED)
        if inner is not None:
            # What is below is as unsupported, and needs no second mention; but it must be valid.
            problems = walk.problems
            walk.problems = []
            inner(value, walk)
            problems += [problem for problem in walk.problems if problem.kind == INVALID]
            walk.problems = problems

    return check_field


def _with_kind(kind: str, inner: _Check) -> _Check:
    def check_field(value: Any, walk: _Walk) -> None:
        outer = walk.kind
        walk.kind = kind
        inner(value, walk)
        walk.kind = outer

    return check_field


def _remember_optional(message: Any, walk: _Walk) -> None:
    walk.optional = message.is_optional


# -- what must hold for unset fields


def _required_oneof(name: str, choices: str) -> _Check:
    def check_oneof(message: Any, walk: _Walk) -> None:
        if message.WhichOneof(name) is None:
            walk.report(f"{choices} must be set")

    return check_oneof


def _not_default(name: str, why: str) -> _Check:
    """The default value of the scalar `name` breaks its rules, so that it must be set."""

    def check_scalar(message: Any, walk: _Walk) -> None:
        if not getattr(message, name):
            walk.report(why, name)

    return check_scalar


def _must_be_there(field: FieldDescriptor, rules: validate_pb2.FieldRules) -> _Check | None:
    name = field.name
    if field.is_repeated:
        least = rules.repeated.min_items or rules.map.min_pairs
        if not least:
            return None

        def check_count(message: Any, walk: _Walk) -> None:
            count = len(getattr(message, name))
            if count < least:
                walk.report("must not be empty" if least == 1 else f"must have at least {least} items, has {count}", name)

        return check_count
    required = rules.message.required or rules.any.required or rules.duration.required or rules.timestamp.required
    # A member of a oneof is required only when it is the chosen one, and then it is there.
    if not required or field.containing_oneof is not None:
        return None

    def check_presence(message: Any, walk: _Walk) -> None:
        if not message.HasField(name):
            walk.report("is required", name)

    return check_presence


# -- what must hold for set fields


def _below(name: str, inner: _Check) -> _Check:
    def check_field(value: Any, walk: _Walk) -> None:
        stack = walk.stack
        stack.append(name)
        inner(value, walk)
        stack.pop()

    return check_field


def _value_check(limits: tuple[_Limit, ...]) -> _Check:
    def check_value(value: Any, walk: _Walk) -> None:
        for holds, why in limits:
            if not holds(value):
                walk.report(why(value))

    return check_value


def _repeated(field: FieldDescriptor, rules: validate_pb2.FieldRules, checker: Checker) -> _Check | None:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        return _map(field, rules.map, checker)
    own = rules.repeated
    limits = _limits(field, own.items)
    inner: _Check | None = None
    if entry is not None:
        inner = checker.inner(entry, own.items)
    elif limits:
        inner = _value_check(limits)
    name = field.name
    most = own.max_items if own.HasField("max_items") else None
    unique = own.unique
    if inner is None and most is None and not unique:
        return None

    def check_items(items: Any, walk: _Walk) -> None:
        if most is not None and len(items) > most:
            walk.report(f"must have at most {most} items, has {len(items)}", name)
        if unique and len(set(items)) != len(items):
            walk.report("must not hold the same item twice", name)
        if inner is not None:
            stack = walk.stack
            stack.append("")
            for i, item in enumerate(items):
                stack[-1] = f"{name}[{i}]"
                inner(item, walk)
            stack.pop()

    return check_items


def _map(field: FieldDescriptor, rules: validate_pb2.MapRules, checker: Checker) -> _Check | None:
    name = field.name
    key_field = field.message_type.fields_by_name["key"]
    value_field = field.message_type.fields_by_name["value"]
    key_limits = _limits(key_field, rules.keys)
    check_key = _value_check(key_limits) if key_limits else None
    check_value: _Check | None = None
    if value_field.message_type is not None:
        check_value = checker.inner(value_field.message_type, rules.values)
    elif limits := _limits(value_field, rules.values):
        check_value = _value_check(limits)
    if check_key is None and check_value is None:
        return None

    def check_pairs(pairs: Any, walk: _Walk) -> None:
        stack = walk.stack
        for key, value in pairs.items():
            stack.append(f'{name}["{key}"]')
            if check_key is not None:
                check_key(key, walk)
            if check_value is not None:
                check_value(value, walk)
            stack.pop()

    return check_pairs


# -- messages inside messages


def _duration_check(rules: validate_pb2.DurationRules) -> _Check:
    limits = _numeric_limits(rules, lambda value: (value.seconds, value.nanos), _duration_text)

    def check_duration(value: Any, walk: _Walk) -> None:
        if value.seconds < 0 or value.nanos < 0:
            walk.report(f"{_duration_text(value)} is negative")
            return
        if value.nanos > 999_999_999:
            walk.report(f"nanos is {value.nanos}, which is a second or more")
        for holds, why in limits:
            if not holds(value):
                walk.report(why(value))

    return check_duration


def _duration_text(value: Any) -> str:
    return f"{value.seconds + value.nanos / 1e9:g}s"


@cache
def _constrained(name: str, descriptor: Descriptor) -> bool:
    """Whether anything below messages of this type can break a rule. `name` is only the key of the memo."""
    seen = {descriptor.full_name}
    todo = [descriptor]
    while todo:
        current = todo.pop()
        if any(oneof.GetOptions().Extensions[validate_pb2.required] for oneof in current.oneofs):
            return True
        for field in current.fields:
            if field.GetOptions().HasExtension(validate_pb2.rules):
                return True
            inner = field.message_type
            if inner is None:
                continue
            if inner.full_name in (_ANY, _DURATION):
                return True
            if inner.full_name not in seen and inner.full_name not in _OPAQUE:
                seen.add(inner.full_name)
                todo.append(inner)
    return False


# -- values


def _limits(field: FieldDescriptor, rules: validate_pb2.FieldRules) -> tuple[_Limit, ...]:
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
        limits = tuple(_enum_limits(field, own))
    elif kind == "bool":
        limits = (_Limit(lambda value: value is own.const, lambda _: f"must be {str(own.const).lower()}"),) if own.HasField("const") else ()
    elif kind in ("message", "repeated", "map", "any", "duration", "timestamp"):
        return ()
    else:
        limits = tuple(_numeric_limits(own, lambda value: value, str))
    if getattr(own, "ignore_empty", False):
        limits = tuple(_Limit(_or_empty(limit.holds), limit.why) for limit in limits)
    return limits


def _or_empty(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: not value or holds(value)


def _numeric_limits(rules: Any, key: Callable[[Any], Any], text: Callable[[Any], str]) -> list[_Limit]:
    """Bounds, constants and sets, for numbers and (by `key`) for durations."""
    limits: list[_Limit] = []
    low, high = next((name for name in ("gt", "gte") if rules.HasField(name)), None), next((name for name in ("lt", "lte") if rules.HasField(name)), None)
    above = _bound(low, key(getattr(rules, low)), key) if low else None
    below = _bound(high, key(getattr(rules, high)), key) if high else None
    words = {"gt": "greater than", "gte": "at least", "lt": "less than", "lte": "at most"}
    wanted = " and ".join(f"{words[name]} {text(getattr(rules, name))}" for name in (low, high) if name)
    if above and below and key(getattr(rules, low)) > key(getattr(rules, high)):  # type: ignore[arg-type]
        # Bounds the wrong way round mean "outside of".
        limits.append(_Limit(lambda value: above(value) or below(value), lambda value: f"{text(value)} must be {wanted.replace(' and ', ' or ')}"))
    elif above and below:
        limits.append(_Limit(lambda value: above(value) and below(value), lambda value: f"{text(value)} is out of range: must be {wanted}"))
    elif above or below:
        limits.append(_Limit(above or below, lambda value: f"{text(value)} is out of range: must be {wanted}"))  # type: ignore[arg-type]
    if rules.HasField("const"):
        limits.append(_Limit(lambda value: key(value) == key(rules.const), lambda value: f"{text(value)} must be {text(rules.const)}"))
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


def _membership(chosen: list[Any], listed: str, key: Callable[[Any], Any], text: Callable[[Any], str], *, inside: bool) -> _Limit:
    if inside:
        return _Limit(lambda value: key(value) in chosen, lambda value: f"{text(value)} is not one of {listed}")
    return _Limit(lambda value: key(value) not in chosen, lambda value: f"{text(value)} is not allowed here")


def _string_limits(rules: validate_pb2.StringRules) -> Iterable[_Limit]:
    yield from _length_limits(rules, "min_len", "max_len", len, "characters")
    yield from _length_limits(rules, "min_bytes", "max_bytes", lambda value: len(value.encode()), "bytes")
    if rules.pattern:
        pattern = re.compile(rules.pattern)
        yield _Limit(lambda value: pattern.fullmatch(value) is not None, lambda value: f"{_quote(value)} does not match {rules.pattern}")
    if rules.prefix:
        yield _Limit(lambda value: value.startswith(rules.prefix), lambda value: f"{_quote(value)} must start with {rules.prefix!r}")
    if rules.suffix:
        yield _Limit(lambda value: value.endswith(rules.suffix), lambda value: f"{_quote(value)} must end with {rules.suffix!r}")
    if rules.HasField("const"):
        yield _Limit(lambda value: value == rules.const, lambda value: f"{_quote(value)} must be {rules.const!r}")
    for name, inside in (("in", True), ("not_in", False)):
        chosen = list(getattr(rules, name))
        if chosen:
            yield _membership(chosen, ", ".join(map(_quote, chosen)), lambda value: value, _quote, inside=inside)
    known = rules.well_known_regex
    if known == validate_pb2.HTTP_HEADER_NAME and rules.strict:
        yield _Limit(lambda value: _HEADER_NAME.fullmatch(value) is not None, lambda value: f"{_quote(value)} is not a header name")
    elif known == validate_pb2.HTTP_HEADER_VALUE and rules.strict:
        yield _Limit(lambda value: _HEADER_VALUE.fullmatch(value) is not None, lambda value: f"{_quote(value)} is not a header value")
    elif known:
        yield _Limit(lambda value: _HEADER_STRING.fullmatch(value) is not None, lambda value: f"{_quote(value)} must not hold line breaks or NUL")


def _length_limits(rules: Any, low: str, high: str, measure: Callable[[Any], int], unit: str) -> Iterable[_Limit]:
    least = getattr(rules, low)
    most = getattr(rules, high)
    if least == 1:
        yield _Limit(bool, lambda _: "must not be empty")
    elif least:
        yield _Limit(lambda value: measure(value) >= least, lambda value: f"must have at least {least} {unit}, has {measure(value)}")
    if rules.HasField(high):
        yield _Limit(lambda value: measure(value) <= most, lambda value: f"must have at most {most} {unit}, has {measure(value)}")


def _enum_limits(field: FieldDescriptor, rules: validate_pb2.EnumRules) -> Iterable[_Limit]:
    names = {value.number: value.name for value in field.enum_type.values}
    if rules.defined_only:
        yield _Limit(names.__contains__, lambda value: f"{value} is not one of {', '.join(names.values())}")
    if rules.HasField("const"):
        yield _Limit(lambda value: value == rules.const, lambda _: f"must be {names[rules.const]}")
    for name, inside in (("in", True), ("not_in", False)):
        chosen = list(getattr(rules, name))
        if chosen:
            text = lambda value: names.get(value, str(value))  # noqa: E731
            yield _membership(chosen, ", ".join(map(text, chosen)), lambda value: value, text, inside=inside)


def _quote(value: str) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_RULES_ONLY = Checker()
