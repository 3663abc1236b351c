"""Fixtures of the attacks: one process a module, with the module's CONFIG; one neighbour a test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.attack.target import Target
from tests.differential import pki


@pytest.fixture(scope="session")
def pki_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates made for this run."""
    folder = tmp_path_factory.mktemp("pki")
    pki.create(folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def process(request: pytest.FixtureRequest, pki_folder: Path) -> AsyncIterator[Target]:
    """The process under attack."""
    process = Target(request.module.CONFIG, pki_folder)
    try:
        await process.start()
        yield process
    finally:
        await process.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def target(process: Target, second_try: bool) -> AsyncIterator[Target]:
    """The process, from calm to calm, with the neighbour at work. What the neighbour noticed, and what is left of the attack, fails the test."""
    if second_try:
        await process.renew()
    await process.begin()
    yield process
    await process.end()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All attacks run on the loop of their fixtures. pytest hands over the tests of every folder."""
    for item in items:
        if "process" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
