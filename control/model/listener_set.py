"""Listeners that others add to a Gateway (the Gateway API's ListenerSet): what a gateway allows, and what of it is served."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from control.model.gateway import Gateway, GatewayServer, Refused, conflict

MARK = "ListenerSet:"  # before their names, which are then no Gateway's


@dataclass(frozen=True, slots=True, eq=False)
class ListenerSet:
    """`parent`: namespace and name of the Gateway. `group`: of the document's kind, by which Secrets of other namespaces are granted to it.

    `refused`: see Gateway; `created`: see RouteRules.
    """

    name: str
    namespace: str
    parent: tuple[str, str]
    servers: tuple[GatewayServer, ...]
    group: str
    kind: str
    refused: tuple[Refused, ...] = ()
    created: str = ""


def key(name: str, namespace: str) -> str:
    """As rules name it, see `Gateway.key`."""
    return f"{namespace}/{MARK}{name}"


def attached(gateways: Iterable[Gateway], sets: Iterable[ListenerSet], namespaces: Mapping[str, Mapping[str, str]]) -> list[Gateway]:
    """The gateways, and after them what is added to them, each set as a gateway of its own that the same workloads serve.

    Sets come in their order. A listener that cannot share its port with those before it is among those that are refused, as all of
    them may be. The same objects for the same.
    """
    made = list(gateways)
    of_api = {(one.namespace, one.name): one for one in made if not one.anywhere}
    taken = {at: list(one.servers) for at, one in of_api.items()}
    for one in sets:
        parent = of_api.get(one.parent)
        if parent is None or not _is_allowed(parent, one, namespaces):
            continue
        before, kept, refused = taken[one.parent], [], list(one.refused)
        for index, server in enumerate(one.servers):
            reason = next(filter(None, (conflict(other, server) for other in before)), "")
            if reason:
                refused.append(Refused(server.name, "Conflicted", reason, f"port {server.port} has a listener that comes first"))
            else:
                kept.append(index)
                before.append(server)
        made.append(_gateway(parent, one, tuple(kept), tuple(refused)))
    return made


def _is_allowed(gateway: Gateway, one: ListenerSet, namespaces: Mapping[str, Mapping[str, str]]) -> bool:
    where, selector = gateway.allowed_sets
    if where == "Selector":
        return selector is not None and selector.chooses(namespaces.get(one.namespace, {}))
    return where == "All" or (where == "Same" and one.namespace == gateway.namespace)


@functools.lru_cache(10_000)
def _gateway(parent: Gateway, one: ListenerSet, kept: tuple[int, ...], refused: tuple[Refused, ...]) -> Gateway:
    servers = [replace(server, tls=parent.asking(server)) for server in (one.servers[index] for index in kept)]
    binds = dict.fromkeys(server.bind for server in parent.servers) or {"": None}
    return Gateway(
        MARK + one.name,
        one.namespace,
        parent.selector,
        tuple(replace(server, bind=bind) for bind in binds for server in servers),
        anywhere=False,
        parent=one.parent,
        group=one.group,
        kind=one.kind,
        refused=refused,
    )
