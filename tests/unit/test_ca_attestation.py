"""Who a caller is, by the process that it is, by the certificate that it has, or by a Kubernetes token."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Self

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from control.api_server import Access, ApiServer
from control.ca import certificates
from control.ca.attestation import AttestorUnavailable, Caller, PeerCredentials, Rejected, Renewals, UnixPeers
from control.ca.authority import Authority
from control.ca.csr import parse_csr
from control.ca.kubernetes import KubernetesTokens
from control.ca.rotation import DAY
from control.ca.token_review import TokenReviews
from meshproxy.api.renewal import signed_text
from tests.unit.ca_help import API, NOW, WEB, Clock, csr

REQUEST = parse_csr(csr())


async def test_processes():
    peers = UnixPeers()
    peers.register(WEB, uid=1000, pid=7)
    peers.register(API, uid=1001)
    for peer, found in [(PeerCredentials(7, 1000, 0), (WEB,)), (PeerCredentials(8, 1001, 0), (API,))]:
        assert await peers.attest(Caller(peer=peer), REQUEST) == found
    assert await peers.attest(Caller(tokens=("x",)), REQUEST) is None
    for peer in (PeerCredentials(8, 1000, 0), PeerCredentials(7, 1002, 0)):
        with pytest.raises(Rejected, match=f"process {peer.pid} of user {peer.uid}"):
            await peers.attest(Caller(peer=peer), REQUEST)
    peers.unregister(7)
    with pytest.raises(Rejected):
        await peers.attest(Caller(peer=PeerCredentials(7, 1000, 0)), REQUEST)


class Holder:
    """Somebody with a certificate of an authority."""

    def __init__(self, folder, clock) -> None:
        self.authority = Authority(str(folder), "mesh.test", clock=clock)
        self.key = certificates.new_key()
        self.issued = self.authority.issue(parse_csr(csr(key=self.key)), [WEB])
        self.csr = csr()

    def caller(self, *, key=None, text=None, chain=None) -> Caller:
        proof = (key or self.key).sign(signed_text(text or self.csr), ec.ECDSA(hashes.SHA256()))
        return Caller(proof_chain=certificates.pem(*(chain or self.issued.chain)), proof=proof, csr=self.csr)


async def test_renewals(tmp_path):
    clock = Clock()
    holder, stranger = Holder(tmp_path / "ca", clock), Holder(tmp_path / "other", clock)
    renewals = Renewals("mesh.test", holder.authority.bundle, clock=clock, grace_s=3600)
    assert await renewals.attest(Caller(), REQUEST) is None
    assert await renewals.attest(holder.caller(), REQUEST) == (WEB,)
    assert await renewals.attest(Caller(certificate=certificates.pem(holder.issued.chain[0])), REQUEST) == (WEB,)
    leaf, intermediate = holder.issued.chain
    below = certificates.make_leaf(certificates.new_key().public_key(), leaf, holder.key, API, NOW, DAY)
    for caller, why in [
        (holder.caller(key=stranger.key), "not signed by the certificate's key"),
        (holder.caller(text="another request"), "not signed by the certificate's key"),
        (stranger.caller(), "is not ours"),
        (holder.caller(chain=(leaf,)), "is not ours"),
        (holder.caller(chain=(below, leaf, intermediate)), "is not ours"),
        (holder.caller(chain=(intermediate,)), "not signed by the certificate's key"),
        (Caller(proof_chain="garbage", proof=b"", csr=holder.csr), "cannot be read"),
        (Caller(proof_chain="x" * 20000, proof=b"", csr=holder.csr), "more than 16384 bytes"),
    ]:
        with pytest.raises(Rejected, match=why):
            await renewals.attest(caller, REQUEST)
    for after, good in [(DAY - 1, True), (DAY + 3599, True), (-3600, True), (DAY + 3601, False)]:
        clock.now = NOW + after
        if good:
            assert await renewals.attest(holder.caller(), REQUEST) == (WEB,)
        else:
            with pytest.raises(Rejected, match="expired too long ago"):
                await renewals.attest(holder.caller(), REQUEST)


class FakeApiServer:
    """Answers TokenReviews as an API server does: says whose a token is if it is for one of the audiences asked about."""

    def __init__(self) -> None:
        self.tokens: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.calls: list[tuple[str, str, dict]] = []
        self.status, self.body = 201, b""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fake.calls.append((self.path, self.headers.get("authorization", ""), asked))
                body = fake.body or json.dumps({**asked, "status": fake.review(asked["spec"])}).encode()
                self.send_response(fake.status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def review(self, spec: dict) -> dict:
        name, audiences = self.tokens.get(spec["token"], ("", ()))
        common = [one for one in audiences if one in spec["audiences"]]
        if not common:
            return {"authenticated": False, "user": {}, "error": "token is not valid for these audiences"}
        return {"authenticated": True, "user": {"username": name, "groups": ["system:serviceaccounts"]}, "audiences": common}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def api_server():
    fake = FakeApiServer()
    yield fake
    fake.close()


class Reviews(TokenReviews):
    """By the API server at a URL, with the token in a file."""

    def __init__(self, url: str, folder: Path, token_file: str = "") -> None:
        user = {"tokenFile": token_file} if token_file else {}
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(
            json.dumps({
                "clusters": [{"name": "c", "cluster": {"server": url}}],
                "users": [{"name": "u", "user": user}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            })
        )  # fmt: skip
        self.server = ApiServer(Access(str(kubeconfig)))
        super().__init__(self.server)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()


async def test_kubernetes(api_server, tmp_path):
    (tmp_path / "token").write_text("ours\n")
    api_server.tokens = {
        "good": ("system:serviceaccount:shop:web", ("istio-ca",)),
        "elsewhere": ("system:serviceaccount:shop:web", ("https://kubernetes.default.svc",)),
        "person": ("kubernetes-admin", ("istio-ca",)),
        "odd": ("system:serviceaccount:shop", ("istio-ca",)),
        "path": ("system:serviceaccount:shop:../x", ("istio-ca",)),
    }
    async with Reviews(api_server.url, tmp_path, str(tmp_path / "token")) as reviews:
        await check_kubernetes(KubernetesTokens("mesh.test", reviews), api_server)


async def check_kubernetes(attestor, api_server):
    assert [str(one) for one in await attestor.attest(Caller(tokens=("good",)), REQUEST)] == ["spiffe://mesh.test/ns/shop/sa/web"]
    path, authorization, asked = api_server.calls[0]
    assert (path, authorization) == ("/apis/authentication.k8s.io/v1/tokenreviews", "Bearer ours")
    assert asked["spec"] == {"token": "good", "audiences": ["istio-ca"]}
    assert await attestor.attest(Caller(tokens=("mpj_joining",)), REQUEST) is None
    for token, why in [
        ("unknown", "not valid"), ("elsewhere", "not valid"), ("person", "no service account"), ("odd", "no service account"), ("path", "no segment"),
        ("x" * 20000, "too long"),
    ]:  # fmt: skip
        with pytest.raises(Rejected, match=why):
            await attestor.attest(Caller(tokens=(token,)), REQUEST)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (403, b"{}", AttestorUnavailable),
        (500, b"", AttestorUnavailable),
        (201, b"garbage", AttestorUnavailable),
        (201, b"[]", AttestorUnavailable),
        (201, b'{"status": 1}', AttestorUnavailable),
        (201, b'{"status": {"authenticated": "yes"}}', Rejected),
        # An API server that knows no audiences says none: then the token may be meant for anybody.
        (201, b'{"status": {"authenticated": true, "user": {"username": "system:serviceaccount:a:b"}}}', Rejected),
        (201, b'{"status": {"authenticated": true, "audiences": ["istio-ca"], "user": 3}}', Rejected),
    ],
)
async def test_what_api_servers_may_answer(api_server, tmp_path, status, body, error):
    api_server.status, api_server.body = status, body
    async with Reviews(api_server.url, tmp_path) as reviews:
        with pytest.raises(error):
            await KubernetesTokens("mesh.test", reviews).attest(Caller(tokens=("good",)), REQUEST)


async def test_an_api_server_that_is_away(api_server, tmp_path):
    url = api_server.url
    api_server.server.server_close()
    for token_file in ("", str(tmp_path / "none")):
        async with Reviews(url, tmp_path, token_file) as reviews:
            with pytest.raises(AttestorUnavailable, match="could not be asked"):
                await KubernetesTokens("mesh.test", reviews).attest(Caller(tokens=("good",)), REQUEST)
