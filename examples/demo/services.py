"""Two small HTTP services for the demo: `shop` asks `orders`, and `orders` fails every third time, as services do.

    python services.py shop PORT ORDERS_URL
    python services.py orders PORT

`shop` knows nothing of proxies: its ORDERS_URL happens to be its sidecar's.
"""

from __future__ import annotations

import itertools
import json
import sys
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

calls = itertools.count(1)


class Service(BaseHTTPRequestHandler):
    """What both services share."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    orders_url = ""

    def answer(self, status: int, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """The sidecars keep the access log."""


class Orders(Service):
    """Fails every third call: enough for its caller's sidecar to have something to retry."""

    def do_GET(self) -> None:
        number = next(calls)
        if number % 3 == 0:
            self.answer(503, {"error": "orders is having a moment"})
        else:
            self.answer(200, {"orders": ["tea", "biscuits"], "call": number, "attempt": self.headers["x-envoy-attempt-count"]})


class Shop(Service):
    """Shows a customer's orders."""

    def do_GET(self) -> None:
        # A good citizen of a mesh passes the request id and trace context on.
        headers = {name: self.headers[name] for name in ("x-request-id", "traceparent") if self.headers[name]}
        request = urllib.request.Request(f"{self.orders_url}/orders", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                self.answer(200, {"shop": "open", "path": self.path, **json.load(response)})
        except urllib.error.HTTPError as error:
            self.answer(502, {"shop": "open", "orders": f"unavailable ({error.code})"})


def main(name: str, port: str, orders_url: str = "") -> None:
    Service.orders_url = orders_url
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), {"shop": Shop, "orders": Orders}[name])
    server.daemon_threads = True
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main(*sys.argv[1:])
