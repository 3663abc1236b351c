"""The machine's own address, as the connection manager puts it into X-Forwarded-For for clients on this machine."""

from __future__ import annotations

import fcntl
import socket
import struct
from functools import cache

_SIOCGIFADDR = 0x8915


@cache
def machine_address() -> str:
    """The first IPv4 address of an interface that is not loopback, in the order of the interfaces; `127.0.0.1` when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:  # this interface has none
                continue
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                return address
    return "127.0.0.1"
