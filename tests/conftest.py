"""Options that all tests share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--subject", choices=("ours", "envoy"), default="ours", help="differential tests: compare Envoy with us, or with itself (harness check)")
    parser.addoption("--show", action="store_true", help="differential tests: print what Envoy did in each case")
