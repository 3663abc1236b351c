"""Which filter chain of a listener a connection belongs to: `FilterChainMatch`, in Envoy's order and without backtracking.

The criteria form a tree with one level for each. At every level the most specific entry that fits the connection is taken, and once taken there is no
way back: if the levels below it have nothing that fits, the default filter chain serves the connection, not a less specific branch. (Envoy:
`filter_chain_manager_impl.cc`.) Levels: destination port, destination IP, server name, transport protocol, application protocols, direct source IP,
source type, source IP, source port.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from meshproxy.api.cidr import parse_cidr
from meshproxy.api.errors import ConfigError, fail, under

if TYPE_CHECKING:
    from meshproxy.net.address import Address
    from meshproxy.net.connection import ConnectionInfo

HONOURS = {
    "envoy.config.listener.v3.FilterChainMatch": (
        "destination_port prefix_ranges direct_source_prefix_ranges source_type source_prefix_ranges source_ports server_names transport_protocol"
        " application_protocols"
    ),
}

_T = TypeVar("_T")
_ANY_SOURCE, _LOCAL, _EXTERNAL = 0, 1, 2
_Prefix = tuple[int, int, int]  # address bits (32 or 128), prefix length, the prefix as a number
_ANY_IP: tuple[_Prefix, ...] = ((32, 0, 0), (128, 0, 0))
_PIPE = (32, 0xFFFFFFFF)  # a Unix socket counts as 255.255.255.255, which only catch-all ranges cover


class FilterChainMatcher(Generic[_T]):
    """The tree. `find` gives what was put in for the branch that fits, or None."""

    __slots__ = ("_only", "_root")

    def __init__(self, entries: Iterable[tuple[Any, _T]]) -> None:
        """`entries`: FilterChainMatch messages with what they stand for. ConfigError (`[i]...`) for criteria that are wrong, equal or overlapping."""
        root: dict[int, Any] = {}
        seen: dict[bytes, int] = {}
        entries = list(entries)
        for at, (proto, value) in enumerate(entries):
            serialised = proto.SerializeToString(deterministic=True)
            if serialised in seen:
                fail(f"[{at}]", f"has the same matching rules defined as filter chain [{seen[serialised]}]")
            seen[serialised] = at
            with under(f"[{at}].filter_chain_match"):
                keys = _keys(proto)
            for path in itertools.product(*keys):
                _insert(root, path, value, at)
        self._root = _freeze(root, 0)
        # The common case: one chain for everything.
        self._only: _T | None = entries[0][1] if len(entries) == 1 and not entries[0][0].ByteSize() else None

    def find(self, conn: ConnectionInfo) -> _T | None:
        """What fits the connection best."""
        if self._only is not None:
            return self._only
        node = self._root
        for level in _LEVELS:
            node = level(node, conn)
            if node is None:
                return None
        return node


def _keys(proto: Any) -> tuple[tuple[Any, ...], ...]:
    """What to insert at each level."""
    names = []
    for at, name in enumerate(proto.server_names):
        if "*" in name and not name.startswith("*."):
            fail(f"server_names[{at}]", 'partial wildcards are not supported in "server_names"')
        names.append((name[1:] if name.startswith("*.") else name).lower())
    return (
        (proto.destination_port.value,),
        _prefixes(proto.prefix_ranges, "prefix_ranges"),
        tuple(dict.fromkeys(names)) or ("",),
        (proto.transport_protocol,),
        tuple(dict.fromkeys(proto.application_protocols)) or ("",),
        _prefixes(proto.direct_source_prefix_ranges, "direct_source_prefix_ranges"),
        (proto.source_type,),
        _prefixes(proto.source_prefix_ranges, "source_prefix_ranges"),
        tuple(dict.fromkeys(proto.source_ports)) or (0,),
    )


def _prefixes(protos: Any, path: str) -> tuple[_Prefix, ...]:
    prefixes: dict[_Prefix, None] = {}
    for at, proto in enumerate(protos):
        packed, length = parse_cidr(proto, f"{path}[{at}]")
        bits = len(packed) * 8
        prefixes[bits, length, int.from_bytes(packed, "big") >> (bits - length)] = None
    return tuple(prefixes) or _ANY_IP


def _insert(root: dict[Any, Any], path: tuple[Any, ...], value: Any, at: int) -> None:
    node = root
    for key in path[:-1]:
        node = node.setdefault(key, {})
    if path[-1] in node:
        raise ConfigError.at(f"[{at}]", "multiple filter chains with overlapping matching rules are defined")
    node[path[-1]] = value


def _freeze(node: Any, depth: int) -> Any:
    """IP levels become tables of prefix lengths, longest first; the others stay dicts."""
    if depth == len(_LEVELS):
        return node
    frozen = {key: _freeze(child, depth + 1) for key, child in node.items()}
    return _PrefixTable(frozen) if depth in (1, 5, 7) else frozen


class _PrefixTable:
    """Longest prefix match: one look-up for each prefix length that occurs."""

    __slots__ = ("_by_bits",)

    def __init__(self, entries: dict[_Prefix, Any]) -> None:
        by_bits: dict[int, dict[int, dict[int, Any]]] = {32: {}, 128: {}}
        for (bits, length, prefix), value in entries.items():
            by_bits[bits].setdefault(bits - length, {})[prefix] = value
        self._by_bits = {bits: tuple(sorted(tables.items())) for bits, tables in by_bits.items()}

    def get(self, address: Address) -> Any:
        packed = address.ip_bytes
        bits, number = (len(packed) * 8, int.from_bytes(packed, "big")) if packed else _PIPE
        for shift, table in self._by_bits[bits]:
            found = table.get(number >> shift)
            if found is not None:
                return found
        return None


def _destination_port(node: dict[int, Any], conn: ConnectionInfo) -> Any:
    local = conn.local
    found = node.get(local.port) if local.kind == "ip" else None
    return node.get(0) if found is None else found


def _destination_ip(node: _PrefixTable, conn: ConnectionInfo) -> Any:
    return node.get(conn.local)


def _server_name(node: dict[str, Any], conn: ConnectionInfo) -> Any:
    name = conn.server_name
    if name:
        found = node.get(name)
        at = name.find(".", 1)
        while found is None and 0 < at < len(name) - 1:
            found = node.get(name[at:])
            at = name.find(".", at + 1)
        if found is not None:
            return found
    return node.get("")


def _transport_protocol(node: dict[str, Any], conn: ConnectionInfo) -> Any:
    found = node.get(conn.transport_protocol)
    return node.get("") if found is None else found


def _application_protocol(node: dict[str, Any], conn: ConnectionInfo) -> Any:
    for protocol in conn.application_protocols:
        found = node.get(protocol)
        if found is not None:
            return found
    return node.get("")


def _direct_source_ip(node: _PrefixTable, conn: ConnectionInfo) -> Any:
    return node.get(conn.direct_remote)


def _source_type(node: dict[int, Any], conn: ConnectionInfo) -> Any:
    if _LOCAL in node or _EXTERNAL in node:
        found = node.get(_LOCAL if is_local(conn) else _EXTERNAL)
        if found is not None:
            return found
    return node.get(_ANY_SOURCE)


def _source_ip(node: _PrefixTable, conn: ConnectionInfo) -> Any:
    return node.get(conn.remote)


def _source_port(node: dict[int, Any], conn: ConnectionInfo) -> Any:
    remote = conn.remote
    found = node.get(remote.port if remote.kind == "ip" else _PIPE_PORT)
    return node.get(0) if found is None else found


def is_local(conn: ConnectionInfo) -> bool:
    """Whether the connection comes from this machine: loopback, a Unix socket, or the address it was made to."""
    remote = conn.remote
    return remote.kind == "pipe" or remote.ip == "::1" or remote.ip.startswith("127.") or remote.ip == conn.local.ip


_PIPE_PORT = 0
_LEVELS: tuple[Callable[[Any, ConnectionInfo], Any], ...] = (
    _destination_port,
    _destination_ip,
    _server_name,
    _transport_protocol,
    _application_protocol,
    _direct_source_ip,
    _source_type,
    _source_ip,
    _source_port,
)
