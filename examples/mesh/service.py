"""One of four small services, as the environment says: NAME, VERSION, PORT, and ASKS, the URL of the one that it asks itself.

They know nothing of the mesh but `http_proxy`, which every HTTP library heeds.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME, VERSION, ASKS = os.environ["NAME"], os.environ.get("VERSION", "v1"), os.environ.get("ASKS", "")
PASSED_ON = ("x-request-id", "x-user", "traceparent", "tracestate")  # what a service hands on, for routes, logs and traces further along


class Handler(BaseHTTPRequestHandler):
    """Says who it is, who called it, and what the next service has said."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        said = {"service": NAME, "version": VERSION, "pid": os.getpid(), "called_by": self.headers.get("x-forwarded-client-cert", "")}
        status = 200
        if ASKS:
            status, said["asked"] = ask(ASKS + self.path, {name: self.headers[name] for name in PASSED_ON if name in self.headers})
        body = json.dumps(said, indent=2).encode() + b"\n"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def ask(url: str, headers: dict[str, str]) -> tuple[int, object]:
    """Status and body of the next service."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
