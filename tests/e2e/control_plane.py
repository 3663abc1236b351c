"""A control plane process over a folder, and what stands around it in tests: services that say who they are, ports that are ours."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import yaml

from tests.e2e.proxy import PATIENCE, ROOT, wait_until


class Ports:
    """Ports that nobody else gets while this is open: each is bound, with SO_REUSEPORT, so that those whom we tell it can bind it, too."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def take(self) -> int:
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        self._held.append(held)
        return held.getsockname()[1]

    def close(self) -> None:
        for held in self._held:
            held.close()


class Service:
    """An HTTP service that answers with its name and the request as it saw it, in JSON; by TLS, if there is a context for that."""

    def __init__(self, name: str, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1", port: int = 0) -> None:
        service = self
        self.status = 200
        self.statuses: list[int] = []  # of the next answers, before `status`
        self.requests = 0
        self._answers = threading.Event()
        self._answers.set()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                service.requests += 1
                service._answers.wait()
                self.rfile.read(int(self.headers.get("content-length", "0")))
                headers = {key.lower(): value for key, value in self.headers.items()}
                body = json.dumps({"name": name, "method": self.command, "path": self.path, "headers": headers}).encode()
                if service.statuses:
                    self.send_response(service.statuses.pop(0))
                else:
                    self.send_response(service.status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_PUT = do_OPTIONS = do_GET  # noqa: N815  # names of the class's library

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer((address, port), Handler)
        self._server.daemon_threads = True
        if tls is not None:  # each connection shakes hands in its own thread
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def hang(self) -> None:
        """Take requests, and answer none."""
        self._answers.clear()

    def go_on(self) -> None:
        """Answer them."""
        self._answers.set()

    def close(self) -> None:
        self.go_on()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class ControlPlane:
    """`meshctl serve` over a folder, or over what the flags say."""

    def __init__(self, folder: Path | None, work: Path, listen: str = "127.0.0.1:0", flags: list[str] | None = None) -> None:
        self.folder = folder
        self._work = work
        self._listen = listen
        self._flags = flags or []
        self.address = ""
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        path = self._work / "control-address"
        path.unlink(missing_ok=True)
        folder = [str(self.folder)] if self.folder is not None else []
        with (self._work / "control-stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "control", "serve", *folder, "--listen", self._listen, "--address-path", str(path), *self._flags],
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
            )
        self.address = wait_until(lambda: self._alive() and path.exists() and path.read_text())
        self._listen = self.address  # the same one when it comes again

    def _alive(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        return True

    def kill(self) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def log(self) -> str:
        return (self._work / "control-stderr").read_text()

    def ask(self, *arguments: str):
        """What `meshctl` says, as plain values, of this control plane unless the arguments name another address."""
        where = [] if "--server" in arguments else ["--server", self.address]
        run = subprocess.run(
            [sys.executable, "-m", "control", *arguments, *where, "-o", "json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=PATIENCE,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    def bootstrap(self, proxy: str, *flags: str) -> str:
        """YAML of a proxy's bootstrap."""
        return yaml.safe_dump(self.ask("bootstrap", proxy, *flags))

    def status(self, proxy: str) -> dict:
        """States of the types of one proxy, when it is connected and has answered all that it was told: it does so after it has put it to use."""
        return wait_until(lambda: next((one for one in self.ask("proxy-status") if one["name"] == proxy and "STALE" not in one.values()), None))


def write(folder: Path, name: str, text: str) -> None:
    """Put a file into the folder at once, as editors and git do."""
    scratch = folder / f".{name}"
    scratch.write_text(text)
    scratch.rename(folder / name)


def fetch(port: int, path: str = "/", host: str = "", address: str = "127.0.0.1", **headers: str) -> tuple[int, dict]:
    """Status and JSON body; an empty mapping when the body is none. Header names have `_` for `-`."""
    connection = http.client.HTTPConnection(address, port, timeout=PATIENCE)
    try:
        connection.request("GET", path, headers={**({"host": host} if host else {}), **{key.replace("_", "-"): value for key, value in headers.items()}})
        response = connection.getresponse()
        body = response.read()
        return response.status, json.loads(body) if body.startswith(b"{") else {}
    finally:
        connection.close()
