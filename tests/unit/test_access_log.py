"""Access loggers: filters, formats and sinks together."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from envoy.config.accesslog.v3 import accesslog_pb2

from meshproxy.api import convert
from meshproxy.api.errors import ConfigError
from meshproxy.api.runtime import Layer, Runtime, parse_entry
from meshproxy.codec.headers import RequestHead, ResponseHead
from meshproxy.net.address import Address
from meshproxy.net.connection import ConnectionInfo
from meshproxy.observe import access_log, flags
from meshproxy.observe.sinks import MIN_SIZE, Sinks
from meshproxy.observe.stats import Store
from meshproxy.observe.stream_info import StreamInfo

FILE = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"


class Loop:
    """Keeps timers until the test runs them."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Any]] = []

    def call_later(self, delay: float, callback: Any) -> None:
        self.timers.append((delay, callback))

    def run(self) -> None:
        timers, self.timers = self.timers, []
        for _, callback in timers:
            callback()


@pytest.fixture
def context() -> Any:
    made = SimpleNamespace(loop=Loop(), stats=Store(), runtime=None, random=random.Random(1), clock=lambda: 20.0, wall=lambda: 0.0, access_logs=None)
    made.access_logs = Sinks(made)  # type: ignore[arg-type]
    yield made
    made.access_logs.close()


def stream(**attributes: Any) -> StreamInfo:
    made = StreamInfo()
    made.connection = ConnectionInfo(1, Address("10.0.0.1", 1000), Address("127.0.0.1", 80), 1.0)
    made.protocol = "HTTP/1.1"
    made.request = RequestHead(b"GET", b"/", b"host", [(b"x-request-id", b"0000000a-0000-4000-8000-000000000000")])
    made.response = ResponseHead(200)
    made.status = 200
    made.start, made.end = 10.0, 10.5
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def compiled(context: Any, path: Path | str, **fields: Any) -> access_log.AccessLog:
    config = {"name": "log", "typed_config": {"@type": FILE, "path": str(path), **fields.pop("config", {})}, **fields}
    return access_log.compile(convert.to_message(config, accesslog_pb2.AccessLog), context)


def accepts(context: Any, tmp_path: Path, filter: dict[str, Any], **attributes: Any) -> bool:
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    log = compiled(context, path, filter=filter, config={"log_format": {"text_format_source": {"inline_string": "x\n"}}})
    event = attributes.pop("event", "")
    log.log(stream(**attributes), event)
    context.access_logs.flush()
    written = path.read_bytes()
    context.access_logs.close()
    return written == b"x\n"


def test_lines_are_written_by_the_timer_in_one_go(context: Any, tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = compiled(context, path)
    log.log(stream())
    log.log(stream(status=503, flags=flags.UH))
    assert path.read_bytes() == b""
    assert [delay for delay, _ in context.loop.timers] == [1.0]
    context.loop.run()
    assert path.read_bytes() == (
        b'[1970-01-01T00:00:00.000Z] "GET / HTTP/1.1" 200 - 0 0 500 - "-" "-" "0000000a-0000-4000-8000-000000000000" "host" "-"\n'
        b'[1970-01-01T00:00:00.000Z] "GET / HTTP/1.1" 503 UH 0 0 500 - "-" "-" "0000000a-0000-4000-8000-000000000000" "host" "-"\n'
    )
    assert context.stats.value("filesystem.write_completed") == 1
    assert context.stats.value("filesystem.write_buffered") == 2
    log.log(stream())
    assert len(context.loop.timers) == 1


def test_what_waits_is_shown(context: Any, tmp_path: Path) -> None:
    sinks = [context.access_logs.file(str(tmp_path / name)) for name in ("one", "two")]
    for sink in sinks:
        sink.write(b"12345\n")
    context.stats.collect()
    assert context.stats.value("filesystem.write_total_buffered") == 12
    context.access_logs.flush()
    context.stats.collect()
    assert context.stats.value("filesystem.write_total_buffered") == 0


def test_much_is_written_at_once(context: Any, tmp_path: Path) -> None:
    path = tmp_path / "log"
    sink = context.access_logs.file(str(path))
    line = b"x" * 1023 + b"\n"
    for _ in range(MIN_SIZE // 1024):
        sink.write(line)
    assert path.stat().st_size == MIN_SIZE


def test_loggers_of_one_path_share_the_sink(context: Any, tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert compiled(context, path).sink is compiled(context, path).sink
    assert compiled(context, "/dev/stdout").sink is context.access_logs.stream(1)


def test_reopen_follows_the_path(context: Any, tmp_path: Path) -> None:
    path = tmp_path / "log"
    sink = context.access_logs.file(str(path))
    sink.write(b"old\n")
    path.rename(tmp_path / "rotated")
    context.access_logs.reopen()
    sink.write(b"new\n")
    context.access_logs.flush()
    assert (tmp_path / "rotated").read_bytes() == b"old\n"
    assert path.read_bytes() == b"new\n"


def test_reopen_keeps_the_old_file_when_it_fails(context: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    sink = context.access_logs.file(str(folder / "log"))
    folder.rename(tmp_path / "moved")
    context.access_logs.reopen()
    sink.write(b"line\n")
    context.access_logs.flush()
    assert (tmp_path / "moved" / "log").read_bytes() == b"line\n"
    assert context.stats.value("filesystem.reopen_failed") == 1


def test_a_stuck_pipe_never_blocks_and_loses_only_what_is_too_much(context: Any) -> None:
    reader, writer = os.pipe()
    sink = context.access_logs.stream(writer)
    line = b"y" * 999 + b"\n"
    for _ in range(3000):
        sink.write(line)
    assert context.stats.value("filesystem.write_failed") > 0
    received = b""
    for _ in range(2000):
        received += os.read(reader, 1 << 20)
        context.loop.run()
        if not sink._buffer:
            break
    received += os.read(reader, 1 << 20) if not received.endswith(b"\n") else b""
    assert len(received) > 1024 * 1024
    assert set(received.split(b"\n")) == {line[:-1], b""}
    os.close(reader)
    os.close(writer)


def test_a_closed_pipe_is_counted(context: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    context.access_logs.stream(writer).write(b"line\n")
    context.access_logs.flush()
    assert context.stats.value("filesystem.write_failed") == 1
    os.close(writer)


def test_a_file_that_cannot_be_opened_is_a_configuration_error(context: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"typed_config\.path: unable to open file '.*nowhere/log': No such file or directory"):
        compiled(context, tmp_path / "nowhere" / "log")


def test_a_dry_run_leaves_no_file_open(context: Any, tmp_path: Path) -> None:
    context.loop = None
    before = len(os.listdir("/proc/self/fd"))
    compiled(context, tmp_path / "log")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"format": "%RESPONSE_CODE%!"}, b"200!"),
        ({"format": ""}, b'[1970-01-01T00:00:00.000Z] "GET / HTTP/1.1" 200'),
        ({"json_format": {"a": "%RESPONSE_CODE%"}}, b'{"a":200}\n'),
        ({"typed_json_format": {"a": "%RESPONSE_CODE%"}}, b'{"a":200}\n'),
        ({"log_format": {"json_format": {"a": "%RESPONSE_CODE%"}}}, b'{"a":200}\n'),
        ({"log_format": {"text_format": "%PROTOCOL%"}}, b"HTTP/1.1"),
        ({"log_format": {"text_format_source": {"inline_string": "%ACCESS_LOG_TYPE%"}}}, b"DownstreamEnd"),
    ],
)
def test_formats(context: Any, tmp_path: Path, config: dict[str, Any], line: bytes) -> None:
    path = tmp_path / "log"
    compiled(context, path, config=config).log(stream())
    context.access_logs.flush()
    assert path.read_bytes().startswith(line)


def comparison(op: str, value: int, key: str = "key") -> dict[str, Any]:
    return {"comparison": {"op": op, "value": {"default_value": value, "runtime_key": key}}}


@pytest.mark.parametrize(
    ("filter", "attributes", "expected"),
    [
        ({"status_code_filter": comparison("GE", 500)}, {"status": 503}, True),
        ({"status_code_filter": comparison("GE", 500)}, {"status": 499}, False),
        ({"status_code_filter": comparison("LE", 399)}, {"status": 0}, True),
        ({"status_code_filter": comparison("EQ", 404)}, {"status": 404}, True),
        ({"status_code_filter": comparison("NE", 404)}, {"status": 404}, False),
        ({"duration_filter": comparison("GE", 500)}, {}, True),
        ({"duration_filter": comparison("GE", 501)}, {}, False),
        ({"duration_filter": comparison("EQ", 10000)}, {"end": 0.0}, True),
        ({"not_health_check_filter": {}}, {}, True),
        ({"not_health_check_filter": {}}, {"health_check": True}, False),
        ({"traceable_filter": {}}, {}, False),
        ({"traceable_filter": {}}, {"traced": True}, True),
        ({"runtime_filter": {"runtime_key": "k", "percent_sampled": {"numerator": 100}}}, {}, True),
        ({"runtime_filter": {"runtime_key": "k"}}, {}, False),
        ({"runtime_filter": {"runtime_key": "k", "percent_sampled": {"numerator": 11}}}, {}, True),
        ({"runtime_filter": {"runtime_key": "k", "percent_sampled": {"numerator": 10}}}, {}, False),
        ({"header_filter": {"header": {"name": ":method", "string_match": {"exact": "GET"}}}}, {}, True),
        ({"header_filter": {"header": {"name": ":method", "string_match": {"exact": "GET"}}}}, {"request": None}, False),
        ({"response_flag_filter": {}}, {}, False),
        ({"response_flag_filter": {}}, {"flags": flags.UF}, True),
        ({"response_flag_filter": {"flags": ["UH", "UF"]}}, {"flags": flags.UF | flags.URX}, True),
        ({"response_flag_filter": {"flags": ["UH"]}}, {"flags": flags.UF}, False),
        ({"grpc_status_filter": {"statuses": ["OK"]}}, {"response": ResponseHead(200, [(b"grpc-status", b"0")])}, True),
        ({"grpc_status_filter": {"statuses": ["UNAVAILABLE"]}}, {"status": 503}, True),
        ({"grpc_status_filter": {"statuses": ["UNKNOWN"]}}, {}, True),
        ({"grpc_status_filter": {"statuses": ["UNKNOWN"], "exclude": True}}, {}, False),
        ({"log_type_filter": {"types": ["DownstreamEnd"]}}, {}, True),
        ({"log_type_filter": {"types": ["DownstreamEnd"]}}, {"event": "DownstreamStart"}, False),
        ({"log_type_filter": {"types": ["TcpConnectionEnd"]}}, {"protocol": None}, True),
        ({"log_type_filter": {"types": ["DownstreamEnd"], "exclude": True}}, {}, False),
        ({"metadata_filter": {"matcher": {"filter": "f", "path": [{"key": "k"}], "value": {"string_match": {"exact": "v"}}}}}, {}, True),
        (
            {
                "metadata_filter": {
                    "matcher": {"filter": "f", "path": [{"key": "k"}], "value": {"string_match": {"exact": "v"}}},
                    "match_if_key_not_found": False,
                }
            },
            {},
            False,
        ),
        (
            {"metadata_filter": {"matcher": {"filter": "f", "path": [{"key": "k"}], "value": {"string_match": {"exact": "v"}}}}},
            {"_metadata": {"f": {"k": "w"}}},
            False,
        ),
        (
            {"metadata_filter": {"matcher": {"filter": "f", "path": [{"key": "k"}], "value": {"string_match": {"exact": "v"}}}}},
            {"_metadata": {"f": {"k": "v"}}},
            True,
        ),
        ({"and_filter": {"filters": [{"response_flag_filter": {}}, {"not_health_check_filter": {}}]}}, {}, False),
        ({"or_filter": {"filters": [{"response_flag_filter": {}}, {"not_health_check_filter": {}}]}}, {}, True),
    ],
)
def test_filters(context: Any, tmp_path: Path, filter: dict[str, Any], attributes: dict[str, Any], expected: bool) -> None:
    assert accepts(context, tmp_path, filter, **attributes) is expected


def test_a_runtime_key_overrides_the_comparison(context: Any, tmp_path: Path) -> None:
    context.runtime = Runtime([Layer("static", {"key": parse_entry("600")})])
    assert not accepts(context, tmp_path, {"status_code_filter": comparison("GE", 500)}, status=503)
    context.runtime = Runtime([Layer("admin", {"key": parse_entry("400")}, admin=True)])
    assert accepts(context, tmp_path, {"status_code_filter": comparison("GE", 500)}, status=403)


def test_independent_sampling_uses_the_random_source(context: Any, tmp_path: Path) -> None:
    config = {"runtime_filter": {"runtime_key": "k", "percent_sampled": {"numerator": 50}, "use_independent_randomness": True}}
    assert {accepts(context, tmp_path, config) for _ in range(20)} == {True, False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filter": {}}, "filter.filter_specifier: is required"),
        ({"filter": {"and_filter": {"filters": [{"traceable_filter": {}}]}}}, "filter.and_filter.filters: value must contain at least 2"),
        (
            {"filter": {"or_filter": {"filters": [{"traceable_filter": {}}, {"response_flag_filter": {"flags": ["XX"]}}]}}},
            r"filter.or_filter.filters\[1\].response_flag_filter.flags\[0\]: 'XX' is not a response flag",
        ),
        ({"filter": {"extension_filter": {"name": "x"}}}, "filter.extension_filter: access log filter extensions are not supported"),
        ({"config": {"path": ""}}, "typed_config.path: value length must be at least 1"),
        ({"config": {"log_format": {"text_format_source": {"inline_string": "%NOPE%"}}}}, "typed_config.log_format.text_format_source: Not supported field"),
        ({"config": {"log_format": {"json_format": {"a": {"b": "%NOPE%"}}}}}, "typed_config.log_format.json_format.a.b: Not supported field"),
        ({"config": {"log_format": {}}}, "typed_config.log_format.format: is required"),
    ],
)
def test_mistakes_are_named_with_their_path(context: Any, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compiled(context, tmp_path / "log", **fields)


def test_other_loggers_are_unsupported(context: Any) -> None:
    config = {"name": "x", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig"}}
    with pytest.raises(ConfigError, match="is not supported"):
        access_log.compile(convert.to_message(config, accesslog_pb2.AccessLog), context)
