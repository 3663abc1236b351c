"""What subcommands of `meshctl` share: what their flags mean, and how to say that it cannot be meant."""

from __future__ import annotations

import argparse
import re

from control.model.telemetry import NO_MESH_CONFIG, MeshConfig, to_collector

DEFAULT_ADDRESS = "127.0.0.1:15010"  # the port on which Istio's control plane serves xDS in the clear
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # of time, in seconds


class Unusable(Exception):
    """Something that the user can mend; the text says what."""


def duration(text: str) -> float:
    """Seconds of a text such as 30s, 10m, 24h or 7d. Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: 30s, 10m, 24h, 7d")
    return float(int(found[1]) * UNITS[found[2]])


def host_and_port(address: str, option: str = "--server") -> tuple[str, int]:
    """What `option` has. Raises Unusable."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port[:6]) < 65536):
        raise Unusable(f"{option} {address}: host:port is needed")
    return host.strip("[]"), int(port)


def mesh_config(otlp: str) -> MeshConfig:
    """What `--otlp` says of all proxies. Raises Unusable."""
    try:
        return to_collector(otlp) if otlp else NO_MESH_CONFIG
    except ValueError as error:
        raise Unusable(f"--otlp {error}") from error
