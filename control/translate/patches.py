"""EnvoyFilters: patches put to resources that are made already.

Order, as in Istio: a listener as a whole, its filter chains, their filters, the HTTP filters; a route configuration, its virtual hosts, their routes; within
each by priority. A patch after which a resource would be refused by every Envoy is left out for that resource, with a warning: what is right must not go
with it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from control.model.envoy_filter import ANY, GATEWAY, INBOUND, OUTBOUND, Patch, PatchMatch
from control.translate import tokens
from control.translate.resource import CLUSTER, EXTENSION, LISTENER, ROUTES, Resource
from meshproxy.api import messages, support
from meshproxy.api.errors import INVALID
from meshproxy.api.regex import compile_captures

_log = logging.getLogger("meshctl")
_MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_PLACES = {
    CLUSTER: ("CLUSTER",),
    EXTENSION: ("EXTENSION_CONFIG",),
    LISTENER: ("LISTENER", "LISTENER_FILTER", "FILTER_CHAIN", "NETWORK_FILTER", "HTTP_FILTER", "ROUTE_CONFIGURATION", "VIRTUAL_HOST", "HTTP_ROUTE"),
    ROUTES: ("ROUTE_CONFIGURATION", "VIRTUAL_HOST", "HTTP_ROUTE"),
}
# Behind which filters those of a class are added; those of STATS are behind all but the router.
_BEHIND = {"AUTHN": (tokens.NAME,), "AUTHZ": (tokens.NAME, "envoy.filters.http.rbac.")}
_INBOUND = 1  # envoy.config.core.v3.TrafficDirection
_PREDEFINED = (
    "Duration",
    "Any",
    "BoolValue",
    "UInt32Value",
    "UInt64Value",
    "DoubleValue",
    "StringValue",
    "BytesValue",
    "FloatValue",
    "Int32Value",
    "Int64Value",
)


class Proxy(NamedTuple):
    """What patches may depend on. `role`: GATEWAY for one that serves gateways, else OUTBOUND. `ports`: where it listens, and the port meant by it.

    `edges`: names of listeners of gateways.
    """

    role: str
    ports: tuple[tuple[int, int], ...]
    edges: tuple[str, ...] = ()

    def meant(self, port: int) -> set[int]:
        return {port} | {meant for listen, meant in self.ports if listen == port}


def concerned(url: str, patches: Iterable[Patch]) -> tuple[Patch, ...]:
    """Those that may change resources of a type, in the order in which they are applied."""
    patches = tuple(patches)
    return tuple(patch for place in _PLACES.get(url, ()) for patch in patches if patch.place == place)


def is_meant(patch: Patch, said: Mapping[str, str]) -> bool:
    """Whether a patch is for a proxy whose node has this metadata."""
    if patch.version and not _has_version(patch.version, said.get("ISTIO_VERSION", "")):
        return False
    return all(said.get(key) == value for key, value in patch.metadata)


@functools.lru_cache(1000)
def _has_version(pattern: str, version: str) -> bool:
    """As Istio: who does not say its version has none of any pattern."""
    return bool(version) and compile_captures(f"(?s:.*)(?:{pattern})(?s:.*)")[0](version.encode()) is not None


def added(url: str, patches: Iterable[Patch], proxy: Proxy) -> Iterator[Resource]:
    """The resources that patches bring themselves."""
    for patch in patches:
        if patch.operation == "ADD" and patch.place in ("CLUSTER", "LISTENER", "EXTENSION_CONFIG") and patch.context in (ANY, proxy.role, _other(proxy.role)):
            yield Resource(url, patch.value.name, patch.value.SerializeToString(deterministic=True))


def _other(role: str) -> str:
    """A sidecar has inbound and outbound resources, a gateway only its own."""
    return INBOUND if role == OUTBOUND else GATEWAY


class _Gone(Exception):
    """A patch has removed the resource."""


class _Unfit(Exception):
    """A patch would spoil the resource; the text says how."""


def patched(url: str, resource: Resource, patches: Iterable[Patch], proxy: Proxy) -> tuple[Resource, ...]:
    """The resource with all patches: the same object when none changes it, nothing when one removes it."""
    context = _context(url, resource, proxy)
    before = message = resource.message
    for patch in patches:
        if patch.context not in (ANY, context):
            continue
        candidate = type(message)()
        candidate.CopyFrom(message)
        try:
            _APPLY[url](candidate, patch, context, proxy)
            if candidate == message:
                continue
            _check(url, candidate, message)
        except _Gone:
            return ()
        except _Unfit as error:
            _log.warning("%s is not applied to %s: %s", patch.where, resource.name, error)
            continue
        message = candidate
    return (resource,) if message is before else (Resource(url, resource.name, message.SerializeToString(deterministic=True)),)


def _check(url: str, message: Any, before: Any) -> None:
    if message.name != before.name:
        raise _Unfit("it would have another name")
    if url == LISTENER:
        _no_two((chain.filter_chain_match.SerializeToString(deterministic=True) for chain in message.filter_chains), "filter chains for the same connections")
    elif url == ROUTES:
        _no_two((domain.lower() for host in message.virtual_hosts for domain in host.domains), "virtual hosts for the same domain")
    problems = [problem for problem in support.check(message, "warn")[0] if problem.kind == INVALID]
    if problems:
        raise _Unfit(str(problems[0]))


def _no_two(keys: Iterable[Any], what: str) -> None:
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            raise _Unfit(f"there would be two {what}")
        seen.add(key)


def _context(url: str, resource: Resource, proxy: Proxy) -> str:
    name = resource.name
    if url == LISTENER:
        return INBOUND if resource.message.traffic_direction == _INBOUND else GATEWAY if name in proxy.edges else OUTBOUND
    if url == ROUTES:
        return GATEWAY if name.startswith(("http.", "https.")) else OUTBOUND
    return INBOUND if name.startswith("inbound|") else proxy.role


# --- clusters


def _cluster(message: Any, patch: Patch, context: str, proxy: Proxy) -> None:
    match = patch.match
    parts = message.name.split("|")
    port, subset, host = (int(parts[1] or 0), parts[2], parts[3]) if len(parts) == 4 and parts[1].isdigit() else (0, "", "")
    if match.name not in ("", message.name) or match.port not in (0, port) or match.service not in ("", host) or match.subset not in ("", subset):
        return
    _edit(message, patch)


def _edit(message: Any, patch: Patch) -> None:
    if patch.operation == "REMOVE":
        raise _Gone
    if patch.operation == "MERGE":
        merge(message, patch.value)


# --- listeners


def _listener(message: Any, patch: Patch, context: str, proxy: Proxy) -> None:
    match = patch.match
    if patch.place in _PLACES[ROUTES]:
        if context == INBOUND:
            _inline_routes(message, patch, proxy)
        return
    meant = proxy.meant(message.address.socket_address.port_value)
    if match.name not in ("", message.name) or any(port and port not in meant for port in (match.port, match.destination_port)):
        return  # every port has a listener of its own, so that it is the port of all of its filter chains
    if patch.place == "LISTENER":
        if not match.filter or any(_has(chain, match) for chain in message.filter_chains):
            _edit(message, patch)
        return
    if patch.place == "LISTENER_FILTER":
        _edit_list(message.listener_filters, patch, lambda one: _named(one.name, match.listener_filter), anywhere=not match.listener_filter)
        return
    if patch.place == "FILTER_CHAIN":
        _edit_list(message.filter_chains, patch, lambda chain: _chain_matches(chain, match) and _has(chain, match))
        if not message.filter_chains:
            raise _Gone
        return
    for chain in message.filter_chains:
        if _chain_matches(chain, match):
            if patch.place == "NETWORK_FILTER":
                last = chain.filters[-1].name if chain.filters else ""
                _edit_list(chain.filters, patch, lambda one: _named(one.name, match.filter), anywhere=not match.filter, last=last)
            else:
                _http_filters(chain, patch)


def _has(chain: Any, match: PatchMatch) -> bool:
    return not match.filter or any(_named(one.name, match.filter) for one in chain.filters)


def _named(name: str, wanted: str) -> bool:
    return bool(wanted) and name == wanted


def _chain_matches(chain: Any, match: PatchMatch) -> bool:
    said = chain.filter_chain_match
    return (
        match.chain in ("", chain.name)
        and (not match.sni or match.sni in said.server_names)
        and match.transport_protocol in ("", said.transport_protocol)
        and (not match.application_protocols or all(one.strip() in said.application_protocols for one in match.application_protocols.split(",")))
    )


def _http_filters(chain: Any, patch: Patch) -> None:
    match = patch.match
    for manager, keep in _managers(chain):
        if match.filter not in ("", manager[0]):
            continue
        filters = manager[1].http_filters
        last = filters[-1].name if filters else ""
        behind = _BEHIND.get(patch.filter_class)
        place = None if behind is None else 1 + max((index for index, one in enumerate(filters) if one.name.startswith(behind)), default=-1)
        _edit_list(filters, patch, lambda one: _named(one.name, match.sub_filter), anywhere=not match.sub_filter, last=last, place=place)
        keep()


def _managers(chain: Any) -> Iterator[tuple[tuple[str, Any], Callable[[], None]]]:
    """((name, connection manager), what puts it back) of a filter chain."""
    for one in chain.filters:
        if messages.full_name(one.typed_config.type_url) == _MANAGER:
            manager = messages.known(_MANAGER).FromString(one.typed_config.value)

            def keep(one: Any = one, manager: Any = manager) -> None:
                one.typed_config.value = manager.SerializeToString(deterministic=True)

            yield (one.name, manager), keep


def _inline_routes(message: Any, patch: Patch, proxy: Proxy) -> None:
    ports = proxy.meant(message.address.socket_address.port_value)
    for chain in message.filter_chains:
        for (_, manager), keep in _managers(chain):
            if manager.HasField("route_config"):
                _route_configuration(manager.route_config, patch, ports)
                keep()


# --- routes


def _routes(message: Any, patch: Patch, context: str, proxy: Proxy) -> None:
    digits = message.name.split(".")[1] if context == GATEWAY else message.name.rpartition(":")[2]
    _route_configuration(message, patch, {int(digits)} if digits.isdigit() else set())


def _route_configuration(message: Any, patch: Patch, ports: set[int]) -> None:
    match = patch.match
    if match.name not in ("", message.name) or (match.port and match.port not in ports):
        return
    if (match.gateway or match.port_name) and not _is_of_gateway(message.name, match):
        return
    if patch.place == "ROUTE_CONFIGURATION":
        _edit(message, patch)
        return
    if patch.place == "VIRTUAL_HOST":
        _edit_list(message.virtual_hosts, patch, lambda host: _host_matches(host, match))
        return
    for host in message.virtual_hosts:
        if _host_matches(host, match):
            anywhere = not match.route and not match.action
            _edit_list(host.routes, patch, lambda route: _route_matches(route, match), anywhere=anywhere)


def _is_of_gateway(name: str, match: PatchMatch) -> bool:
    """Whether a route configuration is that of one server of one gateway, as its name says. Servers without TLS share theirs: it is of none of them."""
    parts = name.split(".")
    if parts[0] != "https" or len(parts) < 5:
        return False
    return match.gateway in ("", f"{parts[4]}/{parts[3]}") and match.port_name in ("", parts[2])


def _host_matches(host: Any, match: PatchMatch) -> bool:
    return match.virtual_host in ("", host.name) and (not match.domain or match.domain in host.domains)


def _route_matches(route: Any, match: PatchMatch) -> bool:
    return match.route in ("", route.name) and match.action in ("", (route.WhichOneof("action") or "").upper())


# --- lists


def _edit_list(items: Any, patch: Patch, matches: Callable[[Any], bool], *, anywhere: bool = False, last: str = "", place: int | None = None) -> None:
    """One operation on a repeated field. `anywhere`: the patch names no item. `last`: the name of what must stay at the end. `place`: where ADD puts it."""
    operation, value = patch.operation, patch.value
    found = [index for index, item in enumerate(items) if matches(item)]
    made = list(items)
    if operation == "MERGE":
        for index in range(len(made)) if anywhere else found:
            if not anywhere or not value.name or value.name == made[index].name or patch.place == "HTTP_ROUTE":
                merge(made[index], value)
    elif operation == "REMOVE":
        made = [] if anywhere else [item for index, item in enumerate(made) if index not in found]
    elif operation == "REPLACE":
        for index in found:
            made[index] = value
    elif operation == "ADD":
        made.insert(place if place is not None else len(made) - 1 if last else len(made), value)
    elif operation == "INSERT_FIRST" or (operation == "INSERT_BEFORE" and anywhere):
        made.insert(0, value)
    elif operation == "INSERT_AFTER" and anywhere:
        made.insert(len(made) - 1 if last else len(made), value)
    elif found:
        made.insert(found[0] + (operation == "INSERT_AFTER"), value)
    if last and (not made or made[-1].name != last):
        raise _Unfit(f"{last} must stay, and stay the last")
    if len({item.name for item in made}) < len(made) and patch.place == "VIRTUAL_HOST":
        raise _Unfit("there would be two of a name")
    copies = [type(item).FromString(item.SerializeToString()) for item in made]
    del items[:]
    items.extend(copies)


# --- merging


def merge(into: Any, value: Any) -> None:
    """As Istio does: lists grow, maps and messages are merged, what is inside of an Any too if it is of the same type."""
    for field, new in value.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _merge_map(getattr(into, field.name), new, field.message_type.fields_by_name["value"].message_type is not None)
        elif field.is_repeated:
            getattr(into, field.name).extend(new)
        elif field.message_type is None:
            setattr(into, field.name, new)
        else:
            _merge_message(getattr(into, field.name), new)


def _merge_map(into: Any, new: Any, is_message: bool) -> None:
    for key, value in new.items():
        if not is_message:
            into[key] = value
        elif key in into:
            _merge_message(into[key], value)
        else:
            into[key].CopyFrom(value)


def _merge_message(into: Any, new: Any) -> None:
    kind = new.DESCRIPTOR
    if kind.full_name == "google.protobuf.Any" and messages.full_name(into.type_url) == messages.full_name(new.type_url):
        cls = messages.known(messages.full_name(new.type_url))
        inner = cls.FromString(into.value)
        merge(inner, cls.FromString(new.value))
        into.value = inner.SerializeToString(deterministic=True)
    elif kind.full_name.startswith("google.protobuf.") and (kind.name in _PREDEFINED or kind.name in ("Value", "ListValue")):
        into.CopyFrom(new)
    else:
        into.SetInParent()
        merge(into, new)


_APPLY: dict[str, Callable[[Any, Patch, str, Proxy], None]] = {CLUSTER: _cluster, LISTENER: _listener, ROUTES: _routes}
