"""What each proxy has, as the client status discovery service (CSDS) says it: control plane and `meshctl` need no protocol of their own for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from control.ads.health import URL as HEALTH
from control.ads.health import Health
from control.ads.hub import Connection
from control.ads.loads import URL as LOADS
from control.ads.loads import Loads
from control.ads.session import State, Subscription
from control.translate.resource import ORDER, SECRET, Held
from meshproxy.api import messages
from meshproxy.api.redact import redact

_S = "envoy.service.status.v3."
_CONFIG_STATUS = {State.NOT_SENT: "NOT_SENT", State.SYNCED: "SYNCED", State.STALE: "STALE", State.ERROR: "ERROR"}
# The entry of a type as a whole, where contents are not asked for.
WHOLE = "*"


def client_status(
    connections: Iterable[Connection], matches: Callable[[str], bool], contents: bool, loads: Loads | None = None, health: Health | None = None
) -> Any:
    """ClientStatusResponse of the proxies whose node id `matches`. Without `contents`, one entry for each type that they subscribed to; with it also one for
    what they reported of their load, as a LoadStatsRequest. What they reported of their applications' health is an EndpointHealthResponse."""
    response = messages.known(f"{_S}ClientStatusResponse")()
    for connection in sorted(connections, key=lambda one: one.number):
        node = connection.session.node
        if node is None or not matches(node.id):
            continue
        config = response.config.add(client_scope=f"connection {connection.number}")
        config.node.CopyFrom(node)
        subscriptions = connection.session.subscriptions
        for url in (*ORDER, *(url for url in subscriptions if url not in ORDER)):
            if url in subscriptions:
                _add(config, subscriptions[url], contents)
        for total in loads.of(node.id) if contents and loads is not None else ():
            entry = config.generic_xds_configs.add(type_url=LOADS, name=WHOLE)
            entry.xds_config.Pack(total)
        for stream in health.of(node.id) if health is not None else ():
            if stream.report is not None and stream.report.cluster_endpoints_health:
                entry = config.generic_xds_configs.add(type_url=HEALTH, name=WHOLE)
                entry.xds_config.Pack(stream.report)
    return response


def _add(config: Any, state: Subscription, contents: bool) -> None:
    if not contents:
        _entry(config, state, WHOLE, state.version)
        return
    for part in state.has or ():
        for resource in part.values():
            if state.wants(resource.name) and not (state.returning and isinstance(resource, Held)):
                entry = _entry(config, state, resource.name, resource.version)
                entry.xds_config.ParseFromString(resource.any)
                if state.url == SECRET:  # keys are told to nobody else
                    redact(entry.xds_config)


def _entry(config: Any, state: Subscription, name: str, version: str) -> Any:
    entry = config.generic_xds_configs.add(type_url=state.url, name=name, version_info=version, config_status=_CONFIG_STATUS[state.state])
    if state.refused:
        entry.error_state.details = state.detail
        entry.error_state.version_info = state.sent
    return entry
