"""What case modules import: a module has CONFIG (a bootstrap), CASES (a list of Case), and `test_case = check_cases(CASES)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.differential.config import (
    PROBE_HOST,
    bootstrap,
    cluster,
    endpoint,
    file_log,
    filter_,
    hcm,
    http,
    listener,
    to,
    y,
)
from tests.differential.rig import Case, Pair, Rig, Tls
from tests.differential.wire import (
    OK,
    Close,
    Counted,
    Echo,
    Eof,
    HalfClose,
    Head,
    Play,
    Request,
    Reset,
    Response,
    Signal,
    Until,
    Wait,
    answer,
    each,
)

__all__ = [
    "OK", "PROBE_HOST", "Case", "Close", "Counted", "Echo", "Eof", "HalfClose", "Head", "Pair", "Play", "Request", "Reset", "Response", "Rig", "Signal", "Tls",
    "Until", "Wait", "answer", "bootstrap", "check_cases", "cluster", "each", "endpoint", "file_log", "filter_", "get", "hcm", "http", "listener", "req", "to",
    "y",
]  # fmt: skip


def req(method: str, path: str, *headers: str, host: str | None = "a.test", body: bytes = b"", version: str = "1.1") -> bytes:
    """A request: headers as "name: value" lines; content-length is added if there is a body and no framing header."""
    lines = [f"{method} {path} HTTP/{version}"]
    if host is not None:
        lines.append(f"Host: {host}")
    lines += headers
    if body and not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def get(path: str = "/", *headers: str, host: str | None = "a.test") -> bytes:
    """A GET request."""
    return req("GET", path, *headers, host=host)


def check_cases(cases: Iterable[Case]) -> Callable[..., Any]:
    """The test function of a case module."""
    cases = list(cases)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), f"names of cases repeat: {sorted(name for name in names if names.count(name) > 1)}"

    @pytest.mark.parametrize("case", cases, ids=str)
    def test_case(pair: Pair, case: Case, verdict: Callable[[str], None]) -> None:
        verdict(pair.check(case))

    return test_case
