"""Load reports (LRS): what a server of them hears from Envoy and from us."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from google.protobuf import json_format

from meshproxy.api import messages
from tests.differential import proxy
from tests.differential.config import Config
from tests.differential.reports_server import ReportsServer
from tests.differential.xds_rig import Origin, Site, beside, compare, goes_to, http_listener, play, static
from tests.differential.xds_server import ControlPlane

_L = "envoy.service.load_stats.v3."
_Response = messages.known(f"{_L}LoadStatsResponse")
INTERVAL_MS = 100


class Loads(ReportsServer):
    """A server of load reports."""

    def __init__(self) -> None:
        super().__init__(f"{_L}LoadReportingService", "StreamLoadStats", f"{_L}LoadStatsRequest")

    def ask(self, *clusters: str, **fields: Any) -> None:
        """Ask for reports of these."""
        answer = _Response(clusters=clusters, **fields)
        answer.load_reporting_interval.FromMilliseconds(INTERVAL_MS)
        self.say(answer.SerializeToString())

    async def a_period(self) -> None:
        """Wait until something was reported, and once more: what happens from now on is counted, what happened before is not."""
        count = len(self.reports)
        await self.until(lambda: len(self.reports) >= count + 2)

    def issued(self, cluster: str, since: int = 0) -> int:
        """Requests reported."""
        found = [stats for report in self.reports[since:] for stats in report.cluster_stats if stats.cluster_name == cluster]
        return sum(group.total_issued_requests for stats in found for group in stats.upstream_locality_stats)

    def totals(self, cluster: str, since: int = 0) -> list[Any]:
        """What was reported of a cluster, added up; how long it took is only whether it was said."""
        total: dict[str, Any] = {}
        for stats in (one for report in self.reports[since:] for one in report.cluster_stats if one.cluster_name == cluster):
            assert stats.HasField("load_report_interval")
            plain = json_format.MessageToDict(stats, preserving_proto_field_name=True)
            del plain["load_report_interval"]
            _add(total, plain)
        return sorted(_flat(total))


def _add(total: dict[str, Any], one: dict[str, Any]) -> None:
    """Add numbers; lists are keyed by what in them is no number."""
    for key, value in one.items():
        if isinstance(value, list):
            for item in value:
                identity = str([item.get("locality"), item.get("priority", 0), item.get("address"), item.get("category")])
                _add(total.setdefault(key, {}).setdefault(identity, {}), item)
        elif key.startswith("total_") or key.endswith("_count"):
            # What is under way is no sum: it is the same in each of the reports.
            total[key] = max(total.get(key, 0), int(value)) if key == "total_requests_in_progress" else total.get(key, 0) + int(value)
        else:
            total[key] = value


def _flat(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [line for key, item in value.items() for line in _flat(item, f"{path}/{key}")]
    return [f"{path}: {value}"]


def _endpoint(port: str, **fields: Any) -> Config:
    return {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": f"${{port:{port}}}"}}}, **fields}


def clusters() -> list[Config]:
    """Two localities and two priorities; one that drops; one whose limit is reached at once."""
    groups = [
        {"locality": {"region": "r", "zone": "z2"}, "lb_endpoints": [_endpoint("b")]},
        {"locality": {"region": "r", "zone": "z1"}, "lb_endpoints": [_endpoint("a")]},
        {"priority": 1, "lb_endpoints": [_endpoint("c")]},
    ]
    drops = {"drop_overloads": [{"category": "storm", "drop_percentage": {"numerator": 100}}]}
    limits = {"thresholds": [{"max_pending_requests": 0, "max_connections": 0}]}

    def cluster(name: str, groups: list[Config], policy: Config | None = None, **fields: Any) -> Config:
        return {"name": name, "connect_timeout": "1s", "load_assignment": {"cluster_name": name, "endpoints": groups, "policy": policy or {}}, **fields}

    plain = [{"lb_endpoints": [_endpoint("a")]}]
    return [cluster("many", groups), cluster("drops", plain, drops), cluster("full", plain, circuit_breakers=limits), cluster("unused", plain)]


async def started(site: Site, loads: Loads) -> None:
    await site.origin("a", "b", "c")
    await loads.start()
    site.ports["loads"] = loads.port
    source, server = loads.config("loads")
    routes = [{"match": {"prefix": f"/{name}"}, "route": {"cluster": name}} for name in ("many", "drops", "full")]
    listener = http_listener("in", {"name": "routes", "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]})
    await site.start({"cluster_manager": {"load_stats_config": source}, "static_resources": {"clusters": [*clusters(), server], "listeners": [listener]}})
    await loads.until(lambda: loads.first)


async def asked_for_clusters(site: Site, loads: Loads) -> None:
    await started(site, loads)
    first = loads.first[0]
    site.note(first.node.id, first.node.cluster, list(first.node.client_features), len(first.cluster_stats))
    client = await site.connect("in")
    await client.get("/many")  # before anybody asks: not reported
    loads.ask("many", "drops", "full", "nobody")
    await loads.until(lambda: loads.reports)
    site.note(sorted(stats.cluster_name for stats in loads.reports[0].cluster_stats))
    site.note(sorted([await client.get("/many") for _ in range(6)]))
    for path in ("/drops", "/full", "/drops"):
        site.note(await client.get(path))
    await loads.until(lambda: loads.issued("many") >= 6)
    await loads.a_period()
    for name in ("many", "drops", "full", "nobody"):
        site.note(name, loads.totals(name))
    await site.note_stats("load_reporter.errors", "load_reporter.retries", "load_reporter.requests")


async def asked_for_everything_by_endpoint(site: Site, loads: Loads) -> None:
    await started(site, loads)
    loads.ask(send_all_clusters=True, report_endpoint_granularity=True)
    await loads.until(lambda: loads.reports)
    site.note(sorted(stats.cluster_name for stats in loads.reports[0].cluster_stats))
    client = await site.connect("in")
    site.note(sorted([await client.get("/many") for _ in range(6)]))
    await loads.until(lambda: loads.issued("many") >= 6)
    site.note(loads.totals("many"))
    since = len(loads.reports)
    loads.ask("unused")
    await loads.until(lambda: any(len(report.cluster_stats) == 1 for report in loads.reports[since:]))
    site.note(loads.totals("unused"))
    for _ in range(4):
        await client.get("/many")
    loads.ask("many")  # it is new again: what was counted meanwhile is not told
    since = len(loads.reports)
    await loads.until(lambda: any(stats.cluster_name == "many" for report in loads.reports[since:] for stats in report.cluster_stats))
    await loads.a_period()
    site.note(loads.totals("many", since))


class Slow(Origin):
    """In the place of another one, with a way of its own to answer."""

    def __init__(self, other: Origin, serve: Any) -> None:
        super().__init__(other.name)
        self.port = other.port
        self._serve = serve

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)


async def what_is_under_way_is_reported(site: Site, loads: Loads) -> None:
    """A request that lasts is in every report, though it began long before."""
    await started(site, loads)
    answer = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(asyncio.CancelledError):
            await answer.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    for origin in ("a", "b"):  # of both localities
        site.origins[origin].stop()
        site.origins[origin] = Slow(site.origins[origin], serve)
        await site.origins[origin].start()
    loads.ask("many")
    await loads.until(lambda: loads.reports)
    client = await site.connect("in")
    getting = asyncio.ensure_future(client.get("/many"))
    await loads.until(lambda: loads.issued("many"))
    since = len(loads.reports)
    await loads.until(lambda: len(loads.reports) > since + 1)
    seen = loads.reports[-1].cluster_stats[0].upstream_locality_stats
    site.note([(group.total_requests_in_progress, group.total_issued_requests, group.total_successful_requests) for group in seen])
    answer.set()
    site.note(await getting)
    await loads.until(lambda: any(line.endswith("total_successful_requests: 1") for line in loads.totals("many")))
    await loads.a_period()
    site.note(len(loads.reports[-1].cluster_stats[0].upstream_locality_stats))


async def a_stream_that_ends_is_begun_again(site: Site, loads: Loads) -> None:
    """Five seconds later, with what was counted meanwhile."""
    await started(site, loads)
    loads.ask("many")
    await loads.until(lambda: loads.reports)
    loads.say(None)
    client = await site.connect("in")
    for _ in range(4):
        await client.get("/many")
    await loads.until(lambda: len(loads.first) > 1)
    again = loads.first[1]
    site.note([(stats.cluster_name, sum(group.total_issued_requests for group in stats.upstream_locality_stats)) for stats in again.cluster_stats])
    site.note(list(again.node.client_features))
    await site.note_stats("load_reporter.errors", "load_reporter.retries")


SCENARIOS = [what_is_under_way_is_reported, a_stream_that_ends_is_begun_again, asked_for_clusters, asked_for_everything_by_endpoint]


@pytest.mark.differential
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_load_reports(scenario):
    compare(beside(scenario, lambda site: Loads()))


@pytest.mark.parametrize("workers", [1, 3])
def test_clusters_that_say_so_are_reported_to_where_they_come_from(workers):
    """`lrs_server: self`, which Envoy does not look at."""

    async def scenario(site: Site) -> None:
        plane, loads = ControlPlane(), Loads()
        plane.handlers += loads.handlers
        try:
            await plane.start()
            await site.origin("a")
            told, untold = (site.render(static(name, "a")) for name in ("told", "untold"))
            plane.put("cluster", "c1", told | {"lrs_server": {"self": {}}}, untold)
            plane.put("listener", "l1", *(site.render(http_listener(name, goes_to(name))) for name in ("told", "untold")))
            options = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {"@": "http_options", "explicit_http_config": {"http2_protocol_options": {}}}}
            site.origins["control"] = Origin("control")
            site.origins["control"].port = plane.port
            api = {"api_type": "GRPC", "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": "control"}}]}
            source = {"ads": {}, "resource_api_version": "V3"}
            control = static("control", "control", typed_extension_protocol_options=options)
            await site.start(
                {"dynamic_resources": {"ads_config": api, "cds_config": source, "lds_config": source}, "static_resources": {"clusters": [control]}}
            )
            await loads.until(lambda: loads.first)
            loads.ask(send_all_clusters=True)
            await loads.until(lambda: loads.reports)
            for name in ("told", "untold") * 8:
                assert await site.get(name) == "200 a"
            await loads.until(lambda: loads.issued("told") >= 8)
            await loads.a_period()
            assert loads.issued("told") == 8
            assert {stats.cluster_name for report in loads.reports for stats in report.cluster_stats} == {"told"}
            plane.put("cluster", "c2", told, untold)
            await plane.push()
            await loads.until(lambda: not loads.reports[-1].cluster_stats)
        finally:
            await plane.stop()

    command = [part if at == 0 or proxy.our_command()[at - 1] != "--concurrency" else str(workers) for at, part in enumerate(proxy.our_command())]
    asyncio.run(play(scenario, command, "ours"))
