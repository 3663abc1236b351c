"""How a workload is asked whether it can be called: in the terms of Kubernetes' probes."""

from __future__ import annotations

from dataclasses import dataclass

HTTP, TCP, GRPC = "http", "tcp", "grpc"


@dataclass(frozen=True, slots=True)
class Probe:
    """`kind`: HTTP, TCP or GRPC. `port`: a number, or the name of one of the workload's ports. `host`: an IP address, "" for the application's own.

    Of HTTP: `path`, `secure` (HTTPS, whoever's certificate it is), `headers`. Of GRPC: `service`. Times in seconds.
    """

    kind: str
    port: int | str
    host: str = ""
    path: str = "/"
    secure: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    service: str = ""
    period_s: float = 10.0
    timeout_s: float = 1.0
    successes: int = 1
    failures: int = 3
