"""The application log (not access logs): levels, components and line format as Envoy's flags name them.

Code logs with `logging.getLogger("meshproxy.<component>")` or with its own module name. A component of Envoy's (`--component-log-level upstream:debug`)
stands for one or several of our packages. Lines go to standard error or to `--log-path`, one `write` a line, so that the processes may share the file.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable

from meshproxy.api.errors import ConfigError

DEFAULT_FORMAT = "[%Y-%m-%d %T.%e][%t][%l][%n] [%g:%#] %v"
TRACE = 5
LEVELS = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "off": logging.CRITICAL + 10,
}
_LEVEL_NAMES = {number: name for name, number in LEVELS.items()}

# Envoy's loggers, in the order in which /logging prints them.
COMPONENTS = tuple(
    """
    a2a admin ai_protocol_manager alternate_protocols_cache aws assert backtrace basic_auth cache_filter client config connection conn_handler compression
    credential_injector decompression dns dubbo envoy_bug ext_authz ext_proc rocketmq file filter forward_proxy geolocation grpc happy_eyeballs hc
    health_checker http http2 hystrix init io jwt json_rpc kafka key_value_store lua local_rate_limit main matcher mcp misc mongo multi_connection
    notification oauth2 quic quic_stream pool rate_limit_quota rbac rds redis router runtime stats secret sse tap testing thrift tracing upstream udp wasm
    websocket golang stats_sinks dynamic_modules ip_tagging
    """.split()
)
# Which component one of our modules logs as, by the longest prefix of its name; "meshproxy.<component>" needs no entry.
_OF_MODULE = {
    "meshproxy": "main",
    "meshproxy.api": "config",
    "meshproxy.api.runtime": "runtime",
    "meshproxy.codec": "http",
    "meshproxy.http.filters": "filter",
    "meshproxy.http.router": "router",
    "meshproxy.http.routes": "router",
    "meshproxy.net": "connection",
    "meshproxy.net.listener": "conn_handler",
    "meshproxy.observe": "stats",
    "meshproxy.observe.access_log": "file",
    "meshproxy.tcp": "filter",
    "meshproxy.upstream.discovery": "dns",
    "meshproxy.upstream.health": "hc",
    "meshproxy.upstream.pool": "pool",
    "meshproxy.xds": "config",
}


def component_of(logger: str) -> str:
    """Envoy's component for one of our loggers."""
    name = logger
    while name:
        if name in _OF_MODULE:
            return _OF_MODULE[name]
        parent, _, last = name.rpartition(".")
        if parent == "meshproxy" and last in COMPONENTS:
            return last
        name = parent
    return "misc"


def loggers_of(component: str) -> list[str]:
    """Our loggers that a component stands for."""
    return [f"meshproxy.{component}", *(module for module, name in _OF_MODULE.items() if name == component and module != "meshproxy")]


def parse_level(text: str) -> str:
    """The canonical name of a level. Raises ConfigError."""
    name = "warning" if text == "warn" else text
    if name not in LEVELS:
        raise ConfigError.at("", f"invalid log level specified '{text}'")
    return name


class Levels:
    """The level of every component, as /logging shows and changes it. One per process."""

    def __init__(self, level: str = "info") -> None:
        self.by_component = dict.fromkeys(COMPONENTS, level)

    def update(self, changes: dict[str, str]) -> None:
        """Change some components; names and levels are valid ones."""
        self.by_component.update(changes)
        self.apply()

    def apply(self) -> None:
        """Tell the loggers. One that would have its parent's level anyway is not made: most of Envoy's components have no counterpart here."""
        common = self.by_component["main"]
        logging.getLogger("meshproxy").setLevel(LEVELS[common])
        for component, level in self.by_component.items():
            for name in loggers_of(component):
                if level != common or name in logging.root.manager.loggerDict:
                    logging.getLogger(name).setLevel(LEVELS[level])


def parse_component_levels(text: str) -> dict[str, str]:
    """`upstream:debug,config:trace` -> levels by component. Raises ConfigError."""
    changes = {}
    for entry in text.split(",") if text else ():
        component, colon, level = entry.partition(":")
        if not colon or ":" in level:
            raise ConfigError.at("", f"component log level not correctly specified '{entry}'")
        level = parse_level(level)
        if component not in COMPONENTS:
            raise ConfigError.at("", f"invalid component specified '{component}'")
        changes[component] = level
    return changes


# -- lines ---------------------------------------------------------------------------------------------------------------------------------------------------

_Piece = Callable[[logging.LogRecord], str]
_ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", '"': '\\"'})


def _json_text(text: str) -> str:
    import json

    return json.dumps(text)[1:-1]


def _strftime(code: str) -> _Piece:
    return lambda record: time.strftime(code, time.localtime(record.created))


_FLAGS: dict[str, _Piece] = {
    "v": lambda record: record.getMessage(),
    "_": lambda record: record.getMessage().translate(_ESCAPES),
    "j": lambda record: _json_text(record.getMessage()),
    "l": lambda record: _LEVEL_NAMES.get(record.levelno, "info"),
    "L": lambda record: _LEVEL_NAMES.get(record.levelno, "info")[0].upper(),
    "n": lambda record: component_of(record.name),
    "t": lambda record: str(os.getpid()),  # a worker of ours is a process
    "P": lambda record: str(os.getpid()),
    "e": lambda record: f"{int(record.created * 1e3) % 1000:03d}",
    "f": lambda record: f"{int(record.created * 1e6) % 1000000:06d}",
    "F": lambda record: f"{int(record.created * 1e9) % 1000000000:09d}",
    "E": lambda record: str(int(record.created)),
    "T": _strftime("%H:%M:%S"),
    "R": _strftime("%H:%M"),
    "D": _strftime("%m/%d/%y"),
    "g": lambda record: _source_path(record),
    "s": lambda record: record.filename,
    "@": lambda record: f"{_source_path(record)}:{record.lineno}",
    "#": lambda record: str(record.lineno),
    "!": lambda record: record.funcName or "",
    "%": lambda record: "%",
} | {letter: _strftime("%" + letter) for letter in "YymdHIMSpzaAbBcCrxX"}


def _source_path(record: logging.LogRecord) -> str:
    # As Envoy prints source/server/server.cc: relative to the project, whatever the place of installation.
    path = record.pathname
    start = path.rfind("meshproxy/")
    return path if start < 0 else path[start:]


class Formatter(logging.Formatter):
    """A log line in spdlog's pattern language, as far as `--log-format` documents it; unknown flags stay as they are, as spdlog leaves them."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        # Alignment (%8l, %-8l, %=8l) is accepted and kept.
        self._pieces: list[str | tuple[_Piece, str, int]] = []
        position = 0
        for match in re.finditer(r"%([-=]?)(\d*)(.)", pattern, re.DOTALL):
            if match[3] in _FLAGS:
                self._pieces += [pattern[position : match.start()], (_FLAGS[match[3]], match[1], int(match[2] or 0))]
                position = match.end()
        self._pieces.append(pattern[position:])

    def format(self, record: logging.LogRecord) -> str:
        parts = []
        for piece in self._pieces:
            if isinstance(piece, str):
                parts.append(piece)
                continue
            make, alignment, width = piece
            text = make(record)
            parts.append(text.ljust(width) if alignment == "-" else text.center(width) if alignment == "=" else text.rjust(width))
        line = "".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class Handler(logging.Handler):
    """Writes each line at once to standard error, or to a file that `reopen` opens anew."""

    def __init__(self, path: str | None, pattern: str) -> None:
        super().__init__()
        self._path = path
        self._fd = 2 if not path else _open(path)
        self.setFormatter(Formatter(pattern))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(self._fd, (self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        except OSError:
            # A full disk, or a standard error that nobody reads: the proxy goes on. There is nowhere left to say so.
            return

    def reopen(self) -> None:
        """Open the file again, after a rotation. Keeps the old one if that fails."""
        if not self._path:
            return
        try:
            new = _open(self._path)
        except OSError as error:
            logging.getLogger("meshproxy.main").error("cannot reopen %s: %s", self._path, error.strerror)
            return
        os.dup2(new, self._fd)
        os.close(new)


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def set_up(level: str, component_levels: str, pattern: str, path: str | None) -> tuple[Levels, Handler]:
    """Install the log for this process and those that it forks. Raises ConfigError (flags) and OSError (path)."""
    levels = Levels(level)
    handler = Handler(path, pattern)
    root = logging.getLogger("meshproxy")
    root.handlers[:] = [handler]
    root.propagate = False
    # asyncio reports what its callbacks raise; that is ours to see.
    logging.getLogger("asyncio").handlers[:] = [handler]
    logging.addLevelName(TRACE, "trace")
    levels.by_component.update(parse_component_levels(component_levels))
    levels.apply()
    logging.raiseExceptions = sys.flags.dev_mode
    return levels, handler
