"""Keys that are fetched over a cluster (RemoteJwks): when a token first needs them and when they have grown old, or in the background.

One fetch at a time: whoever needs the keys meanwhile waits for the same one, so that no number of requests makes more of them. (Envoy fetches for each.)
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult

from meshproxy.api import errors
from meshproxy.api.durations import seconds, seconds_of
from meshproxy.codec.headers import RequestHead
from meshproxy.http import http_uri, retry
from meshproxy.http.client import HttpClient, HttpError
from meshproxy.http.jwt.keys import Keys
from meshproxy.http.jwt.status import Bad
from meshproxy.net import tasks

if TYPE_CHECKING:
    from meshproxy.http.filters import FilterContext

log = logging.getLogger(__name__)

_DEFAULT_CACHE_S = 600.0
_EARLY_S = 5.0  # before the keys are too old the background fetches them again
_DEFAULT_RETRY_S = 1.0
_MAX_BYTES = 1 << 20
_USER_AGENT = b"Go-browser"  # Envoy's


class RemoteKeys:
    """The keys of one provider. `stats`: the filter's counters by name."""

    def __init__(self, proto: Any, context: FilterContext, stats: Any) -> None:
        """`proto`: RemoteJwks. Raises ConfigError. In validation, which has no event loop, nothing is fetched."""
        with errors.under("http_uri"):
            self._head = _request_head(proto.http_uri)
        self._context = context.context
        self._stats = stats
        self._uri: str = proto.http_uri.uri
        timeout = seconds(proto.http_uri.timeout)
        policy = None
        if proto.HasField("retry_policy"):
            with errors.under("retry_policy"):
                policy = retry.compile_core_policy(proto.retry_policy, self._context.runtime)
        self._client = HttpClient(self._context, proto.http_uri.cluster, timeout=timeout or None, max_body=_MAX_BYTES, policy=policy)
        self._max_age = float(int(seconds(proto.cache_duration))) if proto.HasField("cache_duration") else _DEFAULT_CACHE_S
        self._keys: Keys | None = None
        self._good_until = 0.0
        self._fetching: asyncio.Future[Keys | None] | None = None
        self._background = proto.HasField("async_fetch")
        if self._background:
            background = proto.async_fetch
            self._again = self._max_age - _EARLY_S if self._max_age > _EARLY_S else self._max_age
            self._retry = seconds_of(background, "failed_refetch_duration", _DEFAULT_RETRY_S)
            if self._context.loop is not None:
                self._later(0.0)

    def keys(self) -> Keys | None:
        """The keys, while they are good."""
        if self._keys is not None and (self._background or self._context.clock() < self._good_until):
            return self._keys
        return None

    def fetch(self) -> asyncio.Future[Keys | None]:
        """Have them fetched, unless that is under way: what they come to, None for a failure."""
        if self._fetching is None:
            self._fetching = asyncio.get_running_loop().create_future()
            tasks.spawn(f"keys from {self._uri}", self._fetch(self._fetching))
        return self._fetching

    async def _fetch(self, done: asyncio.Future[Keys | None]) -> None:
        keys = None
        try:
            answer = await self._client.request(self._head.copy())
            if answer.head.status == 200 and answer.body:
                keys = Keys(answer.body)
            else:
                log.debug("keys from %s: status %d, %d bytes", self._uri, answer.head.status, len(answer.body))
        except (HttpError, Bad) as error:
            log.debug("keys from %s: %s", self._uri, error)
        finally:
            self._fetching = None
            self._stats["jwks_fetch_failed" if keys is None else "jwks_fetch_success"].n += 1
            if keys is not None:
                self._keys = keys
                self._good_until = self._context.clock() + self._max_age
            if not done.done():
                done.set_result(keys)

    # -- in the background

    def _later(self, seconds: float) -> None:
        """Fetch after some time, if anybody still has this object then: a filter that was replaced is not told so."""
        this = weakref.ref(self)

        def go() -> None:
            if (alive := this()) is not None:
                alive._refresh()

        self._context.loop.call_later(seconds, go)

    def _refresh(self) -> None:
        this = weakref.ref(self)

        def again(done: asyncio.Future[Keys | None]) -> None:
            if (alive := this()) is not None:
                alive._later(alive._retry if done.cancelled() or done.result() is None else alive._again)

        self.fetch().add_done_callback(again)

    def __repr__(self) -> str:
        return f"<RemoteKeys {self._uri} {'fetching' if self._fetching else self._keys}>"


def _request_head(proto: Any) -> RequestHead:
    """From an HttpUri."""
    http_uri.check(proto)
    parts = http_uri.split(proto.uri)
    if parts is None or not _has_valid_port(parts):
        errors.fail("uri", f"'{proto.uri}' is an invalid URI")
    items = [(b"user-agent", _USER_AGENT)]
    return RequestHead(b"GET", http_uri.target(parts), parts.netloc.encode(), items, scheme=parts.scheme.encode())


def _has_valid_port(parts: SplitResult) -> bool:
    """Whether the port of an authority is none, or one that there can be."""
    try:
        _ = parts.port
    except ValueError:
        return False
    return True
