"""Active health checks: the rules, and the probes against small servers."""

from __future__ import annotations

import asyncio
from typing import Self

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.upstream import host as hosts
from meshproxy.upstream.cluster_manager import validate
from meshproxy.upstream.health import Checker, Outcome, Session, Settings
from meshproxy.upstream.health_headers import add_headers
from meshproxy.upstream.health_probe import contains
from tests.polling import PATIENCE, until
from tests.unit import upstream_help as up

CHECK = {"timeout": "30s", "interval": "5s", "unhealthy_threshold": 3, "healthy_threshold": 2, "http_health_check": {"path": "/healthz"}}


def settings(**more) -> Settings:
    return Settings.from_proto(up.proto({"name": "c", "health_checks": [{**CHECK, **more}]}).health_checks[0])


def session(flags: int = hosts.FAILED_ACTIVE_HC, **more) -> Session:
    return Session(settings(**more), flags)


def test_the_first_success_is_enough():
    one = session(hosts.FAILED_ACTIVE_HC | hosts.PENDING_ACTIVE_HC)
    assert one.record(Outcome.SUCCESS)
    assert one.flags == 0


def test_later_the_healthy_threshold_counts():
    one = session()
    one.record(Outcome.NETWORK)
    assert not one.record(Outcome.SUCCESS)
    assert one.pending
    assert one.record(Outcome.SUCCESS)
    assert one.flags == 0


def test_network_failures_count_and_answers_condemn_at_once():
    one = session(0)
    assert [one.record(Outcome.NETWORK) for _ in range(3)] == [False, False, True]
    assert one.flags == hosts.FAILED_ACTIVE_HC
    two = session(0)
    assert two.record(Outcome.FAILED)
    three = session(0)
    assert [three.record(Outcome.RETRIABLE) for _ in range(3)] == [False, False, True]


def test_a_success_in_between_starts_the_count_anew():
    one = session(0)
    outcomes = [Outcome.NETWORK, Outcome.NETWORK, Outcome.SUCCESS, Outcome.NETWORK, Outcome.NETWORK]
    assert not any(one.record(outcome) for outcome in outcomes)


def test_timeouts_are_marked_while_failed():
    one = session()
    one.record(Outcome.TIMEOUT)
    assert one.flags == hosts.FAILED_ACTIVE_HC | hosts.ACTIVE_HC_TIMEOUT
    one.record(Outcome.NETWORK)
    assert one.flags == hosts.FAILED_ACTIVE_HC


def test_degraded_comes_and_goes():
    one = session()
    one.record(Outcome.DEGRADED)
    assert one.flags == hosts.DEGRADED_ACTIVE_HC
    assert one.record(Outcome.SUCCESS)
    assert one.flags == 0


def test_immediate_failure_excludes_until_healthy():
    one = session(0)
    assert one.record(Outcome.PASSIVE, excluded=True)
    assert one.flags == hosts.FAILED_ACTIVE_HC | hosts.EXCLUDED_VIA_IMMEDIATE_HC_FAIL
    one.record(Outcome.SUCCESS)
    assert one.flags & hosts.EXCLUDED_VIA_IMMEDIATE_HC_FAIL
    one.record(Outcome.SUCCESS)
    assert one.flags == 0


def test_intervals():
    one = session(0, unhealthy_interval="30s", unhealthy_edge_interval="1s", healthy_edge_interval="2s", no_traffic_healthy_interval="90s")
    one.record(Outcome.SUCCESS)
    assert one.interval(Outcome.SUCCESS, traffic=True) == 5
    assert one.interval(Outcome.SUCCESS, traffic=False) == 90
    one.record(Outcome.NETWORK)
    assert one.interval(Outcome.NETWORK, traffic=True) == 1
    assert one.interval(Outcome.NETWORK, traffic=False) == 60
    one.record(Outcome.FAILED)
    assert one.interval(Outcome.FAILED, traffic=True) == 30
    one.record(Outcome.SUCCESS)
    assert one.interval(Outcome.SUCCESS, traffic=True) == 2


def test_contains():
    assert contains([b"ab", b"cd"], b"xxabyycdzz")
    assert not contains([b"cd", b"ab"], b"xxabyycdzz")
    assert not contains([b"ab", b"b"], b"ab")
    assert contains([], b"")


# -- probes


class Server:
    """Answers each request (or each connection, for TCP checks) with the next of `answers`; None: no answer."""

    def __init__(self, *answers: bytes | None, http: bool = True) -> None:
        self.answers = list(answers)
        self.http = http
        self.requests: list[bytes] = []
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        try:
            while data := await (reader.readuntil(b"\r\n\r\n") if self.http else reader.read(1000)):
                self.requests.append(data)
                answer = self.answers.pop(0) if self.answers else None
                if answer is not None:
                    writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()


async def check_once(check: dict, *servers: Server, **fields) -> tuple[Checker, dict[str, int], up.Context]:
    """Run the first check of every host; the checker, what it reported, and the context."""
    ctx = up.context()
    proto = up.proto(up.static(up.group(*(server.address for server in servers)), health_checks=[check], **fields))
    reported: dict[str, int] = {}
    checker = Checker(proto, ctx, ctx.stats.scope("cluster.c."), reported.update)
    checker.update(proto.load_assignment)
    await asyncio.wait_for(checker.wait_first_round(), PATIENCE)
    return checker, reported, ctx


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


async def test_http_check():
    async with Server(OK) as server:
        checker, reported, ctx = await check_once(CHECK, server)
        checker.close()
        assert reported == {server.address: 0}
        assert server.requests == [b"GET /healthz HTTP/1.1\r\nhost: c\r\nuser-agent: Envoy/HC\r\n\r\n"]
        assert ctx.stats.value("cluster.c.health_check.attempt") == ctx.stats.value("cluster.c.health_check.success") == 1
        assert "cluster.c.health_check.verify_cluster" in set(ctx.stats.names("counter"))


async def test_connection_is_kept_for_the_next_check():
    async with Server(OK, OK, b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", OK) as server:
        checker, _, ctx = await check_once({**CHECK, "interval": "0.001s", "no_traffic_interval": "0.001s"}, server)
        await until(lambda: ctx.stats.value("cluster.c.health_check.success") >= 4)
        checker.close()
        assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "flags"),
    [
        (b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n", hosts.FAILED_ACTIVE_HC),
        (b"HTTP/1.1 204 fine\r\n\r\n", 0),
        (b"HTTP/1.1 200 OK\r\nx-envoy-degraded: 1\r\ncontent-length: 0\r\n\r\n", hosts.DEGRADED_ACTIVE_HC),
        (
            b"HTTP/1.1 503 x\r\nx-envoy-immediate-health-check-fail: 1\r\ncontent-length: 0\r\n\r\n",
            hosts.FAILED_ACTIVE_HC | hosts.EXCLUDED_VIA_IMMEDIATE_HC_FAIL,
        ),
        (b"nonsense\r\n\r\n", hosts.FAILED_ACTIVE_HC),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", None),
    ],
)
async def test_answers(answer, flags):
    check = {**CHECK, "timeout": "30s" if flags is not None else "0.1s", "http_health_check": {"path": "/", "expected_statuses": [{"start": 200, "end": 205}]}}
    async with Server(answer) as server:
        checker, _, _ = await check_once(check, server)
        got = checker.flags()[server.address]
        checker.close()
        assert got == (hosts.FAILED_ACTIVE_HC | hosts.ACTIVE_HC_TIMEOUT if flags is None else flags)


async def test_body_is_searched():
    check = {**CHECK, "http_health_check": {"path": "/", "receive": [{"text": b"alive".hex()}]}}
    yes = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nI a\r\n7\r\nm alive\r\n0\r\n\r\n"
    async with Server(yes) as one, Server(OK) as other:
        checker, _, _ = await check_once(check, one, other)
        got = checker.flags()
        checker.close()
        assert got == {one.address: 0, other.address: hosts.FAILED_ACTIVE_HC}


async def test_request_as_configured():
    check = {
        **CHECK,
        "http_health_check": {
            "path": "/x",
            "method": "POST",
            "host": "checked.example",
            "send": {"text": b"hello".hex()},
            "request_headers_to_add": [
                {"header": {"key": "X-One", "value": "1"}},
                {"header": {"key": "user-agent", "value": "me"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"},
            ],
        },
    }
    async with Server(OK) as server:
        checker, _, _ = await check_once(check, server)
        checker.close()
        assert server.requests == [b"POST /x HTTP/1.1\r\nhost: checked.example\r\nx-one: 1\r\nuser-agent: me\r\ncontent-length: 5\r\n\r\n"]


async def test_no_answer_is_a_timeout_and_refusal_is_not():
    async with Server(None) as silent, Server() as closed:
        pass
    async with Server(None) as silent:
        checker, reported, ctx = await check_once({**CHECK, "timeout": "0.05s"}, silent, closed)
        got = checker.flags()
        checker.close()
        assert got == {silent.address: hosts.FAILED_ACTIVE_HC | hosts.ACTIVE_HC_TIMEOUT, closed.address: hosts.FAILED_ACTIVE_HC}
        assert reported == {silent.address: hosts.FAILED_ACTIVE_HC | hosts.ACTIVE_HC_TIMEOUT}  # the other one was known to be down
        assert ctx.stats.value("cluster.c.health_check.network_failure") == 2


async def test_tcp_checks():
    connect = {**CHECK, "http_health_check": None, "tcp_health_check": {}}
    async with Server() as server:
        checker, reported, _ = await check_once({key: value for key, value in connect.items() if value is not None}, server)
        checker.close()
        assert reported == {server.address: 0}
    talk = {"tcp_health_check": {"send": {"text": b"PING".hex()}, "receive": [{"text": b"PO".hex()}, {"text": b"G".hex()}]}}
    for said, timeout, flags in ((b"+PONG", "30s", 0), (b"+ERR", "0.1s", hosts.FAILED_ACTIVE_HC | hosts.ACTIVE_HC_TIMEOUT)):
        async with Server(said, http=False) as server:
            checker, _, _ = await check_once({"timeout": timeout, "interval": "5s", "unhealthy_threshold": 1, "healthy_threshold": 1, **talk}, server)
            got = checker.flags()
            checker.close()
            assert got == {server.address: flags}
            assert server.requests == [b"PING"] or flags


async def test_hosts_come_and_go():
    async with Server(OK, OK) as one, Server(OK) as other:
        checker, reported, _ = await check_once(CHECK, one, other)
        checker.update(up.proto(up.static(up.group(other.address))).load_assignment)
        assert set(checker.flags()) == {one.address, other.address}  # healthy: checked until it fails
        checker.fail_immediately(one.address)
        assert reported[one.address] == hosts.FAILED_ACTIVE_HC | hosts.EXCLUDED_VIA_IMMEDIATE_HC_FAIL
        assert set(checker.flags()) == {other.address}
        checker.close()


async def test_next_success_is_reported_on_request():
    async with Server(*[OK] * 50) as server:
        checker, reported, ctx = await check_once({**CHECK, "no_traffic_interval": "0.001s"}, server)
        reported.clear()
        done = ctx.stats.value("cluster.c.health_check.success") + 3
        await until(lambda: ctx.stats.value("cluster.c.health_check.success") >= done)
        assert not reported
        checker.report_next_success(server.address)
        await until(lambda: reported)
        checker.close()
        assert reported == {server.address: 0}


@pytest.mark.parametrize(
    ("check", "path"),
    [
        ({"grpc_health_check": {}}, "health_checks[0].grpc_health_check"),
        ({"http_health_check": {"path": "/", "codec_client_type": "HTTP3"}}, "health_checks[0].http_health_check.codec_client_type"),
        ({"http_health_check": {"path": "/", "expected_statuses": [{"start": 300, "end": 200}]}}, "health_checks[0].http_health_check.expected_statuses[0]"),
        ({"http_health_check": {"path": "/", "send": {"text": "00"}}}, "health_checks[0].http_health_check.send"),
        ({"tcp_health_check": {"receive": [{"text": "xyz"}]}}, "health_checks[0].tcp_health_check.receive[0].text"),
    ],
)
def test_mistakes(check, path):
    base = {key: value for key, value in CHECK.items() if key != "http_health_check"}
    with pytest.raises(ConfigError) as error:
        validate(up.proto(up.static(up.group("127.0.0.1:80"), health_checks=[{**base, **check}])), up.context())
    assert [problem.path for problem in error.value.problems] == [path]


def test_added_headers():
    options = up.proto(
        {
            "name": "c",
            "health_checks": [
                {
                    **CHECK,
                    "http_health_check": {
                        "path": "/",
                        "request_headers_to_add": [
                            {"header": {"key": "User-Agent", "value": "joined"}},
                            {"header": {"key": "x", "value": "1"}},
                            {"header": {"key": "x", "value": "2"}},
                            {"header": {"key": "x", "value": "no"}, "append_action": "ADD_IF_ABSENT"},
                            {"header": {"key": "y", "value": "no"}, "append_action": "OVERWRITE_IF_EXISTS"},
                            {"header": {"key": "z", "value": "1"}, "append_action": "ADD_IF_ABSENT"},
                            {"header": {"key": "z", "value": "2"}, "append_action": "OVERWRITE_IF_EXISTS"},
                        ],
                    },
                }
            ],
        }
    ).health_checks[0]
    items = add_headers([(b"user-agent", b"Envoy/HC")], options.http_health_check.request_headers_to_add, "here")
    assert items == [(b"user-agent", b"Envoy/HC,joined"), (b"x", b"1"), (b"x", b"2"), (b"z", b"2")]
