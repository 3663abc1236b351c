"""ClusterLoadAssignment messages that differ from right ones in nothing but names and addresses: most of what a control plane says, and quickly seen.

To look at each field of each endpoint takes most of the time that an update takes. What is remembered here are the parts of messages in which everything was
right, without their names and addresses. A message all of whose parts are known needs no other look: what is declared of its fields holds, all of them are
honoured and none is unknown, and its addresses are IP addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from socket import AF_INET, inet_pton
from typing import Any

from meshproxy.net.address import canonical_ip

MOST = 1024  # parts that are remembered; a control plane that makes more is not helped by this


class Shapes:
    """Those that were right."""

    def __init__(self) -> None:
        self._frames: set[bytes] = set()
        self._endpoints: set[bytes] = set()

    def __contains__(self, assignment: Any) -> bool:
        """Whether it is right for certain."""
        if not self._endpoints or _frame(assignment) not in self._frames:
            return False
        for group in assignment.endpoints:
            for part in _without_addresses(group.lb_endpoints):
                if part not in self._endpoints:
                    return False
        return True

    def learn(self, assignment: Any) -> None:
        """It was looked at, and there was nothing to say of it."""
        parts = {part for group in assignment.endpoints for part in _without_addresses(group.lb_endpoints) if part}
        for known, more in ((self._frames, {_frame(assignment)}), (self._endpoints, parts)):
            if len(known) + len(more) > MOST:
                known.clear()
            if len(more) <= MOST:
                known |= more


def _frame(assignment: Any) -> bytes:
    """All but the endpoints, and the name if there is one."""
    frame = type(assignment)()
    frame.CopyFrom(assignment)
    if frame.cluster_name:
        frame.cluster_name = "any"
    for group in frame.endpoints:
        del group.lb_endpoints[:]
    serialised: bytes = frame.SerializeToString(deterministic=True)
    return serialised


def _without_addresses(endpoints: Iterable[Any]) -> Iterator[bytes]:
    """All but the IP address of each; nothing of one that has none, which is no endpoint that is right."""
    for endpoint in endpoints:
        inner = endpoint.endpoint.address.socket_address
        address = inner.address
        try:
            if ":" in address:
                canonical_ip(address)
            else:
                inet_pton(AF_INET, address)
        except (OSError, ValueError):
            yield b""
        else:
            inner.address = ""
            part = endpoint.SerializeToString()
            inner.address = address
            yield part
