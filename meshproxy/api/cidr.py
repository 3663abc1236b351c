"""CIDR ranges: is this address in one of them?"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from meshproxy.api.errors import fail

if TYPE_CHECKING:
    from envoy.config.core.v3 import address_pb2

    from meshproxy.net.address import Address

HONOURS = {"envoy.config.core.v3.CidrRange": "address_prefix prefix_len"}

_MEMO_SIZE = 4096  # addresses whose answer is remembered


class CidrSet:
    """A set of CIDR ranges, IPv4 and IPv6. Callable: whether an `Address` is in one of them. Unix sockets are in none.

    Ranges of one length are one hash look-up, so the cost grows with the number of different prefix lengths, not of ranges. Answers are remembered for up
    to 4,096 addresses.
    """

    __slots__ = ("_memo", "_v4", "_v6")

    def __init__(self, ranges: Iterable[tuple[bytes, int]]) -> None:
        """`ranges`: packed addresses (4 or 16 bytes) with prefix lengths; bits beyond the prefix do not matter."""
        v4: dict[int, set[int]] = {}
        v6: dict[int, set[int]] = {}
        for packed, length in ranges:
            bits = len(packed) * 8
            shift = bits - min(length, bits)
            (v4 if bits == 32 else v6).setdefault(shift, set()).add(int.from_bytes(packed, "big") >> shift)
        self._v4 = tuple(sorted(v4.items()))
        self._v6 = tuple(sorted(v6.items()))
        self._memo: dict[str, bool] = {}

    def __call__(self, address: Address) -> bool:
        """Whether `address` is in one of the ranges."""
        found = self._memo.get(address.ip)
        return self._look_up(address) if found is None else found

    def _look_up(self, address: Address) -> bool:
        packed = address.ip_bytes
        number = int.from_bytes(packed, "big")
        ranges = self._v4 if len(packed) == 4 else self._v6 if len(packed) == 16 else ()
        found = any(number >> shift in prefixes for shift, prefixes in ranges)
        if len(self._memo) >= _MEMO_SIZE:
            self._memo.clear()
        self._memo[address.ip] = found
        return found

    def __bool__(self) -> bool:
        return bool(self._v4 or self._v6)


def compile_cidr(ranges: Iterable[address_pb2.CidrRange]) -> Callable[[Address], bool]:
    """`CidrRange`s -> whether an address is in one of them. Raises ConfigError with the index of a malformed range."""
    return CidrSet(parse_cidr(proto, f"[{index}]") for index, proto in enumerate(ranges))


def parse_cidr(proto: address_pb2.CidrRange, path: str = "") -> tuple[bytes, int]:
    """One range as a packed address and a prefix length; a length beyond the address's own is cut, as Envoy does."""
    text = proto.address_prefix
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        fail(f"{path}.address_prefix".lstrip("."), f"malformed IP address: {text}")
    return packed, min(proto.prefix_len.value, len(packed) * 8)
