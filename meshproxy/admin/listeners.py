"""/listeners: the addresses that we listen on, with the ports that the kernel chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.admin.message import JSON, Request, Response, to_json

if TYPE_CHECKING:
    from meshproxy.net.address import Address
    from meshproxy.server import Server


def listeners(request: Request, server: Server) -> Response:
    """Text, or JSON (envoy.admin.v3.Listeners) with `format=json`."""
    active = [listener for listener in server.listeners if not listener.stopped]
    if request.query.get("format") != "json":
        return Response("".join(f"{listener.name}::{address.text}\n" for listener in active for address in listener.addresses))
    statuses = []
    for listener in active:
        status: dict[str, Any] = {"name": listener.name}
        for at, address in enumerate(listener.addresses):
            if at == 0:
                status["local_address"] = address_json(address)
            else:
                status.setdefault("additional_local_addresses", []).append(address_json(address))
        statuses.append(status)
    return Response(to_json({"listener_statuses": statuses} if statuses else {}), content_type=JSON)


def address_json(address: Address) -> dict[str, Any]:
    """An envoy.config.core.v3.Address as JSON."""
    if address.kind == "pipe":
        return {"pipe": {"path": address.path}}
    return {"socket_address": {"address": address.ip, "port_value": address.port}}
