"""/v3/discovery:client_status: what became of each resource that is subscribed to, as envoy.service.status.v3 says it (CSDS, in the JSON of its HTTP binding).

By POST with a ClientStatusRequest, or by GET, which is one without fields. Of clusters and listeners there is an entry for each that came; of other types, one
for each that was asked for, whether it came or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.admin.message import JSON, PLAIN, Request, Response, message_to_json
from meshproxy.api import convert, messages
from meshproxy.api.errors import ConfigError
from meshproxy.api.redact import redact
from meshproxy.record import Record

if TYPE_CHECKING:
    from meshproxy.server import Server

_S = "envoy.service.status.v3."
_CONFIG = "type.googleapis.com/envoy.config."
_CLUSTER, _LISTENER = f"{_CONFIG}cluster.v3.Cluster", f"{_CONFIG}listener.v3.Listener"
_REQUESTED, _DOES_NOT_EXIST, _ACKED, _NACKED, _TIMEOUT = 1, 2, 3, 4, 6  # envoy.admin.v3.ClientResourceStatus
_ALL = "*"  # what is asked for by who wants all


class _Entry(Record):
    """`updated`: Unix time, 0.0 for never."""

    url: str
    name: str
    status: int
    version: str = ""
    updated: float = 0.0


def client_status(request: Request, server: Server) -> Response:
    """The answer to a ClientStatusRequest."""
    asked = messages.known(f"{_S}ClientStatusRequest")()
    if request.body:
        import json

        try:
            asked = convert.to_message(json.loads(request.body), type(asked))
        except (ValueError, ConfigError) as error:
            return Response(f"not a ClientStatusRequest: {error}\n", 400, PLAIN)
    if asked.node_matchers:
        return Response("node_matchers: there is one node here, and no choice\n", 400, PLAIN)
    answer = messages.known(f"{_S}ClientStatusResponse")()
    config = answer.config.add()
    config.node.CopyFrom(server.node)
    if server.dynamic is not None:
        contents = {} if asked.exclude_resource_contents else _contents(server)
        refusals = {(one.type.url, name): refused for one in server.dynamic.subscriptions for name, refused in one.refusals.items()}
        for entry in sorted(_entries(server, refusals), key=lambda entry: (entry.url, entry.name)):
            _put(config.generic_xds_configs.add(), entry, refusals.get((entry.url, entry.name)), contents)
    redact(answer)
    return Response(message_to_json(answer), content_type=JSON)


def _entries(server: Server, refusals: dict[tuple[str, str], Any]) -> Iterator[_Entry]:
    """Each resource once, however many subscribe to it."""
    found: dict[tuple[str, str], _Entry] = {}

    def add(entry: _Entry) -> None:
        key = entry.url, entry.name
        if entry.status == _ACKED or key not in found:
            found[key] = entry

    dynamic = server.dynamic
    if dynamic.clusters is not None:
        for one in (*dynamic.clusters.active.values(), *dynamic.clusters.warming.values()):
            add(_Entry(_CLUSTER, one.name, _ACKED, one.version, one.updated))
    if dynamic.listeners is not None:
        for one in (*(each for each in server.listeners if each.via_api), *server.listeners_manager.warming.values()):
            add(_Entry(_LISTENER, one.name, _ACKED, one.version, one.updated))
    for routes in dynamic.routes:
        for name in routes.hosts.hosts if routes.hosts is not None else ():
            add(_Entry(f"{_CONFIG}route.v3.VirtualHost", name, _ACKED, routes.version, routes.updated_at))
    for one in dynamic.subscriptions:
        if one.name != _ALL:
            status = _status(one)
            add(_Entry(one.type.url, one.name, status, *((one.version, one.updated) if status == _ACKED else ())))
    for url, name in refusals:
        add(_Entry(url, name, _NACKED))
    return iter(found.values())


def _status(one: Any) -> int:
    """Of a subscription to one resource."""
    if one.absent:
        return _DOES_NOT_EXIST
    if one.updated:
        return _ACKED
    return _TIMEOUT if one.timed_out else _REQUESTED


def _put(config: Any, entry: _Entry, refused: Any, contents: dict[tuple[str, str], bytes]) -> None:
    """Fill in a GenericXdsConfig."""
    config.type_url, config.name, config.version_info = entry.url, entry.name, entry.version
    config.client_status = _NACKED if refused is not None else entry.status
    if entry.updated:
        config.last_updated.FromMilliseconds(int(entry.updated * 1000))
    if refused is not None:
        config.error_state.details, config.error_state.version_info = refused.details, refused.version
        config.error_state.last_update_attempt.FromMilliseconds(int(refused.when * 1000))
    serialised = contents.get((entry.url, entry.name))
    if serialised is not None and entry.updated:
        config.xds_config.type_url, config.xds_config.value = entry.url, serialised


def _contents(server: Server) -> dict[tuple[str, str], bytes]:
    """What is in use, serialised: type URL and name -> resource. What warms comes after what is active, and is newer."""
    dynamic = server.dynamic
    found = {}
    if dynamic.clusters is not None:
        for one in (*dynamic.clusters.active.values(), *dynamic.clusters.warming.values()):
            found[_CLUSTER, one.name] = one.serialised
    for one in (*(each for each in server.listeners if each.via_api), *server.listeners_manager.warming.values()):
        found[_LISTENER, one.name] = one.serialised
    for one in (*dynamic.routes, *dynamic.secrets):
        if one.serialised:
            found[one.subscription.type.url, one.name] = one.serialised
    for one in dynamic.extensions:
        if one.proto is not None:
            found[one.subscription.type.url, one.name] = one.proto.SerializeToString(deterministic=True)
    for assignment, _ in server.clusters.load_assignments():
        found[f"{_CONFIG}endpoint.v3.ClusterLoadAssignment", assignment.cluster_name] = assignment.SerializeToString(deterministic=True)
    return found
