"""What an authorisation service has said, whichever way it was asked."""

from __future__ import annotations

from typing import Any, NamedTuple

from meshproxy.http.header_mutations import ADD_IF_ABSENT, APPEND, OVERWRITE, OVERWRITE_IF_EXISTS

OK, DENIED, ERROR = "ok", "denied", "error"

# What is done to a header: as HeaderValueOption.HeaderAppendAction has it, and JOIN: the value is put to the end of the line that is there, if one is.
JOIN = 4
OF_REQUESTS = OVERWRITE, APPEND, JOIN  # in the order in which it is done
OF_RESPONSES = APPEND, OVERWRITE, ADD_IF_ABSENT, OVERWRITE_IF_EXISTS


class Mutation(NamedTuple):
    """One header that the service wants changed."""

    name: bytes
    value: bytes
    action: int = OVERWRITE


class Verdict:
    """Of one check. What does not apply is empty.

    `status`, `body` and `reply` (headers) are the answer to a refused request, and to one that could not be checked; 0: what the filter has for that.
    `mutations` are for the request, `remove` names of it, `response` is for the response of a request that goes on, each in the order in which they are
    done. `invalid`: the service asked for an action that does not exist.
    """

    __slots__ = ("body", "grpc_status", "invalid", "metadata", "mutations", "outcome", "query", "query_remove", "remove", "reply", "response", "status")

    def __init__(self, outcome: str, *, status: int = 0, grpc_status: int | None = None) -> None:
        self.outcome = outcome
        self.status = status
        self.grpc_status = grpc_status
        self.body = b""
        self.invalid = False
        self.metadata: dict[str, Any] = {}
        self.mutations: list[Mutation] = []
        self.remove: list[bytes] = []
        self.response: list[Mutation] = []
        self.reply: list[tuple[bytes, bytes]] = []
        self.query: list[tuple[bytes, bytes]] = []
        self.query_remove: list[bytes] = []

    def add(self, mutations: list[Mutation], response: list[Mutation]) -> None:
        """What is to be changed of the request and of its response, in any order."""
        self.mutations = sorted(mutations, key=lambda one: OF_REQUESTS.index(one.action))
        self.response = sorted(response, key=lambda one: OF_RESPONSES.index(one.action))

    def __repr__(self) -> str:
        return f"<Verdict {self.outcome} {self.status}>"
