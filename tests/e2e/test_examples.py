"""What the README's first command runs, as far as it needs no ports of its own choice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_mesh_of_the_demo():
    done = subprocess.run([sys.executable, "examples/mesh/run.py"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "you get prices v1, ann gets v2" in done.stdout
    assert done.stdout.endswith("All ended.\n")
