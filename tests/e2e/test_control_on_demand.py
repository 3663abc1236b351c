"""`meshctl serve --scope observed` over the real Envoy and over our own: a sidecar has what its application calls, from the first request on, and no more."""

from __future__ import annotations

import http.client
import json

import pytest
import yaml

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane, Service, fetch
from tests.e2e.proxy import PATIENCE, wait_until
from tests.e2e.test_control_traffic import ALL_TO, Mesh, rules

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]
HTTPBIN = """
{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: {name}}}, spec: {{hosts: [{name}.test], resolution: {resolution},
  ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{{address: {address}, ports: {{http: {port}}}}}]}}}}
"""


class Scoped(Mesh):
    """The same without a port of its own for reviews: everything goes by the HTTP proxy."""

    flags = ("--scope", "observed")

    def __init__(self, work, kind):
        super().__init__(work, kind)
        web = yaml.safe_load((self.folder / "web.yaml").read_text())
        del web["spec"]["sidecar"]["outbound"]
        self.write("web.yaml", json.dumps(web))
        self.serve(*self.flags)

    def serve(self, *flags):
        self.control.kill()
        self.control = ControlPlane(self.folder, self.work, self.control.address, list(flags))
        self.control.start()

    def get(self, host: str, **headers: str) -> tuple[int, str]:
        """Status, and who answers."""
        status, body = fetch(self.proxy_port, f"http://{host}/", host=host, **headers)
        return status, body.get("name", "")

    def put(self, host: str) -> int:
        """The status of a request with a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy_port, timeout=PATIENCE)
        connection.request("PUT", f"http://{host}/", body=b"x" * 1000, headers={"host": host})
        status = connection.getresponse().status
        connection.close()
        return status

    def seen(self) -> set[str]:
        """The services of which it has clusters."""
        found = self.control.ask("proxy-config", "clusters", "web.default")
        return {one["name"].split("|")[3] for one in found if one["name"].startswith("outbound|")}


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Scoped(tmp_path, request.param)
    other = Service("other")
    for name, resolution, address in (("other", "STATIC", "127.0.0.1"), ("named", "DNS", "localhost"), ("unused", "STATIC", "127.0.0.1")):
        made.write(f"{name}.yaml", HTTPBIN.format(name=name, resolution=resolution, address=address, port=other.port))
    yield made
    made.close()
    other.close()


REVIEWS = "reviews.default.svc.cluster.local"


def test_the_first_request_waits_for_what_it_needs(mesh):
    mesh.sidecar()
    assert mesh.seen() == set()
    assert mesh.get("reviews:9080")[0] == 200
    assert mesh.seen() == {REVIEWS}
    assert mesh.get("other.test") == (200, "other")
    assert mesh.put("named.test") == 200, "with a body, and its names are resolved first"
    assert mesh.seen() == {REVIEWS, "other.test", "named.test"}
    assert [mesh.get("nobody:80")[0] for _ in range(3)] == [502, 502, 502], "as without a scope"
    assert mesh.get(f"{REVIEWS}:9080")[0] == 200, "another name of it"
    status = mesh.control.status("web.default")
    assert [status[column] for column in ("CDS", "EDS", "LDS", "RDS")] == ["SYNCED"] * 4


def test_what_changes_reaches_who_has_called_it(mesh):
    mesh.sidecar()
    assert mesh.get("reviews:9080")[0] == 200
    assert mesh.get("later.test:80")[0] == 502
    mesh.write("rules.yaml", rules(ALL_TO.format("v2")))
    wait_until(lambda: {mesh.get("reviews:9080") for _ in range(4)} == {(200, "v2")})
    mesh.write("later.yaml", HTTPBIN.format(name="later", resolution="STATIC", address="127.0.0.1", port=mesh.services["v1"].port))
    wait_until(lambda: mesh.get("later.test:80") == (200, "v1"))
    # Rules send elsewhere: what they name comes along.
    elsewhere = {"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "reviews"},
                 "spec": {"hosts": ["reviews"], "http": [{"route": [{"destination": {"host": "other.test", "port": {"number": 80}}}]}]}}  # fmt: skip
    mesh.write("rules.yaml", json.dumps(elsewhere))
    wait_until(lambda: mesh.get("reviews:9080") == (200, "other"))
    (mesh.folder / "later.yaml").unlink()
    wait_until(lambda: mesh.get("later.test:80")[0] == 502)


def test_another_control_plane_knows_what_was_called(mesh):
    mesh.sidecar()
    assert mesh.get("reviews:9080")[0] == 200
    mesh.control.kill()
    assert mesh.get("reviews:9080")[0] == 200
    mesh.control.start()
    wait_until(lambda: any(one["name"] == "web.default" and one["RDS"] == "SYNCED" for one in mesh.control.ask("proxy-status")))
    assert mesh.get("reviews:9080")[0] == 200
    assert mesh.get("other.test") == (200, "other")
    wait_until(lambda: mesh.seen() == {REVIEWS, "other.test"})


def test_a_workload_says_so_itself(mesh):
    """And goes back to everything while requests are on their way."""
    mesh.serve("--scope", "all")
    web = yaml.safe_load((mesh.folder / "web.yaml").read_text())
    mesh.sidecar()
    assert REVIEWS in mesh.seen()
    assert "unused.test" in mesh.seen()
    for scope, expected in (("observed", {REVIEWS}), ("all", {REVIEWS, "other.test", "named.test", "unused.test"})):
        web["spec"]["sidecar"]["scope"] = scope
        mesh.write("web.yaml", json.dumps(web))

        def answered(expected: set[str] = expected) -> bool:
            assert mesh.get("reviews:9080")[0] == 200
            return mesh.seen() == expected

        wait_until(answered)


def test_what_is_not_called_is_forgotten_and_asked_for_again(mesh):
    if mesh.kind == "envoy":
        pytest.skip("it does not ask again, so that nothing may be taken from it")
    mesh.serve("--scope", "observed", "--forget-after", "20s")
    mesh.sidecar()
    assert mesh.get("reviews:9080")[0] == 200
    assert mesh.get("other.test") == (200, "other")

    def forgotten() -> bool:
        assert mesh.get("other.test") == (200, "other")
        seen = mesh.seen()
        assert "other.test" in seen, "it is called all the time"
        return REVIEWS not in seen

    wait_until(forgotten, limit=3 * PATIENCE)
    assert mesh.get("reviews:9080")[0] == 200
    assert mesh.seen() == {REVIEWS, "other.test"}
