"""/config_dump: the configuration as envoy.admin.v3.ConfigDump, whole or in part, secrets redacted.

Parameters as Envoy reads them: `resource` (a repeated field of one section: each element becomes an entry), `mask` (a field mask, for each section or,
with `resource`, for each element), `name_regex` (RE2, the whole name), `include_eds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import re2
from google.protobuf import any_pb2, field_mask_pb2

from meshproxy.admin.message import JSON, PLAIN, Request, Response, message_to_json
from meshproxy.api import messages, registry
from meshproxy.api.redact import redact

if TYPE_CHECKING:
    from meshproxy.server import Server

_HEALTHY = 1  # envoy.config.core.v3.HealthStatus
Accepts = Callable[[str], bool]
_SECRET = "envoy.extensions.transport_sockets.tls.v3.Secret"
_LISTENER = "envoy.config.listener.v3.Listener"
_HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


class _Refused(Exception):
    """Why the request cannot be answered, and with which status."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status


def config_dump(request: Request, server: Server) -> Response:
    """The whole dump, or what the parameters select."""
    resource, mask = request.query.get("resource"), request.query.get("mask")
    dump = messages.known("envoy.admin.v3.ConfigDump")()
    try:
        sections = _sections(server, _name_filter(request.query.get("name_regex", "")), "include_eds" in request.query)
        for message in _select(sections, resource, mask) if resource is not None else _masked(sections, mask):
            redact(message)
            dump.configs.add().Pack(message)
    except _Refused as refused:
        return Response(str(refused), refused.status, PLAIN)
    return Response(message_to_json(dump), content_type=JSON)


def _name_filter(pattern: str) -> Accepts:
    if not pattern:
        return lambda name: True
    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        why = error.args[0] if error.args else ""
        why = why.decode() if isinstance(why, bytes) else why
        raise _Refused(f"INVALID_ARGUMENT: Error while parsing name_regex from {pattern}: {why}", 400) from error
    return lambda name: compiled.fullmatch(name) is not None


# -- sections, in Envoy's order ------------------------------------------------------------------------------------------------------------------------------


def _sections(server: Server, accepts: Accepts, include_eds: bool) -> Iterator[Any]:
    bootstrap = server.bootstrap
    yield _bootstrap(server, bootstrap)
    yield _clusters(server, bootstrap, accepts)
    if server.dynamic is not None and server.dynamic.extensions:
        yield _extensions(server, accepts)
    if include_eds:
        yield _endpoints(server, accepts)
    yield _listeners(server, bootstrap, accepts)
    yield messages.known("envoy.admin.v3.ScopedRoutesConfigDump")()
    yield _routes(server, bootstrap, accepts)
    yield _secrets(server, bootstrap, accepts)


def _bootstrap(server: Server, bootstrap: Any) -> Any:
    section = messages.known("envoy.admin.v3.BootstrapConfigDump")()
    section.bootstrap.CopyFrom(bootstrap)
    section.bootstrap.node.CopyFrom(server.node)
    _stamp(section, server)
    return section


def _clusters(server: Server, bootstrap: Any, accepts: Accepts) -> Any:
    section = messages.known("envoy.admin.v3.ClustersConfigDump")()
    for cluster in sorted(bootstrap.static_resources.clusters, key=lambda cluster: cluster.name):
        if accepts(cluster.name):
            entry = section.static_clusters.add()
            entry.cluster.Pack(cluster)
            _stamp(entry, server)
    found = server.dynamic.clusters if server.dynamic is not None else None
    if found is not None:
        section.version_info = found.version
        for entries, known in ((section.dynamic_active_clusters, found.active), (section.dynamic_warming_clusters, found.warming)):
            for name in sorted(filter(accepts, known)):
                one = known[name]
                _put(entries.add(), "cluster", "envoy.config.cluster.v3.Cluster", one.serialised, one.version, one.updated)
    return section


def _put(entry: Any, field: str, type_name: str, serialised: bytes, version: str, updated: float) -> None:
    """Fill in a resource that came by an API."""
    packed = getattr(entry, field)
    packed.type_url = registry.TYPE_PREFIX + type_name
    packed.value = serialised
    entry.version_info = version
    entry.last_updated.FromMilliseconds(int(updated * 1000))


def _extensions(server: Server, accepts: Accepts) -> Any:
    """HTTP filters by discovery."""
    section = messages.known("envoy.admin.v3.EcdsConfigDump")()
    for one in server.dynamic.extensions:
        if one.proto is not None and accepts(one.name):
            serialised = one.proto.SerializeToString(deterministic=True)
            _put(section.ecds_filters.add(), "ecds_filter", "envoy.config.core.v3.TypedExtensionConfig", serialised, one.version, one.updated_at)
    return section


def _listeners(server: Server, bootstrap: Any, accepts: Accepts) -> Any:
    section = messages.known("envoy.admin.v3.ListenersConfigDump")()
    stopped = {listener.name for listener in server.listeners if listener.stopped}
    names = [listener.name for listener in server.listeners]
    for at, listener in enumerate(bootstrap.static_resources.listeners):
        name = names[at] if at < len(names) else listener.name
        if accepts(name) and name not in stopped:
            entry = section.static_listeners.add()
            entry.listener.Pack(listener)
            _stamp(entry, server)
    found = server.dynamic.listeners if server.dynamic is not None else None
    if found is None:
        return section
    section.version_info = found.version
    entries: dict[str, Any] = {}

    def entry_of(name: str) -> Any:
        if name not in entries:
            entries[name] = section.dynamic_listeners.add(name=name)
        return entries[name]

    manager = server.listeners_manager
    for state, known in (
        ("active_state", [one for one in server.listeners if one.via_api]),
        ("warming_state", manager.warming.values()),
        ("draining_state", [one.listener for one in manager.draining if not one.chains]),
    ):
        for one in known:
            if accepts(one.name):
                _put(getattr(entry_of(one.name), state), "listener", _LISTENER, one.serialised, one.version, one.updated)
    for name, failure in found.failures.items():
        if accepts(name):
            error = entry_of(name).error_state
            error.failed_configuration.Pack(failure.message)
            error.last_update_attempt.FromMilliseconds(int(failure.when * 1000))
            error.details = failure.details
    return section


def _routes(server: Server, bootstrap: Any, accepts: Accepts) -> Any:
    """The route configurations inside connection managers, and those that came by discovery."""
    section = messages.known("envoy.admin.v3.RoutesConfigDump")()
    dynamic = [one for one in server.listeners if one.via_api]
    if server.listeners_manager is not None:
        dynamic += [one.listener for one in server.listeners_manager.draining if not one.chains]
    parsed = [(messages.known(_LISTENER).FromString(one.serialised), one.updated) for one in dynamic]
    for listener, updated in (*((one, server.started_wall) for one in bootstrap.static_resources.listeners), *parsed):
        for manager in _managers(listener):
            if manager.HasField("route_config") and accepts(manager.route_config.name):
                entry = section.static_route_configs.add()
                entry.route_config.Pack(manager.route_config)
                entry.last_updated.FromMilliseconds(int(updated * 1000))
    for one in server.dynamic.routes if server.dynamic is not None else ():
        if one.serialised and accepts(one.name):
            _put(section.dynamic_route_configs.add(), "route_config", "envoy.config.route.v3.RouteConfiguration", one.serialised, one.version, one.updated_at)
    return section


def _managers(listener: Any) -> Iterator[Any]:
    """The connection managers of a listener."""
    for chain in (*listener.filter_chains, *([listener.default_filter_chain] if listener.HasField("default_filter_chain") else ())):
        for network_filter in chain.filters:
            if network_filter.typed_config.type_url == _HCM:
                yield registry.unpack(network_filter.typed_config)


def _secrets(server: Server, bootstrap: Any, accepts: Accepts) -> Any:
    section = messages.known("envoy.admin.v3.SecretsConfigDump")()
    for secret in bootstrap.static_resources.secrets:
        if accepts(secret.name):
            entry = section.static_secrets.add()
            entry.name = secret.name
            entry.secret.Pack(secret)
    for one in server.dynamic.secrets if server.dynamic is not None else ():
        if accepts(one.name):
            entry = (section.dynamic_active_secrets if one.serialised else section.dynamic_warming_secrets).add(name=one.name)
            placeholder = messages.known(_SECRET)(name=one.name).SerializeToString()
            _put(entry, "secret", _SECRET, one.serialised or placeholder, one.version or "uninitialized", one.updated_at)
    return section


def _endpoints(server: Server, accepts: Accepts) -> Any:
    section = messages.known("envoy.admin.v3.EndpointsConfigDump")()
    for assignment, via_api in sorted(server.clusters.load_assignments(), key=lambda one: one[0].cluster_name):
        if accepts(assignment.cluster_name):
            entries = section.dynamic_endpoint_configs if via_api else section.static_endpoint_configs
            entries.add().endpoint_config.Pack(_as_envoy_shows(assignment))
    return section


def _as_envoy_shows(assignment: Any) -> Any:
    """With the fields that Envoy fills in from its hosts."""
    factor = assignment.policy.overprovisioning_factor
    factor.value = factor.value or 140
    for group in assignment.endpoints:
        group.locality.SetInParent()
        group.load_balancing_weight.SetInParent()
        for host in group.lb_endpoints:
            host.health_status = host.health_status or _HEALTHY
            host.load_balancing_weight.value = host.load_balancing_weight.value or 1
            host.endpoint.health_check_config.SetInParent()
    return assignment


def _stamp(entry: Any, server: Server) -> None:
    entry.last_updated.FromMilliseconds(int(server.started_wall * 1000))


# -- selection -----------------------------------------------------------------------------------------------------------------------------------------------


def _masked(sections: Iterator[Any], mask: str | None) -> list[Any]:
    if mask is None:
        return list(sections)
    # A mask that does not fit a section leaves that section out.
    chosen = [section for section in sections if _trim(section, mask.split(","))]
    if not chosen:
        raise _Refused(f"FieldMask {mask} could not be successfully applied to any configs.", 400)
    return chosen


def _select(sections: Iterator[Any], resource: str, mask: str | None) -> list[Any]:
    for section in sections:
        field = section.DESCRIPTOR.fields_by_name.get(resource)
        if field is None:
            continue
        if not field.is_repeated:
            raise _Refused(f"{resource} is not a repeated field. Use ?mask={resource} to get only this field", 400)
        elements = list(getattr(section, resource))
        for element in elements:
            if mask is not None and not _trim_resource(element, mask.split(",")):
                paths = "".join(f'paths: "{path}"\n' for path in mask.split(","))
                raise _Refused(f"FieldMask {paths} could not be successfully used.", 400)
        return elements
    raise _Refused(f"{resource} not found in config dump", 404)


def _trim_resource(element: Any, paths: list[str]) -> bool:
    """Apply a mask that may reach into the element's Any (`cluster.name`)."""
    outer: list[str] = []
    inner: list[str] = []
    any_name = ""
    for path in paths:
        first, _, rest = path.partition(".")
        field = element.DESCRIPTOR.fields_by_name.get(first)
        if field is not None and not field.is_repeated and field.message_type is not None and field.message_type.full_name == any_pb2.Any.DESCRIPTOR.full_name:
            any_name = first
            outer.append(first)
            if rest:
                inner.append(rest)
        else:
            outer.append(path)
    if any_name and inner and element.HasField(any_name):
        holder = getattr(element, any_name)
        message = messages.known(holder.TypeName())()
        message.ParseFromString(holder.value)
        if not _trim(message, inner):
            return False
        holder.Pack(message)
    return _trim(element, outer)


def _trim(message: Any, paths: list[str]) -> bool:
    """Keep only `paths`; False (and unchanged) when one of them does not exist."""
    mask = field_mask_pb2.FieldMask(paths=[path for path in paths if path])
    if not mask.IsValidForDescriptor(message.DESCRIPTOR):
        return False
    kept = type(message)()
    mask.MergeMessage(message, kept)
    message.CopyFrom(kept)
    return True
