"""The constraints that the API's protos declare for themselves (`validate.rules`): ranges, lengths, patterns, required fields and oneofs.

A `Checker` walks a whole message, through every Any, and returns all violations. A plan is compiled per message type on first use; types below which nothing
is constrained are not entered. Beyond the declared rules every Duration must be positive, as Envoy requires where it reads one.

A large configuration is ten thousand times the same few fields, without a mistake. So messages are first checked by columns: all of one kind together, field
by field, only to see whether everything is as it must be. If not, they are checked once more, one by one, to say what is wrong and where.

With a `Policy` the same walk also finds what is not honoured, and what is deprecated; `support.py` has the one that matters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from envoy.annotations import deprecation_pb2
from validate import validate_pb2

from meshproxy.api import registry
from meshproxy.api.constraints import Limit, compile_limits, numeric_limits
from meshproxy.api.errors import DEPRECATED, INVALID, UNSUPPORTED, ConfigError, Problem, join

if TYPE_CHECKING:
    from google.protobuf.message import Message

MAX_DEPTH = 160  # messages in messages; Any inside Any is bounded by nothing else, and a level costs a few frames of our stack

_ANY = "google.protobuf.Any"
_DURATION = "google.protobuf.Duration"
_OPAQUE = frozenset(("google.protobuf.Struct", "google.protobuf.Value", "google.protobuf.ListValue", "google.protobuf.Timestamp", "google.protobuf.FieldMask"))
_WRAPPERS = re.compile(r"google\.protobuf\.(?:Bool|Bytes|Double|Float|U?Int32|U?Int64|String)Value")

_Check = Callable[[Any, "_Walk"], None]  # of a value whose path is on the walk's stack, or of a whole message
_CheckMany = Callable[[list[Any], "_Walk"], None]  # of the values of one field in many messages: the walk has problems afterwards if there are any


class _FieldCheck(NamedTuple):
    """The check of a field that is set, in one message and in many."""

    one: _Check
    many: _CheckMany


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
    """Where a check is, what it found, and what kind of extension the next Any should hold. `columns`: many messages are checked at once."""

    __slots__ = ("clean", "columns", "kind", "only_invalid", "optional", "problems", "stack")

    def __init__(self, *, columns: bool = False) -> None:
        self.columns = columns
        self.stack: list[str] = []
        self.problems: list[Problem] = []
        self.kind: str | None = None
        self.optional = False  # the extension may be left out
        self.only_invalid = False  # inside of something unsupported
        self.clean: set[tuple[str | None, bytes]] = set()  # short Any values without problems: many clusters hold the same

    def report(self, why: str, below: str = "", kind: str = INVALID) -> None:
        if self.only_invalid and kind != INVALID:
            return
        path = ""
        for part in (*self.stack, below):
            path = join(path, part)
        self.problems.append(Problem(path, why, kind))


class Checker:
    """Checks messages by the rules of their protos and, if there is one, by a policy. Plans are kept: use one Checker for many messages."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy
        self._plans: dict[str, _Plan] = {}

    def check(self, message: Message) -> list[Problem]:
        """Everything that is wrong in `message` and in what it contains. Paths are relative to the message."""
        plan = self.plan(message.DESCRIPTOR)
        walk = _Walk(columns=True)
        plan.many([message], walk)
        if walk.problems:
            walk = _Walk()
            plan(message, walk)
        return walk.problems

    def all_right(self, messages: list[Any]) -> bool:
        """Whether there is nothing to say of any of these messages of one type. A thousand cost little more than a few."""
        walk = _Walk(columns=True)
        self.plan(messages[0].DESCRIPTOR).many(messages, walk)
        return not walk.problems

    def plan(self, descriptor: Any) -> _Plan:
        plan = self._plans.get(descriptor.full_name)
        if plan is None:
            plan = self._plans[descriptor.full_name] = _Plan(descriptor, self)
        return plan

    def inner(self, descriptor: Any, rules: validate_pb2.FieldRules) -> _Check | None:
        """The check of a nested message, None when there is nothing to check in it."""
        name = descriptor.full_name
        if name == _ANY:
            return self._check_any
        if name == _DURATION:
            return _duration_check(rules.duration)
        if _WRAPPERS.fullmatch(name):
            limits = compile_limits(descriptor.fields_by_name["value"], rules)
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
        optional = walk.optional
        if optional and kind is not None and not registry.is_known(packed):
            return
        try:
            message = registry.unpack(packed)
        except ConfigError as error:
            for problem in error.problems:
                walk.report(problem.why, problem.path)
            return
        refusal = self.policy.refusal(kind, message.DESCRIPTOR.full_name) if self.policy is not None else None
        walk.kind = None
        walk.optional = False  # which does not go for what it consists of
        if refusal is None:
            plan = self.plan(message.DESCRIPTOR)
            if walk.columns:
                plan.many([message], walk)
            else:
                plan(message, walk)
        elif not optional:
            walk.report(refusal.why, kind=refusal.kind)
            _only_invalid(self.plan(message.DESCRIPTOR), message, walk)
        walk.kind = kind
        walk.optional = optional
        if len(walk.problems) == before and len(key[1]) < 512:
            walk.clean.add(key)


class _Plan:
    """How to check the messages of one type: what must hold even for unset fields, and what must hold for each field that is set."""

    __slots__ = ("_always", "_checker", "_descriptor", "_honoured", "_needed", "_set", "_unsupported")

    def __init__(self, descriptor: Any, checker: Checker) -> None:
        self._descriptor = descriptor
        self._checker = checker
        self._always: list[_Check] | None = None
        # Field descriptor -> check, compiled when a field is first set: most of them never are. There is one descriptor object of a field.
        self._set: dict[Any, _FieldCheck | None] = {}
        self._needed: list[list[Any]] = []  # what `_always` asks for: fields of which one must be set
        self._honoured: frozenset[str] | None = None
        self._unsupported = False

    def __call__(self, message: Any, walk: _Walk) -> None:
        always = self._always
        if always is None:  # on first use, because message types refer to each other in circles
            always = self._compile()
        if len(walk.stack) > MAX_DEPTH:
            walk.report("nested too deeply")
            return
        if self._unsupported and not walk.only_invalid:
            walk.report(f"{self._descriptor.full_name} is not supported", kind=UNSUPPORTED)
            _only_invalid(self, message, walk)
            return
        for check_unset in always:
            check_unset(message, walk)
        for field, value in message.ListFields():
            check_set = self._check_of(field)
            if check_set is not None:
                check_set.one(value, walk)
        if walk.optional and always and always[0] is _remember_optional:
            walk.optional = False

    def many(self, messages: list[Any], walk: _Walk) -> None:
        """Check many messages, by columns."""
        if self._always is None:
            self._compile()
        if len(walk.stack) > MAX_DEPTH or self._unsupported:
            walk.report("not as it must be")
            return
        columns: defaultdict[Any, list[Any]] = defaultdict(list)
        for message in messages:
            for field, value in message.ListFields():
                columns[field].append(value)
        for fields in self._needed:
            if sum(len(columns[field]) for field in fields if field in columns) < len(messages):
                walk.report("something is missing")
        for field, values in columns.items():
            check_set = self._check_of(field)
            if check_set is not None:
                check_set.many(values, walk)

    def _compile(self) -> list[_Check]:
        always: list[_Check] = []
        self._always = always
        descriptor = self._descriptor
        policy = self._checker.policy
        self._honoured = policy.fields(descriptor.full_name) if policy is not None else None
        self._unsupported = policy is not None and self._honoured is None
        if "is_optional" in descriptor.fields_by_name:
            always.append(_remember_optional)
        for oneof in descriptor.oneofs:
            if oneof.has_options and oneof.GetOptions().Extensions[validate_pb2.required]:
                always.append(_required_oneof(oneof.name, " or ".join(field.name for field in oneof.fields)))
                self._needed.append(list(oneof.fields))
        for field in descriptor.fields:
            must = _must_be_there(field) if field.has_options else None  # rules are options
            if must is not None:
                always.append(must)
                self._needed.append([field])
        return always

    def _check_of(self, field: Any) -> _FieldCheck | None:
        try:
            return self._set[field]
        except KeyError:
            check_set = self._set[field] = self._compile_field(field)
            return check_set

    def _compile_field(self, field: Any) -> _FieldCheck | None:
        options = field.GetOptions()
        check_set = self._compile_value(field, options.Extensions[validate_pb2.rules])
        policy = self._checker.policy
        if policy is not None:
            kind = policy.kind(field.full_name)
            if kind is not None and check_set is not None:
                check_set = _FieldCheck(_with_kind(kind, check_set.one), _with_kind(kind, check_set.many))
            if self._honoured is not None and field.name not in self._honoured:
                check_set = _noted_field(field.name, "is not supported", UNSUPPORTED, check_set)
            elif options.deprecated:
                check_set = _deprecated_field(field, check_set)
        return check_set

    def _compile_value(self, field: Any, rules: validate_pb2.FieldRules) -> _FieldCheck | None:
        if field.is_repeated:
            return _repeated(field, rules, self._checker)
        if field.message_type is not None:
            inner = self._checker.inner(field.message_type, rules)
            return _FieldCheck(_below(field.name, inner), _below(field.name, _many(inner))) if inner is not None else None
        limits = compile_limits(field, rules)
        return _FieldCheck(_below(field.name, _value_check(limits)), _many_values(limits)) if limits else None


# -- what the policy finds


def _only_invalid(inner: _Check, value: Any, walk: _Walk) -> None:
    """Check what is below something unsupported: it is as unsupported, which needs no second mention; but it must be valid."""
    before = walk.only_invalid
    walk.only_invalid = True
    inner(value, walk)
    walk.only_invalid = before


def _noted_field(name: str, why: str, kind: str, inner: _FieldCheck | None) -> _FieldCheck:
    def check_field(value: Any, walk: _Walk) -> None:
        walk.report(why, name, kind)
        if inner is None:
            return
        if kind == UNSUPPORTED:
            _only_invalid(inner.one, value, walk)
        else:
            inner.one(value, walk)

    return _FieldCheck(check_field, _each(check_field))


def _deprecated_field(field: Any, inner: _FieldCheck | None) -> _FieldCheck:
    if field.GetOptions().Extensions[deprecation_pb2.disallowed_by_default]:
        return _noted_field(field.name, f"{field.full_name} is deprecated, and disallowed by default", UNSUPPORTED, inner)
    return _noted_field(field.name, f"{field.full_name} is deprecated", DEPRECATED, inner)


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


def _must_be_there(field: Any) -> _Check | None:
    """What the rules of a field ask for where it is not set."""
    rules = field.GetOptions().Extensions[validate_pb2.rules]
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
    if field.message_type is None:
        if field.has_presence:
            return None
        broken = next((limit for limit in compile_limits(field, rules) if not limit.holds(field.default_value)), None)
        return _not_default(name, broken.why(field.default_value)) if broken is not None else None
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


def _value_check(limits: tuple[Limit, ...]) -> _Check:
    def check_value(value: Any, walk: _Walk) -> None:
        for holds, why in limits:
            if not holds(value):
                walk.report(why(value))

    return check_value


def _many_values(limits: tuple[Limit, ...]) -> _CheckMany:
    check_value = _value_check(limits)
    return lambda values, walk: _check_each(check_value, set(values), walk)


def _many(inner: _Check) -> _CheckMany:
    return inner.many if isinstance(inner, _Plan) else _each(inner)


def _each(inner: _Check) -> _CheckMany:
    return lambda values, walk: _check_each(inner, values, walk)


def _check_each(inner: _Check, values: Iterable[Any], walk: _Walk) -> None:
    for value in values:
        inner(value, walk)


def _repeated(field: Any, rules: validate_pb2.FieldRules, checker: Checker) -> _FieldCheck | None:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        return _map(field, rules.map, checker)
    own = rules.repeated
    limits = compile_limits(field, own.items)
    inner: _Check | None = None
    if entry is not None:
        inner = checker.inner(entry, own.items)
    elif limits:
        inner = _value_check(limits)
    name = field.name
    most = own.max_items if own.HasField("max_items") else None
    unique = own.unique
    least = own.min_items
    if inner is None and most is None and not unique and least <= 1:  # that there is one at all is asked of the message
        return None
    many = None if inner is None else _many_values(limits) if entry is None else _many(inner)

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

    def check_lists(lists: list[Any], walk: _Walk) -> None:
        if most is not None or unique or least > 1:
            _check_each(check_items, lists, walk)
            if min(map(len, lists)) < least:
                walk.report("too few items")
        elif many is not None:
            walk.stack.append(name)
            many(list(chain.from_iterable(lists)), walk)
            walk.stack.pop()

    return _FieldCheck(check_items, check_lists)


def _map(field: Any, rules: validate_pb2.MapRules, checker: Checker) -> _FieldCheck | None:
    name = field.name
    key_field = field.message_type.fields_by_name["key"]
    value_field = field.message_type.fields_by_name["value"]
    key_limits = compile_limits(key_field, rules.keys)
    check_key = _value_check(key_limits) if key_limits else None
    check_value: _Check | None = None
    if value_field.message_type is not None:
        check_value = checker.inner(value_field.message_type, rules.values)
    elif limits := compile_limits(value_field, rules.values):
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

    return _FieldCheck(check_pairs, _each(check_pairs))


# -- messages inside messages


def _duration_check(rules: validate_pb2.DurationRules) -> _Check:
    limits = numeric_limits(rules, lambda value: (value.seconds, value.nanos), _duration_text)

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
def _constrained(name: str, descriptor: Any) -> bool:
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


_RULES_ONLY = Checker()
