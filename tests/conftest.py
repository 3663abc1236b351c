"""Options that all tests share."""

from __future__ import annotations

import logging

import pytest
from hypothesis import HealthCheck, settings

# How fast an example runs says something about the machine, not about us.
settings.register_profile("meshproxy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("meshproxy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--subject", choices=("ours", "envoy"), default="ours", help="differential tests: compare Envoy with us, or with itself (harness check)")
    parser.addoption("--show", action="store_true", help="differential tests: print what Envoy did in each case")


@pytest.fixture(autouse=True)
def _loggers_as_new():
    """A test that configures process logging must not silence the logs that the next one looks at."""
    for name in ("meshproxy", *(name for name in logging.root.manager.loggerDict if name.startswith("meshproxy."))):
        logger = logging.getLogger(name)
        logger.propagate, logger.disabled = True, False
        logger.setLevel(logging.NOTSET)
