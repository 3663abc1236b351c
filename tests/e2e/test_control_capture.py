"""Traffic that is redirected to its sidecar, ours and real Envoys, in network namespaces with the rules that Istio has: see captured.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.proxy import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.envoy,
    pytest.mark.root,
    pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary"),
    pytest.mark.skipif(os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "ip", "iptables", "setpriv"))), reason="needs root, iptables and iproute2"),
]


@pytest.mark.parametrize("kind", ["envoy", "ours"])
def test_what_an_application_opens_is_redirected_to_its_sidecar(tmp_path, kind):
    command = ["unshare", "--net", "--kill-child", "--fork", sys.executable, "-m", "tests.e2e.captured", kind, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
