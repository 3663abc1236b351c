"""The benchmark harness: what it computes, renders and sends."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from benchmarks import h2_frames, h2_sender, load, measure, plots, processes, proxies, report, sender, soak, soak_client
from benchmarks.backend import Backend
from benchmarks.configs import Place, Spec, envoy
from benchmarks.load import VARYING, Load
from benchmarks.mesh import documents, pusher
from benchmarks.processes import Process
from benchmarks.scenarios import BY_NAME, SCENARIOS, Bar
from control.kinds.store import Store
from control.sources.folder import Folder
from meshproxy.api import bootstrap as bootstraps
from meshproxy.api import messages, registry, support
from tests.polling import PATIENCE, wait_until

FIGURES = {"meshproxy": {"p99_us": [10.0, 30.0, 20.0]}, "envoy": {"p99_us": [20.0, 20.0, 20.0]}}


def test_a_ratio_is_the_median_of_paired_ratios():
    assert report.ratio_of(FIGURES, "meshproxy", "envoy", "p99_us") == 1.0
    assert report.ratio_of(FIGURES, "meshproxy", "nginx", "p99_us") is None
    assert report.value_of(FIGURES, "meshproxy", "p99_us") == 20.0


@pytest.mark.parametrize(
    ("bar", "expected"),
    [
        (Bar("", "p99_us", at_most=19), ("<= 19", "20", False)),
        (Bar("", "p99_us", at_most=20), ("<= 20", "20", True)),
        (Bar("", "p99_us", at_least=21), (">= 21", "20", False)),
        (Bar("", "p99_us", versus="envoy", at_least=1.0), (">= 1.00x", "1.00x", True)),
        (Bar("", "p50_us", at_most=20), ("<= 20", "not measured", None)),
    ],
)
def test_a_bar_is_judged(bar, expected):
    assert report.judge(bar, FIGURES) == expected


def test_bars_name_lines_and_metrics_that_exist():
    for scenario in SCENARIOS:
        lines = {case.key(proxy) for case in scenario.cases for proxy in scenario.proxies}
        for bar in scenario.bars:
            assert bar.case in lines
            assert not bar.versus or bar.versus in lines
            assert bar.metric in report.METRICS


def test_the_report_shows_figures_bars_and_notes():
    cases = {"meshproxy": {"per_core": [40.0, 60.0], "user_instructions": [50_000.0]}, "envoy": {"per_core": [20.0, 20.0]}}
    text = report.render({"CPU": "one"}, {"minimal": {"at": "today", "quick": True, "cases": cases, "notes": ["a note"]}}, {"minimal": "plots/minimal.svg"})
    assert "| minimal | requests per second per core, against envoy | >= 2.00x | 2.50x | yes |" in text
    assert "| meshproxy | 50.0 | 50 (2.50x) |" in text
    assert "- a note" in text
    assert "A quick run" in text
    assert "plots/minimal.svg" in text


def test_without_figures_nothing_is_drawn(tmp_path):
    assert plots.draw({"minimal": {"cases": {}}}, tmp_path) == {}


def test_perf_output():
    assert measure.parse_perf("123,,instructions:u,99,100.00,,\n45,,instructions:k,99,100.00,,\n") == (123, 45)
    assert measure.parse_perf("<not supported>,,instructions:u,0,100.00,,\n<not supported>,,instructions:k,0,100.00,,\n") is None
    assert measure.parse_perf("") is None


def test_memory_of_this_process():
    found = measure.memory([os.getpid()])
    assert found.alone >= found.pss * 0.9 > 0
    assert found.anonymous >= found.pss_anon > 0


def test_requests_are_different_each_time():
    render = sender.renderer(VARYING.template().decode(), 1, "%d")
    first, second = render(), render()
    assert first != second
    assert len(first) == len(second)
    assert b"$" not in first


def test_a_leaping_request_reaches_every_number():
    render = sender.renderer(Load(path="/$r").template().decode(), 10, "%02d")
    assert {render().split()[1] for _ in range(10)} == {f"/{number:02d}".encode() for number in range(10)}


@pytest.fixture
def service():
    """Answers every read with a small response; its port."""

    def serve(accepted: socket.socket) -> None:
        with accepted:
            while accepted.recv(65536):
                accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def accept() -> None:
        for _ in range(4):
            accepted, _ = listener.accept()
            threads.append(threading.Thread(target=serve, args=(accepted,)))
            threads[-1].start()

    threads = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads.append(threading.Thread(target=accept))
        threads[0].start()
        yield listener.getsockname()[1]
        for thread in threads:
            thread.join()


def test_the_sender_sends_exactly(service):
    it = sender.Sender(service, 4, lambda: b"GET / HTTP/1.1\r\n\r\n")
    it.send_exactly(50)
    it.close()
    assert len(it.latencies) == 50


def test_the_sender_keeps_its_rate(service):
    it = sender.Sender(service, 4, lambda: b"GET / HTTP/1.1\r\n\r\n")
    start = sender.monotonic()
    it.send_at(400, 0.1)
    assert sender.monotonic() - start >= 39 / 400  # the fortieth request is not due earlier
    it.close()
    assert len(it.latencies) == 40


@pytest.mark.parametrize(
    ("what", "requests", "received"),
    [
        (load.REPEATED_H2, 1000, 128_000),
        (load.VARYING_H2, 1000, 128_000),
        (load.VARYING_LITERALS_H2, 1000, 128_000),
        (load.UNARY, 1000, (5 + 128) * 1000),
        (load.STREAMING, 1001, (5 + 1024) * 1001),
        (Load(connections=5, streams=1), 7, 7 * 128),
    ],
)
def test_the_http2_sender_gets_an_answer_for_each_request(what, requests, received, http2_services):
    outcome = h2_sender.run(load.http2_job(what, http2_services[what.service]) | {"requests": requests})
    assert (outcome["requests"], outcome["bytes"]) == (requests, received)


@pytest.fixture(scope="module")
def http2_services(tmp_path_factory):
    """The small services; what they serve -> port."""
    folder = tmp_path_factory.mktemp("services")
    with Backend(folder / "http2", "http2", small=True) as http2, Backend(folder / "grpc", "grpc") as grpc:
        yield {"http2": http2.port, "grpc": grpc.port}


def test_clients_of_a_soak_follow_every_request(tmp_path, monkeypatch):
    monkeypatch.setattr(soak_client, "_LIFE", (20, 200))
    with Backend(tmp_path, "mixed") as service:
        clients = soak_client.Clients(service.port)
        while clients.tally.started < 500 or not clients.tally.abandoned:
            clients.run(0.05)
        clients.finish()
    tally = clients.tally
    assert not tally.lost
    assert tally.started == tally.answered + tally.reset + tally.abandoned
    assert tally.reset
    assert tally.connections > soak_client.CONNECTIONS


def test_clients_of_a_soak_notice_what_is_lost(tmp_path):
    with Backend(tmp_path, "mixed", goaway_after=100) as service:  # without a proxy nobody sends again what it ignores
        clients = soak_client.Clients(service.port)
        while not clients.tally.lost:
            clients.run(0.05)
        clients.close()
    tally = clients.tally
    assert "GOAWAY 00000000 " in tally.lost
    assert soak.verdict({"lost": dict(tally.lost), "left": {}, "growth": 0.0})


@pytest.mark.parametrize(("growth", "fine"), [(-0.1, True), (0.05, True), (0.051, False)])
def test_the_verdict_of_a_soak(growth, fine):
    assert (soak.verdict({"lost": {}, "left": {}, "growth": growth}) == []) is fine
    assert soak.verdict({"lost": {}, "left": {"http.main.downstream_rq_active": 1}, "growth": growth})


def test_memory_of_a_soak_is_a_median():
    watch = soak.Watch(None, None, samples=[(5, 1.0), (10, 50.0), (15, 2.0), (60, 9.0)])
    assert watch.around(10) == 2.0
    assert watch.around(60) == 9.0


def test_what_is_sent_over_http2_says_which_service_it_wants():
    assert [what.service for what in (load.ELEVEN, load.REPEATED_H2, load.UNARY)] == ["http1", "http2", "grpc"]
    assert load.VARYING_H2.fields()[:5] == [
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", proxies.HOST),
        (":path", "/api/orders/$n?page=1"),
        ("user-agent", load.ELEVEN_HEADERS[1].removeprefix("User-Agent: ")),
    ]


def test_frames_are_read_however_they_are_cut():
    stream = h2_frames.hello({}) + h2_frames.frame(h2_frames.DATA, h2_frames.END_STREAM, 7, b"x" * 70000)
    whole = list(h2_frames.Reader().frames(stream))
    assert whole[-1] == (h2_frames.DATA, h2_frames.END_STREAM, 7, b"x" * 70000)
    reader = h2_frames.Reader()
    assert [frame for position in range(0, len(stream), 7) for frame in reader.frames(stream[position : position + 7])] == whole


def test_two_sidecars_have_tls_between_them():
    first, second = Spec(http2=True, sidecars=2).hops()
    assert (first.tls, first.upstream_tls) == (False, True)
    assert (second.tls, second.upstream_tls) == (True, False)


HTTP2 = [Spec(http2=True), *Spec(http2=True, sidecars=2).hops()]


@pytest.mark.parametrize("spec", [Spec(hosts=3), Spec(prefixes=3), Spec(clusters=3), Spec("mesh"), Spec("tcp"), *HTTP2], ids=str)
def test_every_configuration_is_valid(spec, tmp_path):
    proxies.make_certificate(tmp_path)
    file = tmp_path / "envoy.json"
    file.write_text(envoy(spec, Place(tmp_path, 1, 2, 3)))
    bootstrap, warnings = bootstraps.validate(str(file))
    assert not warnings
    assert len(bootstrap.static_resources.clusters) == {"mesh": 2}.get(spec.base, 1 + spec.clusters)


def test_a_process_ends_with_its_children(tmp_path):
    process = Process(["sh", "-c", "sleep 1000 & sleep 1000 & wait"], tmp_path / "log", [min(os.sched_getaffinity(0))])
    process.wait(lambda: len(process.pids()) == 3, PATIENCE, "children")
    everyone = process.pids()
    process.stop()
    assert wait_until(lambda: not any(map(processes.alive, everyone)))  # the kernel needs a moment to end the killed ones


def test_scenarios_have_names_of_their_own():
    assert len(BY_NAME) == len(SCENARIOS)


def test_documents_of_the_mesh_are_right(tmp_path):
    documents.many_services(tmp_path, 3)
    sidecar = {"identity": True, "inbound": [{"port": 8000, "listen": 18000}], "httpProxy": 15001}
    documents.write(tmp_path, "one.yaml", documents.workload("one", {"http": 8000}, sidecar), documents.workload("two", {"http": 8001}))
    documents.write(tmp_path, "rule.yaml", documents.rule("service-0001", [{"route": [{"destination": {"host": "service-0001"}}]}]))
    store = Store()
    Folder(str(tmp_path), store).scan(0)
    store.settle()
    assert store.troubles == []
    assert len(store.objects) == 9


def test_what_the_pusher_sends_is_right():
    made = pusher.Pusher(3, 8080)
    response = messages.known("envoy.service.discovery.v3.DeltaDiscoveryResponse")
    before = response.FromString(made.body(pusher.ENDPOINTS))
    made.variant[pusher.ENDPOINTS] ^= 1
    after = response.FromString(made.body(pusher.ENDPOINTS))
    assert [one.name for one in before.resources] == [one.name for one in after.resources] == ["backend", "service-1", "service-2"]
    assert [one.version for one in before.resources] == ["v0"] * 3
    assert [one.version for one in after.resources] == ["v0", "v1", "v1"]  # what traffic goes to stays as it is
    assert before.resources[0] == after.resources[0]
    (one,) = response.FromString(made.body(pusher.CLUSTERS, ["service-2", "unknown"])).resources
    assert support.check(registry.unpack(one.resource)) == ([], [])
