"""What the budgets share: a folder that other users may enter, and a service behind the proxy."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.backend import Backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the module. nginx's worker, another user when root starts it, has to reach it."""
    path = tmp_path_factory.mktemp("budget")
    parent = path
    while parent.stat().st_mode & 0o005 != 0o005:
        parent.chmod(0o755)
        parent = parent.parent
    return path


@pytest.fixture(scope="module")
def backend(folder):
    with Backend(folder / "backend") as running:
        yield running
