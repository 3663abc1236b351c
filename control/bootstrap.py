"""Bootstraps: how a proxy, or gRPC's own client, finds this control plane."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from control.model.envoy_filter import ANY, GATEWAY, INBOUND, OUTBOUND, PLACES, Patch
from control.model.service import NOWHERE, Locality
from control.model.snapshot import MeshSnapshot
from control.names import LOCAL_CLUSTER, SERVER_LISTENER, is_ip
from control.output import plain
from control.translate import mtls
from control.translate.mtls import SDS_CLUSTER
from control.translate.patches import is_meant, merge
from control.translate.resource import typed
from meshproxy.api import bootstrap as bootstraps
from meshproxy.api import convert, messages
from meshproxy.api.errors import ConfigError
from meshproxy.record import Record

_XDS_CLUSTER = "xds-grpc"
_AUTHORITY_CLUSTER = "authority"
_WORKLOAD_API_CLUSTER = "workload-api"
_WORKLOAD = "meshproxy.identity.v1.Workload"
_UPSTREAM_TLS = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_PATIENCE = "5s"  # a control plane may know nothing of the proxy
_READ_EVERY_S = 5  # certificates in files
_HTTP2 = {_OPTIONS: typed(_OPTIONS, explicit_http_config={"http2_protocol_options": {}})}
_HTTP2_ALIVE = {_OPTIONS: typed(_OPTIONS, explicit_http_config={"http2_protocol_options": {"connection_keepalive": {"interval": "30s", "timeout": "5s"}}})}


def envoy(
    name: str,
    namespace: str,
    servers: Sequence[tuple[str, int]],
    *,
    delta: bool = True,
    admin_port: int = 0,
    sds: str = "",
    secure: Secure | None = None,
    locality: Locality = NOWHERE,
    readiness: bool = False,
    group: Group | None = None,
) -> dict[str, Any]:
    """For Envoy and for our own sidecar: clusters, listeners and load reports by any of `servers`, and with `sds` certificates from an agent's Unix socket.

    `readiness`: it asks the application beside it whether it is ready, and reports that. `locality`: where it is; then it knows who else serves what it serves,
    and in which zones, by which it can keep requests in its own. `group`: it registers itself.
    """
    clusters = [_xds_cluster(servers, secure)]
    place = {part: value for part, value in (("region", locality.region), ("zone", locality.zone), ("sub_zone", locality.sub_zone)) if value}
    if place:
        eds = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": _PATIENCE}
        clusters.append({"name": LOCAL_CLUSTER, "type": "EDS", "connect_timeout": "1s", "eds_cluster_config": {"eds_config": eds}})
    if sds:
        clusters.append(_cluster(SDS_CLUSTER, {"pipe": {"path": sds}}, _HTTP2))
    service: dict[str, Any] = {"envoy_grpc": {"cluster_name": _XDS_CLUSTER}}
    if secure is not None and secure.token:
        service["initial_metadata"] = [{"key": "authorization", "value": f"Bearer {secure.token}"}]
    control_plane = {"transport_api_version": "V3", "grpc_services": [service]}
    return {
        "node": {
            "id": f"{name}.{namespace}",
            "cluster": f"{name}.{namespace}",
            **({"locality": place} if place else {}),
            **({"metadata": group.metadata()} if group is not None else {}),
        },
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin_port}}},
        **({"hds_config": control_plane | {"api_type": "GRPC"}} if readiness else {}),
        "cluster_manager": {"load_stats_config": control_plane | {"api_type": "GRPC"}, **({"local_cluster_name": LOCAL_CLUSTER} if place else {})},
        "dynamic_resources": {
            "ads_config": control_plane | {"api_type": "DELTA_GRPC" if delta else "GRPC", "set_node_on_first_message_only": True},
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {"clusters": clusters},
    }


def _xds_cluster(servers: Sequence[tuple[str, int]], secure: Secure | None) -> dict[str, Any]:
    """All control planes are equal: a proxy takes any, and another one when that is gone."""
    cluster = _cluster(_XDS_CLUSTER, {}, _HTTP2_ALIVE)
    endpoints = [{"endpoint": {"address": _address(*one)}} for one in servers]
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    if not all(is_ip(host) for host, _ in servers):
        cluster["type"] = "STRICT_DNS"
    if secure is not None:
        hosts = list(dict.fromkeys(host for host, _ in servers))
        names = [_name_of(host) for host in hosts]
        if secure.roots:
            common: dict[str, Any] = {"validation_context": {"trusted_ca": {"filename": secure.roots}, "match_typed_subject_alt_names": names}}
        else:
            common = mtls.secrets(names)
        dns = [host for host in hosts if not is_ip(host)]
        cluster["transport_socket"] = _tls({"alpn_protocols": ["h2"], **common}, dns[0] if dns else "")
    return cluster


class Group(Record, frozen=True):
    """The WorkloadGroup that a proxy belongs to, and what it says of itself: where its application is reached, and labels beside those of the group."""

    name: str
    address: str
    labels: Mapping[str, str] = {}

    def metadata(self) -> dict[str, Any]:
        """Of its node, as Istio's agents write it."""
        return {"AUTO_REGISTER_GROUP": self.name, "INSTANCE_IPS": self.address, **({"LABELS": dict(self.labels)} if self.labels else {})}


class Secure(Record, frozen=True):
    """How control planes are reached by TLS: with a certificate of the mesh, or else with `token`, where `roots` (a file) says whom to trust with it."""

    token: str = ""
    roots: str = ""


class Identity(Record, frozen=True):
    """How a sidecar of ours gets its certificate. `authorities`: unix:PATH, or any of some host:port, where `roots` (a file) says whom to trust; at most one of
    the files of tokens is set."""

    authorities: Sequence[str]
    roots: str = ""
    token_file: str = ""
    join_token_file: str = ""


def with_identity(bootstrap: dict[str, Any], identity: Identity) -> dict[str, Any]:
    """The bootstrap of a sidecar of ours that needs no agent. Raises ValueError for an authority that is no address."""
    fields = {name: value for name in ("token_file", "join_token_file") if (value := getattr(identity, name))}
    workload = {"@type": f"type.googleapis.com/{_WORKLOAD}", "authority": _AUTHORITY_CLUSTER, **fields}
    cluster = _cluster(_AUTHORITY_CLUSTER, {}, _HTTP2)
    places = [_place(one) for one in identity.authorities]
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [{"endpoint": {"address": _address(*one)}} for one in places]}]
    hosts = list(dict.fromkeys(host for host, port in places if port))
    if hosts and len(hosts) != len({host for host, _ in places}):
        raise ValueError("an authority is reached by a Unix socket, or by host:port, not both")
    dns = [host for host in hosts if not is_ip(host)]
    cluster["type"] = "STRICT_DNS" if dns else "STATIC"
    if hosts and identity.roots:
        trust = {"trusted_ca": {"filename": identity.roots}, "match_typed_subject_alt_names": [_name_of(host) for host in hosts]}
        cluster["transport_socket"] = _tls({"alpn_protocols": ["h2"], "validation_context": trust}, dns[0] if dns else "")
    return _extended(bootstrap, workload, cluster)


def with_workload_api(bootstrap: dict[str, Any], path: str) -> dict[str, Any]:
    """The bootstrap of a sidecar of ours whose identity is that of a SPIRE agent, on the Unix socket `path`."""
    workload = {"@type": f"type.googleapis.com/{_WORKLOAD}", "workload_api": _WORKLOAD_API_CLUSTER}
    return _extended(bootstrap, workload, _cluster(_WORKLOAD_API_CLUSTER, {"pipe": {"path": path}}, _HTTP2))


def _extended(bootstrap: dict[str, Any], workload: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    static = bootstrap["static_resources"]
    return {
        **bootstrap,
        "bootstrap_extensions": [{"name": "meshproxy.identity", "typed_config": workload}],
        "static_resources": {**static, "clusters": [*static["clusters"], cluster]},
    }


def patches_for(snapshot: MeshSnapshot, name: str, namespace: str) -> tuple[Patch, ...]:
    """What EnvoyFilters say of the bootstrap of a workload, in the order in which that is applied."""
    workload = snapshot.workloads.get((namespace, name))
    labels = workload.labels if workload is not None else {}
    serves = {one.key for one in snapshot.config.gateways if workload is not None and one.is_on(namespace, labels)}
    contexts = (ANY, GATEWAY) if serves else (ANY, INBOUND, OUTBOUND)
    ours = (one for one in snapshot.envoy_filters if one.is_for(namespace, labels, serves, snapshot.config.general.root))
    said = {"NAME": name, "NAMESPACE": namespace}
    return tuple(one for some in ours for one in some.patches if one.place == "BOOTSTRAP" and one.context in contexts and is_meant(one, said))


def with_patches(bootstrap: dict[str, Any], patches: Sequence[Patch]) -> dict[str, Any]:
    """The bootstrap with what EnvoyFilters put into it. Raises ValueError for one that no proxy could use then."""
    if not patches:
        return bootstrap
    made = convert.to_message(bootstrap, messages.known(PLACES["BOOTSTRAP"][0]))
    for patch in patches:
        merge(made, patch.value)
        try:
            bootstraps.check(made)
        except ConfigError as error:
            raise ValueError(f"{patch.where} cannot be put into the bootstrap: {error.problems[0]}") from error
    return dict(_whole(plain(made)))


def _whole(value: Any) -> Any:
    """With numbers as people write them: a Struct has no whole ones, and runtime keys show how they were written."""
    if isinstance(value, dict):
        return {key: _whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _place(text: str) -> tuple[str, int]:
    """Host and port, or path and 0."""
    if text.startswith("unix:"):
        return text.removeprefix("unix:"), 0
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        raise ValueError(f"{text}: unix:PATH or host:port is needed")
    return host, int(port)


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}} if port else {"pipe": {"path": host}}


def _name_of(host: str) -> dict[str, Any]:
    """SubjectAltNameMatcher."""
    return {"san_type": "IP_ADDRESS" if is_ip(host) else "DNS", "matcher": {"exact": host}}


def _tls(common: dict[str, Any], sni: str) -> dict[str, Any]:
    """The transport socket; Envoy says no server name for an address."""
    return {"name": "envoy.transport_sockets.tls", "typed_config": typed(_UPSTREAM_TLS, common_tls_context=common, **({"sni": sni} if sni else {}))}


def _cluster(name: str, address: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": options,
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
    }


def grpc(name: str, namespace: str, servers: Sequence[tuple[str, int]], *, certificates: str = "", tls: bool = False) -> dict[str, Any]:
    """The file that GRPC_XDS_BOOTSTRAP names. A client goes to the first server that answers.

    `certificates`: the folder in which an agent keeps those of the workload, for calls between workloads and, with `tls`, for the control plane (gRFC A65).
    """
    credentials = {"type": "tls", "config": _files(certificates)} if tls else {"type": "insecure"}
    uris = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in servers]
    made = [{"server_uri": uri, "channel_creds": [credentials], "server_features": ["xds_v3"]} for uri in uris]
    found: dict[str, Any] = {
        "xds_servers": made,
        "node": {"id": f"{name}.{namespace}", "metadata": {"GENERATOR": "grpc", "NAME": name, "NAMESPACE": namespace}},
        "server_listener_resource_name_template": SERVER_LISTENER,
    }
    if certificates:
        found["certificate_providers"] = {mtls.PROVIDER: {"plugin_name": "file_watcher", "config": _files(certificates)}}
    return found


def _files(folder: str) -> dict[str, str]:
    """What gRPC's file_watcher wants to know."""
    names = {"certificate_file": "cert-chain.pem", "private_key_file": "key.pem", "ca_certificate_file": "root-cert.pem"}
    return {**{key: os.path.join(os.path.abspath(folder), name) for key, name in names.items()}, "refresh_interval": f"{_READ_EVERY_S}s"}
