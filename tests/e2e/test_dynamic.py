"""Dynamic configuration with several workers, over crashes and under traffic."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
import grpc
import pytest
import yaml

from meshproxy.api import convert, messages
from tests.e2e.proxy import ADMIN, HELLO, PATIENCE, Proxy, cluster, listener, wait_until

pytestmark = pytest.mark.slow
T = "type.googleapis.com/envoy.config"


def write(folder, name, version, kind, *resources):
    """Put a file into the place of another. `resources`: items of a list, as YAML."""
    found = [{"@type": f"{T}.{kind}", **yaml.safe_load(one)[0]} for one in resources]
    (folder / "new").write_text(json.dumps({"version_info": version, "resources": found}))
    os.replace(folder / "new", folder / name)


def source(folder, name):
    return f"{{path_config_source: {{path: {folder / name}}}}}"


@pytest.fixture
def site(tmp_path):
    write(tmp_path, "cds.yaml", "c1", "cluster.v3.Cluster")
    write(tmp_path, "lds.yaml", "l1", "listener.v3.Listener", listener(0, HELLO, name="one"))
    config = (
        f"{ADMIN}node: {{id: n1, cluster: c}}\ndynamic_resources: {{cds_config: {source(tmp_path, 'cds.yaml')}, lds_config: {source(tmp_path, 'lds.yaml')}}}\n"
    )
    with Proxy(tmp_path, config, "--concurrency", "2", "-l", "info") as proxy:
        yield proxy


def port(proxy, name="one"):
    for line in proxy.admin("GET", "/listeners")[1].splitlines():
        if line.startswith(f"{name}::"):
            return int(line.rpartition(":")[2])
    return 0


def get(at):
    connection = http.client.HTTPConnection("127.0.0.1", at, timeout=PATIENCE)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def says(text, **fields):
    return listener(0, HELLO.replace("hello", text), name="one", **fields)


def test_a_listener_of_several_workers_keeps_its_port_over_updates(site):
    at = port(site)
    assert get(at) == (200, "hello")
    for turn in range(3):
        write(site.folder, "lds.yaml", f"l{turn + 2}", "listener.v3.Listener", says(f"turn {turn}"))
        wait_until(lambda: all(get(at) == (200, f"turn {turn}") for _ in range(20)))  # noqa: B023
        assert port(site) == at
    assert site.stat("listener_manager.listener_in_place_updated") == 3


def test_a_worker_that_dies_comes_back_with_what_is_in_use_now(site):
    at = port(site)
    write(site.folder, "lds.yaml", "l2", "listener.v3.Listener", says("later"), listener(0, HELLO, name="two"))
    wait_until(lambda: all(get(at) == (200, "later") for _ in range(20)))
    for pid in workers(site):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: site.stat("server.worker_restarts") == 2 and site.stat("server.workers_restarting") == 0)
    assert [get(at) for _ in range(20)] == [(200, "later")] * 20
    assert get(port(site, "two")) == (200, "hello")


def workers(proxy):
    children = f"/proc/{proxy.process.pid}/task/{proxy.process.pid}/children"
    with open(children) as file:
        return [int(pid) for pid in file.read().split()]


def test_no_request_fails_while_everything_changes(site):
    """Each on a connection of its own, so that accepting is tried as well."""
    at = port(site)
    failed, done, ended = [], [], threading.Event()

    def ask():
        while not ended.is_set():
            try:
                answer = get(at)
            except OSError as error:
                failed.append(repr(error))
                continue
            (done if answer[0] == 200 else failed).append(answer)

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        for turn in range(2, 12):
            write(site.folder, "cds.yaml", f"c{turn}", "cluster.v3.Cluster", *(cluster(f"n{number}", turn) for number in range(20)))
            write(site.folder, "lds.yaml", f"l{turn}", "listener.v3.Listener", says(f"turn {turn}", extra=f"per_connection_buffer_limit_bytes: {turn}0000"))
            wait_until(lambda: f'"version_info": "l{turn}"' in site.admin("GET", "/config_dump")[1])  # noqa: B023
            seen = len(done)
            wait_until(lambda: len(done) > seen + 20)  # noqa: B023
    finally:
        ended.set()
        for client in clients:
            client.join()
    assert not failed
    assert site.stat("listener_manager.listener_modified") == 10
    assert site.stat("cluster_manager.active_clusters") == 20


def test_statistics_go_with_what_they_belong_to(site):
    write(site.folder, "cds.yaml", "c2", "cluster.v3.Cluster", cluster("brief", 9))
    wait_until(lambda: site.stat("cluster_manager.active_clusters") == 1)
    assert "cluster.brief.upstream_cx_total" in site.admin("GET", "/stats")[1]
    write(site.folder, "cds.yaml", "c3", "cluster.v3.Cluster")
    wait_until(lambda: site.stat("cluster_manager.active_clusters") == 0)
    assert "cluster.brief." not in site.admin("GET", "/stats")[1]


def test_a_missing_file_stops_the_start(tmp_path):
    config = f"{ADMIN}dynamic_resources: {{cds_config: {source(tmp_path, 'nowhere.yaml')}}}\n"
    with Proxy(tmp_path, config, wait=False) as proxy:
        assert proxy.process.wait(PATIENCE) == 1
        assert "dynamic_resources.cds_config.path_config_source.path: paths must refer to an existing path in the system" in proxy.stderr


def test_what_is_not_honoured_is_refused_with_its_path_and_the_rest_is_used(site):
    bad = cluster("bad", 9).replace("connect_timeout: 30s", "connect_timeout: 1s, track_cluster_stats: {timeout_budgets: true}")
    write(site.folder, "cds.yaml", "c2", "cluster.v3.Cluster", bad, cluster("good", 9))
    wait_until(lambda: site.stat("cluster_manager.cds.update_rejected") == 1)
    assert "track_cluster_stats: bad: is not supported" in site.stderr
    dump = json.loads(site.admin("GET", "/config_dump?resource=dynamic_active_clusters")[1])
    assert [entry["cluster"]["name"] for entry in dump["configs"]] == ["good"]


# -- control planes that fail


class Plane:
    """A control plane for one kind of trouble, on a port that it keeps: `answer(request)` makes the bytes of the answers to each message of a stream."""

    def __init__(self, answer):
        self._answer = answer
        self.asked = 0
        self._server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("envoy.service.discovery.v3.AggregatedDiscoveryService", {"StreamAggregatedResources": handler})]
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def _serve(self, requests, context):
        for request in requests:
            self.asked += 1
            yield from self._answer(request)

    def close(self):
        self._server.stop(0).wait()


def with_plane(folder, port):
    control = cluster("control", port).replace("connect_timeout: 30s", "connect_timeout: 1s, http2_protocol_options: {}")
    ads = "{ads: {}, initial_fetch_timeout: 0.2s, resource_api_version: V3}"
    return f"""{ADMIN}node: {{id: n1, cluster: c}}
dynamic_resources:
  ads_config:
    {{api_type: GRPC, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: control,
     retry_policy: {{retry_back_off: {{base_interval: 0.01s, max_interval: 0.05s}}}}}}}}]}}
  cds_config: {ads}
  lds_config: {ads}
static_resources:
  listeners: {listener(0, HELLO, name="one")}
  clusters: {control}
"""


@pytest.mark.parametrize(
    ("what", "answers"),
    [
        ("garbage", lambda request: [b"\xff\xff\xff"]),
        ("nothing", lambda request: []),
        ("another type", lambda request: [b"\x22\x05wrong"]),
        ("empty answers", lambda request: [b""]),
    ],
)
def test_a_control_plane_that_makes_no_sense_stops_nothing(tmp_path, what, answers):
    plane = Plane(answers)
    try:
        with Proxy(tmp_path, with_plane(tmp_path, plane.port)) as proxy:
            wait_until(lambda: plane.asked >= 2)
            assert get(port(proxy)) == (200, "hello")
            assert proxy.admin("GET", "/ready") == (200, "LIVE\n")
            if what == "garbage":  # streams that cannot go on are begun again
                wait_until(lambda: plane.asked >= 6)
    finally:
        plane.close()


def test_a_control_plane_that_is_not_there_is_tried_again(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with Proxy(tmp_path, with_plane(tmp_path, sock.getsockname()[1])) as proxy:
            assert get(port(proxy)) == (200, "hello")
            wait_until(lambda: proxy.stat("cluster_manager.cds.update_failure") >= 3)
            wait_until(lambda: proxy.stat("control_plane.connected_state") == 0)  # 1 while it is tried, as in Envoy
            assert proxy.stat("cluster_manager.cds.init_fetch_timeout") == 1


def serving(*resources):
    """Answers to the first request of each type: (kind, YAML of a list) each."""
    response = messages.known("envoy.service.discovery.v3.DiscoveryResponse")
    request_type = messages.known("envoy.service.discovery.v3.DiscoveryRequest")

    def answer(data):
        request = request_type.FromString(data)
        if request.response_nonce:
            return []
        found = [{"@type": f"{T}.{kind}", **yaml.safe_load(text)[0]} for kind, text in resources if request.type_url == f"{T}.{kind}"]
        made = convert.to_message({"version_info": "v1", "nonce": "1", "type_url": request.type_url, "resources": found}, response)
        return [made.SerializeToString()]

    return answer


def test_the_last_configuration_is_used_while_the_control_plane_is_away(tmp_path):
    cache = tmp_path / "cache"
    plane = Plane(serving(("listener.v3.Listener", listener(0, HELLO.replace("hello", "kept"), name="two")), ("cluster.v3.Cluster", cluster("c", 9))))
    config = with_plane(tmp_path, plane.port).replace("initial_fetch_timeout: 0.2s", "initial_fetch_timeout: 60s")
    with Proxy(tmp_path, config, "--config-cache", str(cache)) as proxy:
        assert get(port(proxy, "two")) == (200, "kept")
        proxy.process.terminate()
        proxy.process.wait(PATIENCE)
    plane.close()
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == ["clusters", "listeners"]
    assert {path.stat().st_mode & 0o777 for path in cache.iterdir()} == {0o600}
    with Proxy(tmp_path, config, "--config-cache", str(cache)) as proxy:
        assert get(port(proxy, "two")) == (200, "kept")
        assert proxy.stat("cluster_manager.active_clusters") == 2
        assert proxy.stat("listener_manager.lds.config_cache_used") == 1
        assert "the control plane does not answer; using what was accepted" in proxy.stderr


@pytest.mark.parametrize("damage", [b"", b"\xff\xff", None])
def test_a_cache_that_cannot_be_used_is_no_obstacle(tmp_path, damage):
    cache = tmp_path / "cache"
    plane = Plane(serving(("cluster.v3.Cluster", cluster("c", 9))))
    config = with_plane(tmp_path, plane.port)
    with Proxy(tmp_path, config, "--config-cache", str(cache)) as proxy:
        wait_until(lambda: list(cache.glob("clusters-*.pb")))
        assert proxy.stat("cluster_manager.active_clusters") == 2
    plane.close()
    for path in cache.iterdir():
        path.write_bytes(damage) if damage is not None else path.unlink()
    with Proxy(tmp_path, config, "--config-cache", str(cache)) as proxy:
        assert get(port(proxy)) == (200, "hello")
        assert proxy.stat("cluster_manager.active_clusters") == 1


def test_a_cache_that_others_may_write_to_is_refused(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with Proxy(tmp_path, with_plane(tmp_path, 9), "--config-cache", str(cache), wait=False) as proxy:
        assert proxy.process.wait(PATIENCE) == 1
        assert f"--config-cache: others may write to {cache}" in proxy.stderr
