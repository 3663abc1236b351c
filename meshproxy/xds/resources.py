"""The types of resources that we subscribe to, and what came of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from xxhash import xxh64_intdigest

from meshproxy.api import messages, registry
from meshproxy.api.durations import seconds_of
from meshproxy.record import Record, field

WILDCARD = "*"
_RESOURCE = registry.TYPE_PREFIX + "envoy.service.discovery.v3.Resource"


class ResourceType(NamedTuple):
    """`name_field`: which field of the message is the resource's name. `complete`: a response of the state of the world names all there are.

    `service`: who serves it on a stream of its own, with methods `Stream<kind>` and `Delta<kind>`.
    """

    url: str
    name_field: str
    complete: bool
    service: str
    kind: str

    @property
    def message(self) -> Any:
        """The class of its messages."""
        return messages.known(messages.full_name(self.url))


def _type(message: str, name_field: str, complete: bool, service: str, kind: str) -> ResourceType:
    return ResourceType(registry.TYPE_PREFIX + message, name_field, complete, service, kind)


CLUSTER = _type("envoy.config.cluster.v3.Cluster", "name", True, "envoy.service.cluster.v3.ClusterDiscoveryService", "Clusters")
ENDPOINTS = _type("envoy.config.endpoint.v3.ClusterLoadAssignment", "cluster_name", False, "envoy.service.endpoint.v3.EndpointDiscoveryService", "Endpoints")
LISTENER = _type("envoy.config.listener.v3.Listener", "name", True, "envoy.service.listener.v3.ListenerDiscoveryService", "Listeners")
ROUTES = _type("envoy.config.route.v3.RouteConfiguration", "name", False, "envoy.service.route.v3.RouteDiscoveryService", "Routes")
VIRTUAL_HOST = _type("envoy.config.route.v3.VirtualHost", "name", False, "envoy.service.route.v3.VirtualHostDiscoveryService", "VirtualHosts")
SECRETS = _type("envoy.extensions.transport_sockets.tls.v3.Secret", "name", False, "envoy.service.secret.v3.SecretDiscoveryService", "Secrets")
RUNTIME = _type("envoy.service.runtime.v3.Runtime", "name", False, "envoy.service.runtime.v3.RuntimeDiscoveryService", "Runtime")
EXTENSION = _type("envoy.config.core.v3.TypedExtensionConfig", "name", False, "envoy.service.extension.v3.ExtensionConfigDiscoveryService", "ExtensionConfigs")

TYPES = {type.url: type for type in (CLUSTER, ENDPOINTS, LISTENER, ROUTES, VIRTUAL_HOST, SECRETS, EXTENSION, RUNTIME)}
# What comes first in a stream: whatever is referred to before what refers to it.
ORDER = tuple(TYPES)


class Resource(NamedTuple):
    """One resource as it came. `message` is None in a heartbeat, which only says that it lives on, and of a virtual host that is not there. `ttl`: seconds it
    lives, 0.0 for ever. `aliases`: other names by which it was asked for. `digest`: of its bytes as they came; 0 where they are not known."""

    name: str
    version: str
    message: Any
    ttl: float = 0.0
    aliases: tuple[str, ...] = ()
    digest: int = 0


class Update(Record):
    """What a source says at one time. `complete`: resources that are not in it are gone; otherwise only those in `removed` are. `repeated`: names of resources
    that it says two things of; the first is in it."""

    type: ResourceType
    version: str
    resources: list[Resource]
    removed: list[str] = field(default_factory=list)
    complete: bool = False
    nonce: str = ""
    repeated: list[str] = field(default_factory=list)


def unpack(packed: Any, type: ResourceType, version: str) -> Resource:
    """A resource of a response of the state of the world: bare, or in an envelope with its name and its time to live. Raises ValueError."""
    if packed.type_url == _RESOURCE:
        envelope = messages.known("envoy.service.discovery.v3.Resource")()
        try:
            envelope.ParseFromString(packed.value)
        except DecodeError as error:
            raise ValueError("the envelope of a resource is not valid") from error
        return of_envelope(envelope, type, envelope.version or version)
    message, digest = _parse(packed, type)
    return Resource(getattr(message, type.name_field), version, message, digest=digest)


def of_envelope(envelope: Any, type: ResourceType, version: str) -> Resource:
    """A resource in an envelope. Raises ValueError."""
    ttl = seconds_of(envelope, "ttl", 0.0)
    if not envelope.HasField("resource"):
        return Resource(envelope.name, version, None, ttl, tuple(envelope.aliases))
    message, digest = _parse(envelope.resource, type)
    if type.complete:  # as Envoy, whatever the envelope calls it
        return Resource(getattr(message, type.name_field), version, message, ttl, tuple(envelope.aliases), digest)
    return Resource(envelope.name or getattr(message, type.name_field), version, message, ttl, tuple(envelope.aliases), digest)


def _parse(packed: Any, type: ResourceType) -> tuple[Any, int]:
    """The message, and the digest of its bytes. Raises ValueError."""
    if packed.type_url != type.url:
        raise ValueError(f"a resource is of type {packed.type_url!r} in a response of {type.url!r}")
    data = packed.value
    try:
        return type.message.FromString(data), xxh64_intdigest(data)
    except DecodeError as error:
        raise ValueError(f"a resource is not a serialised {messages.full_name(type.url)}") from error


def check_names(resources: list[Resource]) -> None:
    """One response must not say two things of one resource. Raises ValueError."""
    seen: set[str] = set()
    for one in resources:
        if one.name in seen:
            raise ValueError(f"duplicate resource {one.name} found")
        seen.add(one.name)


def check_delta_names(response: Any) -> None:
    """Nor must one of delta, and what is removed is not there. Raises ValueError."""
    names = [one.name for one in response.resources]
    if len({*names, *response.removed_resources}) == len(names) + len(response.removed_resources):
        return
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"duplicate name {name} found among added/updated resources")
        seen.add(name)
    for name in response.removed_resources:
        if name in seen:
            raise ValueError(f"duplicate name {name} found in the union of added+removed resources")
        seen.add(name)


def once(resources: list[Resource]) -> tuple[list[Resource], list[str]]:
    """The first of each name, and the names that came again: of clusters and listeners the others are used nevertheless, as in Envoy."""
    found: dict[str, Resource] = {}
    repeated = []
    for one in resources:
        if one.name in found:
            repeated.append(one.name)
        else:
            found[one.name] = one
    return (list(found.values()), repeated) if repeated else (resources, [])
