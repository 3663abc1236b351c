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
from tests.differential.http2_steps import (
    Body,
    Data,
    EchoData,
    Ended,
    Frame,
    GoAway,
    Got,
    Headers,
    Heard,
    Hello,
    Metadata,
    Open,
    Rst,
    Settings,
    Show,
    Sync,
    Update,
    ask,
    head,
    lines,
    message,
    reply,
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
    Idle,
    Play,
    Request,
    Reset,
    Response,
    Script,
    Signal,
    Step,
    Until,
    Wait,
    answer,
    each,
)

__all__ = [
    "OK", "PROBE_HOST", "Body", "Case", "Close", "Counted", "Data", "Echo", "EchoData", "Ended", "Eof", "Frame", "GoAway", "Got", "HalfClose", "Head",
    "Headers", "Heard", "Hello", "Idle", "Metadata", "Open", "Pair", "Play", "Request", "Reset", "Response", "Rig", "Rst", "Settings", "Show", "Signal",
    "Sync", "Tls", "Until", "Update", "Wait", "answer", "ask", "bootstrap", "check_cases", "cluster", "each", "endpoint", "file_log", "filter_", "get",
    "grpc_head", "h2_case", "h2_cluster", "hcm", "head", "http", "http2_options", "lines", "listener", "message", "reply", "req", "to", "y",
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


# ---- HTTP/2 --------------------------------------------------------------------------------------------------------------------------------------------


def h2_case(name: str, *steps: Step | bytes | Script, hello: Hello | None = None, **fields: Any) -> Case:
    """A case whose client speaks HTTP/2: preface and SETTINGS, then the steps (lists are parts of the script)."""
    script: Script = [hello or Hello()]
    for step in steps:
        script += step if isinstance(step, list) else [step]
    return Case(name, script, **fields)


def http2_options(which: str = "explicit_http_config", *, common: dict[str, Any] | None = None, **http2: Any) -> dict[str, Any]:
    """`typed_extension_protocol_options` of a cluster that speaks HTTP/2 with these Http2ProtocolOptions."""
    options: dict[str, Any] = {"@": "http_options", which: {"http2_protocol_options": http2}}
    if common:
        options["common_http_protocol_options"] = common
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}


def h2_cluster(name: str, *endpoints: str, common: dict[str, Any] | None = None, options: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A cluster that speaks HTTP/2; its upstreams' names begin with h2."""
    return cluster(name, *endpoints, typed_extension_protocol_options=http2_options(common=common, **(options or {})), **fields)


def grpc_head(path: str = "/pkg.Service/Method", *headers: str, **fields: Any) -> list[tuple[str, str]]:
    """The head of a gRPC request."""
    return head("POST", path, "content-type: application/grpc", "te: trailers", *headers, **fields)
