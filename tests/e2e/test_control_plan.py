"""`meshctl diff` and `meshctl apply` with a control plane and proxies: what is foretold is what happens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.proxy import PATIENCE, ROOT, wait_until
from tests.e2e.test_control_traffic import ALL_TO, Mesh, rules

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]


@pytest.mark.parametrize("kind", ["envoy", "ours"])
@pytest.mark.parametrize("flags", [[], ["--sotw"]], ids=["delta", "sotw"])
def test_what_is_foretold_happens(tmp_path, kind, flags):
    mesh = Mesh(tmp_path, kind)

    def meshctl(*arguments: str) -> tuple[int, str]:
        run = subprocess.run([sys.executable, "-m", "control", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, check=False)
        assert run.stderr == ""
        return run.returncode, run.stdout

    def diff() -> tuple[int, set[tuple[str, str, str]]]:
        status, said = meshctl("diff", str(wanted), "--server", mesh.control.address, "-o", "json")
        return status, {(one["type"], one["name"], one["change"]) for proxy in json.loads(said) for one in proxy["changes"]}

    try:
        mesh.sidecar("web", *flags)
        wanted = tmp_path / "wanted"
        shutil.copytree(mesh.folder, wanted)
        wait_until(lambda: diff() == (0, set()))
        (wanted / "rules.yaml").write_text(rules(ALL_TO.format("v2")))
        (wanted / "v1.yaml").unlink()
        host = "reviews.default.svc.cluster.local"
        expected = {("route", name, "changed") for name in ("http_proxy", f"{host}:9080")}
        expected |= {("endpoints", f"outbound|9080|{subset}|{host}", "changed") for subset in ("", "v1")}
        assert diff() == (1, expected)
        assert set(mesh.who(20)) == {"v1", "v2"}  # nothing has happened yet

        status, said = meshctl("apply", str(wanted), "--to", str(mesh.folder), "--prune")
        assert status == 0
        assert said.splitlines()[:2] == ["VirtualService default/reviews created", "Workload default/reviews-v1 deleted"]
        wait_until(lambda: set(mesh.who(20)) == {"v2"})
        wait_until(lambda: diff() == (0, set()))
    finally:
        mesh.close()
