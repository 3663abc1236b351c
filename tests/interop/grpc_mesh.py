"""What tests of gRPC's own xDS client have in common: a service `who` in a folder of documents, and a process that calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.control_plane import write
from tests.e2e.proxy import ROOT

TARGET = "xds:///who:50051"


def service(policy: str = "{}") -> str:
    """The service, with a subset for each of its versions a and b, and a traffic policy."""
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: who}}
spec:
  selector: {{app: who}}
  ports: [{{name: grpc, port: 50051, targetPort: grpc}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: who}}
spec:
  host: who
  trafficPolicy: {policy}
  subsets: [{{name: a, labels: {{version: a}}}}, {{name: b, labels: {{version: b}}}}]
"""


def write_rules(folder: Path, http: str) -> None:
    """A VirtualService for `who`; `http` is the list of its rules, as YAML."""
    head = "apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: who}"
    write(folder, "rules.yaml", f"{{{head}, spec: {{hosts: [who], http: {http}}}}}")


def run(log: Path, *command: str, **env: str) -> subprocess.Popen:
    """A module of ours as a process; `env` is added to its environment, and what it complains of is in `log`."""
    with log.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, env={**os.environ, **env}
        )


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


class Client:
    """A process with gRPC's xDS client (grpc_xds_client.py), by the path of its bootstrap; with `secure`, it speaks TLS where the control plane says so."""

    def __init__(self, log: Path, bootstrap: str, *, secure: bool = False) -> None:
        self.process = run(log, "tests.interop.grpc_xds_client", *(["secure"] if secure else []), GRPC_XDS_BOOTSTRAP=bootstrap)

    def call(self, count: int = 1, metadata: str = "-", target: str = TARGET) -> list:
        """What answers each call: the name of a server, or what it says in JSON, or the status code that comes instead."""
        self.process.stdin.write(f"{target} {metadata} {count}\n")
        self.process.stdin.flush()
        return [json.loads(one) if one.startswith("{") else one for one in json.loads(self.process.stdout.readline())]

    def who(self, count: int = 8, metadata: str = "-") -> set[str]:
        """Who answers, or the status codes."""
        return {one["name"] if isinstance(one, dict) else one for one in self.call(count, metadata)}
