"""Match trees (xds.type.matcher.v3.Matcher): what is known of a request or a connection, led through lists, maps and nested trees to an action.

A tree is compiled to nested closures. What may be looked at differs from place to place: `compile_tree` is given a table of inputs, and a function that
makes the action of a leaf. An input that cannot say anything about a request, such as the certificate of a connection without TLS, ends the whole tree
without a match (INSUFFICIENT), as in Envoy; an input that merely has no value (None) matches nothing, and the tree goes on.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, matchers, registry
from meshproxy.api.cidr import CidrSet, parse_cidr
from meshproxy.api.errors import UNSUPPORTED

if TYPE_CHECKING:
    from xds.type.matcher.v3.matcher_pb2 import Matcher

_X = "xds.type.matcher.v3."
_INPUTS = "envoy.extensions.matching.input_matchers."

HONOURS = {
    f"{_X}Matcher": "matcher_list matcher_tree on_no_match",
    f"{_X}Matcher.OnMatch": "matcher action",
    f"{_X}Matcher.MatcherList": "matchers",
    f"{_X}Matcher.MatcherList.FieldMatcher": "predicate on_match",
    f"{_X}Matcher.MatcherList.Predicate": "single_predicate or_matcher and_matcher not_matcher",
    f"{_X}Matcher.MatcherList.Predicate.SinglePredicate": "input value_match custom_match",
    f"{_X}Matcher.MatcherList.Predicate.PredicateList": "predicate",
    f"{_X}Matcher.MatcherTree": "input exact_match_map prefix_match_map custom_match",
    f"{_X}Matcher.MatcherTree.MatchMap": "map",
    f"{_X}StringMatcher": "exact prefix suffix safe_regex contains ignore_case",
    f"{_X}RegexMatcher": "google_re2 regex",
    f"{_X}RegexMatcher.GoogleRE2": "",
    f"{_X}IPMatcher": "range_matchers",
    f"{_X}IPMatcher.IPRangeMatcher": "ranges on_match exclusive",
    "xds.core.v3.TypedExtensionConfig": "name typed_config",
    f"{_INPUTS}ip.v3.Ip": "cidr_ranges stat_prefix",
    f"{_INPUTS}metadata.v3.Metadata": "value invert",
}


class _Insufficient:
    """What an input or a tree says that lacks what it needs."""

    def __repr__(self) -> str:
        return "INSUFFICIENT"


INSUFFICIENT: Any = _Insufficient()

Read = Callable[[Any], Any]  # what is looked at -> bytes (or a metadata value), None for no value, or INSUFFICIENT
Test = Callable[[Any], "bool | None"]  # None: not enough is known
Tree = Callable[[Any], Any]  # -> the action of the leaf, None when nothing matched, or INSUFFICIENT

TEXT, METADATA = "text", "metadata"  # what an input gives, and a matcher takes


class Input:
    """One input. `repeatable`: it gives the same for all requests of one connection whose heads are equal but for the request id."""

    __slots__ = ("gives", "read", "repeatable")

    def __init__(self, read: Read, gives: str = TEXT, *, repeatable: bool = True) -> None:
        self.read = read
        self.gives = gives
        self.repeatable = repeatable


Inputs = Mapping[str, Callable[[Any], Input]]  # full name of an input's message -> its compiler


def compile_tree(proto: Matcher, inputs: Inputs, action: Callable[[Any], Any], where: str, counter: Callable[[str], Any] | None = None) -> tuple[Tree, bool]:
    """The tree of a Matcher proto, and whether it is repeatable as an Input may be. Raises ConfigError.

    `inputs`: what may be looked at. `action(any)`: what a leaf gives, for the Any in it; never None. `where`: who asks, for messages about other inputs.
    `counter(name)`: a counter of the process, by its whole name.
    """
    compiler = _Compiler(inputs, action, where, counter)
    tree = compiler.tree(proto)
    return tree, compiler.repeatable


class _Compiler:
    def __init__(self, inputs: Inputs, action: Callable[[Any], Any], where: str, counter: Callable[[str], Any] | None) -> None:
        self._counter = counter
        self._inputs = inputs
        self._action = action
        self._where = where
        self.repeatable = True

    # -- trees

    def tree(self, proto: Any) -> Tree:
        otherwise: Tree = _nothing
        if proto.HasField("on_no_match"):
            with errors.under("on_no_match"):
                otherwise = self._on_match(proto.on_no_match)
        which = proto.WhichOneof("matcher_type")
        if which is None:
            return otherwise
        with errors.under(which):
            return self._list(proto.matcher_list, otherwise) if which == "matcher_list" else self._map(proto.matcher_tree, otherwise)

    def _on_match(self, proto: Any) -> Tree:
        if proto.keep_matching:
            errors.fail("keep_matching", "is not supported here")
        which = proto.WhichOneof("on_match")
        if which is None:
            errors.fail("on_match", "value is required")
        with errors.under(which):
            if which == "matcher":
                return self.tree(proto.matcher)
            with errors.under("typed_config"):
                result = self._action(proto.action.typed_config)
        return lambda _: result

    def _list(self, proto: Any, otherwise: Tree) -> Tree:
        if not proto.matchers:
            errors.fail("matchers", "at least one is needed")
        found = errors.Collector()
        branches: list[tuple[Test, Tree]] = []
        for index, field in enumerate(proto.matchers):
            with found.under(f"matchers[{index}]"):
                with errors.under("predicate"):
                    test = self._predicate(field.predicate)
                with errors.under("on_match"):
                    branches.append((test, self._on_match(field.on_match)))
        found.raise_any()

        def first(data: Any) -> Any:
            for test, then in branches:
                matched = test(data)
                if matched is None:
                    return INSUFFICIENT
                if matched:
                    result = then(data)
                    if result is not None:
                        return result
            return otherwise(data)

        return first

    def _map(self, proto: Any, otherwise: Tree) -> Tree:
        with errors.under("input"):
            given = self._input(proto.input)
            if given.gives != TEXT:
                errors.fail("", "a match tree needs an input that is text", UNSUPPORTED)
        which = proto.WhichOneof("tree_type")
        if which is None:
            errors.fail("tree_type", "value is required")
        with errors.under(which):
            if which == "custom_match":
                return self._custom_map(proto.custom_match, given.read, otherwise)
            children: dict[bytes, Tree] = {}
            entries = getattr(proto, which).map
            if not entries:
                errors.fail("map", "at least one is needed")
            for key in sorted(entries):
                with errors.under(f'map["{key}"]'):
                    children[key.encode()] = self._on_match(entries[key])
        return (_exact if which == "exact_match_map" else _prefix)(given.read, children, otherwise)

    def _custom_map(self, extension: Any, read: Read, otherwise: Tree) -> Tree:
        with errors.under("typed_config"):
            registry.module(extension.typed_config.type_url, "match tree")
            proto = registry.unpack(extension.typed_config)
            nodes: list[tuple[int, int, bool, CidrSet, Tree]] = []
            for index, matcher in enumerate(proto.range_matchers):
                with errors.under(f"range_matchers[{index}]"):
                    with errors.under("on_match"):
                        then = self._on_match(matcher.on_match)
                    for position, cidr in enumerate(matcher.ranges):
                        inside = CidrSet([parse_cidr(cidr, f"ranges[{position}]")])
                        nodes.append((-cidr.prefix_len.value, index, matcher.exclusive, inside, then))
        nodes.sort(key=lambda node: node[:2])
        return _ranges(read, nodes, otherwise)

    # -- predicates

    def _predicate(self, proto: Any) -> Test:
        which = proto.WhichOneof("match_type")
        if which is None:
            errors.fail("match_type", "value is required")
        value = getattr(proto, which)
        with errors.under(which):
            match which:
                case "single_predicate":
                    return self._single(value)
                case "not_matcher":
                    return _negate(self._predicate(value))
            if len(value.predicate) < 2:
                errors.fail("predicate", "at least two are needed")
            parts = []
            for index, part in enumerate(value.predicate):
                with errors.under(f"predicate[{index}]"):
                    parts.append(self._predicate(part))
        return (_any_of if which == "or_matcher" else _all_of)(parts)

    def _single(self, proto: Any) -> Test:
        with errors.under("input"):
            given = self._input(proto.input)
        which = proto.WhichOneof("matcher")
        if which is None:
            errors.fail("matcher", "value is required")
        with errors.under(which):
            takes, test = (TEXT, matchers.compile_string(proto.value_match)) if which == "value_match" else _custom(proto.custom_match, self._counter)
            if takes != given.gives:
                errors.fail("", f"takes {takes}, and the input gives {given.gives}", UNSUPPORTED)
        read = given.read

        def matches(data: Any) -> bool | None:
            value = read(data)
            if value is INSUFFICIENT:
                return None
            return value is not None and test(value)

        return matches

    def _input(self, extension: Any) -> Input:
        with errors.under("typed_config"):
            name = registry.type_url(extension.typed_config).removeprefix(registry.TYPE_PREFIX)
            compiled = self._inputs.get(name)
            if compiled is None:
                errors.fail("", f"{name} is no input of {self._where}", UNSUPPORTED)
            given = compiled(registry.unpack(extension.typed_config))
        self.repeatable = self.repeatable and given.repeatable
        return given


def _custom(extension: Any, counter: Callable[[str], Any] | None) -> tuple[str, Callable[[Any], bool]]:
    """What an extension that matches a value takes, and the test."""
    with errors.under("typed_config"):
        registry.module(extension.typed_config.type_url, "input matcher")
        proto = registry.unpack(extension.typed_config)
        if proto.DESCRIPTOR.full_name == f"{_INPUTS}metadata.v3.Metadata":
            with errors.under("value"):
                test = matchers.compile_value(proto.value)
            invert = proto.invert
            return METADATA, lambda value: test(value) != invert
        if not proto.cidr_ranges:
            errors.fail("cidr_ranges", "at least one is needed")
        if not proto.stat_prefix:
            errors.fail("stat_prefix", "must not be empty")
        with errors.under("cidr_ranges"):
            inside = matchers.compile_cidr(proto.cidr_ranges)
    failed = None if counter is None else counter(f"{proto.stat_prefix}.ip_parsing_failed")

    def in_range(value: bytes) -> bool:
        address = _Ip.parse(value)
        if address is not None:
            return inside(address)  # type: ignore[arg-type]  # all that it looks at
        if value and failed is not None:
            failed.n += 1
        return False

    return TEXT, in_range


class _Ip:
    """As much of an Address as ranges look at."""

    __slots__ = ("ip", "ip_bytes")

    def __init__(self, ip: str, ip_bytes: bytes) -> None:
        self.ip = ip
        self.ip_bytes = ip_bytes

    @classmethod
    def parse(cls, value: bytes) -> _Ip | None:
        """The address that a text is, or None."""
        text = value.decode("latin-1")
        try:
            return cls(text, socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text))
        except (OSError, ValueError):
            return None


def _nothing(_: Any) -> None:
    return None


def _exact(read: Read, children: dict[bytes, Tree], otherwise: Tree) -> Tree:
    def exact(data: Any) -> Any:
        value = read(data)
        if value is INSUFFICIENT:
            return INSUFFICIENT
        child = children.get(value)
        result = None if child is None else child(data)
        return otherwise(data) if result is None else result

    return exact


def _prefix(read: Read, children: dict[bytes, Tree], otherwise: Tree) -> Tree:
    lengths = sorted({len(key) for key in children}, reverse=True)

    def prefix(data: Any) -> Any:
        value = read(data)
        if value is INSUFFICIENT:
            return INSUFFICIENT
        if value is not None:
            # The longest that leads to something.
            for length in lengths:
                child = children.get(value[:length]) if length <= len(value) else None
                result = None if child is None else child(data)
                if result is not None:
                    return result
        return otherwise(data)

    return prefix


def _ranges(read: Read, nodes: list[tuple[int, int, bool, CidrSet, Tree]], otherwise: Tree) -> Tree:
    """Ranges, the narrowest first. An exclusive one counts only where none narrower holds the address."""

    def ranges(data: Any) -> Any:
        value = read(data)
        if value is INSUFFICIENT:
            return INSUFFICIENT
        address = None if value is None else _Ip.parse(value)
        if address is not None:
            narrowest = True
            for _, _, exclusive, inside, then in nodes:
                if inside(address) and (narrowest or not exclusive):  # type: ignore[arg-type]  # all that it looks at
                    result = then(data)
                    if result is not None:
                        return result
                    narrowest = False
        return otherwise(data)

    return ranges


# -- three-valued logic: None is "not enough is known" ----------------------------------------------------------------------------------------------------


def _all_of(parts: list[Test]) -> Test:
    def all_of(data: Any) -> bool | None:
        for part in parts:
            matched = part(data)
            if not matched:
                return matched
        return True

    return all_of


def _any_of(parts: list[Test]) -> Test:
    def any_of(data: Any) -> bool | None:
        missing = False
        for part in parts:
            matched = part(data)
            if matched:
                return True
            missing = missing or matched is None
        return None if missing else False

    return any_of


def _negate(part: Test) -> Test:
    def negated(data: Any) -> bool | None:
        matched = part(data)
        return None if matched is None else not matched

    return negated
