"""What differs between what proxies get now and what they would get."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from control.model.registration import Registration
from control.model.security import KeySource
from control.model.service import Workload
from control.model.snapshot import MeshSnapshot, build
from control.model.telemetry import MeshConfig
from control.output import plain
from control.translate import http_proxy
from control.translate.proxy import GRPC, SIDECAR, ProxyKey
from control.translate.resource import CLUSTER, ENDPOINTS, EXTENSION, LISTENER, ORDER, ROUTES, SECRET, VIRTUAL_HOST
from control.translate.translator import Asked, Translator
from control.translate.view import View
from control.up.arrange import Arrangement
from control.up.ports import Ports, Use
from meshproxy.api import messages

TYPES = {
    CLUSTER: "cluster",
    ENDPOINTS: "endpoints",
    LISTENER: "listener",
    ROUTES: "route",
    VIRTUAL_HOST: "virtual host",
    SECRET: "secret",
    EXTENSION: "extension",
}
ADDED, CHANGED, REMOVED = "added", "changed", "removed"


class FieldChange(NamedTuple):
    """A field, by its path; None: it is not there. Lists whose items have names are compared by them."""

    path: str
    before: Any
    after: Any


class Change(NamedTuple):
    """One resource. `fields` are those of a resource that is there before and after; those of secrets are not told."""

    type: str
    name: str
    kind: str
    fields: tuple[FieldChange, ...] = ()


# What a proxy has: type -> name -> (version, the Any's bytes).
Has = Mapping[str, Mapping[str, tuple[str, bytes]]]


class Differ:
    """Compares proxies one after another; what many of them share is compared once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str, str], Change] = {}

    def changes(self, before: Has, after: Has, *, by_name: bool = False) -> list[Change]:
        """By type and name. `by_name`: the proxy asks for resources by their names, so that new ones only come if it asks for them."""
        made = []
        for url in ORDER:
            old, new = before.get(url, {}), after.get(url, {})
            for name in sorted(old.keys() | new.keys()):
                if name not in new:
                    made.append(Change(TYPES[url], name, REMOVED))
                elif name not in old:
                    if not by_name:
                        made.append(Change(TYPES[url], name, ADDED))
                elif old[name][0] != new[name][0]:
                    made.append(self._changed(url, name, old[name], new[name]))
        return made

    def _changed(self, url: str, name: str, old: tuple[str, bytes], new: tuple[str, bytes]) -> Change:
        key = url, name, old[0], new[0]
        found = self._known.get(key)
        if found is None:
            fields = () if url == SECRET else tuple(_fields("", _plain(old[1]), _plain(new[1])))
            found = self._known[key] = Change(TYPES[url], name, CHANGED, fields)
        return found


class _Imagined(Ports):
    """Ports that `meshctl up` would choose: some, the same for the same use."""

    def __init__(self) -> None:
        super().__init__()
        self._imagined: dict[Use, int] = {}

    def take(self, use: Use, host: str) -> int:
        return self._imagined.setdefault(use, len(self._imagined) + 1)


class Snapshots:
    """Snapshots of documents that can be compared: where ports are left open, they are the same ones in all of them."""

    def __init__(self, trust_domain: str, defaults: MeshConfig) -> None:
        self._trust_domain = trust_domain
        self._defaults = defaults
        self._arrange = Arrangement(_Imagined())

    def of(self, objects: Mapping[Any, Any], registered: Iterable[Registration] = (), fetched: Mapping[KeySource, str] | None = None) -> MeshSnapshot:
        """As `meshctl up` would serve it if it has anything to run, as `serve` would if not. `registered`: proxies that say which groups they belong to;
        `fetched`: keys of issuers of tokens."""
        if any(isinstance(one, Workload) and one.run is not None for one in objects.values()):
            objects = self._arrange(objects)
        return build(objects, None, self._trust_domain, self._defaults, registered=tuple(registered), fetched=fetched)


def has_of(view: View) -> Has:
    """What a view gives."""
    return {url: {one.name: (one.version, one.any) for one in view.all(url)} for url in ORDER}


def has_of_status(config: Any) -> Has:
    """What a proxy was told last, as a ClientConfig with contents says."""
    made: dict[str, dict[str, tuple[str, bytes]]] = {}
    for entry in config.generic_xds_configs:
        if entry.type_url in TYPES:
            made.setdefault(entry.type_url, {})[entry.name] = (entry.version_info, entry.xds_config.SerializeToString())
    return made


def asked_of_status(config: Any) -> Asked | None:
    """What a proxy has asked for that is sent no more than that; None of others."""
    names = {entry.name for entry in config.generic_xds_configs if entry.type_url == VIRTUAL_HOST}
    return Asked(frozenset(names - {http_proxy.PREFIX})) if names else None


def proxies_of(*snapshots: MeshSnapshot) -> list[ProxyKey]:
    """The proxies that documents describe: sidecars and gateways. Where there are none, one in each namespace that has services, which any proxy is like."""
    found = {}
    for snapshot in snapshots:
        for (namespace, name), workload in snapshot.workloads.items():
            if workload.sidecar is not None or any(one.is_on(namespace, workload.labels) for one in snapshot.config.gateways):
                found[namespace, name] = ProxyKey(SIDECAR, name, namespace, counts=True)
    if not found:
        found = {
            (one.namespace, ""): ProxyKey(SIDECAR, "any", one.namespace, counts=True) for snapshot in snapshots for one in snapshot.config.services.values()
        }
    return [found[key] for key in sorted(found)]


def compare(before: MeshSnapshot, after: MeshSnapshot, proxies: Iterable[ProxyKey]) -> dict[str, list[Change]]:
    """Proxies -> what changes for them, without those for whom nothing does."""
    differ, old, new = Differ(), Translator(), Translator()
    made = {}
    for proxy in proxies:
        found = differ.changes(has_of(old.view(proxy, before)), has_of(new.view(proxy, after)), by_name=proxy.kind == GRPC)
        if found:
            made[str(proxy)] = found
    return made


def _plain(packed: bytes) -> Any:
    """The JSON form of what is in an Any."""
    found = messages.known("google.protobuf.Any").FromString(packed)
    return plain(messages.known(messages.full_name(found.type_url)).FromString(found.value))


def _fields(path: str, before: Any, after: Any) -> Iterator[FieldChange]:
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from _fields(f"{path}.{name}" if path else name, before.get(name), after.get(name))
    elif isinstance(before, list) and isinstance(after, list):
        old, new = _by_name(before), _by_name(after)
        if old is None or new is None:
            old, new = dict(enumerate(before)), dict(enumerate(after))
        for key in dict.fromkeys((*old, *new)):
            yield from _fields(f"{path}[{key}]", old.get(key), new.get(key))
        if list(old) != list(new) and old.keys() == new.keys():
            yield FieldChange(f"{path}[]", list(old), list(new))  # only their order is another
    else:
        yield FieldChange(path, before, after)


def _by_name(values: list[Any]) -> dict[Any, Any] | None:
    """Items by what identifies them; None when that is not unique."""
    made = {}
    for one in values:
        key = _key(one)
        if key is None or key in made:
            return None
        made[key] = one
    return made


def _key(one: Any) -> str | None:
    if not isinstance(one, dict):
        return None
    if isinstance(one.get("name"), str):
        return str(one["name"])
    address = one.get("endpoint", {}).get("address", {}).get("socket_address") if isinstance(one.get("endpoint"), dict) else None
    if isinstance(address, dict):
        return f"{address.get('address')}:{address.get('port_value')}"
    locality = one.get("locality")
    if "lb_endpoints" in one:
        return "/".join((locality or {}).get(part, "") for part in ("region", "zone", "sub_zone")).rstrip("/") or "anywhere"
    return None
