"""Fields that few set: of listeners, listener filters, network filters and tunnels of TCP proxies."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.differential.harness import (
    Case,
    Close,
    Echo,
    Eof,
    HalfClose,
    Head,
    Play,
    Response,
    Rig,
    Tls,
    Until,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    get,
    hcm,
    listener,
)
from tests.differential.wire import Wire

LOG = file_log(
    "%RESPONSE_CODE% chain=%FILTER_CHAIN_NAME% sni=%REQUESTED_SERVER_NAME% remote=%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% "
    "direct=%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT% local=%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% "
    "direct_local=%DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT%\n"
)
TCP_LOG = file_log(
    "tcp flags=%RESPONSE_FLAGS% details=%RESPONSE_CODE_DETAILS% termination=%CONNECTION_TERMINATION_DETAILS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT% "
    "upstream=%UPSTREAM_HOST% cluster=%UPSTREAM_CLUSTER% id=%DYNAMIC_METADATA(envoy.filters.network.tcp_proxy)% "
    "rbac=%DYNAMIC_METADATA(envoy.filters.network.rbac)%\n"
)


def says(name: str) -> dict:
    """A connection manager that answers with a name."""
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": name}}}
    return hcm("chains", [{"name": "all", "domains": ["*"], "routes": [route]}], access_log=[LOG])


def named(name: str, match: dict | None = None, *, tls: bool = False) -> dict:
    """A filter chain that answers with its name."""
    built: dict[str, Any] = {"name": name, "filters": [says(name)]}
    if match:
        built["filter_chain_match"] = match
    if tls:
        certificate = {"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}
        built["transport_socket"] = {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": {"tls_certificates": [certificate]}}}
    return built


def at(address: str, port: int) -> dict:
    return {"socket_address": {"address": address, "port_value": port}}


PROXY = filter_("proxy_protocol", allow_requests_without_proxy_protocol=True)
HEADER = b"PROXY TCP4 10.1.2.3 %s 77 %d\r\n"


def destined(port: int, address: bytes = b"10.9.9.9") -> bytes:
    """A PROXY header that names a destination."""
    return HEADER % (address, port)


# ---- filter_disabled: whether the TLS inspector looks, which the filter chains show
def ports(first: int, end: int) -> dict:
    return {"destination_port_range": {"start": first, "end": end}}


DISABLED = {
    "any": {"any_match": True},
    "not_any": {"not_match": {"any_match": True}},
    "ports": ports(100, 200),
    "not_ports": {"not_match": ports(100, 200)},
    "or": {"or_match": {"rules": [ports(100, 101), ports(199, 200)]}},
    "and": {"and_match": {"rules": [ports(100, 150), ports(140, 200)]}},
    "and_not": {"and_match": {"rules": [ports(100, 200), {"not_match": ports(150, 151)}]}},
}
PORTS = (99, 100, 101, 145, 150, 199, 200)


def inspected(name: str, predicate: dict) -> dict:
    chains = [named("inspected", {"transport_protocol": "tls"}, tls=True), named("blind", tls=True)]
    return listener(name, chains=chains, listener_filters=[PROXY, filter_("tls_inspector") | {"filter_disabled": predicate}])


async def which(rig: Rig, name: str, port: int) -> str:
    """The filter chain that answers to a TLS client whose PROXY header names this port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.proxy.ports[name])
    writer.write(destined(port))
    await writer.start_tls(rig.client_tls(Tls()), server_hostname="a.test")
    writer.write(get())
    head = await reader.readuntil(b"\r\n\r\n")
    answer = await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
    writer.close()
    await writer.wait_closed()
    return answer.decode()


def disabled(name: str) -> Case:
    async def run(rig: Rig) -> Any:
        return {port: await which(rig, f"disabled_{name}", port) for port in PORTS}

    return Case(f"filter_disabled_{name}", run)


# ---- further addresses
async def each_address(rig: Rig) -> Any:
    """What is said on each of a listener's addresses, and what /listeners shows of them."""
    listeners = json.loads((await rig.proxy.admin("GET", "/listeners?format=json"))[1])["listener_statuses"]
    shown = next(one for one in listeners if one["name"] == "addresses")
    found = [address["socket_address"] for address in (shown["local_address"], *shown.get("additional_local_addresses", []))]
    answers = []
    for address in found:
        _, wire = await asyncio.get_running_loop().create_connection(Wire, address["address"], address["port_value"])
        answers.append(await rig.exchange(wire, get()))
        wire.close()
    _, text = await rig.proxy.admin("GET", "/listeners")
    lines = [line for line in text.splitlines() if "addresses::" in line or line.startswith(" ")]
    for number, address in enumerate(found):
        lines = [line.replace(str(address["port_value"]), f"<{number}>") for line in lines]
    return [sorted(shown), [address["address"] for address in found], len({address["port_value"] for address in found}), answers, sorted(lines)]


# ---- network filters
ECHO = Play([[Echo(), Close()]], on_connect=True)
GREET = Play([[b"220 ready\r\n", Until(b"quit"), b"bye", Close()]], on_connect=True)
BUCKET = {"max_tokens": 2, "tokens_per_fill": 2, "fill_interval": "600s"}
EVERYBODY = {"permissions": [{"any": True}], "principals": [{"any": True}]}
NOBODY = {"permissions": [{"any": True}], "principals": [{"direct_remote_ip": {"address_prefix": "10.0.0.0", "prefix_len": 8}}]}


def proxy(name: str, *before: dict, **fields: Any) -> dict:
    return listener(name, *before, filter_("tcp_proxy", stat_prefix=name, access_log=[TCP_LOG], **({"cluster": "a"} | fields)))


def rbac(name: str, policy: dict, **fields: Any) -> dict:
    return filter_("network_rbac", stat_prefix=f"{name}.", rules={"action": "ALLOW", "policies": {"p": policy}}, **fields)


def flag(key: str, *, default: bool = True) -> dict:
    return {"runtime_enabled": {"default_value": default, "runtime_key": key}}


def limited(name: str, **fields: Any) -> dict:
    return proxy(name, filter_("connection_limit", stat_prefix=name, max_connections=1, **fields))


def bucket(name: str, key: str = "", **fields: Any) -> dict:
    return proxy(name, filter_("network_ratelimit", stat_prefix=name, token_bucket=BUCKET, **({"share_key": key} if key else {}), **fields))


def tunnel(name: str, **config: Any) -> dict:
    return proxy(name, tunneling_config={"hostname": "target.test:443", **config})


async def echo(rig: Rig, name: str) -> str:
    wire = await rig.connect(name)
    wire.send(b"ping")
    await wire.until(lambda: b"ping" in wire.buffer)
    return wire.take(len(wire.buffer)).decode() or "closed"


def many(name: str, *listeners: str) -> Case:
    """A connection to each of the listeners, all open at the same time, in order."""

    async def run(rig: Rig) -> list[str]:
        return [await echo(rig, each) for each in listeners]

    return Case(name, run, ECHO, skip=("upstream",))


UUID = {"request_id_extension": {"typed_config": {"@": "uuid_request_id"}}}
SOCKET_OPTION = {"description": "keepalive", "level": 1, "name": 9, "int_value": 1, "state": "STATE_PREBIND"}
CONFIG = bootstrap(
    *(inspected(f"disabled_{name}", predicate) for name, predicate in DISABLED.items()),
    listener("header_unread", says("unread"), listener_filters=[filter_("proxy_protocol") | {"filter_disabled": {"any_match": True}}]),
    listener("addresses", says("addresses"), additional_addresses=[
        {"address": at("127.0.0.1", 0)}, {"address": at("127.0.0.2", 0), "socket_options": {"socket_options": [SOCKET_OPTION]}}]),
    listener("handing_over", says("here"), use_original_dst=True, listener_filters=[PROXY]),
    listener("not_handing_over", says("here"), listener_filters=[PROXY]),
    listener("unbound", says("unbound"), address=at("10.9.9.9", 80), bind_to_port=False),
    listener("unbound_everywhere", says("unbound everywhere"), address=at("0.0.0.0", 81), bind_to_port=False),
    listener("unbound_v1", says("unbound v1"), address=at("10.9.9.9", 82), deprecated_v1={"bind_to_port": False}),
    listener("modify_only", says("modify only"), drain_type="MODIFY_ONLY"),
    listener("drained", says("drained"), drain_type="DEFAULT"),
    listener("of_the_kernel", says("of the kernel"), tcp_backlog_size=7, tcp_fast_open_queue_length=5, enable_reuse_port=False,
             max_connections_to_accept_per_socket_event=1, ignore_global_conn_limit=True, bypass_overload_manager=True,
             socket_options=[SOCKET_OPTION, {"level": 1, "name": 9, "buf_value": "AQAAAA==", "state": "STATE_LISTENING"}]),
    listener("use_proxy_proto", chains=[named("from a header") | {"use_proxy_proto": True}]),
    limited("limit_off", **flag("off")),
    limited("limit_on", **flag("on", default=False)),
    limited("limit_default_off", **flag("unset", default=False)),
    bucket("rate_shared_1", "shared"), bucket("rate_shared_2", "shared"), bucket("rate_alone", "alone"), bucket("rate_none"),
    bucket("rate_off", **flag("off")), bucket("rate_on", **flag("on", default=False)), bucket("rate_default_off", **flag("unset", default=False)),
    *(proxy(f"rbac_{'allowed' if policy is EVERYBODY else 'refused'}_{kind.lower()}", rbac(f"r_{kind.lower()}", policy, enforcement_type=kind))
      for kind in ("ONE_TIME_ON_FIRST_BYTE", "CONTINUOUS") for policy in (EVERYBODY, NOBODY)),
    proxy("rbac_shadow_continuous", filter_("network_rbac", stat_prefix="shadowed.", enforcement_type="CONTINUOUS", shadow_rules_stat_prefix="deep_",
                                            shadow_rules={"action": "DENY", "policies": {"p": EVERYBODY}})),
    *(proxy(f"jitter_{value}", max_downstream_connection_duration="0.3s", max_downstream_connection_duration_jitter_percentage={"value": value})
      for value in (0, 100)),
    tunnel("id_header", request_id_header="x-tunnel-id", **UUID),
    tunnel("id_key", request_id_metadata_key="tunnel", **UUID),
    tunnel("id_both", request_id_header="x-Tunnel", request_id_metadata_key="tunnel", **UUID),
    tunnel("id_names_alone", request_id_header="x-tunnel-id", request_id_metadata_key="tunnel"),
    clusters=[cluster("a")],
    layered_runtime={"layers": [{"name": "s", "static_layer": {"off": False, "on": True}}]},
)  # fmt: skip


def handed(on: str, name: str, header: bytes) -> Case:
    return Case(f"{on}_{name}", [header + get(), Response()], on=on, then="leave")


def tcp(name: str, steps: list, on: str, up: Play = ECHO, **fields: Any) -> Case:
    return Case(name, steps, up, on=on, then="closed", **fields)


TALK = [b"hello", Until(b"hello"), b"again", Until(b"again"), Close()]
TUNNEL = Play([[Head(), b"HTTP/1.1 200 OK\r\n\r\n", Until(b"hello"), b"hello", Eof(), Close()]])
CASES = [
    *(disabled(name) for name in DISABLED),
    Case("filter_disabled_proxy_protocol", [destined(80) + get(), Response()], on="header_unread", then="closed"),
    Case("filter_disabled_proxy_protocol_no_header", get(), on="header_unread"),
    Case("additional_addresses", each_address),
    *(handed(on, name, header) for on in ("handing_over", "not_handing_over") for name, header in {
        "none": b"", "of_a_listener": destined(80), "of_another": destined(81), "any_address": destined(81, b"10.8.8.8"), "v1": destined(82),
        "of_none": destined(83), "other_address": destined(80, b"10.8.8.8")}.items()),
    *(Case(on, get(), on=on) for on in ("modify_only", "drained", "of_the_kernel")),
    Case("use_proxy_proto", [destined(80) + get(), Response()], on="use_proxy_proto", then="leave"),
    Case("use_proxy_proto_without", [get(), Response()], on="use_proxy_proto", then="leave"),
    *(many(on, on, on) for on in ("limit_off", "limit_on", "limit_default_off")),
    many("rate_shared", "rate_shared_1", "rate_shared_2", "rate_shared_1", "rate_shared_2", "rate_alone"),
    *(many(on, on, on, on) for on in ("rate_alone", "rate_none", "rate_off", "rate_on", "rate_default_off")),
    tcp("rbac_allowed_one_time_on_first_byte", TALK, "rbac_allowed_one_time_on_first_byte"),
    *(tcp(f"rbac_refused_{kind}", [Until(b"ready\r\n"), b"hello"], f"rbac_refused_{kind}", GREET) for kind in ("one_time_on_first_byte", "continuous")),
    # Envoy counts whatever is read of such a connection; we decide once, see meshproxy/tcp/filters/rbac.py.
    tcp("rbac_allowed_continuous", TALK, "rbac_allowed_continuous", skip_stats=("rbac.allowed",)),
    tcp("rbac_server_first_continuous", [Until(b"ready\r\n"), b"quit", Until(b"bye")], "rbac_allowed_continuous", GREET, skip_stats=("rbac.allowed",)),
    tcp("rbac_shadow_continuous", TALK, "rbac_shadow_continuous", skip_stats=("rbac.deep_",)),
    tcp("rbac_half_close_continuous", [b"x", HalfClose(), Until(b"x")], "rbac_allowed_continuous", skip_stats=("rbac.allowed",)),
    *(tcp(f"jitter_{value}", [b"hello", Until(b"hello")], f"jitter_{value}") for value in (0, 100)),
    *(tcp(on, [b"hello", Until(b"hello"), Close()], on, TUNNEL) for on in ("id_header", "id_key", "id_both", "id_names_alone")),
]  # fmt: skip

test_case = check_cases(CASES)
