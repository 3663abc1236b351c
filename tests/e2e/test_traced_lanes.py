"""Requests of a connection manager that traces, again and again over one connection: by plan, and out of it, they say of their traces what they always said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.proxy import ADMIN, Proxy, cluster, listener, wait_until
from tests.e2e.test_istio_metrics import HTTP2, Application, send

pytestmark = pytest.mark.slow

TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-0([01])")
MANY = 40
LOG = "{name: log, typed_config: {'@type': type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: %s, log_format: \
{text_format_source: {inline_string: \"%%TRACE_ID%% %%REQ(X-REQUEST-ID)%% %%RESPONSE_CODE%%\\n\"}}}}"
RBAC = "- {name: rbac, typed_config: {'@type': type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, rules: {action: DENY, policies: {no: {\
permissions: [{header: {name: x-no, present_match: true}}], principals: [{any: true}]}}}}}"
PROVIDER = "{name: otel, typed_config: {'@type': type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig, service_name: s, \
grpc_service: {envoy_grpc: {cluster_name: nobody}}}}"


@pytest.fixture(scope="module")
def application() -> Iterator[Application]:
    made = Application()
    yield made
    made.close()


def config(application: Application, sampling: float, log: Path, *, direction: str = "INBOUND", filters: str = "", retries: str = "") -> str:
    route = f"{{match: {{prefix: /}}, route: {{cluster: up{retries}}}, decorator: {{operation: work}}}}"
    text = ADMIN + "static_resources:\n  listeners:" + listener(0, route, extra=f"traffic_direction: {direction}", filters=filters)
    tracing = f"tracing: {{random_sampling: {{value: {sampling}}}, provider: {PROVIDER}}}\n          access_log: [{LOG % log}]"
    text = text.replace("          http_filters:", f"          {tracing}\n          http_filters:")
    return text + "  clusters:" + cluster("up", application.port) + cluster("nobody", 1).replace("connect_timeout", f"{HTTP2}, connect_timeout")


def lines(log: Path, count: int) -> list[list[str]]:
    return wait_until(lambda: log.exists() and len(found := [line.split() for line in log.read_text().splitlines()]) >= count and found)


@pytest.mark.parametrize(("sampling", "filters"), [(0, ""), (0, RBAC), (50, ""), (50, RBAC), (100, "")])
def test_who_is_sampled_is_what_the_request_id_says(tmp_path: Path, application: Application, sampling: int, filters: str):
    log = tmp_path / "log"
    with Proxy(tmp_path, config(application, sampling, log, filters=filters)) as proxy:
        answers = send(proxy.port(), ["/"] * MANY)
        told = []
        for status, got, back in answers:
            assert status == 200
            found = TRACEPARENT.fullmatch(got["traceparent"])
            assert found is not None
            assert got["tracestate"] == ""
            assert back["x-envoy-decorator-operation"] == "work"
            number = int(got["x-request-id"][:8], 16) % 10_000
            sampled = number < sampling * 100
            assert found[3] == str(int(sampled))
            assert got["x-request-id"][14] == ("9" if sampled else "4")
            told.append([found[1], got["x-request-id"], "200"])
        assert len({one[0] for one in told}) == len({one[1] for one in told}) == MANY
        assert lines(log, MANY) == told
        counted = {name: proxy.stat(f"http.l1.tracing.{name}") for name in ("not_traceable", "random_sampling")}
        assert sum(counted.values()) == MANY
        assert counted["random_sampling"] == sum(one[1][14] == "9" for one in told)
        assert {0: counted["random_sampling"] == 0, 50: 0 < counted["random_sampling"] < MANY, 100: counted["not_traceable"] == 0}[sampling]


def test_a_context_goes_on(tmp_path: Path, application: Application):
    trace = "0af7651916cd43dd8448eb211c80319c"
    with Proxy(tmp_path, config(application, 100, tmp_path / "log")) as proxy:
        answers = send(proxy.port(), ["/"] * MANY, traceparent=f"00-{trace}-b7ad6b7169203331-00", tracestate="a=b")
        for _, got, _ in answers:
            assert got["traceparent"].startswith(f"00-{trace}-")
            assert got["traceparent"].endswith("-00")
            assert got["tracestate"] == "a=b"
        assert len({got["traceparent"] for _, got, _ in answers}) == MANY
        assert proxy.stat("http.l1.tracing.random_sampling") == MANY


def test_what_leaves_its_plan_keeps_its_trace(tmp_path: Path, application: Application):
    """A response that is tried again, and a filter that answers: the log knows the trace, and each try says the same."""
    log = tmp_path / "log"
    retries = ", retry_policy: {retry_on: retriable-status-codes, retriable_status_codes: [503], num_retries: 1}"
    with Proxy(tmp_path, config(application, 0, log, filters=RBAC, retries=retries)) as proxy:
        answers = send(proxy.port(), ["/503"] * MANY)
        told = []
        for status, got, _ in answers:
            found = TRACEPARENT.fullmatch(got["traceparent"])
            assert (status, found is not None) == (503, True)
            told.append([found[1], got["x-request-id"], "503"])  # type: ignore[index]
        assert lines(log, MANY) == told
        assert [status for status, _, _ in send(proxy.port(), ["/"] * MANY, x_no="1")] == [403] * MANY
        assert len({trace for trace, _, _ in lines(log, 2 * MANY)}) == 2 * MANY
        assert proxy.stat("http.l1.tracing.not_traceable") == 2 * MANY


def test_those_upstream_are_told_what_it_is_called(tmp_path: Path, application: Application):
    with Proxy(tmp_path, config(application, 0, tmp_path / "log", direction="OUTBOUND")) as proxy:
        for _, got, back in send(proxy.port(), ["/"] * MANY):
            assert got["x-envoy-decorator-operation"] == "work"
            assert "x-envoy-decorator-operation" not in back
