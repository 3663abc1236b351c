"""What gateways listen for and serve: which rules meet on which server, filter chains, virtual hosts, and the secrets that they show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from control.model.gateway import AUTO_PASSTHROUGH, ISTIO_MUTUAL, Gateway, GatewayServer, SecretRef, ServerTls
from control.model.routing import Retries, RouteRules, TcpRoute, TlsRoute
from control.model.secret import CA_SUFFIX, Referent, Secret, is_granted
from control.model.snapshot import Config, Key, is_for, visible
from control.names import host_matches
from control.translate import routes
from control.translate.flow import Way
from control.translate.http_route import Target
from control.translate.listeners import GatewayChain
from control.translate.routes import Caller
from control.translate.secrets import authorities_key
from control.translate.tls import names_of_files


class Serving(NamedTuple):
    """A server of a gateway, as a workload in `namespace` serves it."""

    gateway: Gateway
    server: GatewayServer
    namespace: str
    retries: Retries | None = None

    @property
    def route_name(self) -> str:
        """Its route configuration: all plain servers of a port share one."""
        server = self.server
        suffix = f".{server.bind}" if server.bind else ""
        if server.tls is None:
            return f"http.{server.place[1]}{suffix}"
        return f"https.{server.place[1]}.{server.name}.{self.gateway.name}.{self.gateway.namespace}{suffix}"

    @property
    def is_isolated(self) -> bool:
        """Whether no request of its hosts is another server's business: so it is with listeners of the Gateway API."""
        return not self.gateway.anywhere

    @property
    def caller(self) -> Caller:
        return Caller((self.namespace, (), False, self.gateway.key, self.retries))

    def takes(self, rules: RouteRules) -> bool:
        """Whether rules may say something here."""
        server = self.server
        if not is_for(rules, self.gateway.key) or rules.section not in ("", server.name) or (rules.ports and server.port not in rules.ports):
            return False
        return visible(rules, self.namespace) and (not rules.kind or rules.kind in server.kinds)

    def hosts(self, rules: RouteRules) -> Iterator[str]:
        """The names that the server and the rules have in common."""
        for host in rules.hosts:
            for namespace, pattern in self.server.hosts:
                both = _both(host, pattern)
                if both and namespace in ("*", rules.namespace):
                    yield both


def by_place(config: Config, gateways: tuple[Gateway, ...], namespace: str, *, identity: bool) -> dict[tuple[str, int], list[Serving]]:
    """The servers of each address and port that can be served together. Of those that cannot, the first gateway's counts; those whose certificates are missing
    do not."""
    found: dict[tuple[str, int], list[Serving]] = {}
    for gateway in gateways:
        for server in gateway.servers:
            if server.tls is not None and not has_certificates(config, gateway, server.tls, namespace, identity):
                continue
            there = found.setdefault(server.place, [])
            first = there[0].server if there else server
            plain = server.tls is None
            if (first.tls is None) is plain and (not there or not plain or (first.protocol.is_http and server.protocol.is_http)):
                there.append(Serving(gateway, server, namespace, config.general.retries))
    return {place: servings for place, servings in found.items() if servings}


# --- listeners


def chains(config: Config, servings: list[Serving], targets: Mapping[str, Target], mesh: Iterable[tuple[str, str]] = ()) -> tuple[GatewayChain, ...]:
    """The filter chains of a port; no name leads to two of them, since Envoy would refuse the listener as a whole.

    `mesh`: (host of a service, what callers in the mesh say in their ClientHello) of all that servers with AUTO_PASSTHROUGH pass on.
    """
    made: list[GatewayChain] = []
    taken: set[tuple[str, str]] = set()
    if servings[0].server.tls is None and servings[0].server.protocol.is_http:
        return (GatewayChain(routes=servings[0].route_name),)
    for serving in servings:
        for chain in _chains(config, serving, targets, mesh):
            for left in routes.untaken(TlsRoute((), chain.names or ("",), subnets=chain.subnets), taken):
                made.append(chain._replace(names=() if left.sni_hosts == ("",) else left.sni_hosts, subnets=left.subnets))
    return tuple(made)


def _chains(config: Config, serving: Serving, targets: Mapping[str, Target], mesh: Iterable[tuple[str, str]]) -> Iterator[GatewayChain]:
    server, tls = serving.server, serving.server.tls
    if tls is not None and tls.mode == AUTO_PASSTHROUGH:
        for host, name in mesh:
            if any(_both(host, pattern) == host for _, pattern in server.hosts):
                yield GatewayChain((name,), way=Way(((name, 0),)))
        return
    rules = [one for one in config.route_rules if serving.takes(one) and any(serving.hosts(one))]
    if tls is not None and not tls.is_terminated:
        for one in rules:
            for route in one.tls:
                if routes.concerns(route, server.port, one, serving.caller):
                    names = tuple(both for name in route.sni_hosts for _, pattern in server.hosts if (both := _both(name, pattern)))
                    if names:
                        names = () if "*" in names else tuple(dict.fromkeys(names))
                        yield GatewayChain(names, way=routes.way(route, server.port, targets), subnets=route.subnets)
        return
    names = server.server_names if tls is not None else ()
    secrets = _names(serving)
    if server.protocol.is_http:
        yield GatewayChain(names, tls, secrets, config.security.trust_domains, serving.route_name)
        return
    for plain in _plain_routes(rules, serving):
        way = routes.way(plain, server.port, targets)
        yield GatewayChain(names, tls, secrets, config.security.trust_domains, way=way, subnets=plain.subnets)


def _plain_routes(rules: Iterable[RouteRules], serving: Serving) -> tuple[TcpRoute, ...]:
    """Where connections go whose TLS, if any, has ended here."""
    rules = list(rules)
    found = routes.tcp_routes(rules, serving.server.port, serving.caller)
    if not found and serving.server.tls is not None:
        return tuple(TcpRoute(one.destinations) for some in rules if some.gateway_api for one in some.tls)[:1]
    return found


def mentioned(config: Config, servings: Iterable[Serving]) -> set[str]:
    """All hosts that connections or requests are sent to."""
    return routes.mentioned(one for serving in servings for one in config.route_rules if serving.takes(one))


# --- routes


def hosts(config: Config, servings: Iterable[Serving]) -> dict[str, list[tuple[Serving, RouteRules]]]:
    """What is said about requests, by host: exact names first."""
    found: dict[str, list[tuple[Serving, RouteRules]]] = {}
    servings = list(servings)
    for serving in servings:
        if serving.is_isolated:
            for host in sorted({host for _, host in serving.server.hosts}):
                if any(other.gateway.home == serving.gateway.home and other is not serving for other in servings):
                    found.setdefault(host, [])
        for rules in config.route_rules:
            if rules.http and serving.takes(rules):
                for host in serving.hosts(rules):
                    if serving.is_isolated and not _is_nearest(serving, host, servings):
                        continue
                    entries = found.setdefault(host, [])
                    if not any(one.gateway is serving.gateway and other is rules for one, other in entries):
                        entries.append((serving, rules))
        if serving.server.https_redirect:
            for _, host in serving.server.hosts:
                found.setdefault(host, [])
    return dict(sorted(found.items(), key=lambda item: (_rank(item[0]), item[0])))


def _is_nearest(serving: Serving, host: str, servings: list[Serving]) -> bool:
    """Whether requests to a host, or to hosts of a pattern, are this listener's, and not those of another one of its gateway that names them more exactly."""
    own = min(_rank(pattern) for _, pattern in serving.server.hosts if _both(host, pattern) == host)
    others = (other for other in servings if other.gateway.home == serving.gateway.home and other is not serving)
    return not any(_both(host, pattern) == host and _rank(pattern) < own for other in others for _, pattern in other.server.hosts)


def is_redirected(host: str, servings: Iterable[Serving]) -> bool:
    """Whether plain requests to a host are sent to https."""
    return any(serving.server.https_redirect and any(_both(host, pattern) == host for _, pattern in serving.server.hosts) for serving in servings)


def _rank(host: str) -> tuple[int, int]:
    """Exact names before patterns, longer patterns before shorter ones."""
    return int(host.startswith("*")), -len(host)


def _both(host: str, pattern: str) -> str:
    """What two names or patterns of hosts have in common, "" for nothing."""
    if host_matches(pattern, host) or pattern == host:
        return host
    return pattern if host_matches(host, pattern) else ""


def passed_on(served: Iterable[Gateway]) -> frozenset[str]:
    """The hosts, or patterns of them, whose mutual TLS is passed on as it is."""
    tls = [(server, server.tls) for gateway in served for server in gateway.servers]
    return frozenset(pattern for server, one in tls if one is not None and one.mode == AUTO_PASSTHROUGH for _, pattern in server.hosts)


# --- secrets


def _name(gateway: Gateway, ref: SecretRef) -> str:
    """As Istio calls secrets over SDS."""
    return f"kubernetes-gateway://{ref.namespace}/{ref.name}" if ref.namespace else f"kubernetes://{ref.name}"


def _names(serving: Serving) -> tuple[str, ...]:
    """Of the certificates, and last of the authorities, if clients show theirs."""
    tls = serving.server.tls
    if tls is None or tls.mode == ISTIO_MUTUAL:
        return ()
    if tls.files:
        return names_of_files(tls)
    names = [_name(serving.gateway, ref) for ref in tls.credentials]
    if tls.asks_clients and not tls.bundles:
        names.append(_name(serving.gateway, tls.ca) if tls.ca is not None else names[0] + CA_SUFFIX)
    return tuple(names)


def _key(ref: SecretRef, namespace: str) -> Key:
    return ref.namespace or namespace, ref.name


def has_certificates(config: Config, gateway: Gateway, tls: ServerTls, namespace: str, identity: bool) -> bool:
    """Whether all that a server shows and asks for is there, and may be referred to from where the gateway is."""
    if not tls.is_terminated or tls.files:
        return True
    if tls.mode == ISTIO_MUTUAL:
        return identity
    if not all(_may_show(config, gateway, ref, _key(ref, namespace)) for ref in tls.credentials):
        return False
    if tls.bundles:
        return bool(tls.ca_pem)
    return not tls.asks_clients or _ca_key(config, tls, namespace) is not None


def _ca_key(config: Config, tls: ServerTls, namespace: str) -> Key | None:
    """The Secret that has the authorities of clients."""
    where, name = _key(tls.ca or tls.credentials[0], namespace)
    if tls.ca is None:
        return authorities_key(config, where, name)
    known = config.references.credentials.get((where, name))
    return (where, name) if known is not None and known.is_ca else None


def shown(config: Config, served: Iterable[Gateway]) -> Iterator[tuple[str, Key]]:
    """(name over SDS, Secret) of the certificates that gateways have for services which ask for TLS."""
    for gateway in served:
        ref = gateway.certificate
        if ref is not None and _may_show(config, gateway, ref, _key(ref, gateway.namespace)):
            yield _name(gateway, ref), _key(ref, gateway.namespace)


def _may_show(config: Config, gateway: Gateway, ref: SecretRef, key: Key) -> bool:
    """Whether a Secret has a certificate, and may be referred to from where the gateway is."""
    if ref.namespace and not is_granted(config.references.grants, gateway.referrer, Referent("", "Secret", *key)):
        return False
    known = config.references.credentials.get(key)
    return known is not None and known.is_certificate


def files(servings: Iterable[Serving]) -> Iterator[str]:
    """Names over SDS of all that these servers need of files."""
    for serving in servings:
        if serving.server.tls is not None and serving.server.tls.files:
            yield from _names(serving)


def secrets(config: Config, servings: Iterable[Serving], known: Mapping[Key, Secret]) -> Iterator[tuple[str, Secret, bool]]:
    """(name over SDS, what it is, whether its authorities are meant) of all that these servers need."""
    for serving in servings:
        tls = serving.server.tls
        if tls is None or not tls.is_terminated or tls.mode == ISTIO_MUTUAL or tls.files:
            continue
        names = _names(serving)
        for name, ref in zip(names, tls.credentials, strict=False):
            yield name, known[_key(ref, serving.namespace)], False
        key = _ca_key(config, tls, serving.namespace) if tls.asks_clients and not tls.bundles else None
        if key is not None:
            yield names[-1], known[key], True
