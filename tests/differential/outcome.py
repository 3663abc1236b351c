"""What a case gave on one proxy, made comparable: values that may differ between two runs become symbols."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SECTIONS = ("client", "fate", "upstream", "log", "stats", "trouble")

# Stats that depend on time, on the length of ports and dates, or on the machine; the admin's own; those that say which HTTP/2 library Envoy uses; and gauges of
# limits and tables, which we set when a cluster is first used. Those are compared where a case asks for them.
_UNSTABLE = re.compile(
    r"(_bytes|bytes_total|_bytes_buffered|_time|_ms)$|uptime|^http\.admin\.|^listener\.admin\.|\brig\.barrier\.|^server\.|^main_thread\.|^filesystem\.|^runtime\.|^listener_manager\."
    r"|^workers\.|^thread|^dns\.|^cluster_manager\.|^envoy\.|\.watchdog|update_no_rebuild$|^overload\.|^tls_inspector\.bytes|\.lb_recalculate_zone_structures$"
    r"|default_total_match_count$|^wasm|\.upstream_rq_time|_ssl\.|\.http1_|flow_control_|\.circuit_breakers\.\w+\.(remaining_|\w+_open$)|_hash_lb\.|\.maglev_lb\.|\.max_host_weight$|\.assignment_"
    r"|\.nghttp2_(down|up)stream_connections$",
)
_HEADERS = [
    (re.compile(rb"(?i)(\r\ndate: )[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT"), rb"\1<date>"),
    (re.compile(rb"(?i)(\r\nx-envoy-upstream-service-time: )\d+"), rb"\1<ms>"),
]
_REMAINING = re.compile(rb"(?i)(\r\nx-envoy-expected-rq-timeout-ms: )(\d{4,})")
_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-([0-9a-f])[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")
_ADDRESS = re.compile(rb"(127\.0\.0\.1[:_]|\r\n[Xx]-[Ff]orwarded-[Pp]ort: )(\d{4,5})")
_LOG_TIMES = re.compile(r"\b(\w*ms)=(\d+)")


@dataclass
class Outcome:
    """One run of a case. `client` is what the client received, `fate` what became of its connection."""

    client: Any = ""
    fate: str = ""
    upstream: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    stats: dict[str, int] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)

    def text(self, sections: Iterable[str]) -> list[str]:
        """Readable lines of some sections, for comparison and diffs."""
        lines = []
        for section in sections:
            lines.append(f"[{section}]")
            lines += _lines(getattr(self, section))
        return lines


def _lines(value: Any, indent: str = "  ") -> list[str]:
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            inner = _lines(item, indent + "  ")
            lines += [f"{indent}{key}: {inner[0].strip()}"] if isinstance(item, int | float) else [f"{indent}{key}:", *inner]
        return lines
    if isinstance(value, list | tuple):
        return [line for item in value for line in (_lines(item, indent) if isinstance(item, str) else [f"{indent}-", *_lines(item, indent + "  ")])]
    if isinstance(value, str | bytes):
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        if len(text) > 20_000:
            return [f"{indent}{len(text)} bytes, hash {hash(text)}"]
        if text.count("|") > 10:  # a log line with many fields: one each line, so that a diff shows the one that differs
            text = text.replace("|", "|\n")
        return [indent + repr(line)[1:-1] for line in text.splitlines(keepends=True)]
    return [f"{indent}{value}"]


def difference(oracle: Outcome, subject: Outcome, sections: Iterable[str]) -> list[str]:
    """Unified diff lines; empty when equal."""
    sections = list(sections)
    return list(difflib.unified_diff(oracle.text(sections), subject.text(sections), "envoy", "ours", lineterm="", n=4))


class Normaliser:
    """Replaces dates, durations, generated ids and ports. `ports`: port -> symbol."""

    def __init__(self, ports: dict[int, str]) -> None:
        self.ports = ports

    def bytes(self, data: bytes) -> str:
        for pattern, replacement in _HEADERS:
            data = pattern.sub(replacement, data)
        data = _REMAINING.sub(_rounded, data)
        data = _UUID.sub(rb"<uuid \1>", data)
        return _ADDRESS.sub(self._port, data).decode("latin-1")

    def _port(self, found: re.Match[bytes]) -> bytes:
        return found[1] + f"<{self.ports.get(int(found[2]), 'port')}>".encode()

    def line(self, line: str) -> str:
        """A line of an access log."""
        return _LOG_TIMES.sub(r"\1=<ms>", self.bytes(line.encode()).encode("latin-1").decode("utf-8", "replace"))


def _rounded(found: re.Match[bytes]) -> bytes:
    """What is left of a timeout after a first try, without the time that the try took: up to a second, on a busy machine."""
    return found[1] + str(-(-int(found[2]) // 1000) * 1000).encode()


def stat_deltas(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """The stable stats that changed."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name, 0) != after.get(name, 0) and not _UNSTABLE.search(name))
    return {name: after.get(name, 0) - before.get(name, 0) for name in names}
