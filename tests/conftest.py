"""What all tests share: options, settings, and the further tries of tests that drive real processes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.differential import verdicts

# Read when grpc is imported, by whichever test is the first to do so: its threads do not survive the fork of a proxy, nor do they have to.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# How fast an example runs says something about the machine, not about us. Each run tries the same examples, so that what it says is about the change;
# `--hypothesis-profile=explore` looks for new ones, and remembers in .hypothesis/ what failed.
settings.register_profile("meshproxy", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None)
settings.register_profile("explore", settings.get_profile("meshproxy"), derandomize=False, database=DirectoryBasedExampleDatabase(".hypothesis/examples"))
settings.load_profile("meshproxy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--subject", choices=("ours", "envoy"), default="ours", help="differential tests: compare Envoy with us, or with itself (harness check)")
    parser.addoption("--one-try", action="store_true", help="a test that fails has failed, also one that drives real processes")
    parser.addoption("--show", action="store_true", help="differential tests: print what Envoy did in each case")


@pytest.fixture(autouse=True)
def _loggers_as_new():
    """A test that configures process logging must not silence the logs that the next one looks at."""
    for name in ("meshproxy", *(name for name in logging.root.manager.loggerDict if name.startswith("meshproxy."))):
        logger = logging.getLogger(name)
        logger.propagate, logger.disabled = True, False
        logger.setLevel(logging.NOTSET)


# ---- further tries -----------------------------------------------------------------------------------------------------------------------------------------

# Tests of these folders drive real processes, or speak over real sockets. Such a test may fail once, for a machine that stood still in the wrong moment; it is
# run once more then, and if that fails, too, a last time when all others have ended and the machine is its own. Whoever reads the summary is told, with all of
# the failures. Many such tests are no bad luck: more than _UNSTEADY_LIMIT fail the run.
_SPEAKS_OVER_SOCKETS = frozenset(("attack", "budgets", "differential", "e2e", "interop", "unit"))
_UNSTEADY_LIMIT = 5
_HERE = Path(__file__).parent
_TIMER_AGAIN_S = 5.0
_TIMER = pytest.StashKey[object]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Beyond the limit the run has failed: more tries would only make a broken build take twice as long.
    if config.pluginmanager.hasplugin("rerunfailures") and config.option.max_suite_reruns is None:
        config.option.max_suite_reruns = 2 * _UNSTEADY_LIMIT


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--one-try") or config.option.usepdb or not config.pluginmanager.hasplugin("rerunfailures"):
        return
    for item in items:
        if item.path.is_relative_to(_HERE) and item.path.relative_to(_HERE).parts[0] in _SPEAKS_OVER_SOCKETS:
            item.add_marker(pytest.mark.flaky(reruns=1))


def _is_second_try(item: pytest.Item) -> bool:
    return getattr(item, "execution_count", 1) > 1


@pytest.fixture
def second_try(request: pytest.FixtureRequest) -> bool:
    """Whether the test has failed before in this run: what it shares with others is to be made anew."""
    return _is_second_try(request.node)


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Generator[None, object, object]:
    item.stash[_TIMER] = settings
    result = yield
    if settings.method == "signal":  # again and again: an asyncio task in which it is raised keeps the first one for itself
        signal.setitimer(signal.ITIMER_REAL, settings.timeout, _TIMER_AGAIN_S)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # A failure stops pytest-timeout's timer.
    if _is_second_try(item) and _TIMER in item.stash:
        item.ihook.pytest_timeout_set_timer(item=item, settings=item.stash[_TIMER])


def _unsteady(reporter: pytest.TerminalReporter) -> dict[str, list[pytest.TestReport]]:
    """The tests that passed when they were run again, by name: how they had failed before, in a phase or in several."""
    failed = {report.nodeid for kind in ("failed", "error") for report in reporter.stats.get(kind, [])}
    found: dict[str, list[pytest.TestReport]] = {}
    for report in reporter.stats.get("rerun", []):
        if report.nodeid not in failed:
            found.setdefault(report.nodeid, []).append(report)
    return found


def _try_alone(config: pytest.Config, reporter: pytest.TerminalReporter) -> bool:
    """Run the tests that failed twice by themselves; True when all of them passed, and counts as unsteady then what had failed."""
    failures = [report for kind in ("failed", "error") for report in reporter.stats.get(kind, [])]
    names = list(dict.fromkeys(report.nodeid for report in failures))
    tried_again = {report.nodeid for report in reporter.stats.get("rerun", [])}
    if not names or not tried_again.issuperset(names) or len(names) + len(_unsteady(reporter)) > _UNSTEADY_LIMIT:
        return False
    command = [sys.executable, "-m", "pytest", "--one-try", "-p", "no:cacheprovider", f"--subject={config.getoption('--subject')}", *names]
    done = subprocess.run(command, cwd=config.rootpath, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        return False
    for kind in ("failed", "error"):
        reporter.stats.pop(kind, None)
    reporter.stats.setdefault("rerun", []).extend(failures)
    return True


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):  # whoever sums up is told by the others
        return
    if session.exitstatus == pytest.ExitCode.TESTS_FAILED and _try_alone(session.config, reporter):
        session.exitstatus = pytest.ExitCode.OK
    if session.exitstatus == pytest.ExitCode.OK and len(_unsteady(reporter)) > _UNSTEADY_LIMIT:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _tell_unsteady(terminalreporter: pytest.TerminalReporter) -> None:
    unsteady = _unsteady(terminalreporter)
    if not unsteady:
        return
    terminalreporter.section("unsteady", red=True, bold=True)
    for report in (report for reports in unsteady.values() for report in reports):
        terminalreporter.write_sep("_", f"failure of {report.nodeid} ({report.when})", red=True)
        terminalreporter.line(report.longreprtext)
        for title, content in report.sections:
            terminalreporter.write_sep("-", title)
            terminalreporter.line(content)
    for name in unsteady:
        terminalreporter.line(f"UNSTEADY {name}", red=True)
    verdict = f"the run fails: {_UNSTEADY_LIMIT} may" if len(unsteady) > _UNSTEADY_LIMIT else "each is a defect, of the test or of the product"
    terminalreporter.line(f"{len(unsteady)} passed only when tried again; {verdict}", red=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    _tell_unsteady(terminalreporter)
    verdicts.tell(terminalreporter)  # where other processes run the tests, the one that sums up knows of no other conftest.py
