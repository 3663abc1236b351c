"""Names that the mesh gives to things: Istio's, so that what reads them (tools, dashboards, people) reads ours.

A service is known by its host name, `reviews.default.svc.cluster.local`; its clusters are `outbound|9080||reviews.default.svc.cluster.local`, with the name of
a subset between the last two bars.
"""

from __future__ import annotations

import ipaddress

CLUSTER_DOMAIN = "cluster.local"
_CLAIMS = "@request.auth.claims"
MESH = "mesh"  # stands for all sidecars where documents name gateways
SERVER_LISTENER = "xds.istio.io/grpc/lds/inbound/%s"  # what a gRPC server asks for, by the address on which it listens; Istio's
HTTP_PROXY_ROUTES = "http_proxy"  # the route configuration of listeners that applications use as their HTTP proxy
CAPTURED = "captured.%d"  # the route configuration of requests that are redirected to a sidecar, by their port
BLACK_HOLE = "BlackHoleCluster"
LOCAL_CLUSTER = "local_cluster"  # the proxies of a proxy's own service, as Istio calls it
PASSTHROUGH = "PassthroughCluster"
VIRTUAL_OUTBOUND = "virtualOutbound"  # the listener to which traffic is redirected, as Istio calls it
BLOCK_ALL = "block_all"
ALLOW_ANY = "allow_any"


def service_host(name: str, namespace: str, domain: str = CLUSTER_DOMAIN) -> str:
    """The host name of a Kubernetes Service."""
    return f"{name}.{namespace}.svc.{domain}".lower()


def resolve_host(host: str, namespace: str, domain: str = CLUSTER_DOMAIN) -> str:
    """A host as a document of `namespace` writes it, made whole and in small letters: a name without dots is a Service of the same namespace."""
    return host.lower() if "." in host or host == "*" else service_host(host, namespace, domain)


def short_hosts(host: str, namespace: str, domain: str = CLUSTER_DOMAIN) -> list[str]:
    """The other names under which callers in `namespace` reach a Kubernetes Service: `reviews`, `reviews.default`, `reviews.default.svc`."""
    suffix = f".svc.{domain}"
    if not host.endswith(suffix) or host.startswith("*"):
        return []
    stem = host[: -len(suffix)]
    name, dot, where = stem.partition(".")
    if not dot or "." in where:
        return []
    short = [stem, f"{stem}.svc"]
    return [name, *short] if where == namespace else short


def outbound_cluster(host: str, port: int, subset: str = "") -> str:
    """The cluster of one port of a service, or of a subset of it."""
    return f"outbound|{port}|{subset}|{host}"


def inbound_cluster(port: int) -> str:
    """The cluster by which a sidecar reaches the application beside it."""
    return f"inbound|{port}||"


def host_matches(pattern: str, host: str) -> bool:
    """Whether `pattern`, which may be `*` or start with `*.`, includes `host`."""
    if pattern == "*":
        return True
    if pattern.startswith("*"):
        return host.endswith(pattern[1:]) and host != pattern[1:]
    return pattern == host


def routing_claim(header: str) -> tuple[str, ...]:
    """Which claim of a token a rule's match means by the name of a header, `@request.auth.claims.a.b` or `@request.auth.claims[a][b]`; nothing for a header."""
    prefix, rest = header[: len(_CLAIMS)], header[len(_CLAIMS) :]
    if prefix.lower() != _CLAIMS:
        return ()
    if rest[:1] == "." and len(rest) > 1:
        return tuple(rest[1:].split("."))
    return tuple(rest[1:-1].split("][")) if rest[:1] == "[" and rest[-1:] == "]" and len(rest) > 2 else ()


def is_ip(text: str) -> bool:
    """Whether this is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_local(host: str) -> bool:
    """Whether only processes of this machine reach what listens at a host (or at a Unix socket, `unix:PATH`)."""
    if host.startswith(("unix:", "unix-abstract:")) or host == "localhost":
        return True
    text = host.strip("[]")
    return is_ip(text) and ipaddress.ip_address(text).is_loopback
