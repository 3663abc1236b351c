"""What tests of the ways to a control plane share: `web`, which calls `api`, a rule to be told of, and requests all the while."""

from __future__ import annotations

import http.client
import threading
from collections import Counter

from tests.polling import PATIENCE

DOCUMENTS = """
apiVersion: v1
kind: Service
metadata: {{name: api}}
spec: {{selector: {{app: api}}, ports: [{{name: http, port: 80, targetPort: http}}]}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: api, labels: {{app: api}}}}
spec: {{ports: {{http: {api}}}}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: web, labels: {{app: web}}}}
spec: {{serviceAccount: web, sidecar: {{outbound: [{{host: api, port: 80, listen: {web}}}]}}}}
"""

TEAPOT = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: api}
spec: {hosts: [api], http: [{headers: {response: {set: {x-rules: "yes"}}}, route: [{destination: {host: api}}]}]}
"""


class Load:
    """Requests, one after another, until the end; counts the statuses, and those answers that have the header of TEAPOT."""

    def __init__(self, port: int) -> None:
        self.statuses: Counter = Counter()
        self.ruled = 0
        self._port = port
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
            try:
                connection.request("GET", "/")
                response = connection.getresponse()
                response.read()
                self.statuses[response.status] += 1
                self.ruled += response.headers["x-rules"] == "yes"
            except OSError as error:
                self.statuses[repr(error)] += 1
            finally:
                connection.close()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
