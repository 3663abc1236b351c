"""Filters that users write in Python."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from meshproxy.api import registry
from meshproxy.api.errors import ConfigError
from meshproxy.http.filters import python
from meshproxy.http.replies import Reply
from tests.unit.filter_help import Stream, context, counters, proto, run

FILTER = "meshproxy.python.v1.Filter"


@pytest.fixture
def module() -> Iterator[ModuleType]:
    """An importable module that a test fills."""
    made = ModuleType("user_filters")
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


def make(module: ModuleType, user: Any, ctx: Any = None) -> tuple[Any, Any]:
    ctx = ctx or context()
    module.compile = lambda config, context: user  # type: ignore[attr-defined]
    return python.compile(proto(FILTER, "{module: user_filters}"), ctx), ctx


def test_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "filters"))
    filter: Any = python.compile(proto(FILTER, "{module: 'greeting:Greeting', config: {text: hi}}"), context())
    reply = filter.request_headers(Stream(b"/hello"), True)
    assert (reply.status, reply.body, reply.details) == (200, b"hi", "greeting")
    stream = Stream(b"/other")
    assert filter.request_headers(stream, True) is None
    filter.response_headers(stream, True)
    assert stream.response.items == [(b"x-greeting", b"hi")]
    assert not hasattr(filter, "request_data")
    loud: Any = python.specialise(filter, [proto(FILTER, "{config: {text: HI}}")], context())
    assert loud.request_headers(Stream(b"/hello"), True).body == b"HI"


def test_in_an_any_and_in_a_typed_struct() -> None:
    for text in (
        f"{{'@type': type.googleapis.com/{FILTER}, module: 'a:b', config: {{n: 1, l: [x]}}}}",
        f"{{'@type': type.googleapis.com/xds.type.v3.TypedStruct, type_url: type.googleapis.com/{FILTER}, value: {{module: 'a:b', config: {{n: 1, l: [x]}}}}}}",
    ):
        packed = proto("google.protobuf.Any", text)
        assert registry.module(registry.type_url(packed), "http filter") is python
        message: Any = registry.unpack(packed)
        assert message.module.value == "a:b"
        assert dict(message.config)["n"] == 1


def test_config_and_context_reach_the_code(module: ModuleType) -> None:
    seen = []
    module.make = lambda config, context: seen.append((config, context))  # type: ignore[attr-defined]
    ctx = context()
    assert python.compile(proto(FILTER, "{module: 'user_filters:make', config: {a: [1, {b: null}], c: x}}"), ctx) is None
    assert seen == [({"a": [1, {"b": None}], "c": "x"}, ctx)]


def test_what_it_raises_stays_here(module: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def request_headers(self, stream: Any, end_stream: bool) -> None:
            raise ValueError("no")

        async def request_data(self, stream: Any, data: bytes, end_stream: bool) -> bytes:
            raise ValueError("no")

        def response_headers(self, stream: Any, end_stream: bool) -> str:
            return "what?"

        def complete(self, stream: Any) -> None:
            raise ValueError("no")

    filter, ctx = make(module, Broken())
    with caplog.at_level(logging.ERROR, "meshproxy.filter"):
        for _ in range(3):
            reply = filter.request_headers(Stream(), True)
            assert (reply.status, reply.details) == (500, "python_filter_error{user_filters}")
        assert run(filter.request_data(Stream(), b"x", True)).status == 500
        assert filter.response_headers(Stream(), True).status == 500
        assert filter.complete(Stream()) is None
    assert counters(ctx) == {"http.ing.python_filter.failed": 6}
    assert len(caplog.records) == 4  # one for each hook
    assert "response_headers returned str" in caplog.text


def test_values_and_awaitables_pass(module: ModuleType) -> None:
    class Fine:
        async def request_headers(self, stream: Any, end_stream: bool) -> Reply:
            return Reply(418, details="teapot")

        def request_data(self, stream: Any, data: bytes, end_stream: bool) -> bytes:
            return data.upper()

        async def response_data(self, stream: Any, data: bytes, end_stream: bool) -> bytes:
            return data * 2

    filter, ctx = make(module, Fine())
    assert run(filter.request_headers(Stream(), True)).status == 418
    assert filter.request_data(Stream(), b"x", True) == b"X"
    assert run(filter.response_data(Stream(), b"x", True)) == b"xx"
    assert counters(ctx) == {}


def test_cancelled_when_the_stream_is_reset(module: ModuleType) -> None:
    async def scenario() -> None:
        forever: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        class Waiting:
            async def request_headers(self, stream: Any, end_stream: bool) -> None:
                await forever

        filter, ctx = make(module, Waiting())
        task = asyncio.ensure_future(filter.request_headers(Stream(), True))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert counters(ctx) == {}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("text", "path", "why"),
    [
        ("{}", "module", "must name"),
        ("{module: no_such_module_anywhere}", "module", "ModuleNotFoundError"),
        ("{module: 'user_filters:absent'}", "module", "AttributeError"),
        ("{module: 'user_filters:number'}", "module", "not callable"),
        ("{module: 'user_filters:refuses', config: {a: 1}}", "config", "KeyError: 'b'"),
        ("{module: 'user_filters:explains'}", "config.colour", "must be red"),
    ],
)
def test_errors(module: ModuleType, text: str, path: str, why: str) -> None:
    def explains(config: Any, context: Any) -> None:
        raise ConfigError.at("colour", "must be red")

    module.number = 1  # type: ignore[attr-defined]
    module.refuses = lambda config, context: config["b"]  # type: ignore[attr-defined]
    module.explains = explains  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as caught:
        python.compile(proto(FILTER, text), context())
    (problem,) = caught.value.problems
    assert problem.path == path
    assert why in problem.why
