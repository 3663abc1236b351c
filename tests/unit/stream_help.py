"""A real `Stream` between a recording codec and a recording router, for tests of how filters and streams work together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
from meshproxy.http.filter_chain import Chain
from meshproxy.http.local_reply import LocalReplies
from meshproxy.http.stream import Stream
from meshproxy.observe.stats import Store
from tests.unit.filter_help import connection


class Codec:
    """The downstream: `out` is what was sent, as tuples."""

    def __init__(self) -> None:
        self.info = connection()
        self.out: list[tuple[Any, ...]] = []
        self.full = False
        self.queued = 0
        self.paused = False

    def send_headers(self, stream: Any, head: ResponseHead, end_stream: bool) -> None:
        self.out.append(("head", head.status, head.items.copy(), end_stream))

    def send_data(self, data: bytes, end_stream: bool) -> None:
        self.out.append(("data", data, end_stream))

    def send_trailers(self, trailers: Headers) -> None:
        self.out.append(("trailers", trailers.items.copy()))

    def linger(self, stream: Any) -> None:
        raise AssertionError("nothing is queued")

    def reset_stream(self, stream: Any) -> None:
        self.out.append(("reset",))

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def stream_done(self, stream: Any) -> None:
        self.out.append(("done",))

    def settle_relays(self) -> None:
        pass

    def discard_request(self) -> None:
        pass

    def flush(self) -> None:
        pass


class Forwarding:
    """The router's part: `out` is what went upstream."""

    done = False

    def __init__(self) -> None:
        self.out: list[tuple[Any, ...]] = []

    def data(self, data: bytes, end_stream: bool) -> None:
        self.out.append(("data", data, end_stream))

    def trailers(self, trailers: Headers) -> None:
        self.out.append(("trailers", trailers.items.copy()))

    def abandon(self) -> None:
        self.done = True

    def downstream_writable(self, writable: bool) -> None:
        self.out.append(("downstream writable", writable))


class Router:
    """Takes every request."""

    def __init__(self) -> None:
        self.forwarding = Forwarding()

    def start(self, stream: Any, end_stream: bool, host: Any = None, finalized: bool = False) -> None:
        stream.forwarding = self.forwarding
        self.forwarding.out.append(("head", stream.request.items.copy(), end_stream))

    def cluster_of(self, stream: Any) -> None:
        return None


def make(*filters: Any, items: list[tuple[bytes, bytes]] | None = None, buffer_limit: int = 1000, cluster: Any = None) -> tuple[Stream, Codec, Forwarding]:
    """A stream that has `filters`, before its request began: call `go`."""
    codec, router = Codec(), Router()
    route = SimpleNamespace(action="forward", cluster_name="up", reply=None, finalize_response=None)
    replies = LocalReplies([], None)
    manager = SimpleNamespace(
        clock=lambda: 1000.0,
        wall_offset=0.0,
        buffer_limit=buffer_limit,
        chains=_Always(Chain(filters)),
        router=router,
        stats=_Stats(),
        finish_response_head=lambda stream, head: None,
        render_reply=replies.render,
        stream_done=lambda stream: None,
    )
    if cluster is not None:
        router.cluster_of = lambda stream: cluster  # type: ignore[method-assign,return-value,assignment]
    stream = Stream(manager, codec, RequestHead(b"POST", b"/s/m", b"a.test", items or []), 1000.0)  # type: ignore[arg-type]
    stream.route = route
    return stream, codec, router.forwarding


class _Always:
    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def get(self, route: Any) -> Chain:
        return self._chain


class _Stats:
    def __init__(self) -> None:
        self._store = Store()

    def __getattr__(self, name: str) -> Any:
        return self._store.counter(name)
