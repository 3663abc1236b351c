"""Health reports (HDS): what a server that has endpoints checked hears from Envoy and from us."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from meshproxy.api import convert, messages
from tests.differential import proxy
from tests.differential.config import Config
from tests.differential.reports_server import ReportsServer
from tests.differential.xds_rig import Origin, Site, beside, compare, play

_H = "envoy.service.health.v3."
_Specifier = messages.known(f"{_H}HealthCheckSpecifier")
_TLS = "envoy.extensions.transport_sockets.tls.v3."
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
SICK = b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n"


class Checked(Origin):
    """Something to check. `answer`: to whatever comes, or None for silence. `connections`: that were made to it."""

    def __init__(self, name: str, answer: bytes | None) -> None:
        super().__init__(name)
        self.answer = answer
        self.connections = 0
        self.requests: list[bytes] = []
        self.peers: set[str] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.peers.add(writer.get_extra_info("peername")[0])
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while data := await reader.read(65536):
                self.requests.append(data)
                if self.answer is not None:
                    writer.write(self.answer)
        writer.close()


class Health(ReportsServer):
    """A server of health checks, which is healthy itself, or not, as who asks for its health would have it."""

    def __init__(self, site: Site) -> None:
        super().__init__(f"{_H}HealthDiscoveryService", "StreamHealthCheck", f"{_H}HealthCheckRequestOrEndpointHealthResponse")
        self.site = site
        own = grpc.unary_unary_rpc_method_handler(self._check)
        self.handlers.append(grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": own}))

    async def _check(self, request: bytes, context: Any) -> bytes:
        """grpc.health.v1.Health/Check of its own: SERVING or NOT_SERVING."""
        return b"\x08\x01" if request[2:] == b"well" else b"\x08\x02"

    def check(self, *clusters: Config, interval: str | None = "0.05s") -> None:
        """Send a specifier."""
        config = {"cluster_health_checks": list(clusters)} | ({"interval": interval} if interval else {})
        self.say(convert.to_message(self.site.render(config), _Specifier).SerializeToString(deterministic=True))

    async def until_all(self, *wanted: str) -> Any:
        """Wait for a report that begins after now, in which the endpoints are so, in their order; returns it."""
        since = len(self.reports)
        await self.until(lambda: any(statuses(one) == list(wanted) for one in self.reports[since:]))
        return next(one for one in self.reports[since:] if statuses(one) == list(wanted))

    async def another(self) -> Any:
        """The next report."""
        since = len(self.reports)
        await self.until(lambda: len(self.reports) > since)
        return self.reports[since]


def statuses(report: Any) -> list[str]:
    """Of the flat list."""
    found = report.endpoint_health_response.endpoints_health
    return [type(one).DESCRIPTOR.fields_by_name["health_status"].enum_type.values_by_number[one.health_status].name for one in found]


def plain(message: Any) -> Any:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def at(name: str, **fields: Any) -> Config:
    """An Endpoint."""
    return {"address": {"socket_address": {"address": "127.0.0.1", "port_value": f"${{port:{name}}}"}}} | fields


def check(**fields: Any) -> Config:
    """A HealthCheck, as often as it may be: nobody but checks sends anything to these clusters."""
    base = {"timeout": "1s", "interval": "0.05s", "no_traffic_interval": "0.05s", "unhealthy_threshold": 1, "healthy_threshold": 1}
    return base | (fields or {"http_health_check": {"path": "/healthz"}})


def cluster(name: str, *endpoints: Config, checks: list[Config] | None = None, **fields: Any) -> Config:
    """A ClusterHealthCheck."""
    return {"cluster_name": name, "health_checks": checks or [check()], "locality_endpoints": [{"endpoints": list(endpoints)}]} | fields


async def started(site: Site, health: Health, *, kind: str = "GRPC", **origins: bytes | None) -> None:
    for name, answer in origins.items():
        site.origins[name] = Checked(name, answer)
        await site.origins[name].start()
    await health.start()
    site.ports["health"] = health.port
    source, server = health.config("health")
    await site.start({"hds_config": source, "static_resources": {"clusters": [server]}})
    await health.until(lambda: health.first)


def note_first(site: Site, first: Any) -> None:
    request = first.health_check_request
    site.note(request.node.id, request.node.cluster, plain(request.capability), first.WhichOneof("request_type"))


async def well_ill_and_late(site: Site, health: Health) -> None:
    """Two localities; one that answers, one that says no, one that says nothing, one that nobody listens at."""
    await started(site, health, a=OK, b=SICK, c=None, d=OK)
    site.origins["d"].stop()
    note_first(site, health.first[0])
    groups = [{"locality": {"region": "r", "zone": "z2"}, "endpoints": [at("a"), at("b")]}, {"endpoints": [at("c"), at("d")]}]
    health.check(cluster("here", locality_endpoints=groups), cluster("there", at("b")))
    site.note(plain(await health.until_all("HEALTHY", "UNHEALTHY", "TIMEOUT", "UNHEALTHY", "UNHEALTHY")))
    site.note(site.origins["a"].requests[0].decode().lower())
    site.origins["a"].answer, site.origins["b"].answer = SICK, OK
    await health.until_all("UNHEALTHY", "HEALTHY", "TIMEOUT", "UNHEALTHY", "HEALTHY")
    await site.note_stats("hds_delegate.errors", "hds_delegate.requests", "hds_delegate.updates", "cluster.here.health_check.healthy")


async def other_endpoints_and_checks(site: Site, health: Health) -> None:
    """What stays is checked on: over the same connection, and is never ill meanwhile."""
    await started(site, health, a=OK, b=OK, c=OK)
    health.check(cluster("here", at("a"), at("b")))
    await health.until_all("HEALTHY", "HEALTHY")
    since = len(health.reports)
    health.check(cluster("here", at("c"), at("a")))
    await health.until_all("HEALTHY", "HEALTHY")
    site.note(site.origins["a"].connections)
    health.check(cluster("here", at("a"), checks=[check(http_health_check={"path": "/other"})]), cluster("new", at("b")))
    await health.until_all("HEALTHY", "HEALTHY")
    await health.until(lambda: b"/other" in site.origins["a"].requests[-1])
    of_a = {(one.health_status) for report in health.reports[since:] for one in report.endpoint_health_response.endpoints_health
            if one.endpoint.address.socket_address.port_value == site.origins["a"].port}  # fmt: skip
    site.note(sorted(of_a))
    health.check(cluster("new", at("b")))
    health.check(cluster("new", at("b")))
    await health.until_all("HEALTHY")
    health.check()
    site.note(plain(await health.until_all()))
    await site.until("hds_delegate.requests", 6)
    await site.note_stats("hds_delegate.errors", "hds_delegate.requests", "hds_delegate.updates")


async def bytes_on_a_connection(site: Site, health: Health) -> None:
    await started(site, health, a=b"+PONG", b=b"-ERR", c=None)
    tcp = {"send": {"text": b"PING".hex()}, "receive": [{"text": b"PONG".hex()}]}
    health.check(cluster("talks", at("a"), at("b"), checks=[check(tcp_health_check=tcp)]), cluster("connects", at("c"), checks=[check(tcp_health_check={})]))
    await health.until_all("HEALTHY", "TIMEOUT", "HEALTHY")
    site.note(site.origins["a"].requests[0].decode())


async def endpoints_with_something_of_their_own(site: Site, health: Health) -> None:
    await started(site, health, a=OK, b=SICK)
    elsewhere = at("b", health_check_config={"port_value": "${port:a}"})
    unchecked = at("b", health_check_config={"disable_active_health_check": True})
    health.check(cluster("here", elsewhere), cluster("there", at("a", health_check_config={"hostname": "named.test"}), unchecked))
    site.note(plain(await health.until_all("HEALTHY", "HEALTHY")))
    site.note(sorted({request.decode().lower() for request in site.origins["a"].requests}), site.origins["b"].requests)


async def grpc_services(site: Site, health: Health) -> None:
    await started(site, health)
    site.origins["health"] = Checked("health", None)
    site.origins["health"].port = health.port
    health.check(
        cluster("well", at("health"), checks=[check(grpc_health_check={"service_name": "well"})]),
        cluster("ill", at("health"), checks=[check(grpc_health_check={"service_name": "ill"})]),
        cluster("as-http", at("health"), checks=[check(http_health_check=grpc_by_http("well"))]),
        cluster("ill-as-http", at("health"), checks=[check(http_health_check=grpc_by_http("ill"))]),
    )
    await health.until_all("HEALTHY", "UNHEALTHY", "HEALTHY", "UNHEALTHY")
    site.note(statuses(await health.another()))


def grpc_by_http(service: str) -> Config:
    """An HttpHealthCheck that asks a gRPC service: what a server may send to who says that it can do HTTP."""
    asked = bytes((10, len(service))) + service.encode()
    return {
        "path": "/grpc.health.v1.Health/Check",
        "method": "POST",
        "codec_client_type": "HTTP2",
        "request_headers_to_add": [{"header": {"key": key, "value": value}} for key, value in (("content-type", "application/grpc"), ("te", "trailers"))],
        "send": {"text": (bytes((0, 0, 0, 0, len(asked))) + asked).hex()},
        "receive": [{"text": "00000000020801"}],
    }


async def over_tls(site: Site, health: Health) -> None:
    """How endpoints are reached is theirs to say by labels of the checks."""
    await started(site, health, a=OK)
    tls = {"name": "tls", "typed_config": {"@type": f"type.googleapis.com/{_TLS}UpstreamTlsContext", "sni": "checked.test"}}
    matches = [{"name": "secure", "match": {"secure": "yes"}, "transport_socket": tls}]
    plainly = cluster("here", at("a"), transport_socket_matches=matches)
    health.check(plainly)
    await health.until_all("HEALTHY")
    checks = [check(http_health_check={"path": "/"}, transport_socket_match_criteria={"secure": "yes"})]
    health.check(plainly | {"health_checks": checks})
    await health.until_all("UNHEALTHY")
    site.note(any(request.startswith(b"\x16\x03") for request in site.origins["a"].requests))  # a handshake


async def from_an_address(site: Site, health: Health) -> None:
    await started(site, health, a=OK)
    health.check(cluster("here", at("a"), upstream_bind_config={"source_address": {"address": "127.0.0.2", "port_value": 0}}))
    await health.until_all("HEALTHY")
    site.note(sorted(site.origins["a"].peers))


async def thresholds(site: Site, health: Health) -> None:
    """How often endpoints must be ill before they are said to be, and how often well; some answers count at once."""
    await started(site, health, a=OK, b=OK)
    statuses_of = {"expected_statuses": [{"start": 200, "end": 400}], "retriable_statuses": [{"start": 500, "end": 600}]}
    one = check(http_health_check={"path": "/"} | statuses_of) | {"unhealthy_threshold": 3, "healthy_threshold": 2, "reuse_connection": False}
    health.check(cluster("here", at("a"), at("b"), checks=[one]))
    await health.until_all("HEALTHY", "HEALTHY")  # the first one is enough
    counts = {}
    for name, ill, wanted in (("a", SICK, ("UNHEALTHY", "HEALTHY")), ("b", SICK.replace(b"503", b"404"), ("UNHEALTHY", "UNHEALTHY"))):
        origin = site.origins[name]
        origin.answer = ill
        await health.until_all(*wanted)
        counts[name] = origin.connections
    site.note(await site.stat("cluster.here.health_check.healthy"))
    site.origins["a"].answer = site.origins["b"].answer = OK
    await health.until_all("HEALTHY", "HEALTHY")
    site.note(all(site.origins[name].connections >= count + 2 for name, count in counts.items()))
    await site.note_stats("cluster.here.health_check.network_failure", "cluster.here.health_check.passive_failure")


async def specifiers_that_are_none(site: Site, health: Health) -> None:
    """Those that Envoy survives: of the others below."""
    await started(site, health, a=OK)
    health.check(cluster("here", at("a")))
    await health.until_all("HEALTHY")
    bad = [
        cluster("here", {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 77777}}}),
        cluster("here", at("a"), checks=[{"timeout": "1s"}]),
        cluster("here", at("a"), checks=[check() | {"timeout": "0s"}]),
    ]
    for number, one in enumerate(bad):
        health.check(one, interval="0.06s")
        await site.until("hds_delegate.requests", number + 2)
        await site.note_stats("hds_delegate.errors", "hds_delegate.requests", "hds_delegate.updates")
        site.note(statuses(await health.another()))
    health.check(cluster("here", at("a")), cluster("here", at("a"), at("a")), cluster("", at("a")), cluster("", at("a")))
    await health.until_all("HEALTHY", "HEALTHY", "HEALTHY")
    await site.note_stats("hds_delegate.errors", "hds_delegate.requests", "hds_delegate.updates")


async def a_stream_that_ends_is_begun_again(site: Site, health: Health) -> None:
    await started(site, health, a=OK)
    health.check(cluster("here", at("a")))
    await health.until_all("HEALTHY")
    checks = len(site.origins["a"].requests)
    health.say(None)
    await health.until(lambda: len(health.first) == 2)
    note_first(site, health.first[1])
    site.note(len(site.origins["a"].requests) > checks, site.origins["a"].connections)
    health.check(cluster("here", at("a")), interval="0.04s")
    site.note(statuses(await health.another()))
    health.say(grpc.StatusCode.UNAVAILABLE)
    await health.until(lambda: len(health.first) == 3)
    health.check(cluster("here", at("a")), interval="0.04s")  # the same again
    site.note(statuses(await health.another()))
    health.say(b"\xff\xff")
    await health.until(lambda: len(health.first) == 4)
    await site.note_stats("hds_delegate.errors", "hds_delegate.requests", "hds_delegate.updates")


SCENARIOS = [
    well_ill_and_late,
    other_endpoints_and_checks,
    bytes_on_a_connection,
    grpc_services,
    over_tls,
    from_an_address,
    thresholds,
    endpoints_with_something_of_their_own,
    specifiers_that_are_none,
    a_stream_that_ends_is_begun_again,
]


@pytest.mark.differential
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_health_reports(scenario):
    compare(beside(scenario, Health))


WORSE = {
    "a name": cluster("here", {"address": {"socket_address": {"address": "localhost", "port_value": 1}}}),
    "a payload": cluster("here", at("a"), checks=[check(tcp_health_check={"send": {"text": "zz"}})]),
    "a range": cluster("here", at("a"), checks=[check(http_health_check={"path": "/", "expected_statuses": [{"start": 300, "end": 200}]})]),
    "unknown": cluster("here", at("a"), checks=[check(custom_health_check={"name": "redis"})]),
    "a certificate": cluster(
        "here",
        at("a"),
        transport_socket_matches=[
            {
                "name": "x",
                "match": {},
                "transport_socket": {
                    "name": "tls",
                    "typed_config": {
                        "@type": f"type.googleapis.com/{_TLS}UpstreamTlsContext",
                        "common_tls_context": {"validation_context": {"trusted_ca": {"inline_string": "nonsense"}}},
                    },
                },
            }
        ],
    ),
}


def test_specifiers_that_end_envoy():
    """Envoy 1.40 does not survive these, nor groups without endpoints."""

    async def scenario(site: Site, health: Health) -> None:
        await started(site, health, a=OK)
        health.check(cluster("here", at("a")))
        await health.until_all("HEALTHY")
        for number, one in enumerate(WORSE.values(), 1):
            health.check(one)
            await site.until("hds_delegate.errors", number)
            assert statuses(await health.another()) == ["HEALTHY"]
        groups = [{"locality": {"zone": "z"}}, {"endpoints": [at("a", health_check_config={"disable_active_health_check": True})]}]
        health.check(cluster("empty", locality_endpoints=groups))
        report = await health.until_all()
        assert plain(report) == {"endpoint_health_response": {"cluster_endpoints_health": [{"cluster_name": "empty"}]}}
        assert await site.stat("hds_delegate.updates") == "2"

    asyncio.run(play(beside(scenario, Health), proxy.our_command(), "ours"))
