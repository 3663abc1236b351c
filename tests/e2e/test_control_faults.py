"""A control plane that goes wrong, under traffic: hung, back with something else, talking nonsense, on a full disk, away until certificates have expired.

Requests go on, what is wrong is said in the log and in statistics, and everything is right again by itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
import grpc
import pytest
import yaml

from meshproxy.api import convert, messages
from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import fetch, write
from tests.e2e.proxy import ADMIN, HELLO, PATIENCE, Proxy, cluster, get, listener, wait_until
from tests.e2e.test_control_traffic import ALL_TO, Mesh, rules
from tests.e2e.test_mtls import SDS, client_config, flowing, server_config
from tests.e2e.test_mtls import Mesh as Authority
from tests.unit.ca_help import API, WEB

pytestmark = pytest.mark.slow
T = "type.googleapis.com/envoy.config."
NEEDS_ENVOY = pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")


class Asking:
    """Somebody who asks all the time, and notes whatever is not a 200."""

    def __init__(self, ask: Callable[[], int]) -> None:
        self._ask = ask
        self._ended = threading.Event()
        self.served = 0
        self.failed: list[object] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                status = self._ask()
            except OSError as error:
                self.failed.append(error)
                continue
            if status == 200:
                self.served += 1
            else:
                self.failed.append(status)

    def wait_more(self, count: int = 20) -> None:
        """Until so many more were served."""
        before = self.served
        wait_until(lambda: self.served >= before + count or self.failed)

    @classmethod
    @contextlib.contextmanager
    def around(cls, ask: Callable[[], int]) -> Iterator[Asking]:
        """None of the requests within the block may fail."""
        made = cls(ask)
        made._thread.start()
        try:
            made.wait_more()
            yield made
            made.wait_more()
        finally:
            made._ended.set()
            made._thread.join()
        assert made.failed == []


# -- ours and the real Envoy, under our control plane


@pytest.fixture(params=[pytest.param("envoy", marks=[pytest.mark.envoy, NEEDS_ENVOY]), "ours"])
def mesh(request, tmp_path):
    made = Mesh(tmp_path, request.param)
    yield made
    made.close()


def quick(bootstrap: str) -> str:
    """The same bootstrap, with less patience for a connection on which nobody answers."""
    made = yaml.safe_load(bootstrap)
    for one in made["static_resources"]["clusters"]:
        (options,) = one["typed_extension_protocol_options"].values()
        options["explicit_http_config"]["http2_protocol_options"]["connection_keepalive"] = {"interval": "0.3s", "timeout": "0.3s"}
    (service,) = made["dynamic_resources"]["ads_config"]["grpc_services"]
    service["envoy_grpc"]["retry_policy"] = {"retry_back_off": {"base_interval": "0.05s", "max_interval": "0.2s"}}
    return yaml.safe_dump(made)


def sidecar(mesh: Mesh) -> Proxy:
    """The sidecar of `web`, which notices soon that nobody answers."""
    folder = mesh.work / "web"
    folder.mkdir()
    command = [envoy_binary() or "envoy", "--disable-hot-restart"] if mesh.kind == "envoy" else None
    proxy = Proxy(folder, quick(mesh.control.bootstrap("web")), "--concurrency", "1", "-l", "warning", command=command)
    mesh.proxies.append(proxy)
    return proxy


def test_a_control_plane_that_hangs(mesh):
    proxy = sidecar(mesh)
    wait_until(lambda: fetch(mesh.port)[0] == 200)
    with Asking.around(lambda: fetch(mesh.port)[0]) as asking:
        wait_until(lambda: proxy.stat("control_plane.connected_state") == 1)
        mesh.control.process.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: proxy.stat("control_plane.connected_state") == 0)
            mesh.write("rules.yaml", rules(ALL_TO.format("v2")))
            asking.wait_more()
            assert proxy.admin("GET", "/ready") == (200, "LIVE\n")
        finally:
            mesh.control.process.send_signal(signal.SIGCONT)
        wait_until(lambda: set(mesh.who(20)) == {"v2"})
        wait_until(lambda: proxy.stat("control_plane.connected_state") == 1)
    assert mesh.control.status("web.default")["RDS"] == "SYNCED"
    assert set(mesh.who(20)) == {"v2"}


def test_a_control_plane_that_is_back_with_something_else(mesh):
    """What went while it was away goes, although nobody was told of it; a version that it calls as one before is not taken for that one."""
    mesh.write("other.yaml", "{apiVersion: v1, kind: Service, metadata: {name: other}, spec: {ports: [{name: http, port: 80}]}}")
    proxy = sidecar(mesh)
    name = "outbound|80||other.default.svc.cluster.local"
    wait_until(lambda: f"{name}::" in proxy.admin("GET", "/clusters")[1])
    with Asking.around(lambda: fetch(mesh.port)[0]):
        for subset in ("v1", "v2", "v1"):
            mesh.control.kill()
            mesh.write("rules.yaml", rules(ALL_TO.format(subset)))
            (mesh.folder / "other.yaml").unlink(missing_ok=True)
            mesh.control.start()
            wait_until(lambda: set(mesh.who(20)) == {subset})  # noqa: B023
    wait_until(lambda: f"{name}::" not in proxy.admin("GET", "/clusters")[1])
    assert set(mesh.who(20)) == {"v1"}


def test_a_control_plane_whose_folder_is_gone(mesh):
    sidecar(mesh)
    with Asking.around(lambda: fetch(mesh.port)[0]):
        away = mesh.folder.with_name("away")
        mesh.folder.rename(away)
        wait_until(lambda: "serving what was there last" in mesh.control.log())
        assert set(mesh.who(10)) == {"v1", "v2"}
        write(away, "rules.yaml", rules(ALL_TO.format("v2")))
        away.rename(mesh.folder)
        wait_until(lambda: set(mesh.who(20)) == {"v2"})


# -- nonsense by delta; that of the state of the world is in test_dynamic

DELTA = "envoy.service.discovery.v3.DeltaDiscoveryResponse"


class Plane:
    """A delta control plane that says to each first request of a type what `says` has for it, and then whatever is put into `more`. `nacks`: complaints."""

    def __init__(self, says: dict[str, list[bytes]]) -> None:
        self.says = says
        self.more: list[bytes | None] = []
        self.once: list[bytes] = []
        self.nacks: list[str] = []
        self.acks: list[str] = []
        self.streams = 0
        self._woken = threading.Condition()
        self._ended = False
        self._server = grpc.server(ThreadPoolExecutor(8))
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("envoy.service.discovery.v3.AggregatedDiscoveryService", {"DeltaAggregatedResources": handler})]
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def _serve(self, requests, context):
        self.streams += 1
        out: list[bytes] = []
        over = []

        def read() -> None:
            seen = set()
            with contextlib.suppress(grpc.RpcError, Exception):
                for data in requests:
                    request = messages.known("envoy.service.discovery.v3.DeltaDiscoveryRequest").FromString(data)
                    with self._woken:
                        if request.response_nonce:
                            (self.nacks if request.HasField("error_detail") else self.acks).append(request.error_detail.message or request.response_nonce)
                        kind = request.type_url.removeprefix(T)
                        if kind not in seen:
                            seen.add(kind)
                            out.extend(self.says.get(kind, ()))
                        self._woken.notify_all()
            with self._woken:
                over.append(True)
                self._woken.notify_all()

        threading.Thread(target=read, daemon=True).start()
        told = 0
        while True:
            with self._woken:
                self._woken.wait_for(lambda told=told: out or told < len(self.more) or over or self._ended, PATIENCE)
                if over or self._ended:
                    return
                going, out[:] = [*out, *self.more[told:]], []
                told = len(self.more)
                self.more[:] = [None if one in self.once else one for one in self.more]
            yield from (one for one in going if one is not None)

    def say(self, *responses: bytes, once: bool = False) -> None:
        """To streams that there are and will be, or to one stream only."""
        with self._woken:
            self.more.extend(responses)
            self.once.extend(responses if once else ())
            self._woken.notify_all()

    def close(self) -> None:
        with self._woken:
            self._ended = True
            self._woken.notify_all()
        self._server.stop(0).wait()


_NONCES = itertools.count(1)


def delta(kind: str, *resources: dict, removed: tuple[str, ...] = (), nonce: str = "", version: str = "v") -> bytes:
    """A response; resources are (name, value)."""
    wrapped = [
        {"name": one.get("name") or one["cluster_name"], "version": f"{version}{next(_NONCES)}", "resource": {"@type": T + kind, **one}} for one in resources
    ]
    made = {
        "type_url": T + kind,
        "nonce": nonce or str(next(_NONCES)),
        "system_version_info": version,
        "resources": wrapped,
        "removed_resources": list(removed),
    }
    return convert.to_message(made, messages.known(DELTA)).SerializeToString()


def of(text: str) -> dict:
    """The one item of a YAML list."""
    (found,) = yaml.safe_load(text)
    return found


def status(port: int) -> int:
    return get(port)[0]


def port_of(proxy: Proxy, name: str) -> int:
    return next((int(line.rpartition(":")[2]) for line in proxy.admin("GET", "/listeners")[1].splitlines() if line.startswith(f"{name}::")), 0)


def with_plane(port: int) -> str:
    control = cluster("control", port).replace("connect_timeout: 30s", "connect_timeout: 30s, http2_protocol_options: {}")
    ads = "{ads: {}, initial_fetch_timeout: 5s, resource_api_version: V3}"
    retry = "retry_policy: {retry_back_off: {base_interval: 0.01s, max_interval: 0.05s}}"
    return f"""{ADMIN}node: {{id: n1, cluster: c}}
dynamic_resources:
  ads_config: {{api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: control, {retry}}}}}]}}
  cds_config: {ads}
  lds_config: {ads}
static_resources:
  clusters: {control}
"""


CLUSTER, LISTENER = "cluster.v3.Cluster", "listener.v3.Listener"
GOOD = of(cluster("good", 9))
ONE = of(listener(0, HELLO, name="one"))


@pytest.fixture
def plane(tmp_path):
    made = Plane({CLUSTER: [delta(CLUSTER, GOOD)], LISTENER: [delta(LISTENER, ONE)]})
    yield made
    made.close()


@pytest.fixture
def proxy(plane, tmp_path):
    with Proxy(tmp_path, with_plane(plane.port), "--concurrency", "1", "-l", "info") as made:
        yield made


NONSENSE = {
    "bytes that are no message": b"\xff\xff\xff",
    "an empty response": b"",
    "a type that nobody asked for": convert.to_message({"type_url": T + "nonsense", "nonce": "n"}, messages.known(DELTA)).SerializeToString(),
    "the same name twice": delta(CLUSTER, GOOD, {**GOOD, "connect_timeout": "7s"}),
    "a resource of another type": convert.to_message(
        {"type_url": T + CLUSTER, "nonce": "w", "resources": [{"name": "one", "version": "1", "resource": {"@type": T + LISTENER, **ONE}}]},
        messages.known(DELTA),
    ).SerializeToString(),
    "a name that is not the resource's": delta(CLUSTER, GOOD).replace(b"\x1a\x04good", b"\x1a\x04evil", 1),
    "gone what was never there": delta(CLUSTER, removed=("never", "", "*")),
    "a resource that is no message": convert.to_message(
        {"type_url": T + CLUSTER, "nonce": "b", "resources": [{"name": "bad", "version": "1"}]}, messages.known(DELTA)
    ).SerializeToString(),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_by_delta_stops_nothing(plane, proxy, what):
    with Asking.around(functools.partial(status, port_of(proxy, "one"))):
        plane.say(NONSENSE[what], once=True)
        # What is said after it counts, on this stream or on the next.
        plane.say(delta(CLUSTER, of(cluster("after", 9))))
        wait_until(lambda: "after::" in proxy.admin("GET", "/clusters")[1])
        assert "good::" in proxy.admin("GET", "/clusters")[1]
    if what in ("the same name twice", "a resource of another type"):
        assert plane.nacks
    assert proxy.workers()


def test_one_nonce_for_everything(plane, proxy):
    """Answers say the nonce of what they answer; one that comes again is answered again."""
    for number in range(3):
        plane.say(delta(CLUSTER, of(cluster(f"c{number}", 9)), nonce="same"))
    wait_until(lambda: all(f"c{number}::" in proxy.admin("GET", "/clusters")[1] for number in range(3)))
    wait_until(lambda: plane.acks.count("same") == 3)
    assert plane.nacks == []


def test_half_a_snapshot(plane, proxy):
    """A listener whose cluster never comes is used, and says so to those who ask: everybody else goes on."""
    to_nowhere = listener(0, "{match: {prefix: /}, route: {cluster: late}}", name="half").replace(
        "route_config: {", "route_config: {validate_clusters: false, "
    )
    with Asking.around(functools.partial(status, port_of(proxy, "one"))):
        plane.say(delta(LISTENER, of(to_nowhere)))
        at = wait_until(lambda: port_of(proxy, "half"))
        assert get(at)[0] == 503
        assert proxy.stat("http.half.no_cluster") == 1
        other = port_of(proxy, "one")
        plane.say(delta(CLUSTER, of(cluster("late", other))))
        wait_until(lambda: get(at) == (200, "hello"))


def test_a_cluster_whose_endpoints_never_come(plane, proxy):
    """It warms and is not in use; what is behind it in the response is."""
    source = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
    late = {"name": "late", "type": "EDS", "connect_timeout": "1s", "eds_cluster_config": {"eds_config": source}}
    plane.say(delta(CLUSTER, late, of(cluster("after", 9))))
    wait_until(lambda: "after::" in proxy.admin("GET", "/clusters")[1])
    assert proxy.stat("cluster_manager.warming_clusters") == 1
    assert get(port_of(proxy, "one")) == (200, "hello")
    plane.say(delta("endpoint.v3.ClusterLoadAssignment", {"cluster_name": "late", "endpoints": []}))
    wait_until(lambda: proxy.stat("cluster_manager.warming_clusters") == 0)


# -- a disk that is full; that of the authority is in tests/unit


def test_a_full_disk_costs_the_cache_and_nothing_else(plane, tmp_path):
    """Big files cannot be written for a while; afterwards the cache is there without anybody doing anything."""
    cache, many = tmp_path / "cache", [of(cluster(f"c{number}", 9)) for number in range(500)]
    flags = ["--concurrency", "1", "-l", "warning", "--config-cache", str(cache)]
    with Proxy(tmp_path, with_plane(plane.port), *flags) as proxy:
        (kept,) = wait_until(lambda: list(cache.glob("clusters-*.pb")))
        before = kept.read_bytes()
        _, hard = resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        with Asking.around(functools.partial(status, port_of(proxy, "one"))):
            plane.say(delta(CLUSTER, *many))
            wait_until(lambda: f"cannot write {kept}: File too large" in proxy.stderr)
            assert proxy.stat("cluster_manager.active_clusters") == 502
            assert kept.read_bytes() == before
            assert list(cache.glob("*.new")) == []
        resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        wait_until(lambda: len(kept.read_bytes()) > 20_000)
        assert proxy.stderr.count("cannot write") == 1
    plane.close()
    again = tmp_path / "again"
    again.mkdir()
    with Proxy(again, with_plane(plane.port), *flags) as proxy:
        assert proxy.stat("cluster_manager.active_clusters") == 502
        assert get(port_of(proxy, "one")) == (200, "hello")


# -- the authority


async def test_the_authority_is_away_until_certificates_have_expired(tmp_path, monkeypatch):
    """Until then every request is served, on new connections, too. Afterwards nobody is spoken to without a valid certificate, until the authority is back."""
    async with Authority(tmp_path, life_s=6) as mesh:
        server = await mesh.start("ours", "server", server_config(await mesh.agent(API), SDS))
        client = await mesh.start("ours", "client", client_config(await mesh.agent(WEB), server, SDS))
        async with flowing(client.port()) as traffic:
            await traffic.wait_until(lambda: len(traffic.serials) >= 2)
            with monkeypatch.context() as patched:  # what is behind it waits for it to come back
                patched.setattr("control.ca.server.shutil.rmtree", lambda *_, **__: None)
                await mesh.front.stop()
            expires = min(agent.provider.svid.not_after for agent in mesh.agents.values())
            served = traffic.served
            await traffic.wait_until(lambda: traffic.failed)
            assert time.time() >= expires - 1  # certificates count whole seconds
            assert traffic.served > served + 5
            assert all(failure.startswith("503") for failure in traffic.failed)
            known = len(traffic.serials)
            await mesh.front.start()
            await traffic.wait_until(lambda: len(traffic.serials) > known)
            calm = [0, 0]  # served and failed, when something last failed

            def is_calm() -> bool:
                if len(traffic.failed) != calm[1]:
                    calm[:] = traffic.served, len(traffic.failed)
                return traffic.served >= calm[0] + 20

            await traffic.wait_until(is_calm)
