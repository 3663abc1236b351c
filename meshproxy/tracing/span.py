"""A span: one piece of work in a trace, on this proxy."""

from __future__ import annotations

from typing import Any


class Span:
    """Made by a tracer, which also says how its context is put into a head and what becomes of it at its end. Ids as in `tracing.context`; times are Unix.

    What is not sampled has ids, for those further on, and is not sent: nobody needs to give it tags.
    """

    __slots__ = ("client", "events", "id", "name", "parent", "remote", "sampled", "shared", "single", "start", "state", "tags", "trace_id", "tracer")

    def __init__(self, tracer: Any, trace_id: bytes, id: bytes, name: bytes, start: float, *, client: bool, sampled: bool) -> None:
        self.tracer = tracer
        self.trace_id = trace_id
        self.id = id
        self.name = name
        self.start = start
        self.client = client  # else it is a server's
        self.sampled = sampled
        self.parent = b""
        self.remote = False  # the parent is somebody else's
        self.shared = False  # its id is its caller's (Zipkin)
        self.single = False  # B3 comes in one header, and so does it go on
        self.state = b""  # tracestate
        self.tags: dict[str, bytes] = {}
        self.events: list[tuple[float, str]] = []  # when, what

    def inject(self, head: Any) -> None:
        """Make a request's head name this span as its parent."""
        self.tracer.inject(self, head)

    def child(self, name: bytes, *, at: float, client: bool = True) -> Span:
        """A span within this one."""
        made: Span = self.tracer.child(self, name, at, client)
        return made

    def finish(self, *, at: float) -> None:
        """It is over: send it, if it is sampled."""
        if self.sampled:
            self.tracer.send(self, at)
