"""User instructions on the way to being ready, counted by callgrind, and that nothing is imported on it that costs much and is needed by few."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks import callgrind, processes
from benchmarks.configs import Place, Spec, envoy

# On one CPU. A child's count contains what its parent had counted before the fork: the largest is about the longest way, which is reading, checking, compiling.
BUDGETS = {"small": (Spec(), 435_000_000), "1,000 clusters": (Spec(clusters=1000), 1_450_000_000)}
NOT_AT_START = (
    "argparse", "cryptography", "dataclasses", "difflib", "envoy.config.bootstrap.v3.bootstrap_pb2", "envoy.config.core.v3.base_pb2", "hashlib", "ipaddress",
    "google.protobuf.text_format", "json", "pathlib", "re2", "urllib.parse", "yaml",
)  # fmt: skip
# A first child reads a large configuration while main imports these; it would take longer with them.
NOT_FOR_READING = (
    "asyncio", "base64", "google.protobuf.internal.python_message", "meshproxy.api.rules", "meshproxy.api.support", "meshproxy.worker", "socket", "struct",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not callgrind.available(), reason="valgrind is not installed: instructions of a start are NOT checked")
@pytest.mark.parametrize("name", BUDGETS)
def test_instructions_until_ready(name, tmp_path, tmp_path_factory, monkeypatch):
    spec, ceiling = BUDGETS[name]
    config = tmp_path / "envoy.json"
    config.write_text(envoy(spec, Place(tmp_path, processes.free_port(), processes.free_port(), processes.free_port())))
    wrapper = ["valgrind", "--tool=callgrind", "-q", "--trace-children=yes", f"--callgrind-out-file={tmp_path}/out.%p"]
    command = [sys.executable, "-m", "meshproxy", "-c", str(config), "-l", "error", "--concurrency", "1", "--mode", "init_only"]
    # Modules are compiled once, where nothing else is, and whether or not the surroundings let Python keep what it compiles.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.getbasetemp() / "pycache"))
    processes.run(command, limit_s=60)
    processes.run([*wrapper, *command], limit_s=240)
    counts = [int(re.search(r"^(?:totals|summary): (\d+)", file.read_text(), re.MULTILINE)[1]) for file in tmp_path.glob("out.*")]
    print(f"{name}: {max(counts):,} user instructions in the process with most of them; ceiling {ceiling:,}")
    assert len(counts) >= 4  # main, two that read and check, a worker
    assert max(counts) <= ceiling


def imported(code, names):
    """Which of `names` this code imports; not those that are deferred, nor what the interpreter's own start brought along (the finder of an editable
    installation does)."""
    code = (
        f"import sys; had = {{*sys.modules}}; {code}; loaded = {{name for name, module in sys.modules.items() if type(module) is type(sys)}};"
        " print(*({*sys.argv[1].split()} & loaded - had))"
    )
    return processes.run([sys.executable, "-c", code, " ".join(names)], limit_s=30).split()


def test_what_few_need_is_not_imported_at_start():
    assert imported("from meshproxy import cli, launch, supervisor", NOT_AT_START) == []


def test_what_is_for_others_is_not_imported_to_read_a_large_configuration():
    code = "from meshproxy import cli, launch; launch._convert([('value', {})], cli.Options())"
    assert imported(code, NOT_FOR_READING) == []


def test_what_only_main_looks_into_is_deferred_until_the_check():
    code = "from meshproxy import cli; cli.defer_little_used(); from meshproxy import launch, worker; from meshproxy.http import manager"
    assert imported(code, ["inspect", "ast", "tokenize"]) == []
    assert imported(f"{code}; from meshproxy import supervisor", ["inspect"]) == ["inspect"]  # by uvloop
