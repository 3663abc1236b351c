"""What each proxy is told, made from the templates beside this file: readable on their own, with `$names` for what a run decides."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

import yaml

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Spec:
    """What a proxy shall do. `base` is a template's name without its suffix: minimal, mesh or tcp.

    `hosts` and `prefixes` replace the one route by so many virtual hosts of one route each, or by so many prefix routes in one virtual host. `clusters`
    adds so many clusters of ten endpoints, each with a virtual host that leads to it. `tls` terminates TLS; without `resumption` every handshake is a full one.
    `http2` is for upstream; downstream, both protocols are understood. `upstream_tls` is TLS towards the backend. With `sidecars` 2, a second proxy of the
    same kind stands behind the first, with TLS between them: see `hops`. `meshed`: nothing of this, but two sidecars that a control plane configures.
    """

    base: str = "minimal"
    workers: int = 1
    tls: bool = False
    resumption: bool = True
    hosts: int = 0
    prefixes: int = 0
    clusters: int = 0
    http2: bool = False
    upstream_tls: bool = False
    sidecars: int = 1
    meshed: bool = False

    def hops(self) -> tuple[Spec, ...]:
        """What each of the proxies in a row is told, the client's first."""
        if self.sidecars == 1:
            return (self,)
        return replace(self, sidecars=1, upstream_tls=True), replace(self, sidecars=1, tls=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a proxy runs: its ports, and a folder of its own that also holds cert.pem and key.pem."""

    folder: Path
    port: int
    admin_port: int
    backend_port: int


def envoy(spec: Spec, place: Place) -> str:
    """The bootstrap that Envoy and meshproxy both run, as JSON, which both read faster than YAML."""
    names = {"port": place.port, "admin_port": place.admin_port, "backend_port": place.backend_port}
    bootstrap = yaml.safe_load(Template((HERE / f"{spec.base}.yaml").read_text()).substitute(names))
    resources = bootstrap["static_resources"]
    chain = resources["listeners"][0]["filter_chains"][0]
    if spec.tls:
        chain["transport_socket"] = _tls(spec, place.folder)
    if spec.http2:
        resources["clusters"][0]["typed_extension_protocol_options"] = _HTTP2
    if spec.upstream_tls:
        resources["clusters"][0]["transport_socket"] = _UPSTREAM_TLS
    route_config = chain["filters"][0]["typed_config"].get("route_config", {})
    if spec.hosts:
        route_config["virtual_hosts"] = [_virtual_host(index, f"host-{index}.mesh.test", "backend") for index in range(spec.hosts)]
    if spec.prefixes:
        routes = [{"match": {"prefix": f"/service-{index:05d}/"}, "route": {"cluster": "backend"}} for index in range(spec.prefixes)]
        route_config["virtual_hosts"] = [{"name": "all", "domains": ["*"], "routes": routes}]
    if spec.clusters:
        resources["clusters"] += [_cluster(index) for index in range(spec.clusters)]
        route_config["virtual_hosts"] += [_virtual_host(index, f"service-{index}.mesh.test", f"service-{index}") for index in range(spec.clusters)]
    return json.dumps(bootstrap)


_HTTP2 = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
}
_UPSTREAM_TLS = {
    "name": "envoy.transport_sockets.tls",
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        # Without a maximum, clients go no further than TLS 1.2.
        "common_tls_context": {"alpn_protocols": ["h2"], "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"}},
        "sni": "catalogue.mesh.test",
    },
}


def _tls(spec: Spec, folder: Path) -> dict[str, Any]:
    files = {"certificate_chain": {"filename": f"{folder}/cert.pem"}, "private_key": {"filename": f"{folder}/key.pem"}}
    context: dict[str, Any] = {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"}
    context["common_tls_context"] = {"tls_certificates": [files], "tls_params": {"tls_minimum_protocol_version": "TLSv1_3"}}
    if spec.http2:
        context["common_tls_context"]["alpn_protocols"] = ["h2"]
    if not spec.resumption:
        context |= {"disable_stateless_session_resumption": True, "disable_stateful_session_resumption": True}
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def _virtual_host(index: int, domain: str, cluster: str) -> dict[str, Any]:
    return {"name": f"host-{index}", "domains": [domain], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}]}


def _cluster(index: int) -> dict[str, Any]:
    """One of many services: ten endpoints that nobody asks."""
    addresses = [f"10.{index >> 8}.{index & 255}.{host}" for host in range(1, 11)]
    endpoints = [{"endpoint": {"address": {"socket_address": {"address": address, "port_value": 8080}}}} for address in addresses]
    name = f"service-{index}"
    return {"name": name, "type": "STATIC", "connect_timeout": "1s", "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}}


def nginx(spec: Spec, place: Place) -> str:
    """nginx.conf of a plain reverse proxy."""
    files = f"ssl_certificate {place.folder}/cert.pem; ssl_certificate_key {place.folder}/key.pem; ssl_protocols TLSv1.3;"
    resumption = "" if spec.resumption else " ssl_session_tickets off; ssl_session_cache off;"
    tls = {"tls_listen": " ssl", "tls_lines": files + resumption} if spec.tls else {"tls_listen": "", "tls_lines": ""}
    return _plain("nginx.conf", spec, place, tls)


def haproxy(spec: Spec, place: Place) -> str:
    """haproxy.cfg of a plain reverse proxy."""
    mode = {"mode": "tcp", "http_lines": ""} if spec.base == "tcp" else {"mode": "http", "http_lines": "http-reuse always"}
    bind = f" ssl crt {place.folder}/both.pem ssl-min-ver TLSv1.3" + ("" if spec.resumption else " no-tls-tickets") if spec.tls else ""
    return _plain("haproxy.cfg", spec, place, {**mode, "tls_bind": bind, "session_cache": "20000" if spec.resumption else "0"})


def backend(folder: Path, port: int, body: str, *, http2: bool = False) -> str:
    """nginx.conf of the service behind the proxies; it speaks either HTTP/1.1 or HTTP/2."""
    return Template((HERE / "backend.conf").read_text()).substitute(folder=folder, port=port, body=body, http2=" http2" if http2 else "")


def _plain(name: str, spec: Spec, place: Place, more: dict[str, str]) -> str:
    names = {"folder": place.folder, "port": place.port, "backend_port": place.backend_port, "workers": spec.workers}
    return Template((HERE / name).read_text()).substitute(names, **more)
