"""Readiness: probes in documents, what sidecars are told to ask, and what becomes of their reports."""

from __future__ import annotations

import pytest
from google.protobuf import json_format

from control.ads.health import BURST, GRACE_S, MAX_ENDPOINTS, PER_S, Health
from control.ads.hub import Hub
from control.ads.session import ProtocolError
from control.ads.status import client_status
from control.kinds.store import Store
from control.model.health import GRPC, HTTP, TCP, Probe
from control.model.snapshot import build, with_unready
from control.query import proxy_status, status_table, unready
from control.translate.health import QUICK_S, SLOW_S, cluster_of, nothing, specifier
from meshproxy.api import messages, support
from meshproxy.xds import health as data_plane
from tests.unit.control_help import snapshot
from tests.unit.test_control_kinds import complaints

_Message = messages.known("envoy.service.health.v3.HealthCheckRequestOrEndpointHealthResponse")
_Specifier = messages.known("envoy.service.health.v3.HealthCheckSpecifier")
KEY = ("default", "a")
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: s}
spec: {selector: {app: s}, ports: [{name: http, port: 80}]}
"""


def workload(probe: str, name: str = "a", more: str = "") -> str:
    return f"""
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: {name}, labels: {{app: s}}}}
spec:
  ports: {{http: 8000}}
  address: 10.0.0.1
  sidecar: {{inbound: [{{port: 8000, listen: 18000}}]}}
  {probe}
  {more}
"""


def told(probe: str, *, ready: bool = True, more: str = ""):
    """The specifier in JSON form, which our own data plane honours."""
    one = snapshot(SERVICE, workload(f"readinessProbe: {probe}", more=more)).workloads[KEY]
    message = _Specifier.FromString(specifier(one, ready))
    assert data_plane.HONOURS
    assert support.check(message) == ([], [])
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


# --- documents


def test_probes_are_those_of_kubernetes():
    def of(probe: str) -> Probe | None:
        return snapshot(workload(f"readinessProbe: {probe}")).workloads[KEY].readiness

    assert of("{tcpSocket: {port: 1}}") == Probe(TCP, 1, period_s=10.0, timeout_s=1.0, successes=1, failures=3)
    assert of("{httpGet: {port: http, path: ready, scheme: HTTPS, host: 127.0.0.2, httpHeaders: [{name: A, value: b}]}, periodSeconds: 0.5}") == Probe(
        HTTP, "http", "127.0.0.2", "/ready", True, (("A", "b"),), period_s=0.5
    )
    assert of("{grpc: {port: 1, service: x}, timeoutSeconds: 2, successThreshold: 3, failureThreshold: 4, initialDelaySeconds: 9}") == Probe(
        GRPC, 1, service="x", timeout_s=2.0, successes=3, failures=4
    )


@pytest.mark.parametrize(
    ("probe", "path"),
    [
        ("{}", "spec.readinessProbe"),
        ("{exec: {command: [x]}, tcpSocket: {port: 1}}", "spec.readinessProbe.exec"),
        ("{tcpSocket: {}}", "spec.readinessProbe.tcpSocket.port"),
        ("{tcpSocket: {port: other}}", "spec.readinessProbe"),
        ("{tcpSocket: {port: 1, host: a.test}}", "spec.readinessProbe.tcpSocket.host"),
        ("{tcpSocket: {port: 1}, grpc: {port: 1}}", "spec.readinessProbe.grpc"),
        ("{tcpSocket: {port: 1}, periodSeconds: 0}", "spec.readinessProbe.periodSeconds"),
        ("{tcpSocket: {port: 1}, failureThreshold: 0}", "spec.readinessProbe.failureThreshold"),
        ("{httpGet: {port: 1, path: 'a b'}}", "spec.readinessProbe.httpGet.path"),
        ("{httpGet: {port: 1, scheme: FTP}}", "spec.readinessProbe.httpGet.scheme"),
        ("{httpGet: {port: 1, httpHeaders: [{name: 'a b'}]}}", "spec.readinessProbe.httpGet.httpHeaders[0].name"),
        ("{httpGet: {port: 1, httpHeaders: [{name: a, value: '%A%'}]}}", "spec.readinessProbe.httpGet.httpHeaders[0].value"),
        ("{httpGet: {port: 1, typo: 1}}", "spec.readinessProbe.httpGet.typo"),
    ],
)
def test_probes_that_are_none(probe, path):
    assert path in [one.partition(": ")[0] for one in complaints(workload(f"readinessProbe: {probe}"))]


def test_a_workload_group_says_it_for_its_entries():
    group = """
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: g}
spec:
  template: {ports: {http: 1}, serviceAccount: x}
  probe: {httpGet: {path: /, port: 8080}, periodSeconds: 5}
"""
    entry = """
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: %s, annotations: {%s}}
spec: {address: 10.0.0.2}
"""
    found = snapshot(group, entry % ("in", "istio.io/autoRegistrationGroup: g"), entry % ("out", "")).workloads
    assert found["default", "in"].readiness == Probe(HTTP, 8080, period_s=5.0)
    assert found["default", "out"].readiness is None
    assert cluster_of(found["default", "in"]) == "readiness|8080|http|"


# --- what is asked


def test_http():
    said = told("{httpGet: {port: http, path: /r, httpHeaders: [{name: Host, value: h}, {name: x, value: yes-it-is}]}, periodSeconds: 4, timeoutSeconds: 2}")
    assert said == {
        "interval": "2s",
        "cluster_health_checks": [
            {
                "cluster_name": "readiness|8000|http|",
                "locality_endpoints": [{"endpoints": [{"address": {"socket_address": {"address": "10.0.0.1", "port_value": 8000}}}]}],
                "health_checks": [
                    {
                        "timeout": "2s",
                        "interval": "4s",
                        "no_traffic_interval": "4s",
                        "unhealthy_threshold": 3,
                        "healthy_threshold": 1,
                        "reuse_connection": False,
                        "http_health_check": {
                            "host": "h",
                            "path": "/r",
                            "expected_statuses": [{"start": "200", "end": "400"}],
                            "retriable_statuses": [{"start": "100", "end": "200"}, {"start": "400", "end": "600"}],
                            "request_headers_to_add": [{"header": {"key": "x", "value": "yes-it-is"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
                        },
                    }
                ],
            }
        ],
    }


def test_the_others():
    (check,) = told("{tcpSocket: {port: 9, host: '::1'}}")["cluster_health_checks"]
    assert check["locality_endpoints"][0]["endpoints"] == [{"address": {"socket_address": {"address": "::1", "port_value": 9}}}]
    assert check["health_checks"][0]["tcp_health_check"] == {}
    (check,) = told("{grpc: {port: 9, service: s}}")["cluster_health_checks"]
    assert check["health_checks"][0]["grpc_health_check"] == {"service_name": "s", "authority": "10.0.0.1:9"}
    (check,) = told("{httpGet: {port: 9, scheme: HTTPS}}")["cluster_health_checks"]
    assert check["transport_socket_matches"][0]["transport_socket"]["typed_config"]["@type"].endswith("UpstreamTlsContext")


def test_who_is_not_ready_reports_more_often():
    every = {said: float(told("{tcpSocket: {port: 1}, periodSeconds: %s}" % said)["interval"][:-1]) for said in ("0.05", "1", "100")}  # noqa: UP031
    assert every == {"0.05": QUICK_S, "1": 0.5, "100": SLOW_S}
    assert told("{tcpSocket: {port: 1}}", ready=False)["interval"] == "0.100s"


def test_the_application_of_an_ingress_is_where_it_says():
    sidecar = """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: x}
spec: {ingress: [{port: {number: 8000, protocol: HTTP, name: http}, defaultEndpoint: %s}]}
"""
    for endpoint, address in (("127.0.0.1:9000", {"socket_address": {"address": "127.0.0.1", "port_value": 9000}}), ("unix:///x", {"pipe": {"path": "/x"}})):
        one = snapshot(workload("readinessProbe: {tcpSocket: {port: http}}"), sidecar % endpoint).workloads[KEY]
        (check,) = json_format.MessageToDict(_Specifier.FromString(specifier(one, True)), preserving_proto_field_name=True)["cluster_health_checks"]
        assert check["locality_endpoints"][0]["endpoints"] == [{"address": address}]


# --- endpoints


def healthy(made) -> list[bool]:
    return [one.healthy for one in made.endpoints["s.default.svc.cluster.local", 80]]


def test_who_is_not_ready_is_not_healthy_in_endpoints():
    store = Store()
    probed, plain = workload("readinessProbe: {tcpSocket: {port: 1}}"), workload("", "b")
    made = snapshot(SERVICE, probed, plain, store=store)
    assert healthy(made) == [True, True]
    other = with_unready(made, frozenset([KEY]), [KEY])
    assert healthy(other) == [False, True]
    assert other.config is made.config
    assert build(store.objects, made, unready=frozenset([KEY])).endpoints == other.endpoints
    assert build(store.objects, other).endpoints == made.endpoints == with_unready(other, frozenset(), [KEY]).endpoints
    assert healthy(with_unready(made, frozenset([("default", "b")]), [("default", "b")])) == [True, True]  # nobody asks it


def test_a_service_may_want_those_that_are_not_ready():
    service = SERVICE.replace("{selector", "{publishNotReadyAddresses: true, selector")
    store = Store()
    made = snapshot(service, workload("readinessProbe: {tcpSocket: {port: 1}}"), store=store)
    assert healthy(with_unready(made, frozenset([KEY]), [KEY])) == healthy(build(store.objects, unready=frozenset([KEY]))) == [True]


def test_what_a_document_says_of_health_goes_before():
    made = snapshot(SERVICE, workload("readinessProbe: {tcpSocket: {port: 1}}", more="healthy: false"))
    assert healthy(with_unready(made, frozenset(), [KEY])) == [False]


# --- reports


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def hello(node: str = "a.default") -> bytes:
    return _Message(health_check_request={"node": {"id": node}}).SerializeToString()


def report(*statuses: int, name: str = "readiness|1|tcp|") -> bytes:
    endpoints = [{"health_status": status} for status in statuses]
    cluster = {"cluster_name": name, "locality_endpoints_health": [{"endpoints_health": endpoints}]}
    return _Message(endpoint_health_response={"cluster_endpoints_health": [cluster], "endpoints_health": endpoints}).SerializeToString()


class Reports:
    """The registry over a snapshot with one workload; `changes`: how often it said that something is new."""

    def __init__(self, probe: str = "readinessProbe: {tcpSocket: {port: 1}}") -> None:
        self.clock = Clock()
        self.changes = 0
        self.health = Health(self.clock, self._changed)
        self.snapshot = snapshot(SERVICE, workload(probe))

    def _changed(self) -> None:
        self.changes += 1

    def come(self):
        stream = self.health.open(lambda: None)
        self.say(stream, hello())
        return stream

    def say(self, stream, *messages: bytes) -> None:
        for one in messages:
            stream.receive(one)
            self.health.heard(stream, self.snapshot)


def test_a_report_decides():
    here = Reports()
    stream = here.come()
    one = here.snapshot.workloads[KEY]
    assert (here.health.is_ready(KEY), here.health.unready) == (None, frozenset())  # until it is reported, documents count
    assert stream.answer(one) == specifier(one, False)
    assert stream.answer(one) is None
    here.say(stream, report(2))
    assert (here.health.is_ready(KEY), here.health.unready, here.changes) == (False, {KEY}, 1)
    assert stream.answer(one) is None
    here.say(stream, report(1), report(1))
    assert (here.health.is_ready(KEY), here.health.unready, here.changes) == (True, frozenset(), 2)
    assert stream.answer(one) == specifier(one, True)
    here.say(stream, report(4))
    assert here.health.unready == {KEY}
    here.say(stream, report(1, name="of another probe"))
    assert here.health.unready == {KEY}
    here.say(stream, report())
    assert here.health.unready == {KEY}


def test_a_report_goes_after_its_sidecar():
    here = Reports()
    first, second = here.come(), here.come()
    here.say(first, report(2))
    here.health.close(first)
    here.clock.now += GRACE_S
    here.health.tidy()
    assert here.health.unready == {KEY}  # there is another one
    here.health.close(second)
    here.clock.now += GRACE_S - 1
    here.health.tidy()
    assert here.health.unready == {KEY}
    third = here.come()
    here.say(third, report(2))  # it is back
    here.clock.now += GRACE_S
    here.health.tidy()
    assert here.health.unready == {KEY}
    here.health.close(third)
    here.clock.now += GRACE_S
    here.health.tidy()
    assert (here.health.unready, here.health.is_ready(KEY), here.health.streams) == (frozenset(), None, [])


def test_who_changes_all_the_time_is_heard_now_and_then():
    here = Reports()
    stream = here.come()
    for turn in range(100):
        here.say(stream, report(1 + turn % 2))
    assert here.changes == BURST - 1  # the first is no change of who is not ready
    assert here.health.unready == {KEY}
    here.say(stream, report(1))
    here.health.tidy()
    assert here.health.unready == {KEY}
    here.clock.now += 1 / PER_S
    here.health.tidy()
    assert here.health.unready == frozenset()
    here.clock.now += BURST / PER_S
    here.health.tidy()
    changes = here.changes
    for turn in range(100):
        here.say(stream, report(2 - turn % 2))
    assert here.changes - changes == BURST


def test_reports_are_small():
    here = Reports()
    stream = here.come()
    here.say(stream, report(*[1] * MAX_ENDPOINTS))
    with pytest.raises(ProtocolError, match="more than"):
        stream.receive(report(*[1] * (MAX_ENDPOINTS + 1)))


def test_whom_nobody_asks_any_more():
    here = Reports()
    stream = here.come()
    stream.answer(here.snapshot.workloads[KEY])
    here.say(stream, report(2))
    here.snapshot = snapshot(SERVICE, workload(""))
    here.health.published(here.snapshot)
    assert here.health.unready == frozenset()
    assert stream.answer(here.snapshot.workloads[KEY]) == nothing()
    assert stream.answer(None) is None
    here.say(stream, report(2))  # was on its way
    assert stream.report is None
    here.snapshot = snapshot(SERVICE, workload("readinessProbe: {tcpSocket: {port: 1}}"))
    assert stream.answer(here.snapshot.workloads[KEY]) == specifier(here.snapshot.workloads[KEY], False)
    here.say(stream, report(2))
    assert here.health.unready == {KEY}
    unknown = here.come()
    assert unknown.answer(None) is None


@pytest.mark.parametrize("first", [b"\xff\xff", b"", report(1)])
def test_who_does_not_say_who_it_is(first):
    here = Reports()
    with pytest.raises(ProtocolError):
        here.health.open(lambda: None).receive(first)


def test_status_shows_it():
    hub = Hub(snapshot(SERVICE, workload("readinessProbe: {tcpSocket: {port: 1}}")))
    request = messages.known("envoy.service.discovery.v3.DeltaDiscoveryRequest")
    for name in ("a", "b"):
        url = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
        hub.open(delta=True).receive(request(type_url=url, node={"id": f"{name}.default"}).SerializeToString())
    stream = hub.health.open(lambda: None)

    def shown() -> list[str]:
        proxies = proxy_status(client_status(hub.connections, lambda name: True, False, hub.loads, hub.health))
        return [line.split()[-1] for line in status_table(proxies).splitlines()]

    assert "APPLICATION" not in shown()
    for one, word in ((report(1), "READY"), (report(2), "READY"), (report(4), "(timeout)")):
        if stream.key is None:
            stream.receive(hello())
        stream.receive(one)
        assert shown() == ["APPLICATION", word, "-"]
    assert unready(client_status(hub.connections, lambda name: True, True, hub.loads, hub.health)) == {KEY}
    stream.receive(report(2))
    assert "NOT READY" in status_table(proxy_status(client_status(hub.connections, lambda name: True, False, None, hub.health)))
