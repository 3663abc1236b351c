"""The application log."""

from __future__ import annotations

import logging
import re

import pytest

from meshproxy import logs
from meshproxy.api.errors import ConfigError


def record(message="hello", *, name="meshproxy.upstream.pool", level=logging.INFO, **attributes):
    made = logging.LogRecord(name, level, "/opt/x/meshproxy/upstream/pool.py", 12, message, (), None)
    made.created = 1_700_000_000.123456
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


@pytest.fixture
def restore():
    names = ["meshproxy", "asyncio", *(name for component in logs.COMPONENTS for name in logs.loggers_of(component))]
    before = [(logging.getLogger(name), logging.getLogger(name).level, logging.getLogger(name).handlers[:]) for name in names]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ("%v", "hello"),
        ("[%l][%n] %v", "[info][pool] hello"),
        ("%L%%%v", "I%hello"),
        ("[%g:%#]", "[meshproxy/upstream/pool.py:12]"),
        ("%s %@", "pool.py meshproxy/upstream/pool.py:12"),
        ("%e %f %E", "123 123456 1700000000"),
        ("%8l|%-8l|%=8l|", "    info|info    |  info  |"),
        ("%q %v", "%q hello"),
        ("%Y", "2023"),
    ],
)
def test_patterns_are_spdlogs(pattern, line):
    assert logs.Formatter(pattern).format(record()) == line


def test_the_default_line_looks_like_envoys():
    line = logs.Formatter(logs.DEFAULT_FORMAT).format(record())
    assert re.fullmatch(r"\[2023-11-1\d \d\d:\d\d:\d\d\.123\]\[\d+\]\[info\]\[pool\] \[meshproxy/upstream/pool\.py:12\] hello", line)


def test_escaped_messages_stay_on_one_line():
    assert logs.Formatter("%_").format(record('a\n"b"\\')) == 'a\\n\\"b\\"\\\\'
    assert logs.Formatter("%j").format(record('a\n"b"')) == 'a\\n\\"b\\"'


@pytest.mark.parametrize(
    ("logger", "component"),
    [
        ("meshproxy.main", "main"),
        ("meshproxy.upstream.health", "hc"),
        ("meshproxy.upstream.cluster", "upstream"),
        ("meshproxy.http.filters.rbac", "filter"),
        ("meshproxy.net.listener", "conn_handler"),
        ("meshproxy.worker", "main"),
        ("asyncio", "misc"),
    ],
)
def test_every_logger_belongs_to_a_component(logger, component):
    assert logs.component_of(logger) == component


def test_component_levels_are_parsed():
    assert logs.parse_component_levels("upstream:debug,config:warn") == {"upstream": "debug", "config": "warning"}
    assert logs.parse_component_levels("") == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("foo:debug", "invalid component specified 'foo'"),
        ("http:zz", "invalid log level specified 'zz'"),
        ("http", "component log level not correctly specified 'http'"),
    ],
)
def test_wrong_component_levels_are_refused_in_envoys_words(text, why):
    with pytest.raises(ConfigError, match=re.escape(why)):
        logs.parse_component_levels(text)


def test_levels_reach_the_loggers(restore):
    levels = logs.Levels("warning")
    levels.update({"upstream": "debug", "conn_handler": "trace"})
    assert logging.getLogger("meshproxy.upstream").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("meshproxy.upstream.cluster").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("meshproxy.net.listener").isEnabledFor(logs.TRACE)
    assert not logging.getLogger("meshproxy.main").isEnabledFor(logging.INFO)
    levels.update(dict.fromkeys(logs.COMPONENTS, "off"))
    assert not logging.getLogger("meshproxy.upstream").isEnabledFor(logging.CRITICAL)


def test_a_log_file_is_opened_again_after_rotation(tmp_path, restore):
    path = tmp_path / "app.log"
    _, handler = logs.set_up("info", "", "%v", str(path))
    log = logging.getLogger("meshproxy.main")
    log.info("before")
    path.rename(tmp_path / "app.log.1")
    log.info("still the old file")
    handler.reopen()
    log.info("after")
    assert (tmp_path / "app.log.1").read_text() == "before\nstill the old file\n"
    assert path.read_text() == "after\n"


def test_a_traceback_is_one_entry(tmp_path, restore):
    path = tmp_path / "app.log"
    logs.set_up("info", "", "%v", str(path))
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("meshproxy.main").exception("failed")
    assert path.read_text().startswith("failed\nTraceback")
    assert path.read_text().endswith("ValueError: boom\n")
