"""Requests of our own, over a fake pool: answers, failures, retries, limits. With real servers: tests/differential/test_jwt_authn.py."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshproxy.codec.h1.response import KnownResponse
from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
from meshproxy.http.client import Answer, HttpClient, HttpError
from meshproxy.http.retry import RetryPolicy, compile_retry_policy
from meshproxy.upstream import pool as pools
from tests.polling import PATIENCE
from tests.unit import upstream_help
from tests.unit.filter_help import proto


class Exchange:
    """What a request sends: `out`."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.out: list[Any] = []

    def send_whole(self, head: RequestHead) -> None:
        self.out.append((head.method, head.path, head.authority, dict(head.items)))

    def send_head(self, head: RequestHead, body: Any, **_: Any) -> None:
        self.out.append((head.method, list(body)))

    def let_go(self) -> None:
        self.out.append("let go")

    def abort(self) -> None:
        self.out.append("abort")


class Pool:
    """Requests wait until the test takes them."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.cancelled: list[Any] = []

    def acquire(self, request: Any) -> None:
        self.waiting.append(request)

    def cancel(self, request: Any) -> None:
        self.cancelled.append(request)


class Asking:
    """A request on its way."""

    def __init__(self, *, body: bytes = b"", timeout: float | None = None, max_body: int = 100, policy: RetryPolicy | None = None, **cluster: Any) -> None:
        clusters = upstream_help.manager(upstream_help.static(upstream_help.group("127.0.0.1:1"), **cluster))
        self.context = clusters.context
        self.context.clusters = clusters
        self.pool = Pool()
        self.cluster: Any = clusters.get("c")
        self.cluster.hosts[0].pools = {0: self.pool}
        client = HttpClient(self.context, "c", timeout=timeout, max_body=max_body, policy=policy)
        self.task = asyncio.create_task(client.request(RequestHead(b"GET", b"/keys", b"keys.test"), body))

    async def connected(self) -> tuple[Any, Exchange]:
        """The next try, on a connection."""
        while not self.pool.waiting:
            await asyncio.sleep(0)
        request = self.pool.waiting.pop(0)
        exchange = Exchange(request)
        request.on_connected(exchange)
        return request, exchange

    async def answer(self) -> Answer:
        async with asyncio.timeout(PATIENCE):
            return await self.task

    def counted(self) -> dict[str, int]:
        self.cluster.stats.settle()
        return {name.removeprefix("cluster.c."): metric.n for name, metric in self.context.stats._metrics.items() if getattr(metric, "n", 0)}


def retrying(on: str, **fields: Any) -> RetryPolicy:
    policy = proto("envoy.config.route.v3.RetryPolicy", f"{{retry_on: '{on}', retry_back_off: {{base_interval: 0.001s}}}}")
    for name, value in fields.items():
        getattr(policy, name).value = value
    return compile_retry_policy(policy)


async def test_an_answer_in_pieces() -> None:
    asking = Asking()
    request, exchange = await asking.connected()
    method, path, authority, headers = exchange.out.pop()
    assert (method, path, authority) == (b"GET", b"/keys", b"keys.test")
    assert headers[b"x-envoy-internal"] == b"true"
    assert b"x-forwarded-for" in headers
    request.on_response_headers(ResponseHead(100), False)
    request.on_response_headers(ResponseHead(200, [(b"a", b"b")]), False)
    request.on_response_data(b"one", False)
    request.on_response_data(b" two", True)
    answer = await asking.answer()
    assert (answer.head.status, answer.head.get(b"a"), answer.body) == (200, b"b", b"one two")
    assert exchange.out == ["let go"]
    assert asking.counted()["internal.upstream_rq_200"] == 1
    assert asking.counted()["http.async-client.rq_total"] == 1


async def test_an_answer_at_once_and_one_with_trailers() -> None:
    asking = Asking(body=b"question")
    request, exchange = await asking.connected()
    assert exchange.out == [(b"GET", [b"question"])]
    head = ResponseHead(404, [(b"content-length", b"2")])
    head.get(b"x")
    request.on_response_whole(KnownResponse(head, 2, 10), b"no")
    assert (await asking.answer()).body == b"no"
    asking = Asking()
    request, _ = await asking.connected()
    request.on_response_headers(ResponseHead(200), False)
    request.on_response_data(b"x", False)
    request.on_response_trailers(Headers())
    assert (await asking.answer()).body == b"x"


async def test_no_cluster_and_no_host() -> None:
    asking = Asking()
    asking.task.cancel()
    with pytest.raises(HttpError, match="there is no cluster 'other'"):
        await HttpClient(asking.context, "other").request(RequestHead(b"GET", b"/"))
    clusters = upstream_help.manager(upstream_help.static())
    clusters.context.clusters = clusters
    with pytest.raises(HttpError, match="no healthy upstream"):
        await HttpClient(clusters.context, "c").request(RequestHead(b"GET", b"/"))


async def test_no_connection_and_resets() -> None:
    asking = Asking()
    await asyncio.sleep(0)
    asking.pool.waiting[0].on_pool_failure(pools.CONNECT_FAILURE, "Connection refused")
    with pytest.raises(HttpError, match=r"remote connection failure \(Connection refused\)"):
        await asking.answer()
    assert asking.counted()["internal.upstream_rq_503"] == 1
    asking = Asking()
    request, exchange = await asking.connected()
    request.on_response_headers(ResponseHead(200), False)
    request.on_response_data(b"hal", False)
    request.on_upstream_reset(pools.TERMINATION, "")
    with pytest.raises(HttpError, match="connection termination"):
        await asking.answer()
    assert exchange.out[1:] == []


async def test_an_answer_without_end_is_given_up() -> None:
    asking = Asking(max_body=10)
    request, exchange = await asking.connected()
    request.on_response_headers(ResponseHead(200), False)
    request.on_response_data(b"x" * 10, False)
    request.on_response_data(b"x", False)
    with pytest.raises(HttpError, match="more than 10 bytes"):
        await asking.answer()
    assert exchange.out[-1] == "abort"


@pytest.mark.parametrize("connects", [False, True])
async def test_a_timeout(connects: bool) -> None:
    asking = Asking(timeout=0.01)
    if connects:
        _, exchange = await asking.connected()
    with pytest.raises(HttpError, match="upstream request timeout"):
        await asking.answer()
    assert exchange.out[-1] == "abort" if connects else len(asking.pool.cancelled) == 1
    assert asking.counted()["upstream_rq_timeout"] == 1
    assert asking.counted()["upstream_rq_504"] == 1


async def test_a_caller_that_gives_up() -> None:
    asking = Asking()
    _, exchange = await asking.connected()
    asking.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking.task
    assert exchange.out[-1] == "abort"


async def test_retries() -> None:
    asking = Asking(policy=retrying("5xx,reset", num_retries=2))
    request, exchange = await asking.connected()
    request.on_response_headers(ResponseHead(503), False)
    assert exchange.out[-1] == "abort"
    request, _ = await asking.connected()
    request.on_upstream_reset(pools.REMOTE_RESET, "")
    request, exchange = await asking.connected()
    request.on_response_headers(ResponseHead(500), True)  # the last one is the answer
    assert (await asking.answer()).head.status == 500
    counted = asking.counted()
    assert (counted["upstream_rq_retry"], counted["retry.upstream_rq_503"], counted["upstream_rq_retry_limit_exceeded"]) == (2, 1, 1)
    assert asking.cluster.limits[0].retries == 0


async def test_tries_that_take_too_long() -> None:
    policy = retrying("5xx", num_retries=1)
    policy.per_try_timeout = 0.01
    asking = Asking(policy=policy)
    _, first = await asking.connected()
    assert first.out[0][3][b"x-envoy-expected-rq-timeout-ms"] == b"10"
    request, second = await asking.connected()
    assert first.out[-1] == "abort"
    request.on_response_headers(ResponseHead(200), True)
    assert (await asking.answer()).head.status == 200
    assert second.out[-1] == "let go"
    assert asking.counted()["upstream_rq_per_try_timeout"] == 1
