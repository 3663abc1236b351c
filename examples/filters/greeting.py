"""A filter of our own: answers /hello itself, and greets in every response. `docs/filters.md` shows how to run it."""

from __future__ import annotations

from typing import Any

from meshproxy.http.replies import Reply


class Greeting:
    def __init__(self, config: dict[str, Any], context: Any) -> None:
        self.text = config.get("text", "hello").encode()

    def request_headers(self, stream: Any, end_stream: bool) -> Reply | None:
        return Reply(200, self.text, details="greeting") if stream.request.path == b"/hello" else None

    def response_headers(self, stream: Any, end_stream: bool) -> None:
        stream.response.set(b"x-greeting", self.text)
