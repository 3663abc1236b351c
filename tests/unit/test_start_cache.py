"""The cache of a start's modules: written by the first start, used by later ones, never trusted beyond what the sources say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import meshproxy
from tests.polling import PATIENCE

START = [sys.executable, "-m", "meshproxy", "--config-yaml", "{admin: {}}", "-l", "error", "--mode", "init_only"]
# Imports what a start imports; prints how many modules came from the cache, and for the named ones whether they did, and their file.
IMPORT = """
import sys
from meshproxy import start_cache
start_cache.install()
from meshproxy import cli, launch, worker
def cached(module): return type(getattr(module.__spec__, "loader", None)) is start_cache._Loader
count = sum(cached(module) for module in sys.modules.values() if type(module) is type(sys))
print(count, cached(launch), cached(worker), worker.__file__, launch.__spec__.cached)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A copy of the package, whose `.pyc` files are in a folder of their own."""
    package = tmp_path / "source" / "meshproxy"
    shutil.copytree(Path(meshproxy.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "pycache"))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stderr == ""
    return done.stdout


def caches(place):
    return [*(place / "pycache").rglob("start-*.cache")]


def imported() -> tuple[int, bool, bool, str, str]:
    count, launch, worker, file, pyc = run([sys.executable, "-c", IMPORT]).split()
    return int(count), launch == "True", worker == "True", file, pyc


def test_first_start_writes_it_and_others_use_it(place):
    assert imported()[0] == 0
    run(START)
    [cache] = caches(place)
    written = cache.stat().st_mtime_ns
    count, launch, worker, file, pyc = imported()
    assert count > 150
    assert launch
    assert worker
    assert file == str(place / "source/meshproxy/worker.py")
    assert pyc.startswith(str(place / "pycache"))
    run(START)
    assert [(found, found.stat().st_mtime_ns) for found in caches(place)] == [(cache, written)]


def test_module_with_another_source_is_imported_from_it(place):
    run(START)
    [cache] = caches(place)
    written = cache.stat().st_mtime_ns
    worker = place / "source/meshproxy/worker.py"
    worker.write_text(worker.read_text() + "\n# changed\n")
    count, launch, from_cache, _, _ = imported()
    assert count > 150
    assert launch
    assert not from_cache
    run(START)
    assert cache.stat().st_mtime_ns > written
    assert imported()[2]


def test_module_that_went_away_is_not_found(place):
    find = "import sys; from meshproxy import start_cache; start_cache.install(); print(sys.meta_path[0].find_spec('meshproxy.worker') is not None)"
    run(START)
    assert run([sys.executable, "-c", find]) == "True\n"
    (place / "source/meshproxy/worker.py").unlink()
    assert run([sys.executable, "-c", find]) == "False\n"


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:20], lambda data: data[: len(data) // 2], lambda data: b"\xff" * len(data)])
def test_damaged_one_is_passed_over_and_replaced(place, damage):
    run(START)
    [cache] = caches(place)
    good = cache.read_bytes()
    cache.write_bytes(damage(good))
    assert imported()[2] is False
    run(START)
    assert len(cache.read_bytes()) == len(good)
    assert imported()[2] is True


def test_none_where_python_shall_not_write(place, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    run(START)
    assert caches(place) == []


def test_few_are_kept(place, monkeypatch):
    for number in range(6):  # each module path has its own
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place / "source"), str(place / f"other{number}")]))
        run(START)
    assert len(caches(place)) == 4
    assert imported()[2]


def test_what_was_left_half_written_is_removed(place):
    run(START)
    [cache] = caches(place)
    old, new = cache.with_name(f"{cache.name}.1"), cache.with_name(f"{cache.name}.2")
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.unlink()
    run(START)
    assert sorted(cache.parent.glob("start-*")) == [cache, new], "the other one may be being written"


def test_nobody_else_may_write_it(place):
    run(["sh", "-c", 'umask 0; exec "$@"', "-", *START])
    [cache] = caches(place)
    assert cache.stat().st_mode & 0o777 == 0o644


def test_a_source_that_changes_while_the_cache_is_written_is_read_anew(place):
    """It is written with the time that the source had before it was read."""
    change = """
import os, sys
from importlib.machinery import SourceFileLoader
from meshproxy import start_cache
from meshproxy import cli, launch, worker
def get_code(self, name, whole=SourceFileLoader.get_code):
    code = whole(self, name)
    if name == "meshproxy.worker":
        os.utime(self.path, (1e9, 1e9))
    return code
SourceFileLoader.get_code = get_code
start_cache._write(start_cache._path())
"""
    run([sys.executable, "-c", change])
    count, launch, worker, _, _ = imported()
    assert (count > 150, launch, worker) == (True, True, False)


def test_full_disk_is_no_failure(place):
    run(START)
    [cache] = caches(place)
    cache.unlink()
    # No file may grow beyond a megabyte.
    said = run(["sh", "-c", 'ulimit -f 1024; trap "" XFSZ; exec "$@" 2>&1', "-", *START])
    assert said == ""
    assert [*(place / "pycache").rglob("start-*")] == []
