"""Errands: work done by a child."""

from __future__ import annotations

import os

import pytest

from meshproxy import process


def test_an_errand_brings_back_plain_data():
    parent = os.getpid()
    errand = process.Errand(lambda: {"pid": os.getpid(), "data": [1, b"x" * 1_000_000, None]})
    result = errand.result()
    assert result["pid"] != parent
    assert result["data"] == [1, b"x" * 1_000_000, None]


def test_an_errand_that_fails_says_so(capfd):
    def fail():
        raise ValueError("boom")

    with pytest.raises(RuntimeError, match="child process failed"):
        process.Errand(fail).result()
    assert "ValueError: boom" in capfd.readouterr().err


def test_an_errand_changes_nothing_here():
    seen = []
    process.Errand(lambda: seen.append(1)).result()
    assert seen == []


def test_cpu_count_is_at_least_one():
    assert 1 <= process.cpu_count() <= len(os.sched_getaffinity(0))


def test_an_errand_whose_result_nobody_takes_ends(capfd):
    errand = process.Errand(lambda: b"x" * 1_000_000)
    errand.close()
    with pytest.raises(RuntimeError, match="failed"):
        errand.wait()
    assert capfd.readouterr() == ("", "")
