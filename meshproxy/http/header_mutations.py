"""Headers that a configuration adds to, overwrites in or removes from a message: `HeaderValueOption` lists and names to remove, compiled.

A mutation works as Envoy's: first the removals, then every value is computed from the head as it now is, then overwrites, then additions. Additions to a
header of which Envoy keeps one line only are joined to that line. Values without `%` commands are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail, under

if TYPE_CHECKING:
    from envoy.config.core.v3 import base_pb2

    from meshproxy.codec.headers import Headers
    from meshproxy.observe.stream_info import StreamInfo

APPEND, ADD_IF_ABSENT, OVERWRITE, OVERWRITE_IF_EXISTS = range(4)  # HeaderValueOption.HeaderAppendAction

HONOURS = {
    "envoy.config.core.v3.HeaderValueOption": "header append append_action keep_empty_value",
    "envoy.config.core.v3.HeaderValue": "key value raw_value",
}

Value = bytes | Callable[["StreamInfo"], bytes]
Mutation = Callable[["StreamInfo", "Headers"], None]

# Headers that exist once in Envoy's header maps: a further value is joined by a comma. Found by adding two values of each to messages through Envoy 1.40.
_SINGLE_REQUEST = frozenset(
    b"""
    accept accept-encoding access-control-request-headers access-control-request-method authentication authorization cache-control cdn-loop content-encoding
    content-type grpc-accept-encoding grpc-timeout if-match if-modified-since if-none-match if-range if-unmodified-since origin pragma proxy-status referer
    user-agent via x-client-trace-id x-envoy-attempt-count x-envoy-decorator-operation x-envoy-downstream-service-cluster x-envoy-downstream-service-node
    x-envoy-expected-rq-timeout-ms x-envoy-external-address x-envoy-force-trace x-envoy-internal x-envoy-ip-tags x-envoy-is-timeout-retry x-envoy-original-host
    x-envoy-original-path x-envoy-original-url x-envoy-upstream-alt-stat-name x-envoy-upstream-rq-timeout-ms x-forwarded-client-cert x-forwarded-for
    x-forwarded-host x-forwarded-port x-forwarded-proto x-request-id
    """.split()
)
_SINGLE_RESPONSE = frozenset(
    b"""
    access-control-allow-credentials access-control-allow-headers access-control-allow-methods access-control-allow-origin
    access-control-expose-headers access-control-max-age age cache-control content-encoding content-type date etag expires grpc-message grpc-status
    last-modified location proxy-status server vary via x-envoy-attempt-count x-envoy-decorator-operation x-envoy-degraded
    x-envoy-immediate-health-check-fail x-envoy-ratelimited x-envoy-upstream-canary x-envoy-upstream-healthchecked-cluster x-envoy-upstream-service-time
    x-request-id
    """.split()
)


def compile_mutation(add: Iterable[base_pb2.HeaderValueOption], remove: Iterable[str], name: str, *, request: bool) -> Mutation | None:
    """Additions and removals of one level -> a function that changes a head in place; None when there are none.

    `name` is how the fields are called in error paths: `request_headers` for `request_headers_to_add` and `request_headers_to_remove`.
    """
    additions = []
    for index, option in enumerate(add):
        with under(f"{name}_to_add[{index}]"):
            additions.append(_compile_option(option))
    removals = []
    for index, header in enumerate(remove):
        if not is_modifiable(header):
            fail(f"{name}_to_remove[{index}]", ":-prefixed or host headers may not be removed")
        removals.append(header.lower().encode())
    if not additions and not removals:
        return None
    single = _SINGLE_REQUEST if request else _SINGLE_RESPONSE
    if not removals and len(additions) == 1:
        simple = _single_constant(*additions[0], single)
        if simple is not None:
            return simple
    return _Mutation(tuple(removals), tuple(additions), single)


def is_modifiable(name: str) -> bool:
    """Whether configuration may add or remove the header: not pseudo-headers and not Host."""
    return not name.startswith(":") and name.lower() != "host"


def append_header(head: Headers, name: bytes, value: bytes, *, request: bool) -> None:
    """Add a value as Envoy does: joined to the existing line where there may be one line only."""
    _append(head, name, value, _SINGLE_REQUEST if request else _SINGLE_RESPONSE)


def _append(head: Headers, name: bytes, value: bytes, single: frozenset[bytes]) -> None:
    if name in single:
        existing = head.get(name)
        if existing is not None:
            head.set(name, existing + b"," + value)
            return
    head.add(name, value)


def _overwrite(head: Headers, name: bytes, value: bytes) -> None:
    """Replace a header. The new line stands at the end, as Envoy has it."""
    head.remove(name)
    head.add(name, value)


def _compile_option(option: base_pb2.HeaderValueOption) -> tuple[bytes, Value, int, bool]:
    """Name, value, what to do, and whether an empty value counts."""
    header = option.header
    if not is_modifiable(header.key):
        fail("header.key", ":-prefixed or host headers may not be modified")
    action: int = option.append_action
    if option.HasField("append"):
        if action != APPEND:
            fail("append", "Both append and append_action are set and it's not allowed")
        action = APPEND if option.append.value else OVERWRITE
    return header.key.lower().encode(), _compile_value(header), action, option.keep_empty_value


def _compile_value(header: base_pb2.HeaderValue) -> Value:
    if header.raw_value:
        return bytes(header.raw_value)
    if "%" not in header.value:
        return header.value.encode()
    # Only configurations with commands need the formatter.
    from meshproxy.observe.format import compile_header_value

    with under("header.value"):
        return compile_header_value(header.value)


def _single_constant(name: bytes, value: Value, action: int, keep_empty: bool, single: frozenset[bytes]) -> Mutation | None:
    """The most frequent mutation, one header with a constant value, as one plain function."""
    if not isinstance(value, bytes) or not (value or keep_empty):
        return None
    if action == OVERWRITE or (action == APPEND and name not in single):
        return _constant((name, value), _overwrite if action == OVERWRITE else _add)
    return None


def _constant(pair: tuple[bytes, bytes], otherwise: Callable[[Headers, bytes, bytes], None]) -> Mutation:
    name, value = pair

    def add_if_new(stream: StreamInfo, head: Headers) -> None:
        # HOT: messages hardly ever have the header already.
        index = head._index
        if index is None or name in index:
            otherwise(head, name, value)
        else:
            index[name] = value
            head.items.append(pair)

    return add_if_new


def _add(head: Headers, name: bytes, value: bytes) -> None:
    head.add(name, value)


class _Mutation:
    """A compiled list of mutations; callable."""

    __slots__ = ("_additions", "_removals", "_single")

    def __init__(self, removals: tuple[bytes, ...], additions: tuple[tuple[bytes, Value, int, bool], ...], single: frozenset[bytes]) -> None:
        self._removals = removals
        # An empty constant that does not count is never added.
        self._additions = tuple(entry for entry in additions if entry[1] != b"" or entry[3])
        self._single = single

    def __call__(self, stream: StreamInfo, head: Headers) -> None:
        for name in self._removals:
            head.remove(name)
        overwrites: list[tuple[bytes, bytes]] = []
        appends: list[tuple[bytes, bytes]] = []
        for name, value, action, keep_empty in self._additions:
            text = value if type(value) is bytes else value(stream)  # type: ignore[operator]  # not bytes: callable
            if not text and not keep_empty:
                continue
            if action == APPEND:
                appends.append((name, text))
            elif action == OVERWRITE:
                overwrites.append((name, text))
            elif action == ADD_IF_ABSENT:
                if head.get(name) is None:
                    appends.append((name, text))
            elif head.get(name) is not None:
                overwrites.append((name, text))
        for name, text in overwrites:
            _overwrite(head, name, text)
        for name, text in appends:
            _append(head, name, text, self._single)


def combine(mutations: Iterable[Mutation | None]) -> Any:
    """Several levels, in the order in which they apply; None when none of them does anything."""
    present = [mutation for mutation in mutations if mutation is not None]
    if len(present) <= 1:
        return present[0] if present else None

    def apply(stream: StreamInfo, head: Headers) -> None:
        for mutation in present:
            mutation(stream, head)

    return apply
