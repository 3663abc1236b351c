"""Why an address cannot be listened on, which gRPC does not say."""

from __future__ import annotations

import socket


def why_not(host: str, port: int) -> str:
    """What is in the way of listening there, "" if nothing is."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
            one.listen()
        except OSError as error:
            return error.strerror or str(error)
    return ""
