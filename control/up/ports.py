"""Ports that are chosen for processes which are told them, and which nobody else gets meanwhile."""

from __future__ import annotations

import socket
from typing import NamedTuple


class Use(NamedTuple):
    """What a port is for. The same use has the same port as long as it is not given up."""

    namespace: str
    name: str
    what: str


class Ports:
    """Chosen by the kernel, and held: bound, so that it gives them to nobody else.

    Sidecars bind with SO_REUSEPORT and get theirs all the same. Other processes need not do that: their ports are let go just before they start.
    """

    def __init__(self) -> None:
        self._chosen: dict[Use, int] = {}
        self._held: dict[Use, socket.socket] = {}

    def take(self, use: Use, host: str) -> int:
        """The port of a use, chosen when it is first asked for. Raises OSError when there is none."""
        port = self._chosen.get(use)
        if port is None:
            held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            try:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                held.bind((host, 0))
            except OSError:
                held.close()
                raise
            self._held[use] = held
            self._chosen[use] = port = int(held.getsockname()[1])
        return port

    def let_go(self, use: Use) -> None:
        """Its process is about to bind it; it stays chosen."""
        held = self._held.pop(use, None)
        if held is not None:
            held.close()

    def forget(self, namespace: str, name: str) -> None:
        """All of a workload that is no more."""
        for use in [use for use in self._chosen if use[:2] == (namespace, name)]:
            self.let_go(use)
            del self._chosen[use]

    def close(self) -> None:
        """Let go of all."""
        for held in self._held.values():
            held.close()
        self._held.clear()
