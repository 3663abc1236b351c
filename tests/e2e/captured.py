"""Run in a network namespace of its own, `python -m tests.e2e.captured KIND FOLDER`: what an application opens is redirected to its sidecar.

Fails with an assertion. The sidecar is known to the rules by its group, so that what it opens itself is not redirected.
"""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
from pathlib import Path

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane, Service, fetch, write
from tests.e2e.proxy import PATIENCE, Proxy, refused, wait_until

CAPTURE, HTTP, TCP, OUTSIDE, MANY = 15001, 8080, 3306, 9999, 8081
SERVICES, ELSEWHERE = "10.96.0", "10.97.0.1"
GROUP = "1337"
MESH = f"""
apiVersion: v1
kind: Service
metadata: {{{{name: api}}}}
spec: {{{{clusterIP: {SERVICES}.1, selector: {{{{app: api}}}}, ports: [{{{{name: http, port: {HTTP}, targetPort: http}}}}]}}}}
---
apiVersion: v1
kind: Service
metadata: {{{{name: db}}}}
spec: {{{{clusterIP: {SERVICES}.2, selector: {{{{app: api}}}}, ports: [{{{{name: tcp, port: {TCP}, targetPort: http}}}}]}}}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {{{{name: api, labels: {{{{app: api}}}}}}}}
spec: {{{{ports: {{{{http: {{port}}}}}}}}}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {{{{name: web, labels: {{{{app: web}}}}}}}}
spec: {{{{sidecar: {{{{capture: {CAPTURE}}}}}}}}}
"""
ENTRY = f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: outside}}
spec: {{hosts: [outside.test], resolution: NONE, ports: [{{number: {OUTSIDE}, name: tcp, protocol: TCP}}]}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: many}}
spec: {{hosts: ["*.outside.test"], resolution: NONE, ports: [{{number: {MANY}, name: http, protocol: HTTP}}, {{number: 443, name: tls, protocol: TLS}}]}}
"""


def rules() -> None:
    """All that goes to services and elsewhere is redirected, but for what the sidecar opens."""
    redirect = f"iptables -t nat -A OUTPUT -p tcp -d 10.96.0.0/15 -m owner ! --gid-owner {GROUP} -j REDIRECT --to-ports {CAPTURE}"
    for line in ("ip link set lo up", f"ip addr add {ELSEWHERE}/32 dev lo", "ip route add 10.96.0.0/16 dev lo", redirect):
        subprocess.run(line.split(), check=True)


class Outside:
    """Somebody outside of the mesh, who says a word to who connects."""

    def __init__(self) -> None:
        self._socket = socket.create_server((ELSEWHERE, OUTSIDE))

    def said(self) -> bytes:
        """What a caller hears; nothing if the connection is taken and ended."""
        with socket.create_connection((ELSEWHERE, OUTSIDE), PATIENCE) as caller:
            caller.settimeout(PATIENCE)
            self._socket.settimeout(0.5)
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                return caller.recv(100)
            with connection:
                connection.sendall(b"hello")
            return caller.recv(100)


def asked(address: str, port: int, host: str) -> tuple[int, str]:
    status, body = fetch(port, "/", host=host, address=address)
    return status, body.get("name", "")


def tried(address: str, port: int, host: str) -> tuple[int, str] | None:
    """The same; None where the proxy is changing its listeners."""
    try:
        return asked(address, port, host)
    except (OSError, http.client.HTTPException):
        return None


def story(kind: str, work: Path) -> None:
    folder = work / "mesh"
    folder.mkdir()
    service, outside = Service("api"), Outside()
    write(folder, "mesh.yaml", MESH.format(port=service.port))
    program = [envoy_binary() or "envoy", "--disable-hot-restart"] if kind == "envoy" else [sys.executable, "-m", "meshproxy"]
    (work / "web").mkdir()
    with ControlPlane(folder, work) as control:
        command = ["setpriv", f"--regid={GROUP}", "--clear-groups", *program]
        with Proxy(work / "web", control.bootstrap("web"), "--concurrency", "1", "-l", "error", command=command):
            wait_until(lambda: not refused(CAPTURE))
            assert asked(f"{SERVICES}.1", HTTP, "api") == (200, "api")  # by name, whatever address it was meant for
            assert asked(f"{SERVICES}.7", HTTP, f"api.default.svc.cluster.local:{HTTP}") == (200, "api")
            assert asked(f"{SERVICES}.1", HTTP, "nobody.test")[0] == 502
            assert asked(f"{SERVICES}.2", TCP, "anything") == (200, "api")  # by address
            assert outside.said() == b""
            with socket.create_connection(("127.0.0.1", CAPTURE), PATIENCE) as direct:
                assert direct.recv(1) == b"", "who connects to the port itself is not sent to it again"

            write(folder, "outside.yaml", ENTRY)  # what was meant is where it goes
            wait_until(lambda: outside.said() == b"hello")
            many = Service("many", address=ELSEWHERE, port=MANY)
            wait_until(lambda: tried(ELSEWHERE, MANY, "a.outside.test") == (200, "many"))
            assert asked(ELSEWHERE, MANY, "a.nowhere.test")[0] == 502
            many.close()
            (folder / "outside.yaml").unlink()
            wait_until(lambda: outside.said() == b"")
            mode = "{apiVersion: networking.istio.io/v1, kind: Sidecar, metadata: {name: default}, spec: {outboundTrafficPolicy: {mode: ALLOW_ANY}}}"
            write(folder, "sidecar.yaml", mode)
            wait_until(lambda: outside.said() == b"hello")
            status = control.status("web.default")
            assert [status[column] for column in ("CDS", "EDS", "LDS", "RDS")] == ["SYNCED"] * 4
    service.close()


if __name__ == "__main__":
    rules()
    story(sys.argv[1], Path(sys.argv[2]))
