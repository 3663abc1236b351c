"""What an authorisation service has changed of a request that goes on, of its response, and of the answer to one that does not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from meshproxy.codec.grammar import TOKEN, VALUE
from meshproxy.http.ext_authz.verdict import JOIN
from meshproxy.http.header_mutations import ADD_IF_ABSENT, APPEND, OVERWRITE, OVERWRITE_IF_EXISTS, append_header
from meshproxy.http.mutation_rules import ADD, ALLOWED, FAILED, REMOVE, SET, MutationRules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshproxy.codec.headers import Headers, Pair, RequestHead, ResponseHead
    from meshproxy.http.ext_authz.verdict import Mutation, Verdict

_BREAKING = re.compile(rb"[\r\n\0]").search
_STATUS = re.compile(rb"[2-5][0-9][0-9]").fullmatch
_PSEUDO = frozenset((b":authority", b":method", b":path", b":scheme"))
_PLAIN = re.compile(rb"[A-Za-z0-9*\-._]*").fullmatch


class InvalidError(Exception):
    """The service has asked for something that it may not have, and the request is refused for it."""


def is_valid(name: bytes, value: bytes) -> bool:
    """Whether a header may look so. Pseudo-headers are names too."""
    return TOKEN(name.removeprefix(b":")) is not None and value.translate(VALUE) == value


def is_sendable(name: bytes, value: bytes) -> bool:
    """Whether a header can be sent without becoming something else on the way: what is not is left out, whether it is to be refused or not."""
    return TOKEN(name.removeprefix(b":")) is not None and _BREAKING(value) is None


def check(pairs: Iterable[Pair]) -> None:
    """Raise InvalidError when one of them is no header."""
    for name, value in pairs:
        if not is_valid(name, value):
            raise InvalidError


def change_request(head: RequestHead, verdict: Verdict, rules: MutationRules | None, *, validates: bool) -> None:
    """Do to the request what the service says. Raises InvalidError at the first thing that must not be."""
    for one in verdict.mutations:
        if validates and not is_valid(one.name, one.value):
            raise InvalidError
        if not is_sendable(one.name, one.value) or (one.name.startswith(b":") and one.name not in _PSEUDO):
            continue
        if rules is not None:
            result = rules.check(ADD if one.action == JOIN else SET, one.name, one.value)
            if result == FAILED:
                raise InvalidError
            if result != ALLOWED:
                continue
        apply(head, one, request=True)
    for name in verdict.remove:
        if validates and TOKEN(name) is None:
            continue
        if rules is None:
            if name.startswith(b":") or name.lower() == b"host":
                continue
        else:
            result = rules.check(REMOVE, name.lower())
            if result == FAILED:
                raise InvalidError
            if result != ALLOWED:
                continue
        head.remove(name.lower())
    if validates:
        check((one.name, one.value) for one in verdict.response)
    if verdict.query or verdict.query_remove:
        head.path = _change_query(head.path, verdict, validates=validates)


def apply(head: Headers, one: Mutation, *, request: bool) -> None:
    """One change of a head."""
    name, value, action = one
    if action == APPEND:
        append_header(head, name, value, request=request)
    elif action == JOIN:
        existing = head.get(name)
        if existing is not None:
            _replace_first(head, name, existing + (b"; " if name == b"cookie" else b",") + value)
    elif action == ADD_IF_ABSENT:
        if head.get(name) is None:
            head.add(name, value)
    elif action == OVERWRITE or (action == OVERWRITE_IF_EXISTS and head.get(name) is not None):
        head.remove(name)
        head.add(name, value)


def change_response(head: ResponseHead, mutations: Iterable[Mutation]) -> None:
    """Do to the response of a request that went on what the service said."""
    for one in mutations:
        if one.name == b":status":
            if one.action in (OVERWRITE, OVERWRITE_IF_EXISTS) and _STATUS(one.value):
                head.status, head.reason = int(one.value), None
        elif is_sendable(one.name, one.value) and not one.name.startswith(b":"):
            apply(head, one, request=False)


def _replace_first(head: Headers, name: bytes, value: bytes) -> None:
    first = next((position for position, pair in enumerate(head.items) if pair[0] == name), None)
    if first is None:
        head.set(name, value)  # a pseudo-header
    else:
        head.items[first] = name, value
        head.touch()


def _change_query(path: bytes, verdict: Verdict, *, validates: bool) -> bytes:
    bare, _, query = path.partition(b"?")
    parameters: dict[bytes, list[bytes]] = {}
    for part in query.split(b"&") if query else ():
        name, _, value = part.partition(b"=")
        parameters.setdefault(name, []).append(value)
    for name, value in verdict.query:
        if validates and not (_PLAIN(name) and _PLAIN(value)):
            raise InvalidError
        if _BREAKING(name + value) is None and b" " not in name + value:
            parameters[name] = [value]
    for name in verdict.query_remove:
        parameters.pop(name, None)
    pairs: list[Pair] = [(name, value) for name in sorted(parameters) for value in parameters[name]]
    return bare + (b"?" + b"&".join(b"%b=%b" % pair for pair in pairs) if pairs else b"")


def reply_headers(verdict: Verdict) -> tuple[Pair, ...]:
    """The headers of the answer to a refused request."""
    return tuple(pair for pair in verdict.reply if is_sendable(*pair) and not pair[0].startswith(b":"))


def size_of(head: Any) -> tuple[int, int]:
    """How many headers there are, and their bytes, pseudo-headers included, as the connection manager's limits count them."""
    pairs = [(b":authority", head.authority), (b":path", head.path), (b":method", head.method), (b":scheme", head.scheme), *head.items]
    return len(pairs), sum(len(name) + len(value) for name, value in pairs)
