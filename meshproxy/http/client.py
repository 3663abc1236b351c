"""HTTP requests of our own over a cluster, such as the fetching of keys: no stream of a client has to wait for them, and none is needed.

    client = HttpClient(context, "keys", timeout=5.0)
    answer = await client.request(RequestHead(b"GET", b"/jwks.json", b"keys.example"))

The cluster's TLS, balancing, pools, limits, outlier detection and statistics apply as they do to proxied requests. For gRPC: `upstream.grpc_client`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
from meshproxy.http import retry
from meshproxy.net.interfaces import machine_address
from meshproxy.observe.stream_info import StreamInfo
from meshproxy.record import Record
from meshproxy.upstream.balance.base import LbContext
from meshproxy.upstream.pool import PROTOCOL_ERROR

if TYPE_CHECKING:
    from meshproxy.codec.h1.response import KnownResponse
    from meshproxy.context import Context
    from meshproxy.http.retry import RetryPolicy
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.pool import Exchange, Pool


class HttpError(Exception):
    """A request that got no answer; the text says why."""


class Answer(Record, frozen=True):
    """What a server said, of whatever status."""

    head: ResponseHead
    body: bytes


class HttpClient:
    """Requests to one cluster. `timeout`: seconds for a request with its retries, None for no limit; `max_body`: bytes of an answer, more is a failure;
    `forwarded_for`: requests say so of this machine.
    """

    def __init__(
        self,
        context: Context,
        cluster_name: str,
        *,
        timeout: float | None = None,
        max_body: int = 4 << 20,
        policy: RetryPolicy | None = None,
        forwarded_for: bool = True,
    ) -> None:
        self._context = context
        self.cluster_name = cluster_name
        self._timeout = timeout
        self._max_body = max_body
        self._policy = policy or retry.NO_POLICY
        self._forwarded_for = forwarded_for
        self._total = context.stats.scope("http.async-client.").counter("rq_total")

    async def request(self, head: RequestHead, body: bytes = b"") -> Answer:
        """Ask, and wait for the whole answer. Raises HttpError. Cancelling the caller cancels the request."""
        cluster = self._context.clusters.get(self.cluster_name)
        if cluster is None:
            raise HttpError(f"there is no cluster {self.cluster_name!r}")
        head.set(b"x-envoy-internal", b"true")
        if self._forwarded_for:
            head.set(b"x-forwarded-for", machine_address().encode())
        limits = [limit for limit in (self._timeout, self._policy.per_try_timeout) if limit]
        if limits:
            head.set(b"x-envoy-expected-rq-timeout-ms", b"%d" % round(min(limits) * 1000))
        self._total.n += 1
        tries = retry.RetryState(self._policy, cluster, 0, self._context.random, self._context.runtime, head) if self._policy.retry_on else None
        try:
            async with asyncio.timeout(self._timeout):
                return await self._try(cluster, head, body, tries)
        except TimeoutError as error:
            cluster.stats.upstream_rq_timeout.n += 1
            raise HttpError("upstream request timeout") from error
        finally:
            if tries is not None:
                tries.finish()

    async def _try(self, cluster: Cluster, head: RequestHead, body: bytes, tries: retry.RetryState | None) -> Answer:
        limit = self._policy.per_try_timeout or None
        while True:
            call = _Call(cluster, head.copy(), body, self._max_body)
            try:
                try:
                    async with asyncio.timeout(limit):
                        return await call.run(tries)
                except TimeoutError as error:
                    cluster.stats.upstream_rq_per_try_timeout.n += 1
                    raise _FailedError("local reset", "upstream per-try timeout", True) from error
            except _UnwantedError:
                pass
            except _FailedError as error:
                if tries is None or tries.should_retry_reset(error.reason, error.sent) != retry.RETRY:
                    raise HttpError(str(error)) from error
            finally:
                call.cancel()
            assert tries is not None
            await asyncio.sleep(tries.backoff())

    def __repr__(self) -> str:
        return f"<HttpClient {self.cluster_name}>"


class _FailedError(Exception):
    """A try without an answer. `reason`: in the pool's words; `sent`: some of the request went out."""

    def __init__(self, reason: str, details: str, sent: bool) -> None:
        super().__init__(f"{reason} ({details})" if details else reason)
        self.reason = reason
        self.sent = sent


class _UnwantedError(Exception):
    """A try with an answer that is to be tried again."""


class _Call:
    """One try: the request's side of the pool's contract (`upstream.pool`)."""

    def __init__(self, cluster: Cluster, head: RequestHead, body: bytes, max_body: int) -> None:
        self._cluster = cluster
        self._head = head
        self._body = body
        self._max_body = max_body
        self._host: Host | None = None
        self._pool: Pool | None = None
        self._exchange: Exchange | None = None
        self._tries: retry.RetryState | None = None
        self._informed = False
        self._response: ResponseHead | None = None
        self._received: list[bytes] = []
        self._size = 0
        self._started = cluster.context.clock()
        self._done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.stream = StreamInfo()  # exchanges count bytes for their request's stream; nobody logs those of this one

    async def run(self, tries: retry.RetryState | None) -> Answer:
        """Raises _FailedError, _UnwantedError."""
        cluster = self._cluster
        self._tries = tries
        context = LbContext() if cluster.needs_context or tries is not None else None
        host = tries.pick(cluster, context) if tries is not None else cluster.pick(context)
        if host is None:
            cluster.stats.upstream_cx_none_healthy.n += 1
            cluster.stats.charge(503, internal=True)
            raise _FailedError("overflow", "no healthy upstream", False)  # nothing that a retry could change
        if tries is not None:
            tries.on_host_attempted(host)
        self._host = host
        pool = self._pool = cluster.pool_for(host, 0, self._head)
        exchange = pool.acquire(self)
        if exchange is not None:
            self.on_connected(exchange)
        return await self._done

    def cancel(self) -> None:
        """Give it up, unless it is over."""
        if not self._done.cancelled():
            return
        if self._response is None and self._host is not None:
            self._cluster.stats.charge(504, internal=True)
            if self._cluster.outlier is not None:
                self._cluster.outlier.local_failure(self._host, "timeout")
        exchange = self._exchange
        if exchange is not None:
            self._exchange = None
            exchange.abort()
        elif self._pool is not None:
            self._pool.cancel(self)

    # -- the pool's and the exchange's calls

    def on_connected(self, exchange: Exchange) -> None:
        """There is a connection."""
        self._exchange = exchange
        if self._body:
            exchange.send_head(self._head, (self._body,), ended=True, trailers=None, upgrade=None)
        else:
            exchange.send_whole(self._head)

    def on_pool_failure(self, reason: str, failure: str | None) -> None:
        """There is none, and will be none."""
        self._fail(reason, failure or "", None if reason == "overflow" else "connect_failed")

    def on_response_whole(self, known: KnownResponse, body: bytes) -> None:
        """All at once."""
        self.on_response_headers(ResponseHead(known.status, known.items.copy()), not body)
        if body:
            self.on_response_data(body, True)

    def on_response_headers(self, head: ResponseHead, end_stream: bool) -> None:
        """The answer begins."""
        if self._done.done():
            return
        if head.status < 200:
            if not self._informed:  # as for requests of clients, the first one counts
                self._informed = True
                self._cluster.stats.charge(head.status, internal=True)
            return
        assert self._host is not None
        self._response = head
        if self._cluster.outlier is not None:
            self._cluster.outlier.result(self._host, head.status)
        if self._tries is not None and self._tries.should_retry_headers(head) == retry.RETRY:
            self._cluster.stats.charge_prefixed("retry.", head.status)
            self._host.rq_error += 1
            exchange, self._exchange = self._exchange, None
            if exchange is not None:
                exchange.let_go() if end_stream else exchange.abort()
            self._done.set_exception(_UnwantedError())
            return
        self._cluster.stats.charge(head.status, internal=True)
        if end_stream:
            self._finish()

    def on_response_data(self, data: bytes, end_stream: bool) -> None:
        """More of it."""
        if self._done.done():
            return
        self._size += len(data)
        if self._size > self._max_body:
            exchange, self._exchange = self._exchange, None
            if exchange is not None:
                exchange.abort()
            self._done.set_exception(_FailedError("overflow", f"the answer has more than {self._max_body} bytes", True))
            return
        self._received.append(data)
        if end_stream:
            self._finish()

    def on_response_trailers(self, trailers: Headers) -> None:
        """Its end."""
        self._finish()

    def on_upstream_reset(self, reason: str, details: str) -> None:
        """The connection broke, or the stream was reset."""
        self._exchange = None
        self._fail(reason, details, "reset")

    def on_upstream_done_early(self) -> None:
        """The answer is complete, and nothing more can be sent."""
        self._exchange = None
        self._finish()

    def on_upstream_writable(self, writable: bool) -> None:
        """The body is here already: there is nobody to hold back."""

    def on_read_end(self) -> None:
        """Everything that has come was handed over already."""

    def _finish(self) -> None:
        if self._done.done():
            return
        assert self._host is not None
        assert self._response is not None
        self._cluster.stats.charge_time((self._cluster.context.clock() - self._started) * 1000, internal=True)
        if self._response.status < 500:
            self._host.rq_success += 1
        else:
            self._host.rq_error += 1
        self._done.set_result(Answer(self._response, b"".join(self._received)))
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.let_go()

    def _fail(self, reason: str, details: str, kind: str | None) -> None:
        if self._done.done():
            return
        assert self._host is not None
        self._host.rq_error += 1
        if self._response is None:
            self._cluster.stats.charge(502 if reason == PROTOCOL_ERROR else 503, internal=True)
            if self._cluster.outlier is not None and kind is not None:
                self._cluster.outlier.local_failure(self._host, kind)
        self._done.set_exception(_FailedError(reason, details, bool(self.stream.upstream_bytes_sent)))
