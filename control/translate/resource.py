"""One xDS resource, serialised once, in the two forms in which it is sent; and sets of them with what differs between two."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from meshproxy.api import convert, messages

TYPE_PREFIX = "type.googleapis.com/"
CLUSTER = f"{TYPE_PREFIX}envoy.config.cluster.v3.Cluster"
ENDPOINTS = f"{TYPE_PREFIX}envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER = f"{TYPE_PREFIX}envoy.config.listener.v3.Listener"
ROUTES = f"{TYPE_PREFIX}envoy.config.route.v3.RouteConfiguration"
VIRTUAL_HOST = f"{TYPE_PREFIX}envoy.config.route.v3.VirtualHost"
SECRET = f"{TYPE_PREFIX}envoy.extensions.transport_sockets.tls.v3.Secret"
EXTENSION = f"{TYPE_PREFIX}envoy.config.core.v3.TypedExtensionConfig"
# Whatever is referred to comes before what refers to it.
ORDER = (CLUSTER, ENDPOINTS, SECRET, EXTENSION, LISTENER, ROUTES, VIRTUAL_HOST)


class Resource:
    """`packed`: the Any, as SotW responses have it. `envelope`: the Resource with name and version around it, as delta responses have it.

    Both are framed as elements of their response: a response is these bytes put one after another. `version` is a digest: what is the same has the same.
    """

    __slots__ = ("_envelope", "any", "name", "packed", "version")

    def __init__(self, url: str, name: str, body: bytes) -> None:
        self.name = name
        self.version = hashlib.blake2b(body, digest_size=8).hexdigest()
        self.any = field(1, url.encode()) + field(2, body)
        self.packed = field(2, self.any)  # DiscoveryResponse.resources
        self._envelope: bytes | None = None

    def __repr__(self) -> str:
        return f"<Resource {self.name} {self.version}>"

    @property
    def envelope(self) -> bytes:
        """An element of DeltaDiscoveryResponse.resources."""
        if self._envelope is None:  # Resource: name = 3, version = 1, resource = 2
            self._envelope = field(2, field(1, self.version.encode()) + field(2, self.any) + field(3, self.name.encode()))
        return self._envelope

    @property
    def message(self) -> Any:
        """The message itself, for people and tests."""
        packed = messages.known("google.protobuf.Any").FromString(self.any)
        return messages.known(messages.full_name(packed.type_url)).FromString(packed.value)


class Nothing(Resource):
    """In the place of a virtual host that is not there: an answer for who asked for it."""

    __slots__ = ()

    def __init__(self, name: str) -> None:
        super().__init__(VIRTUAL_HOST, name, b"")
        self.version = "none"
        self.any = b""

    @property
    def envelope(self) -> bytes:
        """Without a resource, and with its name among the aliases, by which Envoy knows such an answer (aliases = 4)."""
        name = self.name.encode()
        return field(2, field(1, b"none") + field(3, name) + field(4, name))


class Held(Resource):
    """Endpoints of which it is not known yet who they are: for who has none. Who comes back with some keeps them until it is."""

    __slots__ = ()

    def __init__(self, made: Resource) -> None:
        self.name, self.any, self.packed = made.name, made.any, made.packed
        self.version = f"held {made.version}"  # so that it is replaced in the end, whatever by
        self._envelope = None


def make(url: str, name: str, value: Mapping[str, Any]) -> Resource:
    """A resource from its JSON form."""
    message = convert.to_message(value, messages.known(messages.full_name(url)))
    return Resource(url, name, message.SerializeToString(deterministic=True))


def typed(message: str, **fields: Any) -> dict[str, Any]:
    """The JSON form of an Any."""
    return {"@type": TYPE_PREFIX + message, **fields}


def duration(seconds: float) -> str:
    """protobuf's JSON form of a duration."""
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of protobuf's wire format."""
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class ResourceSet(Mapping[str, Resource]):
    """Resources of one type, by name; immutable, shared by every proxy that has the same."""

    __slots__ = ("_by_name", "_digest", "_since")

    def __init__(self, resources: Iterable[Resource] = ()) -> None:
        self._by_name = {one.name: one for one in resources}
        self._digest = ""
        self._since: tuple[ResourceSet, Diff] | None = None

    def __getitem__(self, name: str) -> Resource:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def digest(self) -> str:
        """The same for sets of the same resources."""
        if not self._digest:
            whole = hashlib.blake2b(digest_size=8)
            for name in sorted(self._by_name):
                whole.update(f"{name}\0{self._by_name[name].version}\0".encode())
            self._digest = whole.hexdigest()
        return self._digest

    def since(self, before: ResourceSet) -> Diff:
        """What differs from an earlier set. Asked for by one proxy after another, so the last answer is remembered."""
        if self._since is not None and self._since[0] is before:
            return self._since[1]
        old, new = before._by_name, self._by_name
        changed = tuple(one for name, one in new.items() if (was := old.get(name)) is not one and (was is None or was.version != one.version))
        diff = Diff(changed, tuple(name for name in old if name not in new))
        before._since = None  # or each set would keep the one before it, and that one all the others that there ever were
        self._since = before, diff
        return diff


class Diff:
    """What is new or different, and the names of what is gone."""

    __slots__ = ("changed", "removed")

    def __init__(self, changed: tuple[Resource, ...], removed: tuple[str, ...]) -> None:
        self.changed = changed
        self.removed = removed

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)


NO_RESOURCES = ResourceSet()
