"""h2spec against our server side. A Go program, pinned: `make h2spec` installs it where there is Go; without it this is skipped, and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.interop.http2_proxy import BODY, start

LEAST = 147  # all of them; HAProxy has as many, nghttpd 146, Envoy 1.40 134
LIMIT_S = 400.0


def h2spec() -> str | None:
    """$H2SPEC, beside this Python, or on the path."""
    beside = Path(sys.executable).parent / "h2spec"
    return os.environ.get("H2SPEC") or (str(beside) if beside.exists() else shutil.which("h2spec"))


class Handler(BaseHTTPRequestHandler):
    """Answers when the request is whole: many cases are about what comes before."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("transfer-encoding"):
            while (size := int(self.rfile.readline(), 16)) or self.rfile.readline().strip():
                self.rfile.read(size + 2)
        self.send_response(200)
        self.send_header("content-length", str(len(BODY)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(BODY.encode())

    do_POST = do_HEAD = do_GET  # noqa: N815 - the base class has these names

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def upstream() -> Iterator[int]:
    """The port of a server that answers with a body."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
def test_h2spec(upstream: int, tmp_path: Path, tls: bool):
    """All cases, strict ones too."""
    if (binary := h2spec()) is None:
        pytest.skip("H2SPEC IS MISSING: `make h2spec` installs it where there is a Go toolchain (or set $H2SPEC): its cases were not run")
    report = tmp_path / "report.xml"
    with start(tmp_path, port=upstream, http2=False, codec="AUTO" if tls else "HTTP2") as proxy:
        command = [binary, "-S", "-p", str(proxy.port("tls" if tls else "l1")), "-o", "2", "-j", str(report), *(["-t", "-k"] if tls else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    suites = ET.parse(report).getroot().iter("testsuite")
    cases = [(suite.get("name", ""), case) for suite in suites for case in suite.iter("testcase")]
    failed = [f"{name}: {case.get('classname')}" for name, case in cases if case.find("failure") is not None or case.find("error") is not None]
    assert len(cases) == LEAST, done.stdout
    assert not failed
